"""The state folder: the history of runs and what was alerted when. A folder that cannot be written stops nothing."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import orjson

from opsctl.errors import unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HISTORY_LIMIT_BYTES = 4 * 1024 * 1024


class State:
    """Small files below one folder (0700, files 0600). Writers swallow `OSError`: an emergency goes on without them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def problem(self) -> str | None:
        """Why the folder cannot be written, or None."""
        try:
            self._make()
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch(0o600)
            probe.unlink()
        except OSError as error:
            return f"{self.folder}: {error.strerror}"
        return None

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add one JSON line to `<name>.jsonl`; a file that has grown large is started anew beside its predecessor."""
        with contextlib.suppress(OSError):
            self._make()
            path = self.folder / f"{name}.jsonl"
            if path.exists() and path.stat().st_size > HISTORY_LIMIT_BYTES:
                path.replace(self.folder / f"{name}.old.jsonl")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "r+b", buffering=0) as file:  # noqa: PTH123 - a descriptor has no Path
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a full disk, or a kill
                file.write(b"\n" * torn + orjson.dumps(entry, default=str) + b"\n")

    def require_readable(self, name: str) -> None:
        """Raises `Refused` where `<name>.jsonl` may not be read, or not even be looked for."""
        path = self.folder / f"{name}.jsonl"
        try:
            with path.open("rb"):
                pass
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise unreadable(path, error) from None

    def entries(self, name: str) -> Iterator[dict[str, Any]]:
        """The JSON lines of `<name>.jsonl`, oldest first; a torn line costs itself only."""
        for path in (self.folder / f"{name}.old.jsonl", self.folder / f"{name}.jsonl"):
            try:
                lines = path.read_bytes().splitlines()
            except OSError:
                continue
            for line in lines:
                with contextlib.suppress(orjson.JSONDecodeError):
                    entry = orjson.loads(line)
                    if isinstance(entry, dict):
                        yield entry

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Write `<name>.json` in one step; `name` may have folders before it."""
        path = self.folder / f"{name}.json"
        unseen = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            self._make()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(unseen, flags, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor has no Path
                file.write(orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2) + b"\n")
            unseen.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unseen.unlink(missing_ok=True)

    def kept(self, name: str) -> dict[str, Any]:
        """The object in `<name>.json`; empty where there is none that can be read."""
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            value = orjson.loads((self.folder / f"{name}.json").read_bytes())
            return value if isinstance(value, dict) else {}
        return {}

    def first_in(self, name: str, seconds: float) -> bool:
        """Whether `name` was not seen in the last `seconds`; remembers that it was seen now.

        Where nothing can be written the answer is yes: an alert too many beats one that is missing.
        """
        path = self.folder / "seen" / name
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if 0 <= age < seconds:
                return False
        with contextlib.suppress(OSError):
            self._make()
            path.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        return True
