"""`opsctl cache`: what is in the service's cache, filling it from PostgreSQL, emptying it; never a secret."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

import opsctl
from opsctl.baileys.buffers import StoredForm, revive, to_form
from opsctl.cli import render
from opsctl.errors import OpsctlError
from opsctl.journal import Journal
from opsctl.operations.cache import inspect_cache
from opsctl.report import Ending
from opsctl.stores.cache_file import CredentialsCache
from opsctl.stores.folder import OPSCTL_FOLDER, opened
from opsctl.stores.switch_record import SwitchRecord, write_switch
from tests import needs
from tests.baileys import door
from tests.forks import AS_NOBODY
from tests.integration.fleet import FIRST, SECOND, Fleet, rows_of, unchanged

if TYPE_CHECKING:
    from tests.conftest import Finished


@pytest.fixture
def app(fleet: Fleet) -> Fleet:
    """The fleet, and the service's folder with its cache: FIRST fresh, SECOND ten minutes old."""
    folder = fleet.place / "app"
    folder.mkdir()
    fleet.env["APP_DIR"] = str(folder)
    write(fleet, {FIRST: 0, SECOND: 600_000})
    for (creds,) in fleet.database.execute("SELECT creds FROM whatsapp_auth"):
        fleet.secrets.add(creds["me"]["id"].partition(":")[0])
    return fleet


def file_of(fleet: Fleet) -> Path:
    return Path(fleet.env["APP_DIR"], ".baileys-cache.json")


def write(fleet: Fleet, ages_ms: dict[str, int]) -> None:
    """The cache as the service writes it, with the creds of the database."""
    now_ms = time.time_ns() // 1_000_000
    content = {}
    for company, creds in fleet.database.execute("SELECT company_id, creds FROM whatsapp_auth ORDER BY 1"):
        if company in ages_ms:
            stored = to_form(revive(creds), StoredForm.JSON_STRINGIFY)
            keys = {"_isCached": True, "_timestamp": now_ms - ages_ms[company]}
            content[company] = {"creds": stored, "keys": keys, "timestamp": now_ms - ages_ms[company]}
    file_of(fleet).write_text(json.dumps(content, indent=2))
    file_of(fleet).chmod(0o600)


def change(fleet: Fleet, company: str, **fields: Any) -> None:
    content = json.loads(file_of(fleet).read_bytes())
    content[company].update(fields)
    file_of(fleet).write_text(json.dumps(content, indent=2))


def inspected(fleet: Fleet, *words: str | Path) -> Finished:
    with unchanged(fleet.place):
        return fleet.opsctl("cache", "inspect", *words)


# inspect


def test_each_company_is_shown_with_its_age_its_validity_and_an_account_that_nobody_can_call(app: Fleet) -> None:
    done = inspected(app, "--json")
    assert done.returncode == 0, done
    rows = rows_of(done)
    assert {name: (row["state"], row["credentials"], row["keys"]) for name, row in rows.items()} == {
        FIRST: ("valid", "ok", False),
        SECOND: ("expired", "ok", False),
    }
    assert rows[SECOND]["age"] == "10 min"
    assert re.fullmatch("20[0-9]%", rows[SECOND]["of_ttl"])
    assert re.fullmatch("[0-9a-f]{12}", rows[FIRST]["account"])
    assert rows[FIRST]["account"] != rows[SECOND]["account"]
    facts = done.json()["facts"]
    assert (facts["mode"], facts["ttl_ms"], facts["torn"], facts["leftovers"]) == ("0600", 300_000, None, [])
    assert facts["size_bytes"] == file_of(app).stat().st_size
    shown = inspected(app)
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if not line.startswith(str(app.place)))


def test_the_ttl_is_the_services_and_a_file_may_be_named(app: Fleet) -> None:
    elsewhere = app.place / "copy.json"
    file_of(app).rename(elsewhere)
    app.env["CREDENTIALS_CACHE_TTL_MS"] = "3600000"
    done = inspected(app, elsewhere, "--json")
    assert {row["state"] for row in done.json()["rows"]} == {"valid"}
    app.env["CREDENTIALS_CACHE_FILE"] = str(elsewhere)
    assert inspected(app, "--json").json()["facts"]["path"] == str(elsewhere)
    assert inspected(app, env_less := app.place / "missing.json").returncode == 4, env_less
    done = app.opsctl("cache", "inspect", env={"APP_DIR": "", "CREDENTIALS_CACHE_FILE": ""})
    assert (done.returncode, "neither CREDENTIALS_CACHE_FILE nor APP_DIR is set" in done.stderr) == (3, True)


