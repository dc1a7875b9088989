"""The commands that cron runs: when, for how long at most, and how a run of one is told from an unusual one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opsctl.report import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from opsctl.report import Ending, Report
    from opsctl.settings import TimeOfDay
    from opsctl.state import State

MARGIN_MIN = 5
"""So late may a job begin before it is missed."""
LOCKED = 75
"""The exit code of a run that found another one at work: nothing abnormal, and no run of its own."""
REMEMBERED = 20
"""So many runs that went well say what is usual."""
FEWEST = 5
"""So many of them it takes before anything is unusual."""
LONG_S = 5.0
"""A job that usually takes less can hardly be too fast."""
FAST = 10
_PARTS = frozenset({"dry_run", "explain", "watch", "nagios", "company", "only"})
"""With one of these options a command does less than its job."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A fact of a job's reports that is much the same from run to run: unusual is `factor` times less or more."""

    fact: str
    words: str
    factor: int
    few: int
    """Where the larger of the two is less than this, it is chance."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command as cron runs it. `schedule` is in crontab(5)'s five fields, in UTC; `at` fills in what is open."""

    command: str
    flags: str
    schedule: str
    longest_min: int
    failures: int
    """So many in a row raise an alarm."""
    measures: tuple[Measure, ...] = ()
    announced: bool = False
    """Telegram is told how it ended, whatever that was."""

    @property
    def name(self) -> str:
        """For files and monitors: `keys-cleanup`."""
        return self.command.replace(" ", "-")

    @property
    def is_movable(self) -> bool:
        """Whether CLEANUP_AT says when it runs."""
        return "{" in self.schedule

    def at(self, time: TimeOfDay) -> str:
        """Its schedule, if CLEANUP_AT is `time`."""
        return self.schedule.format(hour=time.hour, minute=time.minute)


JOBS = (
    Job("standby sync", "--quiet", "* * * * *", 10, 3, (Measure("companies", "companies", 2, 4),)),
    Job("db health", "--quiet", "*/5 * * * *", 2, 2),
    Job(
        "keys cleanup",
        "--yes --quiet",
        "{minute} {hour} * * *",
        120,
        2,
        (Measure("keys", "keys in the table", 2, 500), Measure("deleted", "deleted keys", 10, 100)),
        announced=True,
    ),
    Job("drill run", "--quiet", "0 4 2 * *", 30, 1, (Measure("files_restored", "restored files", 2, 500),)),
)


def job_of(command: str, options: Mapping[str, Any]) -> Job | None:
    """The job that a run of `command` does; None where there is none, or only a part of it was asked for."""
    if any(options.get(name) for name in _PARTS):
        return None
    return next((job for job in JOBS if job.command == command), None)


def unusual(job: Job, state: State, report: Report, elapsed_s: float) -> Iterator[str]:
    """A sentence for each way in which a run that went well is unlike the last ones."""
    if report.exit_code != 0:
        return
    recent = _recent(state.kept(_name(job)))
    if (usually_s := _usual(recent, "elapsed_s")) is not None and elapsed_s * FAST < usually_s >= LONG_S:
        yield f"too fast: this run took {elapsed_s:.1f} s, and usually it takes {usually_s:.0f} s"
    for measure in job.measures:
        usually, now = _usual(recent, measure.fact), report.facts.get(measure.fact)
        if usually is None or not isinstance(now, int) or max(usually, now) < measure.few:
            continue
        if now * measure.factor < usually or now > usually * measure.factor:
            yield f"far off the usual: {now:,} {measure.words} in this run, and usually {usually:,.0f}"


def remember(job: Job, state: State, ending: Ending) -> None:
    """Keep the run as `jobs/<name>/last-run.json` in the state folder."""
    if ending.exit_code == LOCKED:
        return
    report = ending.report
    seen = {"elapsed_s": ending.elapsed_s}
    seen |= {m.fact: value for m in job.measures if isinstance(value := report.facts.get(m.fact), int)}
    recent = _recent(state.kept(_name(job)))
    if ending.exit_code == 0:
        recent = [*recent, seen][-REMEMBERED:]
    last_run = {
        "command": ending.command,
        "run_id": ending.run_id,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "elapsed_s": ending.elapsed_s,
        "exit_code": ending.exit_code,
        "outcome": report.outcome,
        "summary": report.summary,
        "error": report.failure and {"kind": report.failure.kind, "message": report.failure.message},
        "warnings": list(report.warnings),
        "measures": seen,
        "recent": recent,
    }
    state.keep(_name(job), last_run)


def remember_warnings(job: Job, state: State, ending: Ending, warnings: Iterable[str]) -> None:
    """Add to the run that was kept what came out after it."""
    last_run = state.kept(_name(job))
    if last_run.get("run_id") != ending.run_id:
        return
    last_run["warnings"] += warnings
    if last_run["outcome"] == Outcome.OK:
        last_run["outcome"] = Outcome.WARNING
    state.keep(_name(job), last_run)


def _name(job: Job) -> str:
    return f"jobs/{job.name}/last-run"


def _recent(last_run: Mapping[str, Any]) -> list[dict[str, float]]:
    """What was measured of the last good runs; nothing of a file that somebody changed."""
    runs = last_run.get("recent")
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def _usual(recent: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """The median of what was measured; None where it is too little to say."""
    values = sorted(value for run in recent if isinstance(value := run.get(name), (int, float)))
    return values[len(values) // 2] if len(values) >= FEWEST else None
