"""What a healthy database looks like: one small function per check, each with its own statement and thresholds.

A check gives rows, never raises for what it finds, and never reads the text of a query: it may hold keys. Thresholds
are settings; where several monitoring tools agree on a default, it is theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg import pq

from opsctl import db, process
from opsctl.baileys.key_types import KNOWN, ExpiryPolicy
from opsctl.errors import Refused, SettingsError
from opsctl.queries import query
from opsctl.report import duration
from opsctl.stores.standby import Standby

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import LiteralString

    from opsctl.settings import Limits, Settings

T = TypeVar("T")

STATEMENT_S = 2.0
PROBES = 100
PROBING_S = 1.0
"""Probes of a slow server end after this long: a few of them tell enough."""
MIB = 1024**2
OLDEST_MAJOR = 15
SEE_ALL = "GRANT pg_monitor to this role"
SPLIT_TYPES = frozenset({"app", "lid", "pre", "sender"})
"""What an early migration made of `app-state-sync-key` and others: the part before the first hyphen."""

_BEGIN: LiteralString = (
    "BEGIN READ ONLY; SET LOCAL statement_timeout = '2s'; SET LOCAL lock_timeout = '500ms'; SET LOCAL jit = off; "
    "SET LOCAL min_parallel_table_scan_size = '256MB'"  # below it, workers take longer to start than they save
)


class State(StrEnum):
    """What a check came to."""

    OK = "ok"
    HIDDEN = "hidden"
    """This role may not look."""
    WARNING = "warning"
    CRITICAL = "critical"
    UNKNOWN = "unknown"
    """The check itself failed."""


class Group(StrEnum):
    """What can be asked for with `--only`."""

    REACH = "reach"
    SESSIONS = "sessions"
    STORAGE = "storage"
    REPLICATION = "replication"
    TLS = "tls"
    AUTH = "auth"


@dataclass(frozen=True, slots=True)
class HealthRow:
    """What one check saw. `value` is in `unit` (%, s, ms, B, d, or nothing for a number), as are its thresholds."""

    check: str
    group: Group
    state: State
    seen: str
    value: float | None = None
    unit: str = ""
    warning: float | None = None
    critical: float | None = None
    action: str | None = None
    falling: bool = False
    """Whether less is worse."""
    bar: str = ""
    trend: str = ""


@dataclass(frozen=True, slots=True)
class _ServerState:
    in_recovery: bool
    read_only: bool
    server_version: int
    clock_s: float
    sees_all: bool


class Server:
    """A connection that answers one question after the other, each in a read-only transaction of its own."""

    def __init__(self, connection: db.Connection, settings: Settings, *, reply_s: float) -> None:
        self.connection = connection
        self.settings = settings
        self.reply_s = reply_s
        self.asking_s = 0.0
        """Seconds spent on statements, probes aside."""
        self.pg_dump_major: Future[int | None] = Future()
        """Asked for while the database answers: Debian's is a script that takes longer than all its answers."""
        self.companies: set[str] | None = None
        """Those with credentials, once they could be read."""
        connection.stall_s = STATEMENT_S + 0.5  # it ends itself, if it lives

    def ask(self, statement: LiteralString, into: Callable[..., T], **values: Any) -> list[T]:  # noqa: ANN401
        """The rows of one statement. Raises `psycopg.Error` or `DatabaseUnavailable`."""
        started = time.monotonic()
        try:
            return db.rows_at_once(self.connection, _BEGIN, statement, into, **values)
        finally:
            self.asking_s += time.monotonic() - started

    @cached_property
    def state(self) -> _ServerState:
        """Asked for once."""
        return self.ask(query("server_state"), _ServerState)[0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Read-only, with 2 s for each statement; what fails in it leaves the connection as it was."""
        self.connection.execute(_BEGIN)
        try:
            yield
        finally:
            if self.connection.info.transaction_status is pq.TransactionStatus.ACTIVE:
                # A signal came in the middle of a statement: to ask for more there would fail, and hide the signal.
                self.connection.close()
            elif not self.connection.closed:
                self.connection.execute("ROLLBACK")


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the database; its name is shown where it fails."""

    name: str
    group: Group
    look: Callable[[Server], Iterator[HealthRow]]


@dataclass(frozen=True, slots=True)
class LocalCheck:
    """A check of this machine."""

    name: str
    group: Group
    look: Callable[[Settings], Iterator[HealthRow]]


BAR_CELLS = 8


def judged(
    check: str,
    group: Group,
    value: float,
    limits: Limits | tuple[float, float],
    unit: str,
    *,
    seen: str,
    action: str,
    falling: bool = False,
) -> HealthRow:
    """A row whose state follows from its value, of which more is worse, or less if `falling`.

    `action` is said unless it is ok; the bar tells without colour how near to critical it is.
    """
    warning, critical = limits
    over = [value <= limit if falling else value >= limit for limit in limits]
    state = State.CRITICAL if over[1] else State.WARNING if over[0] else State.OK
    near, far = (critical, value) if falling else (value, critical)
    filled = BAR_CELLS if over[1] else int(near / far * BAR_CELLS)
    return HealthRow(
        check,
        group,
        state,
        seen,
        value,
        unit,
        warning,
        critical,
        action=None if state is State.OK else action,
        bar="█" * filled + "·" * (BAR_CELLS - filled),
        falling=falling,
    )


# Reach


def check_reply(server: Server) -> Iterator[HealthRow]:
    """Name, TCP, TLS, password and the first answer together."""
    server.pg_dump_major = ThreadPoolExecutor(1).submit(_pg_dump_major)
    reply_ms = server.reply_s * 1000
    limits = server.settings["HEALTH_REPLY_MS"]
    action = "look at the network, DNS and the server's load"
    yield judged("reply", Group.REACH, reply_ms, limits, "ms", seen=f"connected in {reply_ms:.0f} ms", action=action)


def check_server(server: Server) -> Iterator[HealthRow]:
    """Can it be written, is its clock ours, do its clients fit?"""
    began = time.time()
    state = server.state
    ended = time.time()
    if state.in_recovery:
        yield HealthRow(
            "role", Group.REACH, State.WARNING, "a replica: nothing can be written", action="is this the right address?"
        )
    elif state.read_only:
        action = "look at the disk, then ALTER SYSTEM RESET default_transaction_read_only"
        yield HealthRow("role", Group.REACH, State.CRITICAL, "the primary is read-only", action=action)
    else:
        yield HealthRow("role", Group.REACH, State.OK, "primary, writable")
    if not state.sees_all:
        yield HealthRow("privileges", Group.REACH, State.HIDDEN, "other roles' sessions are hidden", action=SEE_ALL)
    skew_s = max(0.0, abs(state.clock_s - (began + ended) / 2) - (ended - began) / 2)
    yield judged(
        "clock",
        Group.REACH,
        round(skew_s, 3),
        server.settings["HEALTH_CLOCK_SKEW_S"],
        "s",
        seen=f"{skew_s:.1f} s apart from this host",
        action="synchronise the clocks: retention depends on them",
    )


def check_version(server: Server) -> Iterator[HealthRow]:
    """Do the clients fit the server? The last check, because the program that is asked takes its time."""
    server_major = server.state.server_version // 10000
    dump_major = server.pg_dump_major.result()
    seen = f"server {server_major}, libpq {pq.version() // 10000}"
    seen += f", pg_dump {dump_major}" if dump_major else ""
    state, action = State.OK, None
    if dump_major is not None and dump_major < server_major:  # which then refuses to dump
        state, action = State.WARNING, f"install the PostgreSQL {server_major} client: pg_dump {dump_major} refuses"
    if server_major < OLDEST_MAJOR:
        state, action = State.WARNING, f"PostgreSQL {OLDEST_MAJOR} is the oldest that opsctl is tested with"
    yield HealthRow("version", Group.REACH, state, seen, float(server_major), action=action)


def _pg_dump_major() -> int | None:
    if shutil.which("pg_dump") is None:
        return None
    try:
        done = process.run(["pg_dump", "--version"], environment=process.bare_environment(), timeout_s=1.0)
    except OSError:  # a file that cannot be run
        return None
    found = re.search(rb" (\d+)", done.stdout)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class _KeyName:
    company_id: str
    key_type: str
    key_id: str


@dataclass(frozen=True, slots=True)
class _KeyValue:
    value: str


def check_latency(server: Server) -> Iterator[HealthRow]:
    """The service's own queries: creds of a company, one key; p50, p95 and p99 of up to 100 of them."""
    names = server.ask(query("sample_keys"), _KeyName) or [_KeyName("", "", "")]
    with server.transaction():
        times_ms = sorted(_probe(server.connection, names))
    p50, p95, p99 = (times_ms[min(len(times_ms) - 1, int(len(times_ms) * q))] for q in (0.5, 0.95, 0.99))
    warning = server.settings["DB_QUERY_LATENCY_THRESHOLD_MS"]
    yield judged(
        "latency",
        Group.REACH,
        round(p95, 3),
        (warning, max(warning, server.settings["HEALTH_LATENCY_CRITICAL_MS"])),
        "ms",
        seen=f"p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms of {len(times_ms)}",
        action="look at the server's load, its disk and the network",
    )


def _probe(connection: db.Connection, names: Sequence[_KeyName]) -> Iterator[float]:
    began = time.monotonic()
    cursor = connection.cursor()  # one for all: to make one costs as much as an answer
    for number in range(PROBES):
        name = names[number // 2 % len(names)]
        started = time.monotonic()
        if started - began > PROBING_S:
            return
        if number % 2:
            cursor.execute(query("read_creds"), {"company_id": name.company_id})
        else:
            values = {"company_id": name.company_id, "key_type": name.key_type, "key_id": name.key_id}
            cursor.execute(query("read_key"), values)
        yield (time.monotonic() - started) * 1000


# Sessions


@dataclass(frozen=True, slots=True)
class _Connections:
    role: str
    application: str
    connections: int
    role_limit: int | None
    usable: int


def check_connections(server: Server) -> Iterator[HealthRow]:
    """In use against what is usable, by application; and every role that has a limit of its own."""
    found = server.ask(query("count_connections"), _Connections)
    warning = server.settings["DB_POOL_USAGE_THRESHOLD"]
    limits = (100 * warning, 100 * max(warning, server.settings["HEALTH_POOL_CRITICAL"]))
    by_application = Counter[str]()
    by_role = Counter[str]()
    for row in found:
        by_application[row.application or "(unnamed)"] += row.connections
        by_role[row.role] += row.connections
    usable = found[0].usable
    yield _use("connections", by_role.total(), usable, limits, ", ".join(f"{a} {n}" for a, n in _top(by_application)))
    role_limits = {row.role: row.role_limit for row in found if row.role_limit is not None and row.role_limit >= 0}
    for role, limit in role_limits.items():
        yield _use(f"connections of {role}", by_role[role], limit or 0, limits, "its own limit")


def _use(check: str, used: int, usable: int, limits: tuple[float, float], more: str) -> HealthRow:
    percent = 100 * used / usable if usable else 100.0
    seen = f"{used} of {usable}: {more}"
    action = "end idle sessions, shrink the pools, or raise the limit"
    return judged(check, Group.SESSIONS, round(percent, 1), limits, "%", seen=seen, action=action)


def _top(counts: Counter[str], most: int = 3) -> list[tuple[str, int]]:
    top = counts.most_common(most)
    rest = counts.total() - sum(count for _, count in top)
    return [*top, ("others", rest)] if rest else top


@dataclass(frozen=True, slots=True)
class _Blocked:
    pid: int
    seconds: float
    wanted: str
    blocker_pid: int
    blocker: str
    blocker_state: str


def check_blocked(server: Server) -> Iterator[HealthRow]:
    """Who waits for a lock, how long, and for whom."""
    found = server.ask(query("blocked_sessions"), _Blocked)
    count_limits, limits = server.settings["HEALTH_BLOCKED_SESSIONS"], server.settings["HEALTH_BLOCKED_S"]
    if not found:
        yield judged("blocked", Group.SESSIONS, 0, limits, "s", seen="nobody waits for a lock", action="")
        return
    longest = found[0]
    waiting = len({row.pid for row in found})
    blockers = {row.blocker_pid: row for row in found if row.blocker_pid not in {other.pid for other in found}}
    root = next(iter(blockers.values()), longest)
    who = f"pid {root.blocker_pid}" + (f" ({root.blocker}{', ' * bool(root.blocker_state)}{root.blocker_state})")
    seen = f"{waiting} wait, {duration(longest.seconds)}, for {longest.wanted}; held by {who}"
    action = f"look at pid {root.blocker_pid}; then SELECT pg_terminate_backend({root.blocker_pid})"
    by_time = judged("blocked", Group.SESSIONS, longest.seconds, limits, "s", seen=seen, action=action)
    by_count = judged("blocked", Group.SESSIONS, waiting, count_limits, "", seen=seen, action=action)
    worse = _SEVERITY.index(by_count.state) > _SEVERITY.index(by_time.state)
    yield by_count if worse else by_time


_SEVERITY = (State.OK, State.WARNING, State.CRITICAL)


@dataclass(frozen=True, slots=True)
class _Session:
    pid: int
    application: str
    seconds: float


def check_idle_transactions(server: Server) -> Iterator[HealthRow]:
    """Transactions that are open and idle: they hold locks, and keep dead rows from being vacuumed."""
    found = server.ask(query("idle_transactions"), _Session)
    limits = server.settings["HEALTH_IDLE_TRANSACTION_S"]
    yield _longest(server, "idle in transaction", found, limits, "pg_terminate_backend")


def check_long_queries(server: Server) -> Iterator[HealthRow]:
    """Queries that run for long."""
    found = server.ask(query("long_queries"), _Session)
    yield _longest(server, "long queries", found, server.settings["HEALTH_LONG_QUERY_S"], "pg_cancel_backend")


def _longest(server: Server, check: str, found: Sequence[_Session], limits: Limits, cure: str) -> HealthRow:
    if not found and not server.state.sees_all:
        return HealthRow(check, Group.SESSIONS, State.HIDDEN, "none of this role's own", action=SEE_ALL)
    if not found:
        return judged(check, Group.SESSIONS, 0, limits, "s", seen="none", action="")
    first = found[0]
    seen = f"{len(found)}, longest {duration(first.seconds)}: pid {first.pid} ({first.application})"
    action = f"look at pid {first.pid}; then SELECT {cure}({first.pid})"
    return judged(check, Group.SESSIONS, round(first.seconds, 1), limits, "s", seen=seen, action=action)


@dataclass(frozen=True, slots=True)
class _Prepared:
    transactions: int
    seconds: float


def check_prepared(server: Server) -> Iterator[HealthRow]:
    """Prepared transactions that nobody ended."""
    (found,) = server.ask(query("prepared_transactions"), _Prepared)
    limits = server.settings["HEALTH_PREPARED_S"]
    seen = f"{found.transactions}, oldest {duration(found.seconds)}" if found.transactions else "none"
    action = "look at pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED"
    yield judged("prepared", Group.SESSIONS, round(found.seconds, 1), limits, "s", seen=seen, action=action)


# Storage


@dataclass(frozen=True, slots=True)
class _OldestIds:
    database: str
    ids: int


def check_wraparound(server: Server) -> Iterator[HealthRow]:
    """How far the oldest transaction id is from where the server stops."""
    (found,) = server.ask(query("oldest_transaction_ids"), _OldestIds)
    yield judged(
        "wraparound",
        Group.STORAGE,
        found.ids,
        server.settings["HEALTH_WRAPAROUND_IDS"],
        "",
        seen=f"{found.ids:,} transaction ids old: {found.database}",
        action=f"VACUUM (FREEZE) in {found.database}; look for old transactions, slots and prepared ones",
    )


@dataclass(frozen=True, slots=True)
class _TableActivity:
    name: str
    live: int
    dead: int
    written: int
    was_vacuumed: bool
    vacuum_age_s: float
    hits: int
    reads: int


def check_tables(server: Server) -> Iterator[HealthRow]:
    """Dead rows, the last vacuum, and how often the cache had what was asked for."""
    found = server.ask(query("table_activity"), _TableActivity)
    few_rows = server.settings["HEALTH_FEW_ROWS"]
    for table in found:
        yield _dead_rows(table, server.settings["HEALTH_DEAD_ROWS_PERCENT"], few_rows=few_rows)
        yield _last_vacuum(table, server.settings["HEALTH_VACUUM_DAYS"], few_rows=few_rows)
    if reads := sum(table.hits + table.reads for table in found):
        percent = 100 * sum(table.hits for table in found) / reads
        yield HealthRow(
            "cache hit", Group.STORAGE, State.OK, f"{percent:.1f}% of {reads:,} blocks", round(percent, 2), "%"
        )


def _dead_rows(table: _TableActivity, limits: Limits, *, few_rows: int) -> HealthRow:
    check, seen = f"dead rows of {_short(table.name)}", f"{table.dead:,} dead beside {table.live:,} live"
    percent = round(100 * table.dead / max(1, table.live + table.dead), 1)
    if table.dead <= few_rows:
        return HealthRow(check, Group.STORAGE, State.OK, seen, percent, "%")
    action = f"VACUUM {table.name}; is autovacuum running, does an old transaction hold it back?"
    return judged(check, Group.STORAGE, percent, limits, "%", seen=seen, action=action)


def _last_vacuum(table: _TableActivity, limits: Limits, *, few_rows: int) -> HealthRow:
    check, days = f"vacuum of {_short(table.name)}", round(table.vacuum_age_s / 86400, 2)
    ago = duration(table.vacuum_age_s)
    seen = f"{ago} ago" if table.was_vacuumed else f"none since the server started, {ago} ago"
    if table.written <= few_rows:  # nothing to do for one
        seen = f"{ago} ago" if table.was_vacuumed else "none, and little was written"
        return HealthRow(check, Group.STORAGE, State.OK, seen, days, "d")
    action = f"VACUUM (ANALYZE) {table.name}; is autovacuum on?"
    return judged(check, Group.STORAGE, days, limits, "d", seen=seen, action=action)


def _short(table: str) -> str:
    return table.removeprefix("whatsapp_")


@dataclass(frozen=True, slots=True)
class _TableSize:
    name: str
    table_bytes: float
    index_bytes: float


def check_sizes(server: Server) -> Iterator[HealthRow]:
    """How large our tables are."""
    for table in server.ask(query("table_sizes"), _TableSize):
        seen = f"{table.table_bytes / MIB:,.1f} MiB and {table.index_bytes / MIB:,.1f} MiB of indexes"
        size_bytes = table.table_bytes + table.index_bytes
        yield HealthRow(f"size of {_short(table.name)}", Group.STORAGE, State.OK, seen, size_bytes, "B")


# Replication


@dataclass(frozen=True, slots=True)
class _Replica:
    name: str
    state: str
    lag_s: float | None
    lag_bytes: float | None


@dataclass(frozen=True, slots=True)
class _ReplayLag:
    receivers: int
    lag_s: float | None


@dataclass(frozen=True, slots=True)
class _Slot:
    name: str
    active: bool
    wal_status: str
    kept_bytes: float


def check_replicas(server: Server) -> Iterator[HealthRow]:
    """Every replica's lag, in seconds and in WAL; one that tells neither is not well."""
    limits = server.settings["HEALTH_REPLICATION_S"]
    mib_limits = server.settings["HEALTH_REPLICATION_MIB"]
    action = "look at the replica's log, its disk and long queries on it"
    for replica in server.ask(query("list_replicas"), _Replica):
        check = f"replica {replica.name}".strip()
        if replica.state == "(hidden)":
            yield HealthRow(check, Group.REPLICATION, State.HIDDEN, "its lag is hidden", action=SEE_ALL)
        elif replica.lag_bytes is None:
            yield HealthRow(check, Group.REPLICATION, State.WARNING, f"{replica.state}, no lag known", action=action)
        else:
            mib = replica.lag_bytes / MIB
            lag_s = replica.lag_s or 0.0
            seen = f"{replica.state}, {duration(lag_s)} and {mib:,.1f} MiB behind"
            by_time = judged(check, Group.REPLICATION, round(lag_s, 1), limits, "s", seen=seen, action=action)
            by_size = judged(check, Group.REPLICATION, round(mib, 1), mib_limits, "MiB", seen=seen, action=action)
            worse = _SEVERITY.index(by_size.state) > _SEVERITY.index(by_time.state)
            yield by_size if worse else by_time


def check_own_replay(server: Server) -> Iterator[HealthRow]:
    """A replica's own account of how far it is behind."""
    if not server.state.in_recovery:
        return
    (found,) = server.ask(query("own_replay_lag"), _ReplayLag)
    action = "look at the replica's log; is replay paused (pg_is_wal_replay_paused)?"
    if found.lag_s is None or (not found.receivers and found.lag_s == 0):
        seen = "nobody sends to it" if not found.receivers else "no lag known"
        yield HealthRow("replay", Group.REPLICATION, State.WARNING, seen, action=action)
        return
    limits = server.settings["HEALTH_REPLICATION_S"]
    seen = f"{duration(found.lag_s)} behind" + ("" if found.receivers else "; nobody sends to it")
    yield judged("replay", Group.REPLICATION, round(found.lag_s, 1), limits, "s", seen=seen, action=action)


def check_slots(server: Server) -> Iterator[HealthRow]:
    """Slots that nobody reads keep WAL until the disk is full."""
    for slot in server.ask(query("replication_slots"), _Slot):
        kept = f"keeps {slot.kept_bytes / MIB:,.1f} MiB of WAL"
        state, seen = State.OK, f"active, {kept}"
        if not slot.active:
            state, seen = State.WARNING, f"inactive, {kept}"
        if slot.wal_status in {"lost", "unreserved"}:
            state, seen = State.CRITICAL, f"{slot.wal_status}, {kept}"
        action = f"start its reader, or SELECT pg_drop_replication_slot('{slot.name}')"
        yield HealthRow(
            f"slot {slot.name}",
            Group.REPLICATION,
            state,
            seen,
            slot.kept_bytes,
            "B",
            action=None if state is State.OK else action,
        )


# TLS


def check_tls(server: Server) -> Iterator[HealthRow]:
    """Is this connection encrypted, and how long does the server's certificate last?"""
    info = server.connection.info
    if info.host.startswith(("/", "@")):
        yield HealthRow("tls", Group.TLS, State.OK, "a socket of this machine")
        return
    if not server.connection.pgconn.ssl_in_use:
        near = info.hostaddr in {"127.0.0.1", "::1"}
        state, action = (State.OK, None) if near else (State.WARNING, "sslmode=verify-full in DATABASE_URL")
        seen = "not encrypted" + (", but within this machine" if near else "")
        yield HealthRow("tls", Group.TLS, state, seen, action=action)
        return
    verified = info.get_parameters().get("sslmode") in {"verify-ca", "verify-full"}
    seen = "encrypted" + ("" if verified else ", but nobody checks by whom")
    yield HealthRow(
        "tls",
        Group.TLS,
        State.OK if verified else State.WARNING,
        seen,
        action=None if verified else "sslmode=verify-full in DATABASE_URL",
    )
    yield _certificate(server)


def _certificate(server: Server) -> HealthRow:
    from opsctl.certificate import certificate_expiry

    info, limits = server.connection.info, server.settings["HEALTH_CERTIFICATE_DAYS"]
    timeout_s = min(STATEMENT_S, server.connection.give_up_at - time.monotonic())
    try:
        expiry = certificate_expiry(info.hostaddr or info.host, info.port, server_name=info.host, timeout_s=timeout_s)
    except (OSError, ValueError):
        return HealthRow("certificate", Group.TLS, State.UNKNOWN, "the certificate could not be read")
    days = (expiry - datetime.now(UTC)) / timedelta(days=1)
    seen = f"ends {expiry:%Y-%m-%d}, in {days:.0f} days" if days >= 0 else f"ended {expiry:%Y-%m-%d}"
    action = "renew the server's certificate, then SELECT pg_reload_conf()"
    return judged("certificate", Group.TLS, round(days, 1), limits, "d", seen=seen, action=action, falling=True)


# What the service keeps there


@dataclass(frozen=True, slots=True)
class _AuthRecord:
    company_id: str


@dataclass(frozen=True, slots=True)
class _KeyGroup:
    company_id: str
    key_type: str
    keys: int
    expired: int
    within_1_day: int
    within_7_days: int
    within_14_days: int
    within_30_days: int


def check_credentials(server: Server) -> Iterator[HealthRow]:
    """The companies that have any."""
    server.companies = {row.company_id for row in server.ask(query("summarise_auth"), _AuthRecord)}
    count = len(server.companies)
    state, action = State.OK, None
    if not count:
        state, action = State.CRITICAL, "no company can log in: is this the right database? opsctl triage"
    yield HealthRow("credentials", Group.AUTH, state, f"{count} companies", float(count), action=action)


def check_keys(server: Server) -> Iterator[HealthRow]:
    """Keys by type and age, keys without credentials, what a cleanup would delete, mis-typed rows: in one scan."""
    retention = f"{server.settings['DB_CLEANUP_RETENTION_DAYS']} days"
    groups = server.ask(query("summarise_keys"), _KeyGroup, retention=retention)
    yield from _keys(groups)
    if server.companies is not None:  # otherwise the credentials' own row says why nobody knows
        yield _orphaned({group.company_id for group in groups} - server.companies)
    expired = sum(group.expired for group in groups if _expires(group.key_type))
    yield judged(
        "expired keys",
        Group.AUTH,
        expired,
        server.settings["HEALTH_EXPIRED_KEYS"],
        "",
        seen=f"{expired:,} past {retention} and their expiry",
        action="opsctl keys cleanup --dry-run",
    )
    split = sum(group.keys for group in groups if group.key_type in SPLIT_TYPES)
    yield HealthRow(
        "mis-typed keys",
        Group.AUTH,
        State.WARNING if split else State.OK,
        f"{split:,} of the types app, lid, pre, sender" if split else "none",
        float(split),
        action="opsctl keys doctor" if split else None,
    )


def _orphaned(companies: set[str]) -> HealthRow:
    named = ", ".join(map(ascii, sorted(companies)[:5]))
    return HealthRow(
        "orphaned keys",
        Group.AUTH,
        State.WARNING if companies else State.OK,
        f"{len(companies)} companies have keys and no credentials" if companies else "none",
        float(len(companies)),
        action=f"keys without credentials: {named}" if companies else None,
    )


def _keys(groups: Sequence[_KeyGroup]) -> Iterator[HealthRow]:
    by_type = Counter[str]()
    for group in groups:
        by_type[group.key_type] += group.keys
    total = by_type.total()
    yield HealthRow("keys", Group.AUTH, State.OK, f"{total:,}: " + _counts(_top(by_type, 4)), float(total))
    if not total:
        return
    bounds = [sum(g.within_1_day for g in groups), sum(g.within_7_days for g in groups)]
    bounds += [sum(g.within_14_days for g in groups), sum(g.within_30_days for g in groups), total]
    names = ("< 1 d", "1-7", "7-14", "14-30", "> 30")
    ages = [(name, upper - lower) for name, lower, upper in zip(names, [0, *bounds], bounds, strict=False)]
    yield HealthRow("ages of keys", Group.AUTH, State.OK, _counts(ages))


def _counts(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)


def _expires(key_type: str) -> bool:
    known = KNOWN.get(key_type)
    return known is not None and known.expiry is ExpiryPolicy.PAST_RETENTION


# This machine


def check_standby(settings: Settings) -> Iterator[HealthRow]:
    """The age of the oldest warm copy: the RPO that a restore from it would pay."""
    try:
        copies = Standby(settings.standby_dir, settings.environment).copies()
    except (Refused, SettingsError) as error:
        yield HealthRow("standby", Group.AUTH, State.UNKNOWN, error.message, action=error.hint)
        return
    if not copies:
        yield HealthRow("standby", Group.AUTH, State.OK, "no warm copies are kept here")
        return
    now = datetime.now(UTC)
    ages_s = [(now - datetime.fromisoformat(c.synced_at)).total_seconds() for c in copies if c.synced_at]
    bad = [copy.company_id for copy in copies if copy.held or copy.damage or not copy.synced_at]
    oldest_s = max(ages_s, default=0.0)
    seen = f"{len(copies)} companies, oldest {duration(oldest_s)}" + (f", {len(bad)} held or damaged" if bad else "")
    row = judged(
        "standby",
        Group.AUTH,
        round(oldest_s),
        settings["HEALTH_STANDBY_AGE_S"],
        "s",
        seen=seen,
        action="opsctl standby status",
    )
    if bad and row.state is State.OK:
        row = HealthRow("standby", Group.AUTH, State.WARNING, seen, row.value, "s", action="opsctl standby status")
    yield row


def check_disks(settings: Settings) -> Iterator[HealthRow]:
    """The disks of the folders that are written to, each once."""
    limits = settings["HEALTH_DISK_PERCENT"]
    seen_devices = set()
    for what, folder in _written_folders(settings).items():
        there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
        device = there.stat().st_dev
        if device in seen_devices:
            continue
        seen_devices.add(device)
        found = os.statvfs(there)
        used = found.f_blocks - found.f_bfree
        percent = 100 * used / max(1, used + found.f_bavail)
        if found.f_files:
            percent = max(percent, 100 * (found.f_files - found.f_favail) / found.f_files)
        seen = f"{percent:.0f}% of {there} used, {found.f_bavail * found.f_frsize / MIB:,.0f} MiB free"
        action = f"df -h {there}; df -i {there}"
        yield judged(f"disk of {what}", Group.STORAGE, round(percent, 1), limits, "%", seen=seen, action=action)


def _written_folders(settings: Settings) -> Mapping[str, Path]:
    wanted: dict[str, Callable[[], Path]] = {
        "sessions": lambda: settings.sessions_dir,
        "standby": lambda: settings.standby_dir,
        "cache": lambda: settings.cache_file.parent,
        "state": lambda: settings.state_dir,
    }
    found = {}
    for what, path in wanted.items():
        try:
            found[what] = path()
        except SettingsError:  # not set, so nothing is written there
            continue
    return found


DATABASE_CHECKS = (
    Check("reply", Group.REACH, check_reply),
    Check("role", Group.REACH, check_server),
    Check("latency", Group.REACH, check_latency),
    Check("connections", Group.SESSIONS, check_connections),
    Check("blocked", Group.SESSIONS, check_blocked),
    Check("idle in transaction", Group.SESSIONS, check_idle_transactions),
    Check("long queries", Group.SESSIONS, check_long_queries),
    Check("prepared", Group.SESSIONS, check_prepared),
    Check("wraparound", Group.STORAGE, check_wraparound),
    Check("tables", Group.STORAGE, check_tables),
    Check("sizes", Group.STORAGE, check_sizes),
    Check("replicas", Group.REPLICATION, check_replicas),
    Check("replay", Group.REPLICATION, check_own_replay),
    Check("slots", Group.REPLICATION, check_slots),
    Check("tls", Group.TLS, check_tls),
    Check("credentials", Group.AUTH, check_credentials),
    Check("keys", Group.AUTH, check_keys),
    Check("version", Group.REACH, check_version),
)
LOCAL_CHECKS = (LocalCheck("standby", Group.AUTH, check_standby), LocalCheck("disk", Group.STORAGE, check_disks))
