"""Bytes inside JSON: the forms a database holds, and the one that every Baileys reads (docs/baileys.md section 2).

That one is `{"type":"Buffer","data":"<base64>"}`. A byte object is one of these, without any other key:

    {"type":"Buffer","data":[1,2]}     plain JSON.stringify of a Buffer
    {"type":"Buffer","data":"AQI="}    BufferJSON.replacer; the reviver of Baileys 6 also takes "value" for "data"
                                       and "buffer":true for the type
    {"0":1,"1":2}                      plain JSON.stringify of a Uint8Array: every key digits, every value 0 to 255

What was encoded twice stays so: see `is_double_encoded`.
"""

import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, NamedTuple

import orjson


class StoredForm(StrEnum):
    """How the bytes inside one value are written."""

    NONE = "none"
    JSON_STRINGIFY = "json-stringify"
    BASE64 = "base64"
    UINT8ARRAY = "uint8array"
    MIXED = "mixed"


class Normalised(NamedTuple):
    """A value as Baileys would write it; where there is a `problem`, the part that has it is as it was found."""

    data: bytes
    form: StoredForm
    problem: str | None

    @property
    def unreadable(self) -> bool:
        """Whether the problem is one of the whole value."""
        return self.problem in {_NOT_JSON, _TOO_DEEP}


# Enum members cost 0.15 us to look up and to hash; these are for the 230,000 values of a restore.
_NONE: Final = StoredForm.NONE
_JSON_STRINGIFY: Final = StoredForm.JSON_STRINGIFY
_LIST_NOTE: Final = "json-stringify"
_TEXT_NOTE: Final = "base64"
_DIGITS_NOTE: Final = "uint8array"
_FLOAT_NOTE: Final = "float"

# Every byte object begins with one of its own keys, so compact JSON without this holds none.
_MAY_HOLD_BYTES: Final = re.compile(rb'\{"(?:[0-9]+":[0-9]|(?:data|type|value|buffer)":)')
_BYTE_OBJECT_KEYS: Final = frozenset({"type", "buffer", "data", "value"})
# JSONB puts short keys first: where a value holds bytes, the first of them nearly always come early.
_BYTES_AT_ONCE: Final = b'{"data": '
_AT_ONCE: Final = 32
# Most rows with bytes are pre-keys, or one Buffer, that the service wrote by JSON.stringify, printed by PostgreSQL.
# orjson checks what is between these pieces. This takes half of the time of the walk below.
_PRE_KEY: Final = (b'{"public": {"data": [', b'], "type": "Buffer"}, "private": {"data": [', b'], "type": "Buffer"}}')
_ONE_BUFFER: Final = (b'{"data": [', b'], "type": "Buffer"}')
# orjson writes a point into floats, and reads integers of more than 64 bits as floats. Those that it writes without one
# (1e+22) are left to it: they are the same number to JavaScript, which reads them with the same loss, if any.
_FLOAT: Final = re.compile(rb"\.[0-9]")
_STRING_OR_NUMBER: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"|(-?[0-9][0-9.eE+-]*+)')

_BASE64_AS_NODE_READS_IT: Final = re.compile(r"[A-Za-z0-9+/_-]*+={0,2}")
_URL_ALPHABET: Final = str.maketrans("-_", "+/")
_KEY_ENCODED_TWICE: Final = re.compile(rb"[A-Za-z0-9+/]{43}[A-Za-z0-9+/=]")

_NOT_JSON: Final = "not valid JSON"
_TOO_DEEP: Final = "JSON nested too deeply"
_LOSSY_NUMBER: Final = "a number that would lose digits"
_NOT_BYTES: Final = "a Buffer object whose data are not bytes"


def normalise(text: bytes) -> Normalised:
    """JSON text in any spelling -> what `JSON.stringify(value, BufferJSON.replacer)` writes once it is revived.

    Keys keep their order. What cannot be rewritten without loss stays as it is, and what is beside it does not: one
    field that is no bytes must not keep the others from being read. The problem quotes nothing of a private key.

    >>> normalise(b'{"public": {"data": [1, 2], "type": "Buffer"}}').data
    b'{"public":{"type":"Buffer","data":"AQI="}}'
    """
    compact = _pre_key_or_one_buffer(text)
    if compact is not None:
        return Normalised(compact, _JSON_STRINGIFY, None)
    try:
        value = orjson.loads(text)
        if text.find(_BYTES_AT_ONCE, 0, _AT_ONCE) < 0:
            # Most other values hold no bytes (a session is bare base64 strings): orjson alone is twice as fast.
            compact = orjson.dumps(value)
            if _MAY_HOLD_BYTES.search(compact) is None and (b"." not in compact or _FLOAT.search(compact) is None):
                return Normalised(compact, _NONE, None)
        return _normalise_walking(text, value)
    except orjson.JSONDecodeError as error:
        return Normalised(text, _NONE, _TOO_DEEP if error.msg.startswith("depth") else _NOT_JSON)
    except (RecursionError, orjson.JSONEncodeError):  # orjson reads 1,024 levels, but writes only 254
        return Normalised(text, _NONE, _TOO_DEEP)


