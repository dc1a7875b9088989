"""`sessions list`: who is where, and how old, also when the database is gone."""

from __future__ import annotations

import re
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.integration.fleet import FIRST, KEYS, SECOND, Fleet, rows_of, unchanged

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def restored(fleet: Fleet) -> Iterator[Fleet]:
    """FIRST is in both places, SECOND in the database, 999 a folder of somebody's. Listing changes nothing."""
    fleet.restored("--company", FIRST)
    (fleet.target / "company_999").mkdir()
    (fleet.target / "company_999" / "creds.json").write_text("{}")
    with unchanged(fleet.place):
        yield fleet


def test_each_company_is_listed_with_its_keys_its_sources_and_their_ages(restored: Fleet) -> None:
    restored.database.execute("UPDATE whatsapp_auth SET updated_at = now() - interval '40 days'")
    restored.database.execute("UPDATE whatsapp_keys SET updated_at = now() - interval '50 hours'")
    done = restored.listing("--json")
    assert done.returncode == 0, done
    rows = rows_of(done)
    assert {company: (row["keys"], row["database"], row["folder"]) for company, row in rows.items()} == {
        FIRST: (KEYS, "yes", "restored"),
        SECOND: (KEYS, "yes", "no"),
        "999": (0, "no", "foreign"),
    }
    assert rows[FIRST]["newest_age"] == "2 d"
    assert rows[FIRST]["folder_age"].endswith(" s")
    assert rows[SECOND]["folder_age"] is None
    assert rows[FIRST]["keys_by_type"]["pre-key"] == rows[FIRST]["pre_keys"] == 14
    assert done.json()["facts"]["target"] == str(restored.target)


def test_only_the_companies_that_were_asked_for_are_listed(restored: Fleet) -> None:
    done = restored.listing("--json", "--company", "999", "--company", SECOND)
    assert set(rows_of(done)) == {"999", SECOND}
    for unknown in ("nobody", "../x"):
        done = restored.listing("--company", unknown)
        assert done.returncode == 5
        assert f"no source holds '{unknown}'" in done.stderr


def test_what_is_said_is_as_much_as_was_asked_for(restored: Fleet) -> None:
    quiet = restored.listing("--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    detail = f"{FIRST}: 1 app-state-sync-key, "
    assert detail not in restored.listing().stdout
    assert detail in restored.listing("--verbose").stdout


@pytest.mark.parametrize("words", [[], ["--company", FIRST]])
def test_without_a_database_the_folders_are_listed_and_the_exit_code_says_so(restored: Fleet, words: list[str]) -> None:
    url = "postgresql://u:hunter2@127.0.0.1:1/db"
    restored.secrets.add("hunter2")
    done = restored.listing("--json", *words, env={"DATABASE_URL": url})
    assert done.returncode == 1
    assert {name: row["folder"] for name, row in rows_of(done).items()} == (
        {FIRST: "restored"} if words else {FIRST: "restored", "999": "foreign"}
    )
    error = done.json()["error"]
    assert error["message"] == "the database cannot be read: PostgreSQL at 127.0.0.1:1/db: the connection is refused"


def test_without_any_address_the_settings_are_to_blame(restored: Fleet) -> None:
    done = restored.listing(env={"DATABASE_URL": ""})
    assert done.returncode == 3
    assert "no database address is set" in done.stderr


def test_a_deadline_ends_the_waiting_for_the_database(restored: Fleet) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/db"
        done = restored.listing("--deadline", "0.5", env={"DATABASE_URL": url})
    assert done.returncode == 1
    assert re.search(r"/db did not answer within 0\.[0-5] s", done.stderr), done
    assert FIRST in done.stdout


def test_a_link_or_a_file_among_the_folders_hides_none_of_them(fleet: Fleet) -> None:
    fleet.restored()
    (fleet.target / "company_link").symlink_to(fleet.folder())
    (fleet.target / "company_empty").mkdir()
    (fleet.target / "a file").write_text("")
    rows = rows_of(fleet.listing("--json"))
    assert {name: row["folder"] for name, row in rows.items()} == {
        FIRST: "restored",
        SECOND: "restored",
        "link": "symlink",
        "empty": "no creds",
    }


def test_a_folder_that_does_not_exist_holds_nothing_and_one_that_cannot_be_read_is_said(fleet: Fleet) -> None:
    done = fleet.listing("--json")
    assert done.returncode == 0
    assert {row["folder"] for row in done.json()["rows"]} == {"no"}
    assert done.json()["warnings"] == []
    fleet.target.symlink_to(fleet.place)
    assert f"the folders in {fleet.target} cannot be read: " in fleet.listing("--json").json()["warnings"][0]


def test_keys_without_credentials_are_listed_as_that(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    fleet.database.execute("UPDATE whatsapp_keys SET updated_at = 'infinity' WHERE company_id = %s", [FIRST])
    fleet.database.execute("UPDATE whatsapp_auth SET updated_at = NULL")
    row = rows_of(fleet.listing("--json"))[FIRST]
    assert (row["database"], row["keys"], row["newest_age"]) == ("no creds", KEYS, "infinity")
