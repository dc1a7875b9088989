"""The service's credentials cache: one JSON file of creds by company, with the time at which each was put there.

    {"<companyId>": {"creds": {...}, "keys": {"_isCached": true, "_timestamp": ms}, "timestamp": ms}, ...}

The service's user can put anything in its place, so the file is cut into its members before anything of it is parsed:
a torn, null or bottomless entry costs itself only, and 32 MiB of brackets never become objects. It is written as the
service writes it, to the byte, in one step and under a name of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

import orjson

from opsctl.baileys.buffers import StoredForm, revive, to_form
from opsctl.baileys.filenames import is_company_id
from opsctl.errors import Locked, Refused, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

LARGEST_FILE = 32 * 1024 * 1024
"""A thousand companies take about 12 MiB."""
LARGEST_CREDS = 1024 * 1024
MOST_ENTRIES = 100_000
MOST_LEVELS = 64
"""Credentials of Baileys have about five; whoever walks thousands of them runs out of stack."""
MISSING, UNREADABLE = "cache-missing", "cache-unreadable"
"""Kinds of the `SourceUnavailable` that `read_cache` raises."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_LAST_MS = (datetime(9999, 12, 31, tzinfo=UTC) - _EPOCH) // _MILLISECOND
_LONGEST_ID = 51  # of a company, and one character that it cannot have
_LONGEST_NUMBER = 32
_MARKERS = frozenset({b'"_isCached"', b'"_timestamp"'})
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Validity(StrEnum):
    """Whether the service would use an entry."""

    VALID = "valid"
    EXPIRED = "expired"
    FUTURE = "future"
    """Put there later than now: no clock of ours vouches for it, and the service would use it for ever."""


@dataclass(frozen=True, slots=True)
class CachedCreds:
    """One company's entry. `creds` is the JSON text of an object, as the file has it: bytes in any stored form."""

    company_id: str
    creds: bytes = field(repr=False)
    keys: bytes = field(repr=False)
    """JSON text. What the service puts there are two markers and no keys."""
    cached_at: datetime

    def validity(self, now: datetime, ttl: timedelta) -> Validity:
        """Whether the entry counts at `now`, if it lives for `ttl`."""
        if self.cached_at > now:
            return Validity.FUTURE
        return Validity.VALID if now - self.cached_at <= ttl else Validity.EXPIRED

    @property
    def holds_keys(self) -> bool:
        """Whether there are keys beside the service's own markers."""
        try:
            return any(name not in _MARKERS for name, _ in _members(self.keys))
        except _Torn:
            return False


@dataclass(frozen=True, slots=True)
class DamagedEntry:
    """An entry that nobody can use; `company_id` is what the file calls it, and `problem` quotes nothing of it."""

    company_id: str
    problem: str


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A cache file as it was read, whole or not."""

    entries: dict[str, CachedCreds]
    damaged: tuple[DamagedEntry, ...]
    torn: str | None
    """Why the file as a whole is no cache (`empty`, `torn after 3 entries`); what is in `entries` is whole."""
    mode: int
    uid: int
    gid: int
    size_bytes: int

    @property
    def sound(self) -> bool:
        """Whether all of it could be read."""
        return self.torn is None and not self.damaged


def read_cache(path: Path) -> CacheFile:
    """Read the cache without following a link, without a lock and without changing anything.

    Raises `SourceUnavailable` of the kind `cache-missing`, or `cache-unreadable` for what cannot be a cache (a folder,
    a link, more than 32 MiB). Content never raises: see `CacheFile.torn` and `damaged`.
    """
    return _read(path, path, dir_fd=None)


def _read(path: Path, name: Path | str, *, dir_fd: int | None) -> CacheFile:
    try:
        descriptor = os.open(name, _READ, dir_fd=dir_fd)
    except FileNotFoundError:
        raise SourceUnavailable(f"there is no credentials cache at {path}", kind=MISSING, hint=_WHERE) from None
    except OSError as error:
        raise _unreadable(path, "is a symbolic link" if error.errno == errno.ELOOP else _because(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _unreadable(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
        if status.st_size > LARGEST_FILE:
            size_mib = status.st_size // 1024**2
            raise _unreadable(path, f"has {size_mib} MiB, and no cache has more than {LARGEST_FILE // 1024**2}")
        with open(descriptor, "rb", closefd=False) as file:
            text = file.read(LARGEST_FILE)
    except OSError as error:
        raise _unreadable(path, _because(error)) from None
    finally:
        os.close(descriptor)
    entries, damaged, torn = _parsed(text)
    mode = stat.S_IMODE(status.st_mode)
    return CacheFile(entries, damaged, torn, mode, status.st_uid, status.st_gid, len(text))


_WHERE = "set CREDENTIALS_CACHE_FILE, or APP_DIR to the service's folder"


def _unreadable(path: Path, why: str) -> SourceUnavailable:
    return SourceUnavailable(f"the credentials cache {path} {why}", kind=UNREADABLE, hint=f"ls -la {path}")


def _because(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"


def _parsed(text: bytes) -> tuple[dict[str, CachedCreds], tuple[DamagedEntry, ...], str | None]:
    entries: dict[str, CachedCreds] = {}
    damaged: dict[str, str] = {}
    torn = None
    try:
        for number, (name, value) in enumerate(_members(text)):
            if number == MOST_ENTRIES:
                torn = f"more than {MOST_ENTRIES:,} entries"
                break
            company_id = _company_id(name)
            entries.pop(company_id, None)  # of two of one name the last counts, as for JSON.parse
            damaged.pop(company_id, None)
            try:
                entries[company_id] = _entry(company_id, value)
            except _Damaged as error:
                damaged[company_id] = str(error)
    except _Torn as error:
        torn = _shape(text, whole=len(entries) + len(damaged))
        if error.name is not None:
            damaged[_company_id(error.name)] = "torn"
    return entries, tuple(DamagedEntry(*item) for item in damaged.items()), torn


def _shape(text: bytes, *, whole: int) -> str:
    """What is wrong with a text that is no JSON object to its end."""
    if not text.strip():
        return "empty"
    if not text.lstrip().startswith(b"{"):
        return "not a JSON object"
    return f"torn after {whole} {'entry' if whole == 1 else 'entries'}"


def _company_id(name: bytes) -> str:
    """The name of a member as text; of what cannot be a company's, no more than what shows that."""
    try:
        return str(orjson.loads(name))[:_LONGEST_ID]
    except orjson.JSONDecodeError:
        return name[1:_LONGEST_ID].decode(errors="replace")


