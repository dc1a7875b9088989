"""What is installed is pinned: Python's packages with hashes, Node's without the address they came from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = [path for path in ROOT.rglob("package-lock.json") if not {"node_modules", ".venv"} & set(path.parts)]


def pinned(name: str) -> dict[str, str]:
    """Names and versions, each of which has to have a hash."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=[^\s#])", text) if entry.strip() and not entry.startswith("#")]
    assert all("--hash=sha256:" in entry for entry in entries)
    found = [re.match(r"([a-z0-9-]+)(?:\[[a-z,]+\])?==(\S+)", entry) for entry in entries]
    assert None not in found, entries
    return {match[1]: match[2] for match in found if match}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", requirement)[0] for requirement in requirements}


def test_what_the_quick_start_installs_is_pinned_and_is_all_that_opsctl_needs() -> None:
    run, dev = pinned("run.txt"), pinned("dev.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["drill"]]
    assert names(needed) <= run.keys()
    assert run.items() <= dev.items()
    assert names([*extras["metrics"], *project["dependency-groups"]["dev"]]) <= dev.keys()


def test_no_requirement_names_where_packages_come_from() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_lock_file_holds_hashes_and_no_address_and_stays_so(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    assert '"integrity": "sha512-' in text
    assert '"resolved"' not in text
    options = (lock.parent / ".npmrc").read_text(encoding="utf-8").splitlines()
    assert "omit-lockfile-registry-resolved=true" in options
