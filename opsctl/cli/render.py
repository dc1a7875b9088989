"""An `Ending` as text for people or as one JSON document; steps and bars while a command works."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import orjson

from opsctl.errors import AlreadyRunning
from opsctl.journal import Step, Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID
    from rich.table import Table

    from opsctl.report import Ending, Report, Rto

# C0 and C1 controls, line separators, what is invisible or changes the direction, and lone surrogates: the bytes of a
# file name that are not UTF-8 (os.fsdecode).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """Text that cannot disturb a terminal or raise on its way there: such characters are shown as escapes.

    >>> clean("a\\x1b]0;title")
    'a\\\\x1b]0;title'
    """
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def as_json(ending: Ending) -> None:
    """Write the envelope and a newline, in UTF-8 whatever the locale; never wrapped or coloured."""
    envelope = ending.envelope()
    try:
        document = orjson.dumps(envelope, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        # A lone surrogate or a number above 64 bits, which orjson refuses; as escapes they are valid JSON.
        document = json.dumps(envelope, default=_plain).encode("ascii")
    sys.stdout.flush()
    sys.stdout.buffer.write(document + b"\n")


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a row holds
    return dataclasses.asdict(value) if dataclasses.is_dataclass(type(value)) else str(value)


def as_text(ending: Ending, *, quiet: bool, verbose: bool) -> None:
    """The answer on stdout; what went wrong and what to type then on stderr."""
    report = ending.report
    if quiet:
        routine = report.failure is not None and report.failure.kind == AlreadyRunning.kind
        if (report.failure or report.exit_code or report.warnings) and not routine:
            _complain(ending, one_line=True)
        return
    out = lines(report, verbose=verbose)
    if ending.rto:
        out.append(_sentence(rto_line(ending.rto)))
    if report.next_lines:
        out += ["", "Next:", *(f"  {clean(line)}" for line in report.next_lines)]
    try:
        sys.stdout.write("".join(f"{line}\n" for line in out))
        sys.stdout.flush()
    finally:  # also where nobody reads stdout
        if report.failure:
            _complain(ending, one_line=False)


def lines(report: Report, *, verbose: bool) -> list[str]:
    """The page, the table, the summary and the warnings."""
    out: list[str] = [clean(line) for line in report.page]
    if report.rows and report.columns:
        out += [_drawn(table(report)).rstrip("\n")]
    if report.failure is None or report.summary != report.failure.message:  # which stderr says
        out.append(_sentence(report.summary))
    out += [_sentence(note) for note in report.notes]
    out += [_sentence(f"warning: {warning}") for warning in report.warnings]
    if verbose:
        out += [_sentence(f"  {detail}") for detail in report.details]
    return out


def _sentence(text: str, stream: TextIO | None = None) -> str:
    """Broken between words on a terminal; one line in a pipe, where it may be searched for."""
    line = clean(text)
    if not (stream or sys.stdout).isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _complain(ending: Ending, *, one_line: bool) -> None:
    report = ending.report
    failure = report.failure
    words = failure.message if failure else (report.summary if report.exit_code else "; ".join(report.warnings))
    hint = failure.hint if failure else None
    lines = [
        f"{f'opsctl {ending.command}'.strip()}: {clean(words)}" + (f" ({clean(hint)})" if one_line and hint else "")
    ]
    if not one_line:
        if hint:
            lines.append(f"  next: {clean(hint)}")
        if failure and failure.runbook:
            page = failure.runbook.removeprefix("runbooks/").replace(".md", "", 1)
            lines.append(f"  runbook: opsctl runbook show {clean(page)}")
    with suppress(OSError):  # where nobody listens any more the exit code still speaks
        sys.stderr.write("".join(f"{_sentence(line, sys.stderr)}\n" for line in lines))


def rto_line(rto: Rto) -> str:
    """`RTO: 3.1 s of 600 s, open (files; ...)`."""
    scope = {"files": "files; WhatsApp's connection is not measured"}.get(rto.scope, rto.scope)
    verdict = {True: "met", False: "NOT met", None: "open"}[rto.met]
    return f"RTO: {rto.elapsed_s:.1f} s of {rto.target_s:g} s, {verdict} ({scope})"


def table(report: Report) -> Table:
    """The columns of a report's rows, as people see them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
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
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if to_terminal else 200,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


class StepPrinter(Watcher):
    """Steps on stderr: each with its seconds as it ends; a bar while one with a total runs on a terminal.

    A terminal that has gone (EIO after a hang-up) stops nothing: neither a step nor the cleaning up after it.
    """

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
        bar = self._bar
        self._advance = lambda done: bar.update(task, completed=done)
        with suppress(OSError):
            self._bar.start()

    def step_advanced(self, done: int) -> None:
        """Move the bar to `done`."""
        if self._advance:
            with suppress(OSError):
                self._advance(done)

    def step_ended(self, step: Step) -> None:
        """One line per step, with its seconds."""
        bar, self._bar, self._advance = self._bar, None, None
        mark = " " if step.ok else "!"
        width = max(8, min(44, shutil.get_terminal_size().columns - 13))
        with suppress(OSError):
            if bar:
                bar.stop()
            sys.stderr.write(f"{mark} {clean(step.name):<{width}} {step.seconds:8.2f} s\n")