def _entry(company_id: str, text: bytes) -> CachedCreds:
    """Raises `_Damaged`."""
    if not is_company_id(company_id):
        raise _Damaged("not a company id")
    if not text.startswith(b"{"):
        raise _Damaged("not an object")
    fields = {b'"creds"': b"null", b'"keys"': b"null", b'"timestamp"': b"null"}
    try:
        fields.update((name, value) for name, value in _members(text) if name in fields)
    except _Torn:
        raise _Damaged("not valid JSON") from None
    creds, keys, timestamp = fields.values()
    value = _loaded(creds, "creds", LARGEST_CREDS)
    if not isinstance(value, dict):
        raise _Damaged("its creds are no object")
    if nested_too_deeply(value):
        raise _Damaged("its creds are nested too deeply")
    _loaded(keys, "keys", LARGEST_CREDS)  # because they are written as they were read
    moment_ms = _loaded(timestamp, "timestamp", _LONGEST_NUMBER)
    if type(moment_ms) not in {int, float} or not 0 <= moment_ms <= _LAST_MS:
        raise _Damaged("its timestamp is no time")
    return CachedCreds(company_id, creds, keys, _EPOCH + int(moment_ms) * _MILLISECOND)


def _loaded(text: bytes, what: str, largest: int) -> Any:  # noqa: ANN401 - any JSON value
    if len(text) > largest:
        raise _Damaged(f"its {what} has {len(text):,} bytes")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _Damaged(f"its {what} is not valid JSON") from None


def nested_too_deeply(value: object) -> bool:
    """Whether a JSON value has more than `MOST_LEVELS` objects and lists in each other.

    >>> nested_too_deeply({"a": [[{}]]})
    False
    """
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        containers = [item for item in level if type(item) in {dict, list}]
        if not containers:
            return False
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]  # type: ignore[attr-defined] # a list
    return True


class _Torn(Exception):
    """A text that is not one JSON object to its end; `name` is the member in which it breaks off, if it is in one."""

    def __init__(self, name: bytes | None = None) -> None:
        self.name = name


class _Damaged(Exception):
    """An entry that is none."""


_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_OPENING = re.compile(rb"\s*+\{\s*+(\}?)")
_NAME = re.compile(rb"\s*+(%b)\s*+:\s*+" % _STRING, re.DOTALL)
_PLAIN = re.compile(rb"%b|[^\s,:{}\[\]\"]++" % _STRING, re.DOTALL)
# A lone quote last: one that nothing closes, which is told at once instead of being looked for again and again.
_BRACKETS = re.compile(rb'%b|[\[{]++|[\]}]++|"' % _STRING, re.DOTALL)
_FOLLOWING = re.compile(rb"\s*+([,}])")


