"""The proof with the real thing: what Baileys made and PostgreSQL held is, restored, what Baileys goes on with."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.baileys.door import (
    VERSIONS,
    Fleet,
    Row,
    Version,
    converse,
    expected_files,
    load_fleet,
    make_fleet,
    new_creds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from tests.conftest import Database, RunOpsctl

MANIFEST = ".opsctl-manifest.json"
ONLY = "acme-berlin"  # stored as base64
STRINGIFIED = "company_962303"  # stored as plain JSON.stringify writes it, which Baileys 7 does not read
MIXED = "962302"
LONG_AGO = datetime(2026, 1, 31, 3, 4, 5, 678901, tzinfo=UTC)
JS_SAFE = 2**53 - 1


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"baileys-{version}")
def version(request: pytest.FixtureRequest) -> Version:
    version: Version = request.param
    return version


of_baileys_7 = pytest.mark.parametrize("version", [7], indirect=True, ids=["baileys-7"])
"""For what does not depend on the version: 7 has every type of key."""


@pytest.fixture(scope="module")
def made(version: Version, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fleet, Path]:
    """Three accounts of real Baileys, each in another stored form, and the folders that Baileys itself writes."""
    tmp = tmp_path_factory.mktemp("made")
    fleet = make_fleet(version, 3, "mixed", state=tmp / "state.json", folders=tmp / "folders", pre_keys=40)
    return fleet, tmp / "folders"


@pytest.fixture
def fleet(made: tuple[Fleet, Path]) -> Fleet:
    return made[0]


@pytest.fixture(scope="module")
def later(made: tuple[Fleet, Path], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The same fleet after one company has talked on: what the fleet holds of it is an old copy now."""
    fleet, folders = made
    state = tmp_path_factory.mktemp("later") / "state.json"
    assert converse(folders, fleet, companies=[ONLY], save_state=state).ok
    return load_fleet(state)


@dataclass
class Service:
    """A database with rows and a sessions folder, with opsctl between them."""

    database: Database
    folder: Path
    run_opsctl: RunOpsctl
    more_env: dict[str, str] = field(default_factory=dict)

    def opsctl(self, *args: str | Path, exit_code: int = 0) -> Any:
        """The JSON document of one command that must end with `exit_code`."""
        done = self.run_opsctl(*args, "--json", env=self.env)
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.json()

    @property
    def env(self) -> dict[str, str]:
        return {"DATABASE_URL": self.database.url, "OPSCTL_ENVIRONMENT": "rehearsal", **self.more_env}

    def restore(self, *flags: str, to: Path | None = None, exit_code: int = 0) -> Any:
        return self.opsctl("sessions", "restore", "--to", to or self.folder, *flags, exit_code=exit_code)

    def verify(self, *flags: str, folder: Path | None = None, exit_code: int = 0) -> Any:
        return self.opsctl("sessions", "verify", folder or self.folder, *flags, exit_code=exit_code)

    def undo(self) -> Any:
        return self.opsctl("sessions", "undo", "--to", self.folder, "--yes")

    def insert(self, rows: Iterable[Row], *, apart: timedelta = timedelta(milliseconds=1)) -> None:
        """Write rows as the service does, each so much later than the one before, and some without an expiry."""
        with self.database.connect() as connection, connection.cursor() as cursor:
            auth = b"COPY whatsapp_auth (company_id, creds, updated_at) FROM STDIN"
            keys = b"COPY whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at) FROM STDIN"
            listed = list(rows)
            with cursor.copy(auth) as copy:
                for row in listed:
                    if row.key_type is None:
                        copy.write_row((row.company_id, row.value, LONG_AGO))
            with cursor.copy(keys) as copy:
                for number, row in enumerate(listed):
                    if row.key_type is not None:
                        written = LONG_AGO + number * apart
                        expires = None if number % 3 else written + timedelta(days=7)
                        copy.write_row((row.company_id, row.key_type, row.key_id, row.value, written, expires))

    def give_everybody_the_keys_of(self, company_id: str) -> None:
        self.database.execute(
            "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value)"
            " SELECT auth.company_id, key_type, key_id, value FROM whatsapp_auth AS auth, whatsapp_keys AS keys"
            " WHERE keys.company_id = %(company_id)s AND auth.company_id <> %(company_id)s",
            {"company_id": company_id},
        )

    def clear(self) -> None:
        self.database.execute("TRUNCATE whatsapp_auth, whatsapp_keys")

    def printed(self) -> list[Row]:
        """Every row as PostgreSQL prints it."""
        auth = "SELECT company_id, NULL, NULL, creds::text FROM whatsapp_auth"
        keys = "SELECT company_id, key_type, key_id, value::text FROM whatsapp_keys"
        return [Row(*found) for found in self.database.execute(f"{auth} UNION ALL {keys}")]


@pytest.fixture
def service(database: Database, run_opsctl: RunOpsctl, tmp_path: Path) -> Service:
    return Service(database, tmp_path / "sessions", run_opsctl)


def folder_of(root: Path, company_id: str) -> Path:
    return root / (company_id if company_id.startswith("company_") else f"company_{company_id}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; those of `.opsctl/` are opsctl's own."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".opsctl/")}


def without_manifests(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith(MANIFEST)}


def digests_of(root: Path, company_ids: Iterable[str]) -> dict[tuple[str, str], str]:
    return {
        (company_id, name): hashlib.sha256(data).hexdigest()
        for company_id in company_ids
        for name, data in files_of(folder_of(root, company_id)).items()
        if name != MANIFEST
    }


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_bytes())


def row_of(document: Any, company_id: str) -> Any:
    (row,) = (row for row in document["rows"] if row["company"] == company_id)
    return row


def of_company(rows: Iterable[Row], company_id: str) -> list[Row]:
    return [row for row in rows if row.company_id == company_id]


def form_of(printed: str) -> str:
    """The stored form of a value as PostgreSQL prints it, where keys are sorted by length."""
    signs = {
        "json-stringify": r'"data": \[',
        "base64": r'"data": "[^"]*", "type": "Buffer"',
        "uint8array": r'\{"0": [0-9]',
    }
    seen = [form for form, sign in signs.items() if re.search(sign, printed)]
    return (seen or ["none"])[0] if len(seen) < 2 else "mixed"


