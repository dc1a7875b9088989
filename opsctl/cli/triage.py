"""`opsctl triage`: what is broken, which runbook, the exact next line."""

from datetime import UTC, datetime

import typer

from opsctl.cli.frame import Group, Invocation, command, seconds_since_start
from opsctl.report import Report

app = typer.Typer(cls=Group)

DEADLINE_S = 5.0


# Whoever acts on the answer is reported; the answer itself does not wait for an alert to be delivered.
@command(
    app,
    "triage",
    deadline_s=DEADLINE_S,
    reports_failures=False,
    examples=(
        "opsctl triage                       one verdict, its evidence, the next line",
        "opsctl triage --verbose             everything it looked at",
        "opsctl triage --json | jq -r .facts.verdict",
    ),
)
def triage(ctx: typer.Context) -> Report:
    """What is broken, which runbook, the exact next line; within 5 seconds, with or without the database."""
    from opsctl.operations.triage import triage as look_and_decide

    run: Invocation = ctx.obj
    # From the process's start: on a machine in trouble, starting takes its share of the five seconds.
    left_s = (run.deadline.seconds or DEADLINE_S) - seconds_since_start()
    return look_and_decide(run.settings, seconds=left_s, everything=run.verbose or run.json, now=datetime.now(UTC))
