"""Where the search for leaks takes place: a fleet and settings full of planted secrets, and all that came out."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import shlex
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg

from opsctl import process
from opsctl.baileys.buffers import bytes_of
from opsctl.catcher import catching
from opsctl.embedded import embedded_server
from opsctl.operations.drill_scene import made_scene
from opsctl.operations.fleet import create_schema, seed_fleet
from opsctl.operations.secret_search import Search, Secret
from opsctl.queries import query
from opsctl.stores.archive import ARCHIVE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from opsctl.catcher import Catcher
    from opsctl.embedded import EmbeddedServer
    from opsctl.operations.drill_scene import Scene

    Run = Callable[[Sequence[str], Mapping[str, str]], process.Finished]
    """Runs the words behind `opsctl` in an environment, to the end."""

COMPANIES, KEYS = 2, 60
STEP_LIMIT_S = 120.0
PATHS = {"/api/": "Sentry envelopes", "/bot": "Telegram messages", "/ping/": "pings"}
"""Who is sent what arrives under which path."""
CHANNELS = ("stdout", "stderr", "JSON", "state and history", "spool", "file names", *PATHS.values())
_KEY_LENGTHS = frozenset({32, 33, 64})


def as_a_program(words: Sequence[str], environment: Mapping[str, str]) -> process.Finished:
    """Run opsctl as an operator would."""
    return process.run(process.opsctl_words(*words), environment=environment, timeout_s=STEP_LIMIT_S)


def with_a_full_disk(words: Sequence[str], environment: Mapping[str, str]) -> process.Finished:
    """As `as_a_program`, where no file can grow beyond 4 KiB: setrlimit(2) needs neither root nor a mount."""
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *process.opsctl_words(*words)]
    return process.run(limited, environment=environment, timeout_s=STEP_LIMIT_S)


@dataclass(frozen=True, slots=True)
class Phase:
    """Lines to type after something was broken, each in full."""

    name: str
    lines: tuple[str, ...]
    prepare: Callable[[Stage], None] | None = None
    settings: Callable[[Stage], Mapping[str, str]] | None = None
    run: Run | None = None
    """How its lines are run, if not as those of the others."""
    tidy: Callable[[Stage], None] | None = None
    """Undo what `prepare` did, for the next one."""


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

    def type(self, line: str, more: Mapping[str, str], run: Run | None = None) -> None:
        """Run one line and look through what it printed."""
        words = [self.last_run if word == "RUN" else word for word in shlex.split(line)]
        done = (run or self.run)(words, {**self.scene.environment, **more})
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
            channel = next((name for start, name in PATHS.items() if request.path.startswith(start)), "pings")
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


@contextmanager
def planted_stage(folder: Path, run: Run) -> Iterator[Stage]:
    """A stage in a folder of its own below `folder`, with a server and receivers that end with it."""
    place = folder / "scene"
    place.mkdir(0o711)
    (place / "tmp").mkdir(0o777)
    with embedded_server(folder, tcp=True) as server, catching() as catcher:
        yield _stage(server, catcher, place, run)


def _stage(server: EmbeddedServer, catcher: Catcher, place: Path, run: Run) -> Stage:
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
