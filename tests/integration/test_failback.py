"""`sessions failback`: what was written on the folders goes back, what was not stays, and all of it can be undone."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.baileys.buffers import normalise
from opsctl.stores.folder import OPSCTL_FOLDER, opened
from opsctl.stores.switch_record import SwitchRecord, read_switch, write_switch
from tests.integration.fleet import FIRST, SECOND, Fleet, results, rows_of, unchanged

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Finished

STOPPED = ("--service-stopped", "--yes")


@pytest.fixture
def live(fleet: Fleet) -> Fleet:
    """Restored; FIRST's folder was written by the service since: one session went on, one was deleted, one is new."""
    fleet.restored()
    sessions = sorted(fleet.folder().glob("session-*.json"))
    edit(sessions[0], note="went on")
    sessions[1].unlink()
    (fleet.folder() / "session-491700000000.0.json").write_text('{"_sessions":{},"version":"v1"}')
    edit(fleet.folder() / "creds.json", accountSyncCounter=7)
    min(fleet.folder().glob("pre-key-*.json")).unlink()
    return fleet


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def failback(fleet: Fleet, *words: str | Path) -> Finished:
    return fleet.opsctl("sessions", "failback", "--from", fleet.target, *words)


def dump(fleet: Fleet) -> list[tuple[Any, ...]]:
    """Every row with its times."""
    return fleet.database.execute(
        "SELECT company_id, key_type, key_id, value::text, created_at, updated_at, expires_at FROM whatsapp_keys"
        " UNION ALL SELECT company_id, 'creds', '', creds::text, created_at, updated_at, NULL FROM whatsapp_auth"
        " ORDER BY 1, 2, 3"
    )


def refused(fleet: Fleet, exit_code: int, sentence: str, *words: str | Path) -> Finished:
    """Ends so, says so, and neither a row nor a file is another one afterwards."""
    before = dump(fleet)
    with unchanged(fleet.place):
        done = failback(fleet, *words)
    assert done.returncode == exit_code, done
    assert sentence in done.stderr, done
    assert dump(fleet) == before
    return done


def equal_to_files(fleet: Fleet, company: str = FIRST) -> None:
    """Each row of a company, revived, is its file, revived."""
    found = fleet.database.execute(
        "SELECT key_type || '-' || key_id, value::text FROM whatsapp_keys WHERE company_id = %s", [company]
    )
    in_rows = {name.replace("/", "__").replace(":", "-"): json.loads(normalise(v.encode()).data) for name, v in found}
    in_files = {p.stem: json.loads(p.read_text()) for p in fleet.folder(company).glob("*-*.json") if p.name[0] != "."}
    assert in_rows == in_files


def test_what_was_written_on_the_folder_goes_back_and_the_rest_keeps_its_times(live: Fleet) -> None:
    before = {row[:3]: row for row in dump(live)}
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 0, done
    row = rows_of(done)[FIRST]
    counts = {name: row[name] for name in ("inserted", "updated", "deleted", "lost", "kept", "damaged", "conflicting")}
    assert counts == {
        "inserted": 1, "updated": 2, "deleted": 2, "lost": 0, "kept": 0, "damaged": 0, "conflicting": 0
    }  # fmt: skip
    assert results(done) == {FIRST: "brought back", SECOND: "unchanged"}
    equal_to_files(live)
    after = {row[:3]: row for row in dump(live)}
    written = {key for key in after if before.get(key) != after[key]}
    assert len(written) == 3
    for company, key_type, key_id in written:
        name = f"{key_type}-{key_id}.json" if key_id else "creds.json"
        *_, created_at, updated_at, expires_at = after[company, key_type, key_id]
        assert abs(updated_at.timestamp() - (live.folder(company) / name).stat().st_mtime) < 0.001
        assert expires_at == (updated_at + timedelta(days=7) if key_id else None)
        if (company, key_type, key_id) in before:
            assert created_at == before[company, key_type, key_id][4]


@pytest.mark.parametrize("field", ['{"type": "Buffer"}', "0.1234567890123456789"])
def test_creds_with_a_field_that_cannot_be_rewritten_go_out_and_back_to_the_digit(fleet: Fleet, field: str) -> None:
    read = "SELECT creds->>'odd', creds->'noiseKey', creds->>'accountSyncCounter' FROM whatsapp_auth"
    fleet.database.execute(f"UPDATE whatsapp_auth SET creds = creds || '{{\"odd\": {field}}}'")
    ((_, noise_key, _),) = fleet.database.execute(f"{read} WHERE company_id = %s", [FIRST])
    fleet.restored()
    creds = fleet.folder() / "creds.json"
    creds.write_text(creds.read_text().replace('"accountSyncCounter":1', '"accountSyncCounter":7'))
    assert failback(fleet, *STOPPED).returncode == 0
    assert fleet.database.execute(f"{read} WHERE company_id = %s", [FIRST]) == [(field, noise_key, "7")]


