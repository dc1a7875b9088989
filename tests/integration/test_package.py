"""What is installed from a wheel: the program with its pages, which need neither the repository nor a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from typing import TYPE_CHECKING

import pytest

from opsctl.operations.runbooks import pages
from tests import needs
from tests.forks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the opsctl of a wheel, in an environment that has the packages it needs and not this repository."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "runbooks", source / "runbooks")
    shutil.copytree(
        REPOSITORY / "opsctl", source / "opsctl", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    # As README's own line does, with the setuptools that is pinned.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = str(folder / "venv" / "bin" / "python")
    # A path to other packages would have pip find this repository there, and install nothing.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    into = [*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(into, check=True, timeout=120, env=env)

    def run(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": sysconfig.get_path("purelib")}
        line = [*before, str(folder / "venv" / "bin" / "opsctl"), *words]
        return subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_the_pages_are_in_the_wheel(installed: Run) -> None:
    done = installed("runbook", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(pages())} pages" in done.stdout
    for page in pages():
        done = installed("runbook", "show", page.name, "--json")
        assert done.returncode == 0, done
        assert page.title in done.stdout


@needs.namespace("mount")
def test_the_installed_pages_are_checked_without_a_network(installed: Run) -> None:
    apart = ("unshare", "--net")
    unreachable = installed(
        "-c", before=(*apart, sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))", "")
    )
    assert "Network is unreachable" in unreachable.stderr
    done = installed("runbook", "check", before=apart)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert f"opsctl lines of {len(pages())} pages are lines that this opsctl takes" in done.stdout
