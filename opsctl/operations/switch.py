"""Moving the services onto their session folders: a list of steps, of which each can be undone until the start.

Everything is looked at before anything is changed. The record beside the folders is written before each step and after
it, so whoever comes by after a crash knows how far it came, and goes on. Until the services are started, a step that
fails undoes those before it; from the start on the folders are the truth, and the only way back is a failback.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opsctl import relocation, services
from opsctl.errors import HalfDone, OpsctlError, Refused, SettingsError, SourceUnavailable
from opsctl.operations import fallback as fallback_code
from opsctl.operations.connecting import Connections, connection_failure, wait_connected
from opsctl.operations.restore import preview_restore, restore
from opsctl.operations.restore_report import OfASource, Result
from opsctl.operations.single_owner import PROVEN, somebody_writes
from opsctl.operations.undo import UndoWish, undo_locked
from opsctl.report import Column, Failure, Report
from opsctl.services import LogMark, State
from opsctl.signals import held_back
from opsctl.stores import env_file
from opsctl.stores.publishing import check_root, locked_root
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
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.operations.failback import FailbackWish
    from opsctl.operations.fallback import Fallback
    from opsctl.operations.restore import FindSources, Remaining, Wish
    from opsctl.operations.sources import Found
    from opsctl.relocation import Relocator
    from opsctl.services import Manager, Service
    from opsctl.settings import Settings
    from opsctl.stores.publishing import SessionsRoot

_BYTES_PER_KEY = 4096
"""A block of the filesystem; Baileys' values are nearly all smaller."""
_DONE = frozenset({Result.RESTORED, Result.UNCHANGED})


@dataclass(frozen=True, slots=True)
class Machinery:
    """What moves the services: their manager, the fallback code, and how definitions are moved."""

    settings: Settings
    manager: Manager
    fallback: Fallback
    relocator: Relocator


def machinery(settings: Settings) -> Machinery:
    """Raises `SettingsError` naming what is missing for a switch."""
    manager = services.manager(settings)
    if manager is None:
        raise SettingsError(
            "SERVICE_MANAGER is none, so the services cannot be switched from here", hint="opsctl config show"
        )
    fallback = fallback_code.fallback_of(settings)
    return Machinery(settings, manager, fallback, relocation.relocator(manager, fallback.move))


@dataclass(frozen=True, slots=True)
class SwitchWish:
    """What the operator asked for, and the doors that a switch goes through."""

    restore: Wish
    skip_restart: bool
    nobody_writes: Callable[[], bool]
    """Whether the tables stand still, or the database does not answer."""
    last_sync: Callable[[], str | None]
    """Bring the warm copies up to date one last time; why that was not possible, if it was not."""
    limited: Callable[[], AbstractContextManager[Remaining]]
    """The clock of what reads sessions and writes them."""

    @property
    def run_id(self) -> str:
        return self.restore.run_id


@dataclass(frozen=True, slots=True)
class SwitchRow(OfASource):
    """One company in the answer."""

    company: str
    restored: str
    keys: int = 0
    source: str = ""
    rpo_s: float | None = None
    copy: str = ""
    connected_s: float | None = None
    """How long after the start it was connected; None where it was not, or nobody looked."""
    warnings: tuple[str, ...] = ()
    reason: str | None = None


_COLUMNS = (
    Column("Company", "company"),
    Column("Folder", "restored"),
    Column("From", "source_in_a_word"),
    Column("RPO paid", "age", numeric=True),
    Column("Keys", "keys", numeric=True),
    Column("Copy", "copy"),
    Column("Connected s", "connected_s", numeric=True),
)


# --- before anything is changed ---------------------------------------------------------------------------------------


def preview_switch(machine: Machinery, find: FindSources, wish: SwitchWish, *, journal: Journal) -> Report:
    """What a switch would do: all that can be looked at is, and every session is read. Changes nothing."""
    record = read_switch(wish.restore.target)
    if record is not None:
        raise Refused(f"a switch is on record since {record.since}: {record.phase}", hint="opsctl switch status")
    _preflight(machine, find, wish, machine.relocator.saved, journal=journal)
    with wish.limited() as remaining:
        stopped = replace(wish.restore, service_stopped=PROVEN)
        report = preview_restore(find, stopped, journal=journal, remaining=remaining)
    names = ", ".join(machine.manager.names)
    would = (
        f"{names} would be stopped, moved from {machine.fallback.app_dir} to {machine.fallback.folder} "
        f"({machine.fallback.tag})" + (" and left stopped" if wish.skip_restart else " and started")
    )
    return replace(report, notes=[would, *report.notes])


