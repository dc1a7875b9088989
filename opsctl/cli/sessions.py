"""`opsctl sessions ...`: Baileys session folders."""

from contextlib import suppress
from dataclasses import replace as replace_fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli import doors
from opsctl.cli.frame import EMERGENCY_DEADLINE_S, Companies, DryRun, Group, Invocation, Since, Yes, command
from opsctl.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from opsctl.operations.restore import Wish
    from opsctl.operations.sources import Found
    from opsctl.stores.publishing import Owner

app = typer.Typer(cls=Group, help="Baileys session folders: restore, verify, list, undo.")

To = Annotated[
    Path | None, typer.Option("--to", metavar="DIR", help="The sessions folder. Else SESSIONS_DIR, else APP_DIR/...")
]


From = Annotated[
    Path | None, typer.Option("--from", metavar="DIR", help="The sessions folder. Else SESSIONS_DIR, else APP_DIR/...")
]
ServiceStopped = Annotated[
    bool, typer.Option("--service-stopped", help="My word: the service is stopped. Needed without SERVICE_MANAGER.")
]
AcceptLiveService = Annotated[
    bool, typer.Option("--accept-live-service", help="Go on although the service is not proven stopped.")
]


class Prefer(StrEnum):
    """Whose value counts."""

    FILES = "files"
    DATABASE = "database"


class RepairFrom(StrEnum):
    """Which copy rows are put back from."""

    STANDBY = "standby"
    ARCHIVE = "archive"
    FOLDER = "folder"


class RestoreSource(StrEnum):
    """Where sessions can be restored from."""

    AUTO = "auto"
    DATABASE = "database"
    REPLICA = "replica"
    STANDBY = "standby"
    CACHE = "cache"


class Against(StrEnum):
    """What folders can be held against."""

    DATABASE = "database"


