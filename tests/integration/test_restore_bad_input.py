"""Input that makes no sense, or a world that is not as expected: one sentence, its exit code, and nothing changed."""

from __future__ import annotations

import re
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from opsctl.embedded import EmbeddedServer, embedded_server
from tests.integration.fleet import FIRST, KEYS, SECOND, Fleet, results, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWORD = "hun0ter2-s3cret"


def refuse_address(fleet: Fleet, exit_code: int, sentence: str, address: dict[str, str]) -> None:
    fleet.secrets.add(PASSWORD)
    no_address = {name: value for name, value in fleet.env.items() if name != "DATABASE_URL"}
    fleet.env = {**no_address, **address}
    done = fleet.refused(exit_code, sentence)
    assert not fleet.target.exists()
    clock = r"RTO: [\d.]+ s of 600 s, NOT met \(files; .*\)\n" if exit_code in {4, 5, 6} else ""
    assert re.fullmatch(clock, done.stdout)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", "PostgreSQL at 127.0.0.1:1/db: the connection is refused"),
        (f"postgresql://u:{PASSWORD}@nowhere.invalid/db", "PostgreSQL at nowhere.invalid:5432/db: "),
        (f"postgresql://u:{PASSWORD}@%2Fno%2Fsuch%2Fsocket/db", "PostgreSQL at /no/such/socket:5432/db: "),
    ],
    ids=["refused", "no such name", "no socket"],
)
def test_a_server_that_cannot_be_reached_is_named(empty_fleet: Fleet, address: str, sentence: str) -> None:
    refuse_address(empty_fleet, 4, sentence, {"DATABASE_URL": address})


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (f"postgresql://u:{PASSWORD}%zz@h/db", "DATABASE_URL is not a connection string"),
        (f"host=h user=u password=two {PASSWORD}", "DATABASE_URL is not a connection string"),
        (f"postgresql://u:p@h/db?{PASSWORD}=1", "DATABASE_URL is not a connection string"),
        (f"host=h password='{PASSWORD}", "DATABASE_URL is not a connection string"),
        (f"mysql://u:{PASSWORD}@h/db", "DATABASE_URL is not a connection string"),
        (f"postgresql://u:p{PASSWORD}/x@h:5432/db", "DATABASE_URL has a port that is no number"),
        (f"postgresql://u:42/{PASSWORD}@h:5432/db", "DATABASE_URL has a database name with an @ in it"),
        (f"postgresql://u:p@{PASSWORD}@h:5432/db", "DATABASE_URL has a host name with an @ in it"),
        (f"postgresql://u:{PASSWORD}@h:99999/db", "DATABASE_URL has a port that is no number"),
    ],
    ids=[
        "bad percent", "no equals sign", "unknown parameter", "open quote", "another scheme", "slash",
        "slash after digits", "at", "port too large",
    ],
)  # fmt: skip
def test_a_malformed_database_url_is_said_without_any_part_of_its_password(
    empty_fleet: Fleet, address: str, sentence: str
) -> None:
    refuse_address(empty_fleet, 3, sentence, {"DATABASE_URL": address})


@pytest.mark.parametrize(
    ("exit_code", "sentence", "address"),
    [
        (3, "POSTGRES_PORT ('54x') is not a whole number", {"POSTGRES_HOST": "h", "POSTGRES_PORT": "54x"}),
        (3, "POSTGRES_PORT ('0') is not between 1 and 65535", {"POSTGRES_HOST": "h", "POSTGRES_PORT": "0"}),
        (3, "POSTGRES_SSL_MODE ('yes') is not one of", {"POSTGRES_HOST": "h", "POSTGRES_SSL_MODE": "yes"}),
        (4, "nowhere.invalid:5432/db", {"POSTGRES_HOST": "nowhere.invalid", "POSTGRES_DATABASE": "db"}),
        (4, "u:p@nowhere.invalid", {"POSTGRES_HOST": "u:p@nowhere.invalid"}),
        (3, "no database address is set", {}),
        (3, "no database address is set", {"POSTGRES_PASSWORD": PASSWORD, "DATABASE_URL": " "}),
    ],
    ids=["port", "port 0", "TLS", "host", "URL as host", "none", "empty"],
)
def test_the_separate_variables_are_named_too(
    empty_fleet: Fleet, exit_code: int, sentence: str, address: dict[str, str]
) -> None:
    refuse_address(empty_fleet, exit_code, sentence, {"POSTGRES_PASSWORD": PASSWORD, **address})


def test_the_separate_variables_are_an_address(fleet: Fleet) -> None:
    server = fleet.database.server
    del fleet.env["DATABASE_URL"]
    fleet.env |= {
        "POSTGRES_HOST": str(server.socket_dir),
        "POSTGRES_PORT": str(server.port),
        "POSTGRES_USER": "postgres",
        "POSTGRES_DATABASE": fleet.database.name,
    }
    assert results(fleet.restored()) == {FIRST: "restored", SECOND: "restored"}


