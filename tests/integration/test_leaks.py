"""`opsctl selftest leaks`: no planted secret leaves, and one that does is found."""

from __future__ import annotations

import gzip
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from opsctl import process
from opsctl.cli import tree
from opsctl.journal import Journal
from opsctl.operations import leak_phases, leaks
from opsctl.operations.leak_stage import CHANNELS, Phase, Stage
from opsctl.operations.leaks import look_for_leaks
from opsctl.operations.secret_search import Search, Secret

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.conftest import RunOpsctl
    from tests.forks import Forks

COMMANDS = [name for name, _ in tree.commands() if name != "selftest leaks"]


@pytest.mark.long
def test_no_secret_leaves_whatever_is_typed_and_whatever_breaks(forking: Forks, tmp_path: Path) -> None:
    def run(words: Sequence[str], environment: Mapping[str, str]) -> process.Finished:
        done = forking.run(*words, env=environment)
        return process.Finished(done.returncode, done.stdout.encode(), done.stderr)

    tmp_path.chmod(0o711)
    report = look_for_leaks(commands=COMMANDS, scratch=tmp_path, journal=Journal(), run=run)
    assert report.exit_code == 0, report
    assert report.facts["leaks"] == report.facts["bugs"] == []
    planted = report.facts["secrets"]
    assert planted > 100
    assert [row.channel for row in report.rows] == list(CHANNELS)
    for row in report.rows:
        assert row.found_when_planted == f"{planted} of {planted}"
        assert row.searched > 0, row
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_searched(forking: Forks, tmp_path: Path) -> None:
    shorter = (
        "from opsctl.operations import leaks\n"
        "leaks.PHASES = leaks.PHASES[-1:]\n"
        "leaks.the_rest = lambda names: leaks.PHASES[0] if 'keys stats' in names else None"
    )
    env = {"HOME": str(tmp_path), "OPSCTL_STATE_DIR": str(tmp_path / "state")}
    done = forking.run("selftest", "leaks", "--json", env=env, before=shorter)
    assert done.returncode == 0, done
    assert done.json()["facts"] | {"secrets": 0} == {"secrets": 0, "lines": 2, "leaks": [], "blind": [], "bugs": []}


def test_every_command_is_typed() -> None:
    every = [line for phase in (*leak_phases.PHASES, leak_phases.the_rest(COMMANDS)) for line in phase.lines]
    assert [name for name in COMMANDS if not any(line.startswith(name) for line in every)] == []
    assert [line for line in every if tree.problem(line.split(), typed=False)] == []


def let_out(stage: Stage) -> None:
    """A secret in every place but what is printed."""
    state, password = stage.folder / "state", stage.planted.password
    (state / "spool").mkdir(parents=True, exist_ok=True)
    (state / "last-run.json").write_text(json.dumps({"said": password}))
    (state / "spool" / "1-x").write_bytes(gzip.compress(stage.planted.bot_token.encode()))
    (stage.folder / "tmp" / stage.planted.sentry_key).touch()
    for path in ("/api/1/envelope/", f"/bot{stage.planted.bot_token}/sendMessage", "/ping/x"):
        leaks._post(stage.catcher, path, password.encode())


def test_a_secret_that_leaves_is_found_wherever_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = "import os, sys; print(os.environ['DATABASE_URL']); print(os.environ['SENTRY_DSN'], file=sys.stderr)"
    monkeypatch.setattr(process, "opsctl_words", lambda *_: [sys.executable, "-c", leaking])
    monkeypatch.setattr(leaks, "PHASES", (Phase("x", ("config show", "config show --json"), prepare=let_out),))
    report = look_for_leaks(commands=(), scratch=None, journal=Journal())
    assert report.exit_code == 1
    found = report.facts["leaks"]
    assert {line.partition(" in ")[2].partition(":")[0] for line in found} == set(CHANNELS)
    assert "password in JSON: config show --json" in found
    assert "Sentry key in stderr: config show" in found
    assert "bot token in spool: 1-x" in found
    assert "bot token in Telegram messages: its address" not in found
    assert report.failure is not None
    assert "p@ss" not in str(report)


