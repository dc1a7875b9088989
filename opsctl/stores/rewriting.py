"""Changing one company's rows: one transaction, one lock, archived before it commits, read back inside of it.

The transaction is REPEATABLE READ. A row that somebody writes meanwhile makes it fail, so that what is committed is
what was looked at.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson
import psycopg

from opsctl import db
from opsctl.errors import Locked
from opsctl.queries import query
from opsctl.stores.archive import Head, new_archive
from opsctl.stores.postgres import Creds, Fingerprint, fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from pathlib import Path

    from opsctl.stores.archive import Archive

T = TypeVar("T")

_AT_ONCE = 500
"""Rows per statement: a company of 100,000 keys must not stand in memory."""
_KEYS, _AUTH = "whatsapp_keys", "whatsapp_auth"


@dataclass(frozen=True, slots=True)
class Archiving:
    """How a run archives the rows that it changes."""

    run_id: str
    command: str
    environment: str
    database: str
    """Where the rows are, for people."""
    state_dir: Path
    keep: timedelta

    def archive(self, system_identifier: str | None) -> AbstractContextManager[Archive]:
        """The archive of this run. Raises `Refused` where it cannot be written."""
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        head = Head(self.run_id, self.command, started_at, self.environment, self.database, system_identifier)
        return new_archive(self.state_dir, head, keep=self.keep)


class NewRow(NamedTuple):
    """A key to write; `value` is JSON text, times are PostgreSQL's text."""

    key_type: str
    key_id: str
    value: str
    updated_at: str | None
    expires_at: str | None

    def as_json(self, old: _Kept | None) -> dict[str, Any]:
        """For a statement; `old` is the row in whose place it comes."""
        created_at = old.created_at if old else self.updated_at
        return {**self._asdict(), "value": orjson.Fragment(self.value), "created_at": created_at}


@dataclass(frozen=True, slots=True)
class _Kept:
    key_type: str
    key_id: str
    created_at: str | None
    line: str


@dataclass(frozen=True, slots=True)
class _Taken(_Kept):
    mark: str
    """What the row was of its company's `Fingerprint.key_marks`."""


@dataclass(frozen=True, slots=True)
class _Unwritten:
    key_count: int
    key_marks: str


@dataclass(frozen=True, slots=True)
class _Line:
    line: str


@dataclass(frozen=True, slots=True)
class _Locked:
    locked: bool


class Rewriting:
    """One company's rows inside the transaction that changes them. Made by `rewriting`."""

    def __init__(self, connection: db.Connection, company_id: str, keep: Callable[[bytes], None]) -> None:
        self._connection = connection
        self._company = company_id
        self._keep = keep
        self._before = fingerprint_of(connection, company_id)
        self._taken_count = self._taken_marks = 0

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the rows before the first change: as it was when the change was planned, if nothing was written since."""
        return self._before

    def others_stay(self) -> bool:
        """Whether every key that was neither put nor deleted is still there, and is the same row."""
        (now,) = db.rows(self._connection, query("count_unwritten_keys"), _Unwritten, company_id=self._company)
        count, marks = self._before.key_count - self._taken_count, int(self._before.key_marks) - self._taken_marks
        return (now.key_count, int(now.key_marks)) == (count, marks)

    def written_key_rows(self) -> Iterator[bytes]:
        """The keys that were put, as `Snapshot.key_rows` gives them."""
        return db.copied(self._connection, query("copy_written_keys"), company_id=self._company)

    def creds(self) -> Creds | None:
        """The credentials as they are now."""
        found = db.rows(self._connection, query("read_creds"), Creds, company_id=self._company)
        return found[0] if found else None

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        """Delete keys, by (type, id)."""
        for some in _batches(keys):
            self._keep(b"".join(_archived(_KEYS, old=old.line) for old in self._taken(some)))

    def put(self, rows: Iterable[NewRow]) -> None:
        """Write keys, in place of the rows that there are; those keep the time at which they were made."""
        for some in _batches(rows):
            before = {(old.key_type, old.key_id): old for old in self._taken([row[:2] for row in some])}
            put = [row.as_json(before.get(row[:2])) for row in some]
            # One JSON text: an array of texts would have each quote in them escaped, one by one.
            rows_json = orjson.dumps(put).decode()
            written = db.rows(
                self._connection, query("put_company_keys"), _Kept, company_id=self._company, rows=rows_json
            )
            self._keep(b"".join(_archived(_KEYS, old=_old_line(before, new), new=new.line) for new in written))

    def put_creds(self, creds: str, updated_at: str | None) -> None:
        """Write the credentials; without a time, now."""
        old = self._creds_line()
        (new,) = db.rows(
            self._connection,
            query("put_creds"),
            _Line,
            company_id=self._company,
            creds=creds,
            updated_at=updated_at,
        )
        self._keep(_archived(_AUTH, old=old, new=new.line))

    def _creds_line(self) -> str | None:
        found = db.rows(self._connection, query("read_auth"), _Line, company_id=self._company)
        return found[0].line if found else None

    def _taken(self, keys: Sequence[tuple[str, ...]]) -> list[_Taken]:
        names = {"key_types": [key[0] for key in keys], "key_ids": [key[1] for key in keys]}
        taken = db.rows(self._connection, query("take_company_keys"), _Taken, company_id=self._company, **names)
        self._taken_count += len(taken)
        self._taken_marks += sum(int(old.mark) for old in taken)
        return taken


@contextmanager
def rewriting(connection: db.Connection, archive: Archive, company_id: str) -> Iterator[Rewriting]:
    """The transaction around a change of one company's rows; a block that raises leaves them as they were.

    Raises `Locked` where another run changes this company, `DatabaseUnavailable`, and OSError of the archive's disk.
    """
    try:
        with archive.transaction(connection) as keep:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute(query("prepare_snapshot"))
            (lock,) = db.rows(connection, query("lock_company"), _Locked, company_id=company_id)
            if not lock.locked:
                raise Locked(f"another run changes the rows of company {company_id}")
            yield Rewriting(connection, company_id, keep)
        archive.concerns(company_id)
    except psycopg.Error as error:
        raise db.translated(error) from None


def _old_line(before: Mapping[tuple[str, str], _Taken], row: _Kept) -> str | None:
    """The row in whose place another comes."""
    old = before.get((row.key_type, row.key_id))
    return old.line if old else None


def _archived(table: str, *, old: str | None = None, new: str | None = None) -> bytes:
    """A line as `opsctl.stores.archive` describes it."""
    parts = [f'"table":"{table}"']
    parts += [f'"old":{old}'] if old is not None else []
    parts += [f'"new":{new}'] if new is not None else []
    return "{{{}}}\n".format(",".join(parts)).encode()


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) >= _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
