"""Typed by somebody who may not read what it is about: named, with what to do, and never taken for a bug."""

from __future__ import annotations

import pytest

from tests import needs
from tests.forks import AS_NOBODY
from tests.integration.fleet import FIRST, SECOND, Fleet

pytestmark = needs.root()


@pytest.fixture
def restored(fleet: Fleet) -> Fleet:
    """Two companies' folders, in a folder that nobody else may enter."""
    fleet.restored()
    fleet.place.chmod(0o755)
    fleet.target.chmod(0o700)
    return fleet


@pytest.mark.parametrize(
    "words",
    [
        ("sessions", "verify"),
        ("sessions", "verify", "--against", "database"),
        ("sessions", "failback", "--dry-run"),
        ("sessions", "failback", "--yes", "--service-stopped"),
    ],
)
def test_a_sessions_folder_is_for_its_owner_to_read(restored: Fleet, words: tuple[str, ...]) -> None:
    done = restored.opsctl(*words, env={"SESSIONS_DIR": str(restored.target)}, before=AS_NOBODY)
    assert done.returncode == 5, done
    assert f"{restored.target} cannot be read: Permission denied" in done.stderr
    assert "next: type it as the owner of the folders, or as root" in done.stderr


def test_the_companies_that_can_be_read_are_verified_all_the_same(restored: Fleet) -> None:
    restored.target.chmod(0o755)
    readable = restored.target / f"company_{SECOND}"
    readable.chmod(0o755)
    for file in readable.iterdir():
        file.chmod(0o644)
    for words in ((), ("--against", "database")):
        done = restored.opsctl("sessions", "verify", restored.target, *words, "--json", before=AS_NOBODY)
        document = done.json()
        assert (done.returncode, document["error"]["hint"]) == (1, "type it as the owner of the folders, or as root")
        rows = {row["company"]: row for row in document["rows"]}
        assert rows[FIRST]["verdict"] == "cannot be read"
        assert rows[FIRST]["problems"] == ["its folder cannot be read: Permission denied"]
        assert rows[SECOND]["verdict"] == "will log in"
        assert (rows[FIRST]["database"], rows[SECOND]["database"]) == (None, "equal" if words else None)
        assert "sessions restore" not in done.stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("cache", "inspect"), 4),
        (("runbook", "check"), 2),
        (("config", "show", "--env-file"), 3),
        (("sessions", "verify"), 5),
        (("sessions", "failback", "--dry-run", "--from"), 5),
    ],
)
def test_what_is_named_on_the_line_too(fleet: Fleet, words: tuple[str, ...], code: int) -> None:
    fleet.place.chmod(0o755)
    closed = fleet.place / "closed"
    closed.touch(0o600) if words[0] != "sessions" else closed.mkdir(0o700)
    done = fleet.opsctl(*words, closed, before=AS_NOBODY)
    assert (done.returncode, f"{closed} cannot be read: Permission denied" in done.stderr) == (code, True), done


def test_a_history_that_may_not_be_read_is_not_said_to_be_empty(fleet: Fleet) -> None:
    assert fleet.opsctl("drill", "history", before=AS_NOBODY).returncode == 0
    fleet.place.chmod(0o755)
    fleet.state.mkdir(mode=0o755, exist_ok=True)
    (fleet.state / "history.jsonl").touch(0o600)
    done = fleet.opsctl("drill", "history", before=AS_NOBODY)
    assert (done.returncode, "no drill" in done.stdout + done.stderr) == (5, False)
    assert f"{fleet.state}/history.jsonl cannot be read: Permission denied" in done.stderr
