"""Does a secret leave? Planted ones, every command, what breaks them, and a search through all that came out.

Nothing of the installation is touched: server, folders, settings and receivers live in one scratch folder. Before the
commands, the same secrets are let out on purpose in every channel, and the search has to find each of them: a search
that cannot fail proves nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import psycopg

from opsctl import process
from opsctl.baileys.buffers import bytes_of
from opsctl.catcher import catching
from opsctl.embedded import embedded_server
from opsctl.operations.drill import scratch_folder, translating
from opsctl.operations.drill_scene import made_scene
from opsctl.operations.fleet import create_schema, seed_fleet
from opsctl.operations.secret_search import Search, Secret
from opsctl.queries import query
from opsctl.report import Column, Failure, Report
from opsctl.stores.archive import ARCHIVE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from opsctl.catcher import Catcher
    from opsctl.embedded import EmbeddedServer
    from opsctl.journal import Journal
    from opsctl.operations.drill_scene import Scene

    Run = Callable[[Sequence[str], Mapping[str, str]], process.Finished]
    """Runs the words behind `opsctl` in an environment, to the end."""

COMPANIES, KEYS = 2, 60
_STEP_LIMIT_S = 120.0
_UNTIL_KILLED_S = 0.5
_KEY_LENGTHS = frozenset({32, 33, 64})
_PATHS = {"/api/": "Sentry envelopes", "/bot": "Telegram messages", "/ping/": "pings"}
CHANNELS = ("stdout", "stderr", "JSON", "state and history", "spool", "file names", *_PATHS.values())
_SHOWN_LEAKS = 5


@dataclass(frozen=True, slots=True)
class Channel:
    """One way out, and how much was searched in it."""

    channel: str
    searched: int
    found_when_planted: str
    """How many of the secrets that were let out here on purpose the search has found."""
    leaks: int


_COLUMNS = (
    Column("Where", "channel"),
    Column("Searched", "searched", numeric=True),
    Column("Let out and found", "found_when_planted", numeric=True),
    Column("Leaks", "leaks", numeric=True),
)


def _as_a_program(words: Sequence[str], environment: Mapping[str, str]) -> process.Finished:
    return process.run(process.opsctl_words(*words), environment=environment, timeout_s=_STEP_LIMIT_S)


@dataclass(frozen=True, slots=True)
class Phase:
    """Lines to type after something was broken, each in full."""

    name: str
    lines: tuple[str, ...]
    prepare: Callable[[Stage], None] | None = None
    settings: Callable[[Stage], Mapping[str, str]] | None = None


@dataclass
class Stage:
    """Where it takes place."""

    scene: Scene
    folder: Path
    server: EmbeddedServer
    catcher: Catcher
    search: Search
    planted: Planted
    run: Run
    typed: int = 0
    last_run: str = "RUN"
    """For the word RUN in a line: the run before it."""
    bugs: tuple[str, ...] = ()

    def execute(self, *statements: str, **values: str) -> None:
        with psycopg.connect(self.server.conninfo(), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement, values)

    def type(self, line: str, more: Mapping[str, str]) -> None:
        """Run one line and look through what it printed."""
        words = [self.last_run if word == "RUN" else word for word in shlex.split(line)]
        done = self.run(words, {**self.scene.environment, **more})
        self.typed += 1
        self.search.look("JSON" if "--json" in words else "stdout", line, done.stdout)
        self.search.look("stderr", line, done.stderr.encode())
        if done.exit_code in {70, None} or "Traceback" in done.stderr:
            self.bugs = (*self.bugs, f"{line} ended with {done.exit_code}")
        self.last_run = str(done.document().get("run_id") or self.last_run)

    def look_around(self, search: Search) -> None:
        """Look through what is left on the disk and what was caught since the last time."""
        state = self.folder / "state"
        for place in sorted(state.iterdir()) if state.is_dir() else ():
            channel = "spool" if place.name == "spool" else "state and history"
            if place.is_file():
                search.look(channel, place.name, place.read_bytes())
            elif place.name != ARCHIVE_FOLDER:  # which holds rows
                search.look_below(place, channel)
        search.look_below(self.folder / "tmp", "state and history")
        companies = [path for path in self.folder.rglob("company_*") if path.is_dir()]  # Baileys names what is in them
        search.look_at_names(self.folder, allowed_in=companies)
        while self.catcher.caught:
            request = self.catcher.caught.pop()
            channel = next((name for start, name in _PATHS.items() if request.path.startswith(start)), "pings")
            own = {"Telegram messages": ("bot token",), "pings": ("ping address",)}.get(channel, ())
            search.look(channel, request.path.partition("?")[0][:8], request.body)
            search.look(channel, "its address", request.path.encode(), allowed=own)


@dataclass(frozen=True, slots=True)
class Planted:
    """The secrets of the settings."""

    password: str
    other_password: str
    sentry_key: str
    bot_token: str
    ping_key: str

    @classmethod
    def new(cls) -> Planted:
        """Random ones, so that none is found by chance, with what a URL and a shell have to escape."""

        def word() -> str:
            return f"p@ss/{secrets.token_hex(8)} é%+"

        return cls(word(), word(), secrets.token_hex(16), f"{secrets.randbelow(10**9)}:{secrets.token_urlsafe(24)}",
                   secrets.token_hex(16))  # fmt: skip

    def secrets(self) -> Iterator[Secret]:
        yield Secret.text("password", self.password)
        yield Secret.text("another password", self.other_password)
        yield Secret.text("Sentry key", self.sentry_key)
        yield Secret.text("bot token", self.bot_token)
        yield Secret.text("ping address", self.ping_key)

    def url(self, port: int, password: str | None = None) -> str:
        return f"postgresql://postgres:{quote(password or self.password, safe='')}@127.0.0.1:{port}/postgres"


def look_for_leaks(
    *,
    commands: Sequence[str],
    scratch: Path | None,
    journal: Journal,
    run: Run = _as_a_program,
) -> Report:
    """Plant, run, break, search. `commands`: every command's name; those without a line below are run bare.

    Exit code 1 where a secret was found, where the search did not find what was let out on purpose, or where a command
    ended as a bug. Raises `Refused` where it cannot be held: no embedded PostgreSQL, no space, no such folder.
    """
    with translating("search", scratch), scratch_folder("opsctl-leaks-", scratch) as folder:
        with journal.step("start an embedded PostgreSQL and plant secrets"):
            place = folder / "scene"
            place.mkdir(0o711)
            (place / "tmp").mkdir(0o777)
        with embedded_server(folder, tcp=True) as server, catching() as catcher:
            stage = _stage(server, catcher, place, run)
            with journal.step("let them out on purpose"):
                control = _let_out(stage)
            for phase in (*PHASES, _the_rest(commands)):
                with journal.step(phase.name):
                    _act(stage, phase)
    return _report(stage, control)


def _stage(
    server: EmbeddedServer,
    catcher: Catcher,
    place: Path,
    run: Run,
) -> Stage:
    planted = Planted.new()
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.pgconn.change_password(b"postgres", planted.password.encode())
    server.password = planted.password
    with psycopg.connect(server.conninfo()) as connection:
        create_schema(connection)
        seed_fleet(connection, companies=COMPANIES, keys_per_company=KEYS, seed=secrets.randbelow(10**6))
        values = connection.execute(query("leaks_planted")).fetchall()
    scene = made_scene(place, server)
    scene.environment.update(
        DATABASE_URL=planted.url(server.port),
        TMPDIR=str(place / "tmp"),
        WHATSAPP_ADDRESS="none",
        SENTRY_DSN=f"http://{planted.sentry_key}@127.0.0.1:{catcher.port}/1",
        TELEGRAM_API_URL=f"http://127.0.0.1:{catcher.port}",
        TELEGRAM_BOT_TOKEN=planted.bot_token,
        TELEGRAM_CHAT_ID="1",
        HEALTHCHECK_URL=f"http://127.0.0.1:{catcher.port}/ping/{planted.ping_key}/{{job}}",
    )
    found = [secret for row in values for secret in _secrets_of(*row)]
    search = Search((*planted.secrets(), *{secret.spellings: secret for secret in found}.values()))
    return Stage(scene, place, server, catcher, search, planted, run)


def _secrets_of(company: str, key_type: str, text: str) -> Iterator[Secret]:
    """The keys and identities in one value, in whatever form it has them."""
    value = json.loads(text)
    for key in _keys_in(value):
        yield Secret.key(f"{key_type} of {company}", key)
    if key_type == "creds":
        yield Secret.text(f"account of {company}", value["me"]["id"].partition(":")[0])


def _keys_in(value: Any) -> Iterator[bytes]:  # noqa: ANN401 - any JSON
    data = bytes_of(value)
    if data is None and isinstance(value, str):
        with suppress(binascii.Error, ValueError):
            data = base64.b64decode(value, validate=True)
    if data is not None:
        if len(data) in _KEY_LENGTHS:
            yield data
    elif isinstance(value, (dict, list)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _keys_in(below)


# --- the search can fail ----------------------------------------------------------------------------------------------


def _let_out(stage: Stage) -> dict[str, int]:
    """Let every secret out in every channel, and forget it again: how many the search has found, by channel."""
    search = Search(stage.search.secrets)
    everything = "\n".join(secret.plain for secret in search.secrets)
    program = [sys.executable, "-c", f"import sys\nfor out in (sys.stdout, sys.stderr): out.write({everything!r})"]
    done = process.run(program, environment=stage.scene.environment, timeout_s=_STEP_LIMIT_S)
    for channel, said in (("stdout", done.stdout), ("JSON", done.stdout), ("stderr", done.stderr.encode())):
        search.look(channel, "let out", said)
    state, names = stage.folder / "state", stage.folder / "tmp"
    (state / "spool").mkdir(parents=True)
    (state / "history.jsonl").write_text(everything, encoding="utf-8")
    (state / "spool" / "1-let-out").write_text(everything, encoding="utf-8")
    for secret in search.secrets:
        (names / secret.plain).touch()
    for path in _PATHS:
        _post(stage.catcher, path, everything.encode())
    stage.look_around(search)
    shutil.rmtree(state)
    for name in names.iterdir():
        name.unlink()
    return {channel: len({leak.secret for leak in search.leaks if leak.channel == channel}) for channel in CHANNELS}


def _post(catcher: Catcher, path: str, body: bytes) -> None:
    request = Request(f"http://127.0.0.1:{catcher.port}{path}", data=body, method="POST")
    with urlopen(request, timeout=5) as answer:  # noqa: S310
        answer.read()


# --- what is typed ----------------------------------------------------------------------------------------------------


def _act(stage: Stage, phase: Phase) -> None:
    if phase.prepare:
        phase.prepare(stage)
    more = phase.settings(stage) if phase.settings else {}
    for line in phase.lines:
        stage.type(line, more)
    stage.look_around(stage.search)


def _expired_and_mistyped(stage: Stage) -> None:
    stage.execute(query("leaks_expire"), query("leaks_mistype"))


def _a_key_less(stage: Stage) -> None:
    """What a repair puts back; and folders that differ from their rows."""
    stage.execute(query("drill_corrupt_creds"), company_id="962302")


def _rows_forbidden(stage: Stage) -> None:
    stage.execute(query("drill_delete_keys"), company_id="962302")
    stage.execute(query("leaks_forbid"))


def _torn(stage: Stage) -> None:
    """Credentials and a cache that end in the middle, beside a table whose credentials are damaged."""
    stage.execute(query("drill_corrupt_creds"), company_id="962303")
    for path in (*stage.scene.sessions.glob("company_*/creds.json"), stage.folder / "app" / ".baileys-cache.json"):
        if path.exists():
            os.truncate(path, path.stat().st_size // 2)


def _killed(stage: Stage) -> None:
    """Restores that are stopped while they work, by both signals."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        words = process.opsctl_words("sessions", "restore", "--replace", "--discard-changes", "--yes")
        restore = process.start(words, environment=stage.scene.environment)
        with suppress(subprocess.TimeoutExpired):
            restore.wait(_UNTIL_KILLED_S)
        restore.send_signal(request)
        restore.wait(_STEP_LIMIT_S)


