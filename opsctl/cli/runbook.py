"""`opsctl runbook ...`: the pages for the night."""

from pathlib import Path
from typing import Annotated

import typer

from opsctl.cli.frame import Group, command
from opsctl.report import Report

app = typer.Typer(cls=Group, help="The pages for the night: list, show; check any page against this opsctl.")


def _names(incomplete: str) -> list[str]:
    from opsctl.operations.runbooks import pages

    return [page.name for page in pages() if page.name.startswith(incomplete)]


@command(
    app,
    "list",
    needs_settings=False,
    reports_failures=False,
    examples=("opsctl runbook list      every page, and what it is for",),
)
def list_(ctx: typer.Context) -> Report:
    """Every page, and what it is for."""
    from opsctl.operations.runbooks import list_pages

    return list_pages()


@command(
    app,
    "show",
    needs_settings=False,
    reports_failures=False,
    examples=(
        "opsctl runbook show first-five-minutes     begin here",
        "opsctl runbook show 1                      PostgreSQL unreachable",
        "opsctl runbook show 1#preflight            one section of it",
        "opsctl runbook show runbooks/1-postgresql-unreachable.md#preflight     as an alert names it",
    ),
)
def show(
    ctx: typer.Context,
    page: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Its name or number, with #SECTION if you like.", autocompletion=_names),
    ],
) -> Report:
    """One page, as it is in this version of opsctl."""
    from opsctl.operations.runbooks import show_page

    return show_page(page)


@command(
    app,
    "check",
    needs_settings=False,
    reports_failures=False,
    examples=(
        "opsctl runbook check                       the pages of opsctl",
        "opsctl runbook check docs/*.md wiki/on-call.md",
    ),
)
def check(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Markdown of yours. Else opsctl's own pages.")
    ] = None,
) -> Report:
    """Are the opsctl lines of these pages lines that this opsctl takes? Commands, flags, values, exit codes; offline.

    1 where one is not. A comment under a line says how it ends: # exit 4, "text that it prints"
    """
    from opsctl.cli import tree
    from opsctl.operations.runbooks import Installed, check_pages

    return check_pages(files or (), Installed(tree.problem, tree.exit_codes, tree.flags()))
