"""What a crontab says, as crontab(5) has it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from opsctl.crontab import lines, times

MIDNIGHT = datetime(2026, 1, 31, tzinfo=UTC)  # a Saturday


@pytest.mark.parametrize(
    ("expression", "moment", "runs"),
    [
        ("* * * * *", datetime(2026, 1, 31, 3, 4, tzinfo=UTC), True),
        ("0 3 * * *", datetime(2026, 1, 31, 3, 0, tzinfo=UTC), True),
        ("0 3 * * *", datetime(2026, 1, 31, 3, 1, tzinfo=UTC), False),
        ("*/5 3-4 * * *", datetime(2026, 1, 31, 4, 55, tzinfo=UTC), True),
        ("*/5 3-4 * * *", datetime(2026, 1, 31, 5, 0, tzinfo=UTC), False),
        ("7/20 * * * *", datetime(2026, 1, 31, 5, 47, tzinfo=UTC), True),
        ("0,30 3 * * *", datetime(2026, 1, 31, 3, 30, tzinfo=UTC), True),
        ("0 3 31 jan *", datetime(2026, 1, 31, 3, 0, tzinfo=UTC), True),
        ("0 3 * * mon-fri", datetime(2026, 1, 31, 3, 0, tzinfo=UTC), False),
        ("0 3 * * sat", datetime(2026, 1, 31, 3, 0, tzinfo=UTC), True),
        ("0 3 * * 7", datetime(2026, 2, 1, 3, 0, tzinfo=UTC), True),
        ("0 3 1 * sat", datetime(2026, 1, 31, 3, 0, tzinfo=UTC), True),  # either day is enough
        ("0 3 */2 * sat", datetime(2026, 1, 30, 3, 0, tzinfo=UTC), False),  # but a star is no restriction
        ("@daily", datetime(2026, 1, 31, 0, 0, tzinfo=UTC), True),
        ("@weekly", datetime(2026, 1, 31, 0, 0, tzinfo=UTC), False),
    ],
)
def test_an_expression_runs_when_cron_would_run_it(expression: str, moment: datetime, *, runs: bool) -> None:
    found = times(expression)
    assert found is not None
    assert found.at(moment) is runs
    assert (moment in set(found.starts(moment, 1, UTC))) is runs


@pytest.mark.parametrize(
    "expression", ["", "0 3 * *", "60 3 * * *", "0 24 * * *", "0 3 0 * *", "5-1 3 * * *", "*/0 3 * * *", "@reboot",
                   "a b c d e", "0 0 3 * * *", "0 3 * foo *", "- - - - -"],
)  # fmt: skip
def test_what_is_no_expression_is_none(expression: str) -> None:
    assert times(expression) is None


def test_starts_go_by_the_clock_of_the_place() -> None:
    daily = times("30 8 * * *")
    assert daily is not None
    kolkata = timezone(timedelta(hours=5, minutes=30))
    assert list(daily.starts(MIDNIGHT, 2, kolkata)) == [
        MIDNIGHT.replace(hour=3),
        MIDNIGHT.replace(hour=3) + timedelta(1),
    ]


def test_lines_are_read_with_what_was_set_above_them_and_with_those_that_are_off() -> None:
    text = (
        "# Runs at 0 3 in the night\n"
        "PATH = '/opt/bin:/bin'\n"
        "# 0 3 * * * opsctl keys cleanup\n"
        "#*/5\t*\t*\t*\t*\topsctl db health\n"
        "CLEANUP_AT=03:30\n"
        "  0 3 * * * cd /srv; opsctl  keys cleanup --yes\n"
        "@daily pg_dump wa\n"
        "not a line\n"
    )
    found = list(lines(text, with_user=False))
    assert [(line.number, line.when, line.command, line.off) for line in found] == [
        (3, "0 3 * * *", "opsctl keys cleanup", True),
        (4, "*/5\t*\t*\t*\t*", "opsctl db health", True),
        (6, "0 3 * * *", "cd /srv; opsctl  keys cleanup --yes", False),
        (7, "@daily", "pg_dump wa", False),
    ]
    assert found[0].environment == {"PATH": "/opt/bin:/bin"}
    assert found[2].environment == {"PATH": "/opt/bin:/bin", "CLEANUP_AT": "03:30"}


def test_a_line_of_the_system_names_a_user_first() -> None:
    [line] = lines("0 3 * * *\troot\tpg_dump wa >/srv/wa.sql\n", with_user=True)
    assert line.command == "pg_dump wa >/srv/wa.sql"
