"""The opsctl lines of Markdown pages, and what a page says of how each one ends.

A line ends as the comment under it says, in the same block:

    opsctl triage
    # exit 1, "verdict: refused", "nothing listens"

The texts between quotes are in what it prints; `...` in them stands for anything on one line.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FENCE = re.compile(r"\s*(?:[-*>]\s+)?(`{3,}|~{3,})\s*([\w-]*)")
_SHELLS = frozenset({"", "sh", "bash", "zsh", "shell", "console", "text", "crontab", "cron"})
_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
_SPAN = re.compile(r"(?<!`)`(opsctl [^`]+)`(?!`)")
_FLAG_SPAN = re.compile(r"(?<!`)`(--[a-z][\w-]*)[^`]*`(?!`)")
_EXIT = re.compile(r"#\s*exits?\s+(?:with\s+)?(?:code\s+)?(\d+)\b")
_QUOTED = re.compile(r'"([^"]*)"')
_MORE = re.compile(r'\s*#\s*"')
_OPSCTL = re.compile(r"([\w.~-]*/)*opsctl")
_OPERATORS = frozenset(";|&()<>")
_PROMPT = re.compile(r"\s*[$#%]\s+(?=\S*opsctl\b)")
_COMMENT = re.compile(r"(^|\s)#.*")
_PLACEHOLDER = re.compile(r"<[\w .|-]+>")
_BEFORE = re.compile(
    r"sudo|env|time|nice|ionice|nohup|exec|timeout|flock|watch|chronic|setsid|runuser|if|while|until|!|then|do"
    r"|\w+=.*|@\w+|[\d*/,-]+"  # an assignment, or a schedule of cron
)
"""First words of a shell's line that have another command line behind them."""


@dataclass(frozen=True, slots=True)
class Line:
    """One opsctl line of a page: `words` without the program's name, `text` as it stands there."""

    page: str
    number: int
    section: str
    """The heading above it."""
    text: str
    words: tuple[str, ...]
    typed: bool
    """Whether it stands in a block to be typed; else it is named in a sentence."""
    is_flag: bool = False
    """Whether it is only a flag, which some command has to have."""
    exit_code: int | None = None
    output: tuple[str, ...] = ()


def opsctl_lines(page: str, text: str) -> list[Line]:
    """Every opsctl line of a page, in order, those in sentences too. Blocks of no shell's language are passed over.

    >>> [(line.words, line.exit_code) for line in opsctl_lines("x.md", "    opsctl triage  # exit 1\\n")]
    [(('triage',), 1)]
    """
    return [line for line in _lines(page, text) if not line.is_flag]


def named_flags(page: str, text: str) -> list[Line]:
    """Every flag that a sentence names without its command.

    >>> [line.words for line in named_flags("x.md", "Then add `--prefer files`, not `-x`.\\n")]
    [('--prefer',)]
    """
    return [line for line in _lines(page, text) if line.is_flag]


def _lines(page: str, text: str) -> list[Line]:
    found: list[Line] = []
    section, fence, shell = "", "", True
    pieces: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        mark = _FENCE.match(raw)
        if mark and not fence:
            fence, shell = mark[1], mark[2].lower() in _SHELLS
        elif mark and mark[1].startswith(fence) and not mark[2]:
            fence, shell = "", True
        elif fence or raw.startswith(("    ", "\t")):
            if not shell:
                continue
            if _states_more(found, raw):
                found[-1] = _with_statement(found[-1], raw)
            elif raw.rstrip().endswith("\\"):
                pieces.append(raw.rstrip()[:-1])
            else:
                line, pieces = " ".join([*pieces, raw]), []
                found += _typed(Line(page, number, section, line.strip(), (), typed=True), line)
        elif heading := _HEADING.match(raw):
            section = heading[1]
        else:
            found += _named(Line(page, number, section, "", (), typed=False), raw)
    return found


def _states_more(found: Sequence[Line], raw: str) -> bool:
    return bool(found) and found[-1].typed and bool(_EXIT.match(raw.strip()) or _MORE.match(raw))


def _with_statement(line: Line, comment: str) -> Line:
    stated = _EXIT.search(comment)
    return replace(
        line,
        exit_code=int(stated[1]) if stated else line.exit_code,
        output=(*line.output, *_QUOTED.findall(comment)),
    )


def _typed(line: Line, raw: str) -> Iterator[Line]:
    """The commands of one line of a shell that are opsctl's: behind a prompt, sudo, a schedule or a pipe."""
    for words in _commands(_PROMPT.sub("", raw)):
        at = next((n for n, word in enumerate(words) if _OPSCTL.fullmatch(word)), None)
        if at is None or (at > 0 and not _BEFORE.fullmatch(words[0])):
            continue
        found = replace(line, words=tuple(words[at + 1 :]))
        yield _with_statement(found, raw) if _EXIT.search(raw) else found


def _named(line: Line, raw: str) -> Iterator[Line]:
    for span in _SPAN.findall(raw):
        for words in _commands(span)[:1]:
            yield replace(line, text=span, words=tuple(word for word in words[1:] if word not in {"...", "…"}))
    for flag in _FLAG_SPAN.findall(raw):
        yield replace(line, text=flag, words=(flag,), is_flag=True)


def _commands(text: str) -> list[list[str]]:
    """The simple commands of a shell's line, as words; none where it cannot be read, for that is not ours."""
    lexer = shlex.shlex(_COMMENT.sub("", _PLACEHOLDER.sub("PLACEHOLDER", text)), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    commands: list[list[str]] = [[]]
    try:
        for word in lexer:
            if _OPERATORS.issuperset(word):
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError:  # an open quote
        return []
    return [words for words in commands if words]
