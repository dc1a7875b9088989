"""`sessions repair`: missing and damaged rows come back from a copy; healthy ones and stale ratchets are left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from opsctl.stores.folder import OPSCTL_FOLDER, opened
from opsctl.stores.switch_record import SwitchRecord, write_switch
from tests.integration.fleet import FIRST, SECOND, Fleet, rows_of
from tests.integration.test_failback import STOPPED, dump, failback

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Finished


def repair(fleet: Fleet, *words: str | Path, source: str = "folder") -> Finished:
    env = {"SESSIONS_DIR": str(fleet.target), "STANDBY_DIR": str(fleet.place / "standby")}
    return fleet.opsctl("sessions", "repair", "--company", FIRST, "--from", source, *words, env=env)


@pytest.fixture
def broken(fleet: Fleet) -> Fleet:
    """A copy of everything as a folder; then FIRST loses its device-lists, and a tctoken and a pre-key break."""
    fleet.restored()
    break_rows(fleet)
    return fleet


def break_rows(fleet: Fleet) -> None:
    fleet.database.execute(
        "DELETE FROM whatsapp_keys WHERE company_id = %s AND key_type IN ('device-list', 'session')", [FIRST]
    )
    fleet.database.execute(
        "UPDATE whatsapp_keys SET value = '{\"torn\": 1}' WHERE company_id = %s AND key_type = 'identity-key'", [FIRST]
    )


def types(rows: list[tuple[Any, ...]]) -> set[str]:
    return {row[1] for row in rows}


def test_missing_and_damaged_rows_come_back_with_their_times_and_stale_ratchets_do_not(fleet: Fleet) -> None:
    before = [row for row in dump(fleet) if row[1] != "session" or row[0] != FIRST]
    fleet.restored()
    break_rows(fleet)
    broken_rows = dump(fleet)
    done = repair(fleet, "--dry-run", "--json")
    assert done.returncode == 0, done
    row = rows_of(done)[FIRST]
    assert row["result"] == "would be repaired"
    assert row["by_type"].keys() == {"device-list", "identity-key"}
    assert (row["missing"], row["damaged"]) == (row["by_type"]["device-list"], row["by_type"]["identity-key"])
    assert row["stale"] > 0
    assert dump(fleet) == broken_rows
    done = repair(fleet, *STOPPED, "--json")
    assert done.returncode == 0, done
    assert "loses messages" in done.json()["warnings"][0]
    assert [row[:4] + row[5:] for row in dump(fleet)] == [row[:4] + row[5:] for row in before]
    run = done.json()["run_id"]
    assert repair(fleet, *STOPPED, "--json").json()["rows"][0]["result"] == "unchanged"
    assert failback(fleet, "--undo", run, *STOPPED).returncode == 0
    assert dump(fleet) == broken_rows


def test_only_missing_rows_are_put_back_on_request(broken: Fleet) -> None:
    done = repair(broken, "--missing-only", *STOPPED, "--json")
    assert done.returncode == 0, done
    assert rows_of(done)[FIRST]["by_type"].keys() == {"device-list"}
    assert broken.database.execute("SELECT count(*) FROM whatsapp_keys WHERE value ? 'torn'") != [(0,)]


def test_credentials_come_back_with_pre_key_ids_that_nobody_used(broken: Fleet) -> None:
    ((before,),) = broken.database.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    broken.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    assert repair(broken, *STOPPED).returncode == 0
    ((after,),) = broken.database.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    raised = before["nextPreKeyId"] + 1000
    assert after == before | {"nextPreKeyId": raised, "firstUnuploadedPreKeyId": raised}


def test_rows_come_back_from_the_standby_and_from_the_archive(fleet: Fleet) -> None:
    env = {"SESSIONS_DIR": str(fleet.target), "STANDBY_DIR": str(fleet.place / "standby")}
    assert fleet.opsctl("standby", "sync", env=env).returncode == 0
    fleet.restored()
    for path in list(fleet.folder(SECOND).glob("lid-mapping-*.json"))[:0] + list(fleet.folder().glob("pre-key-*.json")):
        path.unlink()
    failback(fleet, "--company", FIRST, *STOPPED)  # the archive has the pre-keys now
    for source in ("archive", "standby"):
        done = repair(fleet, "--dry-run", "--json", source=source)
        assert done.returncode == 0, done
        assert rows_of(done)[FIRST]["by_type"].keys() == {"pre-key"}
    assert repair(fleet, *STOPPED, source="archive").returncode == 0
    assert rows_of(repair(fleet, "--dry-run", "--json", source="standby"))[FIRST]["result"] == "unchanged"


def test_repair_is_refused_under_a_live_service_a_switch_and_without_a_copy(broken: Fleet) -> None:
    before = dump(broken)
    for exit_code, sentence, words in (
        (5, "nobody here can tell whether the service is stopped", ("--yes",)),
        (2, "add --yes", ("--service-stopped",)),
        (5, "folder has no copy of it", (*STOPPED, "--dir", broken.place / "nowhere")),
    ):
        done = repair(broken, *words)
        assert done.returncode == exit_code, done
        assert sentence in done.stderr
    with opened(broken.target / OPSCTL_FOLDER) as own:
        write_switch(own, SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched"))
    done = repair(broken, *STOPPED)
    assert done.returncode == 5
    assert "sessions repair changes nothing while the service runs on the folders" in done.stderr
    assert dump(broken) == before
