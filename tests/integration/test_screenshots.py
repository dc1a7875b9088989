"""The pictures of the README are what the command makes of real runs."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from docs import screenshots

if TYPE_CHECKING:
    from pathlib import Path


EQUAL = {
    "health": re.compile(r"([a-z][a-z -]*?) +(ok|warning|critical) "),
    "stats": re.compile(r"962302 +([\w-]+) +(\d+) "),
    "drill": re.compile(r"([a-z][a-z ,0-9-]*?) +(ok|failed) "),
}
"""What two runs have in common: the checks and their states, the types of keys and how many."""
OF_THE_MACHINE = {"version"}
"""A check whose state tells of the programs that are installed."""


@pytest.mark.long
def test_the_command_makes_the_pictures_anew_from_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = screenshots.FOLDER
    monkeypatch.setattr(screenshots, "FOLDER", tmp_path)
    assert screenshots.main([]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.svg" for name in screenshots.SHOTS}
    for name, pattern in EQUAL.items():
        old, new = (rows(folder / f"{name}.svg", pattern) for folder in (kept, tmp_path))
        assert len(new) >= 6
        assert new == old, "make them anew: python -m docs.screenshots"


def rows(picture: Path, pattern: re.Pattern[str]) -> dict[str, str]:
    """The first two cells of each row, as the picture shows them."""
    lines: defaultdict[str, str] = defaultdict(str)
    text = re.compile(r'<text [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>')
    for y, piece in text.findall(picture.read_text(encoding="utf-8")):
        lines[y] += html.unescape(piece).replace("\xa0", " ")
    found = filter(None, map(pattern.match, lines.values()))
    return {match[1]: match[2] for match in found if match[1] not in OF_THE_MACHINE}
