"""Will these session folders load and log in? Every file read, every key pair recomputed, nothing changed."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING

import orjson

from opsctl.baileys import buffers, credentials, key_types
from opsctl.baileys.filenames import (
    CREDS_FILE,
    MANIFEST_FILE,
    UnwritableName,
    is_ignored,
    key_file_name,
    parse_key_file_name,
)
from opsctl.errors import AS_OWNER, Refused, unreadable
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores.folder import OPSCTL_FOLDER, entries_of, opened, origin_of, read_file
from opsctl.stores.postgres import parse_rows
from opsctl.stores.records import FileEntry, ManifestDamaged
from opsctl.stores.staging import Warnings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.records import Origin

WHAT_NOBODY_CAN_CHECK_HERE = "that WhatsApp has not removed the device shows only when the service connects"


class Verdict(StrEnum):
    """What will become of a company when the service loads its folder."""

    WILL_LOG_IN = "will log in"
    WILL_NOT = "will NOT log in"
    DAMAGED = "logs in, keys damaged"
    UNREADABLE = "cannot be read"
    """By this user, or from this disk: nothing else is known of it."""


@dataclass(frozen=True, slots=True)
class FolderRow:
    """One company's folder in the answer."""

    company: str
    folder: str
    verdict: Verdict
    keys: int = 0
    pre_key_pairs: int = 0
    manifest: str = ""
    """How the folder stands to its manifest: `as restored`, `written since`, or why it has none."""
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    warning_count: int = 0
    database: str | None = None
    """With `--against database`: `equal`, or what differs."""


_COLUMNS = (
    Column("Company", "company"),
    Column("Verdict", "verdict"),
    Column("Keys", "keys", numeric=True),
    Column("Pairs", "pre_key_pairs", numeric=True),
    Column("Manifest", "manifest"),
    Column("Warn", "warning_count", numeric=True),
)
_AGAINST_COLUMNS = (*_COLUMNS, Column("Database", "database"))


def verify_folders(target: Path, *, companies: tuple[str, ...], journal: Journal) -> Report:
    """Verify a sessions folder or one company's. Raises `Refused` where there is nothing to verify."""
    paths = _company_folders(target, companies)
    rows = []
    with journal.step("verify", total=len(paths)) as advance:
        for done, path in enumerate(paths, 1):
            rows.append(_verify_folder(path)[0])
            advance(done)
    return _report(target, rows, _COLUMNS)


@repeatable
def verify_against(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]],
    target: Path,
    *,
    companies: tuple[str, ...],
    journal: Journal,
) -> Report:
    """Verify folders, and hold every file against its row in the database."""
    paths = _company_folders(target, companies)
    rows = []
    with journal.step("verify against the database", total=len(paths)) as advance, open_snapshot() as snapshot:
        for done, path in enumerate(paths, 1):
            row, digests = _verify_folder(path)
            if row.verdict is not Verdict.UNREADABLE:
                row = replace(row, database=_difference(snapshot, row.company, path, digests))
            rows.append(row)
            advance(done)
    return _report(target, rows, _AGAINST_COLUMNS)


def _company_folders(target: Path, companies: tuple[str, ...]) -> list[Path]:
    try:
        if not target.is_dir():
            state = "is not a folder" if target.exists() else "does not exist"
            raise Refused(f"{target} {state}", hint="pass the sessions folder, or one company's folder in it")
        found = [target] if _is_of_one_company(target) else _folders_in(target)
    except OSError as error:
        raise unreadable(target, error) from None
    if companies:
        wanted = {c if c.startswith("company_") else f"company_{c}" for c in companies}
        missing = sorted(wanted - {p.name for p in found})
        if missing:
            what = "is not" if found == [target] else "has no folder"
            raise Refused(f"{target} {what} {', '.join(map(ascii, missing))}", kind="unknown-company")
        found = [p for p in found if p.name in wanted]
    if not found:
        raise Refused(f"{target} holds no company folders", hint="opsctl sessions restore")
    return found


def _is_of_one_company(target: Path) -> bool:
    """By what is in it; by its name where nothing is, for a sessions folder may be called company_ too."""
    if (target / CREDS_FILE).exists() or (target / MANIFEST_FILE).exists():
        return True
    return target.name.startswith("company_") and not any(p.name.startswith("company_") for p in _folders_in(target))


def _folders_in(target: Path) -> list[Path]:
    return sorted(p for p in target.iterdir() if p.is_dir() and not p.is_symlink() and p.name != OPSCTL_FOLDER)