# 1 and 2: a copy that was taken after the stop


def test_a_fresh_copy_of_each_stored_form_loads_and_continues_every_conversation(
    service: Service, fleet: Fleet
) -> None:
    service.insert(fleet.rows)
    document = service.restore("--service-stopped")
    assert {row["company"]: (row["result"], row["copy"], row["warnings"]) for row in document["rows"]} == {
        company_id: ("restored", "fresh", []) for company_id in fleet.company_ids
    }
    report = converse(service.folder, fleet)
    assert report.ok, report
    assert {company.company_id for company in report.companies} == set(fleet.company_ids)
    assert all(company.outcomes() == {"continued"} for company in report.companies)


def test_after_a_cleanup_of_keys_every_conversation_goes_on_with_what_is_left(service: Service, fleet: Fleet) -> None:
    service.insert(fleet.rows)  # long ago, a third of them with an expiry
    cleaned = service.opsctl("keys", "cleanup", "--yes")
    assert {row["key_type"] for row in cleaned["rows"]} >= {"session"}
    assert cleaned["facts"]["deleted"] > 0
    service.restore("--service-stopped")
    report = converse(service.folder, fleet, may_heal=True)
    assert report.ok, report
    assert {outcome for company in report.companies for outcome in company.outcomes()} == {"continued", "healed"}


def test_a_fresh_copy_equals_to_the_byte_what_baileys_would_have_written(service: Service, fleet: Fleet) -> None:
    service.insert(fleet.rows)
    service.restore("--service-stopped")
    assert digests_of(service.folder, fleet.company_ids) == expected_files(service.printed())
    assert {path.name for path in service.folder.iterdir()} == {
        ".opsctl",
        *(folder_of(service.folder, company_id).name for company_id in fleet.company_ids),
    }


@of_baileys_7
def test_two_restores_of_the_same_rows_give_the_same_files(service: Service, fleet: Fleet, tmp_path: Path) -> None:
    service.insert(fleet.rows)
    service.restore("--service-stopped")
    service.restore("--service-stopped", to=tmp_path / "again")
    assert without_manifests(files_of(tmp_path / "again")) == without_manifests(files_of(service.folder))
    before = files_of(service.folder)
    again = service.restore("--service-stopped")
    assert {row["result"] for row in again["rows"]} == {"unchanged"}
    assert files_of(service.folder) == before


@of_baileys_7
def test_the_manifest_tells_of_every_file_which_row_it_was_and_of_the_copy_where_it_is_from(
    service: Service, fleet: Fleet
) -> None:
    service.insert(fleet.rows)
    document = service.restore("--service-stopped")
    creds = "SELECT 'creds', '', creds::text, updated_at::text, NULL FROM whatsapp_auth"
    keys = "SELECT key_type, key_id, value::text, updated_at::text, expires_at::text FROM whatsapp_keys"
    ((system_identifier,),) = service.database.execute("SELECT system_identifier::text FROM pg_control_system()")
    for company_id in fleet.company_ids:
        folder = folder_of(service.folder, company_id)
        manifest = manifest_of(folder)
        with service.database.connect(options="-c timezone=UTC") as connection:
            cursor = connection.execute(
                f"{creds} WHERE company_id = %(id)s UNION ALL {keys} WHERE company_id = %(id)s".encode(),
                {"id": company_id},
            )
            rows = {(key_type, key_id): tuple(rest) for key_type, key_id, *rest in cursor}
        entries = manifest["files"]
        told = {
            (entry["type"], entry["id"]): (entry["form"], entry["updated_at"], entry["expires_at"])
            for entry in entries.values()
        }
        assert told == {row: (form_of(text), *times) for row, (text, *times) in rows.items()}
        assert {name: entry["sha256"] for name, entry in entries.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in files_of(folder).items() if name != MANIFEST
        }
        me_id = json.loads((folder / "creds.json").read_bytes())["me"]["id"]
        assert {name: manifest[name] for name in ("company_id", "environment", "source", "service_stopped")} == {
            "company_id": company_id,
            "environment": "rehearsal",
            "source": "database",
            "service_stopped": "operator",
        }
        assert manifest["me_sha256"] == hashlib.sha256(me_id.encode()).hexdigest()
        assert manifest["system_identifier"] == system_identifier
        assert manifest["run_id"] == document["run_id"]
        assert me_id.partition(":")[0] not in json.dumps({**manifest, "files": {}})


@of_baileys_7
def test_pre_keys_beyond_the_counter_raise_it_in_a_fresh_copy(service: Service, fleet: Fleet) -> None:
    """The service saves creds and keys in separate statements: creds may be older than the last pre-keys."""
    creds, *keys = of_company(fleet.rows, ONLY)
    value = json.loads(creds.value)
    next_id = value["nextPreKeyId"]
    assert max(int(row.key_id or "") for row in keys if row.key_type == "pre-key") == next_id - 1
    older = value | {"nextPreKeyId": next_id - 5, "firstUnuploadedPreKeyId": next_id - 5}
    service.insert([Row(ONLY, None, None, json.dumps(older)), *keys])
    service.restore("--service-stopped")
    report = converse(service.folder, fleet, companies=[ONLY])
    assert report.ok, report


# 3: a copy of unknown age


def test_a_possibly_stale_copy_differs_only_in_its_raised_pre_key_ids_and_says_so(
    service: Service, fleet: Fleet
) -> None:
    service.insert(fleet.rows)
    done = service.run_opsctl("sessions", "restore", "--to", service.folder, env=service.env)
    assert done.returncode == 0, done.stderr
    assert "possibly stale" in done.stdout

    expected = expected_files(service.printed())
    found = digests_of(service.folder, fleet.company_ids)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {
        (id_, "creds.json") for id_ in fleet.company_ids
    }
    report = converse(service.folder, fleet, companies=[STRINGIFIED, MIXED], next_pre_key_raised=1000)
    assert report.ok, report
    assert all(company.outcomes() == {"continued"} for company in report.companies)
    assert manifest_of(folder_of(service.folder, ONLY))["service_stopped"] == "unknown"


