"""The command tree as it is installed: which lines it takes, and every command with its help."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import typer
import typer.main

from opsctl.cli import exits
from opsctl.errors import EXIT_CODES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HELP = ["-h", "--help"]
_PLACEHOLDER = re.compile(r"\$.*|[A-Z][A-Z_]*")


@cache
def root() -> Any:  # noqa: ANN401 - Typer keeps the type to itself
    """The whole tree."""
    from opsctl.cli import app

    return typer.main.get_command(app)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command's name, `sessions restore`, with the command itself, in the order of the help."""

    def below(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - as above
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, (*path, name))
            else:
                yield " ".join((*path, name)), command

    return below(root(), ())


def problem(words: Sequence[str], typed: bool) -> str | None:
    """Why opsctl would not take this line, or None. Nothing is run.

    A line that is not `typed` but named in a sentence may leave out what is required. Words in capitals and `$NAME`
    stand for values.

    >>> problem(["sessions", "restore", "--no-such-flag"], True)
    'No such option: --no-such-flag'
    >>> problem(["keys", "undo"], True), problem(["keys", "undo"], False), problem(["keys", "undo", "RUN"], True)
    ("Missing argument 'RUN'.", None, None)
    """
    command, rest, path = root(), list(words), "opsctl"
    while hasattr(command, "commands"):
        own = {option for param in command.params for option in param.opts}.union(_HELP)
        while rest and rest[0] in own:
            if rest.pop(0) in {"--show-completion", "--install-completion"}:
                del rest[:1]
        if not rest:
            return None
        name = rest.pop(0)
        if name not in command.commands:
            return f"there is no command {path} {name}"
        command, path = command.commands[name], f"{path} {name}"
    try:
        command.make_context(path, [word for word in rest if word not in _HELP], help_option_names=_HELP)
    except typer.TyperException as error:
        return None if _is_allowed(error, rest, typed=typed) else error.format_message().strip()
    return None


def _is_allowed(error: typer.TyperException, words: Sequence[str], *, typed: bool) -> bool:
    if type(error).__name__ == "MissingParameter":
        return not typed
    return isinstance(error, typer.BadParameter) and any(
        _PLACEHOLDER.fullmatch(word) and word in error.format_message() for word in words
    )


def flags() -> frozenset[str]:
    """Every flag of every command, and opsctl's own."""
    every = (root(), *(command for _, command in commands()))
    return frozenset(option for command in every for param in command.params for option in param.opts).union(_HELP)


def exit_codes(words: Sequence[str]) -> frozenset[int]:
    """With which codes a line can end; every code where it names no command.

    >>> 5 in exit_codes(["sessions", "undo", "--yes"]), 5 in exit_codes(["triage", "--json"])
    (True, False)
    """
    names = {name for name, _ in commands()}
    found = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in names), None)
    return exits.codes(found) if found else frozenset(EXIT_CODES)


def help_of(name: str, command: Any, *, width: int) -> str:  # noqa: ANN401 - Typer keeps the type to itself
    """What `opsctl NAME --help` prints on a terminal of that width."""
    context = command.context_class(
        command,
        info_name=f"opsctl {name}",
        terminal_width=width,
        max_content_width=width,
        help_option_names=_HELP,
    )
    text: str = command.get_help(context)
    return text
