"""`opsctl switch ...`: the fallback code, and who owns the sessions."""

import typer

from opsctl.cli.frame import DryRun, Group, Invocation, command
from opsctl.report import Report

app = typer.Typer(cls=Group, help="Who owns the sessions, and the code that runs on folders: prepare, status.")


@command(
    app,
    "prepare",
    deadline_s=None,
    examples=(
        "opsctl switch prepare --dry-run      what is missing",
        "opsctl switch prepare                in peacetime, and after each change of the tag",
    ),
)
def prepare(ctx: typer.Context, dry_run: DryRun = False) -> Report:
    """Make the worktree of EMERGENCY_TAG in FALLBACK_DIR ready to be started, and start it once with the flags.

    The worktree, its dependencies, its env file with SWITCH_FLAGS, and its way to the sessions folder. APP_DIR is only
    read. What is ready is left alone.
    """
    from opsctl.operations.fallback import fallback_of
    from opsctl.operations.fallback import prepare as prepare_fallback
    from opsctl.operations.switch_status import environment_of_services, refuse_while_in_use

    run: Invocation = ctx.obj
    fallback = fallback_of(run.settings)
    refuse_while_in_use(run.settings)
    environment = environment_of_services(run.settings, fallback)
    return prepare_fallback(fallback, environment=environment, journal=run.journal, dry_run=dry_run)


@command(
    app,
    "status",
    examples=("opsctl switch status", "opsctl switch status --json"),
)
def status(ctx: typer.Context) -> Report:
    """Who owns the sessions, since when, what the services run on now, and what to type next.

    Exit code 1 where these do not go together. Needs no database.
    """
    from opsctl.operations.switch_status import switch_status

    run: Invocation = ctx.obj
    return switch_status(run.settings)
