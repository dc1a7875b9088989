"""`opsctl selftest ...`: what opsctl proves of itself."""

from pathlib import Path
from typing import Annotated

import typer

from opsctl.cli.frame import Group, Invocation, command
from opsctl.report import Report

app = typer.Typer(cls=Group, help="What opsctl proves of itself, on this machine.")


@command(
    app,
    "leaks",
    deadline_s=None,
    reports_failures=False,
    needs_settings=False,
    examples=(
        "opsctl selftest leaks            plant secrets, break everything, search",
        "opsctl selftest leaks --json | jq .facts.leaks",
    ),
)
def leaks(
    ctx: typer.Context,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", metavar="DIR", help="Where to make and remove everything. Else TMPDIR.")
    ] = None,
) -> Report:
    """Does a secret leave? Plants some, runs every command, breaks what it needs, and searches what came out.

    On a PostgreSQL, folders and receivers of its own: stdout, stderr, JSON, history, spool, file names, and what is
    sent to Sentry, Telegram and the dead-man switch. 1 where one is found, or where the search is blind.
    """
    from opsctl.cli.tree import commands
    from opsctl.operations.leaks import look_for_leaks

    run: Invocation = ctx.obj
    names = [name for name, _ in commands() if name != run.command]
    return look_for_leaks(commands=names, scratch=scratch, journal=run.journal)
