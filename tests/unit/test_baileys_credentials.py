"""What credentials.py says of good, broken and stale credentials."""

import json
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsctl.baileys.buffers import StoredForm, normalise, revive, to_form
from opsctl.baileys.credentials import (
    KEY_ID_LIMIT,
    Credentials,
    KeySummary,
    Severity,
    consistency,
    examine,
    key_pair_matches,
    verify_signature,
    with_pre_key_ids_raised,
)

# JSON.stringify(initAuthCreds(), BufferJSON.replacer) of baileys 7.0.0-rc14: made for this file, never paired.
NEW = (
    b'{"noiseKey":{"private":{"type":"Buffer","data":"sBn1mSenzW2w3Q6blqjQlCDarkyeYwQrKgfPqdLJHXY="},'
    b'"public":{"type":"Buffer","data":"pSQImANa14inGxU8V2bHFw1Mh7rIdSpntweYscF/D34="}},'
    b'"pairingEphemeralKeyPair":{"private":{"type":"Buffer","data":"WJ87lMGYc7dbLKPk7DGCN819C0AI/5xI6upe34LyAVU="},'
    b'"public":{"type":"Buffer","data":"8meXCSGL35TtsCwj1ArSXngi23zAsI4idcS11TCKHF4="}},'
    b'"signedIdentityKey":{"private":{"type":"Buffer","data":"kP6xgLHBvIje9BdQxCq75wOPd+QGeQfWOsGtr8dU/nU="},'
    b'"public":{"type":"Buffer","data":"o0E0eUiupN2XaSxbs0EcOhM3IjmSzrjJ3JGPV7GnxEM="}},'
    b'"signedPreKey":{"keyPair":{"private":{"type":"Buffer","data":"SPi0dq70dBOYvwSTk0m9aBn3bHWGd85qIrrNZe+ECFU="},'
    b'"public":{"type":"Buffer","data":"0bSPzyzxidlsL0oOTJKEhm8ShufMdm1vWeAu43WGfho="}},'
    b'"signature":{"type":"Buffer",'
    b'"data":"OHhgN65aO62aFjVM607aROWmsVENtBlgmKnMBq+CX66AMqH+aaPflAxERjIqvQ6WtjMum8sEE1p0yjMIj1cCDg=="},"keyId":1},'
    b'"registrationId":225,"advSecretKey":"UJdgccFLCHM/4YvM/w1Tg2ou9K9UkAgHDDIwASBCb7w=",'
    b'"processedHistoryMessages":[],"nextPreKeyId":1,"firstUnuploadedPreKeyId":1,"accountSyncCounter":0,'
    b'"accountSettings":{"unarchiveChats":false},"registered":false}'
)

ME_ID = "79001234567:1@s.whatsapp.net"
ME_LID = "190000000000001:1@lid"
GROUP = "120363000000000000@g.us"


def paired() -> dict[str, Any]:
    """The same after pairing; `account` as protobufjs prints it."""
    creds: dict[str, Any] = json.loads(NEW)
    return creds | {
        "me": {"id": ME_ID, "lid": ME_LID},
        "account": {
            "details": "CAE=",
            "accountSignatureKey": b64encode(bytes(32)).decode(),
            "accountSignature": b64encode(bytes(64)).decode(),
            "deviceSignature": b64encode(bytes(64)).decode(),
        },
        "signalIdentities": [
            {
                "identifier": {"name": ME_LID, "deviceId": 0},
                "identifierKey": {"type": "Buffer", "data": b64encode(bytes(33)).decode()},
            }
        ],
        "nextPreKeyId": 31,
        "firstUnuploadedPreKeyId": 31,
        "myAppStateKeyId": "AAAAAK/B",
    }


