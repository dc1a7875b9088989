"""How a folder is written: nothing that stands there is followed or written over, creds.json is last, all is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from opsctl.baileys.filenames import CREDS_FILE, MANIFEST_FILE
from opsctl.stores.folder import opened
from opsctl.stores.records import Origin, Record
from opsctl.stores.staging import CompanyWriter, Order, Staged, check_written

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT = "2026-01-31 03:04:05+00"
ORIGIN = Origin(
    "962302", "R", "production", "database", AT, "1", 1, None, "operator", stale_keys_dropped=False, opsctl="0"
)
ORDER = Order("company_962302", b"{}", AT, ORIGIN, AT, fresh=True, drop_stale=False)
SESSIONS = [f"session-{number}.0.json" for number in range(70)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "company_962302"
    path.mkdir(mode=0o700)
    with opened(path) as fd:
        yield path, fd


def written(fd: int) -> Staged:
    writer = CompanyWriter(ORDER, fd)
    for number in range(len(SESSIONS)):
        writer.add(Record("session", f"{number}.0", b'{"_sessions":{},"version":"v1"}', AT, None))
    return writer.finish()


def test_creds_are_the_last_file(folder: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    real = os.open

    def open_(name: str, *args: int, **words: int) -> int:
        names.append(name)
        return real(name, *args, **words)

    monkeypatch.setattr(os, "open", open_)
    assert written(folder[1]).damage is None
    assert names[-1] == CREDS_FILE
    assert sorted(names) == sorted([*SESSIONS, MANIFEST_FILE, CREDS_FILE])
    assert {path.stat().st_mode & 0o777 for path in folder[0].iterdir()} == {0o600}


@pytest.mark.parametrize("name", [SESSIONS[0], MANIFEST_FILE, CREDS_FILE])
@pytest.mark.parametrize("link", [False, True], ids=["a file", "a link"])
def test_what_stands_under_a_name_is_neither_followed_nor_written_over(
    folder: tuple[Path, int], tmp_path: Path, name: str, *, link: bool
) -> None:
    path, fd = folder
    precious = tmp_path / "precious"
    precious.write_text("kept")
    if link:
        (path / name).symlink_to(precious)
    else:
        precious.rename(path / name)
    with pytest.raises(FileExistsError):
        written(fd)
    assert (path / name).read_text() == "kept"


def test_what_reads_back_differently_is_damage(folder: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: real(*args).replace(b"v1", b"v7"))
    damage = written(folder[1]).damage
    assert damage is not None
    assert "reads back differently from what was written" in damage


def test_a_finished_folder_is_held_against_its_manifest(folder: tuple[Path, int]) -> None:
    path, fd = folder
    written(fd)
    visited: dict[str, str] = {}
    assert check_written(fd, visited.__setitem__) is None
    assert visited.keys() == {*SESSIONS, CREDS_FILE}

    (path / SESSIONS[5]).rename(path / "session-999.0.json")
    assert check_written(fd, visited.__setitem__) == "its files are not those of its manifest"
    (path / "session-999.0.json").rename(path / SESSIONS[5])
    (path / "session-999.0.json").touch()
    assert check_written(fd, visited.__setitem__) == "its files are not those of its manifest"
    (path / "session-999.0.json").unlink()
    (path / SESSIONS[5]).unlink()
    assert check_written(fd, visited.__setitem__) == "its files are not those of its manifest"
    (path / SESSIONS[5]).touch()
    (path / CREDS_FILE).write_text("[]")
    assert check_written(fd, visited.__setitem__) == f"{CREDS_FILE} reads back differently from what was written"