@of_baileys_7
@pytest.mark.parametrize(
    ("flag", "cost"),
    [
        ((), "outgoing messages there may vanish silently; with --stale each chat's next incoming one is late"),
        (("--stale",), "their first incoming message will be late"),
    ],
    ids=["as-it-is", "stale"],
)
def test_a_possibly_stale_copy_names_the_chats_that_changed_of_late_and_what_each_choice_costs(
    service: Service, fleet: Fleet, flag: tuple[str, ...], cost: str
) -> None:
    service.insert(fleet.rows)
    recent = "UPDATE {} SET updated_at = now() - interval '{} minutes' WHERE company_id = %s AND key_type {} 'session'"
    service.database.execute(recent.format("whatsapp_keys", 20, "="), [MIXED])
    service.database.execute(recent.format("whatsapp_keys", 5, "<>"), [MIXED])
    two = "SELECT key_id FROM whatsapp_keys WHERE company_id = %s AND key_type = 'session' ORDER BY key_id LIMIT {}"
    for company_id, chats in ((MIXED, 2), (ONLY, 3)):
        service.database.execute(
            f"UPDATE whatsapp_keys SET updated_at = now() - interval '14 minutes' WHERE company_id = %s"
            f" AND key_type = 'session' AND key_id IN ({two.format(chats)})",
            [company_id, company_id],
        )
    done = service.run_opsctl("sessions", "restore", "--to", service.folder, *flag, env=service.env)
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stdout.splitlines() if "possibly stale, because" in line)
    assert f"5 chats of {ONLY}, {MIXED} changed in the 15 minutes before" in warning
    assert cost in warning
    document = service.restore(*flag, to=service.folder.with_name("as-json"))
    assert {row["company"]: row["busy_chats"] for row in document["rows"]} == {MIXED: 2, STRINGIFIED: 0, ONLY: 3}
    assert any(warning.removeprefix("warning: ") == said for said in document["warnings"])


def test_a_stale_copy_loses_messages_as_it_is_and_none_without_what_has_aged(
    service: Service, fleet: Fleet, later: Fleet, tmp_path: Path
) -> None:
    rows = of_company(fleet.rows, ONLY)
    service.insert(rows)
    service.restore()
    as_it_is = converse(service.folder, later, companies=[ONLY], may_heal=True)
    assert as_it_is.ok, as_it_is
    assert sum(conversation.lost for conversation in as_it_is.conversations) > 0

    document = service.restore("--stale", to=tmp_path / "stale")
    kept, whole = files_of(folder_of(tmp_path / "stale", ONLY)), files_of(folder_of(service.folder, ONLY))
    me = json.loads(whole["creds.json"])["me"]
    own = {me["id"].partition(":")[0], me["lid"].partition(":")[0]}
    aged = {
        name
        for name, entry in manifest_of(folder_of(service.folder, ONLY))["files"].items()
        if entry["type"] in {"session", "sender-key-memory"}
        or (entry["type"] == "sender-key" and entry["id"].split("::")[1].removesuffix("_1") in own)
    }
    assert {name.partition("-")[0] for name in aged} == {"session", "sender"}
    assert without_manifests(kept) == {
        name: data for name, data in without_manifests(whole).items() if name not in aged
    }
    assert row_of(document, ONLY)["dropped_keys"] == len(aged)
    manifest = manifest_of(folder_of(tmp_path / "stale", ONLY))
    assert manifest["stale_keys_dropped"] is True
    assert manifest["files"].keys() == without_manifests(kept).keys()
    assert [row["verdict"] for row in service.verify(folder=tmp_path / "stale")["rows"]] == ["will log in"]

    healed = converse(tmp_path / "stale", later, companies=[ONLY], may_heal=True)
    assert healed.ok, healed
    assert sum(conversation.lost for conversation in healed.conversations) == 0


# 4: rows that nobody has thought of


KNOWN_TYPES = (
    "app-state-sync-key",
    "app-state-sync-version",
    "device-list",
    "identity-key",
    "lid-mapping",
    "pre-key",
    "sender-key",
    "sender-key-memory",
    "session",
    "tctoken",
)


@dataclass(frozen=True)
class Bytes:
    """A byte field inside a value, and the form that it is stored in."""

    data: bytes
    form: str

    def stored(self) -> Any:
        match self.form:
            case "base64":
                return {"type": "Buffer", "data": base64.b64encode(self.data).decode()}
            case "json-stringify":
                return {"type": "Buffer", "data": list(self.data)}
            case _:
                return {str(index): byte for index, byte in enumerate(self.data)}

    def normal(self) -> Any:
        return {"type": "Buffer", "data": base64.b64encode(self.data).decode()}


def spelled(value: Any, spell: Callable[[Bytes], Any]) -> Any:
    """The value as JSON, with its byte fields spelled by `spell`."""
    if isinstance(value, Bytes):
        return spell(value)
    if isinstance(value, dict):
        return {name: spelled(item, spell) for name, item in value.items()}
    return [spelled(item, spell) for item in value] if isinstance(value, list) else value


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
# Names of byte objects and of arrays are those of bytes, which are made on purpose.
NAMES = TEXT.filter(lambda name: name not in {"type", "data", "buffer", "value"} and not name.isdecimal())
BYTES = st.builds(
    Bytes, st.binary(min_size=1, max_size=40), st.sampled_from(["base64", "json-stringify", "uint8array"])
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-JS_SAFE, JS_SAFE)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | BYTES
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
# Few letters, and those that file names change: so that ids meet, as these do in any case.
MEETING_KEYS = [
    *(("session", key_id) for key_id in ("a:b", "a-b", "a/b", "a__b", "a/_b", "a:/b", "a-__b")),
    *(("sender-key", "memory-x"), ("sender-key-memory", "x"), ("sender", "key-memory-x")),
    *(("tctoken", "ü" * 121), ("tctoken", "ü" * 121 + "a"), (".opsctl", "manifest")),
]
MEETING = st.text("ab/:_-.", max_size=4)
IDS = (
    MEETING
    | TEXT
    | st.sampled_from(["../../x", "..", "a::b::0", "b" * 260, "ä" * 130, "memory-a", "__index", "\x1b]0;x\x07"])
)
TYPES = st.sampled_from([*KNOWN_TYPES, "sender-key", "session"]) | MEETING | TEXT | st.just(".opsctl")
ROWS = st.dictionaries(st.tuples(TYPES, IDS), VALUES, min_size=15, max_size=35)


