"""The forms of bytes, against Baileys' own BufferJSON."""

import json
from base64 import b64encode
from random import Random

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opsctl.baileys import buffers
from opsctl.baileys.buffers import Normalised, StoredForm, bytes_of, is_double_encoded, normalise, revive, to_form

# What JSON.stringify(JSON.parse(text, BufferJSON.reviver), BufferJSON.replacer) prints in Node 20, with the BufferJSON
# of baileys 6.7.24, of 7.0.0-rc14, or of both.
KNOWN_ANSWERS = [
    (
        "both",
        '{"public": {"data": [1, 2, 255], "type": "Buffer"}, "private": {"data": [], "type": "Buffer"}}',
        '{"public":{"type":"Buffer","data":"AQL/"},"private":{"type":"Buffer","data":""}}',
        StoredForm.JSON_STRINGIFY,
    ),
    ("both", '{"type": "Buffer", "data": "AQL/"}', '{"type":"Buffer","data":"AQL/"}', StoredForm.BASE64),
    ("both", '{"type": "Buffer", "data": "-_8"}', '{"type":"Buffer","data":"+/8="}', StoredForm.BASE64),
    ("both", '{"type":"Buffer","data":"AB=="}', '{"type":"Buffer","data":"AA=="}', StoredForm.BASE64),
    ("6", '{"buffer": true, "data": [1, 2]}', '{"type":"Buffer","data":"AQI="}', StoredForm.JSON_STRINGIFY),
    ("6", '{"buffer": true, "value": "AQI="}', '{"type":"Buffer","data":"AQI="}', StoredForm.BASE64),
    ("6", '{"type": "Buffer", "value": [1, 2]}', '{"type":"Buffer","data":"AQI="}', StoredForm.JSON_STRINGIFY),
    ("7", '{"0": 1, "1": 2, "10": 3, "2": 4}', '{"type":"Buffer","data":"AQIEAw=="}', StoredForm.UINT8ARRAY),
    ("7", '{"1":2,"0":1}', '{"type":"Buffer","data":"AQI="}', StoredForm.UINT8ARRAY),
    (
        "both",
        '{"type":"Buffer","data":{"type":"Buffer","data":"AQI="}}',
        '{"type":"Buffer","data":"AQI="}',
        StoredForm.BASE64,
    ),
    ("7", '{"type":"Buffer","data":{"0":1,"1":2}}', '{"type":"Buffer","data":"AQI="}', StoredForm.UINT8ARRAY),
    ("both", "{}", "{}", StoredForm.NONE),
    ("both", "[]", "[]", StoredForm.NONE),
    ("both", '{"a": {}}', '{"a":{}}', StoredForm.NONE),
    ("both", '{"0": true}', '{"0":true}', StoredForm.NONE),
    ("both", '{"0": 1, "a": 2}', '{"0":1,"a":2}', StoredForm.NONE),
    (
        "both",
        '{"text": "\\u00e9\\u2028\\u0001\\b\\/\\"", "n": 1.50}',
        '{"text":"é\u2028\\u0001\\b/\\"","n":1.5}',
        StoredForm.NONE,
    ),
    ("both", "[1.0, -0, 1e3, 12345678901]", "[1,0,1000,12345678901]", StoredForm.NONE),
    ("both", '"plain"', '"plain"', StoredForm.NONE),
    ("both", "null", "null", StoredForm.NONE),
]

EVERY_FORM = [StoredForm.JSON_STRINGIFY, StoredForm.BASE64, StoredForm.UINT8ARRAY]
KEYS = st.one_of(
    st.text(max_size=6), st.integers(0, 300).map(str), st.sampled_from(["type", "data", "value", "buffer", "public"])
)
NUMBERS = st.one_of(
    st.integers(0, 255), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.just("Buffer"), st.just("AQI="))
