"""A real PostgreSQL, a fresh database per test, and opsctl as an operator runs it."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier

from opsctl.__main__ import COLLECT_AFTER
from opsctl.embedded import EmbeddedServer, embedded_server
from opsctl.operations.fleet import create_schema
from tests import needs
from tests.forks import Finished, Forks, forks

__all__ = ["Database", "Finished", "RunOpsctl"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

EMBEDDED = 18
DEBIAN = 15

each_postgres = pytest.mark.parametrize("database", [EMBEDDED, DEBIAN], indirect=True)
"""Runs a test on both: `@each_postgres def test_...(database)`; skipped on 15 where Debian's programs are missing."""


def debian_postgres_bin() -> Path | None:
    """The programs of Debian's PostgreSQL 15, if they are installed."""
    return needs.POSTGRESQL_15 if (needs.POSTGRESQL_15 / "postgres").exists() else None


def pytest_configure() -> None:
    """A shell starts what it does not wait for (`... &`) with Ctrl-C ignored, and so would run all that we start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that are marked as long: one that began last would go on when all others are done.

    Each process is dealt as long a piece of the list, one after the other (`--dist worksteal`).
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    piece, order = len(items) // processes, []
    for process in range(processes):
        first = long[process::processes]
        rest = max(0, piece - len(first))
        order += first + others[:rest]
        others = others[rest:]
    items[:] = order + others


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: going through it again and again takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


@dataclass(frozen=True)
class Database:
    """A database of its own for one test, with the schema and no rows."""

    server: EmbeddedServer
    name: str

    @property
    def conninfo(self) -> str:
        return self.server.conninfo(self.name)

    @property
    def url(self) -> str:
        """The same as a DATABASE_URL."""
        words = conninfo_to_dict(self.conninfo)
        return f"postgresql://{words['user']}@{quote(str(words['host']), safe='')}:{words['port']}/{self.name}"

    def connect(self, **more: Any) -> psycopg.Connection:
        """Connect in autocommit, so that no test waits for another's transaction; `more` goes to psycopg.connect."""
        return psycopg.connect(self.conninfo, **{"autocommit": True, **more})

    def execute(self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own; returns its rows, or none."""
        with self.connect() as connection:
            cursor = connection.execute(sql.encode(), params)
            return cursor.fetchall() if cursor.description else []


class RunOpsctl(Protocol):
    """What the fixture `run_opsctl` is."""

    def __call__(
        self,
        *args: str | Path,
        env: Mapping[str, str] = ...,
        timeout: float = ...,
        stdin: str = ...,
        cwd: Path = ...,
        before: str = ...,
    ) -> Finished: ...


@pytest.fixture(scope="session")
def postgres_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], EmbeddedServer]]:
    """Start the server of a major version when the first test asks for it; one per worker."""
    with ExitStack() as running:

        @functools.cache
        def start(major: int) -> EmbeddedServer:
            bin_dir = None
            if major == DEBIAN and (bin_dir := debian_postgres_bin()) is None:
                pytest.skip(f"{needs.NOT_PROVEN}PostgreSQL {DEBIAN}, production's major version")
            scratch = tmp_path_factory.mktemp(f"postgres{major}")
            server = running.enter_context(embedded_server(scratch, bin_dir=bin_dir))
            with psycopg.connect(server.conninfo(), autocommit=True) as connection:
                connection.execute("CREATE DATABASE template_opsctl")
            with psycopg.connect(server.conninfo("template_opsctl")) as connection:
                create_schema(connection)
            return server

        yield start


@pytest.fixture(scope="session")
def postgres(postgres_of: Callable[[int], EmbeddedServer]) -> EmbeddedServer:
    """The server that this worker's tests share: neither stop nor freeze it, `embedded_server` gives you another."""
    return postgres_of(EMBEDDED)


_numbers = itertools.count(1)


@pytest.fixture
def database(request: pytest.FixtureRequest, postgres_of: Callable[[int], EmbeddedServer]) -> Iterator[Database]:
    """A fresh database with the tables of production."""
    server = postgres_of(getattr(request, "param", EMBEDDED))
    fresh = Database(server, f"test_{next(_numbers)}")
    name = Identifier(fresh.name)
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE template_opsctl STRATEGY FILE_COPY").format(name))
    yield fresh
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs of opsctl that are forked from one process; one per worker."""
    with forks(tmp_path_factory.mktemp("forks")) as forking:
        yield forking


@pytest.fixture
def run_opsctl(tmp_path: Path, forking: Forks) -> RunOpsctl:
    """Run opsctl as a process of its own, with nothing of the developer's environment but PATH.

    It is forked where everything is imported already; the tests of its start, and of signals, start the program itself.
    """

    def run(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        stdin: str = "",
        cwd: Path = tmp_path,
        before: str = "",
    ) -> Finished:
        home, state = tmp_path / "home", tmp_path / "state"
        home.mkdir(exist_ok=True)
        clean = {"HOME": str(home), "OPSCTL_STATE_DIR": str(state), **(env or {})}
        return forking.run(*args, env=clean, timeout=timeout, stdin=stdin, cwd=cwd, before=before)

    return run
