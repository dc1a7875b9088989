"""What cleanups and repairs have archived: listed, and put back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from opsctl.errors import HalfDone, Interrupted, OpsctlError, Refused
from opsctl.operations.cleanup import megabytes
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.signals import held_back
from opsctl.stores import exchange, keys
from opsctl.stores.archive import archived_lines, archived_runs, find_run
from opsctl.stores.exchange import Change
from opsctl.stores.postgres import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.archive import ArchivedRun

    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_AT_ONCE = 200
"""Rows in one transaction."""
_UNDONE_HERE = frozenset({"keys cleanup", "keys doctor"})
"""The others know folders too, and have their own way back."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """One archive in the list."""

    run: str
    command: str
    started: str
    rows: int
    companies: tuple[str, ...]
    ended: str
    size_bytes: int
    kept_until: str
    path: str

    @property
    def size(self) -> str:
        """For the table."""
        return megabytes(self.size_bytes)

    @property
    def until(self) -> str:
        """For the table."""
        return self.kept_until[:10]


_RUN_COLUMNS = (
    Column("Run", "run"),
    Column("Command", "command"),
    Column("Rows", "rows", numeric=True),
    Column("Ended", "ended"),
    Column("Size", "size", numeric=True),
    Column("Kept until", "until"),
)


def list_runs(state_dir: Path, *, keep: timedelta) -> Report:
    """Every archive that is kept, newest first."""
    rows = [_run_row(run, keep) for run in reversed(archived_runs(state_dir))]
    return Report(
        summary=f"{len(rows)} runs are in the archive, {sum(row.rows for row in rows):,} rows",
        rows=rows,
        columns=_RUN_COLUMNS,
        facts={"keep_days": keep.days},
        next_lines=[f"opsctl keys undo {row.run} --dry-run" for row in rows if row.command in _UNDONE_HERE][:1],
        details=[f"{row.run}: {row.path}, companies {', '.join(row.companies) or 'unknown'}" for row in rows],
    )


def _run_row(run: ArchivedRun, keep: timedelta) -> RunRow:
    until = datetime.fromtimestamp(run.path.stat().st_mtime, UTC) + keep
    return RunRow(
        run=run.head.run_id,
        command=run.head.command,
        started=run.head.started_at,
        rows=run.rows,
        companies=run.companies,
        ended=run.ended,
        size_bytes=run.size_bytes,
        kept_until=until.isoformat(timespec="seconds"),
        path=str(run.path),
    )


@dataclass(frozen=True, slots=True)
class UndoRow:
    """What becomes of one company's rows."""

    company: str
    put_back: int
    reverted: int
    left: int
    """Rows that are there already, or that somebody has written since."""


_UNDO_COLUMNS = (
    Column("Company", "company"),
    Column("Put back", "put_back", numeric=True),
    Column("Reverted", "reverted", numeric=True),
    Column("Left", "left", numeric=True),
)


@dataclass(frozen=True, slots=True)
class UndoPlan:
    """What undoing a run would change."""

    run: ArchivedRun
    counts: Counter[tuple[str, str]]
    """By company and `put_back`, `reverted` or `left`."""
    warnings: tuple[str, ...]

    @property
    def changes(self) -> int:
        """Rows that would change."""
        return sum(count for (_, what), count in self.counts.items() if what != "left")


@repeatable
def plan_undo(
    open_connection: OpenConnection, state_dir: Path, run_id: str, *, environment: str, journal: Journal
) -> UndoPlan:
    """What `undo` would do. Raises `Refused` for a run that is not kept, or of another environment."""
    run = find_run(state_dir, run_id)
    if run.head.environment != environment:
        raise Refused(
            f"run {run_id} was in the environment {run.head.environment!r}, this is {environment!r}",
            hint="opsctl config show",
        )
    if run.head.command not in _UNDONE_HERE:
        raise Refused(
            f"run {run_id} was `{run.head.command}`", hint=f"opsctl sessions failback --undo {run_id} --dry-run"
        )
    counts: Counter[tuple[str, str]] = Counter()
    with journal.step("compare", total=run.rows) as advance, open_connection() as connection:
        with snapshot(connection) as opened:
            system_identifier = opened.server.system_identifier
            done = 0
            for changes in _chunks(run.path):
                counts += _planned(connection, changes)
                done += len(changes)
                advance(done)
        triggers = exchange.insert_triggers(connection)
    return UndoPlan(run, counts, tuple(_undo_warnings(run, system_identifier, triggers)))


