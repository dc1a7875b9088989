"""Where the live sessions are, for whoever keeps a copy: the database, or the folders while a switch is on record.

Both say cheaply which companies have changed, and of such a company give the values that have.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

import orjson

from opsctl.baileys.filenames import CREDS_FILE, is_ignored, parse_key_file_name
from opsctl.errors import SourceUnavailable
from opsctl.stores.folder import OPSCTL_FOLDER, entries_of, opened, origin_of, read_file
from opsctl.stores.postgres import parse_rows
from opsctl.stores.records import ManifestDamaged, Record
from opsctl.stores.standby import Marks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.records import FileEntry

_XIDS_TOLD_APART = 2**31


@dataclass(frozen=True, slots=True)
class Found:
    """One company as the live store has it, before it is read."""

    company_id: str
    has_creds: bool
    digest: str
    """Equal to an earlier one: nothing has changed. Empty: not known."""


@dataclass(frozen=True, slots=True)
class Base:
    """The copy that a company is read against."""

    fd: int | None
    entries: Mapping[str, FileEntry]
    marks: Marks | None
    """Of when it was taken; None where everything is to be read, whatever the copy has."""


class Live(Protocol):
    """Where the live sessions are."""

    name: str
    at: str
    """Its clock when it was looked at, as PostgreSQL's text in UTC."""
    gone: str
    """What is said of a company that it does not have any more."""
    system_identifier: str | None
    timeline: int | None

    def companies(self) -> list[Found]: ...

    def marks(self, digest: str) -> Marks:
        """By what the company that was read last is recognised as unchanged."""

    def another_server(self, before: Marks, /) -> str | None:
        """Why this is not the server, or not the history, that the marks are of; None also where that is unknown."""

    def can_tell_changes(self, before: Marks, /) -> bool:
        """Whether `records` can leave out what has not changed since the marks."""

    def creds(self, company_id: str, base: Base, /) -> tuple[bytes, str | None] | None:
        """The company's credentials and when they changed. The first thing that is read of it."""

    def records(self, company_id: str, base: Base, /) -> Iterator[Record]:
        """Every key of the company; with an empty value where it is as the base has it."""

    def left_as_it_was(self) -> tuple[str, ...]:
        """Sentences on what of the company read last could not be read, and was taken from the base."""


class LiveDatabase:
    """One snapshot of PostgreSQL."""

    name = "database"
    gone = "it is not in the database any more"

    def __init__(self, snapshot: Snapshot) -> None:
        server = snapshot.server
        self._snapshot = snapshot
        self._progress = snapshot.progress()
        self.at = server.snapshot_at
        self.system_identifier = server.system_identifier
        self.timeline = server.timeline

    def companies(self) -> list[Found]:
        return [Found(d.company_id, d.has_creds, d.digest) for d in self._snapshot.digests()]

    def marks(self, digest: str) -> Marks:
        return Marks(
            source=self.name,
            digest=digest,
            since=self._progress.since,
            next_xid=self._progress.next_xid,
            database_oid=self._progress.database_oid,
            system_identifier=self.system_identifier,
            timeline=self.timeline,
        )

    def another_server(self, before: Marks, /) -> str | None:
        if before.system_identifier and self.system_identifier:
            if before.system_identifier != self.system_identifier:
                return f"the server is another one (system identifier {self.system_identifier})"
            if before.timeline != self.timeline:
                return f"the server is on timeline {self.timeline} instead of {before.timeline}: promoted, or restored"
        if before.next_xid is not None and self._progress.next_xid < before.next_xid:
            return "the server is at an earlier transaction than the copy: rolled back, or a replica that lags"
        return None

    def can_tell_changes(self, before: Marks, /) -> bool:
        return (
            before.since is not None
            and before.database_oid == self._progress.database_oid
            and 0 <= self._progress.next_xid - before.since < _XIDS_TOLD_APART
        )

    def creds(self, company_id: str, _base: Base, /) -> tuple[bytes, str | None] | None:
        found = self._snapshot.creds(company_id)
        return (found.creds.encode(), found.updated_at) if found else None

    def records(self, company_id: str, base: Base, /) -> Iterator[Record]:
        if base.marks is None or base.marks.since is None:
            pieces = self._snapshot.key_rows(company_id)
        else:
            pieces = self._snapshot.changed_key_rows(company_id, since=base.marks.since)
        for piece in pieces:
            yield from parse_rows(piece)

    def left_as_it_was(self) -> tuple[str, ...]:
        return ()


