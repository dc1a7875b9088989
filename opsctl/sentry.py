"""The door to Sentry (or GlitchTip): one scrubbed event per failed command, inside one budget of time.

Of sentry_sdk only the formats are used: the DSN and the envelope. Its client obeys SENTRY_* variables that print or
copy every event, and its transport waits and prints at exit. Here an event holds what `event_of` puts into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote

import opsctl
from opsctl.errors import SettingsError
from opsctl.report import Outcome
from opsctl.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opsctl.report import Ending
    from opsctl.settings import Settings

BUDGET_S = 1.7
"""2 s are promised for all that is sent; the rest pays for loading this module and unloading sentry_sdk, on a machine
that is busy with the emergency itself."""
COOLDOWN_S = 30 * 60.0
SPOOL_LIMIT = 50
"""Envelopes kept while the endpoint is away; the oldest go first."""
NAMED_COMPANIES = 5
TAG_LIMIT = 200
"""Sentry drops a tag whose value is longer."""
TEXT_LIMIT = 8192
"""A longer text is not sent at all: cut in two, a secret no longer looks like one."""
MASK = "[secret]"


def report_failure(ending: Ending, settings: Settings) -> str | None:
    """Send one event about a failed command, then what earlier runs could not; gives the event's id if it was taken.

    Takes at most `BUDGET_S`, raises nothing and prints nothing, whatever the endpoint and the state folder do. The same
    command and kind is reported once in `COOLDOWN_S`, an emergency always. What was not answered waits in the spool.
    """
    event_id = uuid.uuid4().hex
    taken: list[str] = []

    def work(until: float) -> None:
        due = _is_due(ending, State(_state_folder(settings)))
        _deliver(settings, until, event_of(ending, settings, event_id) if due else None, taken)

    _within_budget(work)
    return event_id if event_id in taken else None


def deliver_spooled(settings: Settings) -> None:
    """Deliver what earlier runs could not; where nothing waits it costs one look into a folder."""
    _within_budget(lambda until: _deliver(settings, until, None, []))


def _within_budget(work: Callable[[float], None]) -> None:
    """Wait for `work` until the budget is over.

    A daemon thread, because nothing else bounds a resolver that hangs, an answer that drips or a disk that stalls; the
    end of the process does not wait for it.
    """
    until = time.monotonic() + BUDGET_S

    def quietly() -> None:
        with contextlib.suppress(Exception):  # an alert that fails changes nothing about the command it is about
            work(until)

    thread = threading.Thread(target=quietly, name="sentry", daemon=True)
    thread.start()
    thread.join(until - time.monotonic())


def _state_folder(settings: Settings) -> Path:
    try:
        return settings.state_dir
    except SettingsError:  # a user without a home
        return Path(os.devnull) / "opsctl"  # where nothing is ever found or written


def _is_due(ending: Ending, state: State) -> bool:
    name = re.sub(r"[^\w-]+", "-", f"sentry-{ending.command}-{_kind(ending)}")
    return ending.emergency or state.first_in(name, COOLDOWN_S)


def _kind(ending: Ending) -> str:
    failure = ending.report.failure
    return failure.kind if failure else str(ending.report.outcome)


# --- what is sent -----------------------------------------------------------------------------------------------------


def event_of(ending: Ending, settings: Settings, event_id: str) -> dict[str, Any]:
    """The event (https://develop.sentry.dev/sdk/data-model/event-payloads/), without any secret."""
    report, failure, kind = ending.report, ending.report.failure, _kind(ending)
    tags = {
        "command": ending.command,
        "company": ", ".join(report.companies) if len(report.companies) <= NAMED_COMPANIES else "several",
        "emergency": str(ending.emergency).lower(),
        "kind": kind,
        "exit_code": str(ending.exit_code),
        "run_id": ending.run_id,
    }
    run = {
        "elapsed_s": ending.elapsed_s,
        "summary": report.summary,
        "hint": failure.hint if failure else None,
        "runbook": failure.runbook if failure else None,
    }
    contexts: dict[str, Any] = {"run": run, "options": ending.options}
    if report.noteworthy:
        contexts["facts"] = report.facts
    if ending.rto:
        contexts["rto"] = {
            "target_s": ending.rto.target_s,
            "elapsed_s": ending.rto.elapsed_s,
            "scope": ending.rto.scope,
            "met": ending.rto.met,
        }
    words = {
        "message": failure.message if failure else report.summary,
        "fingerprint": [ending.command, kind],
        "tags": tags,
        "contexts": contexts,
        "breadcrumbs": {
            "values": [
                {
                    "category": "step",
                    "message": step.name,
                    "level": "info" if step.ok else "error",
                    "data": {"seconds": step.seconds, "ok": step.ok},
                }
                for step in ending.steps
            ]
        },
        "environment": settings.environment,
        "release": f"opsctl@{opsctl.__version__}",
        "server_name": socket.gethostname(),
    }
    clean: dict[str, Any] = scrubbed(words, settings.secrets())
    clean["tags"] = {name: value[:TAG_LIMIT] for name, value in clean["tags"].items() if value}
    # Not scrubbed: these hold no word of ours, and a password like "20" must not make them unreadable to the endpoint.
    return clean | {
        "event_id": event_id,
        "timestamp": datetime.now(UTC).isoformat(),
        "level": _level(ending),
        "platform": "python",
        "logger": "opsctl",
    }


def _level(ending: Ending) -> str:
    if ending.report.outcome is not Outcome.FAILED:
        return "warning"
    return "fatal" if ending.emergency else "error"


# --- what is not ------------------------------------------------------------------------------------------------------

# Every repetition that something must follow has a limit, so that no text takes long: the time is the budget's.
_QUOTE = r"\\{0,7}[\"']"  # JSON inside JSON has its quotes escaped, three levels deep
_BYTE = rf"(?:{_QUOTE}\d+{_QUOTE}\s*:\s*)?\d{{1,3}}"  # of [12, 34] or of {"0": 12, "1": 34}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?P<level>\\{1,7})".*?(?<!\\)(?P=level)\""""
_HIDDEN_NAMES = "passw(?:or)?d|passphrase|pwd|secret|token|private|key_?data|pairing_?code"
_SYSTEM_FOLDERS = "etc|home|media|mnt|opt|root|run|srv|tmp|usr|var"

SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), instead)
    for pattern, instead in (
        # what a connection string says before its host; a password may hold an @ or a /
        (r"://\S*@", f"://{MASK}@"),
        (r"-----BEGIN [^-]*-----.*?(?:-----END [^-]*-----|\Z)", MASK),
        # keys as Baileys and Node write bytes, also where the text was cut off
        (rf"\{{\s*{_QUOTE}type{_QUOTE}\s*:\s*{_QUOTE}Buffer{_QUOTE}.*?(?:\}}|\Z)", MASK),
        (rf"\{{\s*{_QUOTE}data{_QUOTE}\s*:\s*(?:\[[^\]]*\]|{_QUOTED})\s*,\s*{_QUOTE}type{_QUOTE}[^}}]*\}}?", MASK),
        (r"<Buffer [^>]*>?", MASK),
        (rf"(?:{_BYTE}\s*,\s*){{15,}}{_BYTE}", MASK),
        # password=... as libpq writes it, "password": ... as JSON does
        (rf"(?i)((?:{_HIDDEN_NAMES})\w{{0,32}}(?:\s*=|{_QUOTE}\s*[:=])\s*)(?:{_QUOTED}|\S+)", rf"\1{MASK}"),
        # WhatsApp addresses, and what looks like the phone number in them
        (r"(?<!\d)\d{5,}(?:[-._:]\d+){0,3}@[\w.-]+", MASK),
        (r"(?<![A-Za-z\d.])\+?\d{10,15}(?!\d)", MASK),
        # 32 bytes or more in hexadecimal or base64; a path is told apart by its first folder or by its lower case
        (r"[0-9a-fA-F]{64,}", MASK),
        (rf"(?<![\w+/-])(?!/(?:{_SYSTEM_FOLDERS})/)(?=[a-z0-9+/_-]*[A-Z])[A-Za-z0-9+/_-]{{43,}}={{0,2}}", MASK),
    )
)