def as_javascript_reads_it(text: str | bytes) -> str:
    """Every number is a double; the order of names does not matter, and JSONB does not keep it. Nor -0."""
    number: Callable[[str], float] = lambda digits: float(digits) + 0.0  # noqa: E731 - a name for two arguments
    return json.dumps(json.loads(text, parse_int=number, parse_float=number), sort_keys=True)


def file_name(key_type: str, key_id: str) -> str:
    return f"{key_type}-{key_id}.json".replace("/", "__").replace(":", "-")


def is_a_file(name: str) -> bool:
    return len(name.encode()) <= 255 and name != MANIFEST


@pytest.fixture
def some_creds(fleet: Fleet) -> Row:
    return of_company(fleet.creds, ONLY)[0]


@of_baileys_7
@given(rows=ROWS, meeting=st.permutations(MEETING_KEYS), later_is_newer=st.booleans())
@settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
def test_any_row_is_in_the_file_that_its_name_says_or_is_listed_as_left_out(
    service: Service,
    some_creds: Row,
    rows: dict[tuple[str, str], Any],
    meeting: list[tuple[str, str]],
    later_is_newer: bool,
) -> None:
    rows = rows | {key: f"number {number}" for number, key in enumerate(meeting)}
    service.clear()
    shutil.rmtree(service.folder, ignore_errors=True)
    keys = [
        Row(ONLY, *key, json.dumps(spelled(value, Bytes.stored), ensure_ascii=False)) for key, value in rows.items()
    ]
    service.insert([some_creds, *keys], apart=timedelta(milliseconds=1 if later_is_newer else -1))

    document = service.restore("--service-stopped")
    by_age = list(rows if later_is_newer else reversed(rows))
    winners = {file_name(*key): key for key in by_age if is_a_file(file_name(*key))}
    folder = folder_of(service.folder, ONLY)
    found = files_of(folder)
    assert {name: as_javascript_reads_it(found[name]) for name in found.keys() - {MANIFEST, "creds.json"}} == {
        name: as_javascript_reads_it(json.dumps(spelled(rows[key], Bytes.normal))) for name, key in winners.items()
    }

    entries = manifest_of(folder)["files"]
    told = {name: (entry["type"], entry["id"]) for name, entry in entries.items()}
    assert told == {**winners, "creds.json": ("creds", "")}
    left_out = row_of(document, ONLY)["left_out"]
    assert sorted((row["key_type"], row["key_id"]) for row in left_out) == sorted(rows.keys() - set(winners.values()))
    assert all(row["reason"] for row in left_out)
    assert row_of(document, ONLY)["keys"] == len(winners)

    verified = service.verify("--against", "database", exit_code=1)  # such values are no keys of Baileys'
    assert row_of(verified, ONLY)["database"] == "equal"
    assert row_of(verified, ONLY)["manifest"] == "as restored"


# 5: rows that are wrong


def changed(value: Any, path: str, to: Any) -> Any:
    """A copy of a JSON value with another item at `path`, a.b.c; `to` is the item, or a function of the old one."""
    name, _, rest = path.partition(".")
    index: Any = int(name) if isinstance(value, list) else name
    copy = value.copy()
    copy[index] = changed(value[index], rest, to) if rest else to(value[index]) if callable(to) else to
    return copy


def without(value: Any, name: str) -> Any:
    return {key: item for key, item in value.items() if key != name}


def buffer(data: bytes) -> dict[str, str]:
    return {"type": "Buffer", "data": base64.b64encode(data).decode()}


def data_of(field: Any) -> bytes:
    return base64.b64decode(field["data"])


def shorter(field: Any) -> dict[str, str]:
    return buffer(data_of(field)[:-1])


def encoded_twice(field: Any) -> dict[str, str]:
    return buffer(base64.b64encode(data_of(field)))


def as_list(field: Any) -> dict[str, Any]:
    return {"type": "Buffer", "data": list(data_of(field))}


def as_digits(field: Any) -> dict[str, int]:
    return {str(index): byte for index, byte in enumerate(data_of(field))}


def another(field: Any) -> dict[str, str]:
    """The same number of other bytes."""
    data = data_of(field)
    return buffer(bytes([data[0] ^ 8]) + data[1:])


NO_KEYS = {  # (type, id): a value that is not what the type promises, and what is said of it
    ("pre-key", "900"): ({"private": buffer(bytes(32))}, "public is missing"),
    ("pre-key", "901"): ({"private": buffer(bytes(31)), "public": buffer(bytes(32))}, "31 bytes instead of 32"),
    ("pre-key", "902"): ({"private": {"type": "Buffer", "data": [256]}, "public": None}, "data are not bytes"),
    ("session", "900.0"): ("a string", "a string instead of an object"),
    ("session", "901.0"): ({"version": "v1"}, "without _sessions"),
    ("sender-key", "900@g.us::1::0"): (7, "a number instead of an array or bytes"),
    ("sender-key-memory", "900@g.us"): ({"1@s.whatsapp.net": 1}, "more than booleans"),
    ("app-state-sync-key", "AAAA/+A="): ({}, "keyData is missing"),
    ("app-state-sync-version", "regular"): (
        {"version": 1, "hash": buffer(bytes(127)), "indexValueMap": {}},
        "127 bytes instead of 128",
    ),
    ("identity-key", "900.0"): (buffer(bytes(32)), "32 bytes instead of 33"),
    ("lid-mapping", "900"): (None, "null instead of a string"),
    ("device-list", "900"): ({"0": "5"}, "an object instead of an array"),
    ("tctoken", "900@lid"): ({"timestamp": "1"}, "token is missing"),
}


