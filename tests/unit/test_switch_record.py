"""While a switch is on record, the folders are the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from opsctl.errors import Refused
from opsctl.settings import load
from opsctl.stores.folder import OPSCTL_FOLDER, opened
from opsctl.stores.switch_record import SwitchRecord, clear_switch, read_switch, refuse_while_switched, write_switch

if TYPE_CHECKING:
    from pathlib import Path

RECORD = SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched", ("baileys-whatsapp-service",))


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    (tmp_path / OPSCTL_FOLDER).mkdir()
    return tmp_path


def _write(sessions: Path) -> None:
    with opened(sessions / OPSCTL_FOLDER) as own:
        write_switch(own, RECORD)


def test_a_record_reads_back_as_it_was_written_and_is_for_the_owner_only(sessions: Path) -> None:
    _write(sessions)
    assert read_switch(sessions) == RECORD
    assert [p.name for p in (sessions / OPSCTL_FOLDER).iterdir()] == ["switch.json"]
    assert (sessions / OPSCTL_FOLDER / "switch.json").stat().st_mode & 0o777 == 0o600


def test_no_record_no_switch(sessions: Path, tmp_path: Path) -> None:
    assert read_switch(sessions) is None
    assert read_switch(tmp_path / "missing") is None
    refuse_while_switched(load(environ={"SESSIONS_DIR": str(sessions)}), "cleanup")
    refuse_while_switched(load(environ={}), "cleanup")


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"since": "x"}'])
def test_a_torn_record_counts_as_a_switch(sessions: Path, torn: bytes) -> None:
    (sessions / OPSCTL_FOLDER / "switch.json").write_bytes(torn)
    record = read_switch(sessions)
    assert record is not None
    assert record.phase == "unreadable"


def test_a_record_that_is_a_link_counts_as_a_switch_and_is_not_followed(sessions: Path) -> None:
    _write(sessions)
    (sessions / "elsewhere").write_bytes(b"{}")
    (sessions / OPSCTL_FOLDER / "switch.json").unlink()
    (sessions / OPSCTL_FOLDER / "switch.json").symlink_to(sessions / "elsewhere")
    record = read_switch(sessions)
    assert record is not None
    assert record.phase == "unreadable"


def test_what_would_change_the_database_is_refused_until_the_record_is_cleared(sessions: Path) -> None:
    settings = load(environ={"SESSIONS_DIR": str(sessions)})
    _write(sessions)
    with pytest.raises(Refused, match="keys cleanup changes nothing") as refused:
        refuse_while_switched(settings, "keys cleanup")
    assert refused.value.kind == "switched"
    with opened(sessions / OPSCTL_FOLDER) as own:
        clear_switch(own)
        clear_switch(own)
    refuse_while_switched(settings, "keys cleanup")