@command(
    app,
    "restore",
    emergency=True,
    examples=(
        "opsctl sessions restore --service-stopped     everything, freshly",
        "opsctl sessions restore --switch --yes        and the service runs on it, connected",
        "opsctl sessions restore --dry-run             what would happen",
        "opsctl sessions restore --company 962302 --to /srv/sessions",
        "opsctl sessions restore --service-stopped --discard-changes --yes --json",
    ),
)
def restore(
    ctx: typer.Context,
    to: To = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="USER", help="Whose files they are. Else the owner of APP_DIR.")
    ] = None,
    company: Companies = None,
    source: Annotated[RestoreSource, typer.Option("--source", help="Where to restore from.")] = RestoreSource.AUTO,
    generation: Annotated[
        str | None,
        typer.Option("--generation", metavar="N", help="From this generation of the standby (opsctl standby status)."),
    ] = None,
    service_stopped: Annotated[
        bool, typer.Option("--service-stopped", help="My word: the service was stopped before this. The copy is fresh.")
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Leave out what a stale copy must not hold: sessions, own sender keys.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Set aside folders that are not opsctl's; asks first.")
    ] = False,
    discard_changes: Annotated[
        bool, typer.Option("--discard-changes", help="Set aside folders written since they were restored; asks first.")
    ] = False,
    accept_damaged: Annotated[
        bool, typer.Option("--accept-damaged", help="Publish companies whose credentials cannot log in.")
    ] = False,
    accept_live_service: AcceptLiveService = False,
    switch: Annotated[
        bool, typer.Option("--switch", help="Stop the services, and start them on the folders; asks first.")
    ] = False,
    skip_restart: Annotated[
        bool, typer.Option("--skip-restart", help="With --switch: leave the services stopped, and say how they start.")
    ] = False,
    since: Since = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Bring every session folder back from the best source left, and prove it.

    Reads one snapshot, writes all folders beside the ones in place and reads every file back, syncs, and only then
    exchanges them, company by company. Killed at any instant, each folder is the old one or the new one, whole.
    """
    from opsctl.errors import UsageError
    from opsctl.operations.restore import Wish, preview_restore
    from opsctl.operations.restore import restore as restore_sessions
    from opsctl.operations.single_owner import how_stopped

    run: Invocation = ctx.obj
    target = doors.sessions_dir(run, to, "--to DIR")
    if skip_restart and not switch:
        raise UsageError("--skip-restart is of --switch", hint="without --switch no service is touched")
    wish = Wish(
        target=target,
        owner=doors.owner(run, owner, target),
        environment=run.settings.environment,
        run_id=run.run_id,
        companies=tuple(company or ()),
        service_stopped="operator" if service_stopped else "",
        drop_stale=stale,
        replace_foreign=replace,
        discard_changes=discard_changes,
        accept_damaged=accept_damaged,
    )
    find = _sources(run, source, generation, wish.owner)
    if switch:
        return _switch(run, find, wish, skip_restart=skip_restart, dry_run=dry_run)
    if dry_run:
        return preview_restore(find, wish, journal=run.journal, remaining=run.deadline.remaining)
    if replace or discard_changes:
        run.confirm(f"Set aside what stands in {target} and restore over it?")
    stopped = how_stopped(
        run.settings, doors.short_connection(run), operators_word=service_stopped, accept_live=accept_live_service
    )
    wish = replace_fields(wish, service_stopped=stopped)
    return restore_sessions(find, wish, journal=run.journal, remaining=run.deadline.remaining)


def _switch(
    run: Invocation,
    find: "Callable[[], AbstractContextManager[Found]]",
    wish: "Wish",
    *,
    skip_restart: bool,
    dry_run: bool,
) -> Report:
    """`restore --switch`: --deadline is then of the restore; the other steps have limits of their own."""
    from opsctl.errors import UsageError
    from opsctl.operations.last_sync import last_sync
    from opsctl.operations.single_owner import nobody_writes
    from opsctl.operations.switch import SwitchWish, machinery, preview_switch, switch_over

    if wish.target != run.settings.sessions_dir:
        raise UsageError(f"the service reads {run.settings.sessions_dir}", hint="leave --to out, or set SESSIONS_DIR")
    seconds = run.deadline.seconds or EMERGENCY_DEADLINE_S
    machine = machinery(run.settings)
    run.deadline.lift()
    switching = SwitchWish(
        restore=wish,
        skip_restart=skip_restart,
        nobody_writes=lambda: nobody_writes(doors.short_connection(run)),
        last_sync=lambda: last_sync(run.settings, wish.owner, run_id=run.run_id),
        limited=lambda: run.deadline.limited(seconds),
    )
    if dry_run:
        return preview_switch(machine, find, switching, journal=run.journal)
    run.confirm(f"Stop {', '.join(machine.manager.names)}, restore, and start on the folders in {wish.target}?")
    return switch_over(machine, find, switching, journal=run.journal)


@command(
    app,
    "failback",
    emergency=True,
    examples=(
        "opsctl sessions failback --dry-run                 what would change, and why",
        "opsctl sessions failback --service-stopped --yes   everything back into PostgreSQL",
        "opsctl sessions failback --undo 20260131T030405Z-0a1b2c --service-stopped --yes",
    ),
)
def failback(
    ctx: typer.Context,
    source: From = None,
    company: Companies = None,
    prefer: Annotated[
        Prefer | None, typer.Option("--prefer", help="Whose value counts where both were written since the restore.")
    ] = None,
    new_identity: Annotated[
        list[str] | None,
        typer.Option("--new-identity", metavar="ID", help="This company was paired anew; may be given again."),
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Also folders without a manifest of opsctl's; deletes nothing.")
    ] = False,
    undo: Annotated[
        str | None, typer.Option("--undo", metavar="RUN", help="Put the rows back that this failback changed.")
    ] = None,
    service_stopped: ServiceStopped = False,
    accept_live_service: AcceptLiveService = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Bring the folders back into PostgreSQL, and prove it.

    Holds each file against its row and against what was published. Planned for every company before any row is
    written; each company is one transaction, archived first and read back before it commits. Where a switch is on
    record the services are stopped for it, and started on PostgreSQL again, as they were.
    """
    from opsctl.baileys.buffers import StoredForm
    from opsctl.operations import failback as failing_back
    from opsctl.operations.failback_undo import UndoWish, preview_undo, undo_failback
    from opsctl.operations.single_owner import nobody_writes, require_stopped
    from opsctl.operations.switch_back import WayBack, machinery_of_record, switch_back
    from opsctl.operations.three_way import Prefer as Preferred

    run: Invocation = ctx.obj
    folders = doors.sessions_dir(run, source, "--from DIR")
    database, connection = run.database(), doors.connection(run)
    wish = failing_back.FailbackWish(
        source=folders,
        environment=run.settings.environment,
        companies=tuple(company or ()),
        prefer=Preferred(prefer) if prefer else None,
        new_identities=frozenset(new_identity or ()),
        adopt=adopt,
        form=StoredForm(stored) if (stored := run.settings["STORED_FORM"]) else None,
        archiving=doors.archiving(run),
    )
    undo_wish = UndoWish(undo or "", folders, wish.companies, wish.environment, run.settings.state_dir)
    if dry_run:
        if undo:
            return preview_undo(connection, undo_wish, journal=run.journal)
        return failing_back.preview_failback(database, wish, journal=run.journal)
    if not undo and (machine := machinery_of_record(run.settings, folders)):
        seconds = run.deadline.seconds or EMERGENCY_DEADLINE_S
        run.deadline.lift()
        way_back = WayBack(
            wish=wish,
            open_snapshot=database,
            open_connection=connection,
            nobody_writes=lambda: nobody_writes(doors.short_connection(run)),
            limited=lambda: run.deadline.limited(seconds),
            confirm=run.confirm,
        )
        return switch_back(machine, way_back, journal=run.journal)
    require_stopped(run.settings, connection, operators_word=service_stopped, accept_live=accept_live_service)
    if undo:
        run.confirm(f"Put the rows back that failback {undo} changed?")
        return undo_failback(connection, undo_wish, journal=run.journal)
    with failing_back.planned_failback(database, wish, journal=run.journal) as plan:
        if plan.writes:
            run.confirm(plan.question)
        report = plan.write(connection, journal=run.journal, remaining=run.deadline.remaining)
        plan.settle_switch()
        return report


