"""Missing and damaged rows of single companies, put back into a healthy PostgreSQL from a copy.

A copy is older than the rows around it, so what must not be stale is left out (docs/baileys.md section 4): sessions and
our own sender-keys heal by themselves when they are missing, and lose messages when they are old. A healthy row is
never replaced.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import orjson

from opsctl.baileys import buffers, credentials, key_types
from opsctl.baileys.buffers import StoredForm
from opsctl.baileys.filenames import CREDS_FILE, folder_name, is_ignored, parse_key_file_name
from opsctl.errors import Locked, Refused, SourceUnavailable
from opsctl.operations.failback import NotVerified, check_rows, require_unwritten
from opsctl.operations.sides import FORMS, identity
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores import keys
from opsctl.stores.archive import archived_lines, archived_runs
from opsctl.stores.folder import entries_of, opened, origin_of, read_file
from opsctl.stores.postgres import parse_rows
from opsctl.stores.records import CREDS_TYPE
from opsctl.stores.rewriting import Archiving, NewRow, rewriting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.postgres import Fingerprint, Snapshot
    from opsctl.stores.standby import Standby

    OpenSnapshot = Callable[[], AbstractContextManager[Snapshot]]
    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_CREDS = (CREDS_TYPE, "")
_LEFT_OUT = (
    "sessions and own sender-keys are missing and stay so, because an old one loses messages: "
    "each chat's next incoming message is late, then it heals"
)


class RepairSource(StrEnum):
    """Which copy rows are put back from."""

    STANDBY = "standby"
    ARCHIVE = "archive"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class RepairWish:
    """What the operator asked for, and where the copies are."""

    companies: tuple[str, ...]
    source: RepairSource
    missing_only: bool
    folders: Path | None
    standby: Standby
    archiving: Archiving
    form: StoredForm | None = None


class _Kept(NamedTuple):
    """A value as a copy has it, normalised, with the times of its row."""

    value: bytes
    updated_at: str | None
    expires_at: str | None


@dataclass(frozen=True, slots=True)
class RepairRow:
    """One company in the answer; the credentials count as a row."""

    company: str
    result: str
    """`repaired`, `would be repaired`, `unchanged`, `refused` or `not verified`."""
    missing: int = 0
    """Rows that were missing and are put back."""
    damaged: int = 0
    """Rows that cannot be read and are replaced."""
    healthy: int = 0
    stale: int = 0
    """What is missing and only there in a copy of unknown age, where it would do harm."""
    by_type: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None


_COLUMNS = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("Missing", "missing", numeric=True),
    Column("Damaged", "damaged", numeric=True),
    Column("Healthy", "healthy", numeric=True),
    Column("Left out", "stale", numeric=True),
)


@dataclass(slots=True)
class _CompanyPlan:
    company: str
    fingerprint: Fingerprint
    refused: str | None = None
    rows: dict[tuple[str, str], _Kept] = field(default_factory=dict)
    missing: int = 0
    damaged: int = 0
    healthy: int = 0
    stale: int = 0
    creds: bytes | None = None
    creds_updated_at: str | None = None
    form: StoredForm = StoredForm.JSON_STRINGIFY

    def row(self, result: str, reason: str | None = None) -> RepairRow:
        if self.refused is not None:
            result, reason = "refused", self.refused
        by_type = Counter(key_type for key_type, _ in self.rows)
        return RepairRow(
            self.company, result, self.missing, self.damaged, self.healthy, self.stale, dict(by_type), reason
        )

    @property
    def writes(self) -> bool:
        return self.refused is None and (bool(self.rows) or self.creds is not None)


class Repair:
    """A repair that was planned. Made by `plan_repair`."""

    def __init__(self, wish: RepairWish, plans: list[_CompanyPlan], system_identifier: str | None) -> None:
        self._wish = wish
        self._plans = plans
        self._system_identifier = system_identifier

    @property
    def question(self) -> str:
        """What an operator has to agree to."""
        count = sum(plan.missing + plan.damaged for plan in self._plans if plan.writes)
        return f"Put {count:,} rows back into {self._wish.archiving.database} from {self._wish.source}?"

    @property
    def writes(self) -> bool:
        """Whether there is anything to put back."""
        return any(plan.writes for plan in self._plans)

    def preview(self) -> Report:
        """What would be put back."""
        rows = [plan.row("would be repaired" if plan.writes else "unchanged") for plan in self._plans]
        return self._report(rows, "would be put back; nothing was changed")

    def write(self, open_connection: OpenConnection, *, journal: Journal) -> Report:
        """Put the rows back, company by company, each archived first and read back before it commits."""
        rows = [plan.row("unchanged") for plan in self._plans if not plan.writes]
        if self.writes:
            with (
                journal.step("write and verify"),
                self._wish.archiving.archive(self._system_identifier) as archive,
                open_connection() as connection,
            ):
                keys.require_writable(connection, inserting=True)
                keys.lock_keys(connection)
                for plan in self._plans:
                    if plan.writes:
                        try:
                            with rewriting(connection, archive, plan.company) as company_rows:
                                require_unwritten(company_rows, plan.fingerprint)
                                expected = {key: identity(kept.value) for key, kept in plan.rows.items()}
                                company_rows.put(_new_rows(plan))
                                if plan.creds is not None:
                                    company_rows.put_creds(
                                        buffers.in_form(plan.creds, plan.form), plan.creds_updated_at
                                    )
                                check_rows(company_rows, expected, plan.creds)
                        except NotVerified as error:
                            rows.append(plan.row("not verified", error.message))
                        except (Refused, Locked, SourceUnavailable) as error:
                            rows.append(plan.row("refused", error.message))
                        else:
                            rows.append(plan.row("repaired"))
        return self._report(rows, "put back", archived=True)

    def _report(self, rows: list[RepairRow], what: str, *, archived: bool = False) -> Report:
        missing = [row for row in rows if row.result in {"refused", "not verified"}]
        done = [row for row in rows if row not in missing]
        failure, exit_code = None, 0
        if missing:
            named = "; ".join(f"{row.company}: {row.reason}" for row in missing[:5])
            exit_code = 6 if done else NotVerified.exit_code if missing[0].result == "not verified" else 5
            kind = "half-done" if done else "refused"
            failure = Failure(kind, f"{len(missing)} companies are not repaired: {named}", "opsctl sessions list")
        stale = sum(row.stale for row in done)
        undo = (
            f"opsctl sessions failback --undo {self._wish.archiving.run_id} --service-stopped    # takes them out again"
        )
        return Report(
            summary=f"{sum(row.missing + row.damaged for row in done):,} rows {what}, from {self._wish.source}",
            rows=sorted(rows, key=lambda row: row.company),
            columns=_COLUMNS,
            facts={"source": str(self._wish.source), "database": self._wish.archiving.database},
            warnings=[f"{stale} {_LEFT_OUT}"] if stale else [],
            details=[f"{row.company}: {', '.join(f'{n} {t}' for t, n in row.by_type.items())}" for row in rows],
            next_lines=[undo] if archived and any(row.result == "repaired" for row in rows) else [],
            exit_code=exit_code,
            failure=failure,
            companies=[row.company for row in missing],
        )


@repeatable
def plan_repair(open_snapshot: OpenSnapshot, wish: RepairWish, *, journal: Journal) -> Repair:
    """What is missing or damaged of the wished companies, and can be put back. Raises `Refused`, nothing changed."""
    with journal.step("connect to PostgreSQL"):
        opening = open_snapshot()
    with opening as snapshot, journal.step("compare rows with the copy", total=len(wish.companies)) as advance:
        plans = []
        for done, company in enumerate(dict.fromkeys(wish.companies), 1):
            plans.append(_planned(snapshot, company, wish))
            advance(done)
        return Repair(wish, plans, snapshot.server.system_identifier)


def _planned(snapshot: Snapshot, company: str, wish: RepairWish) -> _CompanyPlan:
    plan = _CompanyPlan(company, fingerprint=snapshot.fingerprint(company))
    try:
        copy = dict(_copy_of(company, wish))
    except OSError as error:
        plan.refused = f"its copy cannot be read: {error.strerror}"
        return plan
    if not copy:
        plan.refused = f"{wish.source} has no copy of it"
        return plan
    there = snapshot.creds(company)
    creds_row = buffers.normalise(there.creds.encode()) if there else None
    ours = credentials.examine(copy[_CREDS].value) if _CREDS in copy else None
    theirs = credentials.examine(creds_row.data) if creds_row else None
    if ours and theirs and ours.me_id and theirs.me_id and ours.me_id != theirs.me_id:
        plan.refused = "the copy is of another account: the company was paired anew since"
        return plan
    me = theirs if theirs and theirs.me_id else ours
    forms: Counter[StoredForm] = Counter([creds_row.form] if creds_row else [])
    highest = _compare(snapshot, plan, copy, wish, me, forms)
    plan.form = wish.form or max(FORMS, key=lambda form: forms[form])
    _plan_creds(plan, copy.get(_CREDS), creds_row.data if creds_row else None, highest, wish)
    return plan


def _compare(
    snapshot: Snapshot,
    plan: _CompanyPlan,
    copy: dict[tuple[str, str], _Kept],
    wish: RepairWish,
    me: credentials.Credentials | None,
    forms: Counter[StoredForm],
) -> int | None:
    """Which of the copy's keys are missing or damaged in the database, into `plan`; gives the highest pre-key id."""
    highest: int | None = None
    wanted = {
        key: kept for key, kept in copy.items() if key != _CREDS and key_types.shape_problem(key[0], kept.value) is None
    }
    stale = {key for key in wanted if _is_stale(key, me)}
    for lines in snapshot.key_rows(plan.company):
        for record in parse_rows(lines):
            key = (record.key_type, record.key_id)
            data, form, problem = buffers.normalise(record.value)
            forms[form] += 1
            if record.key_type == "pre-key":
                highest = _higher(highest, record.key_id)
            kept = wanted.pop(key, None)
            healthy = problem is None and key_types.shape_problem(record.key_type, data) is None
            plan.healthy += healthy
            if not (healthy or kept is None or wish.missing_only or key in stale):
                plan.damaged += 1
                plan.rows[key] = kept
    for key, kept in wanted.items():
        if key in stale:
            plan.stale += 1
            continue
        plan.missing += 1
        plan.rows[key] = kept
        if key[0] == "pre-key":
            highest = _higher(highest, key[1])
    return highest


