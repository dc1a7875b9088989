"""What a log's lines mean; the real Baileys writes them in tests/integration/test_triage.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from opsctl.baileys.log_lines import Heard, Trouble, connected, hear, undecryptable

NOW = datetime(2026, 1, 31, 3, 4, 5, tzinfo=UTC)
REPLACED = (
    '{"level":50,"fullErrorNode":{"tag":"stream:error","attrs":{},"content":[{"tag":"conflict",'
    '"attrs":{"type":"replaced"}}]},"msg":"stream errored out"}'
)
REMOVED = (
    '{"level":50,"fullErrorNode":{"tag":"stream:error","attrs":{"code":"401"},"content":[{"tag":"conflict",'
    '"attrs":{"type":"device_removed"}}]},"msg":"stream errored out"}'
)


def heard(*lines: str, known: tuple[str, ...] = ("962302", "962303")) -> tuple[Heard, ...]:
    return hear(lines, known=known, since=NOW - timedelta(minutes=15))


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        (REPLACED, Trouble.REPLACED),
        (REMOVED, Trouble.LOGGED_OUT),
        ("Connection closed for company 962302. Status: 401", Trouble.LOGGED_OUT),
        ('{"statusCode":403,"msg":"connection closed"}', Trouble.FORBIDDEN),
        ("lastDisconnect: { error: { output: { statusCode: 440 } } }", Trouble.REPLACED),
        ("session 962302 logged out (401)", Trouble.LOGGED_OUT),
        ("Session error:Error: Bad MAC Error: Bad MAC", Trouble.UNDECRYPTABLE),
        ('{"err":{"type":"SessionError","message":"No session record"}}', Trouble.UNDECRYPTABLE),
        ('{"err":{"message":"No matching sessions found for message"}}', Trouble.UNDECRYPTABLE),
        ("Error: Invalid PreKey ID", Trouble.UNDECRYPTABLE),
        ("GET /api/companies 401 Unauthorized 3 ms", None),
        ('{"req":{"url":"/health"},"res":{"statusCode":403}}', None),
        ("connection closed, status 428, will reconnect", None),
        ("sent 440 messages", None),
        ("4401 disconnected clients", None),
    ],
)
def test_a_line_means_trouble_only_beside_a_word_of_a_connection(line: str, trouble: Trouble | None) -> None:
    assert [found.trouble for found in heard(line)] == ([] if trouble is None else [trouble])


def test_companies_are_found_by_whole_ids_and_counted_together() -> None:
    lines = ["company_962302 connection closed 440", "962303: connection closed 440", "x9623020 connection closed 440"]
    assert heard(*lines) == (Heard(Trouble.REPLACED, 3, ("962302", "962303"), "440"),)
    assert heard(lines[0], known=())[0].companies == ()


def test_a_refusal_is_over_when_its_company_connects_and_not_when_another_does() -> None:
    closed = "company 962302 connection closed 401"
    assert heard(closed, '{"companyId":"962302","msg":"opened connection to WA"}') == ()
    assert heard(closed, "company 962302: Connected to WhatsApp") == ()
    assert heard(closed, "company 962302", "{ connection: 'open' }")[0].companies == ("962302",)
    assert heard(closed, "company 962303: connection open")[0].companies == ("962302",)
    assert heard(closed, "company 962302: connection open", closed)[0].count == 1
    assert heard("connection closed 401", "opened connection to WA") == ()


def test_undecryptable_messages_do_not_end_with_a_connection() -> None:
    assert heard("Bad MAC", "opened connection to WA")[0].count == 1


@pytest.mark.parametrize(
    "stamp",
    [
        '{{"time":{0.epoch}}}',
        "{0.text}Z",
        "[{0.text}.123Z]",
        '{{"timestamp":"{0.text}+00:00"}}',
    ],
)
def test_lines_from_before_the_window_are_left_out_and_those_without_a_time_follow(stamp: str) -> None:
    class At:
        def __init__(self, moment: datetime) -> None:
            self.epoch = int(moment.timestamp() * 1000)
            self.text = f"{moment:%Y-%m-%dT%H:%M:%S}"

    old, new = (stamp.format(At(NOW - timedelta(minutes=age))) for age in (20, 5))
    trouble = "connection closed 440"
    assert heard(f"{old} {trouble}") == ()
    assert heard(old, trouble) == ()
    assert heard(f"{new} {trouble}")[0].count == 1
    assert heard(old, trouble, new, trouble)[0].count == 1


def test_nothing_of_a_line_comes_out() -> None:
    secret = "pubKey: <Buffer 05 4f d4 4c> Bad MAC s3cret"
    (found,) = heard(secret)
    assert found.words == "Bad MAC"


@pytest.mark.parametrize(
    ("lines", "known", "open_now"),
    [
        (["962302: connection open"], ("962302", "962303"), {"962302"}),
        (['{"company":"962303","connection":"open"}'], ("962302", "962303"), {"962303"}),
        (["962302 says hello there"], ("962302", "962303"), {"962302"}),
        (["connection open"], ("962302", "962303"), set()),  # whose is not known
        (["opened connection to WA"], ("962302",), {"962302"}),
        (["9623021 connection open", "x962302 connection open"], ("962302",), {"962302"}),  # it is the only one
        (["9623021 connection open"], ("962302", "7"), set()),
        (["7 connection open", "962302 connection open", "7 connection closed"], ("962302", "7"), {"962302"}),
        (["7 connection open", "7 connection errored", "7 connection open"], ("962302", "7"), {"7"}),
        (["962302 is there"], ("962302", "7"), set()),
    ],
)
def test_a_company_is_connected_when_its_last_word_on_it_says_so(
    lines: list[str], known: tuple[str, ...], open_now: set[str]
) -> None:
    assert connected(lines, known=known, patterns=("connection open", "hello there")) == open_now


def test_undecryptable_messages_are_counted_by_company() -> None:
    lines = [
        "962302: Bad MAC",
        "Error: No matching sessions found for message",
        "962302 Invalid PreKey ID",
        "962302 late",
    ]
    assert undecryptable(lines, known=("962302", "7")) == {"962302": 2, "": 1}
