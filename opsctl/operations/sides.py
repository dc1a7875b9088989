"""One company from its three sides: what was published, what its folder holds now, what the database holds now.

Everything is read once, and nothing is kept of what is the same on all sides, so that the plan for a fleet fits into
memory. What a difference means is for `three_way` to say.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NamedTuple

import orjson

from opsctl.baileys import buffers, credentials, key_types
from opsctl.baileys.buffers import StoredForm
from opsctl.baileys.filenames import (
    CREDS_FILE,
    UnwritableName,
    fix_file_name,
    is_ignored,
    key_file_name,
    parse_key_file_name,
)
from opsctl.operations import three_way
from opsctl.operations.three_way import Action, Base, Circumstances, InDatabase, InFolder, Prefer, Verdict
from opsctl.stores.folder import entries_of, folder_digest, read_file, unreadable
from opsctl.stores.postgres import parse_row
from opsctl.stores.records import CREDS_TYPE, row_digest

if TYPE_CHECKING:
    from opsctl.stores.postgres import Creds, Fingerprint
    from opsctl.stores.records import FileEntry, Origin

DATABASE = "database"
"""The `source` of a copy that was made from the tables themselves."""
UNKNOWN = "unknown"
_LISTED = 1_000
FORMS = (StoredForm.JSON_STRINGIFY, StoredForm.BASE64, StoredForm.UINT8ARRAY)
"""What bytes can be written in; the first where nothing tells."""
_TOLD = frozenset({Action.DAMAGED, Action.CONFLICT, Action.KEPT})


class Change(NamedTuple):
    """One key that is not the same on all sides, and what becomes of its row."""

    key_type: str
    key_id: str
    action: Action
    reason: str
    conflicting: bool = False
    file: str | None = None
    sha256: bytes | None = None
    """Of the file as it was read for the plan."""
    updated_at: str | None = None
    expires_at: str | None = None
    """Of a file that is as it was published, the times of the row it was made from; else its own."""


@dataclass(slots=True)
class CompanyPlan:
    """What failing one company back would do."""

    company: str
    folder: str
    fingerprint: Fingerprint | None = None
    """Of its rows when they were compared."""
    refused: str | None = None
    """Why nothing of it may be written."""
    returned_by: str | None = None
    """The run that brought it back, where nothing was written on the folder since."""
    counts: Counter[Action] = field(default_factory=Counter)
    conflicts: int = 0
    changes: list[Change] = field(default_factory=list)
    """The rows to write and to delete; the credentials are `creds`."""
    told: list[Change] = field(default_factory=list)
    """A thousand at most of those that stay as they are though the sides differ, and of conflicts."""
    warnings: list[str] = field(default_factory=list)
    creds: bytes | None = None
    """The credentials to write, normalised; None where the row stays."""
    creds_updated_at: str | None = None
    form: StoredForm = StoredForm.JSON_STRINGIFY
    folder_digest: str = ""
    me_ids: tuple[str | None, ...] = ()
    """The account's ids on both sides: no key's id is shown with them."""

    def tell(self, change: Change) -> None:
        """Count one key, and keep it where it is to be written, deleted or told of."""
        self.counts[change.action] += 1
        self.conflicts += change.conflicting
        if change.key_type != CREDS_TYPE and change.action in three_way.CHANGING:
            self.changes.append(change)
        elif change.action in _TOLD and len(self.told) < _LISTED:
            self.told.append(change)

    @property
    def writes(self) -> bool:
        """Whether there is anything to write or delete, and nothing forbids it."""
        return self.refused is None and (bool(self.changes) or self.creds is not None)


def identity(normalised: bytes) -> bytes:
    """Of a normalised value, in whatever order its names are: JSONB has its own order, Baileys another."""
    try:
        return sha256(orjson.dumps(orjson.loads(normalised), option=orjson.OPT_SORT_KEYS)).digest()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):  # no value of Baileys'
        return sha256(normalised).digest()


class _File(NamedTuple):
    """A file now. `sha256` is None where it cannot be read, `identity` also where it holds no value."""

    sha256: bytes | None
    identity: bytes | None
    written_at: str = ""


_UNTOUCHED: Final = _File(None, b"untouched")
"""Stands for every key's file that is to the byte as it was published."""
_UNREADABLE: Final = _File(None, None)


