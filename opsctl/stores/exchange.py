"""Changes as an archive has them, made and taken back: whole rows, exchanged only where nobody has written since.

A line's rows are handed to PostgreSQL as it printed them, so numbers keep their digits and columns that we know nothing
of are kept too. A row is never updated: a trigger would overwrite its times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson

from opsctl import db
from opsctl.errors import Refused
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class _Line:
    line: str


class KeyName(NamedTuple):
    """A key by name."""

    company_id: str
    key_type: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Patch:
    """What is to become of a key: other values in some columns; None: it goes. If it `stays`, the other is new."""

    columns: Mapping[str, Any] | None
    stays: bool = False


def plan_key_changes(connection: Connection, patches: Mapping[KeyName, Patch]) -> list[Change]:
    """The changes that patches make of keys as they are now; those of keys that are gone are left out."""
    names, chosen = list(patches), list(patches.values())
    columns = [None if patch.columns is None else orjson.dumps(patch.columns).decode() for patch in chosen]
    found = db.rows(
        connection,
        query("plan_key_changes"),
        _Line,
        companies=[name.company_id for name in names],
        key_types=[name.key_type for name in names],
        key_ids=[name.key_id for name in names],
        patches=columns,
        stays=[patch.stays for patch in chosen],
    )
    return [Change.of(row.line) for row in found]


def plan_creds_change(connection: Connection, company_id: str, fields: Mapping[str, Any]) -> list[Change]:
    """The change that other values in some fields of a company's credentials are."""
    patch = orjson.dumps(fields).decode()
    found = db.rows(connection, query("plan_creds_change"), _Line, company_id=company_id, patch=patch)
    return [Change.of(row.line) for row in found]


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
    whole = [change for change in changes if change.table == "whatsapp_auth" and change.has_old and change.has_new]
    statement = query("change_auth")
    made = [whole[h.number - 1] for h in _run(connection, statement, whole, take, other_side=put)]
    for table in sorted({change.table for change in changes}):
        ours = [change for change in changes if change.table == table and change not in whole]
        replacing = [change for change in ours if change.has(take)]
        taken = [replacing[h.number - 1] for h in _run(connection, _TAKE[table], replacing, take)]
        adding = [change for change in (*taken, *(c for c in ours if not c.has(take))) if change.has(put)]
        added = [adding[h.number - 1] for h in _run(connection, _PUT[table], adding, put)]
        if lost := [change for change in taken if change.has(put) and change not in added]:
            raise Refused(f"{len(lost)} rows would end up under names that others have taken", hint="type it again")
        made += [change for change in taken if not change.has(put)]
        made += added
    return made


def _run(
    connection: Connection, statement: LiteralString, changes: Sequence[Change], side: Side, **more: Side
) -> list[Holding]:
    if not changes:
        return []
    return db.rows(connection, statement, Holding, lines=[change.line for change in changes], side=side, **more)


_TAKE = {"whatsapp_auth": query("take_auth"), "whatsapp_keys": query("take_keys")}
_PUT = {"whatsapp_auth": query("put_auth"), "whatsapp_keys": query("put_keys")}
_COMPARE = {"whatsapp_auth": query("compare_auth"), "whatsapp_keys": query("compare_keys")}
