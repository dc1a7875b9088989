"""An `Ending` as text for people or as one JSON document; steps and bars while a command works."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import orjson

from opsctl.journal import Step, Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID
    from rich.table import Table

    from opsctl.report import Ending, Report, Rto

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text that cannot disturb a terminal: control and direction-changing characters are shown as escapes.

    >>> clean("a\\x1b]0;title")
    'a\\\\x1b]0;title'
    """
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def as_json(ending: Ending) -> None:
    """Write the envelope and a newline; never wrapped or coloured."""
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    sys.stdout.write(orjson.dumps(ending.envelope(), default=str, option=options).decode())


def as_text(ending: Ending, *, quiet: bool, verbose: bool) -> None:
    """The answer on stdout; what went wrong and what to type then on stderr."""
    report = ending.report
    if quiet:
        if report.failure or report.warnings or report.exit_code:
            _complain(ending, one_line=True)
        return
    if report.failure and not report.rows and not report.facts:
        _complain(ending, one_line=False)
        return
    out = _lines(report, verbose=verbose)
    if ending.rto:
        out.append(rto_line(ending.rto))
    if report.next_lines:
        out += ["", "Next:", *(f"  {line}" for line in report.next_lines)]
    sys.stdout.write("\n".join(out) + "\n")
    if report.failure:
        sys.stdout.flush()
        _complain(ending, one_line=False)


def _lines(report: Report, *, verbose: bool) -> list[str]:
    out: list[str] = []
    if report.rows and report.columns:
        out += [_drawn(_table(report)).rstrip("\n")]
    out.append(clean(report.summary))
    out += [f"warning: {clean(warning)}" for warning in report.warnings]
    if verbose:
        out += [f"  {clean(detail)}" for detail in report.details]
    return out


def _complain(ending: Ending, *, one_line: bool) -> None:
    report = ending.report
    failure = report.failure
    words = failure.message if failure else (report.summary if report.exit_code else "; ".join(report.warnings))
    hint = failure.hint if failure else None
    lines = [f"opsctl {ending.command}: {clean(words)}" + (f" ({clean(hint)})" if one_line and hint else "")]
    if not one_line:
        if hint:
            lines.append(f"  next: {clean(hint)}")
        if failure and failure.runbook:
            lines.append(f"  runbook: {clean(failure.runbook)}")
    try:
        sys.stderr.write("\n".join(lines) + "\n")
    except OSError:
        return  # nobody listens any more; the exit code still speaks


def rto_line(rto: Rto) -> str:
    """`RTO 3.1 s of 600 s (files restored; connection not measured)`."""
    scope = {"files": "files restored; WhatsApp's connection is not measured"}.get(rto.scope, rto.scope)
    verdict = {True: "met", False: "NOT met", None: "open"}[rto.met]
    return f"RTO: {rto.elapsed_s:.1f} s of {rto.target_s:g} s, {verdict} ({scope})"


def _table(report: Report) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in report.columns:
        table.add_column(
            column.header, justify="right" if column.numeric else "left", no_wrap=column.numeric, overflow="fold"
        )
    for row in report.rows:
        table.add_row(*(Text(shown(getattr(row, column.attribute))) for column in report.columns))
    return table


def shown(value: Any) -> str:  # noqa: ANN401 - a cell of any row
    """A value as a cell: numbers grouped, nothing as nothing, lists joined."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v) for v in value)
    return clean(str(value))


def _drawn(table: Table) -> str:
    import io

    from rich.console import Console

    # A terminal's own width; a pipe gets whole lines, because a wrapped path cannot be pasted.
    to_terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=to_terminal,
        width=None if to_terminal else 200,
        markup=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


class StepPrinter(Watcher):
    """Steps on stderr: each with its seconds as it ends; a bar while one with a total runs on a terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._advance: Callable[[int], None] | None = None

    def step_started(self, name: str, total: int | None) -> None:
        """Show that something long has begun, where someone watches."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns: list[Any] = [TextColumn("  {task.description}", markup=False), BarColumn(bar_width=24)]
        if total:
            columns.append(MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        task: TaskID = self._bar.add_task(clean(name), total=total)
        self._bar.start()
        bar = self._bar
        self._advance = lambda done: bar.update(task, completed=done)

    def step_advanced(self, done: int) -> None:
        """Move the bar to `done`."""
        if self._advance:
            self._advance(done)

    def step_ended(self, step: Step) -> None:
        """One line per step, with its seconds."""
        if self._bar:
            self._bar.stop()
            self._bar = self._advance = None
        mark = " " if step.ok else "!"
        try:
            sys.stderr.write(f"{mark} {clean(step.name):<44} {step.seconds:8.2f} s\n")
        except OSError:
            return