@command(
    app,
    "repair",
    emergency=True,
    examples=(
        "opsctl sessions repair --company 962302 --from standby --dry-run",
        "opsctl sessions repair --company 962302 --from archive --missing-only --service-stopped --yes",
    ),
)
def repair(
    ctx: typer.Context,
    company: Annotated[list[str], typer.Option("--company", metavar="ID", help="Which company; may be given again.")],
    source: Annotated[RepairFrom, typer.Option("--from", help="Which copy the rows come from.")],
    folders: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="The folder for --from folder. Else SESSIONS_DIR."),
    ] = None,
    missing_only: Annotated[
        bool, typer.Option("--missing-only", help="Leave damaged rows alone; only put missing ones back.")
    ] = False,
    service_stopped: ServiceStopped = False,
    accept_live_service: AcceptLiveService = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Put missing or damaged rows back into a healthy PostgreSQL.

    A healthy row is never replaced. Sessions and own sender-keys are left out: an old one loses messages, a missing one
    heals.
    """
    from opsctl.baileys.buffers import StoredForm
    from opsctl.operations.repair import RepairSource, RepairWish, plan_repair
    from opsctl.operations.single_owner import require_stopped
    from opsctl.stores.standby import Standby
    from opsctl.stores.switch_record import refuse_while_switched

    run: Invocation = ctx.obj
    settings = run.settings
    refuse_while_switched(settings, "sessions repair")
    wish = RepairWish(
        companies=tuple(company),
        source=RepairSource(source),
        missing_only=missing_only,
        folders=folders.absolute() if folders else doors.sessions_dir_if_set(run),
        standby=Standby(settings.standby_dir, settings.environment),
        archiving=doors.archiving(run),
        form=StoredForm(stored) if (stored := settings["STORED_FORM"]) else None,
    )
    if not dry_run:
        require_stopped(
            settings, doors.connection(run), operators_word=service_stopped, accept_live=accept_live_service
        )
    plan = plan_repair(run.database(), wish, journal=run.journal)
    if dry_run:
        return plan.preview()
    if plan.writes:
        run.confirm(plan.question)
    return plan.write(doors.connection(run), journal=run.journal)


@command(
    app,
    "undo",
    emergency=True,
    examples=(
        "opsctl sessions undo --dry-run      which folders would be exchanged",
        "opsctl sessions undo --yes          the last restore; again: redone",
        "opsctl sessions undo --company 962302 --yes",
    ),
)
def undo(
    ctx: typer.Context,
    to: To = None,
    run_id: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Undo this restore, not the last.")] = None,
    company: Companies = None,
    discard_changes: Annotated[
        bool, typer.Option("--discard-changes", help="Also folders that were written since they were restored.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Exchange the published folders with the ones that the last restore set aside."""
    from opsctl.operations.undo import UndoWish, preview_undo, undo_restore
    from opsctl.stores.publishing import Owner

    run: Invocation = ctx.obj
    target = doors.sessions_dir(run, to, "--to DIR")
    wish = UndoWish(run_id, tuple(company or ()), discard_changes, run.settings.environment)
    owner = Owner.current()
    with suppress(OSError):  # what is wrong with it is for the exchange to say
        owner = Owner.of(target)
    if dry_run:
        return preview_undo(target, owner, wish)
    run.confirm(f"Exchange the folders in {target} with the ones set aside?")
    with run.journal.step("exchange"):
        return undo_restore(target, owner, wish, this_run=run.run_id)


