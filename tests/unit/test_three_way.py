"""What becomes of each row, for any history of the three sides: nothing is lost, no ratchet goes back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsctl.operations.three_way import (
    CHANGING,
    NEVER_FROM_DATABASE,
    WRITTEN,
    Action,
    Base,
    Circumstances,
    InDatabase,
    InFolder,
    Prefer,
    decide,
    too_many_deleted,
)

BEFORE, COPIED, STOPPED, PUBLISHED, SINCE = (f"2026-01-31 0{hour}:00:00+00" for hour in range(5))
LATER = "2026-01-31 05:00:00+00"


@dataclass(frozen=True)
class History:
    """What was done to one key: each value is named by who wrote it and when."""

    key_type: str
    copied: bool
    """Whether it was there when the copy was taken."""
    on_folder: str
    """Of the file: untouched, written, deleted, torn, or never (it is only in the database)."""
    in_database: str
    """Of the row: untouched, gone, old (of two days ago), written (between copy and stop), since (after publishing)."""

    @property
    def base(self) -> Base | None:
        return Base(b"copied", COPIED) if self.copied else None

    @property
    def file(self) -> InFolder | None:
        match self.on_folder:
            case "untouched":
                return InFolder(b"copied", PUBLISHED) if self.copied else None
            case "written":
                return InFolder(b"written on the folder", LATER)
            case "torn":
                return InFolder(None)
            case _:
                return None

    @property
    def row(self) -> InDatabase | None:
        match self.in_database:
            case "untouched":
                return InDatabase(b"copied", COPIED) if self.copied else None
            case "old":
                return InDatabase(b"of two days ago", BEFORE)
            case "written":
                return InDatabase(b"written after the copy", STOPPED)
            case "since":
                return InDatabase(b"written since publishing", SINCE)
            case _:
                return None


TYPES = st.sampled_from(["session", "sender-key", "pre-key", "creds", "lid-mapping", "device-list", "newsletter"])
HISTORIES = st.builds(
    History,
    TYPES,
    st.booleans(),
    st.sampled_from(["untouched", "written", "deleted", "torn"]),
    st.sampled_from(["untouched", "gone", "old", "written", "since"]),
)
AROUND = st.builds(
    Circumstances,
    st.just(PUBLISHED),
    another_server=st.booleans(),
    rows_lost=st.booleans(),
    prefer=st.sampled_from([None, *Prefer]),
)


def after(history: History, around: Circumstances) -> tuple[Action, bytes | None]:
    """What was decided, and the identity of the row afterwards."""
    verdict = decide(history.key_type, history.base, history.file, history.row, around)
    if verdict.action in WRITTEN:
        assert history.file is not None
        return verdict.action, history.file.identity
    if verdict.action is Action.DELETED:
        return verdict.action, None
    return verdict.action, history.row.identity if history.row else None


@given(HISTORIES, AROUND)
def test_no_key_is_lost_but_one_that_was_published_and_that_the_folder_deleted(
    history: History, around: Circumstances
) -> None:
    action, value = after(history, around)
    had = history.row is not None or (history.file is not None and history.file.identity is not None)
    if had and value is None:
        assert action is Action.DELETED
        assert history.base is not None
        assert history.file is None


@given(HISTORIES, AROUND)
def test_no_ratchet_goes_back(history: History, around: Circumstances) -> None:
    action, value = after(history, around)
    if action is Action.CONFLICT:
        return
    if history.on_folder == "written" and history.key_type in NEVER_FROM_DATABASE:
        assert value == b"written on the folder"  # it was live
    if history.on_folder == "untouched" and history.copied:
        only_there = history.in_database == "written" or (history.in_database == "since" and not around.another_server)
        if only_there:
            assert value == history.row.identity if history.row else None  # only the database went on
        if history.in_database in {"old", "gone", "untouched"}:
            assert value == b"copied"


@given(HISTORIES, AROUND)
def test_what_was_written_on_both_sides_is_told(history: History, around: Circumstances) -> None:
    written_there = history.in_database in {"written", "since"}
    if history.on_folder == "written" and written_there:
        verdict = decide(history.key_type, history.base, history.file, history.row, around)
        assert verdict.conflicting
        if history.in_database == "since":
            assert (verdict.action is Action.CONFLICT) == (
                around.prefer is None or (around.prefer is Prefer.DATABASE and history.key_type in NEVER_FROM_DATABASE)
            )
        else:
            assert verdict.action is Action.UPDATED


@given(HISTORIES, AROUND)
def test_a_second_failback_changes_nothing(history: History, around: Circumstances) -> None:
    action, value = after(history, around)
    if action is Action.CONFLICT:
        return
    # A row that was written has the file's time, or the one that it was published with.
    file = history.file
    time = (COPIED if history.on_folder == "untouched" else LATER) if action in WRITTEN else None
    row = None if value is None else InDatabase(value, time or (history.row.updated_at if history.row else None))
    again = decide(history.key_type, history.base, file, row, around)
    assert again.action not in CHANGING


@given(HISTORIES, AROUND)
def test_a_torn_file_is_neither_deleted_from_nor_written_to_the_database(
    history: History, around: Circumstances
) -> None:
    if history.on_folder == "torn":
        assert after(history, around)[0] is Action.DAMAGED


@pytest.mark.parametrize("key_type", sorted(NEVER_FROM_DATABASE))
def test_of_a_ratchet_the_databases_value_is_never_preferred(key_type: str) -> None:
    history = History(key_type, True, "written", "since")
    around = Circumstances(PUBLISHED, prefer=Prefer.DATABASE)
    assert after(history, around) == (Action.CONFLICT, b"written since publishing")
    assert after(history, Circumstances(PUBLISHED, prefer=Prefer.FILES))[1] == b"written on the folder"


def test_where_updated_at_lies_the_server_that_was_copied_went_on_and_another_one_went_back() -> None:
    base, row = Base(b"copied", COPIED), InDatabase(b"other", COPIED)
    untouched = InFolder(b"copied", PUBLISHED)
    assert decide("session", base, untouched, row, Circumstances(PUBLISHED)).action is Action.KEPT
    for around in (Circumstances(PUBLISHED, another_server=True), Circumstances(PUBLISHED, rows_lost=True)):
        assert decide("session", base, untouched, row, around).action is Action.UPDATED


def test_on_another_server_what_was_written_since_publishing_is_for_somebody_to_decide() -> None:
    base, row = Base(b"copied", COPIED), InDatabase(b"other", SINCE)
    around = Circumstances(PUBLISHED, another_server=True)
    assert decide("session", base, InFolder(b"copied", PUBLISHED), row, around).action is Action.CONFLICT


@pytest.mark.parametrize(
    ("row_at", "action"), [(BEFORE, Action.UPDATED), (LATER, Action.CONFLICT), (None, Action.CONFLICT)]
)
def test_without_a_manifest_the_later_of_file_and_row_is_the_live_one(row_at: str | None, action: Action) -> None:
    verdict = decide("session", None, InFolder(b"file", SINCE), InDatabase(b"row", row_at), Circumstances(None))
    assert verdict.action is action
    assert verdict.conflicting


@given(st.dictionaries(st.sampled_from(["session", "pre-key", "tctoken"]), st.integers(1, 50)), st.integers(1, 50))
@settings(max_examples=50)
def test_more_than_a_fifth_of_a_type_is_an_accident_but_pre_keys_are_consumed(
    deleted: dict[str, int], published: int
) -> None:
    reason = too_many_deleted(deleted, dict.fromkeys(["session", "pre-key", "tctoken"], published))
    excess = [t for t, count in deleted.items() if t != "pre-key" and count / published > 0.2]
    assert (reason is not None) == bool(excess)