@of_baileys_7
def test_a_value_that_is_not_what_its_type_promises_is_written_as_it_is_and_warned_of(
    service: Service, fleet: Fleet
) -> None:
    service.insert(of_company(fleet.rows, ONLY))
    service.insert([Row(ONLY, *key, json.dumps(value)) for key, (value, _) in NO_KEYS.items()])
    row = row_of(service.restore("--service-stopped"), ONLY)
    assert row["result"] == "restored"
    for (key_type, key_id), (value, said) in NO_KEYS.items():
        name = file_name(key_type, key_id)
        assert json.loads((folder_of(service.folder, ONLY) / name).read_bytes()) == value
        stem = name.removesuffix(".json")
        assert [w for w in row["warnings"] if w.startswith(f"{key_type}: ") and said in w and stem in w], (name, row)


ODD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {  # by company: a field of its creds, and what is said of it
    "no-data": ({"routingInfo": {"type": "Buffer"}}, "a Buffer object whose data are not bytes"),
    "not-bytes": ({"routingInfo": {"type": "Buffer", "data": [8, 256]}}, "a Buffer object whose data are not bytes"),
    "many-digits": ({"more": 18446744073709551617}, "a number that would lose digits"),
}


@of_baileys_7
def test_one_field_of_the_creds_that_cannot_be_rewritten_keeps_no_other_from_being_read(
    service: Service, fleet: Fleet
) -> None:
    creds = creds_of(fleet, STRINGIFIED)
    assert isinstance(creds["noiseKey"]["private"]["data"], list)
    for company, (odd, _) in ODD_FIELDS.items():
        service.insert([Row(company, None, None, json.dumps(creds | odd))])
    restored = service.restore("--service-stopped")
    verified = service.verify("--against", "database")
    for company, (odd, said) in ODD_FIELDS.items():
        assert f"creds: {said}" in row_of(restored, company)["warnings"]
        row = row_of(verified, company)
        assert (row["verdict"], row["problems"], row["database"]) == ("will log in", [], "equal")
        assert f"creds.json: {said}" in row["warnings"]
        written = json.loads((folder_of(service.folder, company) / "creds.json").read_bytes())
        assert data_of(written["noiseKey"]["private"]) == bytes(creds["noiseKey"]["private"]["data"])
        assert {name: written[name] for name in odd} == odd


@of_baileys_7
def test_keys_that_do_not_fit_the_creds_are_warned_of_when_restored_and_when_verified(
    service: Service, fleet: Fleet
) -> None:
    rows = of_company(fleet.rows, ONLY)
    app_state_key = creds_of(fleet)["myAppStateKeyId"]
    reverse = next(row for row in rows if row.key_type == "lid-mapping" and str(row.key_id).endswith("_reverse"))
    service.insert(
        row
        for row in rows
        if row is not reverse and (row.key_type, row.key_id) != ("app-state-sync-key", app_state_key)
    )
    service.insert([Row(ONLY, "sender-key", "900@g.us::1::0", "[]"), Row(ONLY, "sender-key", "901@g.us::1::0", "[]")])
    restored = row_of(service.restore("--service-stopped"), ONLY)
    verified = row_of(service.verify(), ONLY)
    assert verified["verdict"] == "will log in"
    for said in (
        "myAppStateKeyId names an app-state-sync-key that is not there",
        "lid-mapping is not made of pairs: ",
        "sender-keys in both encodings",
    ):
        for answer in (restored, verified):
            assert [warning for warning in answer["warnings"] if said in warning], (said, answer)


@of_baileys_7
def test_a_sessions_folder_may_be_called_like_a_companys(service: Service, fleet: Fleet, tmp_path: Path) -> None:
    service.insert(fleet.rows)
    folder = tmp_path / "company_sessions"
    service.restore("--service-stopped", to=folder)
    assert {row["company"] for row in service.verify(folder=folder)["rows"]} == set(fleet.company_ids)
    alone = service.verify("--company", ONLY, folder=folder)
    assert [row["company"] for row in alone["rows"]] == [ONLY]
    one = folder_of(folder, ONLY)
    assert [row["company"] for row in service.verify("--company", ONLY, folder=one)["rows"]] == [ONLY]
    other = service.verify("--company", MIXED, folder=one, exit_code=5)
    assert other["error"]["kind"] == "unknown-company"
    assert f"company_{MIXED}" in other["error"]["message"]
    assert service.verify("--company", "nobody", folder=folder, exit_code=5)["error"]["kind"] == "unknown-company"
    for file in one.iterdir():
        file.unlink()
    assert "creds.json is missing" in service.verify(folder=one, exit_code=1)["error"]["message"]


@of_baileys_7
def test_what_was_encoded_twice_is_warned_of_and_not_converted(service: Service, fleet: Fleet) -> None:
    rows = of_company(fleet.rows, ONLY)
    victim = next(row for row in rows if row.key_type == "pre-key")
    twice = changed(json.loads(victim.value), "private", encoded_twice)
    service.insert(row if row is not victim else Row(ONLY, "pre-key", row.key_id, json.dumps(twice)) for row in rows)
    row = row_of(service.restore("--service-stopped"), ONLY)
    (warning,) = row["warnings"]
    assert "encoded twice" in warning
    assert f"pre-key-{victim.key_id}" in warning
    assert json.loads((folder_of(service.folder, ONLY) / f"pre-key-{victim.key_id}.json").read_bytes()) == twice


