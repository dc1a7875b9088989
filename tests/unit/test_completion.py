"""TAB in a real bash, with the lines that `opsctl --show-completion bash` gives to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsctl
from opsctl.operations.runbooks import pages

if TYPE_CHECKING:
    from collections.abc import Callable

PRESS_TAB = """\
source completion
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_opsctl_completion opsctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What bash offers after these words, the last one of which is being typed."""
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
    script = subprocess.run(
        ["opsctl", "--show-completion", "bash"], env=env, capture_output=True, text=True, check=True
    )
    (folder / "completion").write_text(script.stdout)

    def press(*words: str) -> list[str]:
        line = ["bash", "--norc", "-c", PRESS_TAB, "bash", "opsctl", *words]
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