def _pre_key_or_one_buffer(text: bytes) -> bytes | None:
    """The usual values that hold bytes, by their usual spelling; None for all others, which are for the walk."""
    try:
        head, tail = _ONE_BUFFER
        if text.startswith(head):
            if text.endswith(tail):
                data = bytes(orjson.loads(text[len(head) - 1 : 1 - len(tail)]))
                return b'{"type":"Buffer","data":"%b"}' % b2a_base64(data, newline=False)
            return None
        head, middle, tail = _PRE_KEY
        if text.startswith(head) and text.endswith(tail):
            end = text.find(middle)
            public = bytes(orjson.loads(text[len(head) - 1 : end + 1]))
            private = bytes(orjson.loads(text[end + len(middle) - 1 : 1 - len(tail)]))
            return b'{"public":{"type":"Buffer","data":"%b"},"private":{"type":"Buffer","data":"%b"}}' % (
                b2a_base64(public, newline=False),
                b2a_base64(private, newline=False),
            )
    except (ValueError, TypeError):  # not JSON, or not of numbers from 0 to 255
        pass
    return None


def _normalise_walking(text: bytes, value: object) -> Normalised:
    notes: set[str] = set()
    compact = orjson.dumps(_walk(value, notes), default=_base64_object)
    problem = None
    if _FLOAT_NOTE in notes and not _numbers_survive(text):
        compact, problem = _as_text(_walked_with_numbers_as_spelled(text)).encode(), _LOSSY_NUMBER
    if _NOT_BYTES in notes:
        problem = _NOT_BYTES
    forms = notes - {_FLOAT_NOTE, _NOT_BYTES}
    form = StoredForm(*forms) if len(forms) == 1 else StoredForm.MIXED if forms else _NONE
    return Normalised(compact, form, problem)


def revive(value: object) -> object:
    """The same value with every byte object as `bytes`, and 1.0 as 1, which JavaScript does not tell apart.

    >>> revive({"private": {"type": "Buffer", "data": "AQI="}, "public": {"0": 3}})
    {'private': b'\\x01\\x02', 'public': b'\\x03'}
    """
    return _walk(value, set())


def to_form(value: object, form: StoredForm) -> object:
    """The same value with its `bytes` as byte objects of one form, for JSON: the way back from `revive`.

    >>> to_form([b"\\x01\\x02"], StoredForm.JSON_STRINGIFY)
    [{'type': 'Buffer', 'data': [1, 2]}]
    """
    match form:
        case StoredForm.JSON_STRINGIFY:
            return _replace_bytes(value, lambda data: {"type": "Buffer", "data": list(data)})
        case StoredForm.BASE64:
            return _replace_bytes(value, _base64_object)
        case StoredForm.UINT8ARRAY:
            return _replace_bytes(value, _uint8array_object)
        case StoredForm.NONE | StoredForm.MIXED:
            raise ValueError(f"{form.value} is not a form to write bytes in")


def in_form(normalised: bytes, form: StoredForm) -> str:
    """A normalised value as JSON text with its bytes in one of the three forms.

    >>> in_form(b'{"type":"Buffer","data":"AQI="}', StoredForm.JSON_STRINGIFY)
    '{"type":"Buffer","data":[1,2]}'
    """
    # Most values hold no bytes (a session is bare base64 strings), and those of others have this form already.
    if form is StoredForm.BASE64 or _MAY_HOLD_BYTES.search(normalised) is None:
        return normalised.decode()
    notes: set[str] = set()
    value = _walk(orjson.loads(normalised), notes)
    if _FLOAT_NOTE in notes and not _numbers_survive(normalised):
        return _as_text(to_form(_walked_with_numbers_as_spelled(normalised), form))
    return orjson.dumps(to_form(value, form)).decode()


def bytes_of(value: object) -> bytes | None:
    """The bytes of one field in any form, None if it is no byte object.

    >>> bytes_of({"buffer": True, "value": [1, 2]})
    b'\\x01\\x02'
    """
    if isinstance(value, bytes):
        return value
    return _bytes_in(value, set()) if isinstance(value, dict) else None


def is_double_encoded(value: bytes) -> bool:
    """Whether the bytes of a field for a key (32 bytes, or 33) are such a key in base64 once more.

    >>> is_double_encoded(b"A" * 43 + b"="), is_double_encoded(bytes(32))
    (True, False)
    """
    return len(value) == 44 and _KEY_ENCODED_TWICE.fullmatch(value) is not None


_COUNTED: Final = tuple(map(str, range(256)))
"""The keys of a byte array as JavaScript and JSONB enumerate them; most are shorter."""
_WALKED: Final = frozenset({dict, list, float})


def _walk(value: object, notes: set[str]) -> object:
    """`value` with bytes for byte objects; notes the forms that it met, floats and _NOT_BYTES."""
    if type(value) is dict:
        first = next(iter(value), "")
        if first in _BYTE_OBJECT_KEYS or "0" <= first[:1] <= "9":
            data = _bytes_in(value, notes)
            if data is not None:
                return data
        return {key: _walk(item, notes) if type(item) in _WALKED else item for key, item in value.items()}
    if type(value) is list:
        return [_walk(item, notes) if type(item) in _WALKED else item for item in value]
    if type(value) is float:
        return _number(value, notes)
    return value


