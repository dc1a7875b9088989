"""Rows that a run deletes or changes: one compressed file per run, durable before the database forgets them.

A file is a series of gzip members, so `zcat` reads it: a head, one member per transaction, a foot. Each line of a
transaction is a row as PostgreSQL prints it (`row_to_json`, every column, times in UTC), with what was made of it:

    {"table":"whatsapp_keys","old":{...}}               deleted
    {"table":"whatsapp_keys","old":{...},"new":{...}}   changed, also under another key
    {"table":"whatsapp_keys","new":{...}}               added

A member is synced before its transaction commits. So a kill leaves at most one member too many (its transaction never
committed: the rows are still there) or a torn one (it cannot have committed), and readers end before that.
"""

from __future__ import annotations

import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
import psycopg

from opsctl.errors import DatabaseUnavailable, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from opsctl.db import Connection

ARCHIVE_FOLDER = "archive"
"""Below the state folder."""
SCHEMA = "opsctl-archive/1"

_SUFFIX = ".jsonl.gz"
_NAME = re.compile(r"([0-9]{8}T[0-9]{6}Z-[0-9a-f]{6})\.jsonl\.gz")
_GZIP = 31  # zlib's wbits for a gzip member
_MAGIC = b"\x1f\x8b\x08"
_LEVEL = 1
_READ = 64 * 1024
_FOOT_BYTES = 4096
_LISTED_COMPANIES = 100
_ROW = b'{"table":'


@dataclass(frozen=True, slots=True)
class Head:
    """Which run wrote an archive, and from which database. `started_at` is ISO 8601 in UTC."""

    run_id: str
    command: str
    started_at: str
    environment: str
    database: str
    """`host:port/name`, for people."""
    system_identifier: str | None
    """None where the role may not ask for it."""


@dataclass(frozen=True, slots=True)
class ArchivedRun:
    """One archive. `rows` and `whole` are as its foot says; without a foot its run was killed, and they are counted."""

    head: Head
    path: Path
    size_bytes: int
    rows: int
    companies: tuple[str, ...]
    ended: str
    """`done`, `stopped` (by an error or a signal), `killed`, or `damaged`."""


class Archive:
    """The archive of this run, open for writing. Made by `new_archive`."""

    def __init__(self, path: Path, descriptor: int, head: Head) -> None:
        self.path = path
        self.rows = 0
        """Of all transactions that were not rolled back, those in doubt too."""
        self._fd = descriptor
        self._companies: set[str] = set()
        self.rows_in_doubt = 0
        """Of a transaction whose COMMIT nobody answered."""
        self._compressing = ThreadPoolExecutor(1, "archive")  # so that the server goes on while we compress
        self._member = zlib.compressobj(_LEVEL, wbits=_GZIP)
        self._pending: list[Future[None]] = []
        self._kept = 0
        self._keep(orjson.dumps({"schema": SCHEMA, **asdict(head)}) + b"\n")
        self._finish_member()

    @contextmanager
    def transaction(self, connection: Connection) -> Iterator[Callable[[bytes], None]]:
        """BEGIN ... COMMIT, in between a function that takes lines: they are durable before the COMMIT.

        A block that raises rolls back, and its lines are taken back. Raises OSError where the disk takes no more, with
        everything rolled back, and `DatabaseUnavailable`.
        """
        connection.execute("BEGIN")
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        self._kept = 0
        try:
            yield self._keep
            if self._kept:
                self._finish_member()
        except BaseException:
            self._take_back(start)
            with suppress(psycopg.Error, DatabaseUnavailable):
                connection.execute("ROLLBACK")
            raise
        try:
            connection.execute("COMMIT")
        except (psycopg.Error, DatabaseUnavailable):
            if connection.closed:  # nobody says any more whether it did
                self.rows += self._kept
                self.rows_in_doubt += self._kept
            else:
                self._take_back(start)
            raise
        self.rows += self._kept

    def concerns(self, *companies: str) -> None:
        """Whose rows these are, for the list of runs."""
        self._companies.update(companies)

    def _keep(self, lines: bytes) -> None:
        self._kept += lines.count(b"\n")
        self._pending.append(self._compressing.submit(self._write, self._member, lines))

    def _write(self, member: zlib._Compress, lines: bytes) -> None:
        _write_all(self._fd, member.compress(lines))

    def _finish_member(self) -> None:
        """End the member that was begun and wait for the disk."""
        for piece in self._pending:
            piece.result()  # where one failed, `_take_back` still waits for those after it
        self._pending = []
        _write_all(self._fd, self._member.flush())
        os.fdatasync(self._fd)
        self._member = zlib.compressobj(_LEVEL, wbits=_GZIP)

    def _take_back(self, start: int) -> None:
        pending, self._pending = self._pending, []
        for piece in pending:
            piece.exception()
        self._member = zlib.compressobj(_LEVEL, wbits=_GZIP)
        with suppress(OSError):  # what stays is a member too many, as after a kill
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)

    def close(self, *, ended: str) -> None:
        """Write the foot. An archive without rows is removed: its run left nothing to take back."""
        self._compressing.shutdown()
        if self.rows:
            foot = {"ended": ended, "rows": self.rows, "companies": sorted(self._companies)[:_LISTED_COMPANIES]}
            with suppress(OSError):  # then it reads as a killed run's
                _write_all(self._fd, zlib.compress(orjson.dumps(foot) + b"\n", _LEVEL, wbits=_GZIP))
                os.fsync(self._fd)
        else:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


