"""The mark that a folder was brought back into the database: in the head of its manifest, beside what was published.

What was published stays on record, so that undoing a failback and making it again find the same base.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import MANIFEST_FILE
from opsctl.stores.folder import read_file
from opsctl.stores.publishing import sync_filesystem
from opsctl.stores.records import manifest_lines, read_manifest

if TYPE_CHECKING:
    from opsctl.stores.records import Origin, Returned

_NEW = f"{MANIFEST_FILE}.tmp"


def mark_returned(folder_fd: int, returned: Returned | None) -> None:
    """Put the mark into a folder's manifest in one step; None takes it away.

    Raises OSError, and `ManifestDamaged` where the manifest is not one of ours.
    """
    write_mark(folder_fd, returned)
    sync_filesystem(folder_fd)
    put_mark_in_place(folder_fd)


def write_mark(folder_fd: int, returned: Returned | None) -> None:
    """The manifest with the mark, beside the one in place; so many folders need one sync. Raises as `mark_returned`."""
    lines = read_file(folder_fd, MANIFEST_FILE)
    head, _, rest = lines.partition(b"\n")
    origin, _ = read_manifest([head + b"\n"])
    _write(folder_fd, _head(replace(origin, returned=returned)) + rest)


def put_mark_in_place(folder_fd: int) -> None:
    """What `write_mark` wrote, and a sync has made durable, is the folder's manifest from now on. Raises OSError."""
    os.rename(_NEW, MANIFEST_FILE, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)


def _head(origin: Origin) -> bytes:
    return next(manifest_lines(origin, ()))


def _write(folder_fd: int, data: bytes) -> None:
    with suppress(FileNotFoundError):  # never written into: the service's user may have put anything there
        os.unlink(_NEW, dir_fd=folder_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_NEW, flags, 0o600, dir_fd=folder_fd), "wb") as file:
        there = os.fstat(folder_fd)
        if os.geteuid() != there.st_uid:
            os.fchown(file.fileno(), there.st_uid, there.st_gid)
        file.write(data)
