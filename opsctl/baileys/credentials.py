"""Will these credentials log in? As far as bytes can tell (docs/baileys.md sections 4 and 5).

No check without WhatsApp can prove that it still knows the device.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import orjson

from opsctl.baileys import xeddsa
from opsctl.baileys.buffers import bytes_of, is_double_encoded
from opsctl.baileys.key_types import own_sender_key_ids, sender_key_encoding

KEY_ID_LIMIT: Final = 2**24  # key ids travel in three bytes
STALE_MARGIN: Final = 1_000  # pre-key ids that a service may have used since a copy of unknown age was taken

_KEY_TYPE_BYTE: Final = b"\x05"  # before a public key in a signature and in an identifierKey: Curve25519
_PRE_KEY_ID: Final = re.compile("[0-9]{1,8}")  # 2**24 has eight digits
_REVERSE: Final = "_reverse"
_ME_ID: Final = re.compile(r"[^:@/\s]+(?::[0-9]+)?@[^@\s]+")


class Severity(StrEnum):
    """What a finding means for a start of the service."""

    UNUSABLE = "unusable"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong; `code` is stable, `message` holds no key material."""

    severity: Severity
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one creds.json says of itself. Fields that it lacks, or that are of another type, are None."""

    findings: tuple[Finding, ...]
    me_id: str | None = None
    me_lid: str | None = None
    registered: bool = False
    next_pre_key_id: int | None = None
    first_unuploaded_pre_key_id: int | None = None
    my_app_state_key_id: str | None = None

    @property
    def unusable(self) -> bool:
        """Whether Baileys cannot log in with them at all."""
        return any(finding.severity is Severity.UNUSABLE for finding in self.findings)


def examine(creds: bytes) -> Credentials:
    """Check a creds.json by itself, its bytes in any stored form; `consistency` checks it against the keys."""
    try:
        value = orjson.loads(creds)
    except orjson.JSONDecodeError:
        return Credentials((_unusable("not-json", "creds are not valid JSON"),))
    if not isinstance(value, dict):
        return Credentials((_unusable("not-an-object", "creds are not a JSON object"),))
    me_id, me_lid = _text(value, "me", "id"), _text(value, "me", "lid")
    registered = me_id is not None and _ME_ID.fullmatch(me_id) is not None and _account_complete(value)
    return Credentials(
        findings=(
            *_byte_findings(value),
            *_proof_findings(value),
            *_account_findings(value, registered=registered),
            *_number_findings(value),
        ),
        me_id=me_id,
        me_lid=me_lid,
        registered=registered,
        next_pre_key_id=_integer(value, "nextPreKeyId"),
        first_unuploaded_pre_key_id=_integer(value, "firstUnuploadedPreKeyId"),
        my_app_state_key_id=_text(value, "myAppStateKeyId"),
    )


def key_pair_matches(private: bytes, public: bytes) -> bool:
    """Whether X25519(private) is `public`, which may carry Signal's 0x05 as Baileys' generateSignalPubKey allows."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    if len(private) != 32:
        return False
    derived = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return public in {derived, _KEY_TYPE_BYTE + derived}