def _members(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The names (in quotes) and values of a JSON object, as they are spelled; nothing inside of a value is looked at.

    Raises `_Torn` where the text goes on otherwise, after what came before it.

    >>> list(_members(b'{"a": {"b": [1, "}"]}, "c": null}'))
    [(b'"a"', b'{"b": [1, "}"]}'), (b'"c"', b'null')]
    """
    opening = _OPENING.match(text)
    if opening is None:
        raise _Torn
    position, following = opening.end(), opening[1]
    while following != b"}":
        name = _NAME.match(text, position)
        if name is None:
            raise _Torn
        end = _end_of_value(text, name.end())
        match = None if end is None else _FOLLOWING.match(text, end)
        if match is None:
            raise _Torn(name[1])
        yield name[1], text[name.end() : end]
        position, following = match.end(), match[1]
    if text[position:].strip():
        raise _Torn


def _end_of_value(text: bytes, start: int) -> int | None:
    """Where the value that begins at `start` ends; None where it does not."""
    if text[start : start + 1] not in {b"{", b"["}:
        plain = _PLAIN.match(text, start)
        return plain.end() if plain else None
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        kind, length = match[0][:1], match.end() - match.start()
        if kind in {b"{", b"["}:
            depth += length
        elif kind != b'"':
            if depth <= length:  # of these the last may close what is around the value
                return match.start() + depth
            depth -= length
        elif length == 1:
            return None
    return None


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How many entries there are; `damaged` ones are in the file only."""

    total: int
    valid: int
    expired: int
    future: int
    damaged: int
    oldest_age: timedelta | None


class CredentialsCache:
    """The cache as the service uses it, on the same file: loaded on entering, saved on leaving if anything changed.

    Runs of opsctl exclude each other; the service takes no lock, and its next save overwrites ours. What could not be
    read is set aside before it is written over. Entering raises `Refused` (nothing of ours, or not ours to write) or
    `Locked`; leaving raises `Refused` where the file cannot be written.
    """

    def __init__(
        self, path: Path, *, ttl: timedelta, max_entries: int = 1000, clock: Callable[[], datetime] = _now
    ) -> None:
        self.path = path
        self.ttl = ttl
        self.max_entries = max_entries
        self.set_aside: Path | None = None
        """Where the file as it was lies now, if not all of it could be read."""
        self._clock = clock
        self._entries: dict[str, CachedCreds] = {}
        self._found: CacheFile | None = None
        self._changed = False
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._fd = opening.enter_context(_locked_folder(self.path))
            self._found = self._load()
            self._owner = self._wanted_owner()
            self._entries = dict(self._found.entries) if self._found else {}
            self._bound()
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None and self._changed:
                self._save()

    @property
    def damaged(self) -> tuple[DamagedEntry, ...]:
        """The entries of the file that could not be read."""
        return self._found.damaged if self._found else ()

    @property
    def torn(self) -> str | None:
        """Why the file as a whole was no cache."""
        return self._found.torn if self._found else None

    def known(self) -> list[str]:
        """Every company of which the file or this cache holds anything, usable or not."""
        return [*self._entries, *(entry.company_id for entry in self.damaged if entry.company_id not in self._entries)]

    def get(self, company_id: str) -> dict[str, Any] | None:
        """A copy of the company's creds with byte objects as `bytes`; None where there are none that count."""
        entry = self._entries.get(company_id)
        if entry is None or entry.validity(self._clock(), self.ttl) is not Validity.VALID:
            return None
        creds: dict[str, Any] = revive(orjson.loads(entry.creds))  # type: ignore[assignment] # an object, as it was read
        return creds

    def set(self, company_id: str, creds: dict[str, Any]) -> None:
        """Put the creds of a company there, as of now; `bytes` and byte objects in whatever form."""
        now_ms = (self._clock() - _EPOCH) // _MILLISECOND
        text = _indented(to_form(revive(creds), StoredForm.JSON_STRINGIFY), 4)
        keys = _indented({"_isCached": True, "_timestamp": now_ms}, 4)
        self._entries.pop(company_id, None)
        self._entries[company_id] = CachedCreds(company_id, text, keys, _EPOCH + now_ms * _MILLISECOND)
        self._changed = True
        self._bound()

    def clear(self, company_id: str) -> bool:
        """Forget one company; whether there was anything to forget."""
        here = company_id in self._entries or any(entry.company_id == company_id for entry in self.damaged)
        self._entries.pop(company_id, None)
        self._changed |= here
        return here

    def clear_all(self) -> int:
        """Forget every company, and say how many there were."""
        count = len(self._entries) + len(self.damaged)
        self._entries.clear()
        self._changed |= bool(count) or self.torn is not None
        return count

    def sweep(self) -> int:
        """Forget what does not count any more, and say how many that were."""
        now = self._clock()
        gone = [name for name, entry in self._entries.items() if entry.validity(now, self.ttl) is not Validity.VALID]
        for name in gone:
            del self._entries[name]
        self._changed |= bool(gone)
        return len(gone)

    def stats(self) -> CacheStats:
        """Counts by validity."""
        now = self._clock()
        found = [entry.validity(now, self.ttl) for entry in self._entries.values()]
        past = [now - entry.cached_at for entry in self._entries.values() if entry.cached_at <= now]
        return CacheStats(
            total=len(found),
            valid=found.count(Validity.VALID),
            expired=found.count(Validity.EXPIRED),
            future=found.count(Validity.FUTURE),
            damaged=len(self.damaged),
            oldest_age=max(past, default=None),
        )

    def _bound(self) -> None:
        """The oldest go; before them those of the future, which do not count at all."""
        excess = len(self._entries) - self.max_entries
        if excess <= 0:
            return
        now = self._clock()
        by_age = sorted(self._entries.values(), key=lambda e: e.cached_at if e.cached_at <= now else _EPOCH)
        for entry in by_age[:excess]:
            del self._entries[entry.company_id]

    def _load(self) -> CacheFile | None:
        try:
            return _read(self.path, self.path.name, dir_fd=self._fd)
        except SourceUnavailable as error:
            if error.kind == MISSING:
                return None
            raise Refused(f"{error.message}, so nothing was changed", kind=error.kind, hint=error.hint) from None

    def _wanted_owner(self) -> tuple[int, int]:
        """The file's owner, else the folder's: the service has to read it."""
        folder = os.fstat(self._fd)
        uid, gid = (self._found.uid, self._found.gid) if self._found else (folder.st_uid, folder.st_gid)
        if os.geteuid() not in {0, uid}:
            raise Refused(
                f"the credentials cache {self.path} belongs to uid {uid}, who could not read what uid "
                f"{os.geteuid()} writes",
                hint=f"sudo -u '#{uid}' opsctl ...",
            )
        return uid, gid

    def _save(self) -> None:
        temporary = f"{self.path.name}.{secrets.token_hex(6)}.tmp"
        try:
            descriptor = os.open(temporary, _CREATE, 0o600, dir_fd=self._fd)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_document(self._entries))
                    file.flush()
                    os.fchmod(descriptor, 0o600)
                    if os.geteuid() != self._owner[0]:
                        os.fchown(descriptor, *self._owner)
                    os.fsync(descriptor)
                if self._found is not None and not self._found.sound:
                    self._keep_aside()
                os.rename(temporary, self.path.name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self._fd)
                raise
        except OSError as error:
            raise Refused(
                f"the credentials cache {self.path} cannot be written: {error.strerror}", kind=UNREADABLE
            ) from None

    def _keep_aside(self) -> None:
        name = f"{self.path.name}.damaged-{self._clock():%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        os.link(self.path.name, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        os.chmod(name, 0o600, dir_fd=self._fd)
        self.set_aside = self.path.with_name(name)