class LiveFolders:
    """The folders that the service runs on. It writes in place while we read: a torn file stays as the base has it."""

    name = "folders"
    system_identifier: str | None = None
    timeline: int | None = None

    def __init__(self, sessions_dir: Path, *, now: datetime) -> None:
        self._dir = sessions_dir
        self._folders: dict[str, str] = {}
        self._torn: list[str] = []
        self.at = _postgres_time(now.timestamp())
        self.gone = f"it has no folder in {sessions_dir}, where the service runs on folders"

    def companies(self) -> list[Found]:
        try:
            return self._companies()
        except OSError as error:
            raise SourceUnavailable(
                f"the folders in {self._dir} cannot be read: {error.strerror}", hint="check their owner and mode"
            ) from None

    def _companies(self) -> list[Found]:
        out = []
        with opened(self._dir) as root:
            for name in sorted(os.listdir(root)):
                if name == OPSCTL_FOLDER or not name.startswith("company_"):
                    continue
                try:
                    with opened(name, dir_fd=root) as fd:
                        origin, files = origin_of(fd), _files(fd)
                except NotADirectoryError:
                    continue
                company_id = origin.company_id if origin else name.removeprefix("company_")
                self._folders[company_id] = name
                has_creds = any(file[0] == CREDS_FILE for file in files)
                out.append(Found(company_id, has_creds, sha256(repr(files).encode()).hexdigest()))
        return out

    def marks(self, digest: str) -> Marks:
        # A file that was torn when it was read may be whole the next time, without a change that shows.
        return Marks(source=self.name, digest="" if self._torn else digest)

    def another_server(self, _before: Marks, /) -> str | None:
        return None

    def can_tell_changes(self, _before: Marks, /) -> bool:
        return True  # by the bytes themselves

    def creds(self, company_id: str, base: Base, /) -> tuple[bytes, str | None] | None:
        self._torn = []
        with opened(self._dir) as root, opened(self._folders[company_id], dir_fd=root) as fd:
            try:
                data, at = _whole(fd, CREDS_FILE), _changed_at(fd, CREDS_FILE)
            except FileNotFoundError:
                return None
        if data is not None:
            return data, at
        self._torn.append(CREDS_FILE)
        data = _whole(base.fd, CREDS_FILE) if base.fd is not None else None
        return (data, base.entries[CREDS_FILE].updated_at) if data is not None else None

    def records(self, company_id: str, base: Base, /) -> Iterator[Record]:
        with opened(self._dir) as root, opened(self._folders[company_id], dir_fd=root) as fd:
            known = {**_entries(fd), **base.entries}  # names alone are lossy
            for name in os.listdir(fd):
                words = parse_key_file_name(name)
                if words is None or is_ignored(name):
                    continue
                try:
                    data, at = _whole(fd, name), _changed_at(fd, name)
                except FileNotFoundError:  # deleted as we came to it
                    continue
                entry = base.entries.get(name)
                if entry is not None and (data is None or sha256(data).hexdigest() == entry.sha256):
                    whole = b"" if base.marks is not None else data or _whole(base.fd, name)
                    yield Record(entry.key_type, entry.key_id, whole or b"", entry.updated_at, entry.expires_at)
                elif data is not None:
                    key_type, key_id = (known[name].key_type, known[name].key_id) if name in known else words
                    yield Record(key_type, key_id, data, at, None)
                if data is None:
                    self._torn.append(name)

    def left_as_it_was(self) -> tuple[str, ...]:
        if not self._torn:
            return ()
        return (f"{len(self._torn)} torn files were left as the copy has them ({', '.join(self._torn[:3])})",)


def _files(fd: int) -> list[tuple[str, int, int, int]]:
    """What shows that a folder was written: each name with its inode, size and time."""
    out = []
    for name in sorted(os.listdir(fd)):
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        out.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return out


def _entries(fd: int) -> dict[str, FileEntry]:
    try:
        return dict(entries_of(fd))
    except (ManifestDamaged, OSError):
        return {}


def _whole(fd: int | None, name: str) -> bytes | None:
    """A file's bytes; None where they are no JSON, or cannot be read. Raises FileNotFoundError."""
    if fd is None:
        return None
    try:
        data = read_file(fd, name)
        orjson.loads(data)
    except FileNotFoundError:
        raise
    except (OSError, orjson.JSONDecodeError):
        return None
    return data


def _changed_at(fd: int, name: str) -> str:
    return _postgres_time(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime)


def _postgres_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S.%f}+00"