def test_only_the_companies_that_were_asked_for_are_shown(app: Fleet) -> None:
    assert set(rows_of(inspected(app, "--json", "--company", SECOND))) == {SECOND}
    done = inspected(app, "--company", "nobody")
    assert done.returncode == 5
    assert "holds nothing of 'nobody'" in done.stderr


def test_what_would_not_help_is_exit_1_and_what_is_odd_a_warning(app: Fleet) -> None:
    change(app, FIRST, timestamp=time.time_ns() // 1_000_000 + 60_000)
    file_of(app).with_name(".baileys-cache.json.tmp").write_text("{")
    file_of(app).chmod(0o644)
    done = inspected(app, "--json")
    assert done.returncode == 0
    assert rows_of(done)[FIRST]["state"] == "future"
    assert rows_of(done)[FIRST]["of_ttl"] is None
    said = " ".join(done.json()["warnings"])
    assert "others may look at" in said
    assert "left beside it: .baileys-cache.json.tmp" in said
    assert f"never to be trusted: '{FIRST}'" in said
    creds = json.loads(file_of(app).read_bytes())[SECOND]["creds"]
    change(app, SECOND, creds={**creds, "noiseKey": None})
    done = inspected(app, "--verbose")
    assert done.returncode == 1
    assert f"nobody could log in with '{SECOND}'" in done.stderr
    assert "noiseKey.private is missing" in done.stdout


@needs.root()
def test_a_file_of_somebody_else_than_its_folder_is_said(app: Fleet) -> None:
    os.chown(file_of(app), 65534, -1)
    done = inspected(app, "--json")
    assert "belongs to nobody, its folder to root" in " ".join(done.json()["warnings"])
    assert done.json()["facts"]["owner"] == "nobody"


def test_against_the_database_drift_is_named_by_field_and_never_by_value(app: Fleet) -> None:
    done = inspected(app, "--json", "--against", "database")
    assert {row["database"] for row in done.json()["rows"]} == {"same"}
    app.database.execute(
        "UPDATE whatsapp_auth SET creds = creds || '{\"nextPreKeyId\": 900}' WHERE company_id = %s", [FIRST]
    )
    app.database.execute(
        "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{me,id}', %s) WHERE company_id = %s",
        ['"49151:1@s.whatsapp.net"', SECOND],
    )
    app.copy_company("third")
    done = inspected(app, "--json", "--against", "database")
    assert done.returncode == 1
    assert {name: (row["state"], row["database"]) for name, row in rows_of(done).items()} == {
        FIRST: ("valid", "differs: nextPreKeyId"),
        SECOND: ("expired", "another account"),
        "third": ("missing", "has it"),
    }
    assert "in the database and not in the cache: 'third'" in done.json()["warnings"]
    app.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    done = inspected(app, "--json", "--against", "database", "--company", FIRST)
    assert rows_of(done)[FIRST]["database"] == "has it not"
    assert inspected(app, "--against", "database", "--env-file", "/dev/null").returncode == 1


def test_creds_that_nobody_can_walk_through_are_damaged_with_a_reason_on_both_sides(app: Fleet) -> None:
    deep: Any = []
    for _ in range(100):
        deep = {"type": "Buffer", "data": deep}
    creds = json.loads(file_of(app).read_bytes())[FIRST]["creds"]
    change(app, FIRST, creds={**creds, "noiseKey": {"private": deep, "public": deep}})
    for words in ((), ("--against", "database")):
        done = inspected(app, "--json", *words)
        assert done.returncode == 1, done
        assert rows_of(done)[FIRST]["state"] == "damaged"
        assert rows_of(done)[FIRST]["findings"] == ["its creds are nested too deeply"]
        assert done.json()["error"]["kind"] == "damaged"
    change(app, FIRST, creds=creds)
    endless = '{"a":' * 5000 + "1" + "}" * 5000
    for text in (json.dumps({"a": deep}), endless):
        app.database.execute("UPDATE whatsapp_auth SET creds = %s WHERE company_id = %s", [text, FIRST])
        done = inspected(app, "--json", "--against", "database")
        assert (done.returncode, rows_of(done)[FIRST]["database"]) == (1, "is damaged"), done
        assert rows_of(app.opsctl("cache", "warm", "--json"))[FIRST]["result"] == "left out"


def test_a_note_says_what_no_cache_file_can_tell(app: Fleet) -> None:
    done = inspected(app)
    assert "no file tells whether WhatsApp still knows it, or another process uses it" in done.stdout
    assert len(inspected(app, "--json").json()["notes"]) == 1


HOSTILE = {
    "of zero bytes": (1, "is no whole cache: empty"),
    "of another shape": (1, "is no whole cache: not a JSON object"),
    "torn in the middle": (1, "is no whole cache: torn after 1 entry"),
    "of 100 MB": (4, "has 100 MiB"),
    "a folder": (4, "is a folder"),
    "a symlink to elsewhere": (4, "is a symbolic link"),
    "missing": (4, "there is no credentials cache at"),
}


def make_hostile(file: Path, what: str) -> None:
    whole = file.read_bytes()
    file.unlink()
    match what:
        case "of zero bytes":
            file.write_bytes(b"")
        case "of another shape":
            file.write_bytes(b'["creds"]')
        case "torn in the middle":
            file.write_bytes(whole[: whole.index(SECOND.encode()) + 200])
        case "of 100 MB":
            with file.open("wb") as out:
                out.truncate(100 * 1024**2)
        case "a folder":
            file.mkdir()
        case "a symlink to elsewhere":
            file.with_name("elsewhere").write_bytes(whole)
            file.symlink_to(file.with_name("elsewhere"))


@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_stands_there_is_named_and_nothing_is_changed(app: Fleet, what: str) -> None:
    exit_code, sentence = HOSTILE[what]
    make_hostile(file_of(app), what)
    done = inspected(app)
    assert done.returncode == exit_code, done
    assert sentence in done.stderr
    if exit_code == 4 and what != "missing":
        with unchanged(app.place):
            assert app.opsctl("cache", "warm").returncode == 5
            assert app.opsctl("cache", "clear", "--yes").returncode == 5


@pytest.mark.parametrize("what", ["of zero bytes", "of another shape"])
@pytest.mark.parametrize(("verb", "words"), [("warm", ()), ("clear", ("--yes",))])
def test_what_is_no_cache_is_kept_aside_by_who_writes_over_it(
    app: Fleet, what: str, verb: str, words: tuple[str, ...]
) -> None:
    make_hostile(file_of(app), what)
    before = file_of(app).read_bytes()
    with unchanged(app.place):
        assert app.opsctl("cache", verb, "--dry-run").returncode == 0
    done = app.opsctl("cache", verb, *words, "--json")
    assert done.returncode == 0, done
    assert Path(done.json()["facts"]["set_aside"]).read_bytes() == before
    assert set(json.loads(file_of(app).read_bytes())) == ({FIRST, SECOND} if verb == "warm" else set())


@needs.root()
def test_a_cache_that_this_user_may_not_read_is_named(app: Fleet) -> None:
    with unchanged(app.place):
        done = app.opsctl("cache", "inspect", before=AS_NOBODY)
        assert (done.returncode, "cannot be read: Permission denied" in done.stderr) == (4, True), done
        for words in (("warm",), ("clear", "--yes")):
            done = app.opsctl("cache", *words, before=AS_NOBODY)
            assert (done.returncode, "so nothing was changed" in done.stderr) == (5, True), done


def test_two_runs_at_once_exclude_each_other(app: Fleet) -> None:
    with unchanged(app.place), CredentialsCache(file_of(app), ttl=timedelta(minutes=5)):
        for words in (("warm",), ("clear", "--yes")):
            done = app.opsctl("cache", *words, "--json")
            assert (done.returncode, done.json()["error"]["kind"]) == (75, "locked")
        assert app.opsctl("cache", "inspect").returncode == 0  # which only looks
    assert app.opsctl("cache", "warm").returncode == 0


FULL = """
mount -t tmpfs -o size=64k tmpfs "$0"
cp "$1" "$0/.baileys-cache.json"
head -c 1M /dev/zero > "$0/filler" 2>/dev/null
shift
"$@"
code=$?
cat "$0/.baileys-cache.json"
ls -A "$0" >&2
exit $code
"""


@needs.root()
@needs.namespace("mount")
def test_a_full_disk_leaves_the_old_cache_whole(app: Fleet) -> None:
    whole = file_of(app).read_bytes()
    old = app.place / "old.json"
    file_of(app).rename(old)
    words = [sys.executable, "-m", "opsctl", "cache", "warm", "--quiet"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL, app.env["APP_DIR"], str(old), *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1]), **app.env},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert b"cannot be written: No space left on device" in done.stderr
    assert done.stdout == whole
    assert done.stderr.split()[-2:] == [b".baileys-cache.json", b"filler"]


