"""One variable or more of an env file, changed in one step: comments, order, mode and owner stay as they are.

python-dotenv's own `set_key` follows symbolic links (CVE-2026-28684) and rewrites what it did not have to touch.
"""

from __future__ import annotations

import io
import os
import re
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dotenv.parser import parse_stream

from opsctl.errors import Refused
from opsctl.stores.folder import opened, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_NEW = ".opsctl-new"
_COMMENT = re.compile(r"\s+#.*$")


def values(path: Path) -> dict[str, str]:
    """What the file sets. Raises `Refused` for what is no regular file, or cannot be read."""
    with _translating(path), opened(path.parent) as folder:
        return {name: value for name, value, _ in _bindings(_text(folder, path.name)) if name and value is not None}


def require_writable(path: Path) -> None:
    """Raises `Refused` where the file is missing, a symbolic link, or cannot be replaced."""
    with _translating(path), opened(path.parent) as folder:
        read_file(folder, path.name)
        if os.fstatvfs(folder).f_flag & os.ST_RDONLY:
            raise Refused(f"{path} is on a read-only filesystem", hint=f"findmnt -T {path}")
        for where, right in ((path, os.W_OK), (path.parent, os.W_OK | os.X_OK)):
            if not os.access(where, right, effective_ids=True):
                raise Refused(f"{where} may not be written", hint=f"ls -ld {where}")


def lines_of(path: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The lines of each variable, in order, as they stand there: for `put_lines`. Raises `Refused`."""
    found: dict[str, list[str]] = {name: [] for name in names}
    with _translating(path), opened(path.parent) as folder:
        for name, _, original in _bindings(_text(folder, path.name)):
            if name in found:
                found[name].append(original)
    return found


def set_variables(path: Path, variables: Mapping[str, str]) -> None:
    """Set the variables; one that stands there more than once gets the value each time. Raises `Refused`."""
    with _translating(path), opened(path.parent) as folder:
        missing = dict(variables)
        out: list[str] = []
        for name, _, original in _bindings(_text(folder, path.name)):
            if name is None or name not in variables:
                out.append(original)
            else:
                missing.pop(name, None)
                out.append(_line(original, name, variables[name]))
        if missing and out and not out[-1].endswith("\n"):
            out[-1] += "\n"
        out += [f"{name}={value}\n" for name, value in missing.items()]
        _replace(folder, path.name, "".join(out))


def put_lines(path: Path, lines: Mapping[str, Sequence[str]]) -> None:
    """Put back what `lines_of` gave; a variable that was not there goes. Raises `Refused`."""
    with _translating(path), opened(path.parent) as folder:
        left = {name: list(of_name) for name, of_name in lines.items()}
        out = []
        for name, _, original in _bindings(_text(folder, path.name)):
            if name is None or name not in left:
                out.append(original)
            elif left[name]:
                out.append(left[name].pop(0))
        _replace(folder, path.name, "".join(out))


def write_copy(source: Path | None, target: Path, *, uid: int, gid: int) -> None:
    """Make `target`, which must not exist, from the bytes of `source`, or empty; 0600. Raises `Refused`."""
    data = b""
    if source is not None:
        with _translating(source), opened(source.parent) as folder:
            data = read_file(folder, source.name)
    with _translating(target), opened(target.parent) as folder:
        _create(folder, target.name, data, mode=0o600, uid=uid, gid=gid)
        os.fsync(folder)


def _line(original: str, name: str, value: str) -> str:
    """The line with another value: what is before the name stays, and so does a comment after a bare value."""
    ending = original[len(original.rstrip("\r\n")) :]
    body = original.rstrip("\r\n")
    start = body.index(name)
    rest = body[start + len(name) :].lstrip(" \t=")
    comment = "" if rest[:1] in {"'", '"'} else (found[0] if (found := _COMMENT.search(rest)) else "")
    return f"{body[:start]}{name}={value}{comment}{ending}"


def _bindings(text: str) -> Iterator[tuple[str | None, str | None, str]]:
    """Name, value and original text of everything in the file; comments and blanks have no name."""
    for binding in parse_stream(io.StringIO(text, newline="")):
        yield binding.key, binding.value, binding.original.string


def _text(folder: int, name: str) -> str:
    return read_file(folder, name).decode("utf-8", "surrogateescape")


def _replace(folder: int, name: str, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    if data == read_file(folder, name):
        return
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    with suppress(FileNotFoundError):
        os.unlink(name + _NEW, dir_fd=folder)
    _create(folder, name + _NEW, data, mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid)
    os.rename(name + _NEW, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _create(folder: int, name: str, data: bytes, *, mode: int, uid: int, gid: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if (os.fstat(descriptor).st_uid, os.fstat(descriptor).st_gid) != (uid, gid):
                os.fchown(descriptor, uid, gid)
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        os.unlink(name, dir_fd=folder)
        raise


@contextmanager
def _translating(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}", kind="env-file", hint=f"ls -l {path}") from None
