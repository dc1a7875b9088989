"""Realistic fleets of companies, for drills, tests and benchmarks.

Their keys are of the kinds and in the proportions of a production company, and valid wherever that can be checked
offline: every key pair is one, every signature verifies, every reference is met (docs/baileys.md sections 2, 3 and 5).
But no phone knows these companies, and their conversations have no other side.
"""

from __future__ import annotations

import random
from binascii import b2a_base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from opsctl.baileys.buffers import StoredForm
from opsctl.baileys.key_types import lifetime
from opsctl.baileys.xeddsa import sign
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import psycopg

FIRST_COMPANY_ID = 962302
FEWEST_KEYS = 40  # of a company with every type

ROWS_AT_ONCE = 16  # few, so that PostgreSQL stores them while we make the next: a fifth faster than a company at once

# The 2,317 keys of a production company.
PRODUCTION_KEYS = {
    "pre-key": 812,  # what Baileys 7 uploads at pairing
    "session": 574,
    "identity-key": 250,
    "device-list": 200,
    "lid-mapping": 172,
    "sender-key": 150,
    "tctoken": 121,
    "sender-key-memory": 25,
    "app-state-sync-key": 8,
    "app-state-sync-version": 5,
}
COLLECTIONS = ("critical_block", "critical_unblock_low", "regular_high", "regular_low", "regular")

# The reference service stores what JSON.stringify makes of a Buffer; other versions wrote the rest.
USUAL_FORMS = (
    StoredForm.JSON_STRINGIFY,
    StoredForm.JSON_STRINGIFY,
    StoredForm.JSON_STRINGIFY,
    StoredForm.BASE64,
    StoredForm.UINT8ARRAY,
)

# Every message changes these, so some of them changed within the last minutes.
BUSY = frozenset({"session", "sender-key"})
BUSY_SHARE = 0.06
JUST_NOW = timedelta(minutes=10)

# libsignal's ChainType and BaseKeyType, and its time of closing of a session that is open.
SENDING, RECEIVING = 1, 2
OURS, THEIRS = 1, 2
NOT_CLOSED = -1

# What accountSignature and deviceSignature of a companion device begin with (Baileys, WA_ADV_*_SIG_PREFIX).
ACCOUNT_SIGNATURE_PREFIX, DEVICE_SIGNATURE_PREFIX = b"\x06\x00", b"\x06\x01"

Json = dict[str, Any] | list[Any] | str


@dataclass(frozen=True)
class FleetSummary:
    """What was written."""

    company_ids: tuple[str, ...]
    keys_by_type: Mapping[str, int]

    @property
    def keys(self) -> int:
        return sum(self.keys_by_type.values())


class KeyPair(NamedTuple):
    """An X25519 key pair, 32 bytes each."""

    private: bytes
    public: bytes

    @property
    def signal_public(self) -> bytes:
        """As Signal sends it: behind its type, 5."""
        return b"\x05" + self.public


class Contact(NamedTuple):
    """Somebody with whom a company writes: phone number and lid, both without a server."""

    number: str
    lid: str
    lid_is_known: bool

    @property
    def jid(self) -> str:
        return f"{self.lid}@lid" if self.lid_is_known else f"{self.number}@s.whatsapp.net"

    @property
    def signal_name(self) -> str:
        """The name in a Signal address, where `_1` stands for the lids' server."""
        return f"{self.lid}_1" if self.lid_is_known else self.number


class Key(NamedTuple):
    """A row of whatsapp_keys, before its company and its other times."""

    key_type: str
    key_id: str
    value: Json
    updated_at: datetime


def create_schema(connection: psycopg.Connection) -> None:
    """Create the tables and indexes of production; the caller commits."""
    connection.execute(query("schema"))


