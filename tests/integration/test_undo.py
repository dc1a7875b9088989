"""`sessions undo`: exchanging back, what it refuses, and how long what was set aside is kept."""

from __future__ import annotations

import shutil
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from opsctl.stores import publishing
from opsctl.stores.publishing import Owner, locked_root
from opsctl.stores.records import Origin, manifest_lines
from tests.integration.fleet import FIRST, SECOND, Fleet, contents, rows_of, tree, unchanged

if TYPE_CHECKING:
    from pathlib import Path

OLD = b'{"the": "old one"}'


@pytest.fixture
def restored(fleet: Fleet) -> Fleet:
    """FIRST had a folder before, SECOND had none."""
    fleet.folder().mkdir(parents=True)
    (fleet.folder() / "creds.json").write_bytes(OLD)
    fleet.restored("--replace", "--yes")
    return fleet


def undo_refused(fleet: Fleet, exit_code: int, sentence: str, *words: str) -> None:
    with unchanged(fleet.place):
        done = fleet.undo(*words)
    assert done.returncode == exit_code, done
    assert sentence in done.stderr


@pytest.mark.parametrize("words", [["--yes"], ["--dry-run"]])
def test_where_nothing_was_restored_there_is_nothing_to_undo_and_nothing_is_made(
    empty_fleet: Fleet, words: list[str]
) -> None:
    undo_refused(empty_fleet, 5, f"there is no restore to undo in {empty_fleet.target}", *words)
    empty_fleet.target.mkdir()
    undo_refused(empty_fleet, 5, f"there is no restore to undo in {empty_fleet.target}", *words)


def test_undo_brings_the_old_folders_back_takes_new_ones_away_and_done_again_redoes(restored: Fleet) -> None:
    published = contents(restored.folder()), contents(restored.folder(SECOND))
    before = tree(restored.folder())
    with unchanged(restored.place):
        done = restored.undo("--dry-run", "--json")
        assert {name: row["action"] for name, row in rows_of(done).items()} == {
            f"company_{FIRST}": "exchange",
            f"company_{SECOND}": "take away",
        }
        undo_refused(restored, 2, "add --yes")
    assert restored.undo("--yes").returncode == 0
    assert contents(restored.folder()) == {"creds.json": OLD}
    assert restored.companies() == [f"company_{FIRST}"]
    assert restored.undo("--yes").returncode == 0
    assert (contents(restored.folder()), contents(restored.folder(SECOND))) == published
    assert tree(restored.folder()) == before


def test_a_folder_that_was_written_since_is_kept_until_that_may_be_discarded(restored: Fleet) -> None:
    (restored.folder() / "session-new.0.json").write_text("{}")
    done = restored.undo("--yes", "--json")
    assert done.returncode == 6
    assert f"company_{FIRST}: written since it was restored ('session-new.0.json')" in done.json()["error"]["message"]
    assert {name: row["action"] for name, row in rows_of(done).items()} == {
        f"company_{FIRST}": "refused",
        f"company_{SECOND}": "take away",
    }
    assert restored.companies() == [f"company_{FIRST}"]
    undo_refused(restored, 5, "written since it was restored", "--company", FIRST, "--yes")
    undo_refused(restored, 5, "written since it was restored", "--company", FIRST, "--dry-run")
    assert restored.undo("--company", FIRST, "--discard-changes", "--yes").returncode == 0
    assert contents(restored.folder()) == {"creds.json": OLD}
    (aside,) = restored.target.glob(f".opsctl/aside-*/company_{FIRST}")
    assert (aside / "session-new.0.json").exists()


