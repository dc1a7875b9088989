"""`opsctl standby ...`: the warm copy of every company's sessions."""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli import doors
from opsctl.cli.frame import Companies, DryRun, Group, Invocation, command
from opsctl.report import Report

if TYPE_CHECKING:
    from opsctl.stores.standby import Standby

app = typer.Typer(cls=Group, help="A warm copy of every session that never mirrors the disaster.")


@command(
    app,
    "sync",
    deadline_s=None,
    examples=(
        "opsctl standby sync --quiet              for cron, each minute",
        "opsctl standby sync --full               read everything again",
        "opsctl standby sync --accept 962302      what happened to it was meant",
        "opsctl standby sync --accept @all        the server was replaced, and is right",
    ),
)
def sync(
    ctx: typer.Context,
    company: Companies = None,
    full: Annotated[bool, typer.Option("--full", help="Read every row, not only those that changed.")] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", metavar="ID", help="Copy this held company as it is now; @all: every one."),
    ] = None,
    dry_run: DryRun = False,
) -> Report:
    """Bring the warm copy of every session up to date.

    A company that vanished, lost its identity or many keys, or went back in time is held: its copy stays as it was,
    and the exit code is 1, until --accept. While a switch is on record the live folders are copied.
    """
    from opsctl.operations.standby import SyncWish, live_sessions, preview_sync, sync_standby

    run: Invocation = ctx.obj
    settings = run.settings
    now = datetime.now(UTC)
    wish = SyncWish(
        run_id=run.run_id,
        keep=timedelta(hours=settings["STANDBY_KEEP_HOURS"]),
        retention=timedelta(days=settings["DB_CLEANUP_RETENTION_DAYS"]),
        companies=tuple(company or ()),
        accept=tuple(accept or ()),
        full=full,
    )
    open_live = partial(live_sessions, run.database(), doors.sessions_dir_if_set(run), now=now)
    if dry_run:
        return preview_sync(open_live, _standby(run), wish, journal=run.journal, now=now)
    return sync_standby(open_live, _standby(run), wish, journal=run.journal, now=now)


@command(
    app,
    "status",
    examples=(
        "opsctl standby status                    what a restore from here would lose",
        "opsctl standby status --quiet            for cron: silent while all is well",
        "opsctl standby status --company 962302 --json",
    ),
)
def status(ctx: typer.Context, company: Companies = None) -> Report:
    """How old is the warm copy? Exit code 1 where one is older than STANDBY_MAX_AGE_SECONDS, held or damaged."""
    from opsctl.operations.standby import standby_status

    run: Invocation = ctx.obj
    max_age = timedelta(seconds=run.settings["STANDBY_MAX_AGE_SECONDS"])
    return standby_status(_standby(run), companies=tuple(company or ()), max_age=max_age, now=datetime.now(UTC))


def _standby(run: Invocation) -> "Standby":
    """The warm copies, those that are ready to be published owned as the sessions are."""
    from opsctl.stores.publishing import Owner
    from opsctl.stores.standby import Standby

    sessions_dir = doors.sessions_dir_if_set(run)
    owner = doors.owner(run, None, sessions_dir) if sessions_dir else Owner.current()
    return Standby(run.settings.standby_dir, run.settings.environment, owner)
