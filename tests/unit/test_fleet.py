from __future__ import annotations

import base64
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from opsctl.baileys import xeddsa
from opsctl.baileys.buffers import StoredForm, normalise
from opsctl.operations.fleet import PRODUCTION_KEYS, FleetSummary, seed_fleet

if TYPE_CHECKING:
    from tests.conftest import Database

NOW = datetime(2025, 11, 25, 12, tzinfo=UTC)


def seeded(database: Database, **asked: Any) -> FleetSummary:
    with database.connect(autocommit=False) as connection:
        return seed_fleet(connection, **{"companies": 5, "keys_per_company": 230, "seed": 1, "now": NOW, **asked})


def bytes_of(value: Any) -> bytes:
    """The bytes in any of the three forms."""
    if value.get("type") != "Buffer":
        return bytes(value[str(index)] for index in range(len(value)))
    return base64.b64decode(value["data"]) if isinstance(value["data"], str) else bytes(value["data"])


def is_key_pair(pair: Any) -> bool:
    private, public = bytes_of(pair["private"]), bytes_of(pair["public"])
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public


def all_creds(database: Database) -> list[Any]:
    return [creds for (creds,) in database.execute("SELECT creds FROM whatsapp_auth ORDER BY company_id")]


def keys_of(database: Database, key_type: str, company_id: str = "962302") -> dict[str, Any]:
    sql = "SELECT key_id, value FROM whatsapp_keys WHERE company_id = %s AND key_type = %s"
    return dict(database.execute(sql, [company_id, key_type]))


def test_a_production_company_has_the_keys_of_production(database: Database) -> None:
    summary = seeded(database, companies=1, keys_per_company=2317)
    rows = dict(database.execute("SELECT key_type, count(*) FROM whatsapp_keys GROUP BY 1"))
    assert rows == PRODUCTION_KEYS == summary.keys_by_type
    assert summary.company_ids == ("962302",)
    assert summary.keys == 2317


@pytest.mark.parametrize("keys", [40, 41, 57, 100, 1476])
def test_it_writes_as_many_keys_as_asked_and_every_type(database: Database, keys: int) -> None:
    summary = seeded(database, companies=3, keys_per_company=keys)
    per_company = database.execute("SELECT company_id, count(*) FROM whatsapp_keys GROUP BY 1 ORDER BY 1")
    assert per_company == [("962302", keys), ("962303", keys), ("962304", keys)]
    by_type = database.execute("SELECT key_type, count(*) FROM whatsapp_keys GROUP BY 1")
    assert dict(by_type) == summary.keys_by_type
    assert summary.keys_by_type.keys() == PRODUCTION_KEYS.keys()


def test_fewer_keys_than_types_need_are_refused(database: Database) -> None:
    with pytest.raises(ValueError, match="at least 40"):
        seeded(database, keys_per_company=39)


def test_key_pairs_are_key_pairs_in_every_form(database: Database) -> None:
    seeded(database)
    for creds in all_creds(database):
        pairs = [creds["noiseKey"], creds["pairingEphemeralKeyPair"], creds["signedIdentityKey"]]
        assert all(map(is_key_pair, [*pairs, creds["signedPreKey"]["keyPair"]]))
    for company_id in ("962302", "962305", "962306"):
        assert all(map(is_key_pair, keys_of(database, "pre-key", company_id).values()))


def test_signatures_verify(database: Database) -> None:
    seeded(database)
    for creds in all_creds(database):
        identity = bytes_of(creds["signedIdentityKey"]["public"])
        signed_pre_key = creds["signedPreKey"]
        signed = b"\x05" + bytes_of(signed_pre_key["keyPair"]["public"])
        assert xeddsa.verify(identity, signed, bytes_of(signed_pre_key["signature"]))
        account = {name: base64.b64decode(text) for name, text in creds["account"].items()}
        phone, details = account["accountSignatureKey"], account["details"]
        assert xeddsa.verify(phone, b"\x06\x00" + details + identity, account["accountSignature"])
        assert xeddsa.verify(identity, b"\x06\x01" + details + identity + phone, account["deviceSignature"])


def test_creds_are_those_of_a_registered_device(database: Database) -> None:
    seeded(database)
    for creds in all_creds(database):
        user, server = creds["me"]["id"].split("@")
        assert server == "s.whatsapp.net"
        assert user.split(":")[1] == creds["me"]["lid"].split("@")[0].split(":")[1]
        assert len(base64.b64decode(creds["advSecretKey"])) == 32
        assert 0 < creds["registrationId"] < 1 << 14
        (signal_identity,) = creds["signalIdentities"]
        phone = base64.b64decode(creds["account"]["accountSignatureKey"])
        assert bytes_of(signal_identity["identifierKey"]) == b"\x05" + phone


