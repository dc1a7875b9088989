"""`opsctl runbook`: the pages of the installed package, and any Markdown held against the command tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main

from opsctl.cli import app, exits, tree
from opsctl.errors import EXIT_CODES
from opsctl.operations.markdown_lines import opsctl_lines
from opsctl.operations.runbooks import pages

if TYPE_CHECKING:
    from tests.conftest import RunOpsctl


def test_every_page_is_listed_with_what_it_is_for(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "list", "--json")
    assert done.returncode == 0
    rows = done.json()["rows"]
    assert [row["name"] for row in rows] == [page.name for page in pages()]
    assert all(row["purpose"] for row in rows)
    assert (rows[0]["name"], rows[0]["purpose"]) == (
        "first-five-minutes",
        "Begin here, whatever broke: one line finds the page",
    )


@pytest.mark.parametrize(
    "name", ["1", "1-postgresql-unreachable", "runbooks/1-postgresql-unreachable.md", "1-postgresql-unreachable.md"]
)
def test_a_page_is_found_by_every_name_that_is_printed(run_opsctl: RunOpsctl, name: str) -> None:
    done = run_opsctl("runbook", "show", name)
    assert done.returncode == 0
    (page,) = [page for page in pages() if page.name.startswith("1-")]
    assert done.stdout.startswith(page.text)


def test_a_remark_for_those_who_edit_a_page_is_not_shown(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "show", "first-five-minutes")
    assert "- `refused`: the database refuses connections" in done.stdout
    assert "<!--" not in done.stdout


def test_one_section_is_shown_alone(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "show", "1#preflight", "--json")
    text = done.json()["facts"]["text"]
    assert text.startswith("## Preflight\n")
    assert "opsctl config check" in text
    assert text.count("\n## ") == 0


def test_a_page_that_does_not_exist_is_answered_with_those_that_do(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "show", "9-floods")
    assert done.returncode == 2
    assert "there is no page '9-floods'" in done.stderr
    assert "4-complete-loss" in done.stderr
    assert run_opsctl("runbook", "show", "1#no-such-section").returncode == 2


def test_broken_settings_do_not_keep_anybody_from_the_pages(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("runbook", "show", "1", env={"POSTGRES_PORT": "garbage"})
    assert done.returncode == 0


STALE = """\
# Our own page

Type `opsctl sessions restore --yes` or `opsctl sessions heal`, and never `opsctl keys undo`.

```sh
sudo -u app opsctl sessions restore --sice-stopped
opsctl db health --every soon
# exit 9
opsctl triage | tee log
ls /usr/bin/opsctl --all; journalctl -u opsctl
```

    */5 * * * * /opt/venv/bin/opsctl standby sync --quietly
    OPSCTL_ENV_FILE=/etc/opsctl opsctl keys undo
    opsctl sessions repair --company <ID> --from nowhere
    opsctl sessions restore --since TIME --company $COMPANY
    opsctl sessions restore \\
      --no-such

