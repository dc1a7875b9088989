"""A cleanup deletes what is expired and nothing else, and every row that it deletes is in its archive."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psycopg
import pytest

import opsctl
from opsctl import db
from opsctl.baileys.key_types import KNOWN, is_own_sender_key
from opsctl.embedded import embedded_server
from opsctl.journal import Journal
from opsctl.operations import cleanup
from opsctl.operations.cleanup import Wish
from opsctl.operations.cleanup_pass import Batch
from opsctl.operations.fleet import create_schema
from opsctl.stores.archive import archived_lines, archived_runs
from opsctl.stores.folder import OPSCTL_FOLDER
from opsctl.stores.switch_record import SwitchRecord, write_switch
from tests.conftest import Database, each_postgres
from tests.integration.fleet import FIRST, SECOND, Fleet
from tests.integration.receivers import recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.report import Report
    from tests.conftest import RunOpsctl

MONTH = timedelta(days=30)
Key = tuple[str, str, str]

OLD_SESSIONS = """
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)
SELECT '962302', 'session', 'old-' || n, '{"_sessions": {}, "note": "a \\\\ and a \\" in it"}',
    now() - interval '90 days', now() - interval '60 days' - n * interval '1 ms', now() - interval '50 days'
FROM generate_series(1, %s) AS n
"""


def keys_of(database: Database) -> set[Key]:
    return {(c, t, i) for c, t, i in database.execute("SELECT company_id, key_type, key_id FROM whatsapp_keys")}


def archived(fleet: Fleet) -> list[dict[str, Any]]:
    """The rows of every archive."""
    return [orjson.loads(line)["old"] for run in archived_runs(fleet.state) for line in archived_lines(run.path)]


def archived_keys(fleet: Fleet) -> set[Key]:
    return {(row["company_id"], row["key_type"], row["key_id"]) for row in archived(fleet)}


def cleaned(fleet: Fleet, *words: str, exit_code: int = 0) -> Any:
    """A cleanup's JSON document."""
    done = fleet.opsctl("keys", "cleanup", "--yes", "--json", *words)
    assert done.returncode == exit_code, done
    return done.json()


def old_session(
    fleet: Fleet, name: str, *, company: str = FIRST, days: int = 40, expires: str | None = "2020-01-01"
) -> None:
    fleet.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at)"
        " VALUES (%s, 'session', %s, '{}', now() - %s * interval '1 day', %s)",
        [company, name, days, expires],
    )


# --- the rule ---------------------------------------------------------------------------------------------------------


def fuzzed(fleet: Fleet, count: int) -> dict[Key, tuple[datetime | None, datetime | None]]:
    """Rows of every type, known or not, with every kind of times; by key, when they were written and expire."""
    rng = random.Random(7)
    me = {c: creds["me"] for c, creds in fleet.database.execute("SELECT company_id, creds FROM whatsapp_auth")}
    types = [*KNOWN, "lid", "app", "sender", "pre", "unknown", ""]
    now = datetime.now(UTC)
    rows = {}
    with fleet.database.connect() as connection, connection.cursor() as cursor:
        copy_sql = b"COPY whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at) FROM STDIN"
        with cursor.copy(copy_sql) as copy:
            for number in range(count):
                company = rng.choice([FIRST, SECOND, "no-creds"])
                key_type = rng.choice(types)
                own = me.get(company, {"id": "1:2@s.whatsapp.net", "lid": "3:2@lid"})
                user, _, device = own["lid"].partition("@")[0].partition(":")
                ends = [f"{user}_1::{device}", f"{own['id'].partition(':')[0]}::{device}", f"{user}_1::0", "77::0"]
                key_id = f"{number}@g.us::{rng.choice(ends)}" if key_type == "sender-key" else f"f{number}"
                written = rng.choice([None, now, now + MONTH, now - 0.9 * MONTH, now - 1.1 * MONTH, now - 9 * MONTH])
                expires = rng.choice([None, now + MONTH, now - MONTH])
                copy.write_row((company, key_type, key_id, "{}", written, expires))
                rows[company, key_type, key_id] = (written, expires)
    return rows


