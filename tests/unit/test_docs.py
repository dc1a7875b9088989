"""What the pages say can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from docs import screenshots
from opsctl import errors
from opsctl.settings import env_example

if TYPE_CHECKING:
    from tests.conftest import RunOpsctl

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "runbooks").glob("*.md"))]


def _lines() -> list[str]:
    found = {
        line.strip().split("#")[0].strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("opsctl ")
    }
    return sorted(found)


@pytest.mark.parametrize("line", _lines())
def test_every_line_of_the_pages_is_one_that_opsctl_takes(line: str, run_opsctl: RunOpsctl) -> None:
    # The words are parsed, flags and all, before --help is answered.
    done = run_opsctl(*shlex.split(line)[1:], "--help")
    assert done.returncode == 0, f"{line}: {done.stderr}"


def test_a_flag_that_does_not_exist_would_be_found(run_opsctl: RunOpsctl) -> None:
    assert run_opsctl("sessions", "restore", "--no-such-flag", "--help").returncode == 2


def test_every_command_is_named_by_a_page(run_opsctl: RunOpsctl) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for group in ("sessions", "keys", "cache", "db", "drill", "config", "standby"):
        listed = run_opsctl(group, "--help").stdout.partition("Commands:")[2]
        for name in re.findall(r"^  (\w+)", listed, re.MULTILINE):
            assert f"opsctl {group} {name}" in text


def test_the_readme_has_the_exit_code_of_every_error() -> None:
    table = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)))
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.OpsctlError)]
    assert {c.exit_code for c in classes} <= table


def test_the_quick_start_has_exactly_two_lines() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Quick start")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]


def test_the_example_settings_are_the_settings() -> None:
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == env_example()


def test_the_pictures_of_the_readme_are_those_that_the_command_makes() -> None:
    shown = re.findall(r"\]\((docs/pictures/\w+\.svg)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(f"docs/pictures/{name}.svg" for name in screenshots.SHOTS)
    for name, words in screenshots.SHOTS.items():
        svg = (screenshots.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert f"opsctl&#160;{'&#160;'.join(words)}" in svg
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", svg)  # nothing is fetched


def test_a_failure_names_a_runbook_that_exists() -> None:
    page = errors.SourceUnavailable("x").runbook
    assert page is not None
    assert (ROOT / page).is_file()
