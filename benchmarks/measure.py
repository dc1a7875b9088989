"""Paired timing: every contestant once per round, in rotating order; medians and ratios round by round."""

from __future__ import annotations

import platform
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Bar:
    """`numerator` / `denominator`, median over the rounds, must not be above (or below) `limit`."""

    numerator: str
    denominator: str
    limit: float
    at_least: bool = False

    def measured(self, rounds: list[dict[str, float]]) -> float:
        return statistics.median(r[self.numerator] / r[self.denominator] for r in rounds)

    def holds(self, rounds: list[dict[str, float]]) -> bool:
        ratio = self.measured(rounds)
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def rounds_of(contestants: Mapping[str, Callable[[], float]], count: int) -> list[dict[str, float]]:
    """Run `count` rounds; each contestant gives the seconds it took. The order turns, so that none is always first."""
    names = list(contestants)
    rounds = []
    for index in range(count):
        turn = index % len(names)
        seconds = {name: contestants[name]() for name in names[turn:] + names[:turn]}
        rounds.append(seconds)
        say(f"round {index + 1}: " + ", ".join(f"{name} {seconds[name]:.3f} s" for name in names))
    return rounds


def verdict(rounds: list[dict[str, float]], bars: list[Bar]) -> int:
    """Print medians and bars; 0 if all hold, else 1."""
    machine = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    say(f"\n{machine}, medians of {len(rounds)}:")
    for name in rounds[0]:
        times = [r[name] for r in rounds]
        say(f"  {name:<28} {statistics.median(times):8.3f} s   ({min(times):.3f} to {max(times):.3f})")
    for bar in bars:
        sign = ">=" if bar.at_least else "<="
        word = "holds" if bar.holds(rounds) else "MISSED"
        say(f"  {bar.numerator} / {bar.denominator} = {bar.measured(rounds):.2f} {sign} {bar.limit:g}: {word}")
    return 0 if all(bar.holds(rounds) for bar in bars) else 1


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
