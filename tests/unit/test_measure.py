"""The bars of the benchmarks: what misses one ends with 1, and what is committed is what the programs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.measure import Bar, verdict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("seconds", "at_least", "code"),
    [
        ([1.0, 1.2, 9.0], False, 0),
        ([1.0, 1.3, 1.3], False, 1),
        ([1.3, 1.3, 1.0], True, 0),
        ([1.2, 1.2, 9.0], True, 1),
    ],
)
def test_the_median_of_the_paired_ratios_is_held_against_the_bar(
    seconds: list[float], *, at_least: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [{"ours": 2 * ours, "rival": 2.0} for ours in seconds]
    limit = 1.25
    assert verdict(rounds, [Bar("ours", "rival", limit, at_least=at_least)]) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_one_missed_bar_of_two_is_a_miss() -> None:
    rounds = [{"ours": 1.0, "rival": 2.0}]
    assert verdict(rounds, [Bar("ours", "rival", 1), Bar("ours", "rival", 4, at_least=True)]) == 1


def test_every_program_has_its_last_output_beside_it() -> None:
    programs = {path.stem for path in BENCHMARKS.glob("*.py")} - {"__init__", "ground", "measure"}
    assert programs == {path.stem for path in BENCHMARKS.glob("*.txt")}
    for name in programs:
        said = (BENCHMARKS / f"{name}.txt").read_text(encoding="utf-8")
        assert re.search(r": (holds|MISSED)$", said, re.MULTILINE), name