def _preflight(
    machine: Machinery, find: FindSources, wish: SwitchWish, saved: Callable[[], bytes], *, journal: Journal
) -> bytes:
    """Look at everything that a switch needs, and give what brings the services back. Raises, with nothing changed."""
    with journal.step("preflight: services and fallback code"):
        _require_known(services.status(machine.manager))
        fallback_code.require_prepared(machine.fallback)
        check_root(wish.restore.target, wish.restore.owner)
        definitions = saved()
        fallback_code.require_boots(machine.fallback, machine.relocator.environment(definitions))
    with journal.step("preflight: sources and space"), wish.limited(), _found(find) as found:
        choices = found.choices()
        offers = [choice.offers[0] for choice in choices.values() if choice.offers]
        if not offers:
            raise _no_source("; ".join(f"{one.name}: {one.error.message}" for one in found.lost))
        others = sorted(set(choices) - set(wish.restore.companies)) if wish.restore.companies else []
        if others:
            raise Refused(
                f"the services hold every company, also {', '.join(map(ascii, others[:3]))}, and a switch moves all of "
                "them: one company alone cannot be switched",
                kind="one-company",
                hint="leave --company out, or --switch",
            )
        needed = sum(offer.key_count + 1 for offer in offers) * _BYTES_PER_KEY
        free = _free_bytes(wish.restore.target)
        if free < needed:
            raise Refused(
                f"{needed:,} bytes are needed at {wish.restore.target} and {free:,} are free",
                kind="disk-full",
                hint=f"df -h {wish.restore.target}",
            )
    return definitions


@contextmanager
def _found(find: FindSources) -> Iterator[Found]:
    try:
        with find() as found:
            yield found
    except SourceUnavailable as error:
        raise _no_source(error.message) from None


def _no_source(why: str) -> SourceUnavailable:
    return SourceUnavailable(f"no source can be used, so no service is touched: {why}", hint="opsctl triage")


def _require_known(found: Sequence[Service]) -> None:
    for service in found:
        if not service.known:
            raise Refused(f"{service.name}: {service.said}", kind="service-unknown", hint="opsctl config show")
        if service.cron is not None:
            raise Refused(
                f"PM2 restarts {service.name} by cron ({service.cron}), also after a stop",
                kind="service-by-cron",
                hint=f"pm2 restart {service.name} --cron-restart 0",
            )


def _free_bytes(target: Path) -> int:
    status = os.statvfs(target if target.exists() else target.parent)
    return status.f_bavail * status.f_frsize


# --- switching --------------------------------------------------------------------------------------------------------


def switch_over(machine: Machinery, find: FindSources, wish: SwitchWish, *, journal: Journal) -> Report:
    """Stop the services, restore, move them to the fallback code, start them, and wait until they are connected.

    Goes on where an earlier run was killed. Raises `Refused` where everything is as it was, `HalfDone` where not,
    `Locked`.
    """
    with locked_root(wish.restore.target, wish.restore.owner, run_id=wish.run_id) as root:
        record = read_switch(wish.restore.target)
        before = read_before(root.own_fd) if record else {}
        undoing = _Undoing(machine, root, journal, wish.restore.environment, before)
        switch = _Switch(machine, find, wish, root, journal, undoing)
        try:
            if record is None or record.is_switching:
                return switch.begin(record)
            if record.phase in {Phase.READY, Phase.STARTING, Phase.SWITCHED, Phase.RETURNING}:
                return switch.go_on(record)
        except OSError as error:  # of the record itself: until the start nothing of it comes here
            raise HalfDone(f"{root.path}: {error.strerror}", kind="disk", hint="opsctl switch status") from None
        if record.phase in {Phase.RETURNED, Phase.LEAVING}:
            raise Refused(
                "a failback is under way, and the rows are back", kind="switched", hint="opsctl sessions failback"
            )
        raise Refused(
            f"the record of a switch in {root.path} cannot be read ({record.details})",
            kind="switched",
            hint="opsctl switch status",
        )


