"""Restore, any edits on both sides, failback: no key is lost, no ratchet goes back, a second one changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from opsctl import db
from opsctl.baileys.filenames import key_file_name
from opsctl.journal import Journal
from opsctl.operations.failback import FailbackWish, planned_failback
from opsctl.operations.three_way import Prefer, too_many_deleted
from opsctl.settings import load
from opsctl.stores.folder import entries_of, opened
from opsctl.stores.postgres import snapshot
from opsctl.stores.records import Origin, Record
from opsctl.stores.rewriting import Archiving
from opsctl.stores.staging import CompanyWriter, Order
from tests.integration.fleet import FIRST, Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.report import Report

COPIED_AT = "2026-01-31 03:00:00+00"
OLD_AT, PUBLISHED_AT, SINCE_AT = "2026-01-29 03:00:00+00", "2026-01-31 03:05:00+00", "2026-01-31 04:00:00+00"
TYPES = st.sampled_from(["session", "sender-key", "sender-key-memory", "pre-key", "device-list", "tctoken", "news"])
IDS = st.text("ab/:_-.1", min_size=1, max_size=5) | st.sampled_from(["a:b", "a-b", "a/b", "a__b", "1@g.us::2_1::0"])
EDITS = st.tuples(
    st.sampled_from(["untouched"] * 4 + ["written", "deleted", "torn"]),
    st.sampled_from(["untouched"] * 6 + ["gone", "old", "since"]),
)
NEW = st.sampled_from([("session", "77.0"), ("sender-key", "9-9@g.us::7_1::0"), ("app-state-sync-key", "A/+=")])

Key = tuple[str, str]
Edits = dict[Key, tuple[str, str]]


def value(word: str) -> dict[str, Any]:
    return {"v": word, "bytes": {"type": "Buffer", "data": [1, 2, 255]}}


def normal(word: str) -> dict[str, Any]:
    return {"bytes": {"type": "Buffer", "data": "AQL/"}, "v": word}


class Scene:
    """One company: its rows, the folder that was published from them, and both sides' edits."""

    def __init__(self, fleet: Fleet, creds: str) -> None:
        self.fleet = fleet
        self.creds = creds
        self.folder = fleet.folder()
        self.environment = load(environ={"DATABASE_URL": fleet.database.url})

    def begin(self, edits: Edits, *, rebuilt: bool) -> dict[Key, tuple[str, str]]:
        """Rows as they were copied, and the folder; gives the edits of those keys that became files."""
        self.fleet.database.execute("TRUNCATE whatsapp_auth, whatsapp_keys")
        self.row("creds", "", self.creds, COPIED_AT)
        shutil.rmtree(self.fleet.target, ignore_errors=True)
        self.folder.mkdir(parents=True, mode=0o700)
        ((server,),) = self.fleet.database.execute("SELECT system_identifier::text FROM pg_control_system()")
        ((timeline,),) = self.fleet.database.execute("SELECT timeline_id FROM pg_control_checkpoint()")
        origin = Origin(
            FIRST, "R", "production", "database", PUBLISHED_AT, "1" if rebuilt else server, timeline, None, "operator",
            stale_keys_dropped=False, opsctl="0",
        )  # fmt: skip
        with opened(self.folder) as fd:
            order = Order(self.folder.name, self.creds.encode(), COPIED_AT, origin, COPIED_AT, True, False)
            writer = CompanyWriter(order, fd)
            for key in edits:
                writer.add(Record(*key, json.dumps(value("copied")).encode(), COPIED_AT, None))
            writer.finish()
            published = {(e.key_type, e.key_id) for _, e in entries_of(fd)}
        for key in edits:
            self.row(*key, json.dumps(value("copied")), COPIED_AT)
        return {key: edit for key, edit in edits.items() if key in published}

    def row(self, key_type: str, key_id: str, text: str, at: str) -> None:
        if key_type == "creds":
            self.fleet.database.execute(
                "INSERT INTO whatsapp_auth (company_id, creds, updated_at) VALUES (%s, %s, %s)", [FIRST, text, at]
            )
        else:
            self.fleet.key(key_type, key_id, text, at=at)

    def edit(self, files: Edits, edits: Edits, new: set[Key], *, emptied: bool) -> None:
        for (key_type, key_id), (on_folder, _) in files.items():
            path = self.folder / key_file_name(key_type, key_id)
            if on_folder == "written":
                path.write_text(json.dumps(normal("written")))
            elif on_folder == "deleted":
                path.unlink()
            elif on_folder == "torn":
                path.write_bytes(path.read_bytes()[:20])
        for key in new:
            (self.folder / key_file_name(*key)).write_text(json.dumps(normal("new")))
        if emptied:
            self.fleet.database.execute("TRUNCATE whatsapp_auth, whatsapp_keys")
        for key, (_, in_database) in edits.items() if not emptied else ():
            where = "WHERE key_type = %s AND key_id = %s"
            if in_database == "gone":
                self.fleet.database.execute(f"DELETE FROM whatsapp_keys {where}", key)
            elif in_database != "untouched":
                at = OLD_AT if in_database == "old" else SINCE_AT
                statement = f"UPDATE whatsapp_keys SET value = %s, updated_at = %s {where}"
                self.fleet.database.execute(statement, [json.dumps(value(in_database)), at, *key])

    def failback(self, prefer: Prefer | None = None) -> Report:
        address = db.address(self.environment)

        @contextmanager
        def open_snapshot() -> Iterator[Any]:
            with db.connect(address, 60) as connection, snapshot(connection) as found:
                yield found

        run_id = f"20260131T050000Z-{int.from_bytes(os.urandom(3)):06x}"
        state = self.fleet.place / "archive-state"
        archiving = Archiving(run_id, "sessions failback", "production", "test", state, timedelta(days=1))
        wish = FailbackWish(self.fleet.target, "production", archiving, prefer=prefer)
        with planned_failback(open_snapshot, wish, journal=Journal()) as plan:
            return plan.write(lambda: db.connect(address, 60), journal=Journal(), remaining=lambda: 60.0)

    def rows(self) -> list[tuple[Any, ...]]:
        return self.fleet.database.execute(
            "SELECT key_type, key_id, value, created_at, updated_at, expires_at FROM whatsapp_keys"
            " UNION ALL SELECT 'creds', '', creds, created_at, updated_at, NULL FROM whatsapp_auth ORDER BY 1, 2"
        )

    def words(self) -> dict[Key, str]:
        return {(t, i): v["v"] for t, i, v, *_ in self.rows() if t != "creds"}


