"""Changes as an archive has them, made and taken back: whole rows, exchanged only where nobody has written since.

A line's rows are handed to PostgreSQL as it printed them, so numbers keep their digits and columns that we know nothing
of are kept too. A row is never updated: a trigger would overwrite its times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import orjson

from opsctl import db
from opsctl.errors import Refused
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import LiteralString

    from opsctl.db import Connection

TableName = Literal["whatsapp_auth", "whatsapp_keys"]
Side = Literal["old", "new"]


@dataclass(frozen=True, slots=True)
class Change:
    """One line of an archive: a row that was and a row that is to be, or one of them."""

    table: TableName
    company: str
    line: str
    has_old: bool
    has_new: bool

    @classmethod
    def of(cls, line: str | bytes) -> Change:
        """Read a line, with or without its line break."""
        text = (line.decode() if isinstance(line, bytes) else line).rstrip("\n")
        fields = orjson.loads(text)
        old, new = fields.get("old"), fields.get("new")
        return cls(fields["table"], (old or new)["company_id"], text, old is not None, new is not None)

    def has(self, side: Side) -> bool:
        """Whether there is a row on that side."""
        return self.has_old if side == "old" else self.has_new


@dataclass(frozen=True, slots=True)
class Holding:
    """How the table holds one of the rows that were asked about, by their number from 1."""

    number: int
    there: bool
    equal: bool


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


def make(connection: Connection, changes: Sequence[Change]) -> list[Change]:
    """Make the changes that are still possible, inside the caller's transaction; gives those that were made.

    A change of a row is possible where that row still is as it was, an addition where none of its name is there. No
    two changes may concern one row. Raises `Refused` where a changed row would end up under a name that is taken.
    """
    return _exchange(connection, changes, take="old", put="new")


def take_back(connection: Connection, changes: Sequence[Change]) -> list[Change]:
    """The way back: as `make`, with the sides exchanged."""
    return _exchange(connection, changes, take="new", put="old")


def holdings(connection: Connection, changes: Sequence[Change], side: Side) -> dict[Change, Holding]:
    """How the table holds the changes' rows of one side; changes without such a row are left out."""
    found: dict[Change, Holding] = {}
    for table in sorted({change.table for change in changes}):
        ours = [change for change in changes if change.table == table and change.has(side)]
        found |= {ours[h.number - 1]: h for h in _run(connection, _COMPARE[table], ours, side)}
    return found


def insert_triggers(connection: Connection) -> list[str]:
    """The names of triggers that may change a key's row while it is inserted."""
    return [row.name for row in db.rows(connection, query("list_insert_triggers"), _Name)]


def _exchange(connection: Connection, changes: Sequence[Change], *, take: Side, put: Side) -> list[Change]:
    made: list[Change] = []
    for table in sorted({change.table for change in changes}):
        ours = [change for change in changes if change.table == table]
        replacing = [change for change in ours if change.has(take)]
        taken = [replacing[h.number - 1] for h in _run(connection, _TAKE[table], replacing, take)]
        adding = [change for change in (*taken, *(c for c in ours if not c.has(take))) if change.has(put)]
        added = [adding[h.number - 1] for h in _run(connection, _PUT[table], adding, put)]
        if lost := [change for change in taken if change.has(put) and change not in added]:
            raise Refused(f"{len(lost)} rows would end up under names that others have taken", hint="type it again")
        made += [change for change in taken if not change.has(put)]
        made += added
    return made


def _run(connection: Connection, statement: LiteralString, changes: Sequence[Change], side: Side) -> list[Holding]:
    if not changes:
        return []
    return db.rows(connection, statement, Holding, lines=[change.line for change in changes], side=side)


_TAKE = {"whatsapp_auth": query("take_auth"), "whatsapp_keys": query("take_keys")}
_PUT = {"whatsapp_auth": query("put_auth"), "whatsapp_keys": query("put_keys")}
_COMPARE = {"whatsapp_auth": query("compare_auth"), "whatsapp_keys": query("compare_keys")}