def seed_fleet(
    connection: psycopg.Connection,
    *,
    companies: int,
    keys_per_company: int,
    seed: int,
    forms: Sequence[str] = USUAL_FORMS,
    now: datetime | None = None,
    key_pair_pool: int = 0,
) -> FleetSummary:
    """Write the companies 962302, 962303, ... with `keys_per_company` keys each; the caller commits.

    The same `seed` makes the same keys, whatever the number of companies; times count back from `now`. The company at
    index i stores its bytes in `forms[i % len(forms)]`: "json-stringify", "base64" or "uint8array". With a
    `key_pair_pool` all pre-keys and sessions share that many key pairs, whose making is a large part of the time.

    Raises ValueError for fewer than 40 keys per company, and KeyError for a form that is none of these.
    """
    counts = _key_counts(keys_per_company)
    bytes_as = [BYTES_AS[form] for form in forms]
    until = now or datetime.now(UTC)
    source = _source(seed, "pool")
    pool = [_key_pair(source) for _ in range(key_pair_pool)]
    fleet = [
        _Company(index, seed=seed, counts=counts, bytes_as=bytes_as[index % len(bytes_as)], now=until, pool=pool)
        for index in range(companies)
    ]
    with connection.cursor() as cursor:
        with cursor.copy(query("seed_auth")) as copy:
            for company in fleet:
                copy.write(company.auth_line())
        with cursor.copy(query("seed_keys")) as copy:
            lines = chain.from_iterable(company.key_lines() for company in fleet)
            while batch := b"".join(islice(lines, ROWS_AT_ONCE)):
                copy.write(batch)
    return FleetSummary(
        company_ids=tuple(company.company_id for company in fleet),
        keys_by_type={key_type: count * companies for key_type, count in counts.items()},
    )


