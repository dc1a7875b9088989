"""What travels between stores: the records of a company, and the manifest that says where they came from.

The manifest lies inside the company's folder (Baileys ignores it), so that folder and manifest are exchanged as one. It
is one JSON object laid out in lines: a head line with everything but the files, then one line per file. A reader goes
through it line by line, so that a company of 100,000 keys never stands in memory as objects.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from opsctl.baileys.filenames import CREDS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANIFEST_SCHEMA = "opsctl-manifest/1"
CREDS_TYPE = "creds"
"""The `type` of credentials in a manifest; their id is empty."""


class Record(NamedTuple):
    """One key as a store holds it: times are PostgreSQL's text in UTC (`2026-01-31 03:04:05.678901+00`) or None.

    A tuple because a restore makes 230,000 of them: a frozen dataclass costs 0.6 us more each.
    """

    key_type: str
    key_id: str
    value: bytes
    updated_at: str | None
    expires_at: str | None


class FileEntry(NamedTuple):
    """One file of a company's folder and the row it was made from."""

    key_type: str
    key_id: str
    sha256: str
    form: str
    updated_at: str | None
    expires_at: str | None


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


class ManifestDamaged(ValueError):
    """The manifest is not one of ours, or torn."""


def manifest_lines(origin: Origin, entries: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The manifest's bytes in pieces. `entries` are (file name, `entry_json`) pairs."""
    head = orjson.dumps({"schema": MANIFEST_SCHEMA, **asdict(origin)})
    yield head[:-1] + b',"files":{\n'
    separator = b""
    for name, entry in entries:
        yield separator + orjson.dumps(name) + b":" + entry
        separator = b",\n"
    yield b"\n}}\n"


def entry_json(entry: FileEntry) -> bytes:
    """One file's line of the manifest, without its name."""
    return orjson.dumps(
        {
            "type": entry.key_type,
            "id": entry.key_id,
            "sha256": entry.sha256,
            "form": entry.form,
            "updated_at": entry.updated_at,
            "expires_at": entry.expires_at,
        }
    )


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
        origin = Origin(**head)
    except (StopIteration, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ManifestDamaged("its head cannot be read") from None
    return origin, _files(lines)


def _files(lines: Iterator[bytes]) -> Iterator[tuple[str, FileEntry]]:
    for line in lines:
        if line == b"}}\n":
            return
        try:
            ((name, fields),) = orjson.loads(b"{" + line.rstrip(b",\n") + b"}").items()
            yield name, _entry(fields)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            raise ManifestDamaged("a line of it cannot be read") from None
    raise ManifestDamaged("its end is missing")


def _entry(fields: dict[str, Any]) -> FileEntry:
    return FileEntry(
        fields["type"], fields["id"], fields["sha256"], fields["form"], fields["updated_at"], fields["expires_at"]
    )


def is_creds(name: str) -> bool:
    """Whether a file name is that of the credentials."""
    return name == CREDS_FILE
