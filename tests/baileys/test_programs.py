"""The programs themselves: what they find right is right, and they can find fault."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

import pytest

from .door import VERSIONS, Fleet, Version, converse, expected_files, load_fleet, make_fleet

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"baileys-{version}")
def version(request: pytest.FixtureRequest) -> Version:
    version: Version = request.param
    return version


@pytest.fixture(scope="module")
def made(version: Version, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fleet, Path]:
    """A fleet of three stored forms, and its folders as Baileys' own useMultiFileAuthState writes them."""
    tmp = tmp_path_factory.mktemp("made")
    return make_fleet(version, 3, "mixed", state=tmp / "state.json", folders=tmp / "folders"), tmp / "folders"


@pytest.fixture
def fleet(made: tuple[Fleet, Path]) -> Fleet:
    return made[0]


@pytest.fixture
def root(made: tuple[Fleet, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "sessions")


def session_of(root: Path) -> Path:
    return next(root.glob("company_962302/session-*001.0.json"))


def test_folders_written_by_baileys_go_on_and_nothing_is_written_into_them(fleet: Fleet, root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    report = converse(root, fleet)
    assert report.ok, report
    assert {company.company_id for company in report.companies} == set(fleet.company_ids)
    assert all(company.outcomes() == {"continued"} for company in report.companies)
    assert {path: path.read_bytes() for path in root.rglob("*.json")} == before


def test_the_oracle_knows_every_file_that_baileys_writes(fleet: Fleet, root: Path) -> None:
    folders = {id_: root / (id_ if id_.startswith("company_") else f"company_{id_}") for id_ in fleet.company_ids}
    written = {
        (company_id, file.name): hashlib.sha256(file.read_bytes()).hexdigest()
        for company_id, folder in folders.items()
        for file in folder.iterdir()
    }
    assert expected_files(fleet.rows) == written


def test_a_missing_session_is_found_and_heals_where_that_is_allowed(fleet: Fleet, root: Path) -> None:
    session_of(root).unlink()
    report = converse(root, fleet, companies=["962302"])
    assert not report.ok
    assert [mismatch.problem for mismatch in report.mismatches] == ["missing"]
    assert [c.kind for c in report.conversations if c.outcome == "broken"] == ["both ways"]

    healed = converse(root, fleet, companies=["962302"], may_heal=True)
    assert healed.ok, healed
    assert [c.kind for c in healed.conversations if c.outcome == "healed"] == ["both ways"]


def test_a_torn_session_and_a_file_too_many_are_found(fleet: Fleet, root: Path) -> None:
    session = session_of(root)
    session.write_bytes(session.read_bytes()[:100])
    (session.parent / "session-1.0.json").write_text("{}")
    report = converse(root, fleet, companies=["962302"])
    assert [mismatch.problem for mismatch in report.mismatches] == ["missing", "unexpected file"]


def test_the_byte_form_that_a_version_cannot_read_is_found(version: Version, fleet: Fleet, root: Path) -> None:
    pre_key = min(root.glob("company_962302/pre-key-*.json"))
    unread = {6: {str(i): 7 for i in range(32)}, 7: {"type": "Buffer", "data": [7] * 32}}
    pre_key.write_text(json.dumps({"private": unread[version], "public": unread[version]}))
    report = converse(root, fleet, companies=["962302"])
    assert [(mismatch.key_type, mismatch.problem) for mismatch in report.mismatches] == [("pre-key", "differs")]


def test_rows_written_as_they_are_stored_go_on_under_6_and_not_under_7(
    version: Version, fleet: Fleet, root: Path
) -> None:
    for row in fleet.rows:
        if row.company_id == "company_962303":  # the one that is all plain JSON.stringify
            name = "creds.json" if row.key_type is None else f"{row.key_type}-{row.key_id}.json"
            (root / row.company_id / name.replace("/", "__").replace(":", "-")).write_text(row.value)
    report = converse(root, fleet, companies=["company_962303"])
    direct = {c.outcome for c in report.conversations if c.kind != "group" and not c.kind.startswith("new peer")}
    assert direct == ({"continued"} if version == 6 else {"broken"})
    assert report.ok is (version == 6)


def raise_next_pre_key_id(creds: Path, to: int) -> None:
    raised = {"nextPreKeyId": to, "firstUnuploadedPreKeyId": to}
    creds.write_text(json.dumps(json.loads(creds.read_bytes()) | raised))


def test_a_raised_next_pre_key_id_is_expected_only_when_it_is_announced(fleet: Fleet, root: Path) -> None:
    raise_next_pre_key_id(root / "company_962302" / "creds.json", to=1061)
    assert converse(root, fleet, companies=["962302"], next_pre_key_raised=1000).ok
    report = converse(root, fleet, companies=["962302"])
    assert not report.ok
    assert [mismatch.key_id for mismatch in report.mismatches] == ["nextPreKeyId", "firstUnuploadedPreKeyId"]


def test_a_live_folder_goes_on_from_the_saved_state(fleet: Fleet, root: Path, tmp_path: Path) -> None:
    only = ["acme-berlin"]
    assert converse(root, fleet, companies=only, live=True, save_state=tmp_path / "after.json").ok
    report = converse(root, load_fleet(tmp_path / "after.json"), companies=only)
    assert report.ok, report


@pytest.fixture(scope="module")
def later(made: tuple[Fleet, Path], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The same fleet after acme-berlin has talked on, so that the folders are copies older than it."""
    fleet, folders = made
    state = tmp_path_factory.mktemp("later") / "state.json"
    assert converse(folders, fleet, companies=["acme-berlin"], save_state=state).ok
    return load_fleet(state)


def test_a_copy_older_than_its_peers_is_found_loses_messages_and_heals(later: Fleet, root: Path) -> None:
    only = ["acme-berlin"]
    assert not converse(root, later, companies=only).ok
    report = converse(root, later, companies=only, may_heal=True)
    *others, new_pre_key = report.conversations
    assert {c.outcome for c in others} == {"continued", "healed"}, report
    assert sum(c.lost for c in others) > 0
    assert "used again with other keys" in str(new_pre_key.error)  # nextPreKeyId went back with the copy


def test_without_sessions_and_own_sender_keys_it_loses_none(later: Fleet, root: Path) -> None:
    folder = root / "company_acme-berlin"
    for pattern in ("session-*", "sender-key-memory-*", "sender-key-*--491510000002--5.json", "sender-key-*_1--5.json"):
        for file in folder.glob(pattern):
            file.unlink()
    raise_next_pre_key_id(folder / "creds.json", to=1061)
    report = converse(root, later, companies=["acme-berlin"], may_heal=True)
    assert report.ok, report
    assert sum(c.lost for c in report.conversations) == 0