class _Folder:
    """One folder while it is verified."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.warnings = Warnings()
        self.problems = Warnings()
        self.summary = credentials.KeySummary()
        self.digests: dict[str, str] = {}
        self.pairs = 0
        self.keys = 0

    def manifest(self) -> tuple[Origin | None, dict[str, FileEntry]]:
        try:
            origin = origin_of(self.fd)
            return origin, dict(entries_of(self.fd)) if origin else {}
        except ManifestDamaged:
            self.warnings.add("the manifest is damaged; the way back could not use it")
            return None, {}

    def key(self, name: str, data: bytes, entry: FileEntry | None) -> None:
        key_type, key_id = (entry.key_type, entry.key_id) if entry else parse_key_file_name(name) or ("", "")
        if not key_type:
            self.warnings.add("no file of Baileys'", name)
            return
        self.keys += 1
        shown = name.removesuffix(".json")
        normalised = buffers.normalise(data)
        problem = normalised.problem or key_types.shape_problem(key_type, normalised.data)
        if problem:
            self.problems.add(f"{key_type}: {problem}", shown)
            return
        if normalised.form in _FORMS_NOT_EVERY_VERSION_READS:
            self.problems.add(f"{key_type}: bytes stored as {normalised.form}, which not every Baileys reads", shown)
        if key_type == "pre-key":
            self.pairs += 1
            if not _pre_key_matches(normalised.data):
                self.problems.add("pre-key: the public key is not its private key's", shown)
        self.summary.add(key_type, key_id, normalised.data)


_FORMS_NOT_EVERY_VERSION_READS = {
    buffers.StoredForm.JSON_STRINGIFY,
    buffers.StoredForm.UINT8ARRAY,
    buffers.StoredForm.MIXED,
}


def _pre_key_matches(data: bytes) -> bool:
    pair = orjson.loads(data)
    private, public = buffers.bytes_of(pair["private"]), buffers.bytes_of(pair["public"])
    return private is not None and public is not None and credentials.key_pair_matches(private, public)


def _verify_folder(path: Path) -> tuple[FolderRow, dict[str, str]]:
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(opened(path))
        except OSError as error:
            problems = (f"its folder cannot be read: {error.strerror}",)
            return FolderRow(path.name.removeprefix("company_"), path.name, Verdict.UNREADABLE, problems=problems), {}
        folder = _Folder(path, fd)
        origin, entries = folder.manifest()
        creds = None
        for name, data in _files(folder):
            folder.digests[name] = sha256(data).hexdigest()
            if name == CREDS_FILE:
                creds = data
            else:
                folder.key(name, data, entries.get(name))
        unusable = (*_check_creds(folder, creds), *_check_modes(folder))
    verdict = Verdict.WILL_NOT if unusable else Verdict.DAMAGED if folder.problems.counts else Verdict.WILL_LOG_IN
    warnings = folder.warnings.sentences()
    row = FolderRow(
        company=origin.company_id if origin else path.name.removeprefix("company_"),
        folder=path.name,
        verdict=verdict,
        keys=folder.keys,
        pre_key_pairs=folder.pairs,
        manifest=_against_manifest(folder, origin, entries),
        problems=(*unusable, *folder.problems.sentences()),
        warnings=warnings,
        warning_count=len(warnings),
    )
    return row, folder.digests


def _files(folder: _Folder) -> Iterator[tuple[str, bytes]]:
    for name in sorted(os.listdir(folder.fd)):
        if is_ignored(name):
            continue
        try:
            yield name, read_file(folder.fd, name)
        except OSError as error:
            folder.problems.add(f"cannot be read: {error.strerror}", name)


def _check_creds(folder: _Folder, creds: bytes | None) -> tuple[str, ...]:
    """Why the company will not log in; warnings go to the folder."""
    if not creds:
        return (f"{CREDS_FILE} is {'missing' if creds is None else 'empty'}: Baileys would start a new identity",)
    normalised = buffers.normalise(creds)
    examined = credentials.examine(normalised.data)
    unusable = [f.message for f in examined.findings if f.severity is credentials.Severity.UNUSABLE]
    if not examined.registered and not unusable:
        unusable.append("the pairing was never completed: it will ask for a QR code")
    if normalised.form in _FORMS_NOT_EVERY_VERSION_READS:
        unusable.append(f"its bytes are stored as {normalised.form}, which not every Baileys reads")
    if normalised.problem and not unusable:
        folder.warnings.add(f"{CREDS_FILE}: {normalised.problem}")
    for finding in (*examined.findings, *credentials.consistency(examined, folder.summary)):
        if finding.severity is not credentials.Severity.UNUSABLE:
            folder.warnings.add(finding.message)
    return tuple(unusable)


def _check_modes(folder: _Folder) -> tuple[str, ...]:
    """Why the service's user would not find the credentials; what lets others in is a warning."""
    status = os.fstat(folder.fd)
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.warnings.add("other users may look into the folder: chmod 0700")
    try:
        creds = os.stat(CREDS_FILE, dir_fd=folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        return ()
    if stat.S_IMODE(creds.st_mode) & 0o077:
        folder.warnings.add(f"other users may read {CREDS_FILE}: chmod 0600")
    if creds.st_uid != status.st_uid and not creds.st_mode & stat.S_IROTH:
        return (f"{CREDS_FILE} belongs to another user than its folder: Baileys would start a new identity",)
    return ()


def _against_manifest(folder: _Folder, origin: Origin | None, entries: dict[str, FileEntry]) -> str:
    if origin is None:
        return "none"
    expected = {name: entry.sha256 for name, entry in entries.items()}
    if expected == folder.digests:
        return "as restored"
    differing = sum(
        1 for name in expected.keys() | folder.digests.keys() if expected.get(name) != folder.digests.get(name)
    )
    return f"{differing} files written since"


def _difference(snapshot: Snapshot, company: str, path: Path, digests: dict[str, str]) -> str:
    """`equal`, or how many files and rows differ. Raised pre-key ids of a copy are no difference."""
    rows: dict[str, tuple[str, bool]] = {}
    with snapshot.company():
        creds = snapshot.creds(company)
        for record in chain.from_iterable(map(parse_rows, snapshot.key_rows(company))):
            try:
                name = key_file_name(record.key_type, record.key_id)
            except UnwritableName:
                continue
            written = record.updated_at or ""
            if name in rows and written <= rows[name][0]:
                continue  # of two rows that want one file the newer wins
            same = name in digests and sha256(buffers.normalise(record.value).data).hexdigest() == digests[name]
            rows[name] = written, same
    missing = len(rows.keys() - digests.keys())
    differing = sum(not same for _, same in rows.values()) - missing
    added = len(digests.keys() - rows.keys() - {CREDS_FILE})
    if creds is None:
        return "no such company"
    theirs = buffers.normalise(creds.creds.encode()).data
    if sha256(theirs).hexdigest() != digests.get(CREDS_FILE) and not _same_creds(theirs, path):
        differing += 1
    parts = [
        f"{count} {what}"
        for count, what in ((differing, "differ"), (missing, "only there"), (added, "only here"))
        if count
    ]
    return ", ".join(parts) or "equal"


def _same_creds(theirs: bytes, path: Path) -> bool:
    try:
        with opened(path) as fd:
            ours = orjson.loads(read_file(fd, CREDS_FILE))
        there = orjson.loads(theirs)
    except (OSError, orjson.JSONDecodeError):
        return False
    if not isinstance(ours, dict) or not isinstance(there, dict):
        return False
    for name in ("nextPreKeyId", "firstUnuploadedPreKeyId"):
        raised, before = ours.pop(name, None), there.pop(name, None)
        if not isinstance(raised, int) or not isinstance(before, int) or raised < before:
            return False
    return ours == there


def _report(target: Path, rows: list[FolderRow], columns: tuple[Column, ...]) -> Report:
    bad = [row for row in rows if row.verdict is not Verdict.WILL_LOG_IN]
    drifted = [row for row in rows if row.database not in {None, "equal"}]
    warnings = [f"{row.company}: {problem}" for row in bad for problem in row.problems]
    warnings += [f"{row.company}: {warning}" for row in rows for warning in row.warnings]
    failure = None
    if bad:
        named = "; ".join(f"{row.company}: {row.problems[0]}" for row in bad[:5])
        unread = all(row.verdict is Verdict.UNREADABLE for row in bad)
        failure = Failure(
            "verification-failed",
            f"{len(bad)} of {len(rows)} companies are not well: {named}",
            AS_OWNER if unread else f"opsctl sessions restore --to {target}",
        )
    elif drifted:
        named = "; ".join(f"{row.company}: {row.database}" for row in drifted[:5])
        failure = Failure("differs-from-database", f"{len(drifted)} companies differ from the database: {named}")
    return Report(
        summary=f"{len(rows) - len(bad)} of {len(rows)} companies will load and log in; {WHAT_NOBODY_CAN_CHECK_HERE}",
        rows=rows,
        columns=columns,
        facts={"target": str(target)},
        warnings=warnings,
        exit_code=1 if failure else 0,
        failure=failure,
        companies=[row.company for row in (bad or drifted)],
    )