class _Difference(NamedTuple):
    """A key that may not be the same on all sides, before it is decided."""

    key_type: str
    key_id: str
    name: str
    base: Base | None
    file: _File | None
    row: InDatabase | None


class Sides:
    """Reads one company's folder, then takes its rows, then decides. For one use, in that order.

    `origin` None: no manifest of ours says what was published (`--adopt`).
    """

    def __init__(self, folder_fd: int, origin: Origin | None) -> None:
        self._fd = folder_fd
        self._origin = origin
        self._entries: dict[str, FileEntry] = dict(entries_of(folder_fd)) if origin else {}
        self._types = {entry.key_type for entry in self._entries.values()}
        self._published_rows = {entry.row: name for name, entry in self._entries.items() if entry.row}
        self._files: dict[str, _File] = {}
        self._differences: list[_Difference] = []
        self._claims: dict[str, list[_Difference]] = {}
        self._unchanged = self._only_there = 0
        self._forms: Counter[str] = Counter()
        self._highest_pre_key_id: int | None = None
        self._strangers: list[str] = []
        self.creds: bytes | None = None
        """The folder's credentials, normalised; None where they are missing, torn, or cannot log in."""
        self.creds_damage = "missing"
        self._creds_untouched = False
        self._read_folder()

    def _read_folder(self) -> None:
        digests: dict[str, bytes] = {}
        for name in os.listdir(self._fd):
            if is_ignored(name):
                continue
            try:
                data = read_file(self._fd, name)
            except OSError as error:
                digests[name] = unreadable(error)
                self._files[name] = _UNREADABLE
                continue
            digest = digests[name] = sha256(data).digest()
            entry = self._entries.get(name)
            untouched = entry is not None and digest.hex() == entry.sha256
            if name == CREDS_FILE:
                self._read_creds(data, untouched=untouched)
            elif untouched:
                self._files[name] = _UNTOUCHED
            else:
                self._files[name] = _File(digest, _value(data), _written_at(self._fd, name))
        if CREDS_FILE in self._files:
            del self._files[CREDS_FILE]
            self.creds_damage = "unreadable"
        self.digest = folder_digest(digests)

    def _read_creds(self, data: bytes, *, untouched: bool) -> None:
        self._creds_untouched = untouched
        normalised = buffers.normalise(data)
        examined = credentials.examine(normalised.data)
        unusable = [f.message for f in examined.findings if f.severity is credentials.Severity.UNUSABLE]
        if normalised.unreadable or (unusable and not untouched):
            self.creds_damage = "torn" if normalised.unreadable else f"damaged: {unusable[0]}"
        else:
            self.creds = normalised.data

    def take(self, lines: bytes) -> None:
        """Rows in COPY's text format, with their line breaks."""
        published, files, same = self._published_rows, self._files, []
        for line in lines.splitlines():
            name = published.get(row_digest(line).hex())
            if name is not None and files.get(name) is _UNTOUCHED:
                del files[name]
                same.append(self._entries[name])
            else:
                self._take(line)
        self._took_published(same)

    def _took_published(self, same: list[FileEntry]) -> None:
        """Rows that are, as their files, to the byte as they were published, which nearly all are."""
        self._unchanged += len(same)
        self._forms.update([entry.form for entry in same])
        for entry in same:
            if entry.key_type == "pre-key":
                self._saw_pre_key(entry.key_id)

    def _take(self, line: bytes) -> None:
        key_type, key_id, value, updated_at, _, _ = parse_row(line)
        data, form, _ = buffers.normalise(value)
        self._forms[form] += 1
        if key_type == "pre-key":
            self._saw_pre_key(key_id)
        try:
            name = key_file_name(key_type, key_id)
        except UnwritableName:
            self._only_there += 1
            return
        entry = self._entries.get(name)
        if entry is None:
            self._types.add(key_type)
            if name in self._files:
                row = InDatabase(identity(data), updated_at)
                claim = _Difference(key_type, key_id, name, None, self._files[name], row)
                self._claims.setdefault(name, []).append(claim)
            else:
                self._only_there += 1
            return
        if entry.key_id != key_id or entry.key_type != key_type:  # of two that wanted this file it was the older
            self._only_there += 1
            return
        file = self._files.pop(name, None)
        as_published = sha256(data).hexdigest() == entry.sha256
        if as_published and file is _UNTOUCHED:
            self._unchanged += 1
            return
        base = _base(entry)
        row_identity = identity(data)
        if file is _UNTOUCHED:
            # A copy that was made of something else than this table may spell the same value differently.
            same = self._holds(name, row_identity)
            file = _UNTOUCHED._replace(identity=row_identity if same else base.identity)
        elif as_published and (file is None or file.identity != row_identity):
            row_identity = base.identity
        row = InDatabase(row_identity, updated_at)
        self._differences.append(_Difference(key_type, key_id, name, base, file, row))

    def _holds(self, name: str, row_identity: bytes) -> bool:
        try:
            return _value(read_file(self._fd, name)) == row_identity
        except OSError:  # it was there a moment ago; writing it would tell
            return False

    def _saw_pre_key(self, key_id: str) -> None:
        number = credentials.pre_key_number(key_id)
        if number is not None:
            self._highest_pre_key_id = max(number, self._highest_pre_key_id or 0)

    @property
    def published_pre_key_changed(self) -> bool:
        """Whether a pre-key's file holds another key than was published: that is what a new pairing does."""
        return any(d.key_type == "pre-key" and _rewritten(d.base, d.file) for d in self._differences) or any(
            _rewritten(_base(entry), self._files.get(name))
            for name, entry in self._entries.items()
            if entry.key_type == "pre-key"
        )

    def decide(
        self,
        plan: CompanyPlan,
        creds_row: Creds | None,
        *,
        another_server: bool,
        may_delete: bool,
        prefer: Prefer | None,
        form: StoredForm | None,
    ) -> None:
        """What becomes of each row, into `plan`. That both are one account's is for the caller to make sure of."""
        self._settle_claims()
        self._add_files_without_rows()
        around = Circumstances(
            published_at=_published_at(self._origin) if self._origin else None,
            another_server=another_server,
            rows_lost=any(d.row is None and d.base is not None and _readable(d.file) for d in self._differences),
            prefer=prefer,
        )
        decided = [
            (d, three_way.decide(d.key_type, d.base, _in_folder(d.file), d.row, around)) for d in self._differences
        ]
        kept_because = self._why_nothing_is_deleted(decided, may_delete=may_delete)
        for difference, verdict in decided:
            if verdict.action is Action.DELETED and kept_because is not None:
                self._settle(plan, difference, Verdict(Action.KEPT, kept_because, verdict.conflicting))
            else:
                self._settle(plan, difference, verdict)
        if kept_because is not None:
            plan.warnings.append(f"{kept_because}: their rows stay")
        self._decide_creds(plan, creds_row, around)
        plan.counts[Action.UNCHANGED] += self._unchanged
        plan.counts[Action.KEPT] += self._only_there
        plan.folder_digest = self.digest
        plan.form = form or self._usual_form()
        if self._strangers:
            shown = ", ".join(ascii(name)[1:-1] for name in self._strangers[:3])
            plan.warnings.append(f"{len(self._strangers)} files are no keys of Baileys' ({shown})")
        if plan.counts[Action.CONFLICT]:
            never = ", and of a ratchet the database's is never taken" if prefer is Prefer.DATABASE else ""
            plan.refused = (
                f"{plan.counts[Action.CONFLICT]} keys were written in the database after the folder was published"
                f"{never}; --prefer files takes the folder's"
            )

    def _settle_claims(self) -> None:
        """A file that the manifest does not know belongs to the row that Baileys would have written it for."""
        for name, claims in self._claims.items():
            file = self._files.pop(name)
            named = parse_key_file_name(name)
            exact = [claim for claim in claims if (claim.key_type, claim.key_id) == named]
            chosen = exact or claims
            if len(chosen) == 1:
                self._differences += chosen
            else:  # nobody can know whose it is
                key_type, key_id = named or ("", name)
                self._differences.append(_Difference(key_type, key_id, name, None, _File(file.sha256, None), None))
            for claim in claims:
                if len(chosen) > 1 or claim is not chosen[0]:
                    self._only_there += 1

    def _add_files_without_rows(self) -> None:
        for name, file in self._files.items():
            entry = self._entries.get(name)
            named = (entry.key_type, entry.key_id) if entry else self._named(name)
            if named is None:
                self._strangers.append(name)
                continue
            if named[0] == "pre-key":
                self._saw_pre_key(named[1])
            base = _base(entry) if entry else None
            if file is _UNTOUCHED and base is not None:
                file = _UNTOUCHED._replace(identity=base.identity)  # noqa: PLW2901 - the same file, spelled out
            self._differences.append(_Difference(*named, name, base, file, None))

    def _named(self, name: str) -> tuple[str, str] | None:
        """(type, id) of a new file. A type that only this database knows may have more than one hyphen."""
        named = parse_key_file_name(name)
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no UTF-8, so no text for a row
            return None
        if named is None or named[0] in key_types.KNOWN:
            return named
        prefixes = [t for t in self._types if name.startswith(f"{fix_file_name(t)}-")]
        if not prefixes:
            return named
        longest = max(prefixes, key=len)
        return longest, name[len(fix_file_name(longest)) + 1 : -len(".json")]

    def _why_nothing_is_deleted(self, decided: list[tuple[_Difference, Verdict]], *, may_delete: bool) -> str | None:
        deleted = Counter(d.key_type for d, verdict in decided if verdict.action is Action.DELETED)
        if not deleted:
            return None
        if not may_delete:
            return f"{deleted.total()} files are gone, and only a registered folder of ours deletes rows"
        published = Counter(entry.key_type for entry in self._entries.values())
        return three_way.too_many_deleted(deleted, published)

    def _settle(self, plan: CompanyPlan, difference: _Difference, verdict: Verdict) -> None:
        file = difference.file
        updated_at, expires_at, digest = None, None, None
        if file is not None and file.identity is not None and verdict.action in three_way.WRITTEN:
            entry = self._entries.get(difference.name)
            if file.sha256 is None and entry is not None:  # as it was published
                digest, updated_at, expires_at = bytes.fromhex(entry.sha256), entry.updated_at, entry.expires_at
            else:
                digest, updated_at = file.sha256, file.written_at
                expires_at = as_text(datetime.fromisoformat(updated_at) + key_types.lifetime(difference.key_type))
        change = Change(
            difference.key_type,
            difference.key_id,
            verdict.action,
            verdict.reason,
            verdict.conflicting,
            difference.name,
            digest,
            updated_at,
            expires_at,
        )
        plan.tell(change)

    def _decide_creds(self, plan: CompanyPlan, creds_row: Creds | None, around: Circumstances) -> None:
        entry = self._entries.get(CREDS_FILE)
        base = _base(entry) if entry else None
        there = buffers.normalise(creds_row.creds.encode()) if creds_row else None
        if there is not None:
            self._forms[there.form] += 1
        row = None
        if there is not None and creds_row is not None:
            published = entry is not None and entry.sha256 in self._published_spellings(there.data)
            row = InDatabase(base.identity if base and published else identity(there.data), creds_row.updated_at)
        written_at = None
        if self.creds is None:
            file = InFolder(None)
        else:
            written_at = entry.updated_at if entry and self._creds_untouched else _written_at(self._fd, CREDS_FILE)
            own = base.identity if base and self._creds_untouched else identity(self.creds)
            if there is not None and row is not None and identity(self.creds) == identity(there.data):
                own = row.identity
            file = InFolder(own, written_at or "")
        verdict = three_way.decide(CREDS_TYPE, base, file, row, around)
        if verdict.action is Action.DAMAGED:
            verdict = Verdict(Action.DAMAGED, f"its {CREDS_FILE} is {self.creds_damage}; the database's stay")
        merged = self._merged(verdict.action, there.data if there else None)
        if merged is not None and (there is None or identity(merged) != identity(there.data)):
            plan.creds, plan.creds_updated_at = merged, written_at
            if verdict.action in {Action.UNCHANGED, Action.KEPT}:
                verdict = Verdict(Action.UPDATED, "only the ids of its pre-keys are raised", verdict.conflicting)
        plan.tell(
            Change(CREDS_TYPE, "", verdict.action, verdict.reason, verdict.conflicting, CREDS_FILE, None, written_at)
        )

    def _published_spellings(self, there: bytes) -> set[str]:
        """The digests that a copy of these credentials may have: a restore may have raised their pre-key ids."""
        numbers = [credentials.pre_key_number(e.key_id) for e in self._entries.values() if e.key_type == "pre-key"]
        highest = max((number for number in numbers if number is not None), default=None)
        raised = [
            credentials.with_pre_key_ids_raised(there, highest_pre_key_id=highest, fresh=fresh)
            for fresh in (True, False)
        ]
        return {sha256(data).hexdigest() for data in (there, *raised)}

    def _merged(self, action: Action, there: bytes | None) -> bytes | None:
        """The credentials that the database has afterwards: no pre-key id that either side gave out is given again."""
        highest = self._highest_pre_key_id
        if action is Action.CONFLICT:
            return None
        if action in {Action.KEPT, Action.DAMAGED}:
            value, other = there, self.creds
        else:
            value, other = self.creds, there
        if value is None:
            return None
        if other is not None:
            value = credentials.with_pre_key_ids_of(value, other)
        if action is Action.DAMAGED and highest is not None:
            # The folder's own counters are lost: as of any copy of which nobody knows how many ids were used since.
            return credentials.with_pre_key_ids_at_least(value, highest + 1 + credentials.STALE_MARGIN)
        return credentials.with_pre_key_ids_raised(value, highest_pre_key_id=highest, fresh=True)

    def _usual_form(self) -> StoredForm:
        """The form that the company's rows have; of a company without rows, the ones that its copy was made from."""
        published = Counter(StoredForm(e.form) for e in self._entries.values() if e.form in FORMS)
        for counted in (self._forms, published):
            best = max(FORMS, key=lambda form: counted[form])
            if counted[best]:
                return best
        return StoredForm.JSON_STRINGIFY