UNUSABLE: dict[str, tuple[Callable[[Any], Any], str]] = {  # by company: what was done to its creds, and what is said
    "torn": (lambda creds: {"noiseKey": creds["noiseKey"]}, "signedIdentityKey.private is missing or holds no bytes"),
    "not-an-object": (lambda creds: [creds], "creds are not a JSON object"),
    "null": (lambda creds: None, "creds are not a JSON object"),
    "json-in-a-string": (json.dumps, "creds are not a JSON object"),
    "no-adv-secret": (lambda creds: without(creds, "advSecretKey"), "advSecretKey is missing or holds no bytes"),
    "noise-key-short": (
        lambda creds: changed(creds, "noiseKey.private", shorter),
        "noiseKey.private has 31 bytes instead of 32",
    ),
    "signature-short": (
        lambda creds: changed(creds, "signedPreKey.signature", shorter),
        "signedPreKey.signature has 63 bytes instead of 64",
    ),
    "adv-secret-short": (
        lambda creds: changed(creds, "advSecretKey", base64.b64encode(bytes(31)).decode()),
        "advSecretKey has 31 bytes instead of 32",
    ),
    "account-short": (
        lambda creds: changed(creds, "account.deviceSignature", base64.b64encode(bytes(63)).decode()),
        "account.deviceSignature has 63 bytes instead of 64",
    ),
    "identifier-short": (
        lambda creds: changed(creds, "signalIdentities.0.identifierKey", shorter),
        "signalIdentities[].identifierKey has 32 bytes instead of 33",
    ),
    "noise-key-twice": (
        lambda creds: changed(creds, "noiseKey.public", encoded_twice),
        "noiseKey.public is encoded twice",
    ),
    "noise-pair": (
        lambda creds: changed(creds, "noiseKey.public", another),
        "noiseKey.public is not the public key of noiseKey.private",
    ),
    "identity-pair": (
        lambda creds: changed(creds, "signedIdentityKey.private", another),
        "signedIdentityKey.public is not the public key of signedIdentityKey.private",
    ),
    "signed-pre-key-pair": (
        lambda creds: changed(creds, "signedPreKey.keyPair.public", another),
        "signedPreKey.keyPair.public is not the public key of signedPreKey.keyPair.private",
    ),
    "signature": (
        lambda creds: changed(creds, "signedPreKey.signature", another),
        "signedPreKey.signature is not one of signedIdentityKey",
    ),
    "other-signed-pre-key": (
        lambda creds: changed(creds, "signedPreKey.keyPair", creds["noiseKey"]),
        "signedPreKey.signature is not one of signedIdentityKey",
    ),
}


def creds_of(fleet: Fleet, company_id: str = ONLY) -> Any:
    (creds,) = of_company(fleet.creds, company_id)
    return json.loads(creds.value)


@of_baileys_7
def test_a_company_whose_creds_cannot_log_in_is_not_published_unless_it_is_asked_for(
    service: Service, fleet: Fleet
) -> None:
    service.insert(of_company(fleet.rows, ONLY))
    creds = creds_of(fleet)
    service.insert(Row(company, None, None, json.dumps(spoil(creds))) for company, (spoil, _) in UNUSABLE.items())
    document = service.restore("--service-stopped", exit_code=6)
    results = {row["company"]: (row["result"], row["reason"]) for row in document["rows"]}
    assert results.pop(ONLY) == ("restored", None)
    assert {company: result for company, (result, _) in results.items()} == dict.fromkeys(UNUSABLE, "damaged")
    for company, (_, said) in UNUSABLE.items():
        assert said in results[company][1]
    assert {path.name for path in service.folder.glob("company_*")} == {f"company_{ONLY}"}
    assert document["error"]["kind"] == "half-done"

    alone = service.restore("--service-stopped", "--company", "torn", exit_code=4)
    assert alone["error"]["kind"] == "damaged-source"
    assert "torn: its credentials cannot log in" in alone["error"]["message"]

    accepted = service.restore("--service-stopped", "--accept-damaged")
    assert {row["company"] for row in accepted["rows"]} == {ONLY, *UNUSABLE}
    for company, (_, said) in UNUSABLE.items():
        assert any(said in warning for warning in row_of(accepted, company)["warnings"])
        assert any(warning.startswith(f"{company}: ") for warning in accepted["warnings"])
    expected = expected_files(row for row in service.printed() if row.key_type is None)
    found = digests_of(service.folder, [ONLY, *UNUSABLE])
    assert {name: digest for name, digest in found.items() if name[1] == "creds.json"} == expected


@of_baileys_7
def test_an_abandoned_pairing_is_published_with_a_warning(service: Service, fleet: Fleet) -> None:
    creds = without(without(creds_of(fleet), "account"), "signalIdentities")
    service.insert([Row("abandoned", None, None, json.dumps(creds))])
    document = service.restore("--service-stopped")
    assert row_of(document, "abandoned")["result"] == "restored"
    assert "abandoned: creds: abandoned pairing: will ask for a QR code" in document["warnings"]
    verified = service.verify(exit_code=1)
    assert row_of(verified, "abandoned")["verdict"] == "will NOT log in"


# 6: will it log in?


def test_restored_folders_and_those_of_baileys_itself_are_found_to_log_in(
    service: Service, made: tuple[Fleet, Path], tmp_path: Path
) -> None:
    fleet, folders = made
    service.insert(fleet.rows)
    service.restore("--service-stopped")
    service.restore(to=tmp_path / "possibly-stale")
    for root in (service.folder, tmp_path / "possibly-stale", folders):
        verified = service.verify(folder=root)
        assert {row["company"]: row["verdict"] for row in verified["rows"]} == {
            id_.removeprefix("company_") if root == folders else id_: "will log in" for id_ in fleet.company_ids
        }
        assert all(row["problems"] == [] for row in verified["rows"])
        said = {warning for row in verified["rows"] for warning in row["warnings"]}
        assert all("other users may" in warning for warning in said) if root == folders else said == set()


@of_baileys_7
def test_folders_are_equal_to_their_database_until_either_changes(
    service: Service, fleet: Fleet, tmp_path: Path
) -> None:
    service.insert(fleet.rows)
    service.restore("--service-stopped")
    service.restore(to=tmp_path / "raised")
    for root in (service.folder, tmp_path / "raised"):
        verified = service.verify("--against", "database", folder=root)
        assert {row["company"]: row["database"] for row in verified["rows"]} == dict.fromkeys(
            fleet.company_ids, "equal"
        )

    service.database.execute(
        "UPDATE whatsapp_keys SET value = value || '{\"more\": 1}' WHERE company_id = %s AND key_type = 'session'"
        " AND key_id = (SELECT min(key_id) FROM whatsapp_keys WHERE company_id = %s AND key_type = 'session')",
        [MIXED, MIXED],
    )
    service.database.execute(
        "DELETE FROM whatsapp_keys WHERE company_id = %s AND key_type = 'pre-key' AND key_id = '11'", [STRINGIFIED]
    )
    service.database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value) VALUES (%s, 'device-list', '1', '[\"0\"]')",
        [STRINGIFIED],
    )
    service.database.execute(
        "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{accountSyncCounter}', '2') WHERE company_id = %s", [ONLY]
    )
    verified = service.verify("--against", "database", exit_code=1)
    assert {row["company"]: (row["verdict"], row["database"]) for row in verified["rows"]} == {
        MIXED: ("will log in", "1 differ"),
        STRINGIFIED: ("will log in", "1 only there, 1 only here"),
        ONLY: ("will log in", "1 differ"),
    }
    assert verified["error"]["kind"] == "differs-from-database"
    assert all(company_id in verified["error"]["message"] for company_id in fleet.company_ids)


