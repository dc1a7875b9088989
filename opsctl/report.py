"""What a command found or did: values that the terminal, the JSON and the alert are all made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opsctl.journal import Step


def duration(seconds: float) -> str:
    """A time as people read it: `5 s`, `12 min`, `3 h`, `40 d`.

    >>> duration(119), duration(120), duration(-7200)
    ('119 s', '2 min', '-2 h')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class Outcome(StrEnum):
    """How the world is after the command."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table that people see: `attribute` of each row under `header`."""

    header: str
    attribute: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the exit code is not 0, in the words of `opsctl.errors`."""

    kind: str
    message: str
    hint: str | None = None
    runbook: str | None = None


@dataclass(frozen=True, slots=True)
class Rto:
    """The clock of an emergency: `scope` says what was reached, `met` is None until WhatsApp is connected."""

    target_s: float
    elapsed_s: float
    scope: str
    met: bool | None
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Plugin:
    """The answer in the convention of monitoring plugins: `code` is 0, 1, 2 or 3, `line` all of stdout."""

    code: int
    line: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an operation gives back.

    `rows` are frozen dataclasses (one table, one JSON array); `columns` choose what of them people see; `facts` are
    single values by stable name; `warnings` are whole sentences; `next_lines` are what to type next, in order.
    `exit_code` is 0, 1, 5 or 6, or 3 or 4 where something was seen all the same (`failure` says why); every other code
    is an exception of `opsctl.errors`.
    """

    summary: str
    rows: Sequence[Any] = ()
    columns: Sequence[Column] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """Whole sentences that everybody reads and that are nothing to worry about."""
    warnings: Sequence[str] = ()
    next_lines: Sequence[str] = ()
    page: Sequence[str] = ()
    """Lines to be read as they stand, before the summary."""
    details: Sequence[str] = ()
    """Sentences only `--verbose` prints."""
    exit_code: int = 0
    failure: Failure | None = None
    rto_scope: str | None = None
    """What was reached when the clock stopped: `files` or `connected`; None where there is no target."""
    rto_met: bool | None = None
    rto_elapsed_s: float | None = None
    """Where the clock that counts is not this run's own: a drill's restore."""
    rto_reached_at: float | None = None
    """Monotonic seconds at which the clock stopped, where tidying up came after it."""
    companies: Sequence[str] = ()
    """The companies a failure concerns, for the alert's tags."""
    noteworthy: bool = False
    """Told to Sentry as a warning although it went well."""
    plugin: Plugin | None = None
    """What `--nagios` prints and ends with, instead of all the rest."""

    @property
    def outcome(self) -> Outcome:
        """0 is ok or a warning, 1 a warning or a failure, the rest failures."""
        if self.exit_code == 0:
            return Outcome.WARNING if self.warnings else Outcome.OK
        if self.exit_code == 1 and self.failure is None:
            return Outcome.WARNING
        return Outcome.FAILED


@dataclass(frozen=True, slots=True)
class Ending:
    """A command that has ended, in whatever way: all that is printed, sent or kept is read from here."""

    command: str
    run_id: str
    report: Report
    rto: Rto | None
    steps: tuple[Step, ...]
    elapsed_s: float
    emergency: bool
    options: Mapping[str, Any]
    sentry_event_id: str | None = None

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        return self.report.exit_code

    @property
    def kind(self) -> str:
        """The stable word that alerts are grouped by."""
        return self.report.failure.kind if self.report.failure else str(self.report.outcome)

    def envelope(self) -> dict[str, Any]:
        """The one JSON document of `--json`; keys are only ever added."""
        report = self.report
        return {
            "schema": "opsctl/1",
            "command": self.command,
            "run_id": self.run_id,
            "outcome": report.outcome,
            "exit_code": report.exit_code,
            "summary": report.summary,
            "facts": dict(report.facts),
            "rows": list(report.rows),
            "warnings": list(report.warnings),
            "next": list(report.next_lines),
            "rto": self.rto,
            "error": report.failure,
            "sentry_event_id": self.sentry_event_id,
            "notes": list(report.notes),
        }
