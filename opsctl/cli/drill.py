"""`opsctl drill ...`: a whole disaster, rehearsed."""

from pathlib import Path
from typing import Annotated

import typer

from opsctl.cli.frame import Group, Invocation, command
from opsctl.operations.faults import Fault
from opsctl.report import Report

app = typer.Typer(cls=Group, help="A whole disaster, rehearsed on an embedded PostgreSQL.")


@command(
    app,
    "run",
    deadline_s=None,
    reports_failures=False,
    needs_settings=False,
    examples=(
        "opsctl drill run                              20 companies x 2,317 keys",
        "opsctl drill run --companies 3 --keys 200     a quick one",
        "opsctl drill run --fault frozen               the server answers nobody: from the standby",
        "opsctl drill run --full --companies 3         there and back, with PM2 and Baileys",
        "opsctl drill run --json",
    ),
)
def run(
    ctx: typer.Context,
    companies: Annotated[int, typer.Option("--companies", min=1, max=1000, help="How many companies.")] = 20,
    keys: Annotated[int, typer.Option("--keys", min=40, max=100_000, help="How many keys each.")] = 2317,
    seed: Annotated[int, typer.Option("--seed", help="The same seed makes the same fleet and the same faults.")] = 1,
    fault: Annotated[
        Fault | None, typer.Option("--fault", help="Let the database fail in this way, and restore from what is left.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Switch a service on real Baileys under PM2, and back. Needs node, npm, git.")
    ] = False,
    packages: Annotated[
        Path | None,
        typer.Option("--packages", metavar="DIR", help="With --full: take Baileys and PM2 from DIR/node_modules."),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", metavar="DIR", help="Where to make and remove everything. Else TMPDIR.")
    ] = None,
) -> Report:
    """Seed, break, kill a restore half-way, restore, verify and measure; never touches your database or folders.

    It measures the restore of the files. What it cannot measure, it says.
    """
    from opsctl.errors import UsageError
    from opsctl.operations.drill import run_drill
    from opsctl.operations.drill_full import run_full_drill

    invocation: Invocation = ctx.obj
    if full and fault is not None:
        raise UsageError("--full has an outage of its own", hint="leave --fault out")
    if packages is not None and not full:
        raise UsageError("--packages is of --full", hint="add --full")
    if full:
        return run_full_drill(companies=companies, scratch=scratch, packages=packages, journal=invocation.journal)
    return run_drill(
        companies=companies, keys=keys, seed=seed, fault=fault, scratch=scratch, journal=invocation.journal
    )


@command(
    app, "history", needs_settings=False, examples=("opsctl drill history", "opsctl drill history --last 5 --json")
)
def history(
    ctx: typer.Context,
    last: Annotated[int, typer.Option("--last", min=1, help="How many drills.")] = 20,
) -> Report:
    """How the measured RTO developed, drill by drill."""
    from opsctl.operations.drill import drill_history
    from opsctl.state import State

    invocation: Invocation = ctx.obj
    state = State(invocation.raw_settings.state_dir)
    state.require_readable("history")
    return drill_history(state.entries("history"), last=last)