def is_own(fleet: Fleet, key: Key) -> bool:
    """Nobody knows which sender-keys are a company's own where it has no credentials: then all may be."""
    found = fleet.database.execute("SELECT creds -> 'me' FROM whatsapp_auth WHERE company_id = %s", [key[0]])
    return not found or is_own_sender_key(key[2], found[0][0]["id"], found[0][0]["lid"])


@pytest.mark.parametrize(
    ("flags", "allowed", "both"),
    [
        ((), {"session", "sender-key-memory"}, True),
        (("--type", "sender-key"), {"sender-key"}, True),
        (("--type", "session", "--type", "sender-key"), {"session", "sender-key"}, True),
        (("--policy", "all"), {"session", "sender-key-memory", "sender-key"}, False),
        (("--policy", "all", "--type", "session"), {"session"}, False),
    ],
)
def test_of_a_fuzzed_database_exactly_what_the_policy_allows_is_deleted(
    empty_fleet: Fleet, flags: tuple[str, ...], allowed: set[str], both: bool
) -> None:
    fleet = empty_fleet
    fleet.seed()
    fleet.database.execute("DELETE FROM whatsapp_keys")
    rows = fuzzed(fleet, 1_500)
    now = datetime.now(UTC)
    expected = {
        key
        for key, (written, expires) in rows.items()
        if key[1] in allowed
        and (written is not None and written < now - MONTH)
        and (not both or (expires is not None and expires < now))
        and not (key[1] == "sender-key" and is_own(fleet, key))
    }
    assert expected
    document = cleaned(fleet, *flags)
    assert rows.keys() - keys_of(fleet.database) == expected
    assert archived_keys(fleet) == expected
    assert document["facts"]["deleted"] == len(expected)


def test_pre_keys_go_only_by_a_prune_that_keeps_the_newest_and_all_that_the_service_counts_from(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_keys")
    fleet.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at)"
        " SELECT company, 'pre-key', n::text, '{}', '2020-01-01', '2020-01-02'"
        " FROM unnest(%s::text[]) AS company, generate_series(1, 1800) AS n",
        [[FIRST, SECOND, "no-creds"]],
    )
    fleet.key("pre-key", "not-a-number", "{}", at="2020-01-01")
    fleet.database.execute(
        "UPDATE whatsapp_auth SET creds = creds || jsonb_build_object('nextPreKeyId', n, 'firstUnuploadedPreKeyId', u)"
        " FROM (VALUES (%s, 1801, 1801), (%s, 1801, 120)) AS v (c, n, u) WHERE company_id = c",
        [FIRST, SECOND],
    )
    assert cleaned(fleet, "--policy", "all")["facts"]["expired"] == 0
    before = keys_of(fleet.database)
    cleaned(fleet, "--prune-pre-keys")
    gone = before - keys_of(fleet.database)
    assert {int(i) for c, _, i in gone if c == FIRST} == set(range(1, 201))
    assert {int(i) for c, _, i in gone if c == SECOND} == set(range(1, 120))
    assert {c for c, _, _ in gone} == {FIRST, SECOND}


NO_SENSE = [
    (("--type", "app-state-sync-key"), 5, "is never deleted by age"),
    (("--type", "lid-mapping"), 5, "is never deleted by age"),
    (("--type", "pre-key"), 5, "--prune-pre-keys"),
    (("--type", "lid"), 2, "'lid' is no type of key"),
    (("--retention-days", "6"), 2, "greater than or equal to 7"),
    (("--retention-days", "0"), 2, "greater than or equal to 7"),
    (("--retention-days", "-30"), 2, "greater than or equal to 7"),
    (("--retention-days", "month"), 2, "'--retention-days'"),
    (("--max-rows", "-1"), 2, "'--max-rows'"),
    (("--pause-ratio", "nan"), 2, "'nan' is not a number from 0 to 100"),
    (("--max-runtime", "0"), 2, "'0' is not a number of seconds"),
    (("--company", "nobody"), 5, "no keys of company 'nobody'"),
]