def verify_signature(identity_public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the identity key signed `message`; for a signedPreKey that is 0x05 || its public key."""
    return xeddsa.verify(identity_public, message, signature)


def me_fingerprint(me_id: str) -> str:
    """A name for an account that tells nobody its telephone number by sight.

    >>> me_fingerprint("79001234567:1@s.whatsapp.net")[:12]
    '2b0c8cb645fa'
    """
    return hashlib.sha256(me_id.encode()).hexdigest()


def with_pre_key_ids_raised(creds: bytes, *, highest_pre_key_id: int | None, fresh: bool) -> bytes:
    """The creds with counters under which no pre-key id is given out twice (docs/baileys.md section 4).

    `fresh`: the copy was taken after the service was proven stopped. Then consistent creds come back as the same bytes;
    of any other copy nobody knows how many ids were used since, so both counters skip a thousand. Creds whose counters
    cannot be read come back as they are: `examine` reports them.

    >>> with_pre_key_ids_raised(b'{"nextPreKeyId":31,"firstUnuploadedPreKeyId":31}', highest_pre_key_id=35, fresh=True)
    b'{"nextPreKeyId":36,"firstUnuploadedPreKeyId":36}'
    """
    try:
        value = orjson.loads(creds)
    except orjson.JSONDecodeError:
        return creds
    if not isinstance(value, dict):
        return creds
    following, unuploaded = _integer(value, "nextPreKeyId"), _integer(value, "firstUnuploadedPreKeyId")
    if following is None or unuploaded is None:
        return creds
    beyond = 0 if highest_pre_key_id is None else highest_pre_key_id + 1
    if not fresh:
        raised = max(following, unuploaded, beyond) + STALE_MARGIN
    elif beyond > following:
        raised = beyond
    else:
        return creds
    # Never down, not even to get below the limit.
    value["nextPreKeyId"] = max(following, min(raised, KEY_ID_LIMIT - 1))
    value["firstUnuploadedPreKeyId"] = max(unuploaded, min(raised, KEY_ID_LIMIT - 1))
    return orjson.dumps(value)


def with_pre_key_ids_of(creds: bytes, other: bytes) -> bytes:
    """The creds with counters that are no lower than those of `other`, the same account's.

    Where `other` has given out ids that these have not, both counters skip them: raising one alone uploads used ids.

    >>> ours = b'{"nextPreKeyId":31,"firstUnuploadedPreKeyId":31}'
    >>> with_pre_key_ids_of(ours, b'{"nextPreKeyId":40,"firstUnuploadedPreKeyId":35}')
    b'{"nextPreKeyId":40,"firstUnuploadedPreKeyId":40}'
    """
    value, theirs = _object(creds), _object(other)
    following, unuploaded = _integer(theirs, "nextPreKeyId"), _integer(theirs, "firstUnuploadedPreKeyId")
    own = _integer(value, "nextPreKeyId")
    if following is not None and own is not None and following > own:
        return with_pre_key_ids_at_least(creds, following)
    own_unuploaded = _integer(value, "firstUnuploadedPreKeyId")
    if unuploaded is None or own_unuploaded is None or own is None or unuploaded <= own_unuploaded:
        return creds
    return orjson.dumps(value | {"firstUnuploadedPreKeyId": min(unuploaded, own)})


def with_pre_key_ids_at_least(creds: bytes, number: int) -> bytes:
    """The creds with both counters at `number` or above, never at or above the limit and never lowered."""
    value = _object(creds)
    following, unuploaded = _integer(value, "nextPreKeyId"), _integer(value, "firstUnuploadedPreKeyId")
    number = min(number, KEY_ID_LIMIT - 1)
    if following is None or unuploaded is None or (following >= number and unuploaded >= number):
        return creds
    return orjson.dumps(
        value | {"nextPreKeyId": max(following, number), "firstUnuploadedPreKeyId": max(unuploaded, number)}
    )


def pre_key_number(key_id: str) -> int | None:
    """The number of a pre-key, None for an id that is none."""
    return int(key_id) if _PRE_KEY_ID.fullmatch(key_id) else None


SUMMARISED: Final = frozenset({"pre-key", "lid-mapping", "sender-key", "sender-key-memory", "app-state-sync-key"})
"""The key types that a `KeySummary` takes note of."""


class KeySummary:
    """What `consistency` wants to know of all keys of one company, gathered one by one in about 8 bytes per sender-key.

    Ids are kept as hashes of this process: a collision, one in 10^14 for a company, would hide a warning.
    """

    __slots__ = (
        "_app_state_keys",
        "_lid_pairs",
        "_memory_groups",
        "_sender_keys",
        "highest_pre_key_id",
        "lid_forward",
        "lid_reverse",
        "sender_key_encodings",
    )

    def __init__(self) -> None:
        self.highest_pre_key_id: int | None = None
        self.sender_key_encodings: set[str] = set()
        self.lid_forward = 0
        self.lid_reverse = 0
        self._lid_pairs = 0  # exclusive or of the hashes of all pairs: each pair comes twice, and leaves nothing
        self._app_state_keys: set[str] = set()
        self._memory_groups: set[str] = set()
        self._sender_keys = array("q")

    def add(self, key_type: str, key_id: str, data: bytes) -> None:
        """Take note of one key and its normalised value."""
        if key_type == "pre-key":
            self._add_pre_key(key_id)
        elif key_type == "lid-mapping":
            self._add_lid(key_id, data[1:-1].decode(errors="replace"))
        elif key_type == "sender-key":
            self._sender_keys.append(hash(key_id))
            encoding = sender_key_encoding(data)
            if encoding is not None:
                self.sender_key_encodings.add(encoding)
        elif key_type == "sender-key-memory":
            if data != b"{}":
                self._memory_groups.add(key_id)
        elif key_type == "app-state-sync-key":
            self._app_state_keys.add(key_id)

    def _add_pre_key(self, key_id: str) -> None:
        number = pre_key_number(key_id)
        if number is not None:
            self.highest_pre_key_id = max(number, self.highest_pre_key_id or 0)

    def _add_lid(self, key_id: str, other: str) -> None:
        if key_id.endswith(_REVERSE):
            self.lid_reverse += 1
            self._lid_pairs ^= hash((other, key_id[: -len(_REVERSE)]))
        else:
            self.lid_forward += 1
            self._lid_pairs ^= hash((key_id, other))

    @property
    def lid_pairs_symmetric(self) -> bool:
        """Whether every pn -> lid has its lid -> pn."""
        return self._lid_pairs == 0 and self.lid_forward == self.lid_reverse

    def has_app_state_key(self, key_id: str) -> bool:
        """Whether there is an app-state-sync-key of this id."""
        return key_id in self._app_state_keys

    def memories_without_own_sender_key(self, me_id: str | None, me_lid: str | None) -> int:
        """How many groups have a sender-key-memory, but no sender-key of our own that its members could remember."""
        wanted = {
            hash(sender_key_id): group
            for group in self._memory_groups
            for sender_key_id in own_sender_key_ids(group, me_id, me_lid)
        }
        found = {wanted[hashed] for hashed in self._sender_keys if hashed in wanted}
        return len(self._memory_groups) - len(found)


def consistency(credentials: Credentials, keys: KeySummary) -> tuple[Finding, ...]:
    """Check the credentials against the keys beside them. All are warnings: none keeps Baileys from logging in."""
    findings = []
    highest, following = keys.highest_pre_key_id, credentials.next_pre_key_id
    if highest is not None and following is not None and highest >= following:
        findings.append(
            _warning(
                "pre-key-beyond-next", f"pre-key {highest} exists, but nextPreKeyId is {following}: ids get used twice"
            )
        )
    app_state_key = credentials.my_app_state_key_id
    if app_state_key is not None and not keys.has_app_state_key(app_state_key):
        findings.append(
            _warning("app-state-key-missing", "myAppStateKeyId names an app-state-sync-key that is not there")
        )
    if not keys.lid_pairs_symmetric:
        counts = f"{keys.lid_forward} to a LID, {keys.lid_reverse} back"
        findings.append(_warning("lid-pairs-asymmetric", f"lid-mapping is not made of pairs: {counts}"))
    lost = keys.memories_without_own_sender_key(credentials.me_id, credentials.me_lid)
    if lost and credentials.me_id is not None:
        findings.append(
            _warning(
                "memory-without-own-sender-key",
                f"{lost} groups have a sender-key-memory but no sender-key of our own: "
                'their members will read "Waiting for this message"',
            )
        )
    if len(keys.sender_key_encodings) > 1:
        findings.append(
            _warning("mixed-sender-keys", "sender-keys in both encodings: Baileys 7 cannot read those that are arrays")
        )
    return tuple(findings)


def _unusable(code: str, message: str) -> Finding:
    return Finding(Severity.UNUSABLE, code, message)


def _warning(code: str, message: str) -> Finding:
    return Finding(Severity.WARNING, code, message)


def _object(creds: bytes) -> dict[str, object]:
    """Credentials as an object, an empty one where they are none."""
    try:
        value = orjson.loads(creds)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _at(value: object, *path: str) -> object:
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _text(creds: dict[str, object], *path: str) -> str | None:
    value = _at(creds, *path)
    return value if isinstance(value, str) and value else None


def _integer(creds: dict[str, object], *path: str) -> int | None:
    value = _at(creds, *path)
    return value if type(value) is int else None


def _bytes(creds: dict[str, object], path: str) -> bytes | None:
    return bytes_of(_at(creds, *path.split(".")))


def _bare_bytes(value: object) -> bytes | None:
    """Bytes as protobufjs prints and reads them: a bare base64 string, or a byte object."""
    return bytes_of({"type": "Buffer", "data": value}) if isinstance(value, str) and value else bytes_of(value)


def _byte_findings(creds: dict[str, object]) -> Iterator[Finding]:
    for path, size_bytes in _BYTE_FIELDS.items():
        yield from _field_findings(path, _bytes(creds, path), size_bytes)
    yield from _field_findings("advSecretKey", _bare_bytes(creds.get("advSecretKey")), 32)
    identities = creds.get("signalIdentities")
    for identity in identities if isinstance(identities, list) else []:
        yield from _field_findings("signalIdentities[].identifierKey", bytes_of(_at(identity, "identifierKey")), 33)


def _field_findings(name: str, data: bytes | None, size_bytes: int) -> Iterator[Finding]:
    if data is None:
        yield _unusable("missing-bytes", f"{name} is missing or holds no bytes")
    elif is_double_encoded(data):
        yield _unusable("double-encoded", f"{name} is encoded twice")
    elif len(data) != size_bytes:
        yield _unusable("wrong-length", f"{name} has {len(data)} bytes instead of {size_bytes}")


def _proof_findings(creds: dict[str, object]) -> Iterator[Finding]:
    for path in _KEY_PAIRS:
        private, public = _bytes(creds, f"{path}.private"), _bytes(creds, f"{path}.public")
        if private is None or public is None or len(private) != 32 or len(public) != 32:
            continue  # reported already
        if not key_pair_matches(private, public):
            yield _unusable("key-pair-mismatch", f"{path}.public is not the public key of {path}.private")
    identity = _bytes(creds, "signedIdentityKey.public")
    public, signature = _bytes(creds, "signedPreKey.keyPair.public"), _bytes(creds, "signedPreKey.signature")
    if identity is None or public is None or signature is None:
        return
    if len(identity) != 32 or len(public) != 32 or len(signature) != 64:
        return
    if not verify_signature(identity, _KEY_TYPE_BYTE + public, signature):
        yield _unusable("wrong-signature", "signedPreKey.signature is not one of signedIdentityKey")


def _account_complete(creds: dict[str, object]) -> bool:
    account = creds.get("account")
    return all(_bare_bytes(_at(account, name)) is not None for name in ("details", *_ACCOUNT_FIELDS))


def _account_findings(creds: dict[str, object], *, registered: bool) -> Iterator[Finding]:
    if not registered:
        yield _warning("not-registered", "abandoned pairing: will ask for a QR code")
    account = creds.get("account")
    for name, size_bytes in _ACCOUNT_FIELDS.items():
        data = _bare_bytes(_at(account, name))
        if data is not None:
            yield from _field_findings(f"account.{name}", data, size_bytes)
    if registered and not creds.get("signalIdentities"):
        yield _warning("no-signal-identities", "signalIdentities is empty")


def _number_findings(creds: dict[str, object]) -> Iterator[Finding]:
    registration_id = _integer(creds, "registrationId")
    if registration_id is None or not 0 <= registration_id < 2**14:
        yield _warning("registration-id", "registrationId is not a number of 14 bits")
    for path in ("signedPreKey.keyId", "nextPreKeyId", "firstUnuploadedPreKeyId"):
        key_id = _integer(creds, *path.split("."))
        if key_id is None or not 0 <= key_id < KEY_ID_LIMIT:
            yield _warning("key-id-range", f"{path} is not a number of 24 bits")
    following, unuploaded = _integer(creds, "nextPreKeyId"), _integer(creds, "firstUnuploadedPreKeyId")
    if following is not None and unuploaded is not None and unuploaded > following:
        yield _warning("unuploaded-beyond-next", f"firstUnuploadedPreKeyId {unuploaded} > nextPreKeyId {following}")


_KEY_PAIRS: Final = ("noiseKey", "signedIdentityKey", "signedPreKey.keyPair")
_BYTE_FIELDS: Final = {
    **{f"{pair}.{half}": 32 for pair in _KEY_PAIRS for half in ("private", "public")},
    "signedPreKey.signature": 64,
}
_ACCOUNT_FIELDS: Final = {"accountSignatureKey": 32, "accountSignature": 64, "deviceSignature": 64}