@pytest.mark.parametrize(
    "parameters",
    ["?pgbouncer=true&connection_limit=3", "?sslmode=no-verify&schema=public", "?connect_timeout=10&pool_timeout=0"],
)
def test_a_database_url_with_parameters_of_node_clients_works(fleet: Fleet, parameters: str) -> None:
    fleet.env["DATABASE_URL"] += parameters
    assert fleet.restored("--company", FIRST)["outcome"] == "ok"


@pytest.fixture(scope="module")
def server_with_passwords(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with embedded_server(tmp_path_factory.mktemp("tcp"), tcp=True) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE ROLE odd LOGIN PASSWORD 'p#?/@ %%'")
        yield server


def test_a_wrong_password_is_said_without_it(empty_fleet: Fleet, server_with_passwords: EmbeddedServer) -> None:
    place = f"127.0.0.1:{server_with_passwords.port}/postgres"
    sentence = f"PostgreSQL at {place}: the server does not accept the role or its password"
    refuse_address(empty_fleet, 4, sentence, {"DATABASE_URL": f"postgresql://postgres:{PASSWORD}@{place}"})


def test_a_password_that_is_percent_encoded_is_understood(
    empty_fleet: Fleet, server_with_passwords: EmbeddedServer
) -> None:
    place = f"127.0.0.1:{server_with_passwords.port}/postgres"
    url = f"postgresql://odd:p%23%3F%2F%40%20%25%25@{place}?pgbouncer=true"
    refuse_address(empty_fleet, 4, 'relation "whatsapp_auth" does not exist', {"DATABASE_URL": url})


def test_a_database_that_is_missing_is_named(empty_fleet: Fleet) -> None:
    url = empty_fleet.env["DATABASE_URL"].rpartition("/")[0] + "/nowhere"
    refuse_address(empty_fleet, 4, "/nowhere: the server has no database of that name", {"DATABASE_URL": url})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("DROP TABLE whatsapp_auth", 'relation "whatsapp_auth" does not exist (SQLSTATE 42P01)'),
        ("DROP TABLE whatsapp_keys", 'relation "whatsapp_keys" does not exist (SQLSTATE 42P01)'),
        ("ALTER TABLE whatsapp_auth DROP COLUMN creds", 'column "creds" does not exist (SQLSTATE 42703)'),
        ("ALTER TABLE whatsapp_keys DROP COLUMN expires_at", 'column "expires_at" does not exist (SQLSTATE 42703)'),
        ("TRUNCATE whatsapp_auth, whatsapp_keys", "the database holds no credentials: whatsapp_auth is empty"),
        ("TRUNCATE whatsapp_auth", "the database holds no credentials: whatsapp_auth is empty"),
    ],
    ids=["no auth", "no keys", "no creds column", "no expires_at column", "no rows", "keys only"],
)
def test_tables_that_are_missing_or_empty_are_named(fleet: Fleet, spoil: str, sentence: str) -> None:
    fleet.database.execute(spoil)
    fleet.refused(4, sentence)


def test_a_table_that_may_not_be_read_is_named(fleet: Fleet) -> None:
    fleet.database.execute("DROP ROLE IF EXISTS blind")
    fleet.database.execute("CREATE ROLE blind LOGIN")
    fleet.env["DATABASE_URL"] = fleet.database.url.replace("//postgres@", "//blind@")
    fleet.refused(4, "permission denied for table whatsapp_auth (SQLSTATE 42501)")


def test_a_deadline_ends_the_waiting_for_a_server_that_says_nothing(empty_fleet: Fleet) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        url = f"postgresql://u:{PASSWORD}@127.0.0.1:{port}/db"
        empty_fleet.env["DATABASE_URL"] = url
        done = empty_fleet.restore("--deadline", "0.5")
        assert done.returncode == 4
        assert re.search(rf"PostgreSQL at 127.0.0.1:{port}/db did not answer within 0\.[0-5] s", done.stderr), done


@pytest.mark.parametrize("company", ["999", "../x", "", "962302\n", "\x1b]0;x\x07"])
def test_a_company_that_the_database_does_not_have_is_named_and_none_is_restored(fleet: Fleet, company: str) -> None:
    fleet.refused(5, f"the database has no company {company!a}", "--company", company)


def test_an_unknown_company_beside_a_known_one_refuses_both(fleet: Fleet) -> None:
    fleet.refused(5, "the database has no company '999'", "--company", FIRST, "--company", "999")


def test_a_company_that_is_asked_for_twice_is_restored_once_and_no_other_is(fleet: Fleet) -> None:
    done = fleet.restored("--company", FIRST, "--company", FIRST, "--source", "database")
    assert results(done) == {FIRST: "restored"}
    assert fleet.companies() == [f"company_{FIRST}"]


def test_a_source_that_does_not_exist_is_a_usage_error(fleet: Fleet) -> None:
    fleet.refused(2, "'tape' is not one of 'auto', 'database'", "--source", "tape")


