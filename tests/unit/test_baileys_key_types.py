"""The table of key types, and the shapes of their values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsctl.baileys import key_types
from opsctl.baileys.buffers import StoredForm, normalise, to_form
from opsctl.baileys.key_types import (
    DROPPED_WHEN_STALE,
    KNOWN,
    ExpiryPolicy,
    is_own_sender_key,
    own_sender_key_ids,
    sender_key_encoding,
    shape_problem,
)

KEY_PAIR = {"private": bytes(32), "public": bytes(range(32))}
RIGHT = [
    ("pre-key", KEY_PAIR),
    ("pre-key", dict(reversed(KEY_PAIR.items()))),
    ("pre-key", KEY_PAIR | {"keyId": 1}),
    ("session", {"_sessions": {}, "version": "v1"}),
    ("session", {"version": "v1", "_sessions": {"AA==": {"_chains": {}}}}),
    ("session", {"_sessions": {}}),
    ("sender-key", []),
    ("sender-key", [{"senderKeyId": 1, "senderChainKey": {"iteration": 0, "seed": bytes(32)}}]),
    ("sender-key", b"[]"),
    ("sender-key", b'[{"senderKeyId":1}]'),
    ("sender-key", b"[ ]"),
    ("sender-key-memory", {}),
    ("sender-key-memory", {"1:2@s.whatsapp.net": True, '"quoted"': False}),
    ("app-state-sync-key", {"keyData": "AAAA", "timestamp": "1700000000000", "fingerprint": {"rawId": 1}}),
    ("app-state-sync-key", {"timestamp": "1700000000000", "keyData": "AAAA"}),
    ("app-state-sync-key", {"keyData": bytes(32)}),
    ("app-state-sync-version", {"version": 0, "hash": bytes(128), "indexValueMap": {}}),
    ("app-state-sync-version", {"hash": bytes(128), "version": 7, "indexValueMap": {"AA==": {"valueMac": bytes(32)}}}),
    ("identity-key", b"\x05" + bytes(32)),
    ("lid-mapping", "190000000000001"),
    ("lid-mapping", 'a"b'),
    ("device-list", []),
    ("device-list", ["0", "5"]),
    ("tctoken", {"token": b"\x01\x02", "timestamp": "1700000000"}),
    ("tctoken", {"token": b"", "senderTimestamp": 1700000000}),
    ("future-type", None),
    ("future-type", [1, {"a": 2}]),
]
WRONG: list[tuple[str, object, str]] = [
    *((name, None, "null instead of") for name in KNOWN),
    ("pre-key", [], "an array instead of an object"),
    ("pre-key", bytes(32), "bytes instead of an object"),
    ("pre-key", {"private": bytes(32)}, "public is missing"),
    ("pre-key", KEY_PAIR | {"private": bytes(31)}, "private has 31 bytes instead of 32"),
    ("pre-key", KEY_PAIR | {"public": bytes(33)}, "public has 33 bytes instead of 32"),
    ("pre-key", KEY_PAIR | {"public": "AAAA"}, "public is a string instead of bytes"),
    ("pre-key", KEY_PAIR | {"public": b"A" * 43 + b"="}, "public is encoded twice"),
    ("session", {"version": "v1"}, "an object without _sessions"),
    ("session", {"_sessions": []}, "an object without _sessions"),
    ("session", b"{}", "bytes instead of an object"),
    ("sender-key", {"a": 1}, "an object instead of an array or bytes"),
    ("sender-key", b"{}", "bytes that are no JSON array"),
    ("sender-key-memory", {"a": 1}, "an object with more than booleans"),
    ("app-state-sync-key", {"timestamp": "1"}, "keyData is missing"),
    ("app-state-sync-key", {"keyData": ""}, "keyData is missing"),
    ("app-state-sync-key", {"keyData": "no base64!"}, "keyData is not base64"),
    ("app-state-sync-version", {"hash": bytes(128), "indexValueMap": {}}, "version is not an integer"),
    ("app-state-sync-version", {"version": True, "hash": bytes(128), "indexValueMap": {}}, "version is not an integer"),
    ("app-state-sync-version", {"version": 1, "hash": bytes(128)}, "indexValueMap is not an object"),
    (
        "app-state-sync-version",
        {"version": 1, "hash": bytes(64), "indexValueMap": {}},
        "hash has 64 bytes instead of 128",
    ),
    ("identity-key", bytes(32), "the key has 32 bytes instead of 33"),
    ("identity-key", "AAAA", "the key is a string instead of bytes"),
    ("lid-mapping", 190000000000001, "a number instead of a string"),
    ("lid-mapping", "", "an empty string"),
    ("device-list", {"0": "a"}, "an object instead of an array"),
    ("device-list", ["0", 5], "an array with more than strings"),
    ("tctoken", {"timestamp": "1"}, "token is missing"),
    ("tctoken", {"token": "AAAA"}, "token is a string instead of bytes"),
]


def stored(value: object) -> bytes:
    return normalise(json.dumps(to_form(value, StoredForm.BASE64)).encode()).data


@pytest.mark.parametrize(("key_type", "value"), RIGHT)
def test_a_value_as_baileys_writes_it_has_no_problem(key_type: str, value: object) -> None:
    assert shape_problem(key_type, stored(value)) is None


@pytest.mark.parametrize(("key_type", "value", "problem"), WRONG)
def test_a_value_of_another_shape_is_named(key_type: str, value: object, problem: str) -> None:
    assert (shape_problem(key_type, stored(value)) or "").startswith(problem)


@pytest.mark.parametrize("key_type", list(KNOWN))
def test_what_is_no_json_is_named(key_type: str) -> None:
    assert shape_problem(key_type, b'{"torn') == "not valid JSON"


@given(st.sampled_from([*KNOWN, "future-type"]), st.sampled_from(RIGHT))
def test_what_is_recognised_at_a_glance_is_right_when_looked_at(key_type: str, right: tuple[str, object]) -> None:
    data = stored(right[1])
    quick, explain = key_types._RIGHT.get(key_type), key_types._EXPLAIN.get(key_type)
    if quick is not None and explain is not None and quick(data) is not None:
        assert explain(json.loads(data)) is None


def test_the_table_says_what_a_cleanup_may_delete_by_age() -> None:
    by_age = {name for name, known in KNOWN.items() if known.expiry is ExpiryPolicy.PAST_RETENTION}
    assert by_age == {"session", "sender-key-memory"} == DROPPED_WHEN_STALE
    assert {name for name, known in KNOWN.items() if not known.protected} == by_age | {"sender-key"}
    assert {name for name, known in KNOWN.items() if known.since == 7} == {
        "lid-mapping",
        "device-list",
        "tctoken",
        "identity-key",
    }


ME_ID, ME_LID = "456:7@s.whatsapp.net", "789:7@lid"


@pytest.mark.parametrize("key_id", ["g@g.us::456::7", "g@g.us::789_1::7", "g@g.us::789::7", "status@broadcast::456::7"])
def test_a_sender_key_of_this_device_is_our_own(key_id: str) -> None:
    assert is_own_sender_key(key_id, ME_ID, ME_LID)
    assert key_id in own_sender_key_ids(key_id.partition("::")[0], ME_ID, ME_LID)


@pytest.mark.parametrize(
    "key_id", ["g@g.us::456::0", "g@g.us::457::7", "g@g.us::4560::7", "g@g.us", "", "::", "g::456"]
)
def test_a_sender_key_of_anyone_else_is_not(key_id: str) -> None:
    assert not is_own_sender_key(key_id, ME_ID, ME_LID)


def test_a_lid_stored_without_its_device_is_of_the_same_device() -> None:
    assert is_own_sender_key("g@g.us::789_1::7", ME_ID, "789@lid")


def test_without_an_account_no_sender_key_is_our_own() -> None:
    assert not is_own_sender_key("g@g.us::456::7", None, None)
    assert not is_own_sender_key("g@g.us::::0", "", "no jid")


@pytest.mark.parametrize(("value", "encoding"), [([], "array"), (b"[]", "buffer"), (None, None), ({"a": 1}, None)])
def test_the_two_encodings_of_a_sender_key(value: object, encoding: str | None) -> None:
    assert sender_key_encoding(stored(value)) == encoding