def leftovers(path: Path) -> list[Path]:
    """What saves that were killed left beside the cache, and what was set aside; empty where nobody may look."""
    try:
        return sorted(found for found in path.parent.iterdir() if found.name.startswith(f"{path.name}."))
    except OSError:
        return []


def _document(entries: dict[str, CachedCreds]) -> bytes:
    """The file as `JSON.stringify(entries, null, 2)` of the service spells it."""
    parts = [
        b'  %b: {\n    "creds": %b,\n    "keys": %b,\n    "timestamp": %d\n  }'
        % (orjson.dumps(name), entry.creds, entry.keys, (entry.cached_at - _EPOCH) // _MILLISECOND)
        for name, entry in entries.items()
    ]
    return b"{\n%b\n}" % b",\n".join(parts) if parts else b"{}"


def _indented(value: object, columns: int) -> bytes:
    """JSON in lines, those after the first moved to the right. No string of JSON holds a line break."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).replace(b"\n", b"\n" + b" " * columns)


@contextmanager
def _locked_folder(path: Path) -> Iterator[int]:
    """A descriptor of the cache's folder, locked against other runs of opsctl: the lock leaves nothing behind."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(
            f"the folder {path.parent} of the credentials cache: {error.strerror}", kind=UNREADABLE, hint=_WHERE
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise Locked(f"another run works in {path.parent}", hint="wait for it, then type it again") from None
    finally:
        os.close(descriptor)
