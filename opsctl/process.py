"""The door to other programs: run to the end under a clock, with an environment that was chosen word by word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine, to run programs as."""

    name: str
    uid: int
    gid: int
    home: Path


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended. `exit_code` is negative for a signal, None where it was still running at the limit."""

    exit_code: int | None
    stdout: bytes
    stderr: str

    def document(self) -> dict[str, Any]:
        """The JSON object on stdout; empty where there is none."""
        try:
            value = orjson.loads(self.stdout)
        except orjson.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}


def opsctl_words(*words: str) -> list[str]:
    """The command line of this very opsctl."""
    return [sys.executable, "-m", "opsctl", *words]


def bare_environment(**more: str) -> dict[str, str]:
    """What a program needs to start, and `more`: nothing of the caller's settings or secrets passes."""
    package = str(Path(__file__).resolve().parents[1])  # also where opsctl runs from a checkout
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": package, "LANG": "C.UTF-8", **more}


def run(
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
    account: Account | None = None,
    folder: Path | None = None,
) -> Finished:
    """Run a program to its end, or kill it and what it started after `timeout_s`. Raises OSError where it cannot run.

    As root it can run as another `account`, with that user's groups; in `folder`, else as another user in `/`.
    """
    with subprocess.Popen(
        list(words),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=folder or ("/" if account else None),  # where every user may be
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=os.getgrouplist(account.name, account.gid) if account else None,
    ) as program:
        try:
            stdout, stderr = program.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Finished(None, b"", f"still running after {timeout_s:g} s")
        finally:
            if program.returncode is None:  # also where a signal asks us to stop
                os.killpg(program.pid, signal.SIGKILL)
    return Finished(program.returncode, stdout, stderr.decode(errors="replace"))


def start(words: Sequence[str], *, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program without waiting; its output is thrown away."""
    return subprocess.Popen(
        list(words),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
