"""TAB in real shells, with the lines that `opsctl --show-completion` gives to whoever types it there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsctl
from opsctl.operations.runbooks import pages
from tests import needs

if TYPE_CHECKING:
    from collections.abc import Callable

PRESS_TAB = {
    "bash": """\
opsctl --show-completion >completion
source completion
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_opsctl_completion opsctl
printf '%s\\n' "${COMPREPLY[@]}"
""",
    # zsh calls a completion with `words` and CURRENT, and it calls `_arguments` with ("word":"description" ...).
    "zsh": """\
opsctl --show-completion >completion
compdef() { :; }
_arguments() { eval "offered=${${1#*:*:}[2,-2]}"; print -rl -- "${offered[@]%%:*}" }
source ./completion
words=("$@")
CURRENT=$#
_opsctl_completion
""",
    "fish": """\
opsctl --show-completion >completion
source completion
complete --do-complete "$argv" | string split --fields 1 \\t
true
""",
}
START = {
    "bash": ("bash", "--norc", "-c", PRESS_TAB["bash"], "bash"),
    "zsh": ("zsh", "-f", "-c", PRESS_TAB["zsh"], "zsh"),
    "fish": ("fish", "--no-config", "-c", PRESS_TAB["fish"]),
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What a shell offers after these words, the last one of which is being typed."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "opsctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m opsctl "$@"\n')
    program.chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(opsctl.__file__).parents[1]),
        "HOME": str(folder),
        "POSTGRES_PORT": "garbage",  # nobody may need sound settings to type
    }

    def press(*words: str, shell: str = "bash") -> list[str]:
        line = [*START[shell], "opsctl", *words]
        done = subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return press


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sess",), ["sessions"]),
        (("sessions", "re"), ["restore", "repair"]),
        (("sessions", "restore", "--serv"), ["--service-stopped"]),
        (("sessions", "restore", "--source", ""), ["auto", "database", "replica", "standby", "cache"]),
        (("runbook", "show", "1"), ["1-postgresql-unreachable"]),
        (("runbook", "show", ""), [page.name for page in pages()]),
    ],
)
def test_tab_offers_what_fits(tab: Callable[..., list[str]], words: tuple[str, ...], offered: list[str]) -> None:
    assert tab(*words) == offered


@pytest.mark.parametrize(
    "shell", [pytest.param("zsh", marks=needs.debian("zsh")), pytest.param("fish", marks=needs.debian("fish"))]
)
def test_tab_offers_commands_flags_and_pages_in_other_shells_too(tab: Callable[..., list[str]], shell: str) -> None:
    assert sorted(tab("sessions", "re", shell=shell)) == ["repair", "restore"]
    assert tab("sessions", "restore", "--serv", shell=shell) == ["--service-stopped"]
    assert tab("runbook", "show", "1", shell=shell) == ["1-postgresql-unreachable"]
