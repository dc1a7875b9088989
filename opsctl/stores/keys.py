"""`whatsapp_keys` where it stands: counted, measured, found by age, deleted.

Everything goes through the table's own name, also where it is partitioned: a role may have rights on that name only.
A row is found by its place, (tableoid, ctid), because a ctid alone says nothing in a partitioned table.
"""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import psycopg

from opsctl import db
from opsctl.errors import DatabaseUnavailable, Locked
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

_LOCK_KIND, _LOCK_NUMBER = 0x6F707363, 1  # "opsc"; 1 is for whoever deletes or mends keys


@dataclass(frozen=True, slots=True)
class Expiry:
    """Which keys are expired; the condition is `queries/expired.condition`.

    `own_senders` has, for each company whose account is known, the ends of its own sender-keys' ids: no sender-key of
    another company is expired. `prune_below` has, for each company whose pre-keys are pruned, the first id to keep.
    """

    now: datetime
    cutoff: datetime
    types: tuple[str, ...]
    by_age_alone: bool = False
    companies: tuple[str, ...] | None = None
    own_senders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prune_below: Mapping[str, int] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """The condition's parameters."""
        return {
            "now": self.now.isoformat(),
            "cutoff": self.cutoff.isoformat(),
            "types": list(self.types),
            "by_age_alone": self.by_age_alone,
            "companies": None if self.companies is None else list(self.companies),
            "own_senders": orjson.dumps(self.own_senders).decode(),
            "prune_below": orjson.dumps(self.prune_below).decode(),
        }


@dataclass(frozen=True, slots=True)
class CensusRow:
    """One company's keys of one type. Sizes are those of the values; times are PostgreSQL's text."""

    company_id: str
    key_type: str
    key_count: int
    size_bytes: int
    under_1_day: int
    under_7_days: int
    under_14_days: int
    under_30_days: int
    older: int
    created_in_7_days: int
    expired_count: int
    expired_bytes: int
    oldest_at: str | None
    newest_at: str | None

    @property
    def ages(self) -> tuple[int, ...]:
        """Keys per age: under 1, 7, 14 and 30 days, and older."""
        return (self.under_1_day, self.under_7_days, self.under_14_days, self.under_30_days, self.older)


@dataclass(frozen=True, slots=True)
class TableSizes:
    """What the keys take on disk; `blocks` of the largest of the table's `parts`, the table itself among them."""

    table_bytes: int
    index_bytes: int
    blocks: int
    parts: int


@dataclass(frozen=True, slots=True)
class ExpiredKey:
    """One key by name."""

    company_id: str
    key_type: str
    key_id: str
    updated_at: str | None


@dataclass(frozen=True, slots=True)
class _Floor:
    company_id: str
    floor: int


@dataclass(frozen=True, slots=True)
class _Count:
    count: int


@dataclass(frozen=True, slots=True)
class _Rights:
    read_only: bool
    may_delete: bool
    may_insert: bool


@dataclass(frozen=True, slots=True)
class _LockState:
    locked: bool


@dataclass(frozen=True, slots=True)
class _Holder:
    pid: int
    application: str
    since: str


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of one partition, as PostgreSQL writes their ctids."""

    part: int
    ctids: list[str]

    def __len__(self) -> int:
        return len(self.ctids)

    def cut(self, start: int, count: int) -> Places:
        """Some of them."""
        return Places(self.part, self.ctids[start : start + count])

    def values(self) -> dict[str, Any]:
        """As a statement's parameters."""
        return {"part": self.part, "places": '{"' + '","'.join(self.ctids) + '"}'}


def take_census(connection: db.Connection, expiry: Expiry) -> list[CensusRow]:
    """Every company's keys by type; one pass over the table."""
    with connection.counting():
        return db.rows(connection, query("take_census"), CensusRow, **expiry.values())


def measure_tables(connection: db.Connection) -> TableSizes:
    """Sizes on disk."""
    (sizes,) = db.rows(connection, query("measure_tables"), TableSizes)
    return sizes


def list_expired(connection: db.Connection, expiry: Expiry, *, most: int) -> list[ExpiredKey]:
    """Up to `most` expired keys, oldest first."""
    with connection.counting():
        return db.rows(connection, query("list_expired"), ExpiredKey, most=most, **expiry.values())


def pre_key_floors(connection: db.Connection, *, kept: int) -> dict[str, int]:
    """By company, the id of the newest pre-key but `kept` - 1; companies with fewer are not there."""
    with connection.counting():
        return {
            row.company_id: row.floor for row in db.rows(connection, query("find_pre_key_floors"), _Floor, kept=kept)
        }


def find_expired(connection: db.Connection, expiry: Expiry, blocks: range) -> list[Places]:
    """Where expired rows lie among some blocks, partition by partition. A short transaction of its own."""
    found: dict[int, list[str]] = {}
    with _short(connection):
        pieces = db.copied(
            connection,
            query("find_expired"),
            **_range(blocks),
            **expiry.values(),
        )
        for piece in pieces:
            for line in piece.decode().splitlines():
                part, _, ctid = line.partition("\t")
                found.setdefault(int(part), []).append(ctid)
    return [Places(part, ctids) for part, ctids in found.items()]