def test_two_thousand_fuzzed_files_of_complete_creds_held_against_the_database_give_no_traceback_and_no_secret(
    app: Fleet,
) -> None:
    whole = file_of(app).read_bytes()
    theirs = {
        company: json.dumps(creds).encode()
        for company, creds in app.database.execute("SELECT company_id, creds FROM whatsapp_auth")
    }
    values = {json.dumps(value) for value in json.loads(whole)[FIRST]["creds"]["noiseKey"].values()}
    secrets = {s.encode() for s in app.secrets} | {re.sub(r".*\[|\].*", "", value).encode() for value in values}
    path = app.place / "fuzzed.json"
    source = random.Random(7)
    seen: set[str] = set()
    for number in range(2_000):
        path.write_bytes(mutated(whole, source) if number else whole)
        try:
            report = inspect_cache(
                path,
                ttl=timedelta(minutes=5),
                companies=(),
                open_snapshot=lambda: nullcontext(SimpleNamespace(all_creds=lambda: theirs)),  # type: ignore[arg-type] # asked once, not 2,000 times
                journal=Journal(),
            )
        except OpsctlError as error:
            seen.add(error.kind)
            continue
        said = orjson.dumps(
            Ending("cache inspect", "run", report, None, (), 0.0, emergency=False, options={}).envelope()
        )
        assert not [secret for secret in secrets if secret in said]
        seen |= {row.database or "" for row in report.rows}
        seen.add(report.failure.kind if report.failure else "well")
    assert {"torn", "damaged", "drift", "well", "same", "has it", "has it not"} <= seen
    assert any(word.startswith("differs: ") for word in seen)