@dataclass(slots=True)
class _Undoing:
    """How each step before the start is undone, whoever took it. `before` is kept beside the record."""

    machine: Machinery
    root: SessionsRoot
    journal: Journal
    environment: str
    before: dict[str, Any]
    """What was found, for the way back: `definitions`, `running`, `restores`, `env_lines`, `mark`, `companies`."""

    def keep(self, **more: Any) -> None:  # noqa: ANN401 - what JSON holds
        """Remember more of it."""
        self.before |= more
        write_before(self.root.own_fd, self.before)

    def everything(self, why: str, upto: Phase = Phase.MOVING) -> None:
        """Undo all steps up to one, the last one first, and clear the record.

        The first one that cannot be undone is the end of it: a service must not be started on what is half moved.
        Raises `HalfDone` then.
        """
        undoing = {
            Phase.STOPPING: self._start_again,
            Phase.RESTORING: self._undo_restore,
            Phase.FLAGGING: self._undo_flags,
            Phase.MOVING: self.move_back,
        }
        order = [Phase.STOPPING, Phase.SYNCING, Phase.RESTORING, Phase.FLAGGING, Phase.MOVING]
        with held_back(), self.journal.step("undo"):
            for phase in reversed(order[: order.index(upto) + 1]):
                try:
                    if phase in undoing:
                        undoing[phase]()
                except (OpsctlError, OSError) as problem:
                    raise HalfDone(
                        f"{why}; and it could not be undone: {phase}: {_said(problem)}. The sessions belong to the "
                        "database, and the services are stopped",
                        kind="half-switched",
                        hint="opsctl switch status",
                    ) from None
            clear_switch(self.root.own_fd)

    def move_back(self) -> None:
        if "definitions" in self.before:
            self.machine.relocator.back(self.before["definitions"].encode())

    def _undo_flags(self) -> None:
        if "env_lines" in self.before:
            env_file.put_lines(self.machine.fallback.env_file, self.before["env_lines"])

    def _undo_restore(self) -> None:
        for run_id in reversed(self.before.get("restores", ())):
            if run_id in self.root.undoable_runs():
                done = undo_locked(self.root, UndoWish(run_id, (), False, self.environment))
                if done.failure is not None:
                    raise HalfDone(done.failure.message, hint=done.failure.hint)

    def _start_again(self) -> None:
        environment = self.machine.relocator.start_environment(fallback=False)
        services.start(self.machine.manager, environment=environment, only=self.before.get("running", ()))


def _said(error: BaseException) -> str:
    """What an error says for people; nothing of one that may hold anything."""
    if isinstance(error, OpsctlError):
        return error.message
    return (error.strerror or "a file cannot be used") if isinstance(error, OSError) else "it was stopped"


