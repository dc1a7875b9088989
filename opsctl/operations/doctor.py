"""What is wrong with the keys in PostgreSQL, what each of it does, and mending what can be mended.

The rows that an old migration typed wrongly count as what they are, so that nothing is missed or found twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import orjson

from opsctl.baileys import credentials
from opsctl.baileys.buffers import StoredForm, normalise
from opsctl.baileys.filenames import UnwritableName, folder_name, parse_key_file_name
from opsctl.baileys.key_types import KNOWN, is_own_sender_key, sender_key_encoding, shape_problem
from opsctl.errors import HalfDone, OpsctlError, Refused
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores import exchange, keys
from opsctl.stores.archive import Head, new_archive, unwritable
from opsctl.stores.exchange import KeyName, Patch
from opsctl.stores.postgres import parse_rows, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.archive import Archive
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.records import Record

    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_TOLERANCE = timedelta(minutes=1)
"""Clocks differ."""
_REVERSE = "_reverse"
_EXAMPLES = 3
_NEW_IN_7 = frozenset(name for name, known in KNOWN.items() if known.since == 7)


class Ailment(StrEnum):
    """What can be wrong."""

    MISTYPED = "mistyped"
    ORPHANS = "orphans"
    LID_PAIRS = "lid-pairs"
    KEY_WITHOUT_MEMORY = "key-without-memory"
    MEMORY_WITHOUT_KEY = "memory-without-key"
    PRE_KEY_BEYOND = "pre-key-beyond-next"
    DOUBLE_ENCODED = "double-encoded"
    MIXED_FORMS = "mixed-forms"
    ARRAY_SENDER_KEYS = "array-sender-keys"
    MISSHAPEN = "misshapen"
    TWINS = "twin-companies"
    FUTURE = "future-times"


_EFFECTS = {
    Ailment.MISTYPED: "Baileys never finds them: an old migration split the file names wrongly",
    Ailment.ORPHANS: "nothing loads them: their company has no credentials",
    Ailment.LID_PAIRS: "conversations of that contact may not be found on Baileys 7",
    Ailment.KEY_WITHOUT_MEMORY: "the key is sent to all members again with the next message; heals by itself",
    Ailment.MEMORY_WITHOUT_KEY: 'members of the group will read "Waiting for this message"',
    Ailment.PRE_KEY_BEYOND: "ids are given out twice: Bad MAC for whoever gets one",
    Ailment.DOUBLE_ENCODED: "cannot be used as a key",
    Ailment.MIXED_FORMS: "no single version of Baileys reads all of them from the database",
    Ailment.ARRAY_SENDER_KEYS: "Baileys 7 cannot read them, so those group messages fail",
    Ailment.MISSHAPEN: "Baileys will not understand them",
    Ailment.TWINS: "both want one folder: a restore refuses both",
    Ailment.FUTURE: "never expire, and pass for the newest",
}
_MENDS = {
    Ailment.MISTYPED: "typed rightly; of two, the newer stays",
    Ailment.LID_PAIRS: "the missing half is added",
    Ailment.MEMORY_WITHOUT_KEY: "the memory goes, so that the key is sent again",
    Ailment.PRE_KEY_BEYOND: "nextPreKeyId is raised above them",
    Ailment.ARRAY_SENDER_KEYS: "they go, our own with their memory; members send theirs again",
    Ailment.FUTURE: "last written now",
}
_BY_HAND = {
    Ailment.ORPHANS: "by hand: bring the credentials back, or delete them",
    Ailment.KEY_WITHOUT_MEMORY: "nothing to do",
    Ailment.DOUBLE_ENCODED: "by hand: from a backup",
    Ailment.MIXED_FORMS: "by hand; a restore to folders writes the one form that all read",
    Ailment.MISSHAPEN: "by hand: from a backup",
    Ailment.TWINS: "by hand: rename or delete one of them",
}


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One ailment of one company. `mends` are the rows that --fix would change."""

    company: str
    ailment: Ailment
    rows: int
    mends: int
    effect: str
    mend: str
    examples: tuple[str, ...]


_COLUMNS = (
    Column("Company", "company"),
    Column("Ailment", "ailment"),
    Column("Rows", "rows", numeric=True),
    Column("What it does", "effect"),
    Column("With --fix", "mend"),
)