def test_one_company_is_undone_and_the_other_stays(restored: Fleet) -> None:
    with unchanged(restored.folder()):
        done = restored.undo("--company", SECOND, "--yes", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert restored.companies() == [f"company_{FIRST}"]
    undo_refused(restored, 5, "did not publish company_999", "--company", "999", "--yes")
    undo_refused(restored, 5, "not a company id: '../x'", "--company", "../x", "--yes")


def test_a_partial_restore_keeps_what_other_companies_set_aside_and_each_run_can_be_undone(restored: Fleet) -> None:
    restored.key("session", "later", '{"_sessions": {}}')
    before = contents(restored.folder())
    second = restored.restored("--company", FIRST)["run_id"]
    runs = sorted(path.name.removeprefix("aside-") for path in restored.target.glob(".opsctl/aside-*"))
    assert len(runs) == 2
    assert runs[1] == second
    undo_refused(restored, 5, "restore ../x cannot be undone", "--run", "../x", "--yes")
    done = restored.undo("--run", runs[0], "--yes", "--verbose")  # of it only the new folder is left to undo
    assert done.returncode == 0
    assert f"restore {runs[0]} undone" in done.stdout
    assert restored.companies() == [f"company_{FIRST}"]
    assert "session-later.json" in contents(restored.folder())
    assert restored.undo("--yes").returncode == 0
    assert contents(restored.folder()) == before


ORIGIN = Origin(
    "c", "", "production", "database", "", None, None, None, "unknown", stale_keys_dropped=False, opsctl="0"
)


def make_folder(folder: Path, run_id: str | None, word: str) -> None:
    """A company's folder, published by `run_id`, or foreign."""
    folder.mkdir(parents=True)
    (folder / "creds.json").write_text(word)
    if run_id is not None:
        origin = Origin(**{**{name: getattr(ORIGIN, name) for name in ORIGIN.__slots__}, "run_id": run_id})
        with (folder / ".opsctl-manifest.json").open("wb") as file:
            file.writelines(manifest_lines(origin, []))


def words_of(root: Path) -> dict[str, str]:
    return {str(path.parent.relative_to(root)): path.read_text() for path in sorted(root.rglob("creds.json"))}


def recovered(root: Path) -> tuple[str, ...]:
    with locked_root(root, Owner.current(), run_id="R9") as there:
        return there.recover()


def test_what_a_killed_restore_left_is_settled_company_by_company(tmp_path: Path) -> None:
    own = tmp_path / ".opsctl"
    make_folder(tmp_path / "company_a", "R1", "a of R1, published")
    make_folder(own / "staging-R1/ready/company_a", None, "a before")
    make_folder(tmp_path / "company_b", None, "b before, still in place")
    make_folder(own / "staging-R1/ready/company_b", "R1", "b of R1, not published")
    make_folder(own / "staging-R1/building/company_c", None, "c half written")
    make_folder(tmp_path / "company_d", "R1", "d of R1, new")
    assert recovered(tmp_path) == ("R1",)
    found = {name: word for name, word in words_of(tmp_path).items() if "trash-" not in name}
    assert found == {
        "company_a": "a of R1, published",
        "company_b": "b before, still in place",
        "company_d": "d of R1, new",
        ".opsctl/aside-R1/company_a": "a before",
    }
    assert not list(own.glob("staging-*"))
    with locked_root(tmp_path, Owner.current(), run_id="R9") as root:
        assert root.undoable_runs() == ["R1"]
        assert root.undoable("R1") == {"company_a": True, "company_d": False}


@pytest.mark.parametrize(
    ("in_place", "ready", "old"),
    [(None, "R1", None), ("R1", None, None)],
    ids=["between the two renames", "before the old one is set aside"],
)
def test_an_exchange_that_was_killed_between_its_renames_is_completed(
    tmp_path: Path, in_place: str | None, ready: str | None, old: str | None
) -> None:
    staging = tmp_path / ".opsctl/staging-R1"
    (staging / "building").mkdir(parents=True)
    (staging / "ready").mkdir()
    make_folder(staging / "old/company_a", old, "before")
    if in_place:
        make_folder(tmp_path / "company_a", in_place, "of R1")
    if ready:
        make_folder(staging / "ready/company_a", ready, "of R1")
    assert recovered(tmp_path) == ("R1",)
    found = {name: word for name, word in words_of(tmp_path).items() if "trash-" not in name}
    assert found == {"company_a": "of R1", ".opsctl/aside-R1/company_a": "before"}


def test_a_restore_that_was_killed_before_it_published_leaves_nothing_to_undo(tmp_path: Path) -> None:
    (tmp_path / ".opsctl/staging-R1/building/company_a").mkdir(parents=True)
    assert recovered(tmp_path) == ("R1",)
    with locked_root(tmp_path, Owner.current(), run_id="R9") as root:
        assert root.undoable_runs() == []


def test_what_was_set_aside_is_dropped_after_seven_days_and_the_newest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / ".opsctl/aside-R1/company_a", None, "oldest")
    make_folder(tmp_path / ".opsctl/aside-R2/company_b", None, "newest")

    def forget() -> list[str]:
        with locked_root(tmp_path, Owner.current(), run_id="R2") as root:
            root.forget_aside({"company_b"}, newest="R2")
            return root.undoable_runs()

    assert timedelta(days=7) == publishing.ASIDE_KEPT
    assert forget() == ["R2", "R1"]
    monkeypatch.setattr(publishing, "ASIDE_KEPT", timedelta(0))
    assert forget() == ["R2"]


def test_the_next_restore_removes_what_is_not_kept_any_more(restored: Fleet) -> None:
    shutil.copytree(restored.folder(), restored.target / ".opsctl/trash-left/company_1")
    restored.key("session", "later", '{"_sessions": {}}')
    run_id = restored.restored()["run_id"]
    # The first run still has SECOND to be taken away; FIRST's folder before it is gone.
    assert [path.name for path in (restored.target / ".opsctl").glob(f"*-{run_id}")] == [f"aside-{run_id}"]
    assert not list(restored.target.glob(".opsctl/trash-*"))
    assert not list(restored.target.glob(".opsctl/staging-*"))
    (aside,) = restored.target.glob(f".opsctl/aside-*/company_{FIRST}")
    assert aside.parent.name == f"aside-{run_id}"


def test_a_name_that_no_filesystem_takes_is_no_bug(fleet: Fleet) -> None:
    done = fleet.opsctl("sessions", "undo", "--yes", "--to", fleet.place / ("n" * 300))
    assert done.returncode == 5, done