@dataclass(slots=True)
class _Switch:
    machine: Machinery
    find: FindSources
    wish: SwitchWish
    root: SessionsRoot
    journal: Journal
    undoing: _Undoing
    since: str = ""
    restored: Report | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def before(self) -> dict[str, Any]:
        return self.undoing.before

    # Until the start.

    def begin(self, record: SwitchRecord | None) -> Report:
        """The whole way. With a record: an earlier run was killed on it, and left what `before` describes."""
        self.since = record.since if record else datetime.now(UTC).isoformat(timespec="seconds")
        if record is not None:
            self.notes.append(f"an earlier switch ({record.run_id}) was killed while {record.phase}; this one goes on")
        try:
            self.root.recover()
            self.undoing.move_back()  # a killed run may have left the services out of their manager's list
            definitions = _preflight(self.machine, self.find, self.wish, self._saved, journal=self.journal)
        except BaseException as error:
            if record is None:
                raise
            self._undo("preflight", error)
            raise
        if "definitions" not in self.before:
            running = [s.name for s in services.status(self.machine.manager) if s.state is not State.STOPPED]
            self.undoing.keep(definitions=definitions.decode(), running=running)
        self.undoing.keep(restores=[*self.before.get("restores", ()), self.wish.run_id])
        steps = (
            (Phase.STOPPING, self._stop),
            (Phase.SYNCING, self._sync),
            (Phase.RESTORING, self._restore),
            (Phase.FLAGGING, self._set_flags),
            (Phase.MOVING, self._move),
        )
        for phase, do in steps:
            try:
                self._record(phase, done=False)
                do()
                self._record(phase)
            except BaseException as error:
                self._undo(phase, error, upto=Phase.MOVING if record else phase)
                raise
        self._record(Phase.READY)
        if self.wish.skip_restart:
            return self._left_stopped()
        return self._start_and_connect()

    def _undo(self, name: str, error: BaseException, upto: Phase = Phase.MOVING) -> None:
        """Undo what was done, and say so with `Refused`; a signal or a bug is for the frame to tell."""
        self.undoing.everything(f"{name}: {_said(error)}", upto)
        if isinstance(error, (OpsctlError, OSError)):
            runs = ", ".join(self.before.get("running", ())) or "no service"
            raise Refused(
                f"{name}: {_said(error)}; everything is as it was, and on the database: {runs}",
                kind=error.kind if isinstance(error, OpsctlError) else "disk",
                hint=error.hint if isinstance(error, OpsctlError) else None,
            ) from None

    def _saved(self) -> bytes:
        kept = self.before.get("definitions")
        return kept.encode() if isinstance(kept, str) else self.machine.relocator.saved()

    def _record(self, phase: Phase, *, done: bool = True) -> None:
        names, host = self.machine.manager.names, socket.gethostname()
        write_switch(self.root.own_fd, SwitchRecord(self.since, self.wish.run_id, host, phase, names, done=done))

    def _stop(self) -> None:
        stop_proven(self.machine.manager, self.wish.nobody_writes, journal=self.journal)

    def _sync(self) -> None:
        with self.journal.step("last sync of the warm copies"):
            why = self.wish.last_sync()
        if why is not None:
            self.notes.append(f"the warm copies were not synced after the stop: {why}")

    def _restore(self) -> None:
        wish = replace(self.wish.restore, service_stopped=PROVEN)
        with self.wish.limited() as remaining:
            report = restore(self.find, wish, journal=self.journal, remaining=remaining, locked=self.root)
        failure = report.failure
        refused = [row for row in report.rows if row.result is Result.REFUSED]
        if failure is not None and (refused or not any(row.result in _DONE for row in report.rows)):
            raise Refused(failure.message, kind=failure.kind, hint=failure.hint)
        self.restored = report
        self.undoing.keep(companies=[row.company for row in report.rows if row.result in _DONE])

    def _set_flags(self) -> None:
        fallback = self.machine.fallback
        with self.journal.step("set the flags"):
            if "env_lines" not in self.before:
                self.undoing.keep(env_lines=env_file.lines_of(fallback.env_file, fallback.flags))
            env_file.set_variables(fallback.env_file, fallback.flags)

    def _move(self) -> None:
        with self.journal.step("move the services to the fallback code"):
            self.machine.relocator.there(self.before["definitions"].encode())

    def _left_stopped(self) -> Report:
        return self._report(
            None,
            "everything is in place, and the services are stopped: their start makes the folders the truth",
            next_lines=[
                *services.typed(self.machine.manager, "start"),
                "opsctl sessions restore --switch    # or this line instead: starts them, and waits for WhatsApp",
                "opsctl sessions failback            # or back to PostgreSQL",
            ],
        )

    # From the start on.

    def go_on(self, record: SwitchRecord) -> Report:
        """The services are to run on the folders: see to it that they do, and that they are connected."""
        self.since = record.since
        if self.wish.skip_restart:
            raise Refused(f"the switch is done up to here: {record.phase}", hint="opsctl switch status")
        found = services.status(self.machine.manager)
        _require_known(found)
        elsewhere = _not_on_fallback(self.machine, found)
        if elsewhere:
            raise Refused(
                f"{elsewhere}, while the folders own the sessions: stop it before more is lost",
                kind="two-owners",
                hint=services.typed(self.machine.manager, "stop")[0],
            )
        self.notes.append(f"the switch of {self.since} was {record.phase}; nothing was restored again")
        if all(service.state is State.RUNNING for service in found):
            self._record(Phase.SWITCHED)
            return self._connect(LogMark.of_kept(self.before.get("mark")))
        fallback_code.require_prepared(self.machine.fallback)
        if "definitions" in self.before:
            self._move()
        return self._start_and_connect()

    def _start_and_connect(self) -> Report:
        manager = self.machine.manager
        mark = services.mark_logs(services.status(manager))
        self.undoing.keep(mark=mark.kept())
        self._record(Phase.STARTING, done=False)
        environment = self.machine.relocator.start_environment(fallback=True)
        try:
            with self.journal.step("start the services on the folders"):
                found = services.start(manager, environment=environment)
        except OpsctlError as error:
            return self._down(error.message, error.hint)
        elsewhere = _not_on_fallback(self.machine, found)
        if elsewhere:
            return self._down(f"{elsewhere} after its start", services.typed(manager, "stop")[0])
        self._record(Phase.SWITCHED)
        return self._connect(mark)

    def _down(self, what: str, hint: str | None) -> Report:
        failure = Failure("not-started", f"{what}; the sessions belong to the folders now", hint)
        again = ["opsctl sessions restore --switch    # when it is mended: starts it, and waits for WhatsApp"]
        return self._report(None, "the folders own the sessions, and no service runs on them", failure, again)

    def _connect(self, mark: LogMark) -> Report:
        companies = self.before.get("companies") or []
        found = wait_connected(self.machine.manager, mark, companies, self.machine.settings, journal=self.journal)
        failure = connection_failure(found)
        summary = (
            f"switched: {len(found.seconds)} of {len(found.companies)} companies are connected, on the folders in "
            f"{self.root.path}"
        )
        return self._report(found, summary, failure, ["opsctl switch status"])

    def _report(
        self,
        found: Connections | None,
        summary: str,
        failure: Failure | None = None,
        next_lines: Sequence[str] = (),
    ) -> Report:
        seconds = found.seconds if found else {}
        if self.restored is not None:
            rows = [
                SwitchRow(
                    company=row.company,
                    restored=row.result,
                    keys=row.keys,
                    source=row.source,
                    rpo_s=row.rpo_s,
                    copy=row.copy_in_a_word,
                    connected_s=seconds.get(row.company),
                    warnings=row.warnings,
                    reason=row.reason,
                )
                for row in self.restored.rows
            ]
        else:
            names = self.before.get("companies") or []
            rows = [SwitchRow(company, "in place", connected_s=seconds.get(company)) for company in names]
        restored = self.restored
        lost = restored.failure if restored else None
        missing = list(restored.companies if restored and lost else ()) + (found.missing if found else [])
        exit_code = HalfDone.exit_code if lost or (failure and failure.kind != "undecryptable") else 0
        if exit_code == 0 and failure is not None:
            exit_code = 1
        connected = found is not None and not missing and failure is None
        return Report(
            summary=summary,
            rows=rows,
            columns=_COLUMNS,
            facts={
                **(restored.facts if restored else {}),
                **fallback_code.facts_of(self.machine.fallback),
                "owner": "folders",
                "since": self.since,
                "services": list(self.machine.manager.names),
                "watched_s": found.watched_s if found else None,
            },
            notes=[*self.notes, *(restored.notes if restored else ())],
            warnings=list(restored.warnings) if restored else [],
            details=list(restored.details) if restored else [],
            next_lines=[*next_lines, *_WAY_BACK],
            exit_code=exit_code,
            failure=_both(lost, failure),
            rto_scope="connected" if found else "files",
            rto_met=True if connected else False if missing or failure else None,
            rto_reached_at=found.reached_at if found else None,
            companies=missing,
        )