def test_a_trigger_that_sets_updated_at_does_not_overwrite_the_files_times(live: Fleet) -> None:
    live.database.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.updated_at = '2000-01-01'; RETURN NEW; END $$"
    )
    live.database.execute("CREATE TRIGGER touch BEFORE UPDATE ON whatsapp_keys FOR EACH ROW EXECUTE FUNCTION touch()")
    assert failback(live, *STOPPED).returncode == 0
    assert live.database.execute("SELECT count(*) FROM whatsapp_keys WHERE updated_at < '2001-01-01'") == [(0,)]


def test_a_dry_run_tells_each_key_and_why_and_changes_nothing(live: Fleet) -> None:
    done = refused(live, 0, "compare files and rows", "--dry-run", "--verbose")
    assert "would change" in done.stdout
    assert "deleted session: deleted on the folder" in done.stdout
    assert "inserted session: only the folder has it (491700000000.0)" in done.stdout
    keys = rows_of(failback(live, "--dry-run", "--json"))[FIRST]["keys"]
    assert {(key["key_type"], key["action"]) for key in keys} == {
        ("session", "updated"), ("session", "deleted"), ("session", "inserted"), ("pre-key", "deleted")
    }  # fmt: skip
    assert all(key["reason"] for key in keys)


def test_without_the_operators_word_or_a_yes_nothing_is_changed(live: Fleet) -> None:
    refused(live, 5, "nobody here can tell whether the service is stopped", "--yes")
    refused(live, 2, "add --yes", "--service-stopped")
    assert failback(live, "--accept-live-service", "--yes").returncode == 0


def test_a_second_failback_changes_nothing_also_where_the_mark_of_the_first_is_gone(live: Fleet) -> None:
    manifest = live.folder() / ".opsctl-manifest.json"
    published = manifest.read_bytes()
    assert failback(live, *STOPPED).returncode == 0
    before = dump(live)
    done = failback(live, *STOPPED, "--json")
    assert results(done) == {FIRST: "already back", SECOND: "already back"}
    manifest.write_bytes(published)
    done = failback(live, *STOPPED, "--json")
    assert results(done) == {FIRST: "unchanged", SECOND: "already back"}
    assert dump(live) == before
    edit(live.folder() / "creds.json", accountSyncCounter=8)  # the service ran on the folder again
    assert results(failback(live, *STOPPED, "--json"))[FIRST] == "brought back"


def test_a_folder_that_was_brought_back_may_be_restored_over_without_a_flag(live: Fleet) -> None:
    assert results(live.restore("--json")) == {FIRST: "refused", SECOND: "unchanged"}
    assert failback(live, *STOPPED).returncode == 0
    assert results(live.restore("--json"))[FIRST] == "restored"


def test_undo_puts_every_row_back_and_the_folder_is_live_again(live: Fleet) -> None:
    before = dump(live)
    run = failback(live, *STOPPED, "--json").json()["run_id"]
    after = dump(live)
    refused(live, 0, "look at the rows", "--undo", run, "--dry-run")
    refused(live, 5, "no archive of a run", "--undo", "20260131T030405Z-0a1b2c", *STOPPED)
    refused(live, 5, "changed nothing of '962399'", "--undo", run, "--company", "962399", *STOPPED)
    undone = failback(live, "--undo", run, *STOPPED, "--json")
    assert undone.returncode == 0, undone
    assert dump(live) == before
    assert results(failback(live, "--dry-run", "--json"))[FIRST] == "would change"
    assert failback(live, *STOPPED).returncode == 0
    assert dump(live) == after


def test_undo_refuses_a_company_of_which_a_row_was_written_since(live: Fleet) -> None:
    run = failback(live, *STOPPED, "--json").json()["run_id"]
    live.database.execute("UPDATE whatsapp_keys SET value = '{}' WHERE key_id = '491700000000.0'")
    refused(live, 5, "1 of its rows were written since", "--undo", run, *STOPPED)
    refused(live, 5, "1 of its rows were written since", "--undo", run, "--dry-run")


def test_rows_written_since_publishing_stop_a_company_until_somebody_decides(live: Fleet) -> None:
    edit(min(live.folder(SECOND).glob("session-*.json")), note="went on")
    (session,) = (p for p in live.folder().glob("session-*.json") if "went on" in p.read_text())
    key_id = session.stem.removeprefix("session-")
    live.database.execute(
        "UPDATE whatsapp_keys SET value = value || '{\"rival\": 1}', updated_at = now() + interval '1 min'"
        " WHERE company_id = %s AND key_type = 'session' AND key_id = %s",
        [FIRST, key_id],
    )
    refused(live, 6, f"{FIRST}: 1 keys were written in the database after", "--dry-run")
    refused(live, 5, "of a ratchet the database's is never taken", "--prefer", "database", "--company", FIRST, *STOPPED)
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 6
    assert results(done) == {FIRST: "conflicting", SECOND: "brought back"}
    assert rows_of(done)[FIRST]["conflicting"] == 1
    done = failback(live, "--prefer", "files", *STOPPED, "--json")
    assert done.returncode == 0, done
    assert rows_of(done)[FIRST]["conflicting"] == 1
    equal_to_files(live)


