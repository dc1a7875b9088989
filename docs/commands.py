"""What is written from the code: `python -m docs.commands` writes commands.md and the verdicts of the first page.

A test holds both against the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from opsctl.cli import exits, tree
from opsctl.errors import EXIT_CODES
from opsctl.operations.runbooks import anchor_of
from opsctl.operations.triage import ADVICE

REFERENCE = Path(__file__).with_name("commands.md")
FIRST_PAGE = Path(__file__).parents[1] / "runbooks" / "first-five-minutes.md"
_VERDICTS = re.compile(r"(<!-- verdicts: .* -->\n).*(<!-- end of verdicts -->\n)", re.DOTALL)
COLUMNS = 80


def main() -> int:
    """Write both."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    FIRST_PAGE.write_text(first_page(), encoding="utf-8")
    return 0


def reference() -> str:
    """Every command with its help text, and every exit code."""
    commands = list(tree.commands())
    out = ["# Commands", "", "Made by `python -m docs.commands` from the help texts; a test holds it against them.", ""]
    out += [f"- [{name}](#{anchor_of(f'opsctl {name}')})" for name, _ in commands]
    out += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    out += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    for name, command in commands:
        text = tree.help_of(name, command, width=COLUMNS)
        out += ["", f"## opsctl {name}", "", "```", *(line.rstrip() for line in text.splitlines()), "```"]
        out += ["", f"Ends with {', '.join(map(str, sorted(exits.codes(name))))}."]
    return "\n".join(out) + "\n"


def first_page() -> str:
    """The page with what triage can say, in its order, under the section that each verdict leads to."""
    text = FIRST_PAGE.read_text(encoding="utf-8")
    return _VERDICTS.sub(lambda found: f"{found[1]}{_verdicts()}{found[2]}", text)


def _verdicts() -> str:
    sections: dict[str, list[str]] = {}
    for fault, advice in ADVICE.items():
        sections.setdefault(advice.page, []).append(f"- `{fault}`: {advice.sentence.partition(';')[0]}")
    out: list[str] = []
    for address, rows in sections.items():
        page = address.removeprefix("runbooks/")
        out += ["", f"`opsctl runbook show {page[0]}#{page.partition('#')[2]}`", f"([page]({page})):", "", *rows]
    return "\n".join(out) + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