def _number(value: float, notes: set[str]) -> float:
    """1 for 1.0: JavaScript does not tell them apart."""
    if b"." not in orjson.dumps(value):
        return value
    notes.add(_FLOAT_NOTE)
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


def _bytes_in(value: dict[str, object], notes: set[str]) -> bytes | None:
    """The bytes of a byte object, None for any other object."""
    says_buffer = value.get("type") == "Buffer"
    if says_buffer or value.get("buffer") is True:
        data = _payload(value.get("data", value.get("value")), notes) if len(value) == 2 else None
        if data is None and says_buffer and value.keys() <= _BYTE_OBJECT_KEYS:
            notes.add(_NOT_BYTES)
        return data
    data = _uint8array(value, notes)
    if data is not None:
        notes.add(_DIGITS_NOTE)
    return data


def _payload(data: object, notes: set[str]) -> bytes | None:
    if type(data) is dict:  # Baileys writes such an object back as one Buffer
        return _bytes_in(data, notes)
    found, note = None, _LIST_NOTE
    if type(data) is list:
        found = _bytes_from(data, notes)
    elif type(data) is str:
        found, note = _from_base64(data), _TEXT_NOTE
    if found is not None:
        notes.add(note)
    return found


def _uint8array(value: dict[str, object], notes: set[str]) -> bytes | None:
    count = len(value)
    counted = _COUNTED[:count] if count <= len(_COUNTED) else tuple(map(str, range(count)))
    if tuple(value) == counted and set(map(type, value.values())) == {int}:
        return _bytes_from(list(value.values()), notes)
    for key in value:
        if not (key.isascii() and key.isdigit()):
            return None
    items = [value[key] for key in sorted(value, key=_as_javascript_counts)]
    if not items or any(type(item) is bool for item in items):
        return None
    return _bytes_from(items, notes)


def _bytes_from(items: list[Any], notes: set[str]) -> bytes | None:
    try:
        return bytes(items)
    except ValueError:  # a number that is not from 0 to 255
        return None
    except TypeError:
        numbers = [_number(item, notes) if type(item) is float else item for item in items]
        return _bytes_from(numbers, notes) if all(type(item) is int for item in numbers) else None


def _as_javascript_counts(digits: str) -> tuple[int, str]:
    """Numerical order, which is the one in which JavaScript (and JSONB) enumerates such keys."""
    return len(digits), digits


def _from_base64(text: str) -> bytes | None:
    """What Buffer.from(text, "base64") gives: either alphabet, padded or not. None where Node would skip characters."""
    try:
        return a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error is one; characters beyond ASCII are another
        pass
    bare = text.rstrip("=").translate(_URL_ALPHABET)
    if _BASE64_AS_NODE_READS_IT.fullmatch(text) is None or len(bare) % 4 == 1:
        return None
    return a2b_base64(bare + "=" * (-len(bare) % 4))


def _base64_object(data: object) -> dict[str, str]:
    if not isinstance(data, bytes):
        raise TypeError
    return {"type": "Buffer", "data": b2a_base64(data, newline=False).decode()}


def _uint8array_object(data: bytes) -> dict[str, Any]:
    # No bytes at all would be an empty object, which nobody revives: tokens that are kept empty on purpose.
    return {str(index): byte for index, byte in enumerate(data)} or {"type": "Buffer", "data": []}


def _replace_bytes(value: object, write: Callable[[bytes], object]) -> object:
    if isinstance(value, bytes):
        return write(value)
    if isinstance(value, dict):
        return {key: _replace_bytes(item, write) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_bytes(item, write) for item in value]
    return value


class _Spelled(str):
    """A number by its digits: more of them than a double or an integer of 64 bits has room for."""

    __slots__ = ()


def _walked_with_numbers_as_spelled(text: bytes) -> object:
    import json

    def number(digits: str) -> object:
        return orjson.loads(digits) if _survives(digits) else _Spelled(digits)

    return _walk(json.loads(text, parse_float=number, parse_int=number), set())


def _as_text(value: object) -> str:
    if isinstance(value, _Spelled):
        return str(value)
    if isinstance(value, dict):
        items = [f"{orjson.dumps(key).decode()}:{_as_text(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_as_text, value))}]"
    return orjson.dumps(value, default=_base64_object).decode()


def _numbers_survive(text: bytes) -> bool:
    """Whether each number of a JSON text keeps its value as a 64-bit integer or a double."""
    return all(match[1] is None or _survives(match[1].decode()) for match in _STRING_OR_NUMBER.finditer(text))


def _survives(number: str) -> bool:
    from decimal import Decimal

    if number.lstrip("-").isdigit() and len(number) <= 20 and -(2**63) <= int(number) < 2**64:
        return True
    # PostgreSQL prints 1e+22 as 23 digits: as a double it is the same.
    return Decimal(number) == Decimal(repr(float(number)))