def test_of_what_is_no_ratchet_the_databases_value_may_be_preferred(live: Fleet) -> None:
    path = min(live.folder().glob("device-list-*.json"))
    path.write_text('["0","77"]')
    key = [FIRST, "device-list", path.stem.removeprefix("device-list-")]
    live.database.execute(
        "UPDATE whatsapp_keys SET value = '[\"0\", \"9\"]', updated_at = now() + interval '1 min'"
        " WHERE company_id = %s AND key_type = %s AND key_id = %s",
        key,
    )
    assert failback(live, *STOPPED).returncode == 6
    assert failback(live, "--prefer", "database", *STOPPED).returncode == 0
    found = live.database.execute(
        "SELECT value FROM whatsapp_keys WHERE company_id = %s AND key_type = %s AND key_id = %s", key
    )
    assert found == [(["0", "9"],)]


@pytest.mark.parametrize("what", ["emptied", "two days old"])
def test_a_database_that_lost_rows_or_went_back_gets_everything_again(live: Fleet, what: str) -> None:
    before = {row[:3]: row for row in dump(live)}
    if what == "emptied":
        live.database.execute("TRUNCATE whatsapp_auth, whatsapp_keys")
    else:
        live.database.execute("DELETE FROM whatsapp_keys WHERE key_type = 'tctoken'")
        live.database.execute(
            "UPDATE whatsapp_keys SET value = value || '{\"older\": 1}', updated_at = updated_at - interval '2 days'"
            " WHERE key_type = 'session'"
        )
        live.database.execute(
            "UPDATE whatsapp_auth SET creds = creds || '{\"accountSyncCounter\": 0}',"
            " updated_at = updated_at - interval '2 days'"
        )
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 0, done
    assert rows_of(done)[SECOND]["lost"] == (41 if what == "emptied" else 2)
    equal_to_files(live)
    equal_to_files(live, SECOND)
    if what == "emptied":
        after = {row[:3]: row for row in dump(live)}
        kept = {key for key in before if key[0] == SECOND}
        assert {key: after[key][3] for key in kept} == {key: before[key][3] for key in kept}  # in the form it had
        assert {key: after[key][5:] for key in kept} == {key: before[key][5:] for key in kept}


def test_torn_files_are_told_and_their_rows_stay(live: Fleet) -> None:
    torn = next(p for p in sorted(live.folder().glob("session-*.json")) if p.stat().st_size > 500)
    torn.write_bytes(torn.read_bytes()[:40])
    key = [FIRST, torn.stem.removeprefix("session-")]
    statement = "SELECT value FROM whatsapp_keys WHERE company_id = %s AND key_id = %s"
    before = live.database.execute(statement, key)
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 1, done
    assert done.json()["error"]["kind"] == "torn-files"
    assert rows_of(done)[FIRST]["damaged"] == 1
    assert live.database.execute(statement, key) == before


def test_torn_credentials_leave_the_databases_in_place_with_their_pre_key_ids_raised(live: Fleet) -> None:
    creds = live.folder() / "creds.json"
    creds.write_bytes(creds.read_bytes()[:100])
    highest = max(int(p.stem.removeprefix("pre-key-")) for p in live.folder().glob("pre-key-*.json"))
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 1, done
    assert rows_of(done)[FIRST]["result"] == "brought back"
    ((after,),) = live.database.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    assert after["nextPreKeyId"] == after["firstUnuploadedPreKeyId"] == highest + 1001
    assert rows_of(done)[FIRST]["deleted"] == 0


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        ({"me": {"id": "79001:9@s.whatsapp.net"}}, "it was paired anew; --new-identity ID"),
        ({"account": None}, "not registered any more"),
    ],
)
def test_another_account_is_refused_without_its_name(live: Fleet, break_it: dict[str, Any], sentence: str) -> None:
    edit(live.folder() / "creds.json", **break_it)
    refused(live, 5, sentence, "--company", FIRST, *STOPPED)
    assert failback(live, *STOPPED).returncode == 6
    refused(live, 5, "has no folder of company '962399'", "--new-identity", "962399", *STOPPED)
    done = failback(live, "--new-identity", FIRST, "--company", FIRST, *STOPPED, "--json")
    if "me" in break_it:
        assert done.returncode == 0, done
        assert rows_of(done)[FIRST]["deleted"] == 0
    else:
        assert done.returncode == 5