def text(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def codes(creds: Credentials) -> list[str]:
    return [finding.code for finding in creds.findings]


def buffer(data: bytes) -> dict[str, str]:
    return {"type": "Buffer", "data": b64encode(data).decode()}


def put(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(creds: dict[str, Any]) -> None:
        for name in path[:-1]:
            creds = creds[name]
        creds[path[-1]] = value

    return change


def test_what_baileys_makes_before_pairing_will_ask_for_a_qr_code() -> None:
    creds = examine(NEW)
    assert codes(creds) == ["not-registered"]
    assert not creds.unusable
    assert not creds.registered


@pytest.mark.parametrize("form", [StoredForm.BASE64, StoredForm.JSON_STRINGIFY, StoredForm.UINT8ARRAY])
def test_paired_credentials_are_clean_in_every_stored_form(form: StoredForm) -> None:
    creds = examine(text(to_form(revive(paired()), form)))
    assert creds == Credentials(
        findings=(),
        me_id=ME_ID,
        me_lid=ME_LID,
        registered=True,
        next_pre_key_id=31,
        first_unuploaded_pre_key_id=31,
        my_app_state_key_id="AAAAAK/B",
    )


@pytest.mark.parametrize("garbage", [b"", b"{", b"null", b"[]", b'"x"', b'{"a":1}tail'])
def test_what_is_no_json_object_is_unusable(garbage: bytes) -> None:
    assert examine(garbage).unusable


BROKEN = {
    "a field gone": (put("noiseKey", value={}), "missing-bytes"),
    "a string for bytes": (put("signedPreKey", "signature", value="AAAA"), "missing-bytes"),
    "31 bytes": (put("signedIdentityKey", "private", value=buffer(bytes(31))), "wrong-length"),
    "encoded twice": (put("noiseKey", "public", value=buffer(b64encode(bytes(32)))), "double-encoded"),
    "another private key": (put("signedIdentityKey", "private", value=buffer(bytes(32))), "key-pair-mismatch"),
    "another noise key": (put("noiseKey", "private", value=buffer(bytes(32))), "key-pair-mismatch"),
    "another signature": (put("signedPreKey", "signature", value=buffer(bytes(64))), "wrong-signature"),
    "a short advSecretKey": (put("advSecretKey", value="AAAA"), "wrong-length"),
    "a short account key": (put("account", "accountSignatureKey", value="AAAA"), "wrong-length"),
    "a short identifierKey": (put("signalIdentities", value=[{"identifierKey": buffer(bytes(32))}]), "wrong-length"),
}


@pytest.mark.parametrize(("change", "code"), BROKEN.values(), ids=BROKEN)
def test_broken_bytes_are_unusable(change: Callable[[dict[str, Any]], object], code: str) -> None:
    value = paired()
    change(value)
    creds = examine(text(value))
    assert code in codes(creds)
    assert creds.unusable


DOUBTFUL = {
    "no account": (put("account", value=None), "not-registered"),
    "no me": (put("me", value=None), "not-registered"),
    "me without a server": (put("me", "id", value="79001234567"), "not-registered"),
    "no identities": (put("signalIdentities", value=[]), "no-signal-identities"),
    "a long registration id": (put("registrationId", value=2**14), "registration-id"),
    "a long key id": (put("signedPreKey", "keyId", value=KEY_ID_LIMIT), "key-id-range"),
    "a counter that is true": (put("nextPreKeyId", value=True), "key-id-range"),
    "uploaded too far": (put("firstUnuploadedPreKeyId", value=32), "unuploaded-beyond-next"),
}


@pytest.mark.parametrize(("change", "code"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_everything_else_is_a_warning(change: Callable[[dict[str, Any]], object], code: str) -> None:
    value = paired()
    change(value)
    creds = examine(text(value))
    assert codes(creds) == [code]
    assert not creds.unusable


def test_no_finding_repeats_what_is_in_the_credentials() -> None:
    secret = "S3CRETS3CRETS3CRETS3CRETS3CRETS3CRETS3CRETS3"
    value = paired()
    for name in ("noiseKey", "signedIdentityKey", "advSecretKey", "account", "registrationId", "nextPreKeyId"):
        value[name] = secret
    assert len(examine(text(value)).findings) > 5
    assert "S3CRET" not in repr(examine(text(value)).findings)


def test_the_flag_registered_is_no_test() -> None:
    assert examine(text(paired() | {"registered": False})).registered
    assert not examine(text(json.loads(NEW) | {"registered": True})).registered


def test_a_public_key_may_carry_its_type() -> None:
    private, public = (revive(json.loads(NEW)["noiseKey"][half]) for half in ("private", "public"))
    assert isinstance(private, bytes)
    assert isinstance(public, bytes)
    assert key_pair_matches(private, public)
    assert key_pair_matches(private, b"\x05" + public)
    assert not key_pair_matches(private, b"\x06" + public)
    assert not key_pair_matches(private[:31], public)


def test_the_signature_covers_the_type_byte() -> None:
    value: Any = revive(json.loads(NEW))
    identity, signed = value["signedIdentityKey"]["public"], value["signedPreKey"]
    assert verify_signature(identity, b"\x05" + signed["keyPair"]["public"], signed["signature"])
    assert not verify_signature(identity, signed["keyPair"]["public"], signed["signature"])


# nextPreKeyId never goes down


def counters(creds: bytes) -> tuple[int, int]:
    value = json.loads(creds)
    return value["nextPreKeyId"], value["firstUnuploadedPreKeyId"]


@pytest.mark.parametrize("highest", [None, 1, 30])
def test_a_fresh_consistent_copy_stays_byte_equal(highest: int | None) -> None:
    creds = json.dumps(paired(), indent=2).encode()
    assert with_pre_key_ids_raised(creds, highest_pre_key_id=highest, fresh=True) is creds


def test_a_fresh_copy_with_later_pre_keys_goes_on_behind_them() -> None:
    raised = with_pre_key_ids_raised(text(paired()), highest_pre_key_id=35, fresh=True)
    assert counters(raised) == (36, 36)


@pytest.mark.parametrize(("highest", "expected"), [(None, 1031), (30, 1031), (35, 1036)])
def test_any_other_copy_skips_a_thousand(highest: int | None, expected: int) -> None:
    raised = with_pre_key_ids_raised(text(paired()), highest_pre_key_id=highest, fresh=False)
    assert counters(raised) == (expected, expected)


def test_nothing_but_the_counters_changes() -> None:
    creds = normalise(text(paired())).data
    raised = with_pre_key_ids_raised(creds, highest_pre_key_id=35, fresh=False)
    assert raised == creds.replace(b'PreKeyId":31', b'PreKeyId":1036')


@given(
    st.integers(0, KEY_ID_LIMIT + 9), st.integers(0, KEY_ID_LIMIT + 9), st.integers(0, KEY_ID_LIMIT - 1), st.booleans()
)
def test_no_counter_ever_goes_down_nor_beyond_the_limit(
    following: int, unuploaded: int, highest: int, fresh: bool
) -> None:
    creds = text({"nextPreKeyId": following, "firstUnuploadedPreKeyId": unuploaded})
    raised = counters(with_pre_key_ids_raised(creds, highest_pre_key_id=highest, fresh=fresh))
    assert raised[0] >= following
    assert raised[1] >= unuploaded
    assert raised[0] < KEY_ID_LIMIT or raised[0] == following
    assert raised[0] > highest or raised[0] == KEY_ID_LIMIT - 1


@pytest.mark.parametrize("creds", [b"{", b"[]", b"{}", b'{"nextPreKeyId":"1","firstUnuploadedPreKeyId":1}'])
def test_credentials_without_counters_come_back_as_they_are(creds: bytes) -> None:
    assert with_pre_key_ids_raised(creds, highest_pre_key_id=5, fresh=False) is creds


# consistency

SOUND = [
    ("pre-key", "30", b"{}"),
    ("app-state-sync-key", "AAAAAK/B", b"{}"),
    ("lid-mapping", "79001234567", b'"190000000000001"'),
    ("lid-mapping", "190000000000001_reverse", b'"79001234567"'),
    ("sender-key", f"{GROUP}::79001234567::1", b'{"type":"Buffer","data":"W10="}'),
    ("sender-key-memory", GROUP, b'{"1@lid":true}'),
    ("session", "1.0", b"{}"),
]


def found(keys: list[tuple[str, str, bytes]]) -> list[str]:
    summary = KeySummary()
    for key in keys:
        summary.add(*key)
    findings = consistency(examine(text(paired())), summary)
    assert all(finding.severity is Severity.WARNING for finding in findings)
    return [finding.code for finding in findings]


def test_sound_keys_raise_nothing_in_any_order() -> None:
    assert found(SOUND) == []
    assert found(SOUND[::-1]) == []


@pytest.mark.parametrize(
    "key_id", [f"{GROUP}::190000000000001_1::1", f"{GROUP}::190000000000001::1", f"{GROUP}::79001234567::1"]
)
def test_an_own_sender_key_counts_by_number_and_by_lid(key_id: str) -> None:
    assert found([*SOUND[:4], ("sender-key", key_id, b"[{}]"), SOUND[5]]) == []


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ([*SOUND, ("pre-key", "31", b"{}")], "pre-key-beyond-next"),
        ([*SOUND[:1], *SOUND[2:]], "app-state-key-missing"),
        ([*SOUND[:3], *SOUND[4:]], "lid-pairs-asymmetric"),
        ([*SOUND[:3], ("lid-mapping", "190000000000001_reverse", b'"7900"'), *SOUND[4:]], "lid-pairs-asymmetric"),
        ([*SOUND[:4], *SOUND[5:]], "memory-without-own-sender-key"),
        ([*SOUND[:4], ("sender-key", f"{GROUP}::79001234567::0", b"[]"), SOUND[5]], "memory-without-own-sender-key"),
        ([*SOUND, ("sender-key", f"{GROUP}::7911::0", b"[{}]")], "mixed-sender-keys"),
    ],
)
def test_keys_that_do_not_fit_are_warned_of(keys: list[tuple[str, str, bytes]], code: str) -> None:
    assert found(keys) == [code]


def test_a_pre_key_with_a_strange_id_is_passed_over() -> None:
    assert found([*SOUND, ("pre-key", "x", b"{}"), ("pre-key", "9" * 5000, b"{}")]) == []


def test_a_hundred_thousand_keys_take_a_few_megabytes() -> None:
    tracemalloc.start()
    try:
        summary = KeySummary()
        for number in range(25_000):
            summary.add("pre-key", str(number), b"{}")
            summary.add("lid-mapping", str(number), b'"%d"' % number)
            summary.add("sender-key", f"{GROUP}::{number}::0", b"[{}]")
            summary.add("session", f"{number}.0", b"{}")
        size_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size_bytes < 1_000_000