@command(
    app,
    "verify",
    examples=(
        "opsctl sessions verify /srv/sessions          every company below it",
        "opsctl sessions verify /srv/sessions/company_962302",
        "opsctl sessions verify /srv/sessions --against database",
    ),
)
def verify(
    ctx: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A sessions folder or one company's. Else SESSIONS_DIR."),
    ] = None,
    company: Companies = None,
    against: Annotated[
        Against | None, typer.Option("--against", help="Also compare every file with its row in the database.")
    ] = None,
) -> Report:
    """Will these sessions load and log in? Offline, every file and every key pair.

    What no check here can prove is that WhatsApp has not removed the device.
    """
    from opsctl.operations.verify import verify_against, verify_folders

    run: Invocation = ctx.obj
    target = doors.sessions_dir(run, folder, "DIR")
    companies = tuple(company or ())
    if against is None:
        return verify_folders(target, companies=companies, journal=run.journal)
    return verify_against(run.database(), target, companies=companies, journal=run.journal)


@command(
    app,
    "list",
    examples=(
        "opsctl sessions list      every company, in the database and as folders",
        "opsctl sessions list --company 962302 --json",
    ),
)
def list_(ctx: typer.Context, to: To = None, company: Companies = None) -> Report:
    """Per company: keys by type, the newest change, which sources hold it and how old they are."""
    from opsctl.operations.inventory import list_sessions
    from opsctl.stores.standby import Standby

    run: Invocation = ctx.obj
    target = doors.sessions_dir(run, to, "--to DIR")
    standby = Standby(run.settings.standby_dir, run.settings.environment)
    return list_sessions(run.database(), target, standby=standby, companies=tuple(company or ()), journal=run.journal)


def _sources(
    run: Invocation, wanted: RestoreSource, generation: str | None, owner: "Owner"
) -> "Callable[[], AbstractContextManager[Found]]":
    """Asks every source that is configured and wanted, when called."""
    from opsctl import db
    from opsctl.errors import SettingsError, UsageError
    from opsctl.operations.sources import Kind, Places, found
    from opsctl.stores.standby import Standby

    if generation is not None and wanted is RestoreSource.AUTO:
        wanted = RestoreSource.STANDBY
    if generation is not None and wanted is not RestoreSource.STANDBY:
        raise UsageError("--generation is of the standby", hint="leave --source out, or say --source standby")
    settings, anything = run.settings, wanted is RestoreSource.AUTO
    places = Places(only=None if anything else Kind(wanted.value), generation=generation)
    if anything or wanted is RestoreSource.DATABASE:
        try:
            places = replace_fields(places, database=db.each_host(db.address(settings)))
        except SettingsError as error:
            places = replace_fields(places, database_problem=error)
    if anything or wanted is RestoreSource.REPLICA:
        replica = db.replica_address(settings)
        if replica is None and not anything:
            raise SettingsError("OPSCTL_REPLICA_URL is not set", hint="opsctl config show")
        places = replace_fields(places, replica=db.each_host(replica) if replica else ())
    if anything or wanted in {RestoreSource.STANDBY, RestoreSource.CACHE}:
        places = replace_fields(places, standby=Standby(settings.standby_dir, settings.environment, owner))
    if wanted is RestoreSource.CACHE or (anything and (settings["CREDENTIALS_CACHE_FILE"] or settings["APP_DIR"])):
        places = replace_fields(places, cache=settings.cache_file)
    return lambda: found(places, remaining=run.deadline.remaining)
