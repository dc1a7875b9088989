"""The same look again and again: redrawn in place on a terminal, one after the other in a pipe, or as JSON lines."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from opsctl.cli import render
from opsctl.report import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.cli.frame import Invocation
    from opsctl.report import Report


def watched(run: Invocation, look: Callable[[], Report], *, every_s: float) -> Report:
    """Look every `every_s` seconds until the deadline comes, and give the last report; a signal ends it sooner."""
    on_screen = sys.stdout.isatty() and not (run.json or run.quiet)
    with _screen(every_s) if on_screen else _printing(run) as show:
        while True:
            began = time.monotonic()
            report = look()
            wait_s = max(0.0, every_s - (time.monotonic() - began))
            remaining_s = run.deadline.remaining()
            if remaining_s is not None and remaining_s <= wait_s:
                return report
            show(report)
            time.sleep(wait_s)


@contextmanager
def _printing(run: Invocation) -> Iterator[Callable[[Report], None]]:
    yield run.emit


@contextmanager
def _screen(every_s: float) -> Iterator[Callable[[Report], None]]:
    """Redrawn in place, the worst first because a terminal may be too low; the trend takes the place of the bar."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def show(report: Report) -> None:
            columns = [Column("Trend", "trend") if c.attribute == "bar" else c for c in report.columns]
            rows = sorted(report.rows, key=lambda row: row.state == "ok")
            head = f"{datetime.now(UTC):%H:%M:%S} UTC, every {every_s:g} s, Ctrl-C ends it: {report.summary}"
            shown = render.table(replace(report, rows=rows, columns=columns))
            live.update(Group(Text(render.clean(head)), shown), refresh=True)

        yield show
