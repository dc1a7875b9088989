"""The manifest: one JSON object that is read back as it was written, in whatever pieces, and never torn unnoticed."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsctl.baileys.filenames import MANIFEST_FILE
from opsctl.stores.folder import digests_of, entries_of, opened
from opsctl.stores.records import (
    MANIFEST_SCHEMA,
    FileEntry,
    ManifestDamaged,
    Origin,
    manifest_lines,
    packed,
    read_digests,
    read_manifest,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ORIGIN = Origin(
    company_id="962302",
    run_id="20260131T030405Z-abcdef",
    environment="production",
    source="database",
    snapshot_at="2026-01-31 03:04:05+00",
    system_identifier="7300000000000000001",
    timeline=1,
    me_sha256=None,
    service_stopped="operator",
    stale_keys_dropped=False,
    opsctl="0.1.0",
)
hexadecimal = st.binary(min_size=32, max_size=32).map(bytes.hex)
# All that a name, a type and an id can hold: whatever is no NUL character and no half of a surrogate pair.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
times = st.none() | st.just("2026-01-31 03:04:05.678901+00") | words
rows = st.none() | st.binary(min_size=16, max_size=16).filter(any).map(bytes.hex)
entries = st.builds(FileEntry, hexadecimal, words, st.text('ab/:"\\é\n') | words, words, times, times, rows)
files = st.dictionaries(words, entries, max_size=6)


def written(some: dict[str, FileEntry]) -> bytes:
    return b"".join(manifest_lines(ORIGIN, ((name, packed(entry)) for name, entry in some.items())))


def plain(count: int) -> dict[str, FileEntry]:
    """Entries as nearly all are."""
    when = "2026-01-31 03:04:05.678901+00"
    return {
        f"session-{number}.0.json": FileEntry("ab" * 32, "session", f"{number}.0", "none", when, None, "cd" * 16)
        for number in range(count)
    }


def read_from_a_folder(data: bytes) -> tuple[dict[str, FileEntry], dict[str, str]]:
    with TemporaryDirectory() as folder:
        Path(folder, MANIFEST_FILE).write_bytes(data)
        with opened(folder) as fd:
            return dict(entries_of(fd)), dict(digests_of(fd))


@given(files)
def test_it_is_json_and_reads_back_as_it_was_written(some: dict[str, FileEntry]) -> None:
    data = written(some)
    document = orjson.loads(data)
    assert document["schema"] == MANIFEST_SCHEMA
    assert document["files"] == {
        name: dict(zip(("sha256", "type", "id", "form", "updated_at", "expires_at", "row"), entry, strict=True))
        for name, entry in some.items()
    }
    assert list(document["files"]) == list(some)
    assert read_from_a_folder(data) == (some, {name: entry.sha256 for name, entry in some.items()})
    origin, read = read_manifest([data])
    assert (origin, dict(read)) == (ORIGIN, some)
    assert [unpacked(packed(entry)) for entry in some.values()] == list(some.values())


@given(files, st.data())
def test_cut_anywhere_it_is_damaged(some: dict[str, FileEntry], data: st.DataObject) -> None:
    whole = written(some)
    torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for read in (lambda: list(read_manifest([torn])[1]), lambda: list(read_digests([torn]))):
        with pytest.raises(ManifestDamaged):
            read()


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("ab" * 32, "AB"),
        ("ab" * 32, "g" * 64),
        (f'"{"ab" * 32}"', "12"),
        ("cd" * 16, "12"),
        (f',"row":"{"cd" * 16}"', ""),
        ("}", "]"),
    ],
)
def test_a_line_that_says_something_else_is_damaged(there: str, instead: str) -> None:
    head, line, end = written(plain(1)).split(b"\n", 2)
    changed = line.replace(there.encode(), instead.encode())
    assert changed != line
    with pytest.raises(ManifestDamaged):
        list(read_manifest([b"\n".join((head, changed, end))])[1])


def test_a_large_one_is_read_in_pieces_also_where_a_line_is_longer_than_most() -> None:
    some = plain(2_000)
    long = "é" * 7_000
    some[f'session-"{long}.json'] = FileEntry("ef" * 32, "session", long, "none", None, None)
    some |= {f"z{name}": entry for name, entry in plain(2_000).items()}
    assert read_from_a_folder(written(some))[0] == some


def test_a_line_without_an_end_does_not_fill_memory(tmp_path: Path) -> None:
    head = written({}).partition(b"\n")[0]
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.write(head + b'\n"')
        file.truncate(8 * 1024**3)  # all zeros, and none of it on the disk
    read: list[Callable[[int], Iterator[object]]] = [entries_of, digests_of]
    with opened(tmp_path) as fd:
        for each in read:
            with pytest.raises(ManifestDamaged):
                list(each(fd))


def test_what_is_no_file_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_FILE)
    with opened(tmp_path) as fd, pytest.raises(ManifestDamaged):
        list(entries_of(fd))
