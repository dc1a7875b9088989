"""The pages for the night: listed, shown, and any Markdown held against this very opsctl."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from opsctl.errors import EXIT_CODES, UsageError
from opsctl.operations.markdown_lines import Line, named_flags, opsctl_lines
from opsctl.report import Column, Failure, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Problem = Callable[[Sequence[str], bool], str | None]
    """What is wrong with the words behind `opsctl`; the second value: whether the line is typed, or only named."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What the installed opsctl takes."""

    problem: Problem
    exit_codes: Callable[[Sequence[str]], frozenset[int]]
    """With which codes the command behind `opsctl` can end."""
    flags: frozenset[str]
    """Of all commands."""


FOLDER = "runbooks"
FIRST_PAGE = "first-five-minutes"
_REMARK = re.compile(r"<!--.*-->")
_PLUGIN_EXIT_CODES = frozenset(range(4))


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the installed package."""

    name: str
    title: str
    purpose: str
    """Its first sentence."""
    text: str

    @property
    def path(self) -> str:
        """As failures and alerts name it."""
        return f"{FOLDER}/{self.name}.md"


def pages() -> list[Page]:
    """Every page: the one to begin with, those for the four scenarios, the others."""
    files = [file for file in (resources.files("opsctl") / FOLDER).iterdir() if file.name.endswith(".md")]
    found = [_page(file.name.removesuffix(".md"), file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda page: (page.name != FIRST_PAGE, page.name))


def _page(name: str, text: str) -> Page:
    title, _, rest = text.partition("\n\n")
    purpose = " ".join(rest.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
    return Page(name, title.removeprefix("# "), purpose, text)


_PAGE_COLUMNS = (Column("Page", "name"), Column("What for", "purpose"))


def list_pages() -> Report:
    """Every page with what it is for."""
    found = pages()
    return Report(
        f"{len(found)} pages",
        rows=found,
        columns=_PAGE_COLUMNS,
        next_lines=[f"opsctl runbook show {FIRST_PAGE}"],
    )


def show_page(wanted: str) -> Report:
    """One page, or one of its sections. `wanted` is its name, its number, or as triage and alerts name it.

    Raises `UsageError` where there is no such page or section.
    """
    name, _, anchor = wanted.partition("#")
    name = name.removeprefix(f"{FOLDER}/").removesuffix(".md")
    found = pages()
    page = next((page for page in found if name in {page.name, page.name.partition("-")[0]}), None)
    if page is None:
        raise UsageError(f"there is no page {name!a}", hint=f"one of {', '.join(page.name for page in found)}")
    text = _section(page, anchor) if anchor else page.text
    return Report(
        page.path,
        page=[line for line in text.splitlines() if not _REMARK.fullmatch(line.strip())],
        facts={"name": page.name, "title": page.title, "text": text},
    )


def anchor_of(heading: str) -> str:
    """A heading as the end of an address, as GitHub makes it.

    >>> anchor_of("Preflight: is `opsctl` ready?")
    'preflight-is-opsctl-ready'
    """
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def _section(page: Page, anchor: str) -> str:
    """From its heading to the next one of the same level or above."""
    level, taken, fenced = 0, [], False
    for line in page.text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"(#+) (.*)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if heading and not level and anchor_of(heading[2]) == anchor:
            level = len(heading[1])
        if level:
            taken.append(line)
    if not taken:
        raise UsageError(f"{page.path} has no section {anchor!a}", hint=f"opsctl runbook show {page.name}")
    return "\n".join(taken)


@dataclass(frozen=True, slots=True)
class Mistake:
    """One line of a page that this opsctl does not take."""

    place: str
    line: str
    problem: str


_MISTAKE_COLUMNS = (Column("Where", "place"), Column("Line", "line"), Column("Problem", "problem"))


def check_pages(files: Iterable[Path], installed: Installed) -> Report:
    """Hold every opsctl line against the installed commands, flags, values and exit codes. Nothing is run.

    So with the flags that sentences name: some command has to have each.

    Exit code 1 where there is a mistake. Raises `UsageError` for a file that cannot be read.
    """
    texts = [(str(file), _read(file)) for file in files] or [(page.path, page.text) for page in pages()]
    lines = [line for name, text in texts for line in opsctl_lines(name, text)]
    found = [(line, installed.problem(line.words, line.typed) or _wrong_exit_code(line, installed)) for line in lines]
    for name, text in texts:
        found += [
            (line, f"no command has {line.text}")
            for line in named_flags(name, text)
            if line.text not in installed.flags
        ]
    mistakes = [Mistake(f"{line.page}:{line.number}", line.text, wrong) for line, wrong in found if wrong is not None]
    facts = {"pages": len(texts), "lines": len(lines), "mistakes": len(mistakes)}
    if not mistakes:
        return Report(f"{len(lines)} opsctl lines of {len(texts)} pages are lines that this opsctl takes", facts=facts)
    first = mistakes[0]
    return Report(
        f"{len(mistakes)} opsctl lines or flags of {len(texts)} pages are none that this opsctl takes",
        rows=mistakes,
        columns=_MISTAKE_COLUMNS,
        facts=facts,
        exit_code=1,
        failure=Failure("stale-page", f"{first.place}: {first.problem}", hint="opsctl --help"),
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{file} cannot be read: {why}") from None


def _wrong_exit_code(line: Line, installed: Installed) -> str | None:
    if line.exit_code is None:
        return None
    is_plugin = "--nagios" in line.words
    if line.exit_code not in (_PLUGIN_EXIT_CODES if is_plugin else EXIT_CODES):
        return f"no command ends with {line.exit_code}"
    can = installed.exit_codes(line.words)
    if is_plugin or line.exit_code in can:
        return None
    return f"this command never ends with {line.exit_code}: {', '.join(map(str, sorted(can)))}"