def test_references_are_met(database: Database) -> None:
    seeded(database)
    (creds, *_) = all_creds(database)
    number, lid = creds["me"]["id"].split(":")[0], creds["me"]["lid"].split(":")[0]
    highest = max(map(int, keys_of(database, "pre-key")))
    assert creds["nextPreKeyId"] == creds["firstUnuploadedPreKeyId"] == highest + 1
    app_state_keys = keys_of(database, "app-state-sync-key")
    assert creds["myAppStateKeyId"] in app_state_keys
    assert all("/" in key_id and "+" in key_id for key_id in app_state_keys)
    mappings = keys_of(database, "lid-mapping")
    assert mappings[number] == lid
    assert all(
        mappings[mapped if name.endswith("_reverse") else f"{mapped}_reverse"] for name, mapped in mappings.items()
    )
    own = {key_id.split("::")[0] for key_id in keys_of(database, "sender-key") if key_id.split("::")[1] == f"{lid}_1"}
    assert own == set(keys_of(database, "sender-key-memory"))
    sessions, identities = keys_of(database, "session"), keys_of(database, "identity-key")
    for address, identity in identities.items():
        known = {entry["indexInfo"]["remoteIdentityKey"] for entry in sessions[address]["_sessions"].values()}
        assert known == {base64.b64encode(bytes_of(identity)).decode()}


def test_sessions_are_libsignals(database: Database) -> None:
    seeded(database, companies=1, keys_per_company=1000)
    pending = 0
    for record in keys_of(database, "session").values():
        assert record["version"] == "v1"
        assert [entry["indexInfo"]["closed"] for entry in record["_sessions"].values()].count(-1) == 1
        for base_key, entry in record["_sessions"].items():
            assert entry["indexInfo"]["baseKey"] == base_key
            own = {name: base64.b64decode(text) for name, text in entry["currentRatchet"]["ephemeralKeyPair"].items()}
            public = X25519PrivateKey.from_private_bytes(own["privKey"]).public_key().public_bytes_raw()
            assert own["pubKey"] == b"\x05" + public
            assert base64.b64encode(own["pubKey"]).decode() in entry["_chains"]
            pending += "pendingPreKey" in entry
    assert pending


def test_a_company_has_the_form_of_its_index(database: Database) -> None:
    seeded(database, companies=4, forms=["base64", "uint8array"])
    routing = [creds["routingInfo"] for creds in all_creds(database)]
    assert [isinstance(value.get("data"), str) for value in routing] == [True, False, True, False]
    assert ["0" in value for value in routing] == [False, True, False, True]
    with pytest.raises(KeyError):
        seeded(database, forms=["hex"])


def test_every_stored_form_occurs_in_a_fleet_of_five(database: Database) -> None:
    seeded(database, companies=5)
    routing = [orjson.dumps(creds["routingInfo"]) for creds in all_creds(database)]
    forms = {StoredForm.JSON_STRINGIFY, StoredForm.BASE64, StoredForm.UINT8ARRAY}
    assert {normalise(value).form for value in routing} == forms


def test_both_sender_key_encodings_occur_but_not_in_one_company(database: Database) -> None:
    seeded(database)
    sql = "SELECT DISTINCT company_id, jsonb_typeof(value) FROM whatsapp_keys WHERE key_type = 'sender-key' ORDER BY 1"
    kinds = [kind for _, kind in database.execute(sql)]
    assert kinds == ["object", "object", "array", "object", "object"]


def test_times_are_those_of_the_service(database: Database) -> None:
    seeded(database, companies=1, keys_per_company=2317)
    rows = database.execute("SELECT key_type, created_at, updated_at, expires_at FROM whatsapp_keys")
    assert all(created <= updated <= NOW for _, created, updated, _ in rows)
    short = {"lid-mapping", "pre-key", "session", "sender-key"}
    assert all(expires - updated == timedelta(days=7 if kind in short else 14) for kind, _, updated, expires in rows)
    just_now = Counter(kind for kind, _, updated, _ in rows if NOW - updated < timedelta(minutes=10))
    assert just_now["session"] > 10
    assert sum(NOW - updated > timedelta(days=30) for _, _, updated, _ in rows) > 500


def test_a_seed_determines_the_fleet_whatever_its_size(database: Database) -> None:
    rows = "SELECT k::text FROM whatsapp_keys k WHERE company_id = '962303' ORDER BY key_type, key_id"
    digests = []
    for asked in ({"companies": 2}, {"companies": 3}, {"companies": 2, "seed": 2}):
        database.execute("TRUNCATE whatsapp_keys, whatsapp_auth")
        seeded(database, **asked)
        digests.append((database.execute(rows), all_creds(database)[1]))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
    assert digests[0][1]["noiseKey"] != digests[2][1]["noiseKey"]


def test_a_pool_of_key_pairs_is_shared(database: Database) -> None:
    seeded(database, companies=2, key_pair_pool=3, forms=["base64"])
    pre_keys = [*keys_of(database, "pre-key").values(), *keys_of(database, "pre-key", "962303").values()]
    assert len({pair["private"]["data"] for pair in pre_keys}) == 3
    assert all(map(is_key_pair, pre_keys))
    assert len({creds["noiseKey"]["private"]["data"] for creds in all_creds(database)}) == 2
