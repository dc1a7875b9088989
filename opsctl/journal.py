"""The slow parts of a run, named and timed: for the console, for Sentry's breadcrumbs, for the history."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Step:
    """One named part of a run that has ended."""

    name: str
    seconds: float
    ok: bool


class Watcher(Protocol):
    """Whoever wants to see steps while they happen."""

    def step_started(self, name: str, total: int | None) -> None: ...
    def step_advanced(self, done: int) -> None: ...
    def step_ended(self, step: Step) -> None: ...


class Silent:
    """A watcher that shows nothing: `--quiet`, `--json`, cron."""

    def step_started(self, name: str, total: int | None) -> None: ...
    def step_advanced(self, done: int) -> None: ...
    def step_ended(self, step: Step) -> None: ...


class Journal:
    """Collects the steps of one run.

    >>> journal = Journal(clock=iter([0.0, 1.5]).__next__)
    >>> with journal.step("export session files"):
    ...     pass
    >>> journal.steps
    (Step(name='export session files', seconds=1.5, ok=True),)
    """

    def __init__(self, watcher: Watcher | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._watcher = watcher or Silent()
        self._clock = clock
        self._steps: list[Step] = []

    @property
    def steps(self) -> tuple[Step, ...]:
        """The ended steps, in order."""
        return tuple(self._steps)

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time a part of the run; gives a function that takes how many of `total` are done."""
        started = self._clock()
        self._watcher.step_started(name, total)
        ok = False
        try:
            yield self._watcher.step_advanced
            ok = True
        finally:
            step = Step(name, round(self._clock() - started, 4), ok)
            self._steps.append(step)
            self._watcher.step_ended(step)