@dataclass(slots=True)
class _Chart:
    """What was found in one company."""

    company: str
    rows: Counter[Ailment] = field(default_factory=Counter)
    mended: Counter[Ailment] = field(default_factory=Counter)
    examples: defaultdict[Ailment, list[str]] = field(default_factory=lambda: defaultdict(list))
    patches: dict[KeyName, Patch] = field(default_factory=dict)
    additions: dict[KeyName, Patch] = field(default_factory=dict)
    """Rows that are like the ones they are listed under."""
    creds_fields: dict[str, int] = field(default_factory=dict)

    def note(self, ailment: Ailment, example: str, count: int = 1) -> None:
        self.rows[ailment] += count
        if len(self.examples[ailment]) < _EXAMPLES:
            self.examples[ailment].append(example)

    def patch(self, ailment: Ailment, key_type: str, key_id: str, columns: dict[str, Any] | None) -> None:
        """Mend a row; one that goes goes, whatever else is wrong with it."""
        name = KeyName(self.company, key_type, key_id)
        before = self.patches.get(name, Patch({}))
        gone = columns is None or before.columns is None
        self.patches[name] = Patch(None if gone else {**(before.columns or {}), **(columns or {})})
        self.mended[ailment] += 1

    def add(self, ailment: Ailment, like: KeyName, columns: dict[str, Any]) -> None:
        """Add a row that is like another."""
        self.additions[like] = Patch(columns, stays=True)
        self.mended[ailment] += 1

    def findings(self) -> list[FindingRow]:
        return [
            FindingRow(
                company=self.company,
                ailment=ailment,
                rows=count,
                mends=self.mended[ailment],
                effect=_EFFECTS[ailment],
                mend=_MENDS[ailment] if self.mended[ailment] else _BY_HAND.get(ailment, "nothing: look by hand"),
                examples=tuple(self.examples[ailment]),
            )
            for ailment, count in sorted(self.rows.items())
        ]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found, and what would mend it."""

    charts: tuple[_Chart, ...]
    system_identifier: str | None
    companies: int

    @property
    def findings(self) -> list[FindingRow]:
        """By company and ailment."""
        return [finding for chart in self.charts for finding in chart.findings()]

    @property
    def mends(self) -> int:
        """How many rows --fix would change."""
        return sum(len(chart.patches) + len(chart.additions) + bool(chart.creds_fields) for chart in self.charts)


@repeatable
def diagnose(open_connection: OpenConnection, *, companies: tuple[str, ...], journal: Journal) -> Diagnosis:
    """Look at every row of the wished companies; changes nothing."""
    with journal.step("examine the keys"), open_connection() as connection, snapshot(connection) as opened:
        tenants = opened.tenants()
        known = {tenant.company_id for tenant in tenants}
        if unknown := sorted(set(companies) - known):
            named = ", ".join(map(ascii, unknown))
            raise Refused(f"the database has no company {named}", kind="unknown-company", hint="opsctl keys stats")
        now = datetime.fromisoformat(opened.server.snapshot_at)
        twins = _twins(known)
        charts = []
        for tenant in tenants:
            company = tenant.company_id
            if companies and company not in companies:
                continue
            chart = _examined(opened, company, now)
            if company in twins:
                chart.note(Ailment.TWINS, twins[company], tenant.key_count)
            charts.append(chart)
        return Diagnosis(tuple(charts), opened.server.system_identifier, len(charts))


def _twins(companies: set[str]) -> dict[str, str]:
    """Companies that share a folder with another one, and that other."""
    by_folder: dict[str, list[str]] = {}
    for company in sorted(companies):
        try:
            by_folder.setdefault(folder_name(company), []).append(company)
        except UnwritableName:
            continue
    pairs = [names for names in by_folder.values() if len(names) > 1]
    return {name: other for names in pairs for name, other in zip(names, reversed(names), strict=True)}


class _Examination:
    """Goes through the keys of one company, then draws conclusions."""

    def __init__(self, chart: _Chart, creds: str | None, now: datetime) -> None:
        self._chart = chart
        self._now = now
        self._creds = credentials.examine(creds.encode()) if creds is not None else None
        self._rows = 0
        self._forms: Counter[StoredForm] = Counter()
        self._types: set[str] = set()
        self._lids: dict[str, tuple[str, KeyName]] = {}
        self._mistyped: list[tuple[Record, tuple[str, str]]] = []
        """With the names that they stand for, and normalised."""
        self._arrays: list[KeyName] = []
        self._own_groups: set[str] = set()
        self._memories: dict[str, KeyName] = {}
        self._highest_pre_key: int | None = None

    def add(self, record: Record) -> None:
        self._rows += 1
        chart = self._chart
        key_type, key_id = record.key_type, record.key_id
        name = KeyName(chart.company, key_type, key_id)
        value = normalise(record.value)
        if key_type not in KNOWN and (meant := _meant(key_type, key_id)) is not None:
            chart.note(Ailment.MISTYPED, f"{key_type} {key_id}")
            self._mistyped.append((record._replace(value=value.data), meant))
            key_type, key_id = meant
        else:
            self._remember(name, key_type, key_id, value.data)
        self._forms[value.form] += 1
        self._types.add(key_type)
        if problem := value.problem or shape_problem(key_type, value.data):
            ailment = Ailment.DOUBLE_ENCODED if "encoded twice" in problem else Ailment.MISSHAPEN
            chart.note(ailment, f"{key_type} {key_id}: {problem}")
        if _is_future(record.updated_at, self._now):
            chart.note(Ailment.FUTURE, f"{key_type} {key_id}")
            chart.patch(Ailment.FUTURE, name.key_type, name.key_id, {"updated_at": self._now.isoformat()})

    def _remember(self, name: KeyName, key_type: str, key_id: str, data: bytes) -> None:
        if key_type == "lid-mapping":
            other = orjson.loads(data) if data.startswith(b'"') else None
            if isinstance(other, str):
                self._lids[key_id] = (other, name)
        elif key_type == "pre-key" and key_id.isascii() and key_id.isdigit() and len(key_id) <= 8:
            self._highest_pre_key = max(int(key_id), self._highest_pre_key or 0)
        elif key_type == "sender-key":
            if sender_key_encoding(data) == "array":
                self._arrays.append(name)
            if self._is_own(key_id):
                self._own_groups.add(key_id.partition("::")[0])
        elif key_type == "sender-key-memory" and data != b"{}":
            self._memories[key_id] = name

    def _is_own(self, key_id: str) -> bool:
        return self._creds is not None and is_own_sender_key(key_id, self._creds.me_id, self._creds.me_lid)

    def conclude(self, right: dict[tuple[str, str], str | None]) -> None:
        """After the last row. `right` says when rows were written whose names mistyped ones stand for."""
        self._conclude_types(right)
        self._conclude_creds()
        self._conclude_lids()
        self._conclude_sender_keys()
        forms = {form: count for form, count in self._forms.items() if form is not StoredForm.NONE}
        if len(forms) > 1 or StoredForm.MIXED in forms:
            listed = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
            self._chart.note(Ailment.MIXED_FORMS, listed, sum(forms.values()) - max(forms.values()))

    @property
    def meant(self) -> list[tuple[str, str]]:
        """The names that mistyped rows stand for."""
        return [meant for _, meant in self._mistyped]

    def _conclude_types(self, right: dict[tuple[str, str], str | None]) -> None:
        chart = self._chart
        claimed: set[tuple[str, str]] = set()
        for record, meant in self._mistyped:
            if meant in claimed:
                continue
            claimed.add(meant)
            stale = meant in right and _when(right[meant]) >= _when(record.updated_at)
            if stale:
                chart.patch(Ailment.MISTYPED, record.key_type, record.key_id, None)
                continue
            if meant in right:
                chart.patch(Ailment.MISTYPED, *meant, None)
            renamed = {"key_type": meant[0], "key_id": meant[1]}
            chart.patch(Ailment.MISTYPED, record.key_type, record.key_id, renamed)
            name = KeyName(chart.company, record.key_type, record.key_id)
            self._remember(name, *meant, record.value)  # what it is mended to counts from here on

    def _conclude_creds(self) -> None:
        chart, creds, highest = self._chart, self._creds, self._highest_pre_key
        if creds is None:
            if self._rows:
                chart.note(Ailment.ORPHANS, f"{self._rows} keys", self._rows)
            return
        for finding in creds.findings:
            if finding.code == "double-encoded":
                chart.note(Ailment.DOUBLE_ENCODED, f"creds: {finding.message}")
        following, unuploaded = creds.next_pre_key_id, creds.first_unuploaded_pre_key_id
        if highest is None or following is None or highest < following:
            return
        chart.note(Ailment.PRE_KEY_BEYOND, f"pre-key {highest}, nextPreKeyId {following}")
        if unuploaded is not None and highest + 1 < credentials.KEY_ID_LIMIT:
            raised = max(highest + 1, unuploaded)
            chart.creds_fields = {"nextPreKeyId": raised, "firstUnuploadedPreKeyId": raised}
            chart.mended[Ailment.PRE_KEY_BEYOND] += 1

    def _conclude_lids(self) -> None:
        """Only a half that is missing is added; of two that disagree, nobody knows which is right."""
        for key_id, (other, name) in self._lids.items():
            backwards = key_id.endswith(_REVERSE)
            partner = other if backwards else other + _REVERSE
            expected = key_id.removesuffix(_REVERSE)
            if partner not in self._lids:
                self._chart.note(Ailment.LID_PAIRS, f"{key_id} has no {partner}")
                columns = {"key_type": "lid-mapping", "key_id": partner, "value": expected}
                self._chart.add(Ailment.LID_PAIRS, name, columns)
            elif self._lids[partner][0] != expected:
                self._chart.note(Ailment.LID_PAIRS, f"{key_id} and {partner} disagree")

    def _conclude_sender_keys(self) -> None:
        chart = self._chart
        if self._creds is not None and self._creds.me_id is not None:
            for group in sorted(self._own_groups - self._memories.keys()):
                chart.note(Ailment.KEY_WITHOUT_MEMORY, group)
            for group in sorted(self._memories.keys() - self._own_groups):
                chart.note(Ailment.MEMORY_WITHOUT_KEY, group)
                chart.patch(Ailment.MEMORY_WITHOUT_KEY, *self._memories[group][1:], None)
        if not self._arrays or not self._types & _NEW_IN_7:  # Baileys 6 reads them, and nothing says that 7 runs here
            return
        for name in self._arrays:
            chart.note(Ailment.ARRAY_SENDER_KEYS, name.key_id)
            chart.patch(Ailment.ARRAY_SENDER_KEYS, name.key_type, name.key_id, None)
            group = name.key_id.partition("::")[0]
            if self._is_own(name.key_id) and group in self._memories:
                chart.patch(Ailment.ARRAY_SENDER_KEYS, *self._memories[group][1:], None)


def _examined(opened: Snapshot, company: str, now: datetime) -> _Chart:
    chart = _Chart(company)
    creds = opened.creds(company)
    examination = _Examination(chart, creds.creds if creds else None, now)
    for piece in opened.key_rows(company):
        for record in parse_rows(piece):
            examination.add(record)
    right: dict[tuple[str, str], str | None] = {}
    if meant := set(examination.meant):
        for piece in opened.key_rows(company):
            right |= {r[:2]: r.updated_at for r in parse_rows(piece) if r[:2] in meant}
    examination.conclude(right)
    return chart


def _meant(key_type: str, key_id: str) -> tuple[str, str] | None:
    """What a row of an unknown type stands for, where its file name was split at the first hyphen.

    >>> _meant("app", "state-sync-key-AAA__B="), _meant("lid", "mapping-1_reverse"), _meant("custom", "x")
    (('app-state-sync-key', 'AAA/B='), ('lid-mapping', '1_reverse'), None)
    """
    found = parse_key_file_name(f"{key_type}-{key_id}.json")
    return found if found is not None and found[0] in KNOWN else None


def _when(text: str | None) -> datetime:
    try:
        return datetime.fromisoformat(text) if text else _LONG_AGO
    except ValueError:  # `infinity`, or a year that Python has not
        return _LONG_AGO


def _is_future(text: str | None, now: datetime) -> bool:
    return text == "infinity" or _when(text) > now + _TOLERANCE


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def report(diagnosis: Diagnosis) -> Report:
    """What is wrong: 0 where nothing is that does not heal by itself, else 1."""
    rows = diagnosis.findings
    total = sum(row.rows for row in rows)
    ill = [row for row in rows if row.ailment is not Ailment.KEY_WITHOUT_MEMORY]  # which each cleanup leaves behind
    failure = None
    if ill:
        hint = "opsctl keys doctor --fix --dry-run" if diagnosis.mends else "opsctl keys doctor --verbose"
        failure = Failure("keys-unwell", f"{len(ill)} findings in {len({r.company for r in ill})} companies", hint)
    return Report(
        summary=f"{diagnosis.companies} companies examined, {total:,} rows found wanting; "
        f"--fix would change {diagnosis.mends:,}",
        rows=rows,
        columns=_COLUMNS,
        facts={"companies": diagnosis.companies, "rows": total, "mends": diagnosis.mends},
        details=_details(rows),
        exit_code=1 if ill else 0,
        failure=failure,
        companies=sorted({row.company for row in ill}),
    )


def preview_fix(diagnosis: Diagnosis) -> Report:
    """What `fix` would do."""
    rows = [row for row in diagnosis.findings if row.mends]
    return Report(
        summary=f"{diagnosis.mends:,} rows would be changed, archived first; nothing was changed",
        rows=rows,
        columns=_COLUMNS,
        facts={"mends": diagnosis.mends},
        details=_details(rows),
        next_lines=["opsctl keys doctor --fix --service-stopped"] if rows else [],
    )


def _details(rows: Sequence[FindingRow]) -> list[str]:
    return [f"{row.company} {row.ailment}: {example}" for row in rows for example in row.examples]


def fix(
    open_connection: OpenConnection,
    diagnosis: Diagnosis,
    *,
    run_id: str,
    environment: str,
    place: str,
    state_dir: Path,
    keep_archives: timedelta,
    journal: Journal,
) -> Report:
    """Mend what can be, company by company, each in one transaction, archived first.

    Raises `Locked`, `Refused` (no archive) and `DatabaseUnavailable` with nothing changed; 6 where some companies were
    mended before it failed.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    head = Head(run_id, "keys doctor", started_at, environment, place, diagnosis.system_identifier)
    changed: Counter[str] = Counter()
    failure = None
    try:
        with (
            journal.step("mend"),
            open_connection() as connection,
            new_archive(state_dir, head, keep=keep_archives) as archive,
        ):
            keys.require_writable(connection, inserting=True)
            keys.lock_keys(connection)
            for chart in diagnosis.charts:
                changed[chart.company] += _mended(connection, archive, chart)
    except (OpsctlError, OSError) as error:
        failed = unwritable(state_dir, error) if isinstance(error, OSError) else error
        if not changed.total():
            raise failed from None
        so_far = f"stopped after {changed.total():,} rows, each of them in the archive"
        failure = Failure(failed.kind, f"{failed.message}; {so_far}", "opsctl keys doctor")
    left = [row for row in diagnosis.findings if row.rows > row.mends]
    return Report(
        summary=f"{changed.total():,} of {diagnosis.mends:,} rows mended in {len(+changed)} companies",
        rows=diagnosis.findings,
        columns=_COLUMNS,
        facts={"mended": changed.total(), "by_company": dict(+changed), "archive_run": run_id},
        notes=["what is left: opsctl keys doctor"] if left else [],
        next_lines=[f"opsctl keys undo {run_id} --dry-run    # puts it back"] if changed.total() else [],
        exit_code=HalfDone.exit_code if failure else 0,
        failure=failure,
    )


def _mended(connection: Connection, archive: Archive, chart: _Chart) -> int:
    """One company's transaction; gives how many rows were changed."""
    if not (chart.patches or chart.additions or chart.creds_fields):
        return 0
    with archive.transaction(connection) as keep:
        keys.prepare(connection)
        changes = exchange.plan_key_changes(connection, chart.patches)
        changes += exchange.plan_key_changes(connection, chart.additions)
        if chart.creds_fields:
            changes += exchange.plan_creds_change(connection, chart.company, chart.creds_fields)
        made = exchange.make(connection, changes)
        # Whoever takes them back goes through them in this order: a name is free again before its old row returns.
        for change in sorted(made, key=lambda change: not change.has_new):
            keep(change.line.encode() + b"\n")
    archive.concerns(chart.company)
    return len(made)