@pytest.mark.long
def test_ten_thousand_fuzzed_files_give_neither_a_traceback_nor_a_secret(app: Fleet) -> None:
    for company, entry in json.loads(file_of(app).read_bytes()).items():
        few = ("me", "noiseKey", "advSecretKey", "nextPreKeyId")  # what is proven of the rest takes its time
        change(app, company, creds={name: entry["creds"][name] for name in few})
    whole = json.dumps(json.loads(file_of(app).read_bytes())).encode()
    secrets = {s.encode() for s in app.secrets} | set(re.findall(rb'"(?:private|public)":[^\]]*\]', whole))
    path = app.place / "fuzzed.json"
    source = random.Random(6)
    journal = Journal()
    names: set[str] = set()
    for number in range(10_000):
        path.write_bytes(mutated(whole, source))
        try:
            report = inspect_cache(path, ttl=timedelta(minutes=5), companies=(), open_snapshot=None, journal=journal)
        except OpsctlError as error:
            names.add(error.kind)
            continue
        ending = Ending("cache inspect", "run", report, None, (), 0.0, emergency=False, options={})
        said = orjson.dumps(ending.envelope())
        if number % 100 == 0:
            with redirect_stdout(io.StringIO()) as out:
                render.as_text(ending, quiet=False, verbose=True)
            said += out.getvalue().encode()
        assert not [secret for secret in secrets if secret in said]
        names.add(report.failure.kind if report.failure else "ok")
        assert report.exit_code == 1
    assert names == {"torn", "damaged"}


def mutated(data: bytes, source: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(out) + 1)
        match source.randrange(5):
            case 0 if out:
                out[at % len(out)] = source.randrange(256)
            case 1:
                del out[at : at + source.randint(1, 3000)]
            case 2:
                out[at:at] = source.randbytes(source.randint(1, 8))
            case 3:
                out[at:at] = source.choice(
                    [b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"null", b"1e999", b"\xff", b"\0"]
                )
            case 4:
                del out[at:]
    return bytes(out)


# warm


def test_warm_fills_the_cache_from_the_database_and_the_services_program_starts_with_it(app: Fleet) -> None:
    file_of(app).unlink()
    with unchanged(app.place):
        preview = app.opsctl("cache", "warm", "--dry-run", "--json")
    assert {row["result"] for row in preview.json()["rows"]} == {"would be cached"}
    done = app.opsctl("cache", "warm", "--json")
    assert done.returncode == 0, done
    assert {company: row["result"] for company, row in rows_of(done).items()} == {FIRST: "cached", SECOND: "cached"}
    assert "a service that runs overwrites this at its next save" in done.json()["warnings"][0]
    assert file_of(app).stat().st_mode & 0o777 == 0o600
    assert door.read_cache(file_of(app), ttl_ms=300_000) == {
        company: to_form(revive(creds), StoredForm.BASE64)
        for company, creds in app.database.execute("SELECT company_id, creds FROM whatsapp_auth")
    }
    assert inspected(app, "--against", "database").returncode == 0


