"""All that is sent about a run: one place, one budget of time, nothing raised, nothing printed.

Each receiver has a thread of its own, so that one that hangs holds up no other. What must arrive is in the spool before
it is tried; whatever is not answered there leaves with a later run.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from opsctl.errors import SettingsError
from opsctl.jobs import LOCKED
from opsctl.spool import Spool
from opsctl.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.jobs import Job
    from opsctl.report import Ending
    from opsctl.settings import Settings
    from opsctl.spool import Waiting
    from opsctl.web import Endpoint

BUDGET_S = 1.5
"""2 s are promised for all that is sent; the rest pays for loading and unloading what sends it, on a machine that is
busy with the emergency itself."""
BEGINNING_S = 0.3
"""Of that, what telling of a job's beginning takes from the job: the same loading, on the same processor."""
COOLDOWN_S = 30 * 60.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How it stands with a receiver: how much waits for it, and the status of its last answer, if there was one."""

    waiting: int
    status: int | None
    at: str | None


def standing(state_dir: Path, receiver: str) -> Standing:
    """For `sentry` and `telegram`."""
    answer = State(state_dir).kept(f"answers/{receiver}")
    status = answer.get("status")
    waiting = len(_spool(state_dir, receiver).names())
    return Standing(waiting, status if isinstance(status, int) else None, answer.get("at"))


def _spool(state_dir: Path, receiver: str) -> Spool:
    return Spool(state_dir / "spool" / receiver)


class Notices:
    """What one run tells others; of a watched `job` also that it has begun."""

    def __init__(self, settings: Settings, job: Job | None = None) -> None:
        self._settings = settings
        self._job = job
        self._check_in_id = uuid.uuid4()
        self._beginning: list[threading.Thread] = []
        self._refusals: list[str] = []

    @property
    def refusals(self) -> tuple[str, ...]:
        """A sentence for each receiver of signals that has answered that it does not take them."""
        return tuple(sorted(set(self._refusals)))

    def begin(self) -> None:
        """Tell in the background that the job has begun; nobody waits for it."""
        until = time.monotonic() + BUDGET_S
        self._beginning = [_in_background(partial(send, until)) for send in self._signals(None)]

    def end(self, ending: Ending, *, event: bool, message: bool = False) -> str | None:
        """Tell how it ended, and what earlier runs could not; gives the id of the event if Sentry has taken it.

        Takes at most `BUDGET_S`, whatever receivers and the state folder do. An `event` (Sentry) or a `message`
        (Telegram) of the same command and kind is sent once in `COOLDOWN_S`; an emergency's event always.
        """
        until = time.monotonic() + BUDGET_S - (BEGINNING_S if self._beginning else 0.0)
        event_id = uuid.uuid4().hex
        taken: list[str] = []
        sends = self._signals(ending)
        if self._settings["SENTRY_DSN"]:
            sends.append(partial(self._send_event, ending if event else None, event_id, taken))
        if self._settings["TELEGRAM_BOT_TOKEN"] and self._settings["TELEGRAM_CHAT_ID"]:
            sends.append(partial(self._send_message, ending if message else None))
        for thread in [_in_background(partial(send, until)) for send in sends]:
            thread.join(until - time.monotonic())
        return event_id if event_id in taken else None

    def _signals(self, ending: Ending | None) -> list[Callable[[float], None]]:
        """What tells those who watch the job; never spooled, because late it would be wrong."""
        if self._job is None:
            return []
        sends: list[Callable[[float], None]] = []
        if self._settings["SENTRY_DSN"]:
            sends.append(partial(self._check_in, self._job, ending))
        if self._settings["HEALTHCHECK_URL"] and not (ending and ending.exit_code == LOCKED):
            sends.append(partial(self._ping, self._job, ending))
        return sends

    def _check_in(self, job: Job, ending: Ending | None, until: float) -> None:
        from opsctl import sentry

        word = "in_progress" if ending is None else "ok" if ending.exit_code in {0, LOCKED} else "error"
        duration_s = ending.elapsed_s if ending else None
        content = sentry.check_in(job, self._settings, self._check_in_id.hex, status=word, duration_s=duration_s)
        self._after_the_beginning(ending, until)
        status = sentry.endpoint(self._settings["SENTRY_DSN"]).post(content, until)
        self._note_refusal(status, f"Sentry answers {status} to check-ins, so nobody watches this job (SENTRY_DSN)")

    def _ping(self, job: Job, ending: Ending | None, until: float) -> None:
        from opsctl.web import Endpoint

        word = "start" if ending is None else str(ending.exit_code or "")
        endpoint = Endpoint(_ping_address(self._settings["HEALTHCHECK_URL"], job, word, self._check_in_id))
        self._after_the_beginning(ending, until)
        status = endpoint.get(until)
        self._note_refusal(status, f"the dead-man ping is answered {status}: is HEALTHCHECK_URL still right?")

    def _note_refusal(self, status: int, sentence: str) -> None:
        """What waits for no later run is refused by a redirection too, which is not followed."""
        if not 200 <= status < 300 and (_is_final(status) or status < 400):
            self._refusals.append(sentence)

    def _after_the_beginning(self, ending: Ending | None, until: float) -> None:
        """No end before its beginning: let what is still on its way have half of the time."""
        if ending is not None:
            for thread in self._beginning:
                thread.join((until - time.monotonic()) / 2)

    def _send_event(self, ending: Ending | None, event_id: str, taken: list[str], until: float) -> None:
        from opsctl import sentry

        fresh = None
        if ending and (ending.emergency or self._first("sentry", ending)):
            fresh = event_id, sentry.envelope(sentry.event_of(ending, self._settings, event_id))
        self._deliver("sentry", fresh, lambda: sentry.endpoint(self._settings["SENTRY_DSN"]), until, taken)

    def _send_message(self, ending: Ending | None, until: float) -> None:
        from opsctl import telegram

        fresh = None
        if ending and self._first("telegram", ending):
            fresh = uuid.uuid4().hex, telegram.request_of(ending, self._settings)
        self._deliver("telegram", fresh, lambda: telegram.endpoint(self._settings), until, [])

    def _first(self, receiver: str, ending: Ending) -> bool:
        name = re.sub(r"[^\w-]+", "-", f"{receiver}-{ending.command}-{ending.kind}")
        return State(self._folder).first_in(name, COOLDOWN_S)

    def _deliver(
        self,
        receiver: str,
        fresh: tuple[str, bytes] | None,
        connect: Callable[[], Endpoint],
        until: float,
        taken: list[str],
    ) -> None:
        """Post what is `fresh` (name, content), then what waits, oldest first, up to the first that is not answered.

        `taken` gets the names that were accepted. Loads and connects to nothing where nothing is to be posted.
        """
        spool = _spool(self._folder, receiver)

        def contents() -> Iterator[Waiting]:
            earlier = spool.names()
            if fresh is not None:
                yield spool.add(*fresh)
            for name in earlier:
                if waiting := spool.claim(name):
                    yield waiting

        endpoint = None
        for waiting in contents():
            with waiting.held:
                endpoint = endpoint or connect()
                status = endpoint.post(waiting.content, until)
                if not _is_final(status):
                    return
                if status < 300:
                    taken.append(waiting.name)
                waiting.forget()
                at = datetime.now(UTC).isoformat(timespec="seconds")
                State(self._folder).keep(f"answers/{receiver}", {"at": at, "status": status})

    @property
    def _folder(self) -> Path:
        try:
            return self._settings.state_dir
        except SettingsError:  # a user without a home
            return Path(os.devnull) / "opsctl"  # where nothing is ever found or written


def _in_background(work: Callable[[], None]) -> threading.Thread:
    """Begin `work` in a daemon thread, for which the end of the process does not wait.

    Nothing else bounds a resolver that hangs, an answer that drips or a disk that stalls.
    """

    def quietly() -> None:
        with contextlib.suppress(Exception):  # an alert that fails changes nothing about the command it is about
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def _ping_address(base: str, job: Job, word: str, run: uuid.UUID) -> str:
    """Where a dead-man switch takes a signal (https://healthchecks.io/docs/http_api/).

    >>> from opsctl.jobs import JOBS
    >>> _ping_address("https://hc-ping.com/key/{job}?create=1", JOBS[0], "start", uuid.UUID(int=7))
    'https://hc-ping.com/key/standby-sync/start?create=1&rid=00000000-0000-0000-0000-000000000007'
    """
    parts = urlsplit(base.replace("{job}", job.name))
    path = "/".join(filter(None, (parts.path.rstrip("/"), word)))
    return urlunsplit(parts._replace(path=path, query="&".join(filter(None, (parts.query, f"rid={run}")))))


def _is_final(status: int) -> bool:
    """Whether the receiver has taken it or never will; 408, 425 and 429 ask to come again (RFC 9110, 6585)."""
    return 200 <= status < 300 or (400 <= status < 500 and status not in {408, 425, 429})
