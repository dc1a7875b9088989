"""The door to PostgreSQL: addresses, connections under a wall clock, and errors without secrets.

No server setting bounds a step: a server that is frozen after accepting answers neither statement_timeout nor TCP
keepalives, so every wait here ends by our own clock. What psycopg says is never repeated: its errors quote rows, and
those about connection strings quote passwords. Only the server's primary message and SQLSTATE pass.
"""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import conninfo, generators, pq, waiting
from psycopg.rows import class_row

from opsctl import greeting
from opsctl.errors import DatabaseUnavailable, SettingsError
from opsctl.retry import retrying
from opsctl.signals import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import LiteralString

    from psycopg.abc import Buffer, PQGen
    from psycopg.pq.abc import PGconn, PGresult

    from opsctl.settings import Settings

T = TypeVar("T")

STALL_S = 10.0
"""A server that says nothing for this long, in the middle of a step, counts as frozen."""
COUNTING_STALL_S = 120.0
"""But one that counts millions of rows on a starved disk is silent until it has counted them all."""
COPY_PIECE = 256 * 1024
CONNECT_S = 5.0
"""All attempts to connect together."""
_INTERVAL_S = 0.1

# Parameters that other PostgreSQL clients put into DATABASE_URL and libpq does not know.
_FOREIGN_PARAMETERS = frozenset(
    {"pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "schema", "statement_cache_size", "supa"}
)
_NO_VERIFY = {"sslmode=no-verify": "sslmode=require"}

_ENCODE = "percent-encode / @ : ? # in its password"

_TRANSIENT_SQLSTATES = frozenset({"08006", "08003", "57P03"})

# libpq reports a failed connection as text only. (kind, transient, pattern), the first that fits.
_CONNECTION_FAILURES: tuple[tuple[str, bool, re.Pattern[str]], ...] = tuple(
    (kind, transient, re.compile(pattern, re.IGNORECASE))
    for kind, transient, pattern in (
        ("authentication", False, r"password authentication failed|no password supplied|authentication failed"),
        ("authentication", False, r"pg_hba|role .* does not exist|is not permitted to log in"),
        ("missing-database", False, r"database .* does not exist"),
        (
            "too-many-clients",
            False,
            r"too many clients|remaining connection slots|too many connections|no more connections allowed",
        ),
        ("starting", True, r"the database system is (starting up|shutting down|in recovery mode|not yet accepting)"),
        ("tls", False, r"SSL|certificate|TLS"),
        ("name-not-found", True, r"could not translate host name|Name or service not known|name resolution"),
        ("refused", True, r"Connection refused|No such file or directory"),
        ("timeout", True, r"timed out|timeout expired|No route to host|Network is unreachable"),
        ("reset", True, r"server closed the connection|Connection reset|Broken pipe"),
    )
)
_STATEMENT_FAILURES = {
    "42P01": "missing-table",
    "42703": "missing-column",
    "42501": "permission",
    "55P03": "locked",
    "53100": "disk-full",
    "53300": "too-many-clients",
}
_SENTENCES = {
    "authentication": "the server does not accept the role or its password",
    "missing-database": "the server has no database of that name",
    "too-many-clients": "the server has no free connection",
    "starting": "the server is starting up or shutting down",
    "tls": "TLS with the server failed",
    "name-not-found": "the host name is not found",
    "refused": "the connection is refused",
    "timeout": "the server cannot be reached in time",
    "reset": "the server closed the connection",
}


class Connection(psycopg.Connection[Any]):
    """A connection whose every wait ends at `give_up_at` (monotonic seconds) or after `stall_s` of silence."""

    give_up_at: float = float("inf")
    stall_s: float = STALL_S

    def wait(self, gen: PQGen[Any], interval: float = _INTERVAL_S, timeout: float | None = None) -> Any:  # noqa: ANN401
        """Wait as psycopg does, but bounded, and without its cancel on Ctrl-C (a frozen server would hold that)."""
        bound = min(self.stall_s, self.give_up_at - time.monotonic())
        if timeout is not None:
            bound = min(bound, timeout)
        try:
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=max(bound, 0.001))
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - what waiting.wait documents to raise
            self.pgconn.finish()
            if time.monotonic() >= self.give_up_at:
                raise DatabaseUnavailable("PostgreSQL was not done when the deadline came", kind="deadline") from None
            raise DatabaseUnavailable("PostgreSQL stopped answering in the middle of a step", kind="frozen") from None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a statement that reads whole tables before its first row."""
        self.stall_s = COUNTING_STALL_S
        yield
        self.stall_s = STALL_S


def address(settings: Settings) -> dict[str, Any]:
    """libpq parameters from DATABASE_URL, else POSTGRES_*. Raises `SettingsError` that names the variable only."""
    if settings["DATABASE_URL"]:
        parameters = _parsed(str(settings["DATABASE_URL"]))
    elif settings["POSTGRES_HOST"] or settings["POSTGRES_DATABASE"]:
        parameters = {
            "host": settings["POSTGRES_HOST"],
            "port": settings["POSTGRES_PORT"],
            "dbname": settings["POSTGRES_DATABASE"],
            "user": settings["POSTGRES_USER"],
            "password": settings["POSTGRES_PASSWORD"],
            "sslmode": settings["POSTGRES_SSL_MODE"],
        }
        parameters = {name: value for name, value in parameters.items() if value is not None}
    else:
        raise SettingsError(
            "no database address is set", hint="set DATABASE_URL or POSTGRES_HOST and POSTGRES_DATABASE"
        )
    return {**parameters, "application_name": "opsctl", "client_encoding": "UTF8"}


def replica_address(settings: Settings) -> dict[str, Any] | None:
    """libpq parameters from OPSCTL_REPLICA_URL, None where it is not set. Raises `SettingsError`."""
    if not settings["OPSCTL_REPLICA_URL"]:
        return None
    parameters = _parsed(str(settings["OPSCTL_REPLICA_URL"]), "OPSCTL_REPLICA_URL")
    return {**parameters, "application_name": "opsctl", "client_encoding": "UTF8"}


def each_host(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One address per host of a list: libpq would try one after the other, and a frozen one would take all the time.

    >>> [one["host"] for one in each_host({"host": "a,b", "port": "5432", "target_session_attrs": "read-write"})]
    ['a', 'b']
    """
    lists = {word: str(parameters[word]).split(",") for word in ("host", "hostaddr", "port") if parameters.get(word)}
    count = max((len(values) for values in lists.values()), default=1)
    if count == 1:
        return [dict(parameters)]
    shared = {word: value for word, value in parameters.items() if word not in {*lists, "target_session_attrs"}}
    return [
        shared | {word: values[index] if len(values) > 1 else values[0] for word, values in lists.items()}
        for index in range(count)
    ]


