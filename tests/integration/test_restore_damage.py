"""A server that reports damage in its own pages, and what the service's user may have put in the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests import needs
from tests.integration.fleet import FIRST, SECOND, Fleet, results, rows_of, unchanged

if TYPE_CHECKING:
    from pathlib import Path

DAMAGE = """
CREATE FUNCTION damaged(company text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF company = '{company}' THEN
        RAISE EXCEPTION 'invalid page in block 7 of relation base/5/16391' USING ERRCODE = '{state}';
    END IF;
    RETURN true;
END $$
"""


def damage(fleet: Fleet, columns: str, *, state: str = "XX001") -> None:
    """Reading one of `columns` of the first company's keys answers as PostgreSQL does for a damaged page."""
    fleet.database.execute(DAMAGE.format(company=FIRST, state=state))
    fleet.database.execute("ALTER TABLE whatsapp_keys RENAME TO intact_keys")
    fleet.database.execute(f"CREATE VIEW whatsapp_keys AS SELECT {columns} FROM intact_keys")


WHOLE = "company_id, key_type, key_id, value, updated_at, expires_at"
VALUE = WHOLE.replace("value", "CASE WHEN damaged(company_id) THEN value END AS value")
EVERYTHING = WHOLE.replace("updated_at", "CASE WHEN damaged(company_id) THEN updated_at END AS updated_at")


@pytest.mark.parametrize("columns", [VALUE, EVERYTHING], ids=["when it is read", "when companies are listed"])
@pytest.mark.parametrize("state", ["XX001", "58030"])
def test_a_damaged_page_costs_its_company_only(fleet: Fleet, columns: str, state: str) -> None:
    damage(fleet, columns, state=state)
    done = fleet.restore("--json")
    assert done.returncode == 6, done.stderr
    assert results(done) == {FIRST: "damaged", SECOND: "restored"}
    assert f"SQLSTATE {state}" in done.stdout
    assert fleet.companies() == [f"company_{SECOND}"]


def test_a_manifest_that_is_a_folder_or_garbage_makes_a_foreign_folder(fleet: Fleet) -> None:
    fleet.restored()
    for company, spoil in ((FIRST, _make_a_folder), (SECOND, _make_garbage)):
        spoil(fleet.folder(company) / ".opsctl-manifest.json")
    done = fleet.restore("--json")
    assert done.returncode == 5, done.stdout
    assert results(done) == {FIRST: "refused", SECOND: "refused"}
    assert fleet.opsctl("sessions", "verify", fleet.target, "--json").returncode == 0
    assert set(results(fleet.restored("--replace", "--yes")).values()) == {"restored"}


def _make_a_folder(manifest: Path) -> None:
    manifest.unlink()
    manifest.mkdir()


def _make_garbage(manifest: Path) -> None:
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(lines[0] + b'"\xff":{"sha256":"' + b"0" * 64 + b'"},\n' + b"".join(lines[1:]))


def test_a_companys_own_folder_is_no_target(fleet: Fleet) -> None:
    fleet.restored()
    inside = fleet.folder(FIRST)
    done = fleet.opsctl("sessions", "restore", "--to", inside)
    assert done.returncode == 5
    assert f"{inside} is one company's folder" in done.stderr
    assert not (inside / ".opsctl").exists()


def test_what_stands_where_the_locks_holder_is_named_is_not_written_to(fleet: Fleet) -> None:
    fleet.restored()
    precious = fleet.place / "precious"
    precious.write_text("kept")
    for plant in (lambda path: os.mkfifo(path), lambda path: path.hardlink_to(precious)):
        plant(fleet.target / ".opsctl" / "holder.json")
        fleet.restored()
    assert precious.read_text() == "kept"


@needs.root()
def test_credentials_that_the_services_user_cannot_read_will_not_log_in(fleet: Fleet) -> None:
    fleet.restored("--owner", "nobody")
    os.chown(fleet.folder(FIRST) / "creds.json", 0, 0)
    done = fleet.opsctl("sessions", "verify", fleet.target)
    assert done.returncode == 1
    assert f"{FIRST}: creds.json belongs to another user than its folder" in done.stderr


FIRST_SESSION = "min(name for name in os.listdir(self._fd) if name.startswith('session-'))"
NOT_WRITTEN_WELL = {  # what goes wrong after a company's files were written: what is said of it
    "a key file is gone": (
        f"os.unlink({FIRST_SESSION}, dir_fd=self._fd)",
        "its files are not those of its manifest",
    ),
    "creds are others": (
        "os.truncate(f'/proc/self/fd/{self._fd}/creds.json', 9)",
        "creds.json reads back differently from what was written",
    ),
}


@pytest.mark.parametrize(("wrong", "said"), NOT_WRITTEN_WELL.values(), ids=NOT_WRITTEN_WELL.keys())
def test_a_folder_that_does_not_read_back_is_not_published(fleet: Fleet, wrong: str, said: str) -> None:
    fleet.restored()
    fleet.database.execute("UPDATE whatsapp_auth SET creds = creds || '{\"accountSyncCounter\": 7}'")
    after = f"""
import os, opsctl.stores.staging as staging
real = staging.CompanyWriter.finish
def finish(self):
    done = real(self)
    if done.company_id == '{FIRST}':
        {wrong}
    return done
staging.CompanyWriter.finish = finish
"""
    with unchanged(fleet.folder(FIRST)):
        done = fleet.opsctl("sessions", "restore", "--to", fleet.target, "--service-stopped", "--json", before=after)
    assert done.returncode == 6, done
    assert results(done) == {FIRST: "damaged", SECOND: "restored"}
    assert said in rows_of(done)[FIRST]["reason"]


def test_all_companies_are_of_one_moment(fleet: Fleet) -> None:
    """What is written while the first company is read is in no folder: half of it could be in one."""
    written = """
import os, psycopg, opsctl.stores.postgres as postgres
real = postgres.Snapshot.key_rows
def key_rows(self, company_id):
    with psycopg.connect(os.environ['DATABASE_URL'], autocommit=True) as other:
        other.execute("UPDATE whatsapp_auth SET creds = creds || '{\\"accountSyncCounter\\": 77}'")
        other.execute("DELETE FROM whatsapp_keys WHERE key_type = 'pre-key'")
    return real(self, company_id)
postgres.Snapshot.key_rows = key_rows
"""
    done = fleet.opsctl("sessions", "restore", "--to", fleet.target, "--json", before=written)
    assert done.returncode == 0, done
    assert fleet.database.execute("SELECT DISTINCT creds->>'accountSyncCounter' FROM whatsapp_auth") == [("77",)]
    for company in (FIRST, SECOND):
        assert '"accountSyncCounter":1,' in (fleet.folder(company) / "creds.json").read_text()
        assert list(fleet.folder(company).glob("pre-key-*.json"))
