"""What is wrong with keys is found, named with its effect, mended where it can be, and mending can be undone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from opsctl.stores.folder import OPSCTL_FOLDER
from opsctl.stores.switch_record import SwitchRecord, write_switch
from tests.integration.fleet import FIRST, SECOND
from tests.integration.test_keys_undo import dump

if TYPE_CHECKING:
    from tests.integration.fleet import Fleet

MENDABLE = {
    "mistyped",
    "lid-pairs",
    "memory-without-key",
    "pre-key-beyond-next",
    "array-sender-keys",
    "future-times",
}
ARRAY = '[{"senderKeyId": 1, "senderMessageKeys": []}]'


def doctor(fleet: Fleet, *words: str, exit_code: int = 0) -> Any:
    done = fleet.opsctl("keys", "doctor", "--json", *words)
    assert done.returncode == exit_code, done
    return done.json()


def found(document: Any) -> dict[tuple[str, str], int]:
    return {(row["company"], row["ailment"]): row["rows"] for row in document["rows"]}


def me(fleet: Fleet, company: str) -> tuple[str, str]:
    """The user and device with which our own sender-keys end."""
    ((creds,),) = fleet.database.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [company])
    user, _, device = creds["me"]["lid"].partition("@")[0].partition(":")
    return f"{user}_1", device


def make_ill(fleet: Fleet) -> dict[tuple[str, str], int]:
    """One of everything; what is to be found."""
    database = fleet.database
    user, device = me(fleet, FIRST)
    for key_type, key_id, value, at in (
        ("app", "state-sync-key-AAA__B=", '{"keyData": "AAAA"}', "2026-01-01"),
        ("lid", "mapping-77", '"88"', "2026-01-03"),  # newer than the right one
        ("lid-mapping", "77", '"99"', "2026-01-02"),
        ("lid-mapping", "88_reverse", '"77"', "2026-01-02"),
        ("pre", "key-5", "{}", "2026-01-01"),  # older than the right one
        ("pre-key", "5", '{"private": {"type": "Buffer", "data": []}}', "2026-02-01"),
        ("sender", "key-memory-g1@g.us", '{"1@s.whatsapp.net": true}', "2026-01-01"),
        ("lid-mapping", "555", '"666"', "2026-01-02"),
        ("lid-mapping", "701", '"702"', "2026-01-02"),
        ("lid-mapping", "702_reverse", '"703"', "2026-01-02"),
        ("lid-mapping", "703", '"702"', "2026-01-02"),
        ("sender-key", f"g2@g.us::{user}::{device}", ARRAY, "2026-01-02"),
        ("sender-key-memory", "g2@g.us", '{"1@s.whatsapp.net": true}', "2026-01-02"),
        ("sender-key", f"g3@g.us::{user}::{device}", '{"type": "Buffer", "data": "W10="}', "2026-01-02"),
        ("session", "late", '{"_sessions": {}}', "2099-01-01"),
        ("session", "endless", '{"_sessions": {}}', "infinity"),
        ("identity-key", "twice", '{"type": "Buffer", "data": "' + "QkJC" * 14 + 'Qj0="}', "2026-01-02"),
        ("session", "wrong", "7", "2026-01-02"),
    ):
        database.execute(
            "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at) VALUES (%s, %s, %s, %s, %s)"
            " ON CONFLICT (company_id, key_type, key_id)"
            " DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at",
            [FIRST, key_type, key_id, value, at],
        )
    database.execute("UPDATE whatsapp_auth SET creds = creds || '{\"nextPreKeyId\": 3}' WHERE company_id = %s", [FIRST])
    fleet.key("session", "alone", '{"_sessions": {}}', company="nobody")
    fleet.copy_company(f"company_{SECOND}", of=SECOND)
    return {
        (FIRST, "mistyped"): 4,
        (FIRST, "lid-pairs"): 2,
        (FIRST, "memory-without-key"): 1,
        (FIRST, "key-without-memory"): 1,
        (FIRST, "pre-key-beyond-next"): 1,
        (FIRST, "array-sender-keys"): 1,
        (FIRST, "double-encoded"): 1,
        (FIRST, "misshapen"): 3,
        (FIRST, "mixed-forms"): 2,
        (FIRST, "future-times"): 2,
        ("nobody", "orphans"): 1,
        (SECOND, "twin-companies"): 40,
        (f"company_{SECOND}", "twin-companies"): 40,
    }


def test_a_healthy_fleet_has_nothing(fleet: Fleet) -> None:
    assert doctor(fleet)["rows"] == []


def test_everything_is_found_mended_where_it_can_be_and_undone(fleet: Fleet) -> None:
    expected = make_ill(fleet)
    before = dump(fleet.database)
    document = doctor(fleet, exit_code=1)
    assert found(document) == expected
    assert all(row["effect"] and row["mend"] for row in document["rows"])
    assert {row["ailment"] for row in document["rows"] if row["mends"]} == MENDABLE
    assert {company for company, _ in found(doctor(fleet, "--company", "nobody", exit_code=1))} == {"nobody"}
    planned = doctor(fleet, "--fix", "--dry-run")
    assert {row["ailment"] for row in planned["rows"]} == MENDABLE
    assert dump(fleet.database) == before

    without_word = fleet.opsctl("keys", "doctor", "--fix", "--yes")
    assert (without_word.returncode, "--service-stopped" in without_word.stderr) == (5, True), without_word
    assert fleet.opsctl("keys", "doctor", "--fix", "--service-stopped").returncode == 2  # nobody can say yes here
    assert dump(fleet.database) == before

    mended = doctor(fleet, "--fix", "--service-stopped", "--yes")
    assert mended["facts"]["mended"] == planned["facts"]["mends"] == document["facts"]["mends"]
    left = found(doctor(fleet, exit_code=1))
    assert left == {key: count for key, count in expected.items() if key[1] not in MENDABLE} | {
        (FIRST, "lid-pairs"): 1,  # two that disagree
        (FIRST, "misshapen"): 2,  # one was the older of two
    }
    rows = fleet.database.execute("SELECT key_type, key_id, value FROM whatsapp_keys WHERE company_id = %s", [FIRST])
    keys = {(key_type, key_id): value for key_type, key_id, value in rows}
    assert keys["app-state-sync-key", "AAA/B="] == {"keyData": "AAAA"}
    assert keys["lid-mapping", "77"] == "88"
    assert keys["lid-mapping", "666_reverse"] == "555"
    assert keys["pre-key", "5"] == {"private": {"type": "Buffer", "data": []}}
    assert not {("lid", "mapping-77"), ("pre", "key-5"), ("sender-key-memory", "g1@g.us")} & keys.keys()
    ((creds, highest),) = fleet.database.execute(
        "SELECT creds, (SELECT max(key_id::int) FROM whatsapp_keys WHERE company_id = %(c)s AND key_type = 'pre-key')"
        " FROM whatsapp_auth WHERE company_id = %(c)s",
        {"c": FIRST},
    )
    assert creds["nextPreKeyId"] == creds["firstUnuploadedPreKeyId"] > highest

    undone = fleet.opsctl("keys", "undo", mended["run_id"], "--yes", "--json").json()
    assert (undone["facts"]["left"], undone["warnings"]) == (0, [])
    assert dump(fleet.database) == before


def test_what_a_cleanup_leaves_behind_is_no_illness(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_keys WHERE key_type = 'sender-key-memory'")
    assert {row["ailment"] for row in doctor(fleet)["rows"]} == {"key-without-memory"}


def test_the_counter_of_pre_keys_is_never_lowered(fleet: Fleet) -> None:
    fleet.database.execute(
        'UPDATE whatsapp_auth SET creds = creds || \'{"nextPreKeyId": 2, "firstUnuploadedPreKeyId": 5000}\''
    )
    doctor(fleet, "--fix", "--service-stopped", "--yes")
    assert fleet.database.execute("SELECT DISTINCT creds -> 'firstUnuploadedPreKeyId' FROM whatsapp_auth") == [(5000,)]


def test_under_a_running_service_or_while_it_runs_on_folders_nothing_is_mended(fleet: Fleet) -> None:
    fleet.key("lid", "mapping-77", '"88"')
    before = dump(fleet.database)
    running = {
        "SERVICE_MANAGER": "command",
        "SERVICE_NAMES": "wa",
        "SERVICE_STATUS_COMMAND": "true",
        "SERVICE_STOP_COMMAND": "true",
        "SERVICE_START_COMMAND": "true",
    }
    done = fleet.opsctl("keys", "doctor", "--fix", "--yes", "--service-stopped", env=running)
    assert (done.returncode, "changes nothing under a running service" in done.stderr) == (5, True), done
    own = fleet.target / OPSCTL_FOLDER
    own.mkdir(parents=True)
    descriptor = os.open(own, os.O_RDONLY)
    write_switch(descriptor, SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched"))
    os.close(descriptor)
    switched = {"SESSIONS_DIR": str(fleet.target)}
    done = fleet.opsctl("keys", "doctor", "--fix", "--yes", "--service-stopped", env=switched)
    assert (done.returncode, "doctor --fix changes nothing" in done.stderr) == (5, True), done
    assert fleet.opsctl("keys", "doctor", env=switched).returncode == 1  # looking is allowed
    assert dump(fleet.database) == before


def test_sender_keys_as_arrays_are_left_to_a_company_that_only_baileys_6_wrote_for(fleet: Fleet) -> None:
    fleet.database.execute(
        "DELETE FROM whatsapp_keys WHERE key_type IN ('lid-mapping', 'device-list', 'tctoken', 'identity-key')"
    )
    fleet.key("sender-key", "g@g.us::1::0", ARRAY)
    assert doctor(fleet)["rows"] == []
