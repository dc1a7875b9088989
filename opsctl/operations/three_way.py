"""What becomes of one row, from three sides: the copy that was published, the folder now, the database now. No I/O.

A value is known here by its identity: two identities are equal if and only if the values are, however each is spelled.
Times are PostgreSQL's text in UTC. The rules are those of docs/baileys.md section 4: the folder was live and the copy
in the database was not, so the folder wins, unless only the database went on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from opsctl.stores.records import CREDS_TYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

NEVER_FROM_DATABASE = frozenset({CREDS_TYPE, "session", "sender-key"})
"""Of two that were both written the database's is never taken: its ratchet is not the one that the peers know."""
CONSUMED = frozenset({"pre-key"})
"""These are used up in any number: their deletions are not limited."""
MOST_DELETED = 5
"""At most one in so many keys of a type may be deleted; more are taken for an accident."""


class Base(NamedTuple):
    """The key as it was published."""

    identity: bytes
    updated_at: str | None


class InFolder(NamedTuple):
    """The key's file now; one without an identity is damaged."""

    identity: bytes | None
    written_at: str = ""


class InDatabase(NamedTuple):
    """The key's row now."""

    identity: bytes
    updated_at: str | None


class Prefer(StrEnum):
    """Whose value is taken where both were written since the folder was published."""

    FILES = "files"
    DATABASE = "database"


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is true of all keys of one company."""

    published_at: str | None
    """When the folder became the live one; None where no manifest says so: then each file's own time decides."""
    another_server: bool = False
    """The rows are those of another server, or of another timeline, than the copy was taken from."""
    rows_lost: bool = False
    """Rows are gone that the copy had and the folder still has."""
    prefer: Prefer | None = None


class Action(StrEnum):
    """What becomes of the row."""

    UNCHANGED = "unchanged"
    INSERTED = "inserted"
    UPDATED = "updated"
    DELETED = "deleted"
    LOST = "lost by the database"
    """And inserted again."""
    KEPT = "kept"
    """The row stays, though the folder has something else, or nothing."""
    DAMAGED = "damaged"
    """The file cannot be read: the row stays, if there is one."""
    CONFLICT = "conflicting"
    """Somebody has to decide: nothing of the company is written."""


WRITTEN = frozenset({Action.INSERTED, Action.UPDATED, Action.LOST})
"""The file's value is what the database has afterwards."""
CHANGING = WRITTEN | {Action.DELETED}


class Verdict(NamedTuple):
    """What becomes of one row, and why."""

    action: Action
    reason: str
    conflicting: bool = False
    """Both sides were written since the copy was taken; decided or not, that is told."""


_SAME = Verdict(Action.UNCHANGED, "")


def decide(
    key_type: str, base: Base | None, file: InFolder | None, row: InDatabase | None, around: Circumstances
) -> Verdict:
    """What becomes of one key's row."""
    if file is None:
        return _SAME if row is None else _without_file(key_type, base, row, around)
    if file.identity is None:
        return Verdict(Action.DAMAGED, "its file is torn" if row else "its file is torn, and the database has no row")
    if row is None:
        if base is None:
            return Verdict(Action.INSERTED, "only the folder has it")
        return Verdict(Action.LOST, "the database lost it")
    return _SAME if file.identity == row.identity else _of_two(key_type, base, file, row, around)


def _of_two(key_type: str, base: Base | None, file: InFolder, row: InDatabase, around: Circumstances) -> Verdict:
    if base is not None:
        if row.identity == base.identity:
            return Verdict(Action.UPDATED, "written on the folder")
        if _is_older(row, base, around):
            return Verdict(Action.UPDATED, "the database went back to an older value")
    since = _written_since_published(base, file, row, around)
    if base is not None and file.identity == base.identity and not (since and around.another_server):
        return Verdict(Action.KEPT, "written in the database after the copy, and not on the folder")
    if not since:
        return Verdict(Action.UPDATED, "both were written, the folder later", conflicting=True)
    return _preferred(key_type, Action.UPDATED, "both were written since the folder was published", around)


def _without_file(key_type: str, base: Base | None, row: InDatabase, around: Circumstances) -> Verdict:
    if base is None:
        return Verdict(Action.KEPT, "only the database has it")
    if row.identity == base.identity or _is_older(row, base, around):
        return Verdict(Action.DELETED, "deleted on the folder")
    if not _written_since_published(base, None, row, around):
        return Verdict(Action.KEPT, "deleted on the folder, but written after the copy", conflicting=True)
    what = "deleted on the folder, and written since it was published"
    return _preferred(key_type, Action.DELETED, what, around)


def _preferred(key_type: str, files_win: Action, what: str, around: Circumstances) -> Verdict:
    match around.prefer:
        case Prefer.FILES:
            return Verdict(files_win, f"{what}; the folder is preferred", conflicting=True)
        case Prefer.DATABASE if key_type in NEVER_FROM_DATABASE:
            return Verdict(Action.CONFLICT, f"{what}; of {key_type} the database's is never taken", conflicting=True)
        case Prefer.DATABASE:
            return Verdict(Action.KEPT, f"{what}; the database is preferred", conflicting=True)
    return Verdict(Action.CONFLICT, what, conflicting=True)


def _is_older(row: InDatabase, base: Base, around: Circumstances) -> bool:
    """Whether a row that is not the published one was written before it.

    The service may leave `updated_at` alone. Then a database that lost rows, or is another one, went back; the one that
    the copy was taken from has gone on.
    """
    if row.updated_at is not None and base.updated_at is not None and row.updated_at != base.updated_at:
        return row.updated_at < base.updated_at
    return around.another_server or around.rows_lost


def _written_since_published(base: Base | None, file: InFolder | None, row: InDatabase, around: Circumstances) -> bool:
    if row.updated_at is None or (base is not None and row.updated_at == base.updated_at):
        return True  # nobody knows
    if around.published_at is not None:
        return row.updated_at > around.published_at
    return file is None or row.updated_at > file.written_at


def too_many_deleted(deleted: Mapping[str, int], published: Mapping[str, int]) -> str | None:
    """Why the deletions, by key type, are taken for an accident: then none is made, of no type. None if they are not.

    >>> too_many_deleted({"session": 2, "pre-key": 40}, {"session": 10, "pre-key": 40}) is None
    True
    >>> too_many_deleted({"session": 3}, {"session": 10})
    '3 of 10 session files are gone, more than a fifth'
    """
    for key_type, count in sorted(deleted.items()):
        if key_type not in CONSUMED and count * MOST_DELETED > published.get(key_type, 0):
            return f"{count} of {published.get(key_type, 0)} {key_type} files are gone, more than a fifth"
    return None