@contextmanager
def new_archive(state_dir: Path, head: Head, *, keep: timedelta) -> Iterator[Archive]:
    """The archive of run `head.run_id`; archives older than `keep` are removed.

    Raises `Refused` where it cannot be written, so that nothing is changed without one.
    """
    folder = state_dir / ARCHIVE_FOLDER
    path = folder / f"{head.run_id}{_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        _forget(folder, older_than=keep)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            archive = Archive(path, descriptor, head)
            _sync_folder(folder)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(folder, error) from None
    ended = "stopped"
    try:
        yield archive
        ended = "done"
    finally:
        archive.close(ended=ended)


def unwritable(folder: Path, error: OSError) -> Refused:
    """The refusal to change anything without an archive."""
    return Refused(
        f"the archive in {folder} cannot be written: {error.strerror}; no row is deleted without one",
        kind="archive",
        hint=f"df -h {folder}; ls -ld {folder}",
    )


def archived_runs(state_dir: Path) -> list[ArchivedRun]:
    """Every archive that is kept, oldest first. What is no archive of ours is passed over."""
    folder = state_dir / ARCHIVE_FOLDER
    try:
        paths = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refused(f"the archives in {folder} cannot be read: {error.strerror}", kind="archive") from None
    return [run for path in paths if (run := _run(path)) is not None]


def archived_lines(path: Path) -> Iterator[bytes]:
    """The rows of an archive, a line each without its line break. Raises `Refused` where it is damaged.

    Ends before a member that is torn: its transaction cannot have committed.
    """
    whole = _whole_members(path)
    rest = b""
    for member, data, _ in _pieces(path):
        if member > whole:
            return
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        yield from (line for line in lines if line.startswith(_ROW))


def find_run(state_dir: Path, run_id: str) -> ArchivedRun:
    """One archive by its run's id. Raises `Refused` where there is none."""
    found = [run for run in archived_runs(state_dir) if run.head.run_id == run_id]
    if not found:
        raise Refused(f"no archive of a run {run_id!r} is kept", kind="unknown-run", hint="opsctl keys runs")
    return found[0]


def _run(path: Path) -> ArchivedRun | None:
    """None for a file that does not begin as an archive does, or that is gone."""
    try:
        size = path.stat().st_size
        _, head, _ = next(_pieces(path), (0, b"", False))
        fields = orjson.loads(head)
        if fields.pop("schema") != SCHEMA:
            return None
        foot = _foot(path, size) or _counted(path)
        return ArchivedRun(Head(**fields), path, size, foot["rows"], tuple(foot["companies"]), foot["ended"])
    except (OSError, zlib.error, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None


def _foot(path: Path, size: int) -> dict[str, Any] | None:
    """The last member, if it is a foot; found from the end, because an archive may hold millions of rows."""
    with path.open("rb") as file:
        file.seek(max(0, size - _FOOT_BYTES))
        tail = file.read()
    at = tail.rfind(_MAGIC)
    while at >= 0:
        with suppress(zlib.error, orjson.JSONDecodeError):
            found = orjson.loads(zlib.decompress(tail[at:], wbits=_GZIP))
            if isinstance(found, dict) and "ended" in found:
                return found
        at = tail.rfind(_MAGIC, 0, at)
    return None


def _counted(path: Path) -> dict[str, Any]:
    rows, ended = 0, "killed"
    try:
        rows = sum(1 for _ in archived_lines(path))
    except Refused:
        ended = "damaged"
    return {"rows": rows, "companies": [], "ended": ended}


def _whole_members(path: Path) -> int:
    whole = 0
    try:
        for member, _, ended in _pieces(path):
            whole = member if ended else whole
    except zlib.error:
        raise Refused(
            f"the archive {path} is damaged after {whole} of its members", kind="archive", hint="opsctl keys runs"
        ) from None
    return whole


def _pieces(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """What the file holds, uncompressed: the number of the member from 1, some of its bytes, whether they end it."""
    member, reader = 1, zlib.decompressobj(wbits=_GZIP)
    with path.open("rb") as file:
        compressed = b""
        while compressed := compressed or file.read(_READ):
            yield member, reader.decompress(compressed), reader.eof
            compressed = reader.unused_data
            if reader.eof:
                member, reader = member + 1, zlib.decompressobj(wbits=_GZIP)


def _forget(folder: Path, *, older_than: timedelta) -> None:
    limit = (datetime.now(UTC) - older_than).timestamp()
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and path.lstat().st_mtime < limit:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
