"""What travels between stores: the records of a company, and the manifest that says where they came from.

The manifest lies inside the company's folder (Baileys ignores it), so that folder and manifest are exchanged as one. It
is one JSON object laid out in lines: a head line with everything but the files, then one line per file. A reader goes
through it line by line, so that a company of 100,000 keys never stands in memory as objects.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from hashlib import blake2b
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MANIFEST_SCHEMA = "opsctl-manifest/1"
_END = b"}}\n"
CREDS_TYPE = "creds"
"""The `type` of credentials in a manifest; their id is empty."""


class Record(NamedTuple):
    """One key as a store holds it: times are PostgreSQL's text in UTC (`2026-01-31 03:04:05.678901+00`) or None.

    `row` is the digest of the database's row (`row_digest`), empty where it comes from elsewhere. A tuple because a
    restore makes 230,000 of them: a frozen dataclass costs 0.6 us more each.
    """

    key_type: str
    key_id: str
    value: bytes
    updated_at: str | None
    expires_at: str | None
    row: bytes = b""


class FileEntry(NamedTuple):
    """One file of a company's folder and the row it was made from.

    `row` is that row's digest in hexadecimal digits: a row that still has it needs no second look.
    """

    sha256: str
    key_type: str
    key_id: str
    form: str
    updated_at: str | None
    expires_at: str | None
    row: str | None = None


@dataclass(frozen=True, slots=True)
class Returned:
    """When a folder was brought back into the database. `at` is PostgreSQL's text in UTC."""

    run_id: str
    at: str
    digest: str
    """Of what it held then: with the same contents it is not live, though it is not as it was published either."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when a company's records were read. All that failback has to know besides the files."""

    company_id: str
    run_id: str
    environment: str
    source: str
    snapshot_at: str
    system_identifier: str | None
    timeline: int | None
    me_sha256: str | None
    service_stopped: str
    """`operator` (their word), `proven`, or `unknown`: only the first two make a copy fresh."""
    stale_keys_dropped: bool
    opsctl: str
    returned: Returned | None = None


_SHA256, _ROW = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
_NO_ROW = "0" * 32
_FIELDS = ("sha256", "type", "id", "form", "updated_at", "expires_at", "row")
_fields_of = itemgetter(*_FIELDS)
_AT_ONCE = 100
"""Lines of a manifest that are parsed together."""


def row_digest(line: bytes) -> bytes:
    """The digest of a key's row, times and all: of its line in COPY's text format, without the line break."""
    return blake2b(line, digest_size=16).digest()


class ManifestDamaged(ValueError):
    """The manifest is not one of ours, or torn."""


def packed(entry: FileEntry) -> bytes:
    """One file's entry in a third of the memory that the tuple takes, for as long as its company is written.

    >>> entry = FileEntry("ab" * 32, "pre-key", "5", "json", "2026-01-31 03:04:05+00", None, "cd" * 16)
    >>> unpacked(packed(entry)) == entry, len(packed(entry))
    (True, 86)
    """
    digest, key_type, key_id, form, updated_at, expires_at, row = entry
    words = "\0".join((key_type, key_id, form, updated_at or "", expires_at or ""))
    return bytes.fromhex(digest + row if row else digest + _NO_ROW) + words.encode()


def unpacked(data: bytes) -> FileEntry:
    """The entry that `packed` made."""
    key_type, key_id, form, updated_at, expires_at = data[48:].decode().split("\0")
    row = data[32:48].hex()
    return FileEntry(
        data[:32].hex(), key_type, key_id, form, updated_at or None, expires_at or None, None if row == _NO_ROW else row
    )


def manifest_lines(origin: Origin, files: Iterable[tuple[str, FileEntry]]) -> Iterator[bytes]:
    """The manifest's bytes in pieces, from file names and their entries."""
    head = orjson.dumps({"schema": MANIFEST_SCHEMA, **asdict(origin)})
    yield head[:-1] + b',"files":{\n'
    separator = b""
    for name, entry in files:
        yield b"%b%b:%b" % (separator, orjson.dumps(name), orjson.dumps(dict(zip(_FIELDS, entry, strict=True))))
        separator = b",\n"
    yield b"\n" + _END


def read_manifest(data: Iterable[bytes]) -> tuple[Origin, Iterator[tuple[str, FileEntry]]]:
    """The origin and, lazily, the files of a manifest given as its lines. Raises `ManifestDamaged`.

    The lines are those of `manifest_lines`; a manifest that somebody laid out anew counts as damaged, because nobody
    but us writes one.
    """
    lines = iter(data)
    try:
        head = orjson.loads(next(lines) + b"}}")
        if head.pop("schema") != MANIFEST_SCHEMA or head.pop("files") != {}:
            raise ManifestDamaged("not a manifest of this version")
        returned = head.pop("returned", None)
        origin = Origin(**head, returned=Returned(**returned) if returned else None)
    except (StopIteration, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ManifestDamaged("its head cannot be read") from None
    return origin, _files(lines)


def _files(lines: Iterator[bytes]) -> Iterator[tuple[str, FileEntry]]:
    some: list[bytes] = []
    for line in lines:
        if line == _END:
            yield from _parsed(some)
            return
        some.append(line)
        if len(some) == _AT_ONCE:
            yield from _parsed(some)
            some.clear()
    raise ManifestDamaged("its end is missing")


def _parsed(lines: Sequence[bytes]) -> Iterator[tuple[str, FileEntry]]:
    """The files of some lines: parsed one by one they take half as long again."""
    try:
        for name, fields in orjson.loads(b"{%b}" % b"".join(lines).rstrip(b",\n")).items():
            entry = FileEntry._make(_fields_of(fields))
            digest, row = entry.sha256, entry.row
            if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                raise ManifestDamaged("a digest in it is none")
            if row is not None and not (isinstance(row, str) and _ROW.fullmatch(row)):
                raise ManifestDamaged("a row's digest in it is none")
            yield name, entry
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ManifestDamaged("a line of it cannot be read") from None


_DIGEST = re.compile(rb'"([^"\\]+)":\{"sha256":"([0-9a-f]{64})",')


def read_digests(data: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Only the file names and digests of a manifest given as its lines. Raises `ManifestDamaged`.

    A restore reads each of its manifests back, so a line in its usual spelling is not parsed whole.
    """
    lines = iter(data)
    read_manifest([next(lines, b"")])
    for line in lines:
        if match := _DIGEST.match(line):
            try:
                yield match[1].decode(), match[2].decode()
            except UnicodeDecodeError:
                raise ManifestDamaged("a name in it is not UTF-8") from None
        elif line == _END:
            return
        else:
            for name, entry in _files(iter([line, _END])):
                yield name, entry.sha256
    raise ManifestDamaged("its end is missing")
