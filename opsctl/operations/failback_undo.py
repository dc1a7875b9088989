"""Put the rows back that a failback or a repair changed, from its archive: a company's all, or none of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import UnwritableName, folder_name
from opsctl.errors import DatabaseUnavailable, Refused
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores import exchange, keys
from opsctl.stores.archive import archived_lines, find_run
from opsctl.stores.exchange import Change
from opsctl.stores.folder import opened
from opsctl.stores.records import ManifestDamaged
from opsctl.stores.returned import mark_returned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.archive import ArchivedRun

    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_AT_ONCE = 500
_COMMANDS = frozenset({"sessions failback", "sessions repair"})


@dataclass(frozen=True, slots=True)
class UndoWish:
    """Which run's changes to take back."""

    run_id: str
    folders: Path
    """Where the folders are that the run brought back: they are live again afterwards."""
    companies: tuple[str, ...]
    environment: str
    state_dir: Path


@dataclass(frozen=True, slots=True)
class UndoRow:
    """One company in the answer."""

    company: str
    result: str
    """`put back`, `would be put back`, or `refused`."""
    rows: int = 0
    reason: str | None = None


_COLUMNS = (Column("Company", "company"), Column("Result", "result"), Column("Rows", "rows", numeric=True))


@repeatable
def preview_undo(open_connection: OpenConnection, wish: UndoWish, *, journal: Journal) -> Report:
    """What `undo_failback` would do: every row that it would put back is looked at."""
    run = _run(wish)
    rows = []
    with journal.step("look at the rows"), open_connection() as connection:
        for company, changes in _of_companies(run, wish):
            count, written = 0, 0
            for some in _chunks(changes):
                now = exchange.holdings(connection, some, "new")
                before = exchange.holdings(connection, some, "old")
                written += sum(not (now[c].equal if c.has_new else not before[c].there) for c in some)
                count += len(some)
            rows.append(UndoRow(company, "refused" if written else "would be put back", count, _reason(written)))
    return _report(rows, f"undoing run {wish.run_id} would put back", "; nothing was changed", [])


def undo_failback(open_connection: OpenConnection, wish: UndoWish, *, journal: Journal) -> Report:
    """Put every row back, company by company; one of which a row was written since is refused."""
    run = _run(wish)
    rows = []
    with journal.step("put back"), open_connection() as connection:
        keys.require_writable(connection, inserting=True)
        keys.lock_keys(connection)
        for company, changes in _of_companies(run, wish):
            try:
                count = _taken_back(connection, changes)
            except (Refused, DatabaseUnavailable) as error:
                rows.append(UndoRow(company, "refused", reason=error.message))
                if connection.closed:
                    break
            else:
                rows.append(UndoRow(company, "put back", count))
                _unmark(wish.folders, company)
    again = ["opsctl sessions failback --service-stopped    # brings the folders back again"]
    return _report(rows, f"run {wish.run_id} undone: put back", "", again)


def _taken_back(connection: Connection, changes: Iterable[Change]) -> int:
    count = written = 0
    with keys.writing(connection):
        for some in _chunks(changes):
            written += len(some) - len(exchange.take_back(connection, some))
            count += len(some)
        if written:
            raise Refused(f"{written} of its rows were written since")
    return count


def _reason(written: int) -> str | None:
    return f"{written} of its rows were written since" if written else None


def _chunks(changes: Iterable[Change]) -> Iterator[list[Change]]:
    rest = iter(changes)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def _unmark(folders: Path, company: str) -> None:
    """The folder is the live one again. One that is not there, or not ours, needs no mark taken away."""
    with (
        suppress(OSError, ManifestDamaged, UnwritableName),
        opened(folders) as root_fd,
        opened(folder_name(company), dir_fd=root_fd) as folder_fd,
    ):
        mark_returned(folder_fd, None)


def _run(wish: UndoWish) -> ArchivedRun:
    run = find_run(wish.state_dir, wish.run_id)
    if run.head.command not in _COMMANDS:
        raise Refused(f"run {wish.run_id} was `{run.head.command}`", hint=f"opsctl keys undo {wish.run_id}")
    if run.head.environment != wish.environment:
        raise Refused(f"run {wish.run_id} changed the environment {run.head.environment!a}", hint="opsctl config show")
    unknown = sorted(set(wish.companies) - set(run.companies)) if run.companies else []
    if unknown:
        raise Refused(f"run {wish.run_id} changed nothing of {', '.join(map(ascii, unknown))}", kind="unknown-company")
    return run


def _of_companies(run: ArchivedRun, wish: UndoWish) -> Iterator[tuple[str, Iterable[Change]]]:
    """The changes of each wished company; a run changes one company after the other."""
    changes = map(Change.of, archived_lines(run.path))
    for company, of_company in groupby(changes, key=lambda change: change.company):
        if not wish.companies or company in wish.companies:
            yield company, of_company


def _report(rows: list[UndoRow], what: str, end: str, next_lines: list[str]) -> Report:
    refused = [row for row in rows if row.result == "refused"]
    done = [row for row in rows if row not in refused]
    failure = None
    if refused:
        named = "; ".join(f"{row.company}: {row.reason}" for row in refused[:5])
        failure = Failure("half-done" if done else "refused", f"{len(refused)} companies are not undone: {named}")
    return Report(
        summary=f"{what} {sum(row.rows for row in done):,} rows of {len(done)} companies{end}",
        rows=rows,
        columns=_COLUMNS,
        exit_code=(6 if done else 5) if refused else 0,
        failure=failure,
        next_lines=next_lines if done else [],
        companies=[row.company for row in refused],
    )