def test_a_secret_that_leaves_in_any_phase_is_found_in_that_phase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leaking = 'echo "$DATABASE_URL" "$SENTRY_DSN"'
    monkeypatch.setattr(process, "opsctl_words", lambda *_: ["/bin/sh", "-c", leaking])
    found: dict[str, int] = {}
    act = leaks._act

    def counted(stage: Stage, phase: Phase) -> None:
        before = len(stage.search.leaks)
        act(stage, phase)
        found[phase.name] = len(stage.search.leaks) - before

    monkeypatch.setattr(leaks, "_act", counted)
    tmp_path.chmod(0o711)
    assert look_for_leaks(commands=COMMANDS, scratch=tmp_path, journal=Journal()).exit_code == 1
    assert found.keys() == {phase.name for phase in (*leak_phases.PHASES, leak_phases.the_rest(COMMANDS))}
    assert {"a database that takes no writes", "a disk that is full", "a database that is frozen"} < found.keys()
    assert {name: count for name, count in found.items() if not count} == {}


def test_a_search_that_is_blind_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PHASES", ())
    monkeypatch.setattr(leaks, "_post", lambda *_: None)
    report = look_for_leaks(commands=(), scratch=None, journal=Journal())
    assert report.exit_code == 1
    assert report.facts["blind"] == ["Sentry envelopes", "Telegram messages", "pings"]


def test_where_it_cannot_be_held_it_is_refused(run_opsctl: RunOpsctl, tmp_path: Path) -> None:
    done = run_opsctl("selftest", "leaks", "--scratch", tmp_path / "nowhere")
    assert done.returncode == 5
    assert "no search can be held" in done.stderr


KEY = bytes(range(200, 232))
TEXT = 'p@ss/w"rd é%'


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        *((Secret.text("x", TEXT), spelling.decode()) for spelling in Secret.text("x", TEXT).spellings),
        *((Secret.key("x", KEY), text) for text in (json.dumps([*KEY]), KEY.hex(), str(KEY), f'"{[*KEY]}"')),
        (Secret.key("x", KEY), json.dumps({"type": "Buffer", "data": "yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc="})),
    ],
)
def test_every_spelling_of_a_secret_is_found(secret: Secret, said: str) -> None:
    search = Search((secret,))
    assert search.look("stdout", "x", f"before {said} after".encode())
    assert search.look("spool", "x", gzip.compress(said.encode()))
    assert search.look("spool", "x", gzip.compress(said.encode() * 100)[:-8])
    assert not search.look("stdout", "x", b"nothing")
    assert not search.look("stdout", "x", said.encode(), allowed=("x",))


BUG = """
import os
import opsctl.db, orjson

def raises(*_, **__):
    raise RuntimeError({secret!r}, {secret!r})

{place} = raises
"""


@pytest.mark.parametrize("place", ["opsctl.db.connect", "orjson.loads"])
def test_a_bug_anywhere_in_any_command_shows_no_secret(forking: Forks, tmp_path: Path, place: str) -> None:
    secret = "postgresql://ops:pLaNtEd-s3cret@db/whatsapp"
    env = {
        "HOME": str(tmp_path),
        "OPSCTL_STATE_DIR": str(tmp_path / "state"),
        "APP_DIR": str(tmp_path),
        "DATABASE_URL": secret,
        "WHATSAPP_ADDRESS": "none",
    }
    arguments: dict[str, tuple[str, ...]] = {
        "sessions repair": ("--company", "1", "--from", "standby", "--service-stopped", "--yes"),
        "sessions failback": ("--service-stopped", "--yes"),
        "keys undo": ("20260131T030405Z-0a1b2c", "--yes"),
        "keys cleanup": ("--yes",),
        "runbook show": ("1",),
        "drill run": ("--scratch", "/nowhere"),
        "selftest leaks": ("--scratch", "/nowhere"),
    }
    ended = set()
    for name in (*COMMANDS, "selftest leaks"):
        done: Any = forking.run(
            *name.split(), *arguments.get(name, ()), "--json", env=env, before=BUG.format(place=place, secret=secret)
        )
        assert "pLaNtEd" not in done.stdout + done.stderr, name
        ended.add(done.returncode)
    assert 70 in ended
    kept = [path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert not [content for content in kept if b"pLaNtEd" in content]