def _parsed(url: str, variable: str = "DATABASE_URL") -> dict[str, Any]:
    try:
        parameters: dict[str, Any] = conninfo.conninfo_to_dict(_for_libpq(url))
    except (psycopg.Error, ValueError):  # the message quotes the password
        raise SettingsError(
            f"{variable} is not a connection string", hint="postgresql://user:password@host:port/database"
        ) from None
    # A `/` or `@` in a password that is not percent-encoded parses, and puts parts of it into the port, the host or the
    # database, which messages show. A host that begins with an `@` is an abstract socket's.
    ports = str(parameters.get("port", "5432")).split(",")
    if not all(port.isdigit() and 0 < int(port) < 65536 for port in ports):
        raise SettingsError(f"{variable} has a port that is no number", hint=_ENCODE)
    for word, what in (("host", "host name"), ("dbname", "database name")):
        if "@" in str(parameters.get(word, "")).lstrip("@"):
            raise SettingsError(f"{variable} has a {what} with an @ in it", hint=_ENCODE)
    return parameters


def _for_libpq(url: str) -> str:
    """The service's own DATABASE_URL as libpq takes it: parameters of Node clients are dropped or translated."""
    base, _, parameters = url.rpartition("?")
    if "://" not in base or "@" in parameters:  # then the `?` stands in a password
        return url
    kept = [_NO_VERIFY.get(p, p) for p in parameters.split("&") if p.partition("=")[0] not in _FOREIGN_PARAMETERS]
    return f"{base}?{'&'.join(kept)}" if kept else base


def place(parameters: Mapping[str, Any]) -> str:
    """`host:port/database` for people; never the user's password."""
    return f"{parameters.get('host', 'local socket')}:{parameters.get('port', 5432)}/{parameters.get('dbname', '')}"


@contextmanager
def connect(
    parameters: Mapping[str, Any], remaining_s: float | None, *, connect_s: float = CONNECT_S
) -> Iterator[Connection]:
    """A connection that gives up when `remaining_s` are over. Transient failures are tried three times.

    Raises `DatabaseUnavailable`, also for errors of statements inside the block.
    """
    give_up_at = time.monotonic() + (float("inf") if remaining_s is None else remaining_s)
    try:
        connection = _connect_with_retry(parameters, min(give_up_at, time.monotonic() + connect_s))
    except DatabaseUnavailable as error:
        error.transient = False  # it was waited for
        raise
    connection.give_up_at = give_up_at
    try:
        yield connection
    except psycopg.Error as error:
        raise translated(error) from None
    finally:
        connection.pgconn.finish()  # never waits, unlike a rollback on a frozen server


def _connect_with_retry(parameters: Mapping[str, Any], give_up_at: float) -> Connection:
    return retrying(give_up_at)(_connect_once, parameters, give_up_at)


