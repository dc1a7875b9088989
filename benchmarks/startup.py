"""Start-up against a bare Typer application's `--help`.

    python -m benchmarks.startup | tee benchmarks/startup.txt

The rival is what Typer's tutorial builds: two commands, default settings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Bar, rounds_of, verdict
from opsctl.process import bare_environment, opsctl_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROUNDS = 25
BARE = '''
import typer

app = typer.Typer()

@app.command()
def hello(name: str):
    """Say hello."""

@app.command()
def goodbye(name: str, formal: bool = False):
    """Say goodbye."""

app()
'''


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    with tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as folder:
        bare = Path(folder, "bare.py")
        bare.write_text(BARE)
        plain = bare_environment(HOME=folder, OPSCTL_ENV_FILE=os.devnull)
        completing = {
            **plain,
            "_OPSCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": "opsctl sessions re",
            "COMP_CWORD": "2",
        }
        contestants = {
            "bare --help": _timed([sys.executable, str(bare), "--help"], plain),
            "opsctl --version": _timed(opsctl_words("--version"), plain),
            "completion": _timed(opsctl_words(), completing),
            "opsctl --help": _timed(opsctl_words("--help"), plain),
            "opsctl sessions restore -h": _timed(opsctl_words("sessions", "restore", "-h"), plain),
        }
        for run in contestants.values():
            run()  # compiled and cached
        rounds = rounds_of(contestants, ROUNDS)
    bars = [
        Bar("opsctl --version", "bare --help", 1.0),
        Bar("completion", "bare --help", 1.0),
        Bar("opsctl --help", "bare --help", 1.2),
        Bar("opsctl sessions restore -h", "bare --help", 1.2),
    ]
    return verdict(rounds, bars)


def _timed(words: Sequence[str], environment: Mapping[str, str]) -> Callable[[], float]:
    def run() -> float:
        started = time.monotonic()
        subprocess.run(list(words), env=dict(environment), stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - started

    return run


if __name__ == "__main__":
    sys.exit(main())
