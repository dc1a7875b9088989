"""The door to other programs: run to the end under a clock, with an environment that was chosen word by word."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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


def run(words: Sequence[str], *, environment: Mapping[str, str], timeout_s: float) -> Finished:
    """Run a program to its end, or kill it after `timeout_s`."""
    try:
        done = subprocess.run(
            list(words),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finished(None, b"", f"still running after {timeout_s:g} s")
    return Finished(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def start(words: Sequence[str], *, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program without waiting; its output is thrown away."""
    return subprocess.Popen(
        list(words),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
