"""Every statement is one that PostgreSQL understands against the schema, is used, and says what it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

import opsctl
from opsctl.operations.fleet import seed_fleet
from opsctl.queries import query
from tests.conftest import each_postgres

if TYPE_CHECKING:
    from tests.conftest import Database

PACKAGE = Path(opsctl.__file__).parent
FILES = sorted((PACKAGE / "queries").glob("*.sql"))
NAMES = [path.stem for path in FILES]
EXECUTED = {
    "schema": "it makes the tables",
    "seed_auth": "COPY FROM",
    "seed_keys": "COPY FROM",
    "drill_read_only": "ALTER ROLE, executed by its drill",
    "drill_drop_tables": "DROP TABLE, executed by its drill",
    "leaks_forbid": "ALTER TABLE, executed by the search for leaks",
}
"""What EXPLAIN does not take; the tests execute it."""
VALUES: dict[str, object] = {
    "by_age_alone": False,
    "companies": ["x"],
    "creds": "{}",
    "cutoff": "2026-01-31",
    "first": "(0,0)",
    "kept": 1,
    "key_ids": ["x"],
    "key_types": ["x"],
    "kind": 1,
    "last": "(8,0)",
    "lines": ["{}"],
    "most": 1,
    "now": "2026-01-31",
    "number": 1,
    "own_senders": "{}",
    "part": 1,
    "patch": "{}",
    "patches": ["{}"],
    "places": "{}",
    "prune_below": "{}",
    "rows": "[]",
    "since": 1,
    "stays": [False],
    "types": ["x"],
    "updated_at": "2026-01-31",
    "value": "{}",
}
"""What a statement's parameters are read as, where it is no text."""


def body(name: str) -> str:
    """The statement without its comment; of a COPY, the query that it copies."""
    text = re.sub(r"\A(--.*\n)+", "", query(name)).strip()
    copied = re.fullmatch(r"COPY \((.*)\) TO STDOUT", text, re.DOTALL)
    return copied[1] if copied else text


@each_postgres
@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXECUTED])
def test_every_select_insert_update_delete_and_copy_is_explained_against_the_schema(
    database: Database, name: str
) -> None:
    values = {word: VALUES.get(word, "x") for word in re.findall(r"%\((\w+)\)s", query(name))}
    with database.connect(cursor_factory=psycopg.ClientCursor) as connection:
        plan = connection.execute(f"EXPLAIN {body(name)}".encode(), values).fetchall()
    assert plan


@each_postgres
def test_what_cannot_be_explained_is_executed(database: Database) -> None:
    database.execute("DROP TABLE whatsapp_auth, whatsapp_keys")
    with database.connect(autocommit=False) as connection:
        connection.execute(query("schema"))
        summary = seed_fleet(connection, companies=1, keys_per_company=40, seed=1, key_pair_pool=4)
    assert summary.keys == 40
    assert database.execute("SELECT count(*) FROM whatsapp_keys") == [(40,)]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_one_comment_on_top_and_one_statement(name: str) -> None:
    lines = query(name).splitlines()
    comment = [line for line in lines if line.startswith("--")]
    assert comment
    assert lines[: len(comment)] == comment
    assert "--" not in "\n".join(lines[len(comment) :])
    assert comment[-1].endswith(".")
    if name != "schema":
        assert ";" not in body(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_used(name: str) -> None:
    calls = [path.name for path in PACKAGE.rglob("*.py") if f'query("{name}")' in path.read_text()]
    assert calls, f"nobody calls query({name!r})"


def test_no_statement_is_written_elsewhere() -> None:
    """Apart from what steers a transaction, the schema's own tests, and the lines that a person is told to type."""
    pattern = re.compile(r"""["'](SELECT|INSERT|UPDATE|DELETE|COPY|WITH|EXPLAIN|CREATE|ALTER|DROP)\b""")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line) and "psql" not in line.lower()
    ]
    assert found == []
