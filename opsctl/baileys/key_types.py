"""The kinds of keys: what losing one costs, when it may go, what its value looks like (docs/baileys.md section 3)."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final, Literal

import orjson

from opsctl.baileys.buffers import bytes_of, is_double_encoded


class ExpiryPolicy(StrEnum):
    """When a cleanup may delete a key."""

    NEVER = "never"
    PAST_RETENTION = "past-retention"
    ON_REQUEST = "on-request"
    EXPERT_PRUNE = "expert-prune"


@dataclass(frozen=True, slots=True)
class KeyType:
    """One type of key; `since` is the first major version that writes it."""

    name: str
    since: int
    losing_it: str
    expiry: ExpiryPolicy
    dropped_when_stale: bool = False

    @property
    def protected(self) -> bool:
        """Whether no age makes such a key superfluous."""
        return self.expiry in {ExpiryPolicy.NEVER, ExpiryPolicy.EXPERT_PRUNE}


KNOWN: Final = {
    key_type.name: key_type
    for key_type in (
        KeyType(
            "app-state-sync-key", 6, "app state cannot be read until the phone shares it again", ExpiryPolicy.NEVER
        ),
        KeyType("app-state-sync-version", 6, "a full resync of app state", ExpiryPolicy.NEVER),
        KeyType("lid-mapping", 7, "existing sessions are not found", ExpiryPolicy.NEVER),
        KeyType("identity-key", 7, "the contact's key is trusted on first use again", ExpiryPolicy.NEVER),
        KeyType("pre-key", 6, '"Invalid PreKey ID" for a contact\'s first message', ExpiryPolicy.EXPERT_PRUNE),
        KeyType(
            "session",
            6,
            "the chat's first incoming message is late, then it heals",
            ExpiryPolicy.PAST_RETENTION,
            dropped_when_stale=True,
        ),
        KeyType("sender-key", 6, "group messages fail until they are sent again", ExpiryPolicy.ON_REQUEST),
        KeyType(
            "sender-key-memory",
            6,
            "nothing, sender keys are sent again",
            ExpiryPolicy.PAST_RETENTION,
            dropped_when_stale=True,
        ),
        KeyType(
            "device-list", 7, "session migration finds nothing, the next message has no session", ExpiryPolicy.NEVER
        ),
        KeyType("tctoken", 7, "error 463 for messages to the contact", ExpiryPolicy.NEVER),
    )
}
"""By name. Any other type passes through untouched and is never deleted."""

PRE_KEYS_KEPT: Final = 1_600
"""The newest pre-keys that a prune leaves: nobody can know which of them are still handed out."""

DROPPED_WHEN_STALE: Final = frozenset(name for name, key_type in KNOWN.items() if key_type.dropped_when_stale)
"""What a possibly stale copy is better without; besides these, our own sender-keys (`is_own_sender_key`)."""

_SHORT_LIVED: Final = frozenset({"lid-mapping", "pre-key", "session", "sender-key"})


def lifetime(key_type: str) -> timedelta:
    """For how long after its last write the service lets a row live."""
    return timedelta(days=7 if key_type in _SHORT_LIVED else 14)


_JID: Final = re.compile(r"(?P<user>[^:_@]+)(?:_[0-9]+)?(?::(?P<device>[0-9]+))?@(?P<server>.+)")
_DOMAINS: Final = {"lid": "_1", "hosted": "_128", "hosted.lid": "_129"}  # WAJIDDomains of Baileys 7


def is_own_sender_key(key_id: str, me_id: str | None, me_lid: str | None) -> bool:
    """Whether a sender-key is the one with which this device itself writes to a group.

    Our phone's has the same user but another device: it is a peer's.

    >>> is_own_sender_key("123@g.us::789_1::7", "456:7@s.whatsapp.net", "789:7@lid")
    True
    >>> is_own_sender_key("123@g.us::456::0", "456:7@s.whatsapp.net", "789:7@lid")
    False
    """
    return key_id.partition("::")[2] in own_addresses(me_id, me_lid)


def own_sender_key_ids(group: str, me_id: str | None, me_lid: str | None) -> tuple[str, ...]:
    """The ids that our own sender-key for a group can have."""
    return tuple(f"{group}::{address}" for address in own_addresses(me_id, me_lid))


@lru_cache(maxsize=64)  # companies; asked for every sender-key
def own_addresses(me_id: str | None, me_lid: str | None) -> frozenset[str]:
    """`user::device` as sender-key ids end: Baileys 7 adds the domain to the user, `_1` for a LID; 6 does not.

    A LID that was stored without its device counts with the device of me.id as well.
    """
    jids = [match for jid in (me_id, me_lid) if jid and (match := _JID.match(jid))]
    devices = {match["device"] or "0" for match in jids}
    return frozenset(
        f"{match['user']}{domain}::{device}"
        for match in jids
        for domain in ("", _DOMAINS.get(match["server"], ""))
        for device in devices
    )


def shown_key_id(key_id: str, me_ids: Iterable[str | None]) -> str:
    """A key's id as it may be printed: the account's own numbers, which name it, stand there as `me`.

    >>> shown_key_id("123@g.us::456_1::7", ["456:7@s.whatsapp.net", None])
    '123@g.us::me_1::7'
    """
    for user in {match["user"] for jid in me_ids if jid and (match := _JID.match(jid))}:
        if user in key_id:
            key_id = re.sub(rf"(?<!\d){re.escape(user)}(?!\d)", "me", key_id)
    return key_id


def sender_key_encoding(data: bytes) -> Literal["array", "buffer"] | None:
    """Which of its two encodings a normalised sender-key has; 7.x cannot read the array (docs/baileys.md section 2)."""
    if data.startswith(b"["):
        return "array"
    return "buffer" if data.startswith(b'{"type":"Buffer",') else None


def shape_problem(key_type: str, data: bytes) -> str | None:
    """What is wrong with a normalised value for its type, None if nothing is; unknown types are never wrong.

    >>> shape_problem("lid-mapping", b"null")
    'null instead of a string'
    """
    quick = _RIGHT.get(key_type)
    if quick is None or quick(data) is not None:
        return None
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return "not valid JSON"
    return _EXPLAIN[key_type](value)


# Values as Baileys writes them, recognised without parsing: 230,000 of them in a restore. What is not
# recognised may still be right, and is looked at properly.
_BUFFER: Final = rb'\{"type":"Buffer","data":"%b"\}'
_32_BYTES: Final = _BUFFER % rb"[A-Za-z0-9+/]{43}="
_STRING: Final = rb'"[^"\\]*+"'
_FLAG: Final = _STRING + rb":(?:true|false)"
_RIGHT: Final[dict[str, Callable[[bytes], object]]] = {
    "pre-key": re.compile(rb'\{"(?:public":%b,"private|private":%b,"public)":%b\}' % ((_32_BYTES,) * 3)).fullmatch,
    "session": re.compile(rb'\{(?:"version":"v1",)?"_sessions":\{').match,
    "sender-key": re.compile(rb'\[\{|\[\]|\{"type":"Buffer","data":"W[13]').match,  # base64 of `[{` or `[]`
    "sender-key-memory": re.compile(rb"\{(?:%b(?:,%b)*+)?\}" % (_FLAG, _FLAG)).fullmatch,
    "app-state-sync-key": re.compile(rb'\{(?:%b:%b,)*?"keyData":"[A-Za-z0-9+/]++={0,2}"' % (_STRING, _STRING)).match,
    "app-state-sync-version": re.compile(
        rb'\{(?:"version":[0-9]+,"hash":%b|"hash":%b,"version":[0-9]+),"indexValueMap":\{'
        % ((_BUFFER % rb"[A-Za-z0-9+/]{171}=",) * 2)
    ).match,
    "identity-key": re.compile(_BUFFER % rb"[A-Za-z0-9+/]{44}").fullmatch,
    "lid-mapping": re.compile(rb'"[^"\\]++"').fullmatch,
    "device-list": re.compile(rb"\[(?:%b(?:,%b)*+)?\]" % (_STRING, _STRING)).fullmatch,
    "tctoken": re.compile(rb'\{(?:"timestamp":"[0-9]*+",)?"token":%b' % (_BUFFER % rb"[A-Za-z0-9+/]*+={0,2}")).match,
}


def _bytes_problem(value: object, name: str, size_bytes: int) -> str | None:
    data = bytes_of(value)
    if data is None:
        return f"{name} is missing" if value is None else f"{name} is {_kind(value)} instead of bytes"
    if is_double_encoded(data):
        return f"{name} is encoded twice"
    return None if len(data) == size_bytes else f"{name} has {len(data)} bytes instead of {size_bytes}"


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "bytes" if bytes_of(value) is not None else "an object"


def _of_object(explain: Callable[[dict[str, object]], str | None]) -> Callable[[object], str | None]:
    def explain_any(value: object) -> str | None:
        if isinstance(value, dict) and bytes_of(value) is None:
            return explain(value)
        return f"{_kind(value)} instead of an object"

    return explain_any


@_of_object
def _explain_pre_key(value: dict[str, object]) -> str | None:
    return _bytes_problem(value.get("private"), "private", 32) or _bytes_problem(value.get("public"), "public", 32)


@_of_object
def _explain_session(value: dict[str, object]) -> str | None:
    return None if isinstance(value.get("_sessions"), dict) else "an object without _sessions"


def _explain_sender_key(value: object) -> str | None:
    if isinstance(value, list):
        return None
    data = bytes_of(value)
    if data is None:
        return f"{_kind(value)} instead of an array or bytes"
    return None if data.startswith(b"[") else "bytes that are no JSON array"


@_of_object
def _explain_sender_key_memory(value: dict[str, object]) -> str | None:
    return None if all(isinstance(flag, bool) for flag in value.values()) else "an object with more than booleans"


@_of_object
def _explain_app_state_sync_key(value: dict[str, object]) -> str | None:
    key_data = value.get("keyData")
    if bytes_of(key_data) or bytes_of({"type": "Buffer", "data": key_data}):  # protobufjs reads both
        return None
    return "keyData is missing" if not key_data else "keyData is not base64"


@_of_object
def _explain_app_state_sync_version(value: dict[str, object]) -> str | None:
    if type(value.get("version")) is not int:
        return "version is not an integer"
    if not isinstance(value.get("indexValueMap"), dict):
        return "indexValueMap is not an object"
    return _bytes_problem(value.get("hash"), "hash", 128)


def _explain_lid_mapping(value: object) -> str | None:
    if value == "":
        return "an empty string"
    return None if isinstance(value, str) else f"{_kind(value)} instead of a string"


def _explain_device_list(value: object) -> str | None:
    if not isinstance(value, list):
        return f"{_kind(value)} instead of an array"
    return None if all(isinstance(device, str) for device in value) else "an array with more than strings"


@_of_object
def _explain_tctoken(value: dict[str, object]) -> str | None:
    token = value.get("token")
    if bytes_of(token) is None:
        return "token is missing" if token is None else f"token is {_kind(token)} instead of bytes"
    return None


_EXPLAIN: Final[dict[str, Callable[[object], str | None]]] = {
    "pre-key": _explain_pre_key,
    "session": _explain_session,
    "sender-key": _explain_sender_key,
    "sender-key-memory": _explain_sender_key_memory,
    "app-state-sync-key": _explain_app_state_sync_key,
    "app-state-sync-version": _explain_app_state_sync_version,
    "identity-key": lambda value: (
        _bytes_problem(value, "the key", 33) if value is not None else "null instead of bytes"
    ),
    "lid-mapping": _explain_lid_mapping,
    "device-list": _explain_device_list,
    "tctoken": _explain_tctoken,
}