def delete_expired(
    connection: db.Connection, expiry: Expiry, places: Places, keep: Callable[[bytes], None]
) -> Counter[tuple[str, str]]:
    """Delete what is still expired and not locked of some rows, inside the caller's transaction.

    Each row goes to `keep` as a line of the archive. Gives what was deleted by company and type.
    """
    prepare(connection, wait_for_disk=False)
    return _kept(db.copied(connection, query("delete_expired"), **places.values(), **expiry.values()), keep)


def delete_expired_range(
    connection: db.Connection, expiry: Expiry, blocks: range, keep: Callable[[bytes], None]
) -> Counter[tuple[str, str]]:
    """Delete what is expired among some blocks of every partition, as `delete_expired` does, in half its time.

    It cannot pass over what is locked: raises `psycopg.errors.LockNotAvailable` where that takes longer than 5 ms.
    """
    prepare(connection, wait_for_disk=False, lock_timeout="5ms")
    return _kept(db.copied(connection, query("delete_expired_range"), **_range(blocks), **expiry.values()), keep)


def _range(blocks: range) -> dict[str, str]:
    return {"first": f"({blocks.start},0)", "last": f"({blocks.stop},0)"}


def _kept(pieces: Iterator[bytes], keep: Callable[[bytes], None]) -> Counter[tuple[str, str]]:
    deleted: Counter[tuple[str, str]] = Counter()
    for piece in pieces:
        lines = piece.replace(b"\\\\", b"\\")  # all that COPY escapes in JSON of one line
        keep(lines)
        deleted.update(_names(lines))
    return deleted


def count_still_expired(connection: db.Connection, expiry: Expiry, places: Places) -> int:
    """How many of some rows are there and still expired."""
    with _short(connection):
        (found,) = db.rows(connection, query("count_still_expired"), _Count, **places.values(), **expiry.values())
    return found.count


_USUAL = re.compile(rb'"old":\{"company_id":"([^"\\]*)","key_type":"([^"\\]*)",')


def _names(lines: bytes) -> Iterator[tuple[str, str]]:
    """Company and type of each line: by its usual spelling, else parsed."""
    found = _USUAL.findall(lines)
    if len(found) == lines.count(b"\n"):
        return ((company.decode(), key_type.decode()) for company, key_type in found)
    rows = (orjson.loads(line)["old"] for line in lines.splitlines())
    return ((row["company_id"], row["key_type"]) for row in rows)


@contextmanager
def _short(connection: db.Connection) -> Iterator[None]:
    """A transaction that only reads, with the settings of one that writes."""
    connection.execute("BEGIN READ ONLY")
    try:
        prepare(connection)
        yield
    finally:
        with suppress(psycopg.Error, DatabaseUnavailable):
            connection.execute("ROLLBACK")


def prepare(connection: db.Connection, *, wait_for_disk: bool = True, lock_timeout: str = "1s") -> None:
    """The settings of a short transaction that writes, inside of it.

    Without `wait_for_disk` a crash of the server may forget its commit: only where that loses nothing.
    """
    asynchronous = None if wait_for_disk else "off"
    connection.execute(query("prepare_writing"), {"lock_timeout": lock_timeout, "synchronous_commit": asynchronous})


@contextmanager
def writing(connection: db.Connection) -> Iterator[None]:
    """One short transaction without an archive: for what an archive puts back."""
    connection.execute("BEGIN")
    try:
        prepare(connection)
        yield
    except BaseException:
        with suppress(psycopg.Error, DatabaseUnavailable):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def require_writable(connection: db.Connection, *, inserting: bool = False) -> None:
    """Raises `DatabaseUnavailable` where this server or this role cannot delete keys (or insert them)."""
    (rights,) = db.rows(connection, query("check_writable"), _Rights)
    if rights.read_only:
        raise DatabaseUnavailable(
            "this server is a replica, or takes no writes", kind="read-only", hint="point DATABASE_URL at the primary"
        )
    if not rights.may_delete or (inserting and not rights.may_insert):
        also = " INSERT," if inserting else ""
        raise DatabaseUnavailable(
            "the role may not change whatsapp_keys",
            kind="permission",
            hint=f"grant the role SELECT,{also} UPDATE and DELETE on whatsapp_keys",
        )


def lock_keys(connection: db.Connection) -> None:
    """Take the lock of whoever deletes or mends keys, as long as the connection lasts. Raises `Locked`."""
    (state,) = db.rows(connection, query("lock_keys"), _LockState, kind=_LOCK_KIND, number=_LOCK_NUMBER)
    if state.locked:
        return
    holders = db.rows(connection, query("find_lock_holder"), _Holder, kind=_LOCK_KIND, number=_LOCK_NUMBER)
    who = "; ".join(f"{h.application or 'unknown'}, server process {h.pid}, since {h.since}" for h in holders)
    raise Locked(f"another run works on the keys: {who or 'it has just ended'}", hint="opsctl keys runs")


def application_name(command: str) -> str:
    """How a run that holds the lock is known to PostgreSQL: command, host and pid, in its 63 bytes."""
    return f"opsctl {command} {socket.gethostname()[:32]} pid {os.getpid()}"[:63]