def _tables_gone(stage: Stage) -> None:
    stage.execute(query("drill_drop_tables"))


def _receivers_fail(stage: Stage) -> None:
    stage.server.stop()
    stage.catcher.status = 500


def _receivers_answer(stage: Stage) -> None:
    stage.catcher.status = 200


def _wrong_password(stage: Stage) -> dict[str, str]:
    url = stage.planted.url(stage.server.port, stage.planted.other_password)
    return {"DATABASE_URL": url, "OPSCTL_REPLICA_URL": url}


def _torn_address(form: str) -> Callable[[Stage], dict[str, str]]:
    """An address with a password in it, as nobody can read it."""
    return lambda stage: {"DATABASE_URL": form.format(stage.planted.password, port=stage.server.port)}


def _torn_settings(stage: Stage) -> dict[str, str]:
    """Secrets where they do not belong, and a file whose quotes are open."""
    planted = stage.planted
    path = stage.folder / "app" / "torn.env"
    path.write_text(
        f"POSTGRES_PASSWORD='{planted.other_password}\nSENTRY_DSN=\"{planted.sentry_key}\n", encoding="utf-8"
    )
    return {
        "OPSCTL_ENV_FILE": str(path),
        "SENTRY_DSN": planted.sentry_key,
        "TELEGRAM_BOT_TOKEN": f"token {planted.bot_token}",
        "HEALTHCHECK_URL": planted.ping_key,
    }