def test_rows_whose_company_id_could_leave_the_folder_are_refused_and_the_others_are_restored(fleet: Fleet) -> None:
    bad = ["../../etc/x", "..", "a/b", "\x1b[31mred", "x" * 51]
    for company in bad:
        fleet.copy_company(company, keys=False)
    before = {path.name for path in fleet.place.iterdir()}
    done = fleet.restore("--json")
    assert done.returncode == 6
    assert results(done) == {**{ascii(b): "refused" for b in bad}, FIRST: "restored", SECOND: "restored"}
    assert "its id is not a company id" in done.json()["error"]["message"]
    assert fleet.companies() == [f"company_{FIRST}", f"company_{SECOND}"]
    assert {path.name for path in fleet.place.iterdir()} - {"state"} == {*before, "sessions"}


def test_a_path_that_is_a_row_and_is_asked_for_is_refused(fleet: Fleet) -> None:
    fleet.copy_company("../x")
    fleet.refused(5, "'../x': its id is not a company id and could leave the folder", "--company", "../x")


def test_two_ids_for_one_folder_are_both_refused_and_named(fleet: Fleet) -> None:
    fleet.copy_company(f"company_{FIRST}", of=SECOND)
    done = fleet.restore("--json")
    assert done.returncode == 6
    assert results(done) == {FIRST: "refused", f"company_{FIRST}": "refused", SECOND: "restored"}
    sentence = f"the companies {FIRST} and company_{FIRST} would share the folder company_{FIRST}"
    assert {rows_of(done)[company]["reason"] for company in (FIRST, f"company_{FIRST}")} == {sentence}
    assert fleet.companies() == [f"company_{SECOND}"]


def test_one_of_two_ids_for_one_folder_is_refused_where_only_it_is_asked_for(fleet: Fleet) -> None:
    fleet.copy_company(f"company_{FIRST}", of=SECOND)
    fleet.refused(5, f"{FIRST} and company_{FIRST} would share the folder", "--company", FIRST)


def test_keys_without_credentials_are_a_warning_and_damage_where_they_are_asked_for(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [SECOND])
    fleet.refused(4, f"{SECOND}: it has {KEYS} keys and no credentials", "--company", SECOND)
    document = fleet.restored()
    assert results(document) == {FIRST: "restored"}
    assert f"company {SECOND} is left out: it has {KEYS} keys and no credentials" in document["warnings"]


SPOILT = {
    "noise": ("creds #- '{noiseKey}'", "noiseKey"),
    "short": (
        """jsonb_set(creds, '{signedIdentityKey,private}', '{"type": "Buffer", "data": "AAAA"}')""",
        "signedIdent",
    ),
    "unsigned": (
        "jsonb_set(creds, '{signedPreKey,signature}', creds #> '{signedPreKey,keyPair,public}')",
        "signedPreK",
    ),
    "null": ("'null'", "creds"),
    "list": ("'[1, 2]'", "creds"),
    "number": ("'1e400'", "creds"),
    "empty": ("'{}'", "noiseKey"),
}


def test_credentials_that_cannot_log_in_keep_their_company_back_and_no_other(fleet: Fleet) -> None:
    for company, (creds, _) in SPOILT.items():
        fleet.copy_company(company, keys=False)
        fleet.database.execute(f"UPDATE whatsapp_auth SET creds = {creds} WHERE company_id = '{company}'")
    done = fleet.restore("--json")
    assert done.returncode == 6
    assert results(done) == {FIRST: "restored", SECOND: "restored", **dict.fromkeys(SPOILT, "damaged")}
    rows = rows_of(done)
    for company, (_, reason) in SPOILT.items():
        assert rows[company]["reason"].startswith("its credentials cannot log in: ")
        assert reason in rows[company]["reason"]
    assert fleet.companies() == [f"company_{FIRST}", f"company_{SECOND}"]


def test_credentials_that_cannot_log_in_are_published_where_that_is_accepted(fleet: Fleet) -> None:
    fleet.database.execute(f"UPDATE whatsapp_auth SET creds = creds #- '{{noiseKey}}' WHERE company_id = '{SECOND}'")
    fleet.refused(4, f"{SECOND}: its credentials cannot log in: ", "--company", SECOND)
    document = fleet.restored("--accept-damaged")
    assert results(document) == {FIRST: "restored", SECOND: "restored"}
    assert any(warning.startswith(f"{SECOND}: ") and "noiseKey" in warning for warning in document["warnings"])
    assert fleet.folder(SECOND).is_dir()


def settings_of(fleet: Fleet) -> dict[str, Any]:
    return {name: value for name, value in fleet.env.items() if name != "DATABASE_URL"}


@pytest.mark.parametrize("line", ["DATABASE_URL='open", 'DATABASE_URL="open'])
def test_a_settings_file_with_an_open_quote_is_named_without_its_value(empty_fleet: Fleet, line: str) -> None:
    empty_fleet.secrets.add(PASSWORD)
    settings = empty_fleet.place / "settings.env"
    settings.write_text(f"APP_DIR=/\n{line}{PASSWORD}\n")
    empty_fleet.env = settings_of(empty_fleet)
    empty_fleet.refused(3, f"DATABASE_URL in line 2 of {settings} cannot be read", "--env-file", settings)
