"""Rows that somebody else wrote: they cannot leave the target or disturb the terminal, and none is lost in silence."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.fleet import FIRST, KEYS, Fleet, contents, rows_of

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = ".opsctl-manifest.json"


@pytest.fixture
def fleet(empty_fleet: Fleet) -> Fleet:
    """One company."""
    empty_fleet.seed(companies=1)
    return empty_fleet


def file_name(key_type: str, key_id: str) -> str:
    """What Baileys looks for."""
    return f"{key_type}-{key_id}.json".replace("/", "__").replace(":", "-")


def files(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
    return found


HOSTILE = [
    "../../../../escaped", "..", ".", "/etc/cron.d/x", "a/../../b", "x\\..\\y", "line\nbreak\r\n", "tab\there\v\f\b",
    "\\", "\\n", "\\N", "\\.", "'quote\" `id` $(id) ; rm -rf *", "-rf", "--help", "%s%n{0}", " ", "",
    "\x1b]0;pwned\x07\x1b[2J\x1b[31mred", "\x9b31mred", "[bold red]x[/] [/x] [link=http://x]y[/link]", ":smile:",
    "\u202egnp.exe\u2066\u200b\ufeff\u2028", "\x7f\x01\x1f", "emoji \U0001f4a9 z\u0301\u0302", "id.json.tmp", "x" * 200,
]  # fmt: skip


def test_hostile_names_become_the_files_that_baileys_looks_for_and_nothing_leaves_the_target(fleet: Fleet) -> None:
    for number, text in enumerate(HOSTILE):
        fleet.key("session", text, json.dumps({"_sessions": {}, "n": number}))
        fleet.key(f"{text}#", f"id{number}", json.dumps({"m": number}))
    outside = {path.name for path in fleet.place.iterdir()}
    done = fleet.restore("--verbose")
    assert done.returncode == 0, done
    assert {path.name for path in fleet.place.iterdir()} == {*outside, "sessions", "state"}
    assert fleet.companies() == [f"company_{FIRST}"]
    there = contents(fleet.folder())
    for number, text in enumerate(HOSTILE):
        assert json.loads(there[file_name("session", text)]) == {"_sessions": {}, "n": number}
        assert json.loads(there[file_name(f"{text}#", f"id{number}")]) == {"m": number}
    assert len(there) == KEYS + 2 * len(HOSTILE) + 2
    told = files(fleet.folder())
    assert {(f["type"], f["id"]) for f in told.values()} >= {("session", text) for text in HOSTILE}


def test_a_hostile_name_is_shown_as_escapes_and_never_as_markup(fleet: Fleet) -> None:
    shown = "\x1b]0;pwned\x07[bold]\u202e"
    fleet.key("session", shown, "5")
    fleet.key(shown, "x" * 250, "{}")
    fleet.copy_company(shown)
    text = fleet.restore("--verbose")
    assert text.returncode == 6
    assert "[bold]" in text.stdout
    assert "\\x1b]0;pwned\\x07[bold]\\u202e" in text.stderr
    assert "1 companies are missing" in text.stderr
    listed = fleet.listing("--verbose")
    assert "\\x1b]0;pwned\\x07[bold]\\u202e" in listed.stdout.replace("\n", "")
    fleet.listing("--json").json()


def test_of_rows_that_want_one_file_the_newer_wins_and_the_other_is_listed(fleet: Fleet) -> None:
    pairs = [
        (("session", "a:b"), ("session", "a-b")),
        (("app-state-sync-key", "x/y"), ("app-state-sync-key", "x__y")),
        (("sender-key", "memory-X"), ("sender-key-memory", "X")),
        (("tctoken", "p:q"), ("tctoken", "p-q")),
    ]
    for number, (one, other) in enumerate(pairs):
        newer, older = (one, other) if number % 2 else (other, one)
        for key, word, at in sorted(
            [(newer, "newer", "2026-05-05 10:00:00.5+00"), (older, "older", "2026-05-05 10:00+00")]
        ):
            fleet.key(*key, json.dumps({"word": word}), at=at)
    document = fleet.restored()
    there = contents(fleet.folder())
    row = rows_of(document)[FIRST]
    left_out = {(key["key_type"], key["key_id"]) for key in row["left_out"]}
    assert left_out == {(one if number % 2 == 0 else other) for number, (one, other) in enumerate(pairs)}
    for number, (one, other) in enumerate(pairs):
        newer = one if number % 2 else other
        name = file_name(*newer)
        assert there[name] == b'{"word":"newer"}'
        assert (files(fleet.folder())[name]["type"], files(fleet.folder())[name]["id"]) == newer
    assert any("4 x left out, because it cannot be a file of its own" in warning for warning in document["warnings"])
    assert row["keys"] == KEYS + len(pairs)


def test_a_row_whose_name_cannot_be_a_file_is_left_out_and_listed(fleet: Fleet) -> None:
    longest = "x" * (255 - len("session-.json"))
    fleet.key("session", longest, '{"_sessions": {}}')
    fleet.key("session", longest + "x", '{"_sessions": {}}')
    fleet.key("session", "\u00e9" * 130, '{"_sessions": {}}')  # 260 bytes
    fleet.key("t" * 300, "1", "{}")
    fleet.key("session", "y" * 2_000, '{"_sessions": {}}')
    fleet.key(".opsctl", "manifest", "{}")
    row = rows_of(fleet.restored())[FIRST]
    assert {(key["key_type"], key["key_id"]) for key in row["left_out"]} == {
        ("session", longest + "x"),
        ("session", "\u00e9" * 130),
        ("t" * 300, "1"),
        ("session", "y" * 2_000),
        (".opsctl", "manifest"),
    }
    assert row["keys"] == KEYS + 1
    assert (fleet.folder() / f"session-{longest}.json").exists()


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


VALUES = {
    "null": "null",
    "number": "5",
    "string": '"a \\u001b]0;x\\u0007 string"',
    "boolean": "true",
    "list": "[1, 2]",
    "empty": "{}",
    "huge": json.dumps({"_sessions": {}, "x": "y" * 5_000_000}),
    "deep": deep(200),
    "deeper": deep(1_000),
    "deepest": deep(3_000),
    "63 bits": '{"_sessions": {}, "n": [9223372036854775807, -9223372036854775808, 18446744073709551615]}',
    "more bits": '{"_sessions": {}, "n": 18446744073709551617}',
    "many digits": '{"_sessions": {}, "n": 0.12345678901234567890123}',
    "no double": '{"_sessions": {}, "n": 1e400}',
    "buffer": '{"type": "Buffer", "data": [1, 2, 256]}',
    "not base64": '{"type": "Buffer", "data": "!!"}',
    "escapes": '{"_sessions": {}, "a\\\\b\\n\\"": "\\\\x \\u2028 \\ud83d\\ude00"}',
}
KEPT_AS_FOUND = {"deeper", "deepest", "no double"}
KEPT_BUT_FOR_SPACES = {"more bits", "many digits"}  # Python's JSON would lose the digits


def test_every_value_arrives_as_it_is_whatever_its_type_promised(fleet: Fleet) -> None:
    for name, value in VALUES.items():
        fleet.key("session", name, value)
    done = fleet.restore("--json")
    assert done.returncode == 0, done
    sql = "SELECT key_id, value::text FROM whatsapp_keys WHERE key_type = 'session' AND key_id = ANY(%s)"
    stored = dict(fleet.database.execute(sql, [list(VALUES)]))
    for name in VALUES:
        written = (fleet.folder() / f"session-{name}.json").read_text()
        if name in KEPT_AS_FOUND:
            assert written == stored[name]
        elif name in KEPT_BUT_FOR_SPACES:
            assert written == stored[name].replace(" ", "")
        else:
            assert written == json.dumps(json.loads(stored[name]), ensure_ascii=False, separators=(",", ":"))
    said = " ".join(done.json()["warnings"])
    for sentence in (
        "session: null instead of an object (session-null)",
        "session: a number instead of an object",
        "session: a string instead of an object",
        "session: JSON nested too deeply",
        "session: a number that would lose digits",
        "session: a Buffer object whose data are not bytes",
    ):
        assert sentence in said


def test_thousands_of_rotten_rows_are_a_few_warnings(fleet: Fleet) -> None:
    fleet.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value) SELECT %s, 'pre-key', 'p' || n, 'null'::jsonb "
        "FROM generate_series(1, 3000) AS n "
        "UNION ALL SELECT %s, 'type-' || n, 'x', '18446744073709551617'::jsonb FROM generate_series(1, 1000) AS n "
        "UNION ALL SELECT %s, 'session', repeat('x', 300) || n, '{}'::jsonb FROM generate_series(1, 3000) AS n",
        [FIRST, FIRST, FIRST],
    )
    document = fleet.restored()
    assert len(document["warnings"]) < 10
    assert any("3000 x pre-key: null instead of an object" in warning for warning in document["warnings"])
    assert any("1000 x unknown type: a number that would lose digits" in warning for warning in document["warnings"])
    assert any("3000 x left out" in warning for warning in document["warnings"])
    assert max(map(len, document["warnings"])) < 600
    assert len(os.listdir(fleet.folder())) == KEYS + 3000 + 1000 + 2
