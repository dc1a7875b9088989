"""A command line of commands that nobody needs, each ending in one of the ways a command can end."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from opsctl import errors
from opsctl.cli import frame
from opsctl.cli.frame import Companies, Invocation, Since, Yes, command
from opsctl.report import Column, Failure, Report

app = typer.Typer(
    name="opsctl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
group = typer.Typer(help="A group of commands.")
app.add_typer(group, name="group")

SECRET = "a-row-with-a-private-key"
NASTY = "\x1b]0;title\x07 [bold]x [/x] \u202egnp.exe \udcff \r\n"


@dataclass(frozen=True)
class Row:
    company_id: str
    keys: int
    note: str | None = None


COLUMNS = (Column("company", "company_id"), Column("keys", "keys", numeric=True), Column("note", "note"))


def ending(name: str, report: Callable[[Invocation], Report]) -> None:
    """Register a command without flags of its own."""

    def body(ctx: typer.Context) -> Report:
        """End in one way."""
        return report(ctx.obj)

    command(group, name, examples=[f"opsctl group {name}"])(body)


def raising(name: str, error: BaseException) -> None:
    def report(run: Invocation) -> NoReturn:
        raise error

    ending(name, report)


@app.callback()
def invented() -> None:
    """Stand for the command tree."""


ending("done", lambda run: Report("2 companies restored", details=["a detail"]))
ending("warned", lambda run: Report("restored", warnings=["one key was odd"]))


def failing(code: int) -> None:
    failure = Failure(
        "invented", f"it ended with {code}", hint="opsctl triage", runbook="runbooks/1-postgresql-unreachable.md"
    )
    ending(f"code-{code}", lambda run: Report(failure.message, exit_code=code, failure=failure))


failing(1)
failing(5)
failing(6)
ending(
    "half",
    lambda run: Report(
        "1 of 2 companies restored",
        rows=[Row("a", 1), Row("b", 0, "torn")],
        columns=COLUMNS,
        warnings=["b is torn"],
        next_lines=["opsctl sessions verify"],
        exit_code=6,
        failure=Failure("half-done", "b is missing"),
    ),
)
ending("unwell", lambda run: Report("the pool is full", exit_code=1))
ending("table", lambda run: Report("2 rows", rows=[Row("a", 1234567), Row("b" * 60, 2, "word " * 20)], columns=COLUMNS))
ending("facts", lambda run: Report("a fact", facts={"size_bytes": 1, "folder": Path("/srv"), "nothing": None}))
ending(
    "nasty",
    lambda run: Report(
        f"summary {NASTY}",
        rows=[Row(NASTY, 1, f"[red]{NASTY}")],
        columns=COLUMNS,
        facts={"huge": 2**70},
        warnings=[f"warning {NASTY}"],
        next_lines=[f"opsctl {NASTY}"],
        details=[NASTY],
    ),
)
ending("unshowable", lambda run: Report("done all the same", rows=["not a row"], columns=COLUMNS, facts={"f": Rude()}))
raising("nasty-error", errors.Refused(f"refused {NASTY}", hint=NASTY, runbook=NASTY))

raising("usage-error", errors.UsageError("that makes no sense"))
raising("settings-error", errors.SettingsError("RTO_TARGET_SECONDS makes no sense"))
raising("source-error", errors.SourceUnavailable("no source", hint="opsctl triage"))
raising("database-error", errors.DatabaseUnavailable("did not answer within 5 s", kind="timeout", transient=True))
raising("refused-error", errors.Refused("/srv is not ours", hint="choose another --to"))
raising("half-done-error", errors.HalfDone("2 of 3 companies are missing"))
raising("locked-error", errors.Locked("pid 7 works on it since 03:04"))
raising("base-error", errors.OpsctlError("an error of no class"))
raising("bug", ValueError(SECRET))
raising("exits", SystemExit(0))


class Rude:
    """Cannot even be printed."""

    def __str__(self) -> NoReturn:
        raise ValueError(SECRET)


def _broken_pipe(run: Invocation) -> NoReturn:
    """What a program that went away does to whoever feeds it."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as program:
        program.wait()
        assert program.stdin
        program.stdin.write(b"x" * 100_000)
        program.stdin.flush()
    raise AssertionError


ending("broken-pipe", _broken_pipe)


@command(app, "wait", examples=["opsctl wait /tmp/cleaned-up"])
def wait(ctx: typer.Context, cleaned_up: Path, once_more: bool = False) -> Report:
    """Wait for a signal or the deadline."""
    run: Invocation = ctx.obj
    try:
        with run.journal.step("wait", total=2) as advance:
            advance(1)
            sys.stderr.write("waiting\n")
            for _ in range(1200):  # a signal just before a sleep does not end it
                time.sleep(0.05)
    finally:
        if once_more:
            signal.raise_signal(signal.SIGTERM)
        cleaned_up.touch()
    return Report("nobody came")


@command(app, "ask", examples=["opsctl ask --yes"])
def ask(ctx: typer.Context, yes: Yes = False) -> Report:
    """Ask before it acts."""
    run: Invocation = ctx.obj
    run.confirm("Delete [bold] 3 keys?")
    remaining = run.deadline.remaining()
    assert remaining is not None
    return Report("deleted", facts={"remaining_s": remaining})


@command(
    app, "emergency", emergency=True, examples=["opsctl emergency", "opsctl emergency --since 2026-01-31T03:04Z --json"]
)
def emergency(
    ctx: typer.Context,
    companies: Companies = None,
    since: Since = None,
    met: bool = False,
    nap_s: float = 0,
    unreachable: bool = False,
) -> Report:
    """Restore something against the clock."""
    if unreachable:
        raise errors.SourceUnavailable("nothing answers")
    run: Invocation = ctx.obj
    with run.journal.step("export session files", total=1) as advance:
        time.sleep(nap_s)
        advance(1)
    scope = "connected" if met else "files"
    return Report(
        "restored",
        facts={"companies": companies, "environment": run.settings.environment},
        rto_scope=scope,
        rto_met=met or None,
    )


@command(app, "peace", deadline_s=None, needs_settings=False, examples=["opsctl peace"])
def peace(ctx: typer.Context, size: Annotated[int, typer.Option(help="A number.")] = 0) -> Report:
    """Look at settings that may be broken, without a deadline."""
    run: Invocation = ctx.obj
    return Report("peace", facts={"problems": run.raw_settings.problems, "remaining_s": run.deadline.remaining()})


if __name__ == "__main__":
    sys.exit(frame.main(app))
