"""Writing one company's folder: every value normalised, owner-only, creds.json last, a manifest of all of it.

Nothing here is visible to the service: `opsctl.stores.publishing` exchanges the finished folder with the one in place.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING

from opsctl.baileys import buffers, credentials, key_types
from opsctl.baileys.filenames import CREDS_FILE, MANIFEST_FILE, UnwritableName, is_ignored, key_file_name
from opsctl.stores.folder import digests_of, entries_of, read_file
from opsctl.stores.records import (
    CREDS_TYPE,
    FileEntry,
    ManifestDamaged,
    Origin,
    Record,
    manifest_lines,
    packed,
    packed_digest,
    packed_entry,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_EXAMPLES = 3
_TOLD_EVERY = 1_000
_LISTED = 1_000
_BLOCK = 4096
# Files are written some dozens at a time: interpreter and kernel each find their own caches and branch predictions
# warm, which takes a quarter off a restore (`python -m benchmarks.restore`).
_PENDING_FILES = 64
_PENDING_BYTES = 1024 * 1024


@dataclass(slots=True)
class Warnings:
    """Warnings by what is wrong, with a few examples each: hostile data must not fill memory or the screen."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, example: str | None = None) -> None:
        self.counts[what] += 1
        if example is not None:
            shown = self.examples.setdefault(what, [])
            if len(shown) < _EXAMPLES:
                shown.append(example[:80])

    def sentences(self) -> tuple[str, ...]:
        """One sentence per kind: `3 x pre-key: no private key (pre-key-5, pre-key-6, pre-key-7)`."""
        return tuple(
            (f"{count} x {what}" if count > 1 else what) + (f" ({', '.join(shown)})" if shown else "")
            for what, count in self.counts.items()
            for shown in [self.examples.get(what, [])]
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What a writer needs to know of a company before its first key."""

    folder: str
    creds: bytes
    creds_updated_at: str | None
    origin: Origin
    busy_since: str
    """Sessions written after this moment count as busy chats: those a stale copy may hurt."""
    fresh: bool
    drop_stale: bool
    creds_form: str | None = None
    """How the row had its bytes, where the credentials come from another copy of it."""
    as_stored: bool = False
    """Leave the credentials as they are, and the keys' consistency unchecked: for a copy that is not published."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that cannot be a file of its own."""

    key_type: str
    key_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Staged:
    """One company's folder, written or only computed."""

    company_id: str
    folder: str
    keys_by_type: dict[str, int]
    allocated_bytes: int
    """On disk, by whole blocks; counted only where nothing is written."""
    busy_chats: int
    dropped_keys: int
    left_out: tuple[LeftOut, ...]
    """The first thousand; the warnings have the number of all."""
    warnings: tuple[str, ...]
    unusable: tuple[str, ...]
    """Why the credentials cannot log in; not empty means: not published without `--accept-damaged`."""
    registered: bool
    damage: str | None
    """What did not read back as it was written."""
    me_sha256: str | None

    @property
    def key_count(self) -> int:
        return sum(self.keys_by_type.values())


class CompanyWriter:
    """Writes the files of one company into an empty folder; with `folder_fd=None` it only computes them.

    `add` each record, then `finish`. Memory grows by about 250 bytes per key: the manifest, kept until the end because
    of two rows that want one file the newer wins.
    """

    def __init__(self, order: Order, folder_fd: int | None) -> None:
        self._order = order
        self._fd = folder_fd
        self._entries: dict[str, bytes] = {}
        self._counts: Counter[str] = Counter()
        self._warnings = Warnings()
        self._left_out: list[LeftOut] = []
        self._allocated = self._busy = self._dropped = 0
        self._damage: str | None = None
        self._pending: list[tuple[str, bytes]] = []
        self._pending_bytes = 0
        normalised = buffers.normalise(order.creds)
        self._creds_form = order.creds_form or normalised.form
        self._examined = credentials.examine(normalised.data)
        if normalised.problem and not self._examined.unusable:
            self._warnings.add(f"{CREDS_TYPE}: {normalised.problem}")
        me_id = self._examined.me_id
        self._me_sha256 = credentials.me_fingerprint(me_id) if me_id else None
        self._creds = normalised.data
        self._summary = credentials.KeySummary()

    def add(self, record: Record) -> None:
        """Write one key. A bad value is written as it is and warned of; what cannot be a file is left out, listed."""
        key_type, key_id, value, updated_at, expires_at, row = record
        if self._is_not_wanted(key_type, key_id, updated_at):
            return
        try:
            name = key_file_name(key_type, key_id)
        except UnwritableName as error:
            self._leave_out(key_type, key_id, str(error))
            return
        data, form, problem = buffers.normalise(value)
        problem = problem or key_types.shape_problem(key_type, data)
        if problem is not None:
            self._warn(key_type, problem, name)
        if name in self._entries and not self._is_newer(name, record):
            return
        digest = sha256(data).digest()
        self._write(name, data, packed_entry(digest, row, key_type, key_id, form, updated_at, expires_at))
        self._count(key_type, key_id, data)

    def adopt(self, name: str, entry: FileEntry, data: bytes, *, in_place: bool) -> None:
        """Take over one file of another copy as it is; `in_place` where it stands in the folder already."""
        if self._is_not_wanted(entry.key_type, entry.key_id, entry.updated_at):
            if in_place:
                os.unlink(name, dir_fd=self._fd)
            return
        problem = key_types.shape_problem(entry.key_type, data)
        if problem is not None:
            self._warn(entry.key_type, problem, name)
        if in_place:
            self._entries[name] = packed(entry)
        else:
            self._write(name, data, packed(entry))
        self._count(entry.key_type, entry.key_id, data)

    def _is_not_wanted(self, key_type: str, key_id: str, updated_at: str | None) -> bool:
        if key_type == "session" and updated_at is not None and updated_at > self._order.busy_since:
            self._busy += 1
        if self._order.drop_stale and self._is_dropped(key_type, key_id):
            self._dropped += 1
            return True
        return False

    def _warn(self, key_type: str, problem: str, name: str) -> None:
        kind = key_type if key_type in key_types.KNOWN else "unknown type"  # so that the kinds are few
        self._warnings.add(f"{kind}: {problem}", name.removesuffix(".json"))

    def _count(self, key_type: str, key_id: str, data: bytes) -> None:
        self._counts[key_type] += 1
        if key_type in credentials.SUMMARISED:
            self._summary.add(key_type, key_id, data)

    def keep(self, name: str, entry: FileEntry) -> None:
        """Take over a file that has not changed since another generation; the caller has put it in place."""
        self._entries[name] = packed(entry)
        self._counts[entry.key_type] += 1

    def finish(self) -> Staged:
        """Write the manifest, then creds.json."""
        order = self._order
        findings = self._examined.findings
        unusable = tuple(f.message for f in findings if f.severity is credentials.Severity.UNUSABLE)
        creds = self._creds
        if not (unusable or order.as_stored):
            creds = credentials.with_pre_key_ids_raised(
                creds, highest_pre_key_id=self._summary.highest_pre_key_id, fresh=order.fresh
            )
            # What the raised ids mend is not worth a warning.
            findings += credentials.consistency(credentials.examine(creds), self._summary)
        for finding in findings:
            if finding.severity is not credentials.Severity.UNUSABLE:
                self._warnings.add(f"{CREDS_TYPE}: {finding.message}")
        digest = sha256(creds).digest()
        entry = packed_entry(digest, b"", CREDS_TYPE, "", self._creds_form, order.creds_updated_at, None)
        if self._fd is not None:
            self._write_manifest([(CREDS_FILE, entry)])
        self._write(CREDS_FILE, creds, entry)
        self._write_pending()
        return Staged(
            company_id=order.origin.company_id,
            folder=order.folder,
            keys_by_type=dict(sorted(self._counts.items())),
            allocated_bytes=self._allocated,
            busy_chats=self._busy,
            dropped_keys=self._dropped,
            left_out=tuple(self._left_out),
            warnings=self._warnings.sentences(),
            unusable=unusable,
            registered=self._examined.registered,
            damage=self._damage,
            me_sha256=self._me_sha256,
        )

    def digests(self) -> Iterator[tuple[str, str]]:
        """File names and SHA-256, also where nothing was written."""
        return ((name, packed_digest(entry)) for name, entry in self._entries.items())

    def _write(self, name: str, data: bytes, entry: bytes) -> None:
        self._entries[name] = entry
        size = len(data)
        if self._fd is None:
            self._allocated += -(-size // _BLOCK) * _BLOCK
            return
        self._pending.append((name, data))
        self._pending_bytes += size
        if len(self._pending) >= _PENDING_FILES or self._pending_bytes >= _PENDING_BYTES:
            self._write_pending()

    def _write_pending(self) -> None:
        for name, data in self._pending:
            size = len(data)
            descriptor = os.open(name, _CREATE, 0o600, dir_fd=self._fd)
            try:
                written = os.write(descriptor, data)
                while written < size:
                    written += os.write(descriptor, data[written:])
                # Read back at once: opening each file a second time would cost as much as writing it. That every file
                # can be found under its name, by the user who will look for it, is for `check_written`.
                if os.pread(descriptor, size + 1, 0) != data:
                    self._damage = f"{name!a} reads back differently from what was written"
            finally:
                os.close(descriptor)
        self._pending.clear()
        self._pending_bytes = 0

    def _is_dropped(self, key_type: str, key_id: str) -> bool:
        if key_type == "sender-key":
            return key_types.is_own_sender_key(key_id, self._examined.me_id, self._examined.me_lid)
        return key_type in key_types.DROPPED_WHEN_STALE

    def _is_newer(self, name: str, record: Record) -> bool:
        """Two rows want one file. Says whether the second one is newer, and has removed the first if so."""
        older = unpacked(self._entries[name])
        # Of the same moment the type and id decide, so that the order of the rows never does.
        newer = (record.updated_at or "", record.key_type, record.key_id) > (
            older.updated_at or "",
            older.key_type,
            older.key_id,
        )
        key_type, key_id = (older.key_type, older.key_id) if newer else (record.key_type, record.key_id)
        self._leave_out(key_type, key_id, f"{key_type} {key_id[:60]!a} is older and would share a file with another")
        if newer:
            self._counts[older.key_type] -= 1
            if self._fd is not None:
                self._write_pending()
                os.unlink(name, dir_fd=self._fd)
        return newer

    def _leave_out(self, key_type: str, key_id: str, why: str) -> None:
        if len(self._left_out) < _LISTED:
            self._left_out.append(LeftOut(key_type, key_id, why))
        self._warnings.add("left out, because it cannot be a file of its own", why)

    def _write_manifest(self, more: list[tuple[str, bytes]]) -> None:
        origin = replace(self._order.origin, me_sha256=self._me_sha256)
        descriptor = os.open(MANIFEST_FILE, _CREATE, 0o600, dir_fd=self._fd)
        with open(descriptor, "wb", buffering=256 * 1024) as file:  # noqa: PTH123 - a descriptor has no Path
            file.writelines(manifest_lines(origin, chain(self._entries.items(), more)))


class CopyDamaged(Exception):
    """Another copy is not what its manifest says; the text says in what way."""


def take_over(
    writer: CompanyWriter, source_fd: int, *, in_place: bool, own_creds: bool, advance: Callable[[int], None]
) -> None:
    """Give every key of a copy to `writer`, each held against the copy's manifest. Raises `CopyDamaged`.

    `own_creds`: whether the writer's credentials are the copy's, and have to be those of its manifest. `advance` hears
    of every thousand keys.
    """
    with _reading_a_copy():
        listed = {name for name in os.listdir(source_fd) if not is_ignored(name)}
        entries = entries_of(source_fd)
    count = 0
    while True:
        with _reading_a_copy():
            name, entry = next(entries, ("", None))
            if entry is None:
                break
            is_creds = entry.key_type == CREDS_TYPE
            data = b"" if is_creds and not own_creds else read_file(source_fd, name)
        if sha256(data).hexdigest() != entry.sha256 and (own_creds or not is_creds):
            raise CopyDamaged(f"{name!a} is not what its manifest says")
        listed.discard(name)
        if not is_creds:
            writer.adopt(name, entry, data, in_place=in_place)
            count += 1
            if count % _TOLD_EVERY == 0:
                advance(_TOLD_EVERY)
    advance(count % _TOLD_EVERY)
    if listed and (own_creds or listed != {CREDS_FILE}):
        raise CopyDamaged(f"{min(listed)!a} is not in its manifest")
    if in_place:
        for name in (CREDS_FILE, MANIFEST_FILE):
            os.unlink(name, dir_fd=source_fd)


@contextmanager
def _reading_a_copy() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CopyDamaged("a file that its manifest lists is missing") from None
    except ManifestDamaged as error:
        raise CopyDamaged(f"its manifest is damaged: {error}") from None
    except OSError as error:
        raise CopyDamaged(f"it cannot be read: {error.strerror}") from None


def check_written(folder_fd: int, visit: Callable[[str, str], None]) -> str | None:
    """Hold a staged folder against its manifest, visiting each name and digest: what is wrong with it, or None.

    Every file's bytes were read back when they were written; here every name is looked for, and creds.json read again.
    """
    # Two lists of the same names have the same number of them and the same sum of hashes; sets would take 20 MiB each.
    listed = os.listdir(folder_fd)
    count, hashes = len(listed) - 1, sum(map(hash, listed)) - hash(MANIFEST_FILE)
    del listed
    creds = None
    for name, digest in digests_of(folder_fd):
        count -= 1
        hashes -= hash(name)
        if name == CREDS_FILE:
            creds = digest
        visit(name, digest)
    if count or hashes:
        return "its files are not those of its manifest"
    if sha256(read_file(folder_fd, CREDS_FILE)).hexdigest() != creds:
        return f"{CREDS_FILE} reads back differently from what was written"
    return None