def in_creds(spoil: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "creds.json"
        file.write_text(json.dumps(spoil(json.loads(file.read_bytes())), separators=(",", ":")))

    return damage


def in_key(pattern: str, spoil: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = min(folder.glob(pattern))
        file.write_text(json.dumps(spoil(json.loads(file.read_bytes())), separators=(",", ":")))

    return damage


def in_bytes(pattern: str, spoil: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = min(folder.glob(pattern))
        file.write_bytes(spoil(file.read_bytes()))

    return damage


def exchange_public_keys(folder: Path) -> None:
    one, two, *_ = sorted(folder.glob("pre-key-*"))
    first, second = json.loads(one.read_bytes()), json.loads(two.read_bytes())
    one.write_text(json.dumps(first | {"public": second["public"]}))
    two.write_text(json.dumps(second | {"public": first["public"]}))


def put_in_place(pattern: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = min(folder.glob(pattern))
        file.unlink()
        put(file)

    return damage


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


# By company: what was done to its folder, and what is said of it.
NOT_LOGGING_IN: dict[str, tuple[Callable[[Path], None], str]] = {
    "creds-truncated": (in_bytes("creds.json", half), "creds are not valid JSON"),
    "creds-cut-by-a-byte": (in_bytes("creds.json", lambda data: data[:-1]), "creds are not valid JSON"),
    "creds-emptied": (in_bytes("creds.json", lambda data: b""), "creds.json is empty"),
    "creds-of-zeros": (in_bytes("creds.json", lambda data: bytes(len(data))), "creds are not valid JSON"),
    "creds-written-over": (in_bytes("creds.json", lambda data: data + data[-40:]), "creds are not valid JSON"),
    "creds-deleted": (lambda folder: (folder / "creds.json").unlink(), "creds.json is missing"),
    "creds-a-folder": (put_in_place("creds.json", lambda file: file.mkdir()), "creds.json is missing"),
    "creds-a-link": (put_in_place("creds.json", lambda file: file.symlink_to("/dev/zero")), "creds.json is missing"),
    "creds-a-pipe": (put_in_place("creds.json", os.mkfifo), "creds.json is missing"),
    "creds-a-list": (in_creds(lambda creds: [creds]), "creds are not a JSON object"),
    "creds-stringified": (
        in_creds(lambda creds: changed(creds, "noiseKey.private", as_list)),
        "its bytes are stored as mixed",
    ),
    "creds-as-digits": (
        in_creds(lambda creds: changed(creds, "routingInfo", as_digits)),
        "its bytes are stored as mixed",
    ),
    "no-me": (in_creds(lambda creds: without(creds, "me")), "the pairing was never completed"),
    "no-me-id": (in_creds(lambda creds: changed(creds, "me", {"name": "x"})), "the pairing was never completed"),
    "no-account": (in_creds(lambda creds: without(creds, "account")), "the pairing was never completed"),
    "no-account-signature": (
        in_creds(lambda creds: changed(creds, "account", without(creds["account"], "accountSignature"))),
        "the pairing was never completed",
    ),
    **{
        f"its-{name}": (in_creds(spoil), said)
        for name, (spoil, said) in UNUSABLE.items()
        if name not in {"not-an-object", "json-in-a-string"}
    },
}
KEYS_DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pre-key-exchanged": (exchange_public_keys, "2 x pre-key: the public key is not its private key's"),
    "pre-key-truncated": (in_bytes("pre-key-*", half), "pre-key: not valid JSON"),
    "pre-key-emptied": (in_bytes("pre-key-*", lambda data: b""), "pre-key: not valid JSON"),
    "pre-key-short": (
        in_key("pre-key-*", lambda key: changed(key, "private", shorter)),
        "private has 31 bytes instead of 32",
    ),
    "pre-key-twice": (in_key("pre-key-*", lambda key: changed(key, "private", encoded_twice)), "is encoded twice"),
    "pre-key-stringified": (
        in_key("pre-key-*", lambda key: {half: as_list(key[half]) for half in key}),
        "bytes stored as json-stringify, which not every Baileys reads",
    ),
    "pre-key-as-digits": (
        in_key("pre-key-*", lambda key: {half: as_digits(key[half]) for half in key}),
        "bytes stored as uint8array, which not every Baileys reads",
    ),
    "session-truncated": (in_bytes("session-*", half), "session: not valid JSON"),
    "session-of-zeros": (in_bytes("session-*", lambda data: bytes(len(data))), "session: not valid JSON"),
    "session-not-utf-8": (in_bytes("session-*", lambda data: data[:-2] + b"\xff}"), "session: not valid JSON"),
    "session-without-sessions": (in_key("session-*", lambda session: {"version": "v1"}), "without _sessions"),
    "session-a-folder": (put_in_place("session-*", lambda file: file.mkdir()), "cannot be read"),
    "session-a-link": (put_in_place("session-*", lambda file: file.symlink_to("creds.json")), "cannot be read"),
    "sender-key-a-number": (in_key("sender-key-1*", lambda key: 7), "a number instead of an array or bytes"),
    "sender-key-not-json": (in_key("sender-key-1*", lambda key: buffer(b"torn")), "bytes that are no JSON array"),
    "memory-of-numbers": (in_key("sender-key-memory-*", lambda key: {"a": 1}), "more than booleans"),
    "sync-key-without-data": (
        in_key("app-state-sync-key-*", lambda key: without(key, "keyData")),
        "app-state-sync-key: keyData is missing",
    ),
    "sync-version-short": (
        in_key("app-state-sync-version-*", lambda version: changed(version, "hash", shorter)),
        "hash has 127 bytes instead of 128",
    ),
    "lid-mapping-null": (in_key("lid-mapping-*", lambda lid: None), "lid-mapping: null instead of a string"),
    "device-list-object": (in_key("device-list-*", lambda devices: {"0": "0"}), "an object instead of an array"),
    "tctoken-without-token": (
        in_key("tctoken-4*", lambda token: without(token, "token")),
        "tctoken: token is missing",
    ),
    "identity-key-short": (in_key("identity-key-*", shorter), "the key has 32 bytes instead of 33"),
}


WRITTEN_SINCE: dict[str, Callable[[Path], object]] = {  # what no check can tell from the work of the service
    "key-deleted": lambda folder: min(folder.glob("pre-key-*")).unlink(),
    "key-added": lambda folder: shutil.copy(min(folder.glob("device-list-4*")), folder / "device-list-1.json"),
}


@of_baileys_7
def test_every_kind_of_damage_to_a_folder_is_found_and_named_and_nothing_else(service: Service, fleet: Fleet) -> None:
    damages = NOT_LOGGING_IN | KEYS_DAMAGED
    creds, *keys = of_company(fleet.rows, ONLY)
    service.insert(Row(company, None, None, creds.value) for company in (ONLY, *damages, *WRITTEN_SINCE))
    service.insert(row for row in keys if row.key_type != "pre-key" or int(row.key_id or "") > 37)
    service.give_everybody_the_keys_of(ONLY)
    service.restore("--service-stopped")
    for company, (damage, _) in damages.items():
        damage(folder_of(service.folder, company))
    for company, write in WRITTEN_SINCE.items():
        write(folder_of(service.folder, company))

    document = service.verify(exit_code=1)
    verdicts = {row["company"]: row["verdict"] for row in document["rows"]}
    assert verdicts == {
        ONLY: "will log in",
        **dict.fromkeys(WRITTEN_SINCE, "will log in"),
        **dict.fromkeys(NOT_LOGGING_IN, "will NOT log in"),
        **dict.fromkeys(KEYS_DAMAGED, "logs in, keys damaged"),
    }
    assert (row_of(document, ONLY)["problems"], row_of(document, ONLY)["manifest"]) == ([], "as restored")
    for company in WRITTEN_SINCE:
        assert row_of(document, company)["manifest"] == "1 files written since"
    for company, (_, said) in damages.items():
        assert any(said in problem for problem in row_of(document, company)["problems"]), row_of(document, company)
        assert any(w.startswith(f"{company}: ") and said in w for w in document["warnings"]), company
    assert document["error"]["kind"] == "verification-failed"
    assert f"{len(damages)} of {len(document['rows'])} companies are not well" in document["error"]["message"]

    alone = service.verify(folder=folder_of(service.folder, "session-truncated"), exit_code=1)
    assert "session-truncated: session: not valid JSON" in alone["error"]["message"]
    assert service.verify(folder=folder_of(service.folder, ONLY))["error"] is None


# 7: back again


@of_baileys_7
def test_undo_brings_the_older_folder_back_to_the_byte_and_undone_again_the_newer(
    service: Service, fleet: Fleet, later: Fleet
) -> None:
    service.insert(of_company(fleet.rows, ONLY))
    service.restore("--service-stopped")
    older = files_of(service.folder)
    service.clear()
    service.insert(of_company(later.rows, ONLY))
    service.restore("--service-stopped")
    newer = files_of(service.folder)
    assert newer != older

    service.undo()
    assert files_of(service.folder) == older
    report = converse(service.folder, fleet, companies=[ONLY])
    assert report.ok, report
    service.undo()
    assert files_of(service.folder) == newer


# 8: from the standby


@pytest.fixture
def standby(service: Service, tmp_path: Path) -> Path:
    """Where the service's standby is; `service.env` names it."""
    service.more_env["STANDBY_DIR"] = str(tmp_path / "standby")
    return tmp_path / "standby"


def test_without_a_database_the_standby_continues_what_did_not_change_and_heals_what_did(
    service: Service, fleet: Fleet, later: Fleet, standby: Path, tmp_path: Path
) -> None:
    service.insert(fleet.rows)
    service.opsctl("standby", "sync")
    service.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [ONLY])
    service.database.execute("DELETE FROM whatsapp_keys WHERE company_id = %s", [ONLY])
    service.insert(of_company(later.rows, ONLY))  # which no sync saw
    service.more_env["DATABASE_URL"] = "postgresql://opsctl@127.0.0.1:1/gone"
    document = service.restore()
    found = {row["company"]: (row["result"], row["copy"]) for row in document["rows"]}
    assert found == dict.fromkeys(fleet.company_ids, ("restored", "possibly stale"))
    assert any("possibly stale, because what was written after them" in warning for warning in document["warnings"])
    report = converse(service.folder, fleet, companies=[STRINGIFIED, MIXED], next_pre_key_raised=1000)
    assert report.ok, report
    assert all(company.outcomes() == {"continued"} for company in report.companies)

    service.restore("--stale", to=tmp_path / "stale")
    healed = converse(tmp_path / "stale", later, companies=[ONLY], may_heal=True)
    assert healed.ok, healed
    assert sum(conversation.lost for conversation in healed.conversations) == 0


@of_baileys_7
def test_after_ten_syncs_of_a_disaster_the_standby_still_converses(
    service: Service, fleet: Fleet, standby: Path
) -> None:
    service.insert(fleet.rows)
    service.database.execute("UPDATE whatsapp_keys SET updated_at = now(), expires_at = now() + interval '7 days'")
    service.opsctl("standby", "sync")
    service.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [MIXED])
    service.database.execute("DELETE FROM whatsapp_keys WHERE company_id = %s", [MIXED])
    service.database.execute(
        "UPDATE whatsapp_auth SET updated_at = now(), creds = %s WHERE company_id = %s", [new_creds(7), STRINGIFIED]
    )
    service.database.execute("DELETE FROM whatsapp_keys WHERE key_type = 'session' AND company_id = %s", [ONLY])
    for _ in range(10):
        held = service.opsctl("standby", "sync", exit_code=1)
    assert {row["company"]: row["result"] for row in held["rows"]} == dict.fromkeys(fleet.company_ids, "held")
    service.restore("--source", "standby")
    report = converse(service.folder, fleet, next_pre_key_raised=1000)
    assert report.ok, report
    assert all(company.outcomes() == {"continued"} for company in report.companies)
