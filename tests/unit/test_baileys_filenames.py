"""Names of key files and company folders."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsctl.baileys.filenames import (
    CREDS_FILE,
    MANIFEST_FILE,
    UnwritableName,
    fix_file_name,
    folder_name,
    is_company_id,
    is_ignored,
    key_file_name,
    parse_key_file_name,
)

USERS = st.from_regex(r"[0-9]{5,15}(_1)?", fullmatch=True)
GROUPS = st.from_regex(r"[0-9]{10,18}(-[0-9]{10})?@g\.us", fullmatch=True)
BASE64 = st.binary(min_size=1, max_size=12).map(lambda raw: b64encode(raw).decode())
KEYS = st.one_of(
    st.tuples(st.just("pre-key"), st.integers(1, 2**24).map(str)),
    st.tuples(st.sampled_from(["session", "identity-key"]), st.builds("{}.{}".format, USERS, st.integers(0, 99))),
    st.tuples(st.just("sender-key"), st.builds("{}::{}::{}".format, GROUPS, USERS, st.integers(0, 99))),
    st.tuples(st.just("sender-key-memory"), GROUPS),
    st.tuples(st.just("app-state-sync-key"), BASE64),
    st.tuples(
        st.just("app-state-sync-version"),
        st.sampled_from(["critical_block", "critical_unblock_low", "regular", "regular_high", "regular_low"]),
    ),
    st.tuples(st.just("lid-mapping"), st.one_of(USERS, USERS.map("{}_reverse".format))),
    st.tuples(st.just("device-list"), USERS),
    st.tuples(st.just("tctoken"), st.one_of(st.just("__index"), USERS.map("{}@lid".format))),
)


@given(KEYS)
def test_a_name_that_baileys_gives_reads_back_as_its_type_and_id(key: tuple[str, str]) -> None:
    assert parse_key_file_name(key_file_name(*key)) == key


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_key_file_is_one_new_name_in_its_folder_or_refused(key_type: str, key_id: str) -> None:
    name, refusal = "", ""
    try:
        name = key_file_name(key_type, key_id)
    except UnwritableName as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        assert len(refusal) < 1000
        return
    assert name == fix_file_name(f"{key_type}-{key_id}.json")
    assert "/" not in name
    assert "\0" not in name
    assert len(name.encode()) <= 255
    assert name not in {"", ".", "..", CREDS_FILE, MANIFEST_FILE}
    assert not is_ignored(name)


@pytest.mark.parametrize(
    ("key_type", "key_id", "reason"),
    [
        ("session", "a\0b", "NUL"),
        ("session", "x" * 243, "256 bytes"),
        ("session", "й" * 122, "257 bytes"),
        ("session", "\ud800", "surrogate"),
        (".opsctl", "manifest", "not for keys"),
    ],
)
def test_what_no_file_can_be_called_is_refused_with_its_reason(key_type: str, key_id: str, reason: str) -> None:
    with pytest.raises(UnwritableName, match=reason):
        key_file_name(key_type, key_id)


def test_a_name_of_exactly_255_bytes_is_written() -> None:
    assert len(key_file_name("session", "x" * 242)) == 255
    assert len(key_file_name("session", "й" * 121).encode()) == 255


def test_traversal_in_an_id_becomes_a_plain_name() -> None:
    assert key_file_name("session", "../../etc/passwd") == "session-..__..__etc__passwd.json"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("session", "a:b"), ("session", "a-b")),
        (("session", "a/b"), ("session", "a__b")),
        (("sender-key", "memory-X"), ("sender-key-memory", "X")),
    ],
)
def test_ids_that_collide_in_baileys_collide_here(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert key_file_name(*one) == key_file_name(*other)


@pytest.mark.parametrize(
    "name",
    [CREDS_FILE, MANIFEST_FILE, "creds.json.bak", "session-1.0.json.tmp", "session-1.0.json.7f3a.tmp", "notes.txt"],
)
def test_what_is_no_key_file_parses_as_none(name: str) -> None:
    assert parse_key_file_name(name) is None


def test_an_unknown_type_is_read_up_to_its_first_hyphen() -> None:
    assert parse_key_file_name("future-thing-1.json") == ("future", "thing-1")


def test_a_sender_key_of_an_unknown_form_stays_as_it_stands() -> None:
    assert parse_key_file_name("sender-key-group.json") == ("sender-key", "group")


@pytest.mark.parametrize("text", ["962302", "company_962302", "A-b_9", "x" * 50])
def test_company_ids(text: str) -> None:
    assert is_company_id(text)


@pytest.mark.parametrize("text", ["", "..", "a/b", "a.b", "962302\n", "x" * 51, "٣", "a b"])
def test_what_is_no_company_id_has_no_folder(text: str) -> None:
    assert not is_company_id(text)
    with pytest.raises(UnwritableName, match="not a company id"):
        folder_name(text)
