"""What travels between stores: the records of a company, and the manifest that says where they came from.

The manifest lies inside the company's folder (Baileys ignores it), so that folder and manifest are exchanged as one. It
is one JSON object laid out in lines: a head line with everything but the files, then one line per file. A reader goes
through it line by line, so that a company of 100,000 keys never stands in memory as objects.
"""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
_NO_ROW = bytes(16)
_FIELDS = ("sha256", "type", "id", "form", "updated_at", "expires_at", "row")
_fields_of = itemgetter(*_FIELDS)
# Nearly every line holds no escapes, and is neither written nor read as JSON then: that takes three times as long.
_PLAIN = r'[^"\\\x00-\x1f]*'
_LINE = re.compile(
    rf'^"({_PLAIN})":{{"sha256":"([0-9a-f]{{64}})","type":"({_PLAIN})","id":"({_PLAIN})","form":"({_PLAIN})",'
    rf'"updated_at":(?:null|"({_PLAIN})"),"expires_at":(?:null|"({_PLAIN})"),"row":(?:null|"([0-9a-f]{{32}})")}},?$',
    re.MULTILINE,
)
_PLAIN_LINE = b'"%b":{"sha256":"%b","type":"%b","id":"%b","form":"%b","updated_at":%b,"expires_at":%b,"row":%b}'
_DIGEST = re.compile(rf'^"({_PLAIN})":{{"sha256":"([0-9a-f]{{64}})",.+}},?$', re.MULTILINE)
_needs_escapes = re.compile(rb'["\\\x01-\x1f]').search


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
    return packed_entry(bytes.fromhex(entry.sha256), bytes.fromhex(entry.row or ""), *entry[1:6])


def packed_entry(
    digest: bytes, row: bytes, key_type: str, key_id: str, form: str, updated_at: str | None, expires_at: str | None
) -> bytes:
    """`packed`, from the digests themselves; `row` is empty where no row is known."""
    words = "\0".join((key_type, key_id, form, updated_at or "", expires_at or ""))
    return digest + (row or _NO_ROW) + words.encode()


def unpacked(data: bytes) -> FileEntry:
    """The entry that `packed` made."""
    key_type, key_id, form, updated_at, expires_at = data[48:].decode().split("\0")
    row = data[32:48]
    return FileEntry(
        data[:32].hex(),
        key_type,
        key_id,
        form,
        updated_at or None,
        expires_at or None,
        None if row == _NO_ROW else row.hex(),
    )


def packed_digest(data: bytes) -> str:
    """Only the SHA-256 of what `packed` made."""
    return data[:32].hex()


def manifest_lines(origin: Origin, files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The manifest's bytes in pieces, from file names and their packed entries."""
    head = orjson.dumps({"schema": MANIFEST_SCHEMA, **asdict(origin)})
    yield head[:-1] + b',"files":{\n'
    separator = b""
    for name, entry in files:
        yield separator + _line(name, entry)
        separator = b",\n"
    yield b"\n" + _END


def _line(name: str, entry: bytes) -> bytes:
    """One file's line, to the byte as orjson would write it."""
    raw = name.encode()
    if _needs_escapes(entry, 48) or _needs_escapes(raw):
        fields = dict(zip(_FIELDS, unpacked(entry), strict=True))
        return b"%b:%b" % (orjson.dumps(name), orjson.dumps(fields))
    key_type, key_id, form, updated_at, expires_at = entry[48:].split(b"\0")
    row = entry[32:48]
    return _PLAIN_LINE % (
        raw,
        entry[:32].hex().encode(),
        key_type,
        key_id,
        form,
        b'"%b"' % updated_at if updated_at else b"null",
        b'"%b"' % expires_at if expires_at else b"null",
        b"null" if row == _NO_ROW else b'"%b"' % row.hex().encode(),
    )


def read_manifest(data: Iterable[bytes]) -> tuple[Origin, Iterator[tuple[str, FileEntry]]]:
    """The origin and, lazily, the files of a manifest given in pieces of whole lines. Raises `ManifestDamaged`.

    The lines are those of `manifest_lines`; a manifest that somebody laid out anew counts as damaged, because nobody
    but us writes one.
    """
    origin, pieces = _headed(data)
    return origin, _files(pieces)


def read_digests(data: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Only the file names and digests of a manifest given in pieces of whole lines. Raises `ManifestDamaged`."""
    _, pieces = _headed(data)
    for lines in _until_end(pieces):
        found = _DIGEST.findall(lines)
        if len(found) == lines.count("\n"):
            yield from found
        else:
            yield from ((name, entry.sha256) for name, entry in _parsed(lines))


def _headed(data: Iterable[bytes]) -> tuple[Origin, Iterable[bytes]]:
    """The origin that the head line states, and the pieces of what follows it."""
    pieces = iter(data)
    head, _, rest = next(pieces, b"").partition(b"\n")
    try:
        fields = orjson.loads(head + b"}}")
        if fields.pop("schema") != MANIFEST_SCHEMA or fields.pop("files") != {}:
            raise ManifestDamaged("not a manifest of this version")
        returned = fields.pop("returned", None)
        origin = Origin(**fields, returned=Returned(**returned) if returned else None)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ManifestDamaged("its head cannot be read") from None
    return origin, chain([rest], pieces)


def _until_end(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines of files, many at a time."""
    for piece in pieces:
        ended = piece == _END or piece.endswith(b"\n" + _END)
        try:
            lines = (piece[: -len(_END)] if ended else piece).decode()
        except UnicodeDecodeError:
            raise ManifestDamaged("a name in it is not UTF-8") from None
        if lines:
            yield lines
        if ended:
            return
    raise ManifestDamaged("its end is missing")


def _files(pieces: Iterable[bytes]) -> Iterator[tuple[str, FileEntry]]:
    for lines in _until_end(pieces):
        found = _LINE.findall(lines)
        if len(found) == lines.count("\n"):
            for name, digest, key_type, key_id, form, updated_at, expires_at, row in found:
                yield (
                    name,
                    _entry((digest, key_type, key_id, form, updated_at or None, expires_at or None, row or None)),
                )
        else:
            yield from _parsed(lines)


_entry = functools.partial(tuple.__new__, FileEntry)  # what FileEntry() does, without Python code in between


def _parsed(lines: str) -> Iterator[tuple[str, FileEntry]]:
    """The files of some lines, as JSON."""
    try:
        for name, fields in orjson.loads("{" + lines.rstrip(",\n") + "}").items():
            entry = FileEntry._make(_fields_of(fields))
            digest, row = entry.sha256, entry.row
            if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                raise ManifestDamaged("a digest in it is none")
            if row is not None and not (isinstance(row, str) and _ROW.fullmatch(row)):
                raise ManifestDamaged("a row's digest in it is none")
            yield name, entry
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ManifestDamaged("a line of it cannot be read") from None
