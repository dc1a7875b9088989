"""Does a secret leave? Planted ones, every command, what breaks them, and a search through all that came out.

Nothing of the installation is touched: server, folders, settings and receivers live in one scratch folder. Before the
commands, the same secrets are let out on purpose in every channel, and the search has to find each of them: a search
that cannot fail proves nothing.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

from opsctl import process
from opsctl.operations.drill import scratch_folder, translating
from opsctl.operations.leak_phases import PHASES, the_rest
from opsctl.operations.leak_stage import CHANNELS, PATHS, STEP_LIMIT_S, as_a_program, planted_stage
from opsctl.operations.secret_search import Search
from opsctl.report import Column, Failure, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from opsctl.catcher import Catcher
    from opsctl.journal import Journal
    from opsctl.operations.leak_stage import Phase, Run, Stage

_SHOWN_LEAKS = 5


@dataclass(frozen=True, slots=True)
class Channel:
    """One way out, and how much was searched in it."""

    channel: str
    searched: int
    found_when_planted: str
    """How many of the secrets that were let out here on purpose the search has found."""
    leaks: int


_COLUMNS = (
    Column("Where", "channel"),
    Column("Searched", "searched", numeric=True),
    Column("Let out and found", "found_when_planted", numeric=True),
    Column("Leaks", "leaks", numeric=True),
)


def look_for_leaks(
    *,
    commands: Sequence[str],
    scratch: Path | None,
    journal: Journal,
    run: Run = as_a_program,
) -> Report:
    """Plant, run, break, search. `commands`: every command's name; those without a line below are run bare.

    Exit code 1 where a secret was found, where the search did not find what was let out on purpose, or where a command
    ended as a bug. Raises `Refused` where it cannot be held: no embedded PostgreSQL, no space, no such folder.
    """
    with (
        translating("search", scratch),
        scratch_folder("opsctl-leaks-", scratch) as folder,
        ExitStack() as running,
    ):
        with journal.step("start an embedded PostgreSQL and plant secrets"):
            stage = running.enter_context(planted_stage(folder, run))
        with journal.step("let them out on purpose"):
            control = _let_out(stage)
        for phase in (*PHASES, the_rest(commands)):
            with journal.step(phase.name):
                _act(stage, phase)
    return _report(stage, control)


def _act(stage: Stage, phase: Phase) -> None:
    if phase.prepare:
        phase.prepare(stage)
    more = phase.settings(stage) if phase.settings else {}
    for line in phase.lines:
        stage.type(line, more, phase.run)
    stage.look_around(stage.search)
    if phase.tidy:
        phase.tidy(stage)


def _let_out(stage: Stage) -> dict[str, int]:
    """Let every secret out in every channel, and forget it again: how many the search has found, by channel."""
    search = Search(stage.search.secrets)
    everything = "\n".join(secret.plain for secret in search.secrets)
    program = [sys.executable, "-c", f"import sys\nfor out in (sys.stdout, sys.stderr): out.write({everything!r})"]
    done = process.run(program, environment=stage.scene.environment, timeout_s=STEP_LIMIT_S)
    for channel, said in (("stdout", done.stdout), ("JSON", done.stdout), ("stderr", done.stderr.encode())):
        search.look(channel, "let out", said)
    state, names = stage.folder / "state", stage.folder / "tmp"
    (state / "spool").mkdir(parents=True)
    (state / "history.jsonl").write_text(everything, encoding="utf-8")
    (state / "spool" / "1-let-out").write_text(everything, encoding="utf-8")
    for secret in search.secrets:
        (names / secret.plain).touch()
    for path in PATHS:
        _post(stage.catcher, path, everything.encode())
    stage.look_around(search)
    shutil.rmtree(state)
    for name in names.iterdir():
        name.unlink()
    return {channel: len({leak.secret for leak in search.leaks if leak.channel == channel}) for channel in CHANNELS}


def _post(catcher: Catcher, path: str, body: bytes) -> None:
    request = Request(f"http://127.0.0.1:{catcher.port}{path}", data=body, method="POST")
    with urlopen(request, timeout=5) as answer:  # noqa: S310
        answer.read()


def _report(stage: Stage, control: Mapping[str, int]) -> Report:
    search, expected = stage.search, len(stage.search.secrets)
    rows = [
        Channel(
            channel,
            search.pieces[channel],
            f"{control[channel]} of {expected}",
            sum(leak.channel == channel for leak in search.leaks),
        )
        for channel in CHANNELS
    ]
    blind = [row.channel for row in rows if control[row.channel] != expected]
    leaks = list(dict.fromkeys(f"{leak.secret.name} in {leak.channel}: {leak.where}" for leak in search.leaks))
    problems = [*leaks, *(f"the search is blind in {channel}" for channel in blind), *stage.bugs]
    failure = None
    if problems:
        more = f"; and {len(problems) - _SHOWN_LEAKS} more" if len(problems) > _SHOWN_LEAKS else ""
        kind = "leaked" if leaks else "search-failed"
        failure = Failure(kind, "; ".join(problems[:_SHOWN_LEAKS]) + more, hint="report it; do not send this output on")
    return Report(
        f"{expected} secrets planted, {stage.typed} lines typed, {len(search.leaks)} leaks",
        rows=rows,
        columns=_COLUMNS,
        facts={"secrets": expected, "lines": stage.typed, "leaks": leaks, "blind": blind, "bugs": list(stage.bugs)},
        exit_code=1 if problems else 0,
        failure=failure,
    )
