"""`opsctl drill run --full`: there and back with a real PM2 and real Baileys, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.baileys.door import install, link_programs
from tests.integration.processes import processes_of
from tests.switch.rig import HERE

if TYPE_CHECKING:
    from tests.conftest import RunOpsctl

CHECKS = [
    "messages on PostgreSQL",
    "the fallback code is prepared",
    "a warm copy of every company",
    "switched, every company connected",
    "messages go on on the folders",
    "brought back, every company connected",
    "messages go on on PostgreSQL",
    "no message is lost",
    "no session is re-keyed",
    "no key is lost",
]
WORDS = ("drill", "run", "--full", "--companies", "1", "--json", "--packages", str(HERE))


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with node and npm."""
    install(HERE)
    (tmp_path / "bin").mkdir()
    link_programs(tmp_path / "bin")
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def nothing_is_left(scratch: Path) -> None:
    give_up_at = time.monotonic() + 15
    while left := processes_of(scratch):
        assert time.monotonic() < give_up_at, left
        time.sleep(0.1)


@pytest.mark.long
def test_a_full_drill_goes_there_and_back_and_leaves_nothing(path: str, place: Path, run_opsctl: RunOpsctl) -> None:
    done = run_opsctl(*WORDS, "--scratch", place, env={"PATH": path}, timeout=240)
    assert done.returncode == 0, done
    document = done.json()
    assert [(row["check"], row["passed"]) for row in document["rows"]] == [(check, True) for check in CHECKS]
    assert (document["rto"]["scope"], document["rto"]["met"]) == ("connected", None)  # it never claims the target
    facts = document["facts"]
    assert facts["restore_s"] > 0
    assert facts["failback_s"] > 0
    for part in ("detection", "decision", "network", "WhatsApp's own login"):
        assert part in facts["not_measured"]
        assert part in document["summary"]
    nothing_is_left(place)
    assert list(place.iterdir()) == []


def test_a_full_drill_that_is_killed_leaves_no_process(path: str, place: Path) -> None:
    env = {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(place.parent), "TMPDIR": str(place)}
    env["OPSCTL_STATE_DIR"] = str(place.parent / "state-of-no-drill")
    drill = subprocess.Popen(
        [sys.executable, "-m", "opsctl", *WORDS, "--scratch", str(place)], env=env, stdout=subprocess.DEVNULL
    )
    give_up_at = time.monotonic() + 60
    while not list(place.glob("opsctl-drill-*/pm2/pids/*.pid")):
        assert drill.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    drill.send_signal(signal.SIGKILL)
    drill.wait()
    nothing_is_left(place)


@pytest.mark.parametrize("missing", ["node", "npm", "git"])
def test_what_a_full_drill_needs_and_does_not_find_is_named_first(
    tmp_path: Path, place: Path, run_opsctl: RunOpsctl, missing: str
) -> None:
    programs = tmp_path / "few"
    programs.mkdir()
    for name in {"node", "npm", "git"} - {missing}:
        (programs / name).write_text("#!/bin/sh\necho v20.0.0\n")
        (programs / name).chmod(0o755)
    done = run_opsctl(*WORDS, "--scratch", place, env={"PATH": str(programs)})
    assert done.returncode == 5, done
    assert done.json()["error"]["message"] == f"no full drill can be held: {missing} is not found on PATH"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--full", "--fault", "frozen"), 2, "--full has an outage of its own"),
        (("--packages", "/nowhere"), 2, "--packages is of --full"),
        (("--full", "--packages", "/nowhere"), 5, "/nowhere/node_modules has no baileys"),
    ],
)
def test_a_line_that_makes_no_sense_is_said_to(
    path: str, place: Path, run_opsctl: RunOpsctl, words: tuple[str, ...], code: int, sentence: str
) -> None:
    done = run_opsctl("drill", "run", "--scratch", place, *words, env={"PATH": path})
    assert done.returncode == code, done
    assert sentence in done.stderr
    assert list(place.iterdir()) == []
