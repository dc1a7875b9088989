"""Baileys session folders: reading them, and telling what somebody else has written into one of ours.

Everything goes through directory descriptors and O_NOFOLLOW: a folder that the service's user owns can be rearranged
under us at any moment, and we may be root.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import MANIFEST_FILE, is_ignored
from opsctl.stores.records import FileEntry, ManifestDamaged, Origin, read_digests, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

OPSCTL_FOLDER = ".opsctl"
"""Below a sessions folder: staging, what was set aside, the lock's holder. The service loads no such name."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FIRST_READ = 32 * 1024
"""Nearly every file is smaller; a larger buffer costs page faults, file by file."""
_NEXT_READ = 1024 * 1024
_LINES = 64 * 1024
"""Of a manifest, read at once; a line of ours is shorter."""
LARGEST_FILE = 256 * 1024 * 1024
"""The service's user may have put anything in the way; PostgreSQL's JSONB ends at 255 MiB."""


@contextmanager
def opened(path: str | Path, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a folder that is no symbolic link."""
    descriptor = os.open(path, _DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(folder_fd: int, name: str) -> bytes:
    """A regular file's bytes. Raises OSError, also for what is no regular file (ELOOP, EINVAL)."""
    descriptor = os.open(name, _FILE, dir_fd=folder_fd)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > LARGEST_FILE:
            raise OSError(errno.EFBIG, "too large for a file of Baileys'")
        data = os.read(descriptor, _FIRST_READ)
        if len(data) < _FIRST_READ:
            return data
        parts = [data]
        while part := os.read(descriptor, _NEXT_READ):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def origin_of(folder_fd: int) -> Origin | None:
    """The origin that the folder's manifest states; None where it has no readable manifest of ours."""
    try:
        with _manifest(folder_fd) as (origin, _):
            return origin
    except (OSError, ManifestDamaged):
        return None


def entries_of(folder_fd: int) -> Iterator[tuple[str, FileEntry]]:
    """The files that the manifest lists, lazily. Raises `ManifestDamaged` or OSError."""
    with _manifest(folder_fd) as (_, entries):
        yield from entries


def digests_of(folder_fd: int) -> Iterator[tuple[str, str]]:
    """File names and SHA-256 as the manifest lists them. Raises `ManifestDamaged` or OSError."""
    with _manifest_pieces(folder_fd) as pieces:
        yield from read_digests(pieces)


@contextmanager
def _manifest(folder_fd: int) -> Iterator[tuple[Origin, Iterator[tuple[str, FileEntry]]]]:
    with _manifest_pieces(folder_fd) as pieces:
        yield read_manifest(pieces)


@contextmanager
def _manifest_pieces(folder_fd: int) -> Iterator[Iterator[bytes]]:
    descriptor = os.open(MANIFEST_FILE, _FILE, dir_fd=folder_fd)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ManifestDamaged("it is no file")
        yield _whole_lines(descriptor)
    finally:
        os.close(descriptor)


def _whole_lines(descriptor: int) -> Iterator[bytes]:
    """What a file holds, in pieces that end with a line; the last one as it is."""
    rest = b""
    while block := os.read(descriptor, _LINES):
        lines, line_break, more = block.rpartition(b"\n")
        if line_break:
            yield rest + lines + line_break
            rest = more
        elif len(rest) < _LINES:
            rest += block
        else:
            raise ManifestDamaged("a line of it cannot be read")
    if rest:
        yield rest


def folder_digest(digests: Mapping[str, bytes]) -> str:
    """One digest of all files, from those of each by name."""
    names = sorted(digests)
    raw = os.fsencode("\0".join(names)).split(b"\0")  # at once; of no names it is one that is empty
    whole = sha256()
    for name, encoded in zip(names, raw, strict=False):
        whole.update(b"%b\0%b\n" % (encoded, digests[name]))
    return whole.hexdigest()


def is_returned(origin: Origin, digests: Mapping[str, bytes]) -> bool:
    """Whether nothing was written on a folder since it was brought back into the database."""
    return origin.returned is not None and origin.returned.digest == folder_digest(digests)


def unreadable(error: OSError) -> bytes:
    """What stands for the digest of a file that cannot be read."""
    return f"unreadable: {error.strerror}".encode()


class Holding(StrEnum):
    """What stands where a company's folder goes."""

    NOTHING = "nothing"
    OURS = "ours"
    """As its manifest says, to the byte, or as it was when it was brought back into the database."""
    LIVE = "live"
    """Ours, and written since: it may hold the only copy of a ratchet."""
    FOREIGN = "foreign"
    """Without a manifest of ours, or of another environment or company."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A folder against its own manifest. The names are bounded samples; the counts are whole."""

    holding: Holding
    origin: Origin | None
    digests: dict[str, bytes]
    """SHA-256 by file name, half the size of their hexadecimal digits; of a file that cannot be read, why."""
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def contents(folder_fd: int, *, company_id: str | None, environment: str) -> Contents:
    """Read every file of a company's folder and hold it against its manifest. Without `company_id` any company's."""
    found = {name: _digest(folder_fd, name) for name in os.listdir(folder_fd) if not is_ignored(name)}
    try:
        origin = origin_of(folder_fd)
        if origin is None or origin.environment != environment or company_id not in {None, origin.company_id}:
            return Contents(Holding.FOREIGN, origin, found)
        # One by one, because all of 100,000 would take 30 MiB. The same number of names with the same sum of hashes are
        # the same names.
        changed, missing, added = [], [], set()
        count, hashes = len(found), sum(map(hash, found))
        for name, digest in digests_of(folder_fd):
            count -= 1
            hashes -= hash(name)
            if name not in found:
                missing.append(name)
            elif found[name] != bytes.fromhex(digest):
                changed.append(name)
        if count or hashes:
            added = found.keys() - {name for name, _ in digests_of(folder_fd)}
    except (ManifestDamaged, OSError):
        return Contents(Holding.FOREIGN, None, found)
    live = bool(changed or missing or added) and not is_returned(origin, found)
    holding = Holding.LIVE if live else Holding.OURS
    return Contents(holding, origin, found, tuple(sorted(changed)), tuple(sorted(missing)), tuple(sorted(added)))


def _digest(folder_fd: int, name: str) -> bytes:
    try:
        return sha256(read_file(folder_fd, name)).digest()
    except OSError as error:
        return unreadable(error)