def _higher(highest: int | None, key_id: str) -> int | None:
    number = credentials.pre_key_number(key_id)
    return highest if number is None else max(number, highest or 0)


def _is_stale(key: tuple[str, str], me: credentials.Credentials | None) -> bool:
    key_type, key_id = key
    if key_type == "sender-key":
        return me is None or key_types.is_own_sender_key(key_id, me.me_id, me.me_lid)
    return key_type in key_types.DROPPED_WHEN_STALE


def _plan_creds(
    plan: _CompanyPlan, kept: _Kept | None, there: bytes | None, highest: int | None, wish: RepairWish
) -> None:
    """Missing or unusable credentials come from the copy; no pre-key id that was put back is given out again."""
    damaged = there is not None and credentials.examine(there).unusable
    if kept is not None and (there is None or (damaged and not wish.missing_only)):
        if credentials.examine(kept.value).unusable:
            plan.refused = "the copy's credentials cannot log in either"
            return
        plan.creds = credentials.with_pre_key_ids_raised(kept.value, highest_pre_key_id=highest, fresh=False)
        plan.creds_updated_at = kept.updated_at
        plan.missing += there is None
        plan.damaged += there is not None
        return
    if there is None:
        plan.refused = f"it has no credentials, and {wish.source} has none either"
        return
    plan.healthy += not damaged
    if plan.rows and not damaged:
        raised = credentials.with_pre_key_ids_raised(there, highest_pre_key_id=highest, fresh=True)
        plan.creds = raised if raised != there else None