def _base(entry: FileEntry) -> Base:
    return Base(bytes.fromhex(entry.sha256), entry.updated_at)


def _readable(file: _File | None) -> bool:
    return file is not None and file.identity is not None


def _rewritten(base: Base | None, file: _File | None) -> bool:
    return base is not None and file is not None and file.sha256 is not None and file.sha256 != base.identity


def _in_folder(file: _File | None) -> InFolder | None:
    return None if file is None else InFolder(file.identity, file.written_at)


def _value(data: bytes) -> bytes | None:
    """The identity of a file's value; None where it holds none that the database could take."""
    normalised = buffers.normalise(data)
    if normalised.problem is not None or _holds_nul(normalised.data):
        return None
    return identity(normalised.data)


def _holds_nul(data: bytes) -> bool:
    """Whether a string in it has a NUL character, which JSONB rejects."""
    return b"\\u0000" in data and b"\\u0000" in data.replace(b"\\\\", b"")


def _written_at(folder_fd: int, name: str) -> str:
    """A file's time as PostgreSQL prints it, in UTC."""
    seconds = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mtime
    return as_text(datetime.fromtimestamp(seconds, UTC))


def as_text(moment: datetime) -> str:
    """A moment in UTC as PostgreSQL prints it."""
    return f"{moment:%Y-%m-%d %H:%M:%S.%f}".rstrip("0").rstrip(".") + "+00"


def _published_at(origin: Origin) -> str:
    """Since when the folder is the live one: since the snapshot of the tables, or since it was brought back."""
    if origin.returned is not None:
        return origin.returned.at
    try:
        started = datetime.strptime(origin.run_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return origin.snapshot_at
    return origin.snapshot_at if origin.source == DATABASE else f"{started:%Y-%m-%d %H:%M:%S}+00"