_ASKS = ("triage --json", "sessions restore --json", "db health --nagios")
_READS = ("config check --json", "sessions list --verbose")
PHASES = (
    Phase(
        "every command, all well",
        (
            "standby sync --verbose",
            "standby status --verbose",
            "triage --json",
            "config show --verbose",
            "cache warm --json",
            "cache inspect --against database --json",
            "cache clear --dry-run --json",
            "db health --verbose",
            "db health --nagios",
            "keys stats --json",
            "sessions list --verbose",
            "sessions restore --dry-run --verbose",
            "sessions restore --service-stopped --json",
            "sessions verify --verbose",
            "sessions verify --against database --json",
            "drill history --json",
            "drill run --scratch /nowhere --json",
            "runbook show first-five-minutes",
        ),
    ),
    Phase(
        "keys expired and mistyped",
        (
            "keys doctor --verbose",
            "keys doctor --fix --service-stopped --yes --json",
            "keys undo RUN --yes --json",
            "keys cleanup --explain",
            "keys cleanup --dry-run --verbose",
            "keys cleanup --type sender-key --retention-days 7 --policy all --dry-run --verbose",
            "keys cleanup --yes --json",
            "keys undo RUN --dry-run --verbose",
            "keys undo RUN --yes --json",
            "keys runs --verbose",
        ),
        prepare=_expired_and_mistyped,
    ),
    Phase(
        "folders brought back, and repaired",
        (
            "sessions failback --dry-run --verbose",
            "sessions failback --service-stopped --yes --json",
            "sessions failback --undo RUN --service-stopped --yes --json",
            "sessions repair --company 962302 --from standby --dry-run --verbose",
            "sessions repair --company 962302 --from standby --service-stopped --yes --json",
            "sessions undo --yes --json",
        ),
        prepare=_a_key_less,
    ),
    Phase(
        "rows that PostgreSQL refuses, quoting them",
        (
            "sessions repair --company 962302 --from standby --service-stopped --yes --json",
            "keys doctor --fix --service-stopped --yes --json",
        ),
        prepare=_rows_forbidden,
    ),
    Phase("stopped and killed while it works", ("sessions restore --deadline 0.1 --json",), prepare=_killed),
    Phase(
        "torn files and damaged credentials",
        (
            "triage --json",
            "cache inspect --verbose",
            "sessions verify --verbose",
            "sessions restore --json",
            "sessions failback --service-stopped --yes --json",
            "standby sync --json",
        ),
        prepare=_torn,
    ),
    Phase("a wrong password", (*_ASKS, "standby sync --verbose", "keys stats --json"), settings=_wrong_password),
    *(
        Phase(f"an address that cannot be read ({number})", _READS, settings=_torn_address(form))
        for number, form in enumerate(
            (
                "postgresql://postgres:{0}@127.0.0.1:{port}/postgres",
                "postgresql://postgres:%zz{0}@127.0.0.1/postgres",
                "host=127.0.0.1 password={0}",
                "password '{0}",
            ),
            1,
        )
    ),
    Phase(
        "settings that make no sense",
        ("config show --json", "config check --verbose", "triage --json"),
        settings=_torn_settings,
    ),
    Phase("tables that are gone", (*_ASKS, "keys cleanup --yes --json"), prepare=_tables_gone),
    Phase(
        "no database, and receivers that fail",
        ("sessions restore --source database --json", "keys cleanup --yes --quiet", "standby sync --quiet"),
        prepare=_receivers_fail,
    ),
    Phase("receivers that answer again", ("sessions list --json",), prepare=_receivers_answer),
)
"""In this order: what one leaves is what the next one finds."""