```json
{"line": "opsctl nothing"}
```
"""


def test_lines_that_this_opsctl_does_not_take_are_named(run_opsctl: RunOpsctl, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(STALE)
    done = run_opsctl("runbook", "check", page, "--json")
    assert done.returncode == 1
    problems = {row["place"].rpartition(":")[2]: row["problem"] for row in done.json()["rows"]}
    assert problems.keys() == {"3", "6", "7", "13", "14", "15", "18"}
    assert problems["3"] == "there is no command opsctl sessions heal"
    assert "--sice-stopped" in problems["6"]
    assert "'--every': Input should be a valid number" in problems["7"]
    assert "--quietly" in problems["13"]
    assert problems["14"] == "Missing argument 'RUN'."
    assert "nowhere" in problems["15"]
    assert "--no-such" in problems["18"]
    assert "page.md:3" in done.json()["error"]["message"]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("opsctl triage\n# exit 9", "no command ends with 9"),
        ("opsctl triage  # exits with code 7", "no command ends with 7"),
        ("opsctl triage\n# exit 1", None),
        ("opsctl triage\n# exit 5", "this command never ends with 5: 0, 1, 2, 3, 4, 70, 129, 130, 141, 143"),
        ("opsctl runbook show 1\n# exit 1", "this command never ends with 1: 0, 2, 70, 129, 130, 141, 143"),
        ("opsctl sessions restore\n# exit 5", None),
        ("opsctl --version\n# exit 0", None),
        ("opsctl db health --nagios\n# exit 3", None),
        ("opsctl db health\n# exit 6", "this command never ends with 6: 0, 1, 2, 3, 4, 5, 70, 129, 130, 141, 143"),
        ("opsctl db health --nagios\n# exit 4", "no command ends with 4"),
    ],
)
def test_an_exit_code_that_no_command_has_is_named(
    run_opsctl: RunOpsctl, tmp_path: Path, block: str, problem: str | None
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{block}\n```\n")
    found = run_opsctl("runbook", "check", page, "--json").json()["rows"]
    assert [row["problem"] for row in found] == ([problem] if problem else [])


def test_a_flag_that_a_sentence_names_and_no_command_has_is_named(run_opsctl: RunOpsctl, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Add `--prefer files` or `--perfer files`, in `./.env` or with `-x`.\n```json\n`--none`\n```\n")
    done = run_opsctl("runbook", "check", page, "--json")
    assert (done.returncode, [row["problem"] for row in done.json()["rows"]]) == (1, ["no command has --perfer"])


def test_every_command_says_how_it_ends() -> None:
    assert set(exits._OWN) == {name for name, _ in tree.commands()}
    assert set(EXIT_CODES) == frozenset().union(*map(exits.codes, exits._OWN))
    reference = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    said = re.findall(r"## opsctl (\w+ ?\w*)\n.*?\nEnds with ([\d, ]+)\.", reference, re.DOTALL)
    assert {name: {int(code) for code in codes.split(",")} for name, codes in said} == {
        name: exits.codes(name) for name in exits._OWN
    }


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_page_that_cannot_be_read_is_a_usage_error(
    run_opsctl: RunOpsctl, tmp_path: Path, content: bytes | None
) -> None:
    page = tmp_path / "page.md"
    if content is not None:
        page.write_bytes(content)
    done = run_opsctl("runbook", "check", page)
    assert done.returncode == 2
    assert f"{page} cannot be read" in done.stderr


def test_a_renamed_flag_makes_the_pages_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    command = dict(tree.commands())["sessions restore"]
    flag = next(param for param in command.params if "--service-stopped" in param.opts)
    monkeypatch.setattr(flag, "opts", ["--service-is-stopped"])
    monkeypatch.setattr(tree, "root", lambda: _tree_with(command))
    lines = [line for page in pages() for line in opsctl_lines(page.path, page.text)]
    stale = [line for line in lines if tree.problem(line.words, line.typed)]
    assert stale
    assert {"--service-stopped" in line.text for line in stale} == {True}


def _tree_with(command: object) -> object:
    found: Any = typer.main.get_command(app)
    found.commands["sessions"].commands["restore"] = command
    return found


@pytest.mark.parametrize("number", "1234")
def test_the_times_on_a_page_are_those_of_the_walks(number: str) -> None:
    walks = (Path(__file__).parents[2] / "benchmarks" / "walks.txt").read_text()
    walked = re.findall(rf"page {number}\b.*: (\d+) s <= \d+: holds", walks)
    (page,) = [page for page in pages() if page.name.startswith(f"{number}-")]
    stated, _, _ = page.text.partition("([how]")
    assert walked
    assert re.findall(r"\b(\d+) s\b", stated) == walked


def test_a_statement_may_go_on_in_the_next_comment() -> None:
    (line,) = opsctl_lines("x.md", '```sh\nopsctl triage\n# exit 1, "one", "two ... three"\n# "four"\n```\n')
    assert (line.exit_code, line.output) == (1, ("one", "two ... three", "four"))
