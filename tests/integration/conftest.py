"""A seeded fleet and a folder to restore it to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database, RunOpsctl


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch folder that every user reaches: pytest's own keeps others out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()


@pytest.fixture
def empty_fleet(database: Database, place: Path, run_opsctl: RunOpsctl) -> Fleet:
    return Fleet(database, place, run_opsctl)


@pytest.fixture
def fleet(empty_fleet: Fleet) -> Fleet:
    empty_fleet.seed()
    return empty_fleet
