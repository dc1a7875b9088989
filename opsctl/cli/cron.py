"""`opsctl cron ...`: what runs by the clock."""

from enum import StrEnum
from typing import Annotated

import typer

from opsctl.cli.frame import Group, Invocation, command
from opsctl.report import Report

app = typer.Typer(cls=Group, help="What runs by the clock: the lines that this installation needs.")


class As(StrEnum):
    """For whom the lines are written."""

    CRONTAB = "crontab"
    SYSTEMD = "systemd"
    PM2 = "pm2"


@app.callback()
def cron() -> None:
    """Keep `show` a command of its own, though it is the only one."""


@command(
    app,
    "show",
    examples=(
        "opsctl cron show                    for the crontab",
        "opsctl cron show --as systemd       a script that installs timers",
        "opsctl cron show --as pm2           an ecosystem file",
        "opsctl cron show --check --quiet    what is missing, disabled, late or in a backup's way",
    ),
)
def show(
    ctx: typer.Context,
    form: Annotated[As, typer.Option("--as", help="For whom the lines are written.")] = As.CRONTAB,
    check: Annotated[
        bool, typer.Option("--check", help="Look at what is installed instead; 1 where something is not in order.")
    ] = False,
) -> Report:
    """The lines that cron needs here: standby each minute, health every five, cleanup daily, a drill each month.

    With PATH, umask, lock and time limit; the cleanup is not put into the minute of a backup. --check reads the
    crontabs, systemd timers and PM2 list of this machine.
    """
    from opsctl.operations import cron as operation

    run: Invocation = ctx.obj
    return operation.check(run.settings) if check else operation.show(run.settings, operation.Form(form))
