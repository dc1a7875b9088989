"""Which source is the best for a company, by what each says of itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.operations.sources import Kind, Offer, Source, choose
from opsctl.stores.postgres import Server, Snapshot

if TYPE_CHECKING:
    from opsctl.operations.sources import Choice

COMPANY = "962302"
NOW = datetime.now(UTC)


def ago(**span: float) -> str:
    return (NOW - timedelta(**span)).isoformat()


def source(kind: Kind, *, name: str = "", in_recovery: bool = False, **offer: Any) -> Source:
    """A source with one company, which has 100 keys of each of two types."""
    made = Source(kind, name or str(kind))
    if kind in {Kind.DATABASE, Kind.REPLICA}:
        server = Server(True, in_recovery, 150000, ago(), None, ago(minutes=15), 1)
        made.snapshot = Snapshot(None, server)  # type: ignore[arg-type]  # nothing is read through it
    keyed = {"session": 100, "pre-key": 100} if kind is not Kind.CACHE else None
    basis = Offer(COMPANY, made, has_creds=True, key_count=200, as_of=ago(), newest_at=ago(), keys_by_type=keyed)
    made.add(replace(basis, **{"account": "one", "system_identifier": "7", "timeline": 1, **offer}))
    return made


def chosen(*sources: Source, explicit: bool = False) -> Choice:
    return choose(sources, explicit=explicit)[COMPANY]


def order(*sources: Source) -> list[str]:
    return [offer.source.name for offer in chosen(*sources).offers]


def test_of_one_history_a_primary_that_answers_is_now_whatever_two_clocks_say() -> None:
    primary = source(Kind.DATABASE, as_of=ago(hours=2), newest_at=ago(hours=2))
    standby = source(Kind.STANDBY, as_of=ago(), newest_at=ago(hours=2))
    assert order(standby, primary) == ["database", "standby"]


def test_of_one_history_the_later_moment_wins() -> None:
    standby = source(Kind.STANDBY, as_of=ago(seconds=40), newest_at=ago(minutes=2))
    lagging = source(Kind.REPLICA, as_of=ago(minutes=10), newest_at=ago(minutes=2), in_recovery=True)
    assert order(lagging, standby) == ["standby", "replica"]
    up_to_date = source(Kind.REPLICA, as_of=ago(seconds=1), newest_at=ago(minutes=2), in_recovery=True)
    assert order(standby, up_to_date) == ["replica", "standby"]


@pytest.mark.parametrize(("ahead_s", "reason"), [(30, "40 s older"), (3600, "nobody knows which is older: a clock")])
def test_of_a_moment_still_to_come_nobody_knows_the_age(ahead_s: int, reason: str) -> None:
    """Half a minute is only the difference of two clocks."""
    now = datetime.now(UTC)
    ahead = source(Kind.STANDBY, as_of=(now + timedelta(seconds=ahead_s)).isoformat(), newest_at=ago(minutes=2))
    behind_at = (now - timedelta(seconds=40)).isoformat()
    lagging = source(Kind.REPLICA, as_of=behind_at, newest_at=ago(minutes=2), in_recovery=True)
    found = chosen(lagging, ahead)
    assert found.offers[0].age_s(now) == (0.0 if ahead_s == 30 else None)
    assert found.reasons[0].startswith(f"replica: {reason}")


def test_of_two_histories_the_one_with_the_newer_row_wins() -> None:
    """A lagging replica was promoted: it answers as a primary, and has less than the copy of the old one."""
    promoted = source(Kind.DATABASE, timeline=2, newest_at=ago(minutes=30))
    standby = source(Kind.STANDBY, timeline=1, as_of=ago(minutes=2), newest_at=ago(minutes=2))
    assert order(promoted, standby) == ["standby", "database"]
    went_on = source(Kind.DATABASE, timeline=2, newest_at=ago(minutes=1))
    assert order(standby, went_on) == ["database", "standby"]


def test_of_two_histories_that_end_with_the_same_row_the_later_timeline_wins() -> None:
    at = ago(minutes=5)
    promoted = source(Kind.DATABASE, timeline=2, newest_at=at, as_of=ago(minutes=5))
    standby = source(Kind.STANDBY, timeline=1, as_of=ago(minutes=1), newest_at=at)
    assert order(standby, promoted) == ["database", "standby"]


def test_valid_comes_before_fresh() -> None:
    primary = source(Kind.DATABASE, account=None)
    standby = source(Kind.STANDBY, as_of=ago(minutes=50), newest_at=ago(minutes=51))
    found = chosen(primary, standby)
    assert [offer.source.name for offer in found.offers] == ["standby", "database"]
    assert found.reasons == ("database: its credentials have no account, those of standby have",)
    assert found.warning is None


@pytest.mark.parametrize(("left", "best"), [(80, "database"), (79, "standby")])
def test_more_than_a_fifth_of_a_protected_type_is_a_loss(left: int, best: str) -> None:
    primary = source(Kind.DATABASE, keys_by_type={"session": 100, "pre-key": left})
    standby = source(Kind.STANDBY, as_of=ago(minutes=1))
    assert order(primary, standby)[0] == best


def test_a_type_that_is_not_protected_may_come_and_go() -> None:
    primary = source(Kind.DATABASE, keys_by_type={"session": 1, "pre-key": 100})
    assert order(primary, source(Kind.STANDBY, as_of=ago(minutes=1)))[0] == "database"


@pytest.mark.parametrize(("minutes", "best"), [(59, "standby"), (61, "database")])
def test_a_copy_of_more_than_an_hour_ago_makes_no_other_source_damaged(minutes: int, best: str) -> None:
    primary = source(Kind.DATABASE, keys_by_type={"session": 100, "pre-key": 10})
    assert order(primary, source(Kind.STANDBY, as_of=ago(minutes=minutes), newest_at=ago(minutes=90)))[0] == best


@pytest.mark.parametrize(("seconds", "best"), [(50, "database"), (70, "standby")])
def test_a_database_whose_newest_row_is_older_than_the_copys_was_set_back(seconds: int, best: str) -> None:
    at = datetime.fromisoformat(ago(minutes=10))
    primary = source(Kind.DATABASE, newest_at=(at - timedelta(seconds=seconds)).isoformat())
    found = chosen(primary, source(Kind.STANDBY, as_of=ago(minutes=9), newest_at=at.isoformat()))
    assert found.offers[0].source.name == best
    if best == "standby":
        assert found.reasons == ("database: it was set back: its newest row is 70 s older than that of standby",)


@pytest.mark.parametrize("damage", [{}, {"keys_by_type": {"session": 100, "pre-key": 1}}], ids=["sound", "damaged"])
def test_credentials_alone_never_beat_a_source_with_keys(damage: dict[str, Any]) -> None:
    standby = source(Kind.STANDBY, as_of=ago(minutes=30), newest_at=ago(days=1), **damage)
    older = source(Kind.REPLICA, name="other", timeline=9, as_of=ago(minutes=40), newest_at=ago(days=2))
    assert order(source(Kind.CACHE), standby, older)[-1] == "cache"
    assert "cache: it holds no keys" in chosen(source(Kind.CACHE), standby).reasons


def test_every_other_source_is_given_with_why_it_lost() -> None:
    found = chosen(
        source(Kind.DATABASE),
        source(Kind.STANDBY, as_of=ago(seconds=90)),
        source(Kind.REPLICA, name="replica", problem="it is of the environment 'staging'"),
        source(Kind.CACHE),
    )
    assert sorted(found.reasons) == [
        "cache: it holds no keys",
        "replica: it is of the environment 'staging'",
        "standby: 90 s older",
    ]


def test_a_company_that_a_readable_primary_lacks_is_offered_and_not_published() -> None:
    primary, standby = source(Kind.DATABASE), source(Kind.STANDBY)
    primary.offers["other"] = primary.offers.pop(COMPANY)
    found = chosen(primary, standby)
    assert found.withheld is not None
    assert f"opsctl sessions restore --company {COMPANY} --source standby" in found.withheld
    assert chosen(primary, standby, explicit=True).withheld is None
    assert chosen(standby).withheld is None


def test_another_account_of_another_source_is_warned_of() -> None:
    found = chosen(source(Kind.DATABASE), source(Kind.STANDBY, account="another", as_of=ago(minutes=1)))
    assert found.offers[0].source.name == "database"
    assert found.warning == "standby has it with another account"
