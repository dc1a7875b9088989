"""What the pages say can be typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from docs import commands, screenshots
from opsctl import errors
from opsctl.cli import tree
from opsctl.operations import runbooks
from opsctl.operations.markdown_lines import opsctl_lines
from opsctl.operations.probes import Fault
from opsctl.settings import env_example

if TYPE_CHECKING:
    from tests.conftest import RunOpsctl

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "runbooks").glob("*.md"))]


def test_every_line_of_the_pages_is_one_that_opsctl_takes(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "check", *PAGES)
    assert done.returncode == 0, done.stdout


def test_every_example_of_a_help_text_is_one_that_opsctl_takes() -> None:
    examples = {
        line.text: line.words
        for name, command in tree.commands()
        for example in command.epilog.splitlines()
        for line in opsctl_lines(name, "    " + re.split(" {3,}", example.strip())[0])
    }
    assert len(examples) > 60
    assert {text: wrong for text, words in examples.items() if (wrong := tree.problem(words, typed=True))} == {}


def test_every_command_is_named_by_a_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name, _ in tree.commands() if f"opsctl {name}" not in text] == []


def test_every_file_of_the_package_is_shipped() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["opsctl"]
    package = ROOT / "opsctl"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = {Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names}
    assert {path for path in files if path.suffix not in {".py", ".pyc"}} == shipped
    assert package / "runbooks" / "1-postgresql-unreachable.md" in shipped


def test_the_readme_has_the_exit_code_of_every_error() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    table = {int(code): meaning for codes, meaning in rows for code in codes.split(",")}
    assert table.keys() == errors.EXIT_CODES.keys()
    assert all(table[code] == errors.EXIT_CODES[code] for code in range(128) if code in table)
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.OpsctlError)]
    assert {c.exit_code for c in classes} <= table.keys()


def test_the_reference_of_commands_and_the_table_of_verdicts_are_those_of_the_code() -> None:
    written = "write them anew: python -m docs.commands"
    assert commands.REFERENCE.read_text(encoding="utf-8") == commands.reference(), written
    assert commands.FIRST_PAGE.read_text(encoding="utf-8") == commands.first_page(), written


def test_the_first_page_has_every_verdict_once() -> None:
    verdicts = re.findall(r"^- `([\w-]+)`: ", commands.FIRST_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(verdicts) == sorted(Fault)


SHAPE = [
    "Symptoms",
    "Preflight",
    "The lines to type",
    "What good looks like",
    "Verification",
    "Way back",
    "After the incident",
]
FREE = {"first-five-minutes", "contacts-and-escalation"}


@pytest.mark.parametrize("page", runbooks.pages(), ids=lambda page: page.name)
def test_a_page_has_the_shape_of_all_and_fits_a_terminal(page: runbooks.Page) -> None:
    sections = re.findall(r"^## (.*)", page.text, re.MULTILINE)
    assert page.name in FREE or [section for section in sections if section in SHAPE] == SHAPE
    assert [line for line in page.text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert target.startswith("http") or found.exists(), target
        headings = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(runbooks.anchor_of, headings), target


def test_every_typed_line_of_a_runbook_says_how_it_ends() -> None:
    lines = [line for page in runbooks.pages() for line in opsctl_lines(page.path, page.text) if line.typed]
    assert len(lines) > 50
    assert [f"{line.page}:{line.number}" for line in lines if line.exit_code is None or not line.output] == []


def test_the_quick_start_has_exactly_two_lines() -> None:
    opening, *sections = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "```" not in opening  # what it is for
    assert sections[0].startswith("Quick start\n")
    blocks = re.findall(r"^```sh\n(.*?)^```$", sections[0], re.MULTILINE | re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert sections[0].count("```") == 4


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


def test_the_contacts_are_those_of_the_system() -> None:
    page = (ROOT / "runbooks" / "contacts-and-escalation.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([A-Z][\w -]+) \| (\S+) \| (\w+) \|$", page, re.MULTILINE)
    assert table == [
        ("Primary on-call", "@vosarsen", "Telegram"),
        ("Backup on-call", "support@adminai.tech", "mail"),
        ("DevOps lead", "@vosarsen", "Telegram"),
        ("Database admin", "@vosarsen", "Telegram"),
    ]
    assert re.findall(r"^- \*\*(\S+) minutes", page, re.MULTILINE) == ["0-5", "5-15", "15-30", "30"]


def test_the_deployment_checks_ask_the_database_for_its_health() -> None:
    [page] = [page for page in runbooks.pages() if page.name == "deployment-checks"]
    lines = [line for line in opsctl_lines(page.path, page.text) if line.typed and line.section == "Verification"]
    assert ("db", "health") in [line.words for line in lines]


def test_the_snippet_of_contributing_is_a_command_that_runs(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert snippet.count("\n") <= 10
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport typer\nfrom opsctl.cli.frame import Companies, Invocation, command, main\n"
        "from opsctl.report import Report\n\n"
        "class keys:\n"
        "    def count(database, *, companies):\n"
        "        return Report('counted', facts={'opens': callable(database), 'companies': companies})\n\n"
        "app = typer.Typer()\n\n@app.callback()\ndef group() -> None: ...\n\n" + snippet + "\nsys.exit(main(app))\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "DATABASE_URL": "postgresql://u@127.0.0.1/d",
    }
    words = [sys.executable, str(program), "stats", "--company", "962302", "--json"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    document = json.loads(done.stdout)
    assert (document["command"], document["exit_code"]) == ("stats", 0)
    assert document["facts"] == {"opens": True, "companies": ["962302"]}
    shown = subprocess.run([*words[:3], "--help"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "opsctl keys stats --company 962302" in shown.stdout