def _the_rest(commands: Sequence[str]) -> Phase:
    """Commands that have no line of their own, with nothing but their name."""
    lines = [line for phase in PHASES for line in phase.lines]
    return Phase(
        "the other commands",
        tuple(f"{name} --json" for name in commands if not any(line.startswith(name) for line in lines)),
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def _report(stage: Stage, control: Mapping[str, int]) -> Report:
    search, expected = stage.search, len(stage.search.secrets)
    rows = [
        Channel(
            channel,
            search.pieces[channel],
            f"{control[channel]} of {expected}",
            sum(leak.channel == channel for leak in search.leaks),
        )
        for channel in CHANNELS
    ]
    blind = [row.channel for row in rows if control[row.channel] != expected]
    leaks = list(dict.fromkeys(f"{leak.secret.name} in {leak.channel}: {leak.where}" for leak in search.leaks))
    problems = [*leaks, *(f"the search is blind in {channel}" for channel in blind), *stage.bugs]
    failure = None
    if problems:
        more = f"; and {len(problems) - _SHOWN_LEAKS} more" if len(problems) > _SHOWN_LEAKS else ""
        kind = "leaked" if leaks else "search-failed"
        failure = Failure(kind, "; ".join(problems[:_SHOWN_LEAKS]) + more, hint="report it; do not send this output on")
    return Report(
        f"{expected} secrets planted, {stage.typed} lines typed, {len(search.leaks)} leaks",
        rows=rows,
        columns=_COLUMNS,
        facts={"secrets": expected, "lines": stage.typed, "leaks": leaks, "blind": blind, "bugs": list(stage.bugs)},
        exit_code=1 if problems else 0,
        failure=failure,
    )
