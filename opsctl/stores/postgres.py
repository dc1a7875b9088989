"""`whatsapp_auth` and `whatsapp_keys`: one connection, one snapshot, keys streamed.

One connection is all that an emergency may have left ("too many clients"), and a transaction is all that a pooler keeps
together, so everything is read inside one REPEATABLE READ transaction and nothing needs the session around it.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import psycopg

from opsctl import db
from opsctl.errors import DatabaseUnavailable
from opsctl.queries import query
from opsctl.stores.records import Record, row_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import LiteralString

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which server it is."""

    system_identifier: str
    timeline: int


@dataclass(frozen=True, slots=True)
class Server:
    """Which server a snapshot is of. `system_identifier` and `timeline` are None where the role may not look."""

    identifiable: bool
    in_recovery: bool
    server_version: int
    snapshot_at: str
    replayed_at: str | None
    """Of a replica: when the last transaction that it has was committed."""
    busy_since: str
    """15 minutes before the snapshot, in the same form as a record's times."""
    backend_pid: int
    system_identifier: str | None = None
    timeline: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """One company as the database has it."""

    company_id: str
    has_creds: bool
    keys_by_type: dict[str, int] | None
    """None where the table of keys is damaged and cannot be counted."""
    newest_at: str | None

    @property
    def key_count(self) -> int:
        return sum((self.keys_by_type or {}).values())


@dataclass(frozen=True, slots=True)
class Account:
    """Whose credentials a company has: `me.id`, None for an abandoned pairing."""

    company_id: str
    me_id: str | None


@dataclass(frozen=True, slots=True)
class CredsDate:
    """When a company's credentials were last written."""

    company_id: str
    updated_at: str | None


@dataclass(frozen=True, slots=True)
class KeyCount:
    """How many keys of one type a company has."""

    company_id: str
    key_type: str
    key_count: int
    newest_at: str | None


@dataclass(frozen=True, slots=True)
class Creds:
    """One company's row of `whatsapp_auth`: JSON text."""

    creds: str
    updated_at: str | None


@dataclass(frozen=True, slots=True)
class CompanyCreds:
    """The credentials of one of all companies: JSON text."""

    company_id: str
    creds: str


@dataclass(frozen=True, slots=True)
class CompanyDigest:
    """By what one sees whether anything of a company has changed; empty where the server could not tell."""

    company_id: str
    has_creds: bool
    key_count: int
    digest: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the server is, in 64-bit transaction numbers, and which of its databases this is."""

    since: int
    """Every transaction before this one had ended: whatever is written later has this number or a higher one."""
    next_xid: int
    database_oid: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """By what one sees whether any row of a company was written: the transactions that wrote them."""

    creds_mark: str | None
    key_count: int
    key_marks: str
    """The sum of a number per key, in decimal digits."""


class Snapshot:
    """All companies at one instant. Made by `snapshot`."""

    def __init__(self, connection: db.Connection, server: Server) -> None:
        self._connection = connection
        self.server = server
        self.damage: str | None = None
        """What the server says of a table that it cannot read whole."""

    @property
    def pooled(self) -> bool:
        """Whether a pooler sits in between: the process it says we talk to is not the one that answers."""
        return self._connection.pgconn.backend_pid != self.server.backend_pid

    def tenants(self) -> list[Tenant]:
        """Every company that has credentials or keys, by id; without the keys where their table is damaged."""
        with _translating():
            written = {row.company_id: row.updated_at for row in self._rows(query("list_credentials"), CredsDate)}
        try:
            with self.company(), _translating(), self._connection.counting():
                counts = self._rows(query("count_keys"), KeyCount)
        except DatabaseUnavailable as error:
            if error.kind != "corrupt":
                raise
            self.damage = error.message
            return [Tenant(company, True, None, newest) for company, newest in sorted(written.items())]
        by_company: dict[str, dict[str, int]] = {company: {} for company in written}
        newest: dict[str, str | None] = dict(written)
        for count in counts:
            company = count.company_id
            by_company.setdefault(company, {})[count.key_type] = count.key_count
            # Text of one zone and form, which sorts as the times do.
            newest[company] = max(newest.get(company) or "", count.newest_at or "") or None
        return [
            Tenant(company, company in written, by_company[company], newest[company]) for company in sorted(by_company)
        ]

    def _rows(self, statement: LiteralString, into: Callable[..., T]) -> list[T]:
        return db.rows(self._connection, statement, into)

    def accounts(self) -> list[Account]:
        """The account of every company that has credentials; none where their table cannot be read whole."""
        try:
            with self.company(), _translating(), self._connection.counting():
                return db.rows(self._connection, query("list_accounts"), Account)
        except DatabaseUnavailable as error:
            if error.kind != "corrupt":
                raise
            self.damage = error.message
            return []

    def give_up_after(self, remaining_s: float | None) -> None:
        """From here on the snapshot is read under another clock than the one it was opened with."""
        self._connection.give_up_at = time.monotonic() + (float("inf") if remaining_s is None else remaining_s)

    def progress(self) -> Progress:
        """How far the server was when the snapshot was taken."""
        with _translating():
            (progress,) = db.rows(self._connection, query("describe_progress"), Progress)
        return progress

    def digests(self) -> list[CompanyDigest]:
        """Every company that has credentials or keys, by id. Reads all rows, but none of their values."""
        try:
            with self.company(), _translating(), self._connection.counting():
                return db.rows(self._connection, query("digest_companies"), CompanyDigest)
        except DatabaseUnavailable as error:
            if error.kind != "corrupt":
                raise
        return [CompanyDigest(t.company_id, t.has_creds, t.key_count, "") for t in self.tenants()]

    @contextmanager
    def company(self) -> Iterator[None]:
        """Around the reading of one company: damage that the server reports in it does not end the snapshot."""
        with _translating():
            self._connection.execute("SAVEPOINT company")
        try:
            yield
        except DatabaseUnavailable as error:
            if error.kind != "corrupt":
                raise
            with _translating():
                self._connection.execute("ROLLBACK TO SAVEPOINT company")
            raise
        with _translating():
            self._connection.execute("RELEASE SAVEPOINT company")

    def creds(self, company_id: str) -> Creds | None:
        """The company's credentials, or None."""
        with _translating():
            found = db.rows(self._connection, query("read_creds"), Creds, company_id=company_id)
        return found[0] if found else None

    def all_creds(self) -> dict[str, bytes]:
        """Every company's credentials, by id."""
        with _translating():
            found = db.rows(self._connection, query("list_creds"), CompanyCreds)
        return {row.company_id: row.creds.encode() for row in found}

    def fingerprint(self, company_id: str) -> Fingerprint:
        """By what a later look sees whether any row of the company was written."""
        with _translating():
            return fingerprint_of(self._connection, company_id)

    def key_rows(self, company_id: str) -> Iterator[bytes]:
        """The company's keys, in no order: lines of COPY's text format, many at a time (`parse_rows` reads them)."""
        with _translating():
            yield from db.copied(self._connection, query("copy_keys"), company_id=company_id)

    def changed_key_rows(self, company_id: str, *, since: int) -> Iterator[bytes]:
        """The company's keys as `key_rows` has them, with an empty value where nothing from `since` on wrote the row.

        `since` is a `Progress.since` of this server, at most 2^31 transactions ago.
        """
        with _translating():
            yield from db.copied(self._connection, query("copy_changed_keys"), company_id=company_id, since=since)