def stop_proven(manager: Manager, nobody_writes: Callable[[], bool], *, journal: Journal) -> None:
    """Stop every service, and prove that nobody else writes. Raises `Refused`, `HalfDone`."""
    with journal.step("stop the services"):
        services.stop(manager)
    with journal.step("prove that nobody writes"):
        if not nobody_writes():
            raise somebody_writes()


def undo_switch(
    machine: Machinery,
    root: SessionsRoot,
    before: dict[str, Any],
    record: SwitchRecord,
    wish: FailbackWish,
    *,
    journal: Journal,
) -> Report:
    """Undo what a switch did that was killed before its start. Raises `HalfDone`."""
    root.recover()
    _Undoing(machine, root, journal, wish.environment, before).everything("the way back")
    running = ", ".join(before.get("running", ())) or "no service"
    return Report(
        summary=f"the switch that was left while {record.phase} is undone; on the database as before: {running}",
        facts={"owner": "database", "undone_run": record.run_id},
        next_lines=["opsctl switch status"],
    )


_WAY_BACK = ("# when PostgreSQL is back:", "opsctl sessions failback --dry-run")


def _both(first: Failure | None, second: Failure | None) -> Failure | None:
    if first is None or second is None:
        return first or second
    return replace(second, message=f"{second.message}; {first.message}")


def _not_on_fallback(machine: Machinery, found: Sequence[Service]) -> str | None:
    """The first process that does not run the fallback code with the flags; None where all do, or none can be seen."""
    move = machine.fallback.move
    for process in relocation.running(found, move.flags):
        if process.folder is not None and not process.is_fallback(move):
            wrong = [f"{name}={value}" for name, value in process.flags.items() if value != move.flags[name]]
            return f"{process.name} runs in {process.folder}" + (f" with {', '.join(wrong)}" if wrong else "")
    return None
