"""The end of a switch: services stopped, rows back, services as they were, started on PostgreSQL, connected.

The folders are the truth until every company is in the database. A switch that was left before its start is undone
instead: then nothing ran on the folders, and there are no rows to bring back.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opsctl import relocation, services
from opsctl.errors import HalfDone, OpsctlError, Refused
from opsctl.operations.connecting import connection_failure, wait_connected
from opsctl.operations.failback import planned_failback, preview_failback
from opsctl.operations.switch import Machinery, machinery, stop_proven, undo_switch
from opsctl.report import Failure, Report
from opsctl.services import LogMark, State
from opsctl.signals import held_back
from opsctl.stores.publishing import Owner, locked_root
from opsctl.stores.switch_record import (
    Phase,
    SwitchRecord,
    clear_switch,
    read_before,
    read_switch,
    write_before,
    write_switch,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.operations.failback import FailbackWish, OpenConnection, OpenSnapshot
    from opsctl.operations.restore import Remaining
    from opsctl.services import Service
    from opsctl.settings import Settings
    from opsctl.stores.publishing import SessionsRoot


@dataclass(frozen=True, slots=True)
class WayBack:
    """What the operator asked for, and the doors that the way back goes through."""

    wish: FailbackWish
    open_snapshot: OpenSnapshot
    open_connection: OpenConnection
    nobody_writes: Callable[[], bool]
    limited: Callable[[], AbstractContextManager[Remaining]]
    """The clock of what reads sessions and writes them."""
    confirm: Callable[[str], None]


def machinery_of_record(settings: Settings, folders: Path) -> Machinery | None:
    """What a failback of these folders has to move; None where no switch is on record beside them.

    Also None without a service manager, where the services are stopped and moved by hand.
    """
    if read_switch(folders) is None or settings["SERVICE_MANAGER"] == "none":
        return None
    return machinery(settings)


def switch_back(machine: Machinery, way: WayBack, *, journal: Journal) -> Report:
    """Bring rows and services back. Raises `Refused`, `Locked`, `HalfDone`."""
    wish = way.wish
    if wish.companies:
        raise Refused(
            "the services hold every company, so the way back is of all of them",
            kind="one-company",
            hint="leave --company out",
        )
    record = read_switch(wish.source)
    if record is not None and record.is_switching:
        way.confirm(f"Undo the switch that was left while {record.phase}?")
    elif record is None or record.folders_are_the_truth:
        with way.limited():
            preview = preview_failback(way.open_snapshot, wish, journal=journal)
        if preview.failure is not None and preview.exit_code != 1:  # torn files are told, and stop nothing
            return replace(preview, exit_code=Refused.exit_code, notes=["nothing was changed, and the services run on"])
        names = ", ".join(machine.manager.names)
        way.confirm(f"Stop {names}, bring the rows back into {wish.database}, and start them on it?")
    with locked_root(wish.source, Owner.of(wish.source), run_id=wish.run_id) as root:
        back = _Back(machine, way, root, journal)
        return back.run()


@dataclass(slots=True)
class _Back:
    machine: Machinery
    way: WayBack
    root: SessionsRoot
    journal: Journal
    before: dict[str, Any] = field(default_factory=dict)
    since: str = ""
    rows_report: Report | None = None

    def run(self) -> Report:
        record = read_switch(self.root.path)  # again, now under the lock
        if record is None:
            raise Refused("another run has ended the switch meanwhile", kind="switched", hint="opsctl switch status")
        self.since, self.before = record.since, read_before(self.root.own_fd)
        if record.is_switching:
            return undo_switch(self.machine, self.root, self.before, record, self.way.wish, journal=self.journal)
        if record.folders_are_the_truth:
            self._record(Phase.RETURNING, done=False)
            if (stopped_short := self._rows_back()) is not None:
                return stopped_short
            self._record(Phase.RETURNED)
        return self._leave()

    def _record(self, phase: Phase, *, done: bool = True) -> None:
        names, host = self.machine.manager.names, socket.gethostname()
        write_switch(self.root.own_fd, SwitchRecord(self.since, self.way.wish.run_id, host, phase, names, done=done))

    def _rows_back(self) -> Report | None:
        """Bring every company back; where that is not possible, the services go on on the folders, and it is told."""
        running = [s.name for s in services.status(self.machine.manager) if s.state is not State.STOPPED]
        try:
            stop_proven(self.machine.manager, self.way.nobody_writes, journal=self.journal)
            with self.way.limited() as remaining:
                planning = planned_failback(
                    self.way.open_snapshot, self.way.wish, journal=self.journal, locked=self.root
                )
                with planning as plan:
                    report = plan.write(self.way.open_connection, journal=self.journal, remaining=remaining)
            all_back = plan.all_back
        except BaseException as error:
            with held_back():
                self._go_on_on_folders(running)
            if isinstance(error, OpsctlError):
                words = f"{error.message}; the services go on on the folders"
                raise Refused(words, kind=error.kind, hint=error.hint) from None
            raise
        self.rows_report = report
        if all_back:
            return None
        self._go_on_on_folders(running)
        return replace(report, notes=["the folders own the sessions as before, and the services run on them"])

    def _go_on_on_folders(self, running: list[str]) -> None:
        environment = self.machine.relocator.start_environment(fallback=True)
        try:
            with self.journal.step("start the services on the folders again"):
                services.start(self.machine.manager, environment=environment, only=running)
        except OpsctlError as error:
            raise HalfDone(
                f"the folders own the sessions, and the services do not run on them: {error.message}",
                kind="half-switched",
                hint="opsctl sessions restore --switch    # starts them",
            ) from None
        self._record(Phase.SWITCHED)

    def _leave(self) -> Report:
        """The rows are back: services as they were before the switch, started on PostgreSQL."""
        if "definitions" not in self.before:
            return self._started_by_hand()
        manager, relocator = self.machine.manager, self.machine.relocator
        with self.journal.step("stop the services" if self.rows_report is None else "the services are stopped"):
            looked = services.status(manager)
            if self._elsewhere(looked) and any(service.pids for service in looked):
                services.stop(manager)
        with self.journal.step("move the services back"):
            relocator.back(self.before["definitions"].encode())
        looked = services.status(manager)
        if "leaving_mark" not in self.before or not all(service.state is State.RUNNING for service in looked):
            self.before["leaving_mark"] = services.mark_logs(looked).kept()
            write_before(self.root.own_fd, self.before)
        mark = LogMark.of_kept(self.before["leaving_mark"])
        self._record(Phase.LEAVING, done=False)
        try:
            with self.journal.step("start the services on PostgreSQL"):
                environment = relocator.start_environment(fallback=False)
                looked = services.start(manager, environment=environment, only=self.before.get("running"))
        except OpsctlError as error:
            return self._ended(
                "the rows are back, and PostgreSQL owns the sessions",
                Failure("not-started", error.message, error.hint),
            )
        if elsewhere := self._elsewhere(looked):
            return self._ended(
                "the rows are back, and PostgreSQL owns the sessions",
                Failure("not-started", elsewhere, services.typed(manager, "stop")[0]),
            )
        clear_switch(self.root.own_fd)
        companies = [row.company for row in self.rows_report.rows] if self.rows_report else self.before.get("companies")
        found = wait_connected(manager, mark, companies or [], self.machine.settings, journal=self.journal)
        failure = connection_failure(found)
        summary = f"on PostgreSQL again: {len(found.seconds)} of {len(found.companies)} companies are connected"
        return self._ended(summary, failure, missing=found.missing)

    def _started_by_hand(self) -> Report:
        """Where what the services were is lost, a person starts them; then the record can go."""
        looked = services.status(self.machine.manager)
        if self._elsewhere(looked) or not all(service.state is State.RUNNING for service in looked):
            raise HalfDone(
                "the rows are back, and what the services were before the switch is not known any more",
                kind="half-switched",
                hint="start them on PostgreSQL by hand, from the code that they had, then type this again",
            )
        clear_switch(self.root.own_fd)
        return self._ended("the services were started on PostgreSQL by hand", None)

    def _elsewhere(self, looked: tuple[Service, ...]) -> str | None:
        """The first process that still runs the fallback code."""
        for process in relocation.running(looked, self.machine.fallback.flags):
            if process.is_fallback(self.machine.fallback.move):
                return f"{process.name} still runs the fallback code"
        return None

    def _ended(self, summary: str, failure: Failure | None, *, missing: list[str] | None = None) -> Report:
        report = self.rows_report or Report("the rows were back already")
        both = f"{report.summary}; {summary}"
        if failure is None:  # torn files stay what they were: 1
            return replace(report, summary=both, next_lines=["opsctl switch status"])
        undecryptable = failure.kind == "undecryptable"
        return replace(
            report,
            summary=both,
            exit_code=1 if undecryptable else HalfDone.exit_code,
            failure=failure,
            companies=missing or report.companies,
            next_lines=["opsctl switch status"],
        )