class _Company:
    """One company: what its rows have to agree on, and the rows, as lines of COPY's text format."""

    def __init__(
        self,
        index: int,
        *,
        seed: int,
        counts: Mapping[str, int],
        bytes_as: Callable[[bytes], Json],
        now: datetime,
        pool: Sequence[KeyPair],
    ) -> None:
        self.company_id = str(FIRST_COMPANY_ID + index)
        self._random = _source(seed, self.company_id)
        self._counts = counts
        self._bytes_as = bytes_as
        self._now = now
        self._pool = pool
        self._paired_at = now - timedelta(days=self._random.uniform(40, 300))
        self._number, self._lid, self._device = self._digits("4915"), self._digits("18"), self._random.randrange(1, 60)
        self._contacts = self._some_contacts()
        self._groups = [f"{self._digits('120363', 18)}@g.us" for _ in range(counts["sender-key-memory"])]
        self._pre_key_ids = self._unconsumed_pre_key_ids()
        self._app_state_key_ids = [self._app_state_key_id() for _ in range(counts["app-state-sync-key"])]
        # Baileys until 6.7.18 wrote an array, later ones a Buffer; a company has one encoding.
        self._sender_keys_are_arrays = index % 4 == 2

    def auth_line(self) -> bytes:
        """The row of whatsapp_auth."""
        updated_at = self._now - timedelta(seconds=self._random.uniform(0, 600))
        return _line(self.company_id, _json(self._creds()), _time(self._paired_at), _time(updated_at))

    def key_lines(self) -> Iterator[bytes]:
        """The rows of whatsapp_keys."""
        for make in (
            self._pre_keys,
            self._sessions,
            self._device_lists,
            self._lid_mappings,
            self._sender_keys,
            self._sender_key_memories,
            self._trusted_contact_tokens,
            self._app_state,
        ):
            for key_type, key_id, value, updated_at in make():
                expires_at = updated_at + lifetime(key_type)
                created_at = self._paired_at + (updated_at - self._paired_at) * self._random.random()
                times = (created_at, updated_at, expires_at)
                yield _line(self.company_id, key_type, key_id, _json(value), *map(_time, times))

    def _creds(self) -> Json:
        """Creds of a registered device, as Baileys 7 saves them."""
        identity, signed_pre_key, phone = (_key_pair(self._random) for _ in range(3))
        next_pre_key_id = self._pre_key_ids[-1] + 1
        paired_at_s = int(self._paired_at.timestamp())
        details = b"\x08\x01\x10" + _varint(paired_at_s) + b"\x18\x01"  # ADVDeviceIdentity: rawId, timestamp, keyIndex
        signed = details + identity.public
        account_signature = self._sign(phone, ACCOUNT_SIGNATURE_PREFIX + signed)
        device_signature = self._sign(identity, DEVICE_SIGNATURE_PREFIX + signed + phone.public)
        lid = f"{self._lid}:{self._device}@lid"
        return {
            "noiseKey": self._pair(_key_pair(self._random)),
            "pairingEphemeralKeyPair": self._pair(_key_pair(self._random)),
            "signedIdentityKey": self._pair(identity),
            "signedPreKey": {
                "keyPair": self._pair(signed_pre_key),
                "signature": self._bytes_as(self._sign(identity, signed_pre_key.signal_public)),
                "keyId": 1,
            },
            "registrationId": self._random.randrange(1, 1 << 14),
            "advSecretKey": self._secret(),
            "processedHistoryMessages": [
                {
                    "key": {
                        "remoteJid": f"{self._number}@s.whatsapp.net",
                        "fromMe": True,
                        "id": self._random.randbytes(10).hex().upper(),
                    },
                    "messageTimestamp": paired_at_s + seconds,
                }
                for seconds in (4, 9)
            ],
            "nextPreKeyId": next_pre_key_id,
            "firstUnuploadedPreKeyId": next_pre_key_id,
            "accountSyncCounter": 1,
            "accountSettings": {"unarchiveChats": False},
            "registered": False,
            "lastPropHash": "1K7Yg",
            "routingInfo": self._bytes_as(self._random.randbytes(10)),
            "account": {
                "details": _base64(details),
                "accountSignatureKey": _base64(phone.public),
                "accountSignature": _base64(account_signature),
                "deviceSignature": _base64(device_signature),
            },
            "me": {
                "id": f"{self._number}:{self._device}@s.whatsapp.net",
                "lid": lid,
                "name": f"Müller & Söhne {self.company_id}",
            },
            "signalIdentities": [
                {
                    "identifier": {"name": lid, "deviceId": 0},
                    "identifierKey": self._bytes_as(phone.signal_public),
                }
            ],
            "platform": "smba",
            "lastAccountSyncTimestamp": paired_at_s + 12,
            "myAppStateKeyId": self._app_state_key_ids[-1],
        }

    def _pre_keys(self) -> Iterator[Key]:
        """Written once, in the order of their ids."""
        age = self._now - self._paired_at
        for number in self._pre_key_ids:
            written_at = self._paired_at + age * (number / self._pre_key_ids[-1])
            yield Key("pre-key", str(number), self._pair(self._drawn_pair()), written_at)

    def _sessions(self) -> Iterator[Key]:
        """Sessions, and the identity keys of the first of them."""
        for index, contact in enumerate(self._contacts):
            address = f"{contact.signal_name}.{self._random.choice((0, 0, 0, 3, 12))}"
            identity = b"\x05" + self._random.randbytes(32)
            used_at = self._last_write("session")
            sessions = [self._session(identity, used_at, closed=False)]
            if self._random.random() < 0.1:  # an older one was closed
                sessions.insert(0, self._session(identity, self._paired_at, closed=True))
            by_base_key = {session["indexInfo"]["baseKey"]: session for session in sessions}
            yield Key("session", address, {"_sessions": by_base_key, "version": "v1"}, used_at)
            if index < self._counts["identity-key"]:
                yield Key("identity-key", address, self._bytes_as(identity), self._last_write("identity-key"))

    def _session(self, identity: bytes, used_at: datetime, *, closed: bool) -> dict[str, Any]:
        """One entry of a session record, as libsignal serialises it: every byte string is bare base64."""
        ratchet, used_ms = self._drawn_pair(), int(used_at.timestamp() * 1000)
        base_key, remote_key = self._signal_key(), self._signal_key()
        unanswered = not closed and self._random.random() < 0.1  # we wrote first
        chains: dict[str, Json] = {}
        if not unanswered:
            for _ in range(self._random.randrange(4)):  # of past turns only the counters are left
                chains[self._signal_key()] = _chain(RECEIVING, self._random.randrange(1, 9))
            skipped = {str(number): self._secret() for number in range(self._random.choice((0, 0, 0, 1, 3)))}
            chains[remote_key] = _chain(RECEIVING, len(skipped) + 1, self._secret(), skipped)
        chains[_base64(ratchet.signal_public)] = _chain(SENDING, self._random.randrange(-1, 9), self._secret())
        session: dict[str, Any] = {
            "registrationId": self._random.randrange(1, 1 << 14),
            "currentRatchet": {
                "ephemeralKeyPair": {"pubKey": _base64(ratchet.signal_public), "privKey": _base64(ratchet.private)},
                "lastRemoteEphemeralKey": remote_key,
                "previousCounter": self._random.randrange(9),
                "rootKey": self._secret(),
            },
            "indexInfo": {
                "baseKey": base_key,
                "baseKeyType": OURS if unanswered else THEIRS,
                "closed": used_ms if closed else NOT_CLOSED,
                "used": used_ms,
                "created": int(self._paired_at.timestamp() * 1000),
                "remoteIdentityKey": _base64(identity),
            },
            "_chains": chains,
        }
        if unanswered:
            pre_key_id = self._random.randrange(1, 1 << 24)
            session["pendingPreKey"] = {"signedKeyId": 1, "baseKey": base_key, "preKeyId": pre_key_id}
        return session

    def _device_lists(self) -> Iterator[Key]:
        """Our own devices and the contacts'."""
        yield Key("device-list", self._number, ["0", str(self._device)], self._last_write("device-list"))
        for contact in self._contacts[: self._counts["device-list"] - 1]:
            devices = self._random.choice((["0"], ["0", "5"], ["0", "12", "31"]))
            yield Key("device-list", contact.number, devices, self._last_write("device-list"))

    def _lid_mappings(self) -> Iterator[Key]:
        """Pairs, both written at once: our own, and those of the contacts whose lid is known."""
        known = [(contact.number, contact.lid) for contact in self._contacts if contact.lid_is_known]
        for number, lid in [(self._number, self._lid), *known]:
            written_at = self._last_write("lid-mapping")
            yield Key("lid-mapping", number, lid, written_at)
            yield Key("lid-mapping", f"{lid}_reverse", number, written_at)

    def _sender_keys(self) -> Iterator[Key]:
        """Our own in each group, and the others' in turn."""
        count = self._counts["sender-key"]
        for group in self._groups:
            key_id = f"{group}::{self._lid}_1::{self._device}"
            yield Key("sender-key", key_id, self._sender_key(own=True), self._last_write("sender-key"))
        for index in range(count - len(self._groups)):
            group = self._groups[index % len(self._groups)]
            contact = self._contacts[index // len(self._groups) % len(self._contacts)]
            key_id = f"{group}::{contact.signal_name}::0"
            yield Key("sender-key", key_id, self._sender_key(own=False), self._last_write("sender-key"))

    def _sender_key(self, *, own: bool) -> Json:
        """Only of our own sender keys do we have the private half."""
        # Inside the newer encoding JSON.stringify is at work, whatever the form outside.
        bytes_as = self._bytes_as if self._sender_keys_are_arrays else _as_json_stringify
        if own:
            pair = self._drawn_pair()
            signing_key = {"public": bytes_as(pair.signal_public), "private": bytes_as(pair.private)}
        else:
            signing_key = {"public": bytes_as(b"\x05" + self._random.randbytes(32))}
        state = {
            "senderKeyId": self._random.randrange(1 << 31),
            "senderChainKey": {
                "iteration": self._random.randrange(1, 200),
                "seed": bytes_as(self._random.randbytes(32)),
            },
            "senderSigningKey": signing_key,
            "senderMessageKeys": [],
        }
        return [state] if self._sender_keys_are_arrays else self._bytes_as(orjson.dumps([state]))

    def _sender_key_memories(self) -> Iterator[Key]:
        """Who has our own sender key of a group."""
        for group in self._groups:
            members = self._random.sample(self._contacts, min(len(self._contacts), self._random.randrange(1, 12)))
            value: Json = {member.jid: True for member in members}
            yield Key("sender-key-memory", group, value, self._last_write("sender-key-memory"))

    def _trusted_contact_tokens(self) -> Iterator[Key]:
        """Tokens, and the index that lists them."""
        trusted = [contact.jid for contact in self._contacts[: self._counts["tctoken"] - 1]]
        for jid in trusted:
            written_at = self._last_write("tctoken")
            value: Json = {
                "token": self._bytes_as(self._random.randbytes(12)),
                "timestamp": str(int(written_at.timestamp())),
            }
            yield Key("tctoken", jid, value, written_at)
        yield Key("tctoken", "__index", {"token": self._bytes_as(orjson.dumps(trusted))}, self._last_write("tctoken"))

    def _app_state(self) -> Iterator[Key]:
        """Keys as protobuf's JSON has them, and the collections they decrypt."""
        for index, key_id in enumerate(self._app_state_key_ids):
            written_at = self._last_write("app-state-sync-key")
            value: Json = {
                "keyData": self._secret(),
                "fingerprint": {
                    "rawId": self._random.randrange(1 << 31),
                    "currentIndex": index,
                    "deviceIndexes": [0, 1],
                },
                "timestamp": str(int(written_at.timestamp() * 1000)),
            }
            yield Key("app-state-sync-key", key_id, value, written_at)
        for collection in COLLECTIONS:
            entries = range(self._random.randrange(20))
            value = {
                "version": len(entries),
                "hash": self._bytes_as(self._random.randbytes(128)),
                "indexValueMap": {
                    self._secret(): {"valueMac": self._bytes_as(self._random.randbytes(32))} for _ in entries
                },
            }
            yield Key("app-state-sync-version", collection, value, self._last_write("app-state-sync-version"))

    def _some_contacts(self) -> list[Contact]:
        """One for each session; lids are known of as many as there are lid-mappings besides our own pair."""
        known = self._counts["lid-mapping"] // 2 - 1
        return [
            Contact(self._digits("4917"), self._digits("18"), lid_is_known=index < known)
            for index in range(self._counts["session"])
        ]

    def _unconsumed_pre_key_ids(self) -> list[int]:
        """Ascending, with gaps where a pre-key was consumed."""
        count = self._counts["pre-key"]
        return sorted(self._random.sample(range(1, count + count // 4 + 2), count))

    def _app_state_key_id(self) -> str:
        """Base64 of six bytes, with both characters that tell it from a file's name."""
        return _base64(self._random.randbytes(3) + b"\xfb\xef\xff")

    def _last_write(self, key_type: str) -> datetime:
        """Some chats are alive, most are quiet: evenly over the orders of magnitude, with more weight on the old."""
        if key_type in BUSY and self._random.random() < BUSY_SHARE:
            return self._now - JUST_NOW * self._random.random()
        longest = (self._now - self._paired_at) / JUST_NOW
        age: float = longest ** (self._random.random() ** 0.5)
        return self._now - JUST_NOW * age

    def _drawn_pair(self) -> KeyPair:
        return self._random.choice(self._pool) if self._pool else _key_pair(self._random)

    def _pair(self, pair: KeyPair) -> Json:
        return {"private": self._bytes_as(pair.private), "public": self._bytes_as(pair.public)}

    def _sign(self, pair: KeyPair, message: bytes) -> bytes:
        return sign(pair.private, message, self._random.randbytes(64))

    def _secret(self) -> str:
        return _base64(self._random.randbytes(32))

    def _signal_key(self) -> str:
        return _base64(b"\x05" + self._random.randbytes(32))

    def _digits(self, prefix: str, length: int = 15) -> str:
        return prefix + f"{self._random.randrange(10 ** (length - len(prefix))):0{length - len(prefix)}}"


def _key_counts(total: int) -> dict[str, int]:
    """How many keys of each type make up `total`, in the proportions of production; the rest is sessions."""
    if total < FEWEST_KEYS:
        raise ValueError(f"a company has at least {FEWEST_KEYS} keys, not {total}")
    whole = sum(PRODUCTION_KEYS.values())
    counts = {key_type: max(1, total * count // whole) for key_type, count in PRODUCTION_KEYS.items()}
    counts["app-state-sync-version"] = len(COLLECTIONS)
    counts["lid-mapping"] += counts["lid-mapping"] % 2  # they come in pairs
    counts["tctoken"] = max(2, counts["tctoken"])  # one of them is the index
    counts["session"] += total - sum(counts.values())
    return counts


def _source(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")  # noqa: S311 - the same keys again are what is wanted here


def _key_pair(source: random.Random) -> KeyPair:
    """A pair as libsignal makes it, with the private key already clamped (RFC 7748 section 5)."""
    private = bytearray(source.randbytes(32))
    private[0] &= 248
    private[31] = private[31] & 127 | 64
    public = X25519PrivateKey.from_private_bytes(bytes(private)).public_key().public_bytes_raw()
    return KeyPair(bytes(private), public)


def _chain(kind: int, counter: int, key: str | None = None, message_keys: Mapping[str, str] | None = None) -> Json:
    """A ratchet's chain; without a key it was closed."""
    chain_key: dict[str, int | str] = {"counter": counter}
    if key is not None:
        chain_key["key"] = key
    return {"chainKey": chain_key, "chainType": kind, "messageKeys": dict(message_keys or {})}


def _as_json_stringify(data: bytes) -> Json:
    return {"type": "Buffer", "data": list(data)}


def _as_base64(data: bytes) -> Json:
    return {"type": "Buffer", "data": _base64(data)}


def _as_uint8array(data: bytes) -> Json:
    return {str(index): byte for index, byte in enumerate(data)}


BYTES_AS: Mapping[str, Callable[[bytes], Json]] = {
    StoredForm.JSON_STRINGIFY: _as_json_stringify,
    StoredForm.BASE64: _as_base64,
    StoredForm.UINT8ARRAY: _as_uint8array,
}


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


def _varint(number: int) -> bytes:
    """Protobuf's: seven bits in a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _json(value: Json) -> str:
    return orjson.dumps(value).decode()


def _time(moment: datetime) -> str:
    return moment.isoformat()


def _line(*columns: str) -> bytes:
    """A row of COPY's text format: nothing here holds a tab or a newline, but JSON may hold backslashes."""
    return ("\t".join(columns).replace("\\", "\\\\") + "\n").encode()