def scrubbed(value: Any, secrets: Iterable[str]) -> Any:  # noqa: ANN401 - any JSON, the shape is kept
    """The value as plain JSON without secrets: neither the known ones in any spelling, nor what looks like one.

    >>> scrubbed({"to": "postgresql://user:password@db/wa", "why": "wrong word: hunter2"}, ["hunter2"])
    {'to': 'postgresql://[secret]@db/wa', 'why': 'wrong word: [secret]'}
    """
    spellings = sorted({s for secret in secrets if secret for s in _spellings(secret)}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, spellings)) or r"(?!)", re.IGNORECASE)

    def clean(value: Any) -> Any:  # noqa: ANN401
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {str(k): clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [clean(v) for v in value]
        text = str(value).encode(errors="replace").decode()  # a file name may hold bytes that JSON cannot
        if len(text) > TEXT_LIMIT:
            return f"[a text of {len(text)} characters]"
        text = known.sub(MASK, text)
        for shape, instead in SHAPES:
            text = shape.sub(instead, text)
        return text

    return clean(value)


def _spellings(secret: str) -> Iterator[str]:
    """A secret as it is, as a URL writes it, and as it stands between quotes."""
    for plain in {secret, unquote(secret)}:
        yield plain
        yield quote(plain)
        yield quote(plain, safe="")
        yield quote_plus(plain)
        yield json.dumps(plain)[1:-1]
        yield json.dumps(plain, ensure_ascii=False)[1:-1]
        yield repr(plain)[1:-1]


# --- how it gets there ------------------------------------------------------------------------------------------------


def _deliver(settings: Settings, until: float, event: dict[str, Any] | None, taken: list[str]) -> None:
    """Send the event, then the spool, oldest first, up to the first that is not answered; `taken` gets ids."""
    spool = _Spool(_state_folder(settings) / "spool")

    def envelopes() -> Iterator[_Envelope]:
        earlier = spool.names()
        if event is not None:
            yield spool.add(event["event_id"], _envelope(event))
        for name in earlier:
            if envelope := spool.claim(name):
                yield envelope

    endpoint = None
    for envelope in envelopes():
        with envelope.held:
            endpoint = endpoint or _Endpoint(settings["SENTRY_DSN"])
            status = endpoint.post(envelope.content, until)
            if not _is_final(status):
                return
            if status < 300:
                taken.append(envelope.event_id)
            envelope.forget()


def _is_final(status: int) -> bool:
    """Whether the endpoint has taken the event or never will; 408, 425 and 429 ask to come again (RFC 9110, 6585)."""
    return 200 <= status < 300 or (400 <= status < 500 and status not in {408, 425, 429})


def _envelope(event: dict[str, Any]) -> bytes:
    """The event as it travels. Without `sent_at`: a spooled event would be moved to the time of its delivery."""
    from sentry_sdk.envelope import Envelope, Item, PayloadRef

    item = Item(payload=PayloadRef(json=event), type="event")
    return Envelope(headers={"event_id": event["event_id"]}, items=[item]).serialize()


class _Endpoint:
    """Where the DSN points to; raises `ValueError` for a DSN that is none."""

    def __init__(self, dsn: str) -> None:
        from urllib.request import getproxies, proxy_bypass

        import certifi
        import urllib3
        from sentry_sdk.utils import Dsn

        parsed = Dsn(dsn)
        proxy = None if proxy_bypass(parsed.host) else getproxies().get(parsed.scheme)
        if ":" in parsed.host:
            parsed.host = f"[{parsed.host}]"  # an IPv6 address; sentry_sdk takes its brackets away
        client = f"opsctl/{opsctl.__version__}"
        auth = parsed.to_auth(client)
        self._url = auth.get_api_url()
        self._headers = {
            "Content-Type": "application/x-sentry-envelope",
            "User-Agent": client,
            "X-Sentry-Auth": auth.to_header(),
        }
        ca_certs = os.environ.get("SSL_CERT_FILE") or certifi.where()
        self._pool = urllib3.ProxyManager(proxy, ca_certs=ca_certs) if proxy else urllib3.PoolManager(ca_certs=ca_certs)

    def post(self, content: bytes, until: float) -> int:
        """The status of the answer; raises what urllib3 raises when there is none in time."""
        import urllib3

        timeout = urllib3.Timeout(total=until - time.monotonic())
        response = self._pool.request(
            "POST",
            self._url,
            body=content,
            headers=self._headers,
            timeout=timeout,
            retries=False,
            redirect=False,
            preload_content=False,
        )
        response.close()  # the status says it all; a body may drip
        return response.status


@dataclass(frozen=True, slots=True)
class _Envelope:
    """One envelope on its way: in a file that this run holds a lock on, or only in memory where none can be written."""

    event_id: str
    content: bytes
    path: Path | None
    held: contextlib.AbstractContextManager[object]

    def forget(self) -> None:
        """It was answered."""
        if self.path:
            self.path.unlink(missing_ok=True)


class _Spool:
    """Envelopes that nobody has answered yet: a file each, named so that they sort by age.

    Each run holds a lock on the file that it delivers, so that two runs never deliver the same one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Oldest first."""
        try:
            return sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        except OSError:
            return []

    def add(self, event_id: str, content: bytes) -> _Envelope:
        """Keep an envelope before it is tried, because the process may end while it waits for an answer."""
        path = self.folder / f"{time.time_ns()}-{event_id}"
        unseen = self.folder / f".{path.name}"  # until the lock is held and the content whole
        held = contextlib.ExitStack()
        try:
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = held.enter_context(_locked(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            file.write(content)
            file.flush()
            unseen.rename(path)
        except OSError:
            held.close()
            with contextlib.suppress(OSError):
                unseen.unlink(missing_ok=True)
            return _Envelope(event_id, content, None, contextlib.nullcontext())
        self._drop_the_oldest()
        return _Envelope(event_id, content, path, held)

    def claim(self, name: str) -> _Envelope | None:
        """An envelope of an earlier run; None where another run delivers it or has delivered it."""
        path = self.folder / name
        try:
            file = _locked(path, os.O_RDWR)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_nlink == 0:
            file.close()
            return None
        return _Envelope(name.rpartition("-")[2], file.read(), path, file)

    def _drop_the_oldest(self) -> None:
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir())[:-SPOOL_LIMIT]:
                path.unlink(missing_ok=True)


def _locked(path: Path, flags: int) -> IO[bytes]:
    """The file, locked; raises `BlockingIOError` where another run has it."""
    file = open(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b")  # noqa: PTH123, SIM115 - a descriptor
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
