"""The service's credentials cache: read whatever stands there, written as the service writes it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.baileys.buffers import StoredForm, to_form
from opsctl.errors import Locked, Refused, SourceUnavailable
from opsctl.stores import cache_file
from opsctl.stores.cache_file import CredentialsCache, Validity, leftovers, read_cache
from tests.baileys import door

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 1, 31, 3, 4, 5, 678000, tzinfo=UTC)
NOW_MS = 1769828645678
TTL = timedelta(minutes=5)
CREDS: dict[str, Any] = {
    "me": {"id": "79001234567:1@s.whatsapp.net", "name": "Zoë"},
    "noiseKey": {"private": b"\x00\x01\xff", "public": bytes(32)},
    "processedHistoryMessages": [],
    "accountSettings": {},
    "nextPreKeyId": 31,
}


def stored(creds: dict[str, Any] = CREDS) -> Any:
    return to_form(creds, StoredForm.JSON_STRINGIFY)


def entry(**more: Any) -> dict[str, Any]:
    keys = {"_isCached": True, "_timestamp": NOW_MS}
    return {"creds": stored(), "keys": keys, "timestamp": NOW_MS, **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".baileys-cache.json"


def cache_at(path: Path, **more: Any) -> CredentialsCache:
    return CredentialsCache(path, ttl=TTL, clock=lambda: NOW, **more)


# Reading


def test_each_entry_is_read_with_its_creds_as_they_are_spelled_and_the_time_to_the_millisecond(path: Path) -> None:
    path.write_text(json.dumps({"962302": entry(), "962303": entry(timestamp=NOW_MS - 1)}, indent=2))
    found = read_cache(path)
    assert (found.sound, list(found.entries)) == (True, ["962302", "962303"])
    first = found.entries["962302"]
    assert json.loads(first.creds) == stored()
    assert first.creds in path.read_bytes()
    assert (first.cached_at, first.holds_keys) == (NOW, False)
    assert found.entries["962303"].cached_at == NOW - timedelta(milliseconds=1)
    assert found.size_bytes == path.stat().st_size


def test_an_entry_is_valid_up_to_its_ttl_and_never_before_its_time(path: Path) -> None:
    ages_ms = {"fresh": 0, "last": 300_000, "old": 300_001, "future": -1}
    path.write_text(json.dumps({name: entry(timestamp=NOW_MS - age) for name, age in ages_ms.items()}))
    found = {name: e.validity(NOW, TTL) for name, e in read_cache(path).entries.items()}
    assert found == {
        "fresh": Validity.VALID,
        "last": Validity.VALID,
        "old": Validity.EXPIRED,
        "future": Validity.FUTURE,
    }


def test_keys_beside_the_markers_are_told(path: Path) -> None:
    path.write_text(json.dumps({"a": entry(keys={"_isCached": True, "pre-key-1": {}}), "b": entry(keys=None)}))
    assert {name: e.holds_keys for name, e in read_cache(path).entries.items()} == {"a": True, "b": False}


DAMAGED: dict[str, tuple[str, str]] = {
    "null": ("null", "not an object"),
    "a number": ("7", "not an object"),
    "a list": ("[{}]", "not an object"),
    "empty": ("{}", "its creds are no object"),
    "without creds": ('{"timestamp": 1}', "its creds are no object"),
    "creds of null": ('{"creds": null, "timestamp": 1}', "its creds are no object"),
    "creds that are torn inside": ('{"creds": {"a": tru}, "timestamp": 1}', "its creds is not valid JSON"),
    "keys that are torn inside": ('{"creds": {}, "keys": {1}, "timestamp": 1}', "its keys is not valid JSON"),
    "bottomless creds": ('{"creds": %s, "timestamp": 1}' % ('{"a":' * 2000 + "1" + "}" * 2000), "not valid JSON"),
    "deep creds": (
        '{"creds": %s, "timestamp": 1}' % ('{"a":' * 65 + "1" + "}" * 65),
        "its creds are nested too deeply",
    ),
    "deep bytes": (
        '{"creds": {"a": %s}, "timestamp": 1}' % ('{"type": "Buffer", "data":' * 500 + "[]" + "}" * 500),
        "its creds are nested too deeply",
    ),
    "huge creds": ('{"creds": {"a": "%s"}, "timestamp": 1}' % ("x" * 1024**2), "its creds has 1,048,585 bytes"),
    "without a timestamp": ('{"creds": {}}', "its timestamp is no time"),
    "a timestamp of words": ('{"creds": {}, "timestamp": "now"}', "its timestamp is no time"),
    "a timestamp of truth": ('{"creds": {}, "timestamp": true}', "its timestamp is no time"),
    "a negative timestamp": ('{"creds": {}, "timestamp": -1}', "its timestamp is no time"),
    "an endless timestamp": ('{"creds": {}, "timestamp": 1e308}', "its timestamp is no time"),
    "a very long timestamp": ('{"creds": {}, "timestamp": %s}' % ("9" * 5000), "its timestamp has 5,000 bytes"),
    "misplaced commas": ('{"creds": {},, "timestamp": 1}', "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_entry_is_named_and_costs_no_other(path: Path, name: str) -> None:
    text, problem = DAMAGED[name]
    good = json.dumps(entry())
    path.write_text(f'{{"first": {good}, "bad": {text}, "last": {good}}}')
    found = read_cache(path)
    assert list(found.entries) == ["first", "last"]
    (damaged,) = found.damaged
    assert damaged.company_id == "bad"
    assert problem in damaged.problem
    assert (found.torn, found.sound) == (None, False)


def test_creds_of_64_levels_are_not_damaged(path: Path) -> None:
    path.write_text('{"a": {"creds": %s, "timestamp": 1}}' % ('{"a":' * 64 + "1" + "}" * 64))
    assert read_cache(path).sound


@pytest.mark.parametrize("name", ["../x", "", "a b", "x" * 51, "\x1b[2J", "\udcff", "é"])
def test_a_name_that_is_no_companys_is_not_an_entry(path: Path, name: str) -> None:
    path.write_text(json.dumps({name: entry(), "962302": entry()}))
    found = read_cache(path)
    assert list(found.entries) == ["962302"]
    assert [d.problem for d in found.damaged] == ["not a company id"]
    assert len(found.damaged[0].company_id) <= 51


@pytest.mark.parametrize(
    ("text", "torn"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\0" * 4096, "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'"a string"', "not a JSON object"),
        (b"{", "torn after 0 entries"),
        (b"{} {}", "torn after 0 entries"),
        (b'{"a": 1} x', "torn after 1 entry"),
        (b'{"a": 1,}', "torn after 1 entry"),
        (b"[" * 1_000_000, "not a JSON object"),
    ],
)
def test_a_file_that_is_no_cache_is_named_and_holds_nothing(path: Path, text: bytes, torn: str) -> None:
    path.write_bytes(text)
    found = read_cache(path)
    assert (found.entries, found.torn, found.sound) == ({}, torn, False)


def test_wherever_a_file_is_torn_what_is_whole_before_that_is_kept_and_the_rest_is_named(path: Path) -> None:
    whole = json.dumps({f"c{number}": entry() for number in range(3)}, indent=2).encode()
    firsts = [whole.index(b'"c%d"' % number) for number in range(3)]
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        found = read_cache(path)
        assert found.torn == (
            "empty"
            if size == 0
            else f"torn after {len(found.entries)} entr" + ("y" if len(found.entries) == 1 else "ies")
        )
        assert len(found.entries) >= sum(first < size for first in firsts) - 1
        assert len(found.entries) + len(found.damaged) <= 3
    path.write_bytes(whole)
    assert read_cache(path).sound


def test_of_two_entries_of_one_company_the_last_counts_as_in_node(path: Path) -> None:
    one, two = json.dumps(entry(timestamp=1)), json.dumps(entry(timestamp=2))
    path.write_text(f'{{"a": {one}, "a": {two}, "b": null, "b": {one}}}')
    found = read_cache(path)
    assert found.sound
    assert found.entries["a"].cached_at == datetime(1970, 1, 1, 0, 0, 0, 2000, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [b"[" * 32, b"[],", b'"":0,', b'{"\\"', b'"\\"', b"{", b'"a":{"b":['],
    ids=["brackets", "pairs", "members", "quotes", "escapes", "openings", "depths"],
)
def test_malice_takes_time_in_proportion_to_its_size(path: Path, text: bytes) -> None:
    path.write_bytes(b'{"x":[' + text * (1024**2 // len(text)) + b"0]}")
    started = time.monotonic()
    assert read_cache(path).entries == {}
    assert time.monotonic() - started < 5


def test_no_more_than_a_hundred_thousand_entries_are_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file, "MOST_ENTRIES", 3)
    path.write_text(json.dumps({f"c{number}": entry() for number in range(5)}))
    found = read_cache(path)
    assert (list(found.entries), found.torn) == (["c0", "c1", "c2"], "more than 3 entries")


def test_what_cannot_be_a_cache_is_said_and_never_followed(path: Path, tmp_path: Path) -> None:
    def refused() -> tuple[str, str]:
        with pytest.raises(SourceUnavailable) as caught:
            read_cache(path)
        return caught.value.kind, caught.value.message

    assert refused() == ("cache-missing", f"there is no credentials cache at {path}")
    path.mkdir()
    assert refused() == ("cache-unreadable", f"the credentials cache {path} is a folder")
    path.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps({"a": entry()}))
    path.symlink_to(elsewhere)
    assert refused() == ("cache-unreadable", f"the credentials cache {path} is a symbolic link")
    path.unlink()
    os.mkfifo(path)
    assert refused() == ("cache-unreadable", f"the credentials cache {path} is no regular file")
    path.unlink()
    with path.open("wb") as file:
        file.truncate(100 * 1024**2)
    assert refused() == ("cache-unreadable", f"the credentials cache {path} has 100 MiB, and no cache has more than 32")


# The class


def test_what_is_set_is_there_for_the_next_one_with_its_bytes_and_a_copy_of_its_own(path: Path) -> None:
    creds = {**CREDS, "list": [1]}
    with cache_at(path) as cache:
        cache.set("962302", creds)
        creds["list"].append(2)
    with cache_at(path) as cache:
        first = cache.get("962302")
        assert first == {**CREDS, "list": [1]}
        first["list"].append(3)
        assert cache.get("962302") == {**CREDS, "list": [1]}
        assert cache.get("nobody") is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_for_its_owner_only_and_replaced_in_one_step(path: Path) -> None:
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        with cache_at(path) as cache:
            cache.set("962302", CREDS)
        inode = path.stat().st_ino
        with cache_at(path) as cache:
            cache.set("962303", CREDS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_ino != inode


def test_nothing_is_written_where_nothing_changed_or_something_failed(path: Path) -> None:
    with cache_at(path) as cache:
        assert cache.clear("nobody") is False
        assert cache.clear_all() == 0
        assert cache.sweep() == 0
    assert not path.exists()
    with suppress(ZeroDivisionError), cache_at(path) as cache:
        cache.set("962302", CREDS)
        cache.set("962303", {"in the middle": 1 // 0})
    assert list(path.parent.iterdir()) == []


def test_clear_forgets_one_and_clear_all_every_one(path: Path) -> None:
    path.write_text(json.dumps({"a": entry(), "b": entry(), "c": None}))
    with cache_at(path) as cache:
        assert (cache.clear("a"), cache.clear("a"), cache.clear("c")) == (True, False, True)
    assert list(json.loads(path.read_bytes())) == ["b"]
    with cache_at(path) as cache:
        assert cache.clear_all() == 1
    assert path.read_bytes() == b"{}"


def test_sweep_forgets_what_is_expired_or_of_the_future_and_stats_count_it(path: Path) -> None:
    ages_ms = {"a": 0, "b": 299_000, "c": 300_001, "d": -5000}
    content = {name: entry(timestamp=NOW_MS - age) for name, age in ages_ms.items()}
    path.write_text(json.dumps({**content, "e": None}))
    with cache_at(path) as cache:
        stats = cache.stats()
        assert (stats.total, stats.valid, stats.expired, stats.future, stats.damaged) == (4, 2, 1, 1, 1)
        assert stats.oldest_age == timedelta(milliseconds=300_001)
        assert [cache.get(name) is None for name in "abcd"] == [False, False, True, True]
        assert cache.sweep() == 2
    assert list(json.loads(path.read_bytes())) == ["a", "b"]


def test_beyond_the_limit_the_oldest_go_and_before_them_those_of_the_future(path: Path) -> None:
    ages_ms = {"a": 2000, "b": 1000, "c": -1, "d": 3000}
    path.write_text(json.dumps({name: entry(timestamp=NOW_MS - age) for name, age in ages_ms.items()}))
    with cache_at(path, max_entries=3) as cache:
        cache.set("e", CREDS)
    assert list(json.loads(path.read_bytes())) == ["a", "b", "e"]


def test_the_limit_holds_also_for_what_the_file_had_on_entering(path: Path) -> None:
    path.write_text(json.dumps({name: entry(timestamp=NOW_MS - age) for name, age in (("a", 2), ("b", 3), ("c", 1))}))
    with cache_at(path, max_entries=2) as cache:
        assert cache.known() == ["a", "c"]
        assert cache.stats().total == 2
        assert cache.get("b") is None


def test_two_saves_never_share_a_temporary_name_nor_the_services(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = path.with_name(f"{path.name}.tmp")
    services.write_text("the service is writing this")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for number in range(2):
        with monkeypatch.context() as at_once:
            at_once.setattr(os, "rename", killed)
            at_once.setattr(os, "unlink", killed)
            with pytest.raises(KeyboardInterrupt), cache_at(path) as cache:
                cache.set(f"c{number}", CREDS)
    with cache_at(path) as cache:
        cache.set("last", CREDS)
    left = leftovers(path)
    assert len(left) == 3
    assert services.read_text() == "the service is writing this"
    contents = [json.loads(file.read_bytes()).keys() for file in left if file != services]
    assert sorted(map(list, contents)) == [["c0"], ["c1"]]
    assert list(json.loads(path.read_bytes())) == ["last"]


def test_what_could_not_be_read_is_set_aside_before_it_is_written_over(path: Path) -> None:
    torn = json.dumps({"a": entry(), "b": entry()})[:-40].encode()
    path.write_bytes(torn)
    path.chmod(0o644)
    with cache_at(path) as cache:
        assert cache.torn == "torn after 1 entry"
        assert [d.company_id for d in cache.damaged] == ["b"]
        cache.set("c", CREDS)
    assert cache.set_aside is not None
    assert cache.set_aside.name.startswith(".baileys-cache.json.damaged-20260131T030405Z-")
    assert cache.set_aside.read_bytes() == torn
    assert cache.set_aside.stat().st_mode & 0o777 == 0o600
    assert list(json.loads(path.read_bytes())) == ["a", "c"]
    assert leftovers(path) == [cache.set_aside]


def test_a_second_run_is_locked_out_and_the_lock_leaves_nothing(path: Path) -> None:
    with cache_at(path), pytest.raises(Locked, match="another run works in"), cache_at(path):
        pass
    descriptor = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


@pytest.mark.parametrize("what", ["a folder", "a link", "no folder around it"])
def test_nothing_is_written_over_what_is_no_cache(path: Path, what: str) -> None:
    elsewhere = path.with_name("elsewhere")
    if what == "a folder":
        path.mkdir()
    elif what == "a link":
        elsewhere.write_text("{}")
        path.symlink_to(elsewhere)
    else:
        path = path.parent / "missing" / path.name
    with pytest.raises(Refused, match=r"is a folder|is a symbolic link|No such file"), cache_at(path) as cache:
        cache.clear_all()
    assert not elsewhere.exists() or elsewhere.read_text() == "{}"


# The service's own program


def test_what_node_writes_is_read_and_stays_the_same_to_the_byte(path: Path) -> None:
    door.write_cache(path, {"962302": to_form(CREDS, StoredForm.BASE64), "962303": {}})
    written = path.read_bytes()
    with CredentialsCache(path, ttl=TTL) as cache:
        assert cache.get("962302") == CREDS
        assert cache.get("962303") == {}
        cache.set("more", {})
    with CredentialsCache(path, ttl=TTL) as cache:
        cache.clear("more")
    assert path.read_bytes() == written


def test_what_is_written_is_read_by_node_with_every_byte_form_as_a_buffer_and_spelled_as_node_would(path: Path) -> None:
    forms = (StoredForm.BASE64, StoredForm.JSON_STRINGIFY, StoredForm.UINT8ARRAY)
    with CredentialsCache(path, ttl=TTL) as cache:
        for form in forms:
            creds = to_form(CREDS, form)
            assert isinstance(creds, dict)
            cache.set(form.value, creds)
        cache.set("raw", CREDS)
    expected = to_form(CREDS, StoredForm.BASE64)
    assert door.read_cache(path, ttl_ms=300_000) == dict.fromkeys([*(f.value for f in forms), "raw"], expected)
    time.sleep(0.005)
    assert door.read_cache(path, ttl_ms=1) == {}
    ours = path.read_bytes()
    door.write_cache(path, {})
    assert path.read_bytes() == ours