BYTE_OBJECTS = st.builds(to_form, st.binary(max_size=40), st.sampled_from(EVERY_FORM))
VALUES = st.recursive(
    st.one_of(LEAVES, BYTE_OBJECTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=20,
)
KEY_PAIRS = st.fixed_dictionaries({"public": st.binary(max_size=40), "private": st.binary(max_size=40)})


def as_jsonb_prints(value: object) -> bytes:
    """Short keys first, a space after each comma and colon, nothing escaped that need not be."""

    def ordered(item: object) -> object:
        if isinstance(item, dict):
            return {key: ordered(item[key]) for key in sorted(item, key=lambda key: (len(key.encode()), key.encode()))}
        return [ordered(each) for each in item] if isinstance(item, list) else item

    return json.dumps(ordered(value), ensure_ascii=False).encode()


@pytest.mark.parametrize(("version", "text", "written", "form"), KNOWN_ANSWERS)
def test_writes_what_baileys_writes(version: str, text: str, written: str, form: StoredForm) -> None:
    assert normalise(text.encode()) == Normalised(written.encode(), form, None), version


@given(VALUES, st.booleans())
def test_the_fast_path_is_the_walk(value: object, jsonb: bool) -> None:
    text = as_jsonb_prints(value) if jsonb else json.dumps(value).encode()
    assert normalise(text) == buffers._normalise_walking(text, orjson.loads(text))


@given(KEY_PAIRS, st.sampled_from(EVERY_FORM))
def test_the_pattern_for_pre_keys_is_the_walk(pair: dict[str, bytes], form: StoredForm) -> None:
    text = as_jsonb_prints(to_form(pair, form))
    assert normalise(text) == buffers._normalise_walking(text, orjson.loads(text))


@given(VALUES)
def test_normalising_twice_changes_nothing(value: object) -> None:
    once = normalise(as_jsonb_prints(value))
    assert normalise(once.data).data == once.data


@given(KEY_PAIRS, st.sampled_from(EVERY_FORM))
def test_every_form_comes_out_as_the_same_base64_and_goes_back(pair: dict[str, bytes], form: StoredForm) -> None:
    assume(form is not StoredForm.UINT8ARRAY or all(pair.values()))  # an empty Uint8Array is an empty object
    normalised = normalise(as_jsonb_prints(to_form(pair, form)))
    assert orjson.loads(normalised.data) == {
        name: {"type": "Buffer", "data": b64encode(data).decode()} for name, data in pair.items()
    }
    assert normalised.form is form
    assert revive(orjson.loads(normalised.data)) == pair
    assert to_form(revive(to_form(pair, form)), form) == to_form(pair, form)


@given(VALUES, st.sampled_from(EVERY_FORM))
def test_a_normalised_value_is_written_in_a_form_by_the_walk_also_where_it_is_left_as_it_is(
    value: object, form: StoredForm
) -> None:
    once = normalise(as_jsonb_prints(value))
    assume(once.problem is None)
    assert orjson.loads(buffers.in_form(once.data, form)) == to_form(revive(orjson.loads(once.data)), form)


def test_two_forms_in_one_value_are_reported_as_mixed() -> None:
    assert normalise(b'[{"type":"Buffer","data":[1]},{"0":1}]').form is StoredForm.MIXED


@pytest.mark.parametrize("text", [b'{"0": 1.0, "1": 2}', b'{"data": [1.0, 2], "type": "Buffer"}'])
def test_a_byte_written_with_a_point_is_a_byte(text: bytes) -> None:
    assert normalise(text).data == b'{"type":"Buffer","data":"AQI="}'


def test_keys_keep_their_order() -> None:
    assert normalise(b'{"b": 1, "a": {"d": 2, "c": 3}}').data == b'{"b":1,"a":{"d":2,"c":3}}'


def test_an_object_with_any_other_key_is_no_byte_object() -> None:
    for text in (b'{"type":"Buffer","data":[1],"x":1}', b'{"x":1,"type":"Buffer","data":"AQ=="}', b'{"0":1,"x":2}'):
        assert normalise(text) == Normalised(text, StoredForm.NONE, None)


def test_a_double_that_postgresql_prints_as_a_long_integer_keeps_nothing_from_being_normalised() -> None:
    text = b'{"n": 10000000000000000000000, "m": -%b, "b": {"data": [1], "type": "Buffer"}}' % (b"12" + b"0" * 300)
    normalised = normalise(text)
    assert normalised.problem is None
    assert json.loads(normalised.data) == {"n": 1e22, "m": -1.2e301, "b": {"type": "Buffer", "data": "AQ=="}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not valid JSON"),
        (b'{"a": }', "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b'"\\ud800"', "not valid JSON"),
        (b'{"n": 1e400}', "not valid JSON"),
        (b"[" * 300 + b"]" * 300, "JSON nested too deeply"),
        (b'{"a":' * 990 + b"1" + b"}" * 990, "JSON nested too deeply"),
        (b"[" * 2000 + b"]" * 2000, "JSON nested too deeply"),
        (
            b'{"public": {"data": [1,], "type": "Buffer"}, "private": {"data": [1], "type": "Buffer"}}',
            "not valid JSON",
        ),
    ],
)
def test_what_cannot_be_rewritten_stays_and_says_why(text: bytes, problem: str) -> None:
    assert normalise(text) == Normalised(text, StoredForm.NONE, problem)


@pytest.mark.parametrize(
    "number",
    ["18446744073709551616", "-9223372036854775809", "0.1234567890123456789", "9007199254740993.0", "1e-400"],
)
def test_a_number_that_would_lose_digits_keeps_them_and_what_is_beside_it_is_rewritten(number: str) -> None:
    text = f'{{"n": [{number}, 1.0], "b": {{"data": [1, 2], "type": "Buffer"}}}}'.encode()
    expected = f'{{"n":[{number},1],"b":{{"type":"Buffer","data":"AQI="}}}}'.encode()
    normalised = normalise(text)
    assert normalised == Normalised(expected, StoredForm.JSON_STRINGIFY, "a number that would lose digits")
    assert normalise(normalised.data).data == expected
    back = f'{{"n":[{number},1],"b":{{"type":"Buffer","data":[1,2]}}}}'
    assert buffers.in_form(expected, StoredForm.JSON_STRINGIFY) == back


@pytest.mark.parametrize(
    "found", ['{"type":"Buffer"}', *(f'{{"data":{data},"type":"Buffer"}}' for data in (
        "[1,256]", "[1,-1]", "[1.5]", '"A"', '"A Q=="', "[18446744073709551616]"))]
)  # fmt: skip
def test_a_buffer_that_is_no_bytes_stays_as_it_is_and_what_is_beside_it_is_rewritten(found: str) -> None:
    text = f'{{"public": {found}, "private": {{"data": [1, 2], "type": "Buffer"}}}}'.encode()
    expected = f'{{"public":{found},"private":{{"type":"Buffer","data":"AQI="}}}}'.encode()
    problem = "a Buffer object whose data are not bytes"
    assert normalise(text) == Normalised(expected, StoredForm.JSON_STRINGIFY, problem)
    assert normalise(expected) == Normalised(expected, StoredForm.BASE64, problem)
    assert normalise(found.encode()) == Normalised(found.encode(), StoredForm.NONE, problem)


@given(st.binary(max_size=60))
def test_no_bytes_raise_an_exception(text: bytes) -> None:
    normalise(text)


@given(st.binary(max_size=50), st.sampled_from(EVERY_FORM))
def test_bytes_of_reads_every_form(data: bytes, form: StoredForm) -> None:
    assume(data)
    assert bytes_of(to_form(data, form)) == data
    assert bytes_of(data) == data


@given(st.integers(250, 300), st.randoms(use_true_random=False))
def test_a_long_array_is_read_in_any_order_of_its_keys(size: int, random: Random) -> None:
    data = random.randbytes(size)
    items = [(str(index), byte) for index, byte in enumerate(data)]
    assert bytes_of(dict(items)) == data
    random.shuffle(items)
    assert bytes_of(dict(items)) == data


@pytest.mark.parametrize("value", [None, 1, "AQI=", [1, 2], {}, {"type": "Buffer"}, {"0": True}, {"0": 256}])
def test_bytes_of_anything_else_is_none(value: object) -> None:
    assert bytes_of(value) is None


@pytest.mark.parametrize("form", [StoredForm.NONE, StoredForm.MIXED])
def test_bytes_cannot_be_written_in_no_form(form: StoredForm) -> None:
    with pytest.raises(ValueError, match="not a form to write"):
        to_form(b"", form)


@given(st.binary(min_size=32, max_size=33))
def test_a_key_encoded_twice_is_told_from_a_key(key: bytes) -> None:
    assert not is_double_encoded(key)
    assert is_double_encoded(b64encode(key))


def test_double_encoding_is_left_as_it_is() -> None:
    text = json.dumps(
        {"type": "Buffer", "data": b64encode(b64encode(bytes(32))).decode()}, separators=(",", ":")
    ).encode()
    assert normalise(text).data == text


@pytest.mark.parametrize("form", [StoredForm.JSON_STRINGIFY, StoredForm.BASE64, StoredForm.UINT8ARRAY])
def test_no_bytes_at_all_are_found_again_in_every_form(form: StoredForm) -> None:
    assert revive({"token": to_form(b"", form)}) == {"token": b""}
