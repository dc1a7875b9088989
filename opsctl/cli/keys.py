"""`opsctl keys ...`: the keys in PostgreSQL: counted, cleaned up, put back, mended."""

from contextlib import suppress
from datetime import timedelta
from enum import StrEnum
from typing import Annotated

import typer

from opsctl.cli import doors
from opsctl.cli.frame import Companies, DryRun, Group, Invocation, Yes, command, seconds
from opsctl.report import Report

app = typer.Typer(cls=Group, help="The keys in PostgreSQL: stats, cleanup, runs, undo, doctor.")

SHORTEST_RETENTION_DAYS, LONGEST_RETENTION_DAYS = 7, 3650
MOST_ROWS = 100_000


class PolicyName(StrEnum):
    """Which keys a cleanup may delete."""

    SAFE = "safe"
    ALL = "all"


def _ratio(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (ratio := float(text)) <= 100:  # which nan is not
            return ratio
    raise typer.BadParameter(f"{text!r} is not a number from 0 to 100")


@command(
    app,
    "cleanup",
    deadline_s=None,
    examples=(
        "opsctl keys cleanup --dry-run          what would be deleted",
        "opsctl keys cleanup --explain          which types may go, when, and what that costs",
        "opsctl keys cleanup --yes --quiet      for cron",
        "opsctl keys cleanup --type sender-key --retention-days 90 --company 962302",
    ),
)
def cleanup(
    ctx: typer.Context,
    retention_days: Annotated[
        int | None,
        typer.Option(
            "--retention-days",
            metavar="DAYS",
            min=SHORTEST_RETENTION_DAYS,
            max=LONGEST_RETENTION_DAYS,
            help="Days since the last write. Else DB_CLEANUP_RETENTION_DAYS.",
        ),
    ] = None,
    policy: Annotated[
        PolicyName, typer.Option("--policy", help="safe, or all: by the last write alone, sender-keys too.")
    ] = PolicyName.SAFE,
    key_type: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help="Exactly this type; may be given again.")
    ] = None,
    prune_pre_keys: Annotated[
        bool, typer.Option("--prune-pre-keys", help="For experts: also all but the newest 1,600 pre-keys.")
    ] = False,
    company: Companies = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", metavar="N", min=0, help="Stop after N deletions; 0 is no limit.")
    ] = MOST_ROWS,
    max_runtime: Annotated[
        float | None,
        typer.Option("--max-runtime", metavar="SECONDS", parser=seconds, help="Stop after this many seconds."),
    ] = None,
    pause_ratio: Annotated[
        float,
        typer.Option("--pause-ratio", metavar="RATIO", parser=_ratio, help="Seconds of rest per second of work."),
    ] = 1.0,
    explain: Annotated[bool, typer.Option("--explain", help="Show the policy and change nothing.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Delete keys that are past their retention, by type, archived first.

    Expired is what was last written before the retention and is past its own expires_at. Every deleted row is in an
    archive on disk before its transaction commits, and `opsctl keys undo` puts it back.
    """
    from opsctl.operations import cleanup as operation
    from opsctl.stores.switch_record import refuse_while_switched

    run: Invocation = ctx.obj
    operation.require_allowed(key_type or ())
    wish = operation.Wish(
        run_id=run.run_id,
        environment=run.settings.environment,
        retention=timedelta(days=retention_days or run.settings["DB_CLEANUP_RETENTION_DAYS"]),
        rule=operation.Rule(policy),
        types=tuple(dict.fromkeys(key_type or ())),
        prune_pre_keys=prune_pre_keys,
        companies=tuple(dict.fromkeys(company or ())),
        most_rows=max_rows or None,
        longest=timedelta(seconds=max_runtime) if max_runtime else None,
        pause_ratio=pause_ratio,
        name_keys=run.verbose,
    )
    if explain:
        return operation.explain(wish)
    refuse_while_switched(run.settings, "cleanup")
    found = operation.find(doors.connection(run), wish, journal=run.journal, naming=dry_run)
    if dry_run or not found.expired:
        return operation.preview(found, wish)
    run.confirm(f"Delete {found.expired:,} expired keys?")
    return operation.delete(
        doors.connection(run),
        found,
        wish,
        state_dir=run.settings.state_dir,
        keep_archives=timedelta(days=run.settings["ARCHIVE_KEEP_DAYS"]),
        place=doors.place(run),
        remaining=run.deadline.remaining,
        journal=run.journal,
    )


@command(app, "runs", examples=("opsctl keys runs      what was deleted or changed, run by run, newest first",))
def runs(ctx: typer.Context) -> Report:
    """List what cleanups and repairs have archived."""
    from opsctl.operations.archived import list_runs

    run: Invocation = ctx.obj
    return list_runs(run.settings.state_dir, keep=timedelta(days=run.settings["ARCHIVE_KEEP_DAYS"]))


@command(
    app,
    "undo",
    deadline_s=None,
    examples=(
        "opsctl keys undo 20260131T030405Z-0a1b2c --dry-run",
        "opsctl keys undo 20260131T030405Z-0a1b2c --yes",
    ),
)
def undo(
    ctx: typer.Context,
    archived_run: Annotated[str, typer.Argument(metavar="RUN", help="A run of `opsctl keys runs`.")],
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Put back what a run deleted, and revert what it changed, where nobody has written since."""
    from opsctl.operations import archived
    from opsctl.stores.switch_record import refuse_while_switched

    run: Invocation = ctx.obj
    refuse_while_switched(run.settings, "undo")
    plan = archived.plan_undo(
        doors.connection(run),
        run.settings.state_dir,
        archived_run,
        environment=run.settings.environment,
        journal=run.journal,
    )
    if dry_run or not plan.changes:
        return archived.preview_undo(plan)
    run.confirm(f"Put back {plan.changes:,} rows?")
    return archived.undo(doors.connection(run), plan, journal=run.journal)


@command(
    app,
    "stats",
    examples=(
        "opsctl keys stats      counts, sizes and ages by company and type",
        "opsctl keys stats --company 962302 --json",
    ),
)
def stats(ctx: typer.Context, company: Companies = None) -> Report:
    """Count the keys by company and type: how large, how old, how fast they grow, how many a cleanup would delete."""
    from opsctl.operations.key_stats import count_keys

    run: Invocation = ctx.obj
    return count_keys(
        doors.connection(run),
        retention=timedelta(days=run.settings["DB_CLEANUP_RETENTION_DAYS"]),
        companies=tuple(company or ()),
        journal=run.journal,
    )


@command(
    app,
    "doctor",
    deadline_s=None,
    examples=(
        "opsctl keys doctor                       what is wrong, and what it does",
        "opsctl keys doctor --fix --dry-run       what would be mended",
        "opsctl keys doctor --fix --service-stopped --yes",
    ),
)
def doctor(
    ctx: typer.Context,
    company: Companies = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be; asks first.")] = False,
    service_stopped: Annotated[
        bool, typer.Option("--service-stopped", help="My word, where no service manager can tell.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> Report:
    """Find mistyped, orphaned, inconsistent and unreadable keys. 1 where there are any.

    Mending wants the service stopped; every row is archived as it was, and `opsctl keys undo` puts it back.
    """
    from opsctl.operations import doctor as operation
    from opsctl.operations.single_owner import require_stopped
    from opsctl.stores.switch_record import refuse_while_switched

    run: Invocation = ctx.obj
    if fix:
        refuse_while_switched(run.settings, "doctor --fix")
    diagnosis = operation.diagnose(doors.connection(run), companies=tuple(company or ()), journal=run.journal)
    if not fix:
        return operation.report(diagnosis)
    if dry_run or not diagnosis.mends:
        return operation.preview_fix(diagnosis)
    require_stopped(run.settings, doors.connection(run), operators_word=service_stopped, accept_live=False)
    run.confirm(f"Change {diagnosis.mends:,} rows? `opsctl keys doctor --fix --dry-run` lists them")
    return operation.fix(
        doors.connection(run),
        diagnosis,
        run_id=run.run_id,
        environment=run.settings.environment,
        place=doors.place(run),
        state_dir=run.settings.state_dir,
        keep_archives=timedelta(days=run.settings["ARCHIVE_KEEP_DAYS"]),
        journal=run.journal,
    )
