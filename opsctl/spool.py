"""What nobody has answered yet: a file each (0600), named so that they sort by age.

A run holds a lock on the file that it delivers, so that two runs never deliver the same one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 50
"""Files kept while nobody answers; the oldest go first."""
LONGEST_S = 7 * 86400.0
"""What is older is news to nobody."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One content on its way: in a file that this run holds a lock on, or only in memory where none can be written."""

    name: str
    content: bytes
    path: Path | None
    held: contextlib.AbstractContextManager[object]

    def forget(self) -> None:
        """It was answered."""
        if self.path:
            self.path.unlink(missing_ok=True)


class Spool:
    """A folder of what waits for one receiver. Where it cannot be written, contents are delivered from memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """The files, oldest first."""
        try:
            return sorted(name for name in os.listdir(self.folder) if name.partition("-")[0].isdecimal())
        except OSError:
            return []

    def add(self, name: str, content: bytes) -> Waiting:
        """Keep a content before it is tried, because the process may end while it waits for an answer."""
        path = self.folder / f"{time.time_ns()}-{name}"
        unseen = self.folder / f".{path.name}"  # until the lock is held and the content whole
        held = contextlib.ExitStack()
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = held.enter_context(_locked(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            file.write(content)
            file.flush()
            unseen.rename(path)
        except OSError:
            held.close()
            with contextlib.suppress(OSError):
                unseen.unlink(missing_ok=True)
            return Waiting(name, content, None, contextlib.nullcontext())
        self._drop_the_oldest()
        return Waiting(name, content, path, held)

    def claim(self, file_name: str) -> Waiting | None:
        """What an earlier run left; None where another run delivers it, has delivered it, or it is too old."""
        path = self.folder / file_name
        written_ns, _, name = file_name.partition("-")
        try:
            file = _locked(path, os.O_RDWR)
        except OSError:
            return None
        waiting = Waiting(name, file.read(), path, file)
        gone = os.fstat(file.fileno()).st_nlink == 0
        if gone or time.time() - int(written_ns) / 1e9 > LONGEST_S:
            with file:
                waiting.forget()
            return None
        return waiting

    def _drop_the_oldest(self) -> None:
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir())[:-LIMIT]:
                path.unlink(missing_ok=True)


def _locked(path: Path, flags: int) -> IO[bytes]:
    """The file, locked; raises `BlockingIOError` where another run has it."""
    file = open(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b")  # noqa: PTH123, SIM115 - a descriptor
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