def test_what_makes_no_sense_is_named_and_nothing_is_deleted(fleet: Fleet) -> None:
    before = keys_of(fleet.database)
    for words, exit_code, sentence in NO_SENSE:
        done = fleet.opsctl("keys", "cleanup", "--yes", *words)
        assert done.returncode == exit_code, done
        assert sentence in done.stderr
    assert keys_of(fleet.database) == before


def test_a_retention_in_the_settings_below_the_floor_is_named(fleet: Fleet) -> None:
    done = fleet.opsctl("keys", "cleanup", "--yes", env={"DB_CLEANUP_RETENTION_DAYS": "6"})
    assert (done.returncode, "DB_CLEANUP_RETENTION_DAYS" in done.stderr) == (3, True)


def test_each_flag_does_what_it_says(fleet: Fleet) -> None:
    database = fleet.database
    database.execute("DELETE FROM whatsapp_keys")
    for days in (10, 40, 50):
        old_session(fleet, f"d{days}", days=days)
        old_session(fleet, f"d{days}", days=days, company=SECOND)
    before = keys_of(database)
    dry = fleet.opsctl("keys", "cleanup", "--dry-run", "--json").json()
    assert (dry["facts"]["expired"], len(dry["facts"]["sample"])) == (4, 3)
    listed = fleet.opsctl("keys", "cleanup", "--dry-run", "--verbose").stdout
    assert listed.count(" session d") == 4
    assert fleet.opsctl("keys", "cleanup").returncode == 2  # nobody can say yes here
    assert "sender-key-memory" in fleet.opsctl("keys", "cleanup", "--explain").stdout
    assert keys_of(database) == before
    assert (
        fleet.opsctl("keys", "cleanup", "--dry-run", "--retention-days", "45", "--json").json()["facts"]["expired"] == 2
    )
    assert cleaned(fleet, "--company", SECOND, "--max-rows", "1")["facts"]["stopped"] == "max-rows"
    assert len([key for key in before - keys_of(database) if key[0] == SECOND]) == 1
    named = fleet.opsctl("keys", "cleanup", "--yes", "--company", SECOND, "--verbose")
    assert named.stdout.count(f"{SECOND} session d") == 1
    by_setting = fleet.opsctl("keys", "cleanup", "--yes", "--json", env={"DB_CLEANUP_RETENTION_DAYS": "45"}).json()
    assert by_setting["facts"]["deleted"] == 1
    assert cleaned(fleet)["facts"]["deleted"] == 1
    assert keys_of(database) == {(FIRST, "session", "d10"), (SECOND, "session", "d10")}


def test_the_answer_has_ages_sizes_and_an_honest_word_about_space(fleet: Fleet) -> None:
    old_session(fleet, "x")
    done = fleet.opsctl("keys", "cleanup", "--yes")
    for words in ("over 30 d", "the oldest ", "the newest ", "afterwards table ", "only VACUUM FULL", "keys undo "):
        assert words in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if line.startswith(FIRST))


# --- the world around it ----------------------------------------------------------------------------------------------


@contextmanager
def connected(database: Database) -> Iterator[db.Connection]:
    with db.connect(psycopg.conninfo.conninfo_to_dict(database.conninfo), 30) as connection:
        yield connection


def two_steps(fleet: Fleet, between: str) -> Report:
    """A cleanup, and what happens between its two steps."""
    wish = Wish("20260131T030405Z-00000a", "production", MONTH, pause_ratio=0)
    found = cleanup.find(lambda: connected(fleet.database), wish, journal=Journal())
    fleet.database.execute(between)
    return cleanup.delete(
        lambda: connected(fleet.database),
        found,
        wish,
        state_dir=fleet.state,
        keep_archives=MONTH,
        place="here",
        remaining=lambda: None,
        journal=Journal(),
    )