def test_warm_keeps_the_other_companies_and_sets_aside_what_could_not_be_read(app: Fleet) -> None:
    make_hostile(file_of(app), "torn in the middle")
    done = app.opsctl("cache", "warm", "--company", SECOND, "--json")
    assert done.returncode == 0, done
    aside = Path(done.json()["facts"]["set_aside"])
    assert f"it is kept as {aside}" in done.json()["warnings"][1]
    assert set(rows_of(inspected(app, "--json"))) == {FIRST, SECOND}
    assert aside.stat().st_mode & 0o777 == 0o600


@needs.root()
def test_what_root_writes_is_the_services(app: Fleet) -> None:
    os.chown(app.env["APP_DIR"], 65534, 65534)
    os.chown(file_of(app), 65534, 65534)
    assert app.opsctl("cache", "warm").returncode == 0
    assert (file_of(app).stat().st_uid, file_of(app).stat().st_gid) == (65534, 65534)
    file_of(app).unlink()
    assert app.opsctl("cache", "warm").returncode == 0
    assert file_of(app).stat().st_uid == 65534


def test_credentials_that_cannot_log_in_are_left_out_and_said(app: Fleet) -> None:
    app.database.execute("UPDATE whatsapp_auth SET creds = creds - 'noiseKey' WHERE company_id = %s", [FIRST])
    file_of(app).unlink()
    done = app.opsctl("cache", "warm", "--json")
    assert done.returncode == 6
    assert rows_of(done)[FIRST]["why"] == "noiseKey.private is missing or holds no bytes"
    assert set(json.loads(file_of(app).read_bytes())) == {SECOND}
    app.database.execute("UPDATE whatsapp_auth SET creds = creds - 'account'")
    with unchanged(app.place):
        assert app.opsctl("cache", "warm").returncode == 5


def test_no_more_companies_are_cached_than_the_limit(app: Fleet) -> None:
    app.env["CACHE_MAX_ENTRIES"] = "1"
    done = app.opsctl("cache", "warm", "--json")
    assert done.returncode == 6
    assert sorted(row["result"] for row in done.json()["rows"]) == ["cached", "left out"]
    assert len(json.loads(file_of(app).read_bytes())) == 1


def test_warm_refuses_an_unknown_company_an_empty_database_and_a_switch(app: Fleet) -> None:
    with unchanged(app.place):
        assert app.opsctl("cache", "warm", "--company", "nobody").returncode == 5
        assert app.opsctl("cache", "warm", env={"DATABASE_URL": "postgresql://u@127.0.0.1:1/db"}).returncode == 4
        app.database.execute("DELETE FROM whatsapp_auth")
        assert app.opsctl("cache", "warm").returncode == 4
    (app.target / OPSCTL_FOLDER).mkdir(parents=True)
    app.env["SESSIONS_DIR"] = str(app.target)
    with opened(app.target / OPSCTL_FOLDER) as own:
        write_switch(own, SwitchRecord("2026-01-31T03:04:05+00:00", "run", "host", "switched"))
    done = app.opsctl("cache", "warm")
    assert done.returncode == 5
    assert "cache warm changes nothing while the service runs on the folders" in done.stderr


# clear


def test_clear_asks_and_empties_the_cache_or_forgets_one_company(app: Fleet) -> None:
    with unchanged(app.place):
        assert app.opsctl("cache", "clear").returncode == 2
        preview = app.opsctl("cache", "clear", "--dry-run", "--company", FIRST, "--json")
        assert rows_of(preview)[FIRST]["result"] == "would be cleared"
        assert app.opsctl("cache", "clear", "--yes", "--company", "nobody").returncode == 5
        assert app.opsctl("cache", "clear", "--dry-run", "--company", "nobody").returncode == 5
    done = app.opsctl("cache", "clear", "--yes", "--company", FIRST, "--json")
    assert set(rows_of(done)) == {FIRST}
    assert set(json.loads(file_of(app).read_bytes())) == {SECOND}
    done = app.opsctl("cache", "clear", "--yes", "--json")
    assert (done.returncode, set(rows_of(done))) == (0, {SECOND})
    assert file_of(app).read_bytes() == b"{}"
    assert app.opsctl("cache", "clear", "--yes").returncode == 0


def test_clear_of_a_torn_cache_keeps_it_aside(app: Fleet) -> None:
    make_hostile(file_of(app), "torn in the middle")
    torn = file_of(app).read_bytes()
    done = app.opsctl("cache", "clear", "--yes", "--json")
    assert Path(done.json()["facts"]["set_aside"]).read_bytes() == torn
    assert file_of(app).read_bytes() == b"{}"
