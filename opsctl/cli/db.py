"""`opsctl db ...`: the database itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.frame import Group, Invocation, command
from opsctl.report import Report

if TYPE_CHECKING:
    from collections.abc import Collection

    from opsctl.operations import health_checks

EVERY_S = 10.0

app = typer.Typer(cls=Group, help="The database itself: is it well?")


@command(
    app,
    "health",
    deadline_s=None,
    examples=(
        "opsctl db health                        every check, with what to do",
        "opsctl db health --only sessions --only auth",
        "opsctl db health --watch --every 5",
        "opsctl db health --watch --json | jq .facts.worst",
        "opsctl db health --nagios               one line, exit code 0/1/2/3",
        "opsctl db health --quiet --prometheus /var/lib/node_exporter/opsctl.prom",
    ),
)
def health(
    ctx: typer.Context,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="GROUP", help="reach, sessions, storage, replication, tls or auth; may be given again."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C or --deadline.")] = False,
    every: Annotated[
        float | None, typer.Option("--every", metavar="SECONDS", min=0.2, help="How often to look (10).")
    ] = None,
    nagios: Annotated[
        bool, typer.Option("--nagios", help="One line with performance data; exit codes 0, 1, 2, 3.")
    ] = False,
    prometheus: Annotated[
        Path | None, typer.Option("--prometheus", metavar="FILE", help="Also write FILE for the textfile collector.")
    ] = None,
) -> Report:
    """Is the database well? Every check with its threshold, how near it is, and what to do.

    Reads only, 2 s per statement and 5 s in all, whatever the server does. 0: well, or only warnings. 1: something is
    critical, or could not be asked. 4: no answer.
    """
    from opsctl.cli.watch import watched
    from opsctl.errors import UsageError
    from opsctl.operations.health import Trends, examine, report

    run: Invocation = ctx.obj
    groups = _groups(only or [])
    trends = Trends()
    if nagios and (watch or run.json):
        raise UsageError("--nagios is one line for one look", hint="leave out --watch and --json")

    def look() -> Report:
        seen = trends.added(examine(run.settings, only=groups))
        if prometheus is not None:
            from opsctl.operations.monitoring import write_metrics

            write_metrics(seen, prometheus)
        if nagios:
            from dataclasses import replace

            from opsctl.operations.monitoring import plugin

            return replace(report(seen), plugin=plugin(seen))
        return report(seen)

    return watched(run, look, every_s=every or EVERY_S) if watch else look()


def _groups(names: list[str]) -> "Collection[health_checks.Group]":
    from opsctl.errors import UsageError
    from opsctl.operations.health_checks import Group as CheckGroup

    unknown = [name for name in names if name not in list(CheckGroup)]
    if unknown:
        known = ", ".join(CheckGroup)
        raise UsageError(f"--only: there is no group {', '.join(map(ascii, unknown))}", hint=f"one of {known}")
    return [CheckGroup(name) for name in names]
