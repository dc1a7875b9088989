"""The `opsctl config` commands."""

import typer

from opsctl.cli.frame import Group, Invocation, command
from opsctl.report import Report

app = typer.Typer(cls=Group, help="Effective settings and whether this installation is ready.")


@command(
    app,
    "show",
    needs_settings=False,
    reports_failures=False,
    examples=(
        "opsctl config show                  what is set, and where",
        "opsctl config show --verbose        and what each variable means",
        "opsctl config show --json | jq '.rows[] | select(.problem)'",
    ),
)
def show(ctx: typer.Context) -> Report:
    """Every setting with its value and origin; secrets are masked, and what makes no sense is named (exit 3)."""
    from opsctl.operations import configuration

    run: Invocation = ctx.obj
    return configuration.show(run.raw_settings, with_meanings=run.verbose)


@command(
    app,
    "check",
    needs_settings=False,
    examples=(
        "opsctl config check                 before the night, not in it",
        "opsctl config check --quiet         for cron: silent while all is well",
    ),
)
def check(ctx: typer.Context) -> Report:
    """Could a restore begin here? Settings, folders, users, space, addresses, jobs. Connects to nothing."""
    from opsctl.operations import configuration

    run: Invocation = ctx.obj
    return configuration.check(run.raw_settings)