def _new_rows(plan: _CompanyPlan) -> Iterator[NewRow]:
    for (key_type, key_id), kept in plan.rows.items():
        yield NewRow(key_type, key_id, buffers.in_form(kept.value, plan.form), kept.updated_at, kept.expires_at)


def _copy_of(company: str, wish: RepairWish) -> Iterator[tuple[tuple[str, str], _Kept]]:
    """Every readable value that the wished copy has of a company."""
    if wish.source is RepairSource.ARCHIVE:
        return _from_archive(company, wish.archiving)
    if wish.source is RepairSource.STANDBY:
        copy = wish.standby.copy(company)
        if copy is None:
            return iter(())
        if copy.damage is not None:
            raise Refused(f"the standby's copy of {company} is damaged: {copy.damage}", hint="opsctl standby status")
        return _from_folder(copy.path, wish.archiving.environment)
    if wish.folders is None:
        raise Refused("no sessions folder is set", hint="set SESSIONS_DIR, or pass --dir DIR")
    return _from_folder(wish.folders / folder_name(company), wish.archiving.environment)


def _from_folder(path: Path, environment: str) -> Iterator[tuple[tuple[str, str], _Kept]]:
    if not path.is_dir():
        return
    with opened(path) as fd:
        origin = origin_of(fd)
        if origin is not None and origin.environment != environment:
            raise Refused(f"{path} belongs to the environment {origin.environment!a}", hint="opsctl config show")
        entries = dict(entries_of(fd)) if origin else {}
        for name in sorted(os.listdir(fd)):
            entry = entries.get(name)
            if entry is not None:
                key: tuple[str, str] | None = (entry.key_type, entry.key_id)
            else:
                key = _CREDS if name == CREDS_FILE else parse_key_file_name(name)
            if key is None or is_ignored(name):
                continue
            value = buffers.normalise(read_file(fd, name))
            if value.problem is None:
                times = (entry.updated_at, entry.expires_at) if entry else (None, None)
                yield key, _Kept(value.data, *times)


def _from_archive(company: str, archiving: Archiving) -> Iterator[tuple[tuple[str, str], _Kept]]:
    """The last value that any run's archive has of each key."""
    found: dict[tuple[str, str], _Kept] = {}
    for run in archived_runs(archiving.state_dir):
        if run.head.environment != archiving.environment or (run.companies and company not in run.companies):
            continue
        for line in archived_lines(run.path):
            change = orjson.loads(line)
            row = change.get("new") or change["old"]
            if row["company_id"] != company:
                continue
            of_creds = change["table"] == "whatsapp_auth"
            key = _CREDS if of_creds else (row["key_type"], row["key_id"])
            value = buffers.normalise(orjson.dumps(row["creds" if of_creds else "value"]))
            if value.problem is None:
                found[key] = _Kept(value.data, row["updated_at"], row.get("expires_at"))
    yield from found.items()
