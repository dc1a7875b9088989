"""Exchange what a restore published with what it set aside; done twice, the restore stands again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import UnwritableName, folder_name
from opsctl.errors import Refused
from opsctl.report import Column, Failure, Report
from opsctl.stores.folder import Holding, contents, opened
from opsctl.stores.publishing import SessionsRoot, locked_root

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
    """`exchange`, `take away` (there was none before), or `refused`."""
    written_since: tuple[str, ...] = ()


_COLUMNS = (
    Column("Folder", "folder"),
    Column("Action", "action"),
    Column("Written since the restore", "written_since"),
)


def preview_undo(target: Path, owner: Owner, wish: UndoWish, *, this_run: str) -> Report:
    """What `undo_restore` would do."""
    with locked_root(target, owner, run_id=this_run) as root:
        run_id, rows = _plan(root, wish)
    summary = f"undoing restore {run_id} would change {_counted(rows)}; nothing was changed"
    return Report(summary, rows=rows, columns=_COLUMNS, facts={"run": run_id})


def undo_restore(target: Path, owner: Owner, wish: UndoWish, *, this_run: str) -> Report:
    """Exchange the folders. One that was written since its restore is refused without `discard_changes`."""
    with locked_root(target, owner, run_id=this_run) as root:
        root.recover()
        run_id, rows = _plan(root, wish)
        for row in rows:
            if row.action != _REFUSED:
                root.undo(run_id, row.folder)
    refused = [row.folder for row in rows if row.action == _REFUSED]
    failure = None
    if refused:
        failure = Failure(
            "refused" if len(refused) == len(rows) else "half-done",
            f"written since the restore, so not undone: {', '.join(refused)}",
            "add --discard-changes to lose what was written",
        )
    return Report(
        summary=f"restore {run_id} undone: {_counted(rows)}",
        rows=rows,
        columns=_COLUMNS,
        facts={"run": run_id},
        next_lines=[f"opsctl sessions undo --run {run_id}    # puts the restored folders back"],
        exit_code=(5 if len(refused) == len(rows) else 6) if refused else 0,
        failure=failure,
        companies=refused,
    )


_REFUSED = "refused"


def _plan(root: SessionsRoot, wish: UndoWish) -> tuple[str, list[UndoRow]]:
    runs = root.undoable_runs()
    if not runs or (wish.run_id is not None and wish.run_id not in runs):
        asked = f"restore {wish.run_id} cannot be undone" if wish.run_id and runs else "there is no restore to undo"
        raise Refused(f"{asked} in {root.path}", hint=f"to undo: {', '.join(runs)}" if runs else "opsctl sessions list")
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
    if found.holding is not Holding.LIVE or wish.discard_changes:
        return UndoRow(folder, action)
    return UndoRow(folder, _REFUSED, (found.changed + found.missing + found.added)[:5])


def _counted(rows: Sequence[UndoRow]) -> str:
    counts = Counter(row.action for row in rows)
    return ", ".join(f"{count} folders: {action}" for action, count in sorted(counts.items())) or "nothing"