def _connect_once(parameters: Mapping[str, Any], give_up_at: float) -> Connection:
    """Connect in a thread, because the resolver of the C library cannot be interrupted by any clock of ours."""
    results: list[Connection | Exception] = []
    ours = {"autocommit": True, "prepare_threshold": None, "connect_timeout": int(CONNECT_S) + 1}
    abandoned = threading.Event()
    done = threading.Event()

    def work() -> None:
        try:
            connection = Connection.connect("", **{**parameters, **ours})
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that answers for it
            results.append(error)
        else:
            if abandoned.is_set():
                connection.pgconn.finish()
            results.append(connection)
        done.set()

    threading.Thread(target=work, name="connect", daemon=True).start()
    patience_s = max(0.0, give_up_at - time.monotonic())
    if not wait_for(done, patience_s):
        abandoned.set()
        raise DatabaseUnavailable(
            f"PostgreSQL at {place(parameters)} did not answer within {patience_s:.1f} s",
            kind="frozen",
        )
    if isinstance(results[0], psycopg.Error):
        raise _connection_failure(results[0], parameters, give_up_at)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _connection_failure(error: psycopg.Error, parameters: Mapping[str, Any], give_up_at: float) -> DatabaseUnavailable:
    text = str(error)
    where = f"PostgreSQL at {place(parameters)}"
    if parameters.get("sslmode") == "disable" and "no encryption" in text:  # of the server's pg_hba.conf
        return DatabaseUnavailable(f"{where}: the server refuses us without TLS", kind="tls")
    for kind, transient, pattern in _CONNECTION_FAILURES:
        if pattern.search(text):
            return DatabaseUnavailable(f"{where}: {_SENTENCES[kind]}", kind=kind, transient=transient)
    # The server speaks another language.
    state = greeting.sqlstate(each_host(parameters)[0], max(0.1, give_up_at - time.monotonic()))
    if state in _KIND_OF_STATE:
        kind = _KIND_OF_STATE[state]
        return DatabaseUnavailable(f"{where}: {_SENTENCES[kind]}", kind=kind, transient=kind == "starting")
    return DatabaseUnavailable(f"{where} cannot be used")


_KIND_OF_STATE = {
    "28000": "authentication",
    greeting.WRONG_PASSWORD: "authentication",
    "3D000": "missing-database",
    "53300": "too-many-clients",
    "57P03": "starting",
}


def translated(error: psycopg.Error) -> DatabaseUnavailable:
    """A failed statement in words that hold no row and no password."""
    state, primary = error.sqlstate, error.diag.message_primary
    if state is None:
        return DatabaseUnavailable(
            "the connection to PostgreSQL broke in the middle of a step", kind="reset", transient=True
        )
    kind = _STATEMENT_FAILURES.get(
        state, "corrupt" if state.startswith("XX") or state == "58030" else "statement-failed"
    )
    message, hint = f"PostgreSQL says: {primary} (SQLSTATE {state})", None
    if kind == "locked":
        message = f"another session has locked a table; {message}"
        hint = "look for it in pg_stat_activity and pg_locks, end it, and type this again"
    return DatabaseUnavailable(message, kind=kind, hint=hint, transient=state in _TRANSIENT_SQLSTATES)


def copied(connection: Connection, statement: LiteralString, **values: Any) -> Iterator[bytes]:  # noqa: ANN401
    """The rows of a `COPY ... TO STDOUT`, in pieces of about `COPY_PIECE` bytes that end with a row.

    psycopg's own copy asks for a wait per row, which costs a restore more than reading the row.
    """
    pgconn = connection.pgconn
    text = psycopg.ClientCursor(connection).mogrify(statement, values)
    pgconn.send_query(text.encode())
    _expect(connection.wait(generators.execute(pgconn)), pq.ExecStatus.COPY_OUT)
    piece: list[Buffer] = []
    missing = COPY_PIECE
    while True:
        size, row = pgconn.get_copy_data(1)
        if size > 0:
            piece.append(row)
            missing -= size
            if missing <= 0:
                yield b"".join(piece)
                piece, missing = [], COPY_PIECE
        elif size == 0:
            connection.wait(_more_input(pgconn))
        else:
            break
    if piece:
        yield b"".join(piece)
    _expect(connection.wait(generators.fetch_many(pgconn)), pq.ExecStatus.COMMAND_OK)


def _more_input(pgconn: PGconn) -> PQGen[None]:
    while not (yield waiting.Wait.R):
        pass
    pgconn.consume_input()


def _expect(results: list[PGresult], status: pq.ExecStatus) -> None:
    for result in results:
        if result.status != status:
            raise psycopg.errors.error_from_result(result)


def rows(
    connection: Connection,
    statement: LiteralString,
    into: Callable[..., T],
    **values: Any,  # noqa: ANN401
) -> list[T]:
    """Run one query; its columns are the fields of `into`."""
    with connection.cursor(row_factory=class_row(into)) as cursor:  # type: ignore[arg-type]
        return cursor.execute(statement, values).fetchall()


def rows_at_once(
    connection: Connection,
    begin: LiteralString,
    statement: LiteralString,
    into: Callable[..., T],
    **values: Any,  # noqa: ANN401
) -> list[T]:
    """Run one query in a transaction of its own that `begin` opens and that is rolled back: one round trip in all.

    The server's statement_timeout counts for each statement of it by itself (since PostgreSQL 13).
    """
    with psycopg.ClientCursor(connection, row_factory=class_row(into)) as cursor:  # type: ignore[arg-type]
        try:
            cursor.execute(f"{begin};\n{statement};\nROLLBACK", values)
        except psycopg.Error:
            if not connection.closed:
                connection.execute("ROLLBACK")
            raise
        while cursor.description is None:
            cursor.nextset()
        return cursor.fetchall()
