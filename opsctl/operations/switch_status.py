"""Who owns the sessions by the record of a switch, what the services run on by /proc, and whether the two agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsctl import relocation, services
from opsctl.errors import Refused, SettingsError
from opsctl.operations.fallback import fallback_of
from opsctl.report import Column, Failure, Report
from opsctl.services import State
from opsctl.stores.publishing import working_on
from opsctl.stores.switch_record import Phase, read_switch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsctl.operations.fallback import Fallback
    from opsctl.relocation import Move
    from opsctl.services import Manager, Service
    from opsctl.settings import Settings
    from opsctl.stores.switch_record import SwitchRecord

_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One service as it runs now."""

    service: str
    state: str
    since: str | None
    folder: str | None
    """Where its process works."""
    runs_on: str
    """`folders`, `database`, `unknown`, or empty where it does not run."""
    flags: dict[str, str | None]

    @property
    def started(self) -> str:
        """`since` for a table of 80 columns: `11-25 02:27`."""
        return (self.since or "")[5:16].replace("T", " ")


_COLUMNS = (
    Column("Service", "service"),
    Column("State", "state"),
    Column("Runs on", "runs_on"),
    Column("In", "folder"),
    Column("Since (UTC)", "started"),
)


def switch_status(settings: Settings) -> Report:
    """Exit 0 where the record and what runs go together, 1 where not, or where a switch was left in the middle."""
    sessions_dir = settings.sessions_dir
    record = read_switch(sessions_dir)
    manager, move = services.manager(settings), _move(settings)
    looked = services.status(manager) if manager else ()
    rows = [_row(service, move) for service in looked]
    owner = "database" if record is None or not record.folders_are_the_truth else "folders"
    trouble, next_lines = _read_together(record, rows, manager)
    if record is not None and (holder := working_on(sessions_dir)):
        trouble, next_lines = f"somebody works on it: {record.phase} ({holder})", ["opsctl switch status"]
    if record is None:
        summary = f"the sessions belong to PostgreSQL: no switch is on record in {sessions_dir}"
    else:
        whose = f"the folders in {sessions_dir}" if owner == "folders" else "PostgreSQL"
        summary = (
            f"the sessions belong to {whose}: {record.phase}{'' if record.done else ' (not done)'}, since "
            f"{record.since}, by run {record.run_id} on {record.host}"
        )
    return Report(
        summary=summary,
        rows=rows,
        columns=_COLUMNS,
        facts={
            "owner": owner,
            "since": record.since if record else None,
            "phase": str(record.phase) if record else None,
            "phase_done": record.done if record else None,
            "run": record.run_id if record else None,
            "host": record.host if record else None,
        },
        notes=[] if manager else ["SERVICE_MANAGER is none, so nobody here can tell what the services run on"],
        next_lines=next_lines,
        exit_code=1 if trouble else 0,
        failure=Failure("half-switched", trouble, next_lines[0] if next_lines else None) if trouble else None,
    )


def _read_together(
    record: SwitchRecord | None, rows: Sequence[ServiceRow], manager: Manager | None
) -> tuple[str | None, list[str]]:
    """What does not go together, and what to type next."""
    stop, start = (services.typed(manager, "stop"), services.typed(manager, "start")) if manager else ([], [])
    runs = [row for row in rows if row.state == State.RUNNING]
    on_folders = [row.service for row in runs if row.runs_on == "folders"]
    on_database = [row.service for row in runs if row.runs_on == "database"]
    again, back = "opsctl sessions restore --switch", "opsctl sessions failback"
    if record is None:
        if on_folders:
            return f"{', '.join(on_folders)} runs on the folders, and no switch is on record", [*stop, "opsctl triage"]
        return None, [] if runs or not manager else start
    if record.phase == "unreadable":
        return f"the record cannot be read ({record.details})", [f"{back} --dry-run"]
    if record.is_switching:
        return f"a switch was left in the middle: {record.phase}", [f"{again}    # goes on", f"{back}    # undoes it"]
    if not record.folders_are_the_truth or record.phase == Phase.RETURNING:
        return f"a failback was left in the middle: {record.phase}", [f"{back}    # goes on"]
    if on_database:
        words = f"{', '.join(on_database)} runs on PostgreSQL, while the folders own the sessions"
        return words, [*stop, f"{again}    # starts it on the folders"]
    if len(runs) < len(rows):
        return "the folders own the sessions, and not every service runs", [f"{again}    # starts it"]
    return None, ["# when PostgreSQL is back:", f"{back} --dry-run"]


def _row(service: Service, move: Move | None) -> ServiceRow:
    flags = dict.fromkeys(move.flags) if move else {}
    found = relocation.running([service], flags)
    folder = found[0].folder if found else None
    runs_on = ""
    if service.state is State.RUNNING:
        seen = [one for one in found if one.folder is not None]
        if move is None or not seen:
            runs_on = _UNKNOWN
        elif all(one.is_fallback(move) for one in seen):
            runs_on = "folders"
        else:
            runs_on = "database" if not any(one.is_fallback(move) for one in seen) else "both"
    return ServiceRow(
        service=service.name,
        state=service.state,
        since=service.since.isoformat(timespec="seconds") if service.since else None,
        folder=folder,
        runs_on=runs_on,
        flags=dict(found[0].flags) if found else {},
    )


def _move(settings: Settings) -> Move | None:
    try:
        return fallback_of(settings).move
    except SettingsError:
        return None


def refuse_while_in_use(settings: Settings) -> None:
    """Raises `Refused` where services may run from the fallback folder: nothing is changed under them."""
    record = read_switch(settings.sessions_dir)
    if record is not None:
        raise Refused(
            f"a switch is on record since {record.since} ({record.phase}), so the fallback code is in use",
            kind="switched",
            hint="opsctl switch status",
        )


def environment_of_services(settings: Settings, fallback: Fallback) -> dict[str, str]:
    """What the services would find in their environment; empty where nobody can tell, which a switch looks at again."""
    try:
        manager = services.manager(settings)
        if manager is None or os.geteuid() not in {0, fallback.account.uid}:
            return {}
        relocator = relocation.relocator(manager, fallback.move)
        return relocator.environment(relocator.told())
    except (SettingsError, Refused):
        return {}