def _undo_warnings(run: ArchivedRun, system_identifier: str | None, triggers: list[str]) -> Iterator[str]:
    if None not in {system_identifier, run.head.system_identifier} and system_identifier != run.head.system_identifier:
        yield f"this is not the server that the run worked on, which was {run.head.database}"
    if triggers:
        yield f"rows may come back with other times, because a trigger runs on each insert: {', '.join(triggers)}"
    if run.ended not in {"done", "stopped"}:
        yield f"the run was {run.ended}: its last rows may never have been deleted"


def _planned(connection: Connection, changes: list[Change]) -> Counter[tuple[str, str]]:
    before = exchange.holdings(connection, changes, "old")
    after = exchange.holdings(connection, changes, "new")
    counts: Counter[tuple[str, str]] = Counter()
    for change in changes:
        if change.has_new:
            what = "reverted" if after[change].equal else "left"
        else:
            what = "left" if before[change].there else "put_back"
        counts[change.company, what] += 1
    return counts


def preview_undo(plan: UndoPlan) -> Report:
    """The plan as an answer."""
    return _undo_report(plan, plan.counts, f"undoing run {plan.run.head.run_id} would change {plan.changes:,} rows", ())


def undo(open_connection: OpenConnection, plan: UndoPlan, *, journal: Journal) -> Report:
    """Put back what a run deleted and is not there again; revert what it changed and nobody has written since.

    Raises `Locked`. What comes after the first change is told in the report.
    """
    counts: Counter[tuple[str, str]] = Counter()
    altered, ended = 0, None
    try:
        with journal.step("put back", total=plan.run.rows) as advance, open_connection() as connection:
            keys.require_writable(connection, inserting=True)
            keys.lock_keys(connection)
            done = 0
            for changes in _chunks(plan.run.path):
                with held_back():
                    chunk, others = _undone(connection, changes)
                    counts += chunk
                    altered += others
                    done += len(changes)
                    advance(done)
    except (KeyboardInterrupt, OpsctlError) as error:
        if not counts:
            raise
        ended = error
    changed = sum(count for (_, what), count in counts.items() if what != "left")
    warnings = [f"{altered:,} rows came back with other times: a trigger set them"] if altered else []
    report = _undo_report(plan, counts, f"run {plan.run.head.run_id} undone: {changed:,} rows changed", warnings)
    return report if ended is None else _broken_off(report, ended, changed)


def _undone(connection: Connection, changes: list[Change]) -> tuple[Counter[tuple[str, str]], int]:
    """One transaction: what became of each row by company, and how many came back other than they were."""
    with keys.writing(connection):
        made = exchange.take_back(connection, changes)
        came_back = exchange.holdings(connection, made, "old")
    counts: Counter[tuple[str, str]] = Counter()
    for change in changes:
        what = ("reverted" if change.has_new else "put_back") if change in made else "left"
        counts[change.company, what] += 1
    return counts, sum(not holding.equal for holding in came_back.values())


def _chunks(path: Path) -> Iterator[list[Change]]:
    lines = archived_lines(path)
    while chunk := [Change.of(line) for line in islice(lines, _AT_ONCE)]:
        yield chunk


def _undo_report(plan: UndoPlan, counts: Counter[tuple[str, str]], summary: str, warnings: Sequence[str]) -> Report:
    rows = [
        UndoRow(company, *(counts[company, what] for what in ("put_back", "reverted", "left")))
        for company in sorted({company for company, _ in counts})
    ]
    return Report(
        summary=summary,
        rows=rows,
        columns=_UNDO_COLUMNS,
        facts={
            "run": plan.run.head.run_id,
            "archived": plan.run.rows,
            "put_back": sum(row.put_back for row in rows),
            "reverted": sum(row.reverted for row in rows),
            "left": sum(row.left for row in rows),
        },
        warnings=[*plan.warnings, *warnings],
        notes=["left are rows that are there already, or that were written since"] if any(r.left for r in rows) else [],
    )


def _broken_off(report: Report, ended: BaseException, changed: int) -> Report:
    so_far = f"after {changed:,} rows; typed again, it goes on"
    if isinstance(ended, OpsctlError):
        failure = Failure(ended.kind, f"{ended.message}; stopped {so_far}", ended.hint)
        return replace(report, exit_code=HalfDone.exit_code, failure=failure)
    code = ended.exit_code if isinstance(ended, Interrupted) else 130
    return replace(report, exit_code=code, failure=Failure("interrupted", f"stopped by a signal {so_far}"))
