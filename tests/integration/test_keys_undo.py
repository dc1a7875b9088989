"""What was deleted or changed comes back as it was, unless somebody has written since; and the figures of the keys."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson
import psycopg

from opsctl import db
from opsctl.stores.archive import Head, archived_runs, new_archive
from opsctl.stores.exchange import Change, make
from tests.conftest import each_postgres
from tests.integration.fleet import FIRST, SECOND

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database
    from tests.integration.fleet import Fleet

OLD = """
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)
SELECT c, 'session', 'old-' || n || E'\\t\\\\"\\u00fc',
    ('{"n": 12345678901234567890.125, "t": "a\\\\n\\\\u2028"}')::jsonb,
    '2020-01-01 00:00:00.000001+00', '2020-01-01 02:03:04.567891+05:30', '2020-02-01'
FROM unnest(%s::text[]) AS c, generate_series(1, %s) AS n
"""


def dump(database: Database) -> list[tuple[Any, ...]]:
    """Both tables, sorted, every column as text."""
    keys = database.execute("SELECT k::text FROM whatsapp_keys AS k ORDER BY 1")
    return keys + database.execute("SELECT a::text FROM whatsapp_auth AS a ORDER BY 1")


def cleaned_up(fleet: Fleet, rows: int = 300) -> tuple[str, list[tuple[Any, ...]]]:
    """A run that deleted something, and the tables before it."""
    fleet.database.execute(OLD, [[FIRST, SECOND], rows])
    before = dump(fleet.database)
    done = fleet.opsctl("keys", "cleanup", "--yes", "--json", "--pause-ratio", "0")
    assert done.json()["facts"]["deleted"] >= 2 * rows, done
    return done.json()["run_id"], before


def undone(fleet: Fleet, run: str, *words: str) -> Any:
    done = fleet.opsctl("keys", "undo", run, "--json", *(words or ("--yes",)))
    assert done.returncode == 0, done
    return done.json()


@each_postgres
def test_undo_gives_back_the_identical_tables(fleet: Fleet) -> None:
    fleet.database.execute("ALTER TABLE whatsapp_keys ADD COLUMN note text DEFAULT 'kept', ADD COLUMN n bigserial")
    run, before = cleaned_up(fleet)
    after = dump(fleet.database)
    listed = fleet.opsctl("keys", "runs", "--json").json()["rows"]
    assert [(row["run"], row["command"], row["ended"]) for row in listed] == [(run, "keys cleanup", "done")]
    assert listed[0]["rows"] == len(before) - len(after)
    planned = undone(fleet, run, "--dry-run")["facts"]
    assert planned["put_back"] == len(before) - len(after)
    assert dump(fleet.database) == after  # a dry run
    assert fleet.opsctl("keys", "undo", run).returncode == 2  # nobody can say yes here
    assert undone(fleet, run)["facts"] == planned
    assert dump(fleet.database) == before
    assert undone(fleet, run)["facts"]["left"] == planned["put_back"]  # again: nothing is to be done


def test_rows_that_are_there_again_are_left(fleet: Fleet) -> None:
    run, _ = cleaned_up(fleet, rows=3)
    fleet.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value)"
        " SELECT %s, 'session', 'old-1' || E'\\t\\\\\"\\u00fc', '\"new\"'",
        [FIRST],
    )
    facts = undone(fleet, run)["facts"]
    assert (facts["left"], facts["archived"] - facts["put_back"]) == (1, 1)
    found = fleet.database.execute(
        "SELECT value FROM whatsapp_keys WHERE company_id = %s AND value = '\"new\"'", [FIRST]
    )
    assert found == [("new",)]


def test_a_trigger_that_sets_times_is_told_before_and_after(fleet: Fleet) -> None:
    run, _ = cleaned_up(fleet, rows=3)
    fleet.database.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.updated_at = now(); RETURN NEW; END $$"
    )
    fleet.database.execute("CREATE TRIGGER touch BEFORE INSERT ON whatsapp_keys FOR EACH ROW EXECUTE FUNCTION touch()")
    assert "a trigger runs on each insert: touch" in undone(fleet, run, "--dry-run")["warnings"][0]
    assert "came back with other times" in undone(fleet, run)["warnings"][1]


def test_a_run_of_another_environment_or_of_nobody_is_refused_and_another_server_is_told(
    fleet: Fleet, empty_fleet: Fleet
) -> None:
    run, _ = cleaned_up(fleet, rows=3)
    other = fleet.opsctl("keys", "undo", run, "--yes", env={"OPSCTL_ENVIRONMENT": "staging"})
    assert (other.returncode, "'production', this is 'staging'" in other.stderr) == (5, True), other
    nobody = fleet.opsctl("keys", "undo", "../../x", "--yes")
    assert (nobody.returncode, "opsctl keys runs" in nobody.stderr) == (5, True), nobody
    (archive,) = archived_runs(fleet.state)
    head = Head("20990101T000000Z-000000", "keys cleanup", "", "production", "elsewhere", "77")
    line = b'{"table":"whatsapp_keys","old":{"company_id":"1","key_type":"a","key_id":"b","value":1}}\n'
    with (
        connected(fleet.database) as connection,
        new_archive(fleet.state, head, keep=KEEP) as copy,
        copy.transaction(connection) as keep,
    ):
        keep(line)
    assert archive.head.run_id == run
    warned = undone(fleet, "20990101T000000Z-000000", "--dry-run")["warnings"]
    assert warned == ["this is not the server that the run worked on, which was elsewhere"]


def test_a_failback_has_its_own_way_back(fleet: Fleet) -> None:
    head = Head("20990101T000000Z-000001", "sessions failback", "", "production", "here", None)
    with (
        connected(fleet.database) as connection,
        new_archive(fleet.state, head, keep=KEEP) as archive,
        archive.transaction(connection) as keep,
    ):
        keep(b'{"table":"whatsapp_keys","old":{"company_id":"1","key_type":"a","key_id":"b","value":1}}\n')
    done = fleet.opsctl("keys", "undo", head.run_id, "--yes")
    assert (done.returncode, f"opsctl sessions failback --undo {head.run_id}" in done.stderr) == (5, True), done


KEEP = timedelta(days=1)


@contextmanager
def connected(database: Database) -> Iterator[db.Connection]:
    with db.connect(psycopg.conninfo.conninfo_to_dict(database.conninfo), 30) as connection:
        yield connection


@each_postgres
def test_changes_are_made_where_nobody_wrote_since_and_so_taken_back(fleet: Fleet) -> None:
    """What doctor, repair and failback do: a row changed, one renamed, one added, credentials changed."""
    before = dump(fleet.database)
    (row,) = fleet.database.execute(
        "SELECT row_to_json(k)::text FROM whatsapp_keys k WHERE key_type = 'session' LIMIT 1"
    )
    old = row[0]
    renamed = orjson.loads(old) | {"key_id": "renamed"}
    (row,) = fleet.database.execute(
        "SELECT row_to_json(k)::text FROM whatsapp_keys k WHERE key_type = 'session' OFFSET 1 LIMIT 1"
    )
    changed = orjson.loads(row[0]) | {"value": {"changed": True}}
    auth, raised = fleet.database.execute(
        "SELECT row_to_json(a)::text,"
        " (to_jsonb(a) || jsonb_build_object('creds', creds || '{\"nextPreKeyId\": 7}'))::text"
        " FROM whatsapp_auth a ORDER BY 1 LIMIT 1"
    )[0]
    added = {"company_id": FIRST, "key_type": "session", "key_id": "added", "value": {}, "created_at": "2020-01-01"}
    stale = orjson.loads(row[0]) | {"key_id": "nowhere"}
    changes = [
        Change.of(f'{{"table":"whatsapp_keys","old":{old},"new":{orjson.dumps(renamed).decode()}}}'),
        Change.of(f'{{"table":"whatsapp_keys","old":{row[0]},"new":{orjson.dumps(changed).decode()}}}'),
        Change.of(f'{{"table":"whatsapp_keys","new":{orjson.dumps(added).decode()}}}'),
        Change.of(f'{{"table":"whatsapp_auth","old":{auth},"new":{raised}}}'),
        Change.of(f'{{"table":"whatsapp_keys","old":{orjson.dumps(stale).decode()}}}'),
    ]
    head = Head("20260131T030405Z-000001", "keys doctor", "", "production", "here", None)
    with (
        connected(fleet.database) as connection,
        new_archive(fleet.state, head, keep=KEEP) as archive,
        archive.transaction(connection) as keep,
    ):
        made = make(connection, changes)
        for change in made:
            keep(change.line.encode() + b"\n")
    assert set(made) == set(changes[:4])  # the last one's row is not as it was
    assert dump(fleet.database) != before
    assert undone(fleet, head.run_id)["facts"]["reverted"] == 4
    assert dump(fleet.database) == before

    with connected(fleet.database) as connection:
        connection.execute("BEGIN")
        make(connection, changes[:2])
        connection.execute("COMMIT")
    fleet.database.execute("UPDATE whatsapp_keys SET value = '\"later\"' WHERE key_id = 'renamed'")
    facts = undone(fleet, head.run_id)["facts"]
    assert (facts["reverted"], facts["left"]) == (1, 3)


def test_stats_count_by_company_and_type_and_age(fleet: Fleet) -> None:
    database = fleet.database
    database.execute("DELETE FROM whatsapp_keys")
    for number, (days, new) in enumerate([(0, True), (3, True), (10, False), (20, False), (40, False), (90, False)]):
        database.execute(
            "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)"
            " VALUES (%s, 'session', %s, '{}', now() - make_interval(days => %s), now() - make_interval(days => %s),"
            " '2020-01-01')",
            [FIRST, str(number), 0 if new else 50, days],
        )
    fleet.key("lid", "mapping-1", '"2"', company=SECOND)
    document = fleet.opsctl("keys", "stats", "--json").json()
    first, second = document["rows"]
    assert first["ages"] == [1, 1, 1, 1, 2]
    assert (first["keys"], first["expired"], first["per_day"]) == (6, 2, 0.3)
    assert (second["key_type"], document["facts"]["unknown_types"]) == ("lid", ["lid"])
    assert document["facts"]["ages"]["over 30 d"] == 2
    assert document["facts"]["total_bytes"] > 0
    only = fleet.opsctl("keys", "stats", "--company", SECOND)
    assert FIRST not in only.stdout
    assert "1-7 d" in only.stdout
    assert "keys of unknown types are never deleted: 1 lid" in only.stdout
    assert fleet.opsctl("keys", "stats", "--company", "nobody").returncode == 5
