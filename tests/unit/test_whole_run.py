"""The command that checks everything: a skipped test is told, and one that was for no listed reason fails it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests import __main__ as whole_run

REPOSITORY = Path(__file__).parents[2]
LISTED = """
@needs._mark(False, "a kernel of next year")
def test_listed(): ...
"""
UNLISTED = """
@pytest.mark.skip(reason="I did not feel like it")
def test_unlisted(): ...
"""


@cache
def report_of(skipped: str) -> bytes:
    """What pytest leaves of a test that passed and of these."""
    with tempfile.TemporaryDirectory() as folder:
        tests, report = Path(folder, "test_some.py"), Path(folder, "tests.xml")
        tests.write_text(f"import pytest\nfrom tests import needs\ndef test_passed(): ...\n{skipped}")
        words = ["-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", f"--junit-xml={report}", str(tests)]
        subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True)
        return report.read_bytes()


@pytest.mark.parametrize(
    ("skipped", "fails", "code", "said"),
    [
        ("", "", 0, ["not proven here: nothing", "all checks passed: format lint types walls tests"]),
        (LISTED, "", 0, ["not proven here: a kernel of next year", "all checks passed: format lint types walls tests"]),
        (
            LISTED + UNLISTED,
            "",
            1,
            [
                "skipped without tests/needs.py: I did not feel like it",
                "not proven here: a kernel of next year",
                "failed: skips",
            ],
        ),
        (LISTED, "types", 1, ["not proven here: a kernel of next year", "failed: types"]),
        (LISTED, "tests", 1, ["not proven here: a kernel of next year", "failed: tests"]),
    ],
)
def test_what_was_skipped_is_told_and_what_failed_fails_it(
    skipped: str,
    fails: str,
    code: int,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def run(name: str, words: list[str]) -> bool:
        ran.append(name)
        for word in words:
            if word.startswith("--junit-xml="):
                Path(word.partition("=")[2]).write_bytes(report_of(skipped))
        return name != fails

    monkeypatch.setattr(whole_run, "run", run)
    assert whole_run.main([]) == code
    assert capsys.readouterr().out.splitlines() == said
    assert ran == ["format", "lint", "types", "walls", "tests"]