def fingerprint_of(connection: db.Connection, company_id: str) -> Fingerprint:
    """As `Snapshot.fingerprint`, in another transaction."""
    (found,) = db.rows(connection, query("fingerprint_company"), Fingerprint, company_id=company_id)
    return found


@contextmanager
def snapshot(connection: db.Connection) -> Iterator[Snapshot]:
    """One read-only REPEATABLE READ transaction on `connection`."""
    with _translating():
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute(query("prepare_snapshot"))
        (server,) = db.rows(connection, query("describe_server"), Server)
        if server.identifiable:
            (identity,) = db.rows(connection, query("identify_server"), Identity)
            server = replace(server, system_identifier=identity.system_identifier, timeline=identity.timeline)
    yield Snapshot(connection, server)
    # No COMMIT: nothing was written, and closing the connection ends the transaction without waiting for an answer.


@contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise db.translated(error) from None


_record = functools.partial(tuple.__new__, Record)  # what Record() does, without Python code in between
_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def parse_rows(lines: bytes) -> Iterator[Record]:
    """Lines of COPY's text format, each with its line break, as records."""
    # COPY escapes every line break inside a field.
    return map(parse_row, lines.splitlines())


def parse_row(line: bytes) -> Record:
    r"""One line of COPY's text format (PostgreSQL manual, COPY, "Text Format") as a record.

    >>> parse_row(b'pre-key\t5\t{"a": "\\\\n"}\t2026-01-31 03:04:05+00\t\\N')[:5]
    ('pre-key', '5', b'{"a": "\\n"}', '2026-01-31 03:04:05+00', None)
    """
    row = row_digest(line)
    key_type, key_id, value, updated_at, expires_at = line.split(b"\t")
    if b"\\" in line:
        if b"\\" in key_id or b"\\" in key_type:
            key_type, key_id = _unescaped(key_type), _unescaped(key_id)
        # JSON text has no raw control characters, so doubled backslashes are all that COPY makes of it.
        value = value.replace(b"\\\\", b"\\")
        return Record(
            key_type.decode(),
            key_id.decode(),
            value,
            None if updated_at == b"\\N" else updated_at.decode(),
            None if expires_at == b"\\N" else expires_at.decode(),
            row,
        )
    return _record((key_type.decode(), key_id.decode(), value, updated_at.decode(), expires_at.decode(), row))


def _unescaped(field: bytes) -> bytes:
    parts = field.split(b"\\")
    out = [parts[0]]
    rest = iter(parts[1:])
    for part in rest:
        if part == b"":  # a doubled backslash: what follows it is plain
            out.append(b"\\" + next(rest, b""))
        else:
            out.append(_ESCAPES.get(part[:1], part[:1]) + part[1:])
    return b"".join(out)