@each_postgres
def test_a_row_that_is_written_between_finding_and_deleting_survives(fleet: Fleet) -> None:
    for name in ("a", "b"):
        old_session(fleet, name)
    report = two_steps(fleet, "UPDATE whatsapp_keys SET updated_at = now() WHERE key_id = 'a'")
    assert {"a", "b"} & keys_of_type(fleet) == {"a"}
    assert "a" not in {key[2] for key in archived_keys(fleet)}
    assert report.facts["deleted"] == report.facts["expired"] - 1


def keys_of_type(fleet: Fleet, key_type: str = "session") -> set[str]:
    return {i for _, t, i in keys_of(fleet.database) if t == key_type}


@each_postgres
def test_a_row_that_the_service_has_locked_is_passed_over_and_counted(fleet: Fleet) -> None:
    for name in ("a", "b", "c"):
        old_session(fleet, name)
    with fleet.database.connect(autocommit=False) as service:
        service.execute("SELECT FROM whatsapp_keys WHERE key_id = 'b' FOR UPDATE")
        began = time.monotonic()
        facts = cleaned(fleet)["facts"]
        assert time.monotonic() - began < 10
    assert (facts["skipped_locked"], facts["changed_meanwhile"]) == (1, 0)
    assert {"a", "b", "c"} & keys_of_type(fleet) == {"b"}


@each_postgres
def test_a_partitioned_table_is_cleaned_up_through_its_name(fleet: Fleet) -> None:
    database = fleet.database
    before = keys_of(database)
    database.execute("ALTER TABLE whatsapp_keys RENAME TO flat")
    database.execute("CREATE TABLE whatsapp_keys (LIKE flat INCLUDING DEFAULTS) PARTITION BY HASH (company_id)")
    for number in range(3):
        database.execute(
            f"CREATE TABLE part_{number} PARTITION OF whatsapp_keys FOR VALUES WITH (MODULUS 3, REMAINDER {number})"
        )
    database.execute("INSERT INTO whatsapp_keys SELECT * FROM flat")
    for company in (FIRST, SECOND, "962304", "962305"):
        for number in range(30):
            old_session(fleet, f"old-{number}", company=company)
    database.execute("DROP ROLE IF EXISTS cleaner")
    database.execute("CREATE ROLE cleaner LOGIN")
    database.execute("GRANT SELECT, UPDATE, DELETE ON whatsapp_keys TO cleaner")  # and nothing on its partitions
    url = database.url.replace("postgres@", "cleaner@")
    try:
        done = fleet.opsctl("keys", "cleanup", "--yes", "--json", env={"DATABASE_URL": url})
        assert done.returncode == 0, done
        assert len([key for key in archived_keys(fleet) if key[2].startswith("old-")]) == 120
        assert not [key for key in keys_of(database) if key[2].startswith("old-")]
        assert before - keys_of(database) == archived_keys(fleet) - {k for k in archived_keys(fleet) if k not in before}
    finally:
        database.execute("DROP OWNED BY cleaner")
        database.execute("DROP ROLE cleaner")


@pytest.mark.parametrize("parts", [1, 4])
def test_beside_a_service_a_transaction_changes_four_blocks_at_most_of_all_partitions_together(
    fleet: Fleet, parts: int
) -> None:
    database = fleet.database
    database.execute("DROP TABLE whatsapp_keys")
    database.execute(
        "CREATE TABLE whatsapp_keys (company_id text, key_type text, key_id text, value jsonb, created_at timestamptz,"
        " updated_at timestamptz, expires_at timestamptz) PARTITION BY HASH (key_id)"
    )
    for number in range(parts):
        database.execute(
            f"CREATE TABLE part_{number} PARTITION OF whatsapp_keys "
            f"FOR VALUES WITH (MODULUS {parts}, REMAINDER {number})"
        )
    database.execute(  # about four rows in a block
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at) "
        "SELECT %s, 'session', number::text, to_jsonb(repeat('x', 1800)), '2020-01-01', '2020-01-08' "
        "FROM generate_series(1, 400) AS number",
        [FIRST],
    )
    ((blocks,),) = database.execute(
        "SELECT sum(pg_relation_size(relid) / 8192)::int FROM pg_partition_tree('whatsapp_keys') WHERE isleaf"
    )
    facts = cleaned(fleet)["facts"]
    assert facts["deleted"] == 400
    assert 90 <= blocks <= facts["transactions"] * 4