def test_more_than_a_fifth_of_a_type_is_not_deleted(live: Fleet) -> None:
    for path in list(live.folder().glob("device-list-*.json"))[:2]:
        path.unlink()
    done = failback(live, *STOPPED, "--json")
    assert done.returncode == 0, done
    assert rows_of(done)[FIRST]["deleted"] == 0
    assert any("more than a fifth: their rows stay" in warning for warning in done.json()["warnings"])


def test_a_folder_without_a_manifest_is_adopted_on_request_and_deletes_nothing(live: Fleet) -> None:
    (live.folder() / ".opsctl-manifest.json").unlink()
    refused(live, 5, "it has no manifest of ours", "--company", FIRST, *STOPPED)
    done = failback(live, "--adopt", *STOPPED, "--json")
    assert done.returncode == 0, done
    row = rows_of(done)[FIRST]
    assert (row["inserted"], row["updated"], row["deleted"]) == (1, 2, 0)


@pytest.mark.parametrize("form", ["json-stringify", "base64"])
def test_values_are_written_in_the_form_that_is_set(live: Fleet, form: str) -> None:
    live.env["STORED_FORM"] = form
    assert failback(live, *STOPPED).returncode == 0
    ((creds,),) = live.database.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    assert isinstance(creds["noiseKey"]["public"]["data"], list if form == "json-stringify" else str)


def test_another_environment_or_company_is_refused(live: Fleet) -> None:
    live.env["OPSCTL_ENVIRONMENT"] = "elsewhere"
    refused(live, 5, "it belongs to the environment 'production'", *STOPPED)
    del live.env["OPSCTL_ENVIRONMENT"]
    live.folder(SECOND).rename(live.folder("962399"))
    refused(live, 5, f"its manifest is of company '{SECOND}'", "--company", "962399", *STOPPED)
    refused(live, 5, "holds no company folders", "--from", live.place / "nothing", *STOPPED)


def test_two_failbacks_or_a_lock_on_a_company_keep_each_other_out(live: Fleet) -> None:
    with closing(live.database.connect(autocommit=False)) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('opsctl ' || %s, 0))", [FIRST])
        refused(live, 5, f"another run changes the rows of company {FIRST}", *STOPPED, "--company", FIRST)


def test_a_switch_on_record_ends_when_every_company_is_back(live: Fleet) -> None:
    with opened(live.target / OPSCTL_FOLDER) as own:
        write_switch(own, SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched"))
    assert failback(live, "--company", FIRST, *STOPPED).returncode == 0
    assert read_switch(live.target) is not None
    assert failback(live, *STOPPED).returncode == 0
    assert read_switch(live.target) is None


@pytest.mark.parametrize("fault", ["trigger", "trigger on others", "constraint", "read-only"])
def test_a_company_that_the_database_does_not_take_is_rolled_back_and_named(live: Fleet, fault: str) -> None:
    edit(min(live.folder(SECOND).glob("session-*.json")), note="went on")
    if fault == "trigger":  # what is written is not what is read
        live.database.execute(
            "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.value = '{\"spoiled\": 1}'; RETURN NEW; END $$"
        )
        live.database.execute(
            f"CREATE TRIGGER spoil BEFORE INSERT ON whatsapp_keys FOR EACH ROW WHEN (NEW.company_id = '{FIRST}')"
            " EXECUTE FUNCTION spoil()"
        )
    elif fault == "trigger on others":  # what nobody meant to touch is gone
        live.database.execute(
            "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN DELETE FROM whatsapp_keys WHERE company_id = NEW.company_id AND key_type = 'device-list'; "
            "RETURN NEW; END $$"
        )
        live.database.execute(
            f"CREATE TRIGGER spoil AFTER INSERT ON whatsapp_keys FOR EACH ROW WHEN (NEW.company_id = '{FIRST}')"
            " EXECUTE FUNCTION spoil()"
        )
    elif fault == "constraint":
        live.database.execute(
            f"ALTER TABLE whatsapp_keys ADD CHECK (company_id <> '{FIRST}' OR value ->> 'version' IS NULL) NOT VALID"
        )
    else:
        live.database.execute(f"ALTER DATABASE {live.database.name} SET default_transaction_read_only = on")
        refused(live, 4, "takes no writes", *STOPPED)
        return
    before = [row for row in dump(live) if row[0] == FIRST]
    done = failback(live, *STOPPED, "--json")
    by_trigger = fault.startswith("trigger")
    assert done.returncode == (1 if by_trigger else 6), done
    assert results(done) == {FIRST: "not verified" if by_trigger else "refused", SECOND: "brought back"}
    assert [row for row in dump(live) if row[0] == FIRST] == before
