"""Exchange what a restore published with what it set aside; done twice, the restore stands again."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import UnwritableName, folder_name
from opsctl.errors import Refused
from opsctl.report import Column, Failure, Report
from opsctl.stores.folder import Holding, contents, opened
from opsctl.stores.publishing import SessionsRoot, locked_root, readable_root
from opsctl.stores.switch_record import read_switch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from opsctl.stores.publishing import Owner


@dataclass(frozen=True, slots=True)
class UndoWish:
    """What the operator asked for. `run_id` None is the last restore."""

    run_id: str | None
    companies: tuple[str, ...]
    discard_changes: bool
    environment: str


@dataclass(frozen=True, slots=True)
class UndoRow:
    """One folder in the answer."""

    folder: str
    action: str
    """`exchange`, `take away` (there was none before), `put back` (there is none now), or `refused`."""
    written_since: tuple[str, ...] = ()
    reason: str | None = None
    """Why it was refused."""


_COLUMNS = (Column("Folder", "folder"), Column("Action", "action"), Column("Why", "reason"))


def preview_undo(target: Path, owner: Owner, wish: UndoWish) -> Report:
    """What `undo_restore` would do. Makes nothing, not even the lock's holder."""
    _refuse_switched(target)
    with readable_root(target, owner) as root:
        if root is None:
            raise _nothing(target)
        run_id, rows = _plan(root, wish)
        killed = [
            f"run {run} was killed, or still works; undo settles first what it left" for run in root.unfinished_runs()
        ]
    summary = f"undoing restore {run_id} would change {_counted(rows)}; nothing was changed"
    return replace(_report(summary, run_id, rows), warnings=killed)


def undo_restore(target: Path, owner: Owner, wish: UndoWish, *, this_run: str) -> Report:
    """Exchange the folders. One that was written since its restore is refused without `discard_changes`."""
    _refuse_switched(target)
    with readable_root(target, owner) as there:
        if there is None:
            raise _nothing(target)
    with locked_root(target, owner, run_id=this_run) as root:
        return undo_locked(root, wish)


def _refuse_switched(target: Path) -> None:
    record = read_switch(target)
    if record is not None:
        raise Refused(
            f"the folders in {target} are those of a switch ({record.phase}, since {record.since})",
            kind="switched",
            hint="opsctl switch status",
        )


def undo_locked(root: SessionsRoot, wish: UndoWish) -> Report:
    """`undo_restore` for whoever holds the lock."""
    root.recover()
    run_id, planned = _plan(root, wish)
    rows = [row if row.action == _REFUSED else _undone(root, run_id, row) for row in planned]
    target = root.path
    report = _report(f"restore {run_id} undone: {_counted(rows)}", run_id, rows)
    next_line = (
        f"opsctl sessions undo --to {shlex.quote(str(target))} --run {run_id}    # puts the restored folders back"
    )
    return replace(report, next_lines=[next_line] if report.exit_code != Refused.exit_code else [])


_REFUSED = "refused"


def _undone(root: SessionsRoot, run_id: str, row: UndoRow) -> UndoRow:
    try:
        root.undo(run_id, row.folder)
    except OSError as error:
        return replace(row, action=_REFUSED, reason=error.strerror)
    return row


def _nothing(target: Path) -> Refused:
    return Refused(f"there is no restore to undo in {target}", kind="nothing-to-undo", hint="opsctl sessions list")


def _report(summary: str, run_id: str, rows: Sequence[UndoRow]) -> Report:
    refused = [row for row in rows if row.action == _REFUSED]
    failure = None
    if refused:
        failure = Failure(
            "refused" if len(refused) == len(rows) else "half-done",
            f"not undone: {'; '.join(f'{row.folder}: {row.reason}' for row in refused)}",
            "add --discard-changes to set aside what was written" if any(r.written_since for r in refused) else None,
        )
    return Report(
        summary=summary,
        rows=rows,
        columns=_COLUMNS,
        facts={"run": run_id},
        exit_code=(5 if len(refused) == len(rows) else 6) if refused else 0,
        failure=failure,
        companies=[row.folder for row in refused],
    )


def _plan(root: SessionsRoot, wish: UndoWish) -> tuple[str, list[UndoRow]]:
    runs = root.undoable_runs()
    if not runs:
        raise _nothing(root.path)
    if wish.run_id is not None and wish.run_id not in runs:
        raise Refused(f"restore {wish.run_id} cannot be undone in {root.path}", hint=f"to undo: {', '.join(runs)}")
    run_id = wish.run_id or runs[0]
    folders = root.undoable(run_id)
    if wish.companies:
        wanted = {_folder(company) for company in wish.companies}
        unknown = sorted(wanted - folders.keys())
        if unknown:
            raise Refused(
                f"restore {run_id} did not publish {', '.join(unknown)}", hint="opsctl sessions undo --dry-run"
            )
        folders = {name: aside for name, aside in folders.items() if name in wanted}
    if standing := folders.keys() & set(root.published_by(run_id)):
        # Some were exchanged already, by an undo that was killed or one of single companies: finish, do not reverse.
        folders = {name: aside for name, aside in folders.items() if name in standing}
    return run_id, [_row(root, name, wish, was_there=aside) for name, aside in sorted(folders.items())]


def _folder(company: str) -> str:
    try:
        return folder_name(company)
    except UnwritableName as error:
        raise Refused(str(error), hint="opsctl sessions list") from None


def _row(root: SessionsRoot, folder: str, wish: UndoWish, *, was_there: bool) -> UndoRow:
    action = "exchange" if was_there else "take away"
    try:
        with opened(folder, dir_fd=root.fd) as fd:
            found = contents(fd, company_id=None, environment=wish.environment)
    except FileNotFoundError:
        return UndoRow(folder, "put back")
    except OSError:  # a file or a symbolic link, which an earlier restore had set aside
        return UndoRow(folder, action)
    if found.holding is not Holding.LIVE or wish.discard_changes:
        return UndoRow(folder, action)
    written = (found.changed + found.missing + found.added)[:5]
    return UndoRow(folder, _REFUSED, written, f"written since it was restored ({', '.join(map(ascii, written))})")


def _counted(rows: Sequence[UndoRow]) -> str:
    counts = Counter(row.action for row in rows)
    return ", ".join(f"{count} folders: {action}" for action, count in sorted(counts.items())) or "nothing"
