"""What a test needs of the machine. A skip made here is listed at the end of `python -m tests`; any other one fails it.

Each function gives a mark: `@needs.root()` above a test, or `pytestmark = [needs.debian("pgbouncer")]` for a module.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

NOT_PROVEN = "not proven here: "
POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")
"""Where Debian's packages put the major version that production has."""

_PROGRAMS = {
    "pgbouncer": "pgbouncer",
    "e2fsprogs": "mkfs.ext4",
    "fuse2fs": "fuse2fs",
    "tmux": "tmux",
    "psmisc": "fuser",
    "cron": "crontab",
    "systemd": "systemd-analyze",
    "zsh": "zsh",
    "fish": "fish",
}


def root() -> pytest.MarkDecorator:
    """The test changes owners or becomes another user."""
    return _mark(os.geteuid() == 0, "what only root can arrange (files of other users)")


@functools.cache
def namespace(kind: Literal["mount", "user"]) -> pytest.MarkDecorator:
    """The test mounts something for itself alone, or is somebody else; many containers forbid it to their root."""
    tried = subprocess.run(["unshare", f"--{kind}", "true"], stderr=subprocess.DEVNULL, check=False)
    there = os.geteuid() == 0 and tried.returncode == 0
    return _mark(there, f"what only root in a {kind} namespace can arrange (read-only mounts, users without account)")


@functools.cache
def systemd() -> pytest.MarkDecorator:
    """The test boots a systemd of its own, in namespaces."""
    words = ["unshare", "--mount", "--pid", "--fork", "--cgroup", "--uts", "--ipc", "sh", "-euc"]
    mounts = "mount -t cgroup2 none /sys/fs/cgroup; mount -t cgroup -o none,name=systemd none /sys/fs/cgroup"
    tried = subprocess.run([*words, mounts], stderr=subprocess.DEVNULL, check=False)
    there = os.geteuid() == 0 and tried.returncode == 0 and Path("/lib/systemd/systemd").exists()
    return _mark(there, "what needs a systemd (the Debian package, and root in namespaces)")


def debian(package: str) -> pytest.MarkDecorator:
    """The test runs the program of this Debian package, by its path: `program` has it."""
    return _mark(program(package) is not None, f"what needs the Debian package {package}")


def program(package: str) -> str | None:
    """Where the program of this Debian package is; a user's PATH has no sbin."""
    return shutil.which(_PROGRAMS[package], path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def postgres15() -> pytest.MarkDecorator:
    """The test runs the server of `POSTGRESQL_15`; the drill's embedded one is newer."""
    return _mark((POSTGRESQL_15 / "postgres").exists(), "PostgreSQL 15, production's major version")


def _mark(there: bool, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not there, reason=NOT_PROVEN + what)