def expected(files: Edits, edits: Edits, new: set[Key], *, emptied: bool, rebuilt: bool) -> tuple[dict[Key, str], int]:
    """What each row is after a failback that prefers the files, and how many keys both sides wrote."""
    there = {k: "gone" if emptied else d.replace("untouched", "copied") for k, (_, d) in edits.items()}
    after = {key: word for key, word in there.items() if word != "gone"} | dict.fromkeys(new, "new")
    conflicts = 0
    deleted = []
    for key, (on_folder, _) in files.items():
        since = there[key] == "since"
        match on_folder:
            case "written":
                after[key] = "written"
                conflicts += since
            case "untouched" if not since or rebuilt:
                after[key] = "copied"
                conflicts += since
            case "deleted" if there[key] != "gone":
                deleted.append(key)
                conflicts += since
    published = Counter(key_type for key_type, _ in files)
    if too_many_deleted(Counter(key_type for key_type, _ in deleted), published) is None:
        after = {key: word for key, word in after.items() if key not in deleted}
    return after, conflicts


@pytest.fixture
def creds(fleet: Fleet) -> str:
    ((text,),) = fleet.database.execute("SELECT creds::text FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    return str(text)


@given(
    edits=st.dictionaries(st.tuples(TYPES, IDS), EDITS, min_size=4, max_size=24),
    new=st.sets(NEW),
    world=st.sampled_from(["same", "same", "emptied", "rebuilt"]),
)
@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.long
def test_whatever_was_edited_no_key_is_lost_and_no_ratchet_goes_back(
    fleet: Fleet, creds: str, edits: Edits, new: set[Key], world: str
) -> None:
    emptied, rebuilt = world == "emptied", world == "rebuilt"
    scene = Scene(fleet, creds)
    files = scene.begin(edits, rebuilt=rebuilt)
    manifest = scene.folder / ".opsctl-manifest.json"
    published = manifest.read_bytes()
    scene.edit(files, edits, new, emptied=emptied)
    after, conflicts = expected(files, edits, new, emptied=emptied, rebuilt=rebuilt)
    before = scene.rows()

    report = scene.failback()
    (row,) = report.rows
    assert row.conflicting == conflicts
    if conflicts:
        assert row.result == "conflicting"
        assert scene.rows() == before
        report = scene.failback(Prefer.FILES)
        (row,) = report.rows
        assert row.conflicting == conflicts
    assert row.result in {"brought back", "unchanged"}
    assert row.damaged == sum(on_folder == "torn" for on_folder, _ in files.values())
    assert scene.words() == after

    done = scene.rows()
    unwritten = {k for k, word in after.items() if not emptied and (edits.get(k, ("", ""))[1], word) in STAYS}
    assert {r[:2]: r for r in done if r[:2] in unwritten} == {r[:2]: r for r in before if r[:2] in unwritten}
    manifest.write_bytes(published)
    scene.failback(Prefer.FILES)
    assert scene.rows() == done


STAYS = {("untouched", "copied"), ("old", "old"), ("since", "since")}
"""What the row was edited to and what it is afterwards, where it was not written; but a database may be emptied."""