def test_tables_that_are_missing_or_other_are_named(fleet: Fleet) -> None:
    for damage, name in (
        ("ALTER TABLE whatsapp_keys RENAME updated_at TO changed", "updated_at"),
        ("DROP TABLE whatsapp_keys", "whatsapp_keys"),
    ):
        fleet.database.execute(damage)
        done = fleet.opsctl("keys", "cleanup", "--yes")
        assert done.returncode == 4, done
        assert name in done.stderr


def test_a_role_that_may_not_delete_is_told_so_and_a_read_only_server_too(fleet: Fleet) -> None:
    old_session(fleet, "a")
    fleet.database.execute("DROP ROLE IF EXISTS reader")
    fleet.database.execute("CREATE ROLE reader LOGIN")
    fleet.database.execute("GRANT SELECT ON whatsapp_keys, whatsapp_auth TO reader")
    try:
        done = fleet.opsctl(
            "keys", "cleanup", "--yes", env={"DATABASE_URL": fleet.database.url.replace("postgres@", "reader@")}
        )
    finally:
        fleet.database.execute("DROP OWNED BY reader")
        fleet.database.execute("DROP ROLE reader")
    assert (done.returncode, "may not change whatsapp_keys" in done.stderr) == (4, True), done
    assert "grant the role SELECT, UPDATE and DELETE" in done.stderr
    fleet.database.execute(f"ALTER DATABASE {fleet.database.name} SET default_transaction_read_only = on")
    done = fleet.opsctl("keys", "cleanup", "--yes")
    assert (done.returncode, "takes no writes" in done.stderr) == (4, True), done
    assert "a" in keys_of_type(fleet)


def test_without_an_archive_nothing_is_deleted(fleet: Fleet) -> None:
    old_session(fleet, "a")
    fleet.state.mkdir()
    (fleet.state / "archive").write_text("in the way")
    done = fleet.opsctl("keys", "cleanup", "--yes")
    assert (done.returncode, "no row is deleted without one" in done.stderr) == (5, True), done
    assert "a" in keys_of_type(fleet)


def test_a_disk_that_fills_up_in_the_middle_stops_it_with_every_deleted_row_in_the_archive(fleet: Fleet) -> None:
    fleet.database.execute(OLD_SESSIONS, [3_000])
    fleet.database.execute(
        "UPDATE whatsapp_keys SET value ="
        " to_jsonb((SELECT string_agg(md5(key_id || n), '') FROM generate_series(1, 9) AS n)) WHERE key_id LIKE 'old-%'"
    )
    before = keys_of(fleet.database)
    line = [sys.executable, "-m", "opsctl", "keys", "cleanup", "--yes", "--json", "--pause-ratio", "0"]
    environment = {**os.environ, **fleet.env, "PYTHONPATH": str(Path(opsctl.__file__).parents[1])}
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", *line]  # KiB of one file
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, cwd=fleet.place, check=False)
    gone = before - keys_of(fleet.database)
    assert done.returncode == 6, done
    assert orjson.loads(done.stdout)["error"]["kind"] == "archive"
    assert 0 < len(gone) < 3_000
    assert gone == archived_keys(fleet)


