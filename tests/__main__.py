"""The one command that checks everything: `python -m tests [arguments for pytest]`. CI runs the same.

Format, lint, types, walls, then the tests. It ends with what this machine could not prove (`tests/needs.py`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from tests.needs import NOT_PROVEN

REPOSITORY = Path(__file__).parents[1]
CHECKS = {
    "format": ["-m", "ruff", "format", "--check", "--quiet"],
    "lint": ["-m", "ruff", "check", "--quiet"],
    "types": ["-m", "mypy", "--no-error-summary"],
    "walls": ["-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-logo"],
}


MEMORY = Path("/dev/shm")
ROOMY_BYTES = 6 * 1024**3


def environment() -> dict[str, str]:
    """Scratch folders go into memory where there is enough: each restore syncs its filesystem, with all that is on it.

    A test that needs a disk of some kind makes one of its own.
    """
    if "TMPDIR" in os.environ or not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ROOMY_BYTES:
        return dict(os.environ)
    return os.environ | {"TMPDIR": str(MEMORY)}


def run(name: str, words: list[str]) -> bool:
    """Run one check; its own words pass through where it fails, and pytest's always."""
    started = time.monotonic()
    quiet = name in CHECKS
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if quiet and done.returncode:
        print(done.stdout)
    print(f"{name}: {'failed' if done.returncode else 'ok'}, {time.monotonic() - started:.1f} s", flush=True)
    return done.returncode == 0


def skips(report: Path) -> list[str]:
    """Why tests were skipped, each reason once, as pytest's JUnit file has it."""
    if not report.exists():  # pytest did not get that far
        return []
    found = ElementTree.parse(report).iter("skipped")
    return sorted({skipped.get("message", "") for skipped in found if skipped.get("type") != "pytest.xfail"})


def main(arguments: list[str]) -> int:
    """Run every check, also after one has failed; 1 if any did, or if a test was skipped for an unlisted reason."""
    ok = {name: run(name, words) for name, words in CHECKS.items()}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        # In memory more processes than two cores: what is left of the waiting is for the programs under test. On a disk
        # they would wait for each other's syncs.
        processes = "4" if environment().get("TMPDIR") == str(MEMORY) else "2"
        words = ["-m", "pytest", "-q", "-n", processes, "--dist", "worksteal", f"--junit-xml={report}", *arguments]
        ok["tests"] = run("tests", words)
        reasons = skips(report)
    unlisted = [reason for reason in reasons if not reason.startswith(NOT_PROVEN)]
    for reason in unlisted:
        print(f"skipped without tests/needs.py: {reason}")
    failed = [name for name, fine in ok.items() if not fine] + ["skips"] * bool(unlisted)
    print(
        f"not proven here: {', '.join(r.removeprefix(NOT_PROVEN) for r in reasons if r not in unlisted) or 'nothing'}"
    )
    print(f"failed: {', '.join(failed)}" if failed else f"all checks passed: {shlex.join(ok)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