def test_while_the_service_runs_on_folders_nothing_is_deleted(fleet: Fleet) -> None:
    old_session(fleet, "a")
    own = fleet.target / OPSCTL_FOLDER
    own.mkdir(parents=True)
    descriptor = os.open(own, os.O_RDONLY)
    write_switch(descriptor, SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched"))
    os.close(descriptor)
    done = fleet.opsctl("keys", "cleanup", "--yes", env={"SESSIONS_DIR": str(fleet.target)})
    assert (done.returncode, "cleanup changes nothing" in done.stderr) == (5, True), done
    assert "a" in keys_of_type(fleet)


def test_more_than_a_thousand_deletions_are_told_to_sentry_as_a_warning(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_keys")
    with recording() as sentry:
        for rows, told in ((1_000, 0), (1_001, 1)):
            fleet.database.execute(OLD_SESSIONS, [rows])
            done = fleet.opsctl("keys", "cleanup", "--yes", "--json", env={"SENTRY_DSN": sentry.dsn})
            assert (done.returncode, done.json()["facts"]["deleted"]) == (0, rows)
            assert len(sentry.events) == told
    [event] = sentry.events
    assert (event["level"], event["tags"]["command"]) == ("warning", "keys cleanup")
    assert event["message"].startswith("1,001 of 1,001 expired keys deleted")
    assert event["contexts"]["facts"]["deleted"] == 1_001
    assert done.json()["sentry_event_id"] == event["event_id"]


# --- ended in the middle ----------------------------------------------------------------------------------------------


def slow_down(fleet: Fleet, rows: int = 3_000, seconds: float = 0.1) -> set[Key]:
    """Many old rows, and a server that thinks before each batch."""
    fleet.database.execute(OLD_SESSIONS, [rows])
    fleet.database.execute(
        "CREATE FUNCTION think() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
    )
    fleet.database.execute(
        "CREATE TRIGGER think BEFORE DELETE ON whatsapp_keys FOR EACH STATEMENT EXECUTE FUNCTION think()"
    )
    return keys_of(fleet.database)


def finished(fleet: Fleet) -> None:
    """The next run, on a server that is quick again, goes on to the end."""
    fleet.database.execute("DROP TRIGGER think ON whatsapp_keys")
    cleaned(fleet, "--pause-ratio", "0")
    assert not [key for key in keys_of(fleet.database) if key[2].startswith("old-")]


@contextmanager
def running(fleet: Fleet, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A cleanup that has deleted something and goes on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opsctl", "keys", "cleanup", "--yes", "--json", *words],
        env={**os.environ, **fleet.env, "PYTHONPATH": str(Path(opsctl.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=fleet.place,
    )
    try:
        until = time.monotonic() + 20
        while not [key for key in archived_keys(fleet) if key[2].startswith("old-")]:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.15)  # into some later batch
        yield process
    finally:
        process.kill()
        process.communicate()


def test_stopped_by_a_signal_it_ends_its_batch_says_why_and_the_next_run_goes_on(fleet: Fleet) -> None:
    before = slow_down(fleet)
    with running(fleet) as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    document = orjson.loads(out)
    assert (process.returncode, document["exit_code"], document["facts"]["stopped"]) == (143, 143, "SIGTERM")
    gone = before - keys_of(fleet.database)
    assert 0 < len(gone) < 3_000
    assert document["facts"]["deleted"] == len(gone)
    assert archived_keys(fleet) == gone
    assert [run.ended for run in archived_runs(fleet.state)] == ["stopped"]
    finished(fleet)
    assert archived_keys(fleet) == before - keys_of(fleet.database)


@pytest.mark.parametrize("fault", ["SIGKILL", "lost connection"])
def test_killed_or_cut_off_every_deleted_row_is_in_the_archive(fleet: Fleet, fault: str) -> None:
    before = slow_down(fleet)
    with running(fleet) as process:
        if fault == "SIGKILL":
            process.kill()
        else:
            fleet.database.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name LIKE 'opsctl keys%%' AND datname = %s",
                [fleet.database.name],
            )
        out, _ = process.communicate(timeout=20)
    gone = before - keys_of(fleet.database)
    assert 0 < len(gone) < 3_000
    assert gone <= archived_keys(fleet)
    if fault != "SIGKILL":
        assert process.returncode == 6
        assert "each of them in the archive" in orjson.loads(out)["error"]["message"]
    finished(fleet)
    assert before - keys_of(fleet.database) <= archived_keys(fleet)


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_server_that_goes_down_in_the_middle_loses_no_row(
    how: str, place: Path, run_opsctl: RunOpsctl, tmp_path: Path
) -> None:
    with embedded_server(tmp_path, durable=True) as server:
        database = Database(server, "postgres")
        with database.connect(autocommit=False) as connection:
            create_schema(connection)
        fleet = Fleet(database, place, run_opsctl)
        before = slow_down(fleet)
        with running(fleet) as process:
            (server.restart if how == "restart" else server.kill)()
            process.communicate(timeout=30)
        assert process.returncode == 6
        if how == "kill":
            server.restart()
        gone = before - keys_of(database)
        # A server that was killed may forget its last commits: then there are rows again that are archived too.
        assert how == "kill" or gone
        assert len(gone) < 3_000
        assert gone <= archived_keys(fleet)
        finished(fleet)
        assert keys_of(database) == set()
        assert archived_keys(fleet) == before


def test_of_two_at_once_the_second_says_who_holds_the_lock(fleet: Fleet) -> None:
    slow_down(fleet)
    with running(fleet) as process:
        done = fleet.opsctl("keys", "cleanup", "--yes")
    assert done.returncode == 75, done
    assert f"pid {process.pid}, server process " in done.stderr
    assert "opsctl keys cleanup" in done.stderr
    assert ", since 20" in done.stderr


def test_it_stops_at_its_time_and_rests_in_proportion_to_its_work(fleet: Fleet) -> None:
    slow_down(fleet, seconds=0.05)
    facts = cleaned(fleet, "--max-runtime", "0.5", "--pause-ratio", "3")["facts"]
    assert facts["stopped"] == "max-runtime"
    assert 0 < facts["deleted"] < 3_000
    assert 2 <= facts["transactions"] <= 12  # without the rest there would be three times as many
    late = cleaned(fleet, "--deadline", "4", "--pause-ratio", "100", exit_code=6)
    assert late["error"]["kind"] == "deadline"


def test_a_batch_adapts_to_what_it_takes() -> None:
    batch = Batch(100, fewest=50, most=1_000)
    sizes = []
    for done, seconds in [(100, 0.001), (200, 0.025), (10, 0.001), (200, 0.05), (100, 9.0), (50, 0.0001)]:
        batch.adapt(done, seconds)
        sizes.append(batch.size)
    assert sizes == [200, 200, 200, 100, 50, 100]


def test_a_batch_grows_over_what_changes_nothing_and_is_cut_to_what_it_may_change() -> None:
    batch = Batch(4, fewest=4, most=256, aim_s=0.025, most_changed=4)
    sizes = []
    for done, changed in [(4, 4), (4, 0), (8, 0), (16, 1), (32, 32), (4, 3)]:
        batch.adapt(done, 0.001, changed=changed)
        sizes.append(batch.size)
    assert sizes == [4, 8, 16, 32, 4, 5]


def test_with_a_pause_no_transaction_changes_more_blocks_than_a_service_may_wait_for(fleet: Fleet) -> None:
    fleet.database.execute("TRUNCATE whatsapp_keys")
    fleet.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at)"
        " SELECT %s, 'session', n || '.0', '{}', now() - interval '40 days', '2020-01-01'"
        " FROM generate_series(1, 9000) AS n",
        [FIRST],
    )
    ((blocks,),) = fleet.database.execute("SELECT pg_relation_size('whatsapp_keys') / 8192")
    assert blocks > 60
    facts = cleaned(fleet, "--pause-ratio", "0.01")["facts"]
    assert facts["deleted"] == 9000
    assert facts["transactions"] >= blocks / 4
