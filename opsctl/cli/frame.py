"""What every command gets, once: settings, deadline, clock, common flags, confirmation, output, Sentry, exit code.

`@command` is the only way to register a command, so none can forget. A command returns a `Report` or raises one of
`opsctl.errors`; everything else that can end it (a bug, a signal, a deadline, a broken pipe) is answered here.
"""

from __future__ import annotations

import inspect
import os
import secrets
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from opsctl.errors import Interrupted, OpsctlError, Refused, SettingsError, SourceUnavailable, UsageError
from opsctl.journal import Journal, Silent, Watcher
from opsctl.report import Ending, Failure, Report, Rto

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from opsctl.settings import Settings

EMERGENCY_DEADLINE_S = 60.0
BACKSTOP_S = 3.0
"""How long after its deadline a command that does not look at the clock itself is interrupted."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing unless something is abnormal.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the details too.")]
EnvFile = Annotated[
    Path | None, typer.Option("--env-file", metavar="FILE", help="Read settings from FILE instead of ./.env.")
]
DeadlineSeconds = Annotated[
    float | None, typer.Option("--deadline", metavar="SECONDS", min=0.1, help="Give up after this many seconds.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Companies = Annotated[
    list[str] | None, typer.Option("--company", metavar="ID", help="Only this company; may be given again.")
]
Since = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        metavar="TIME",
        formats=["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%MZ", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M%z"],
        help="Count the RTO from this moment (2026-01-31T03:04Z) instead of from this process's start.",
    ),
]

_COMMON: dict[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
    "env_file": (EnvFile, None),
    "deadline": (DeadlineSeconds, None),
}


class Deadline:
    """The moment at which a command stops waiting; None is never."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None where there is no deadline."""
        return None if self.seconds is None else max(0.0, self._started + self.seconds - self._clock())


@dataclass
class Invocation:
    """One run of one command: what its body may ask for, as `ctx.obj`."""

    command: str
    run_id: str
    json: bool
    quiet: bool
    verbose: bool
    env_file: Path | None
    deadline: Deadline
    journal: Journal
    yes: bool
    options: dict[str, Any]

    @cached_property
    def settings(self) -> Settings:
        """The sound settings; raises `SettingsError` naming each variable that is not."""
        settings = self.raw_settings
        settings.require_sound()
        return settings

    @cached_property
    def raw_settings(self) -> Settings:
        """The settings with their problems, for the commands that show them."""
        from opsctl.settings import load

        return load(self.env_file)

    def confirm(self, question: str) -> None:
        """Ask before something that can hurt. Without a terminal `--yes` is needed (2); a no is a refusal (5)."""
        if self.yes:
            return
        if self.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"this asks before it acts ({question}) and nobody can answer here", hint="add --yes")
        if not typer.confirm(question, err=True):
            raise Refused("not confirmed", hint="nothing was changed")


def command(
    app: typer.Typer,
    name: str,
    *,
    examples: Sequence[str],
    emergency: bool = False,
    deadline_s: float | None = EMERGENCY_DEADLINE_S,
    needs_settings: bool = True,
    reports_failures: bool = True,
) -> Callable[[Callable[..., Report]], Callable[..., int]]:
    """Register `body` as the command `name` of `app`, inside the frame.

    `emergency` commands report to Sentry as fatal and without a cooldown; `deadline_s` is the default of `--deadline`;
    `needs_settings=False` is for the commands that look at broken settings; drills do not report their failures.
    """

    def register(body: Callable[..., Report]) -> Callable[..., int]:
        parameters = {n: p for n, p in inspect.signature(body, eval_str=True).parameters.items()}
        common = {
            n: inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=d)
            for n, (a, d) in _COMMON.items()
        }

        @wraps(body)
        def framed(ctx: typer.Context, **given: Any) -> int:  # noqa: ANN401 - the flags are the body's own
            flags = {n: given.pop(n) for n in _COMMON}
            seconds = flags.pop("deadline")
            run = Invocation(
                command=_command_name(ctx),
                run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
                deadline=Deadline(deadline_s if seconds is None else seconds),
                journal=Journal(_watcher(quiet=flags["quiet"] or flags["json"])),
                yes=bool(given.get("yes", False)),
                options={n: v for n, v in {**given, "deadline": seconds}.items() if v not in (None, False, [])},
                **flags,
            )
            ctx.obj = run
            if "yes" in given and "yes" not in parameters:
                given.pop("yes")

            def work() -> Report:
                if needs_settings:
                    run.settings.require_sound()
                return body(ctx, **given)

            return _Frame(run, emergency=emergency, reports_failures=reports_failures, since=given.get("since")).run(
                work
            )

        wanted = {**parameters, **common}
        hints = get_type_hints(body, include_extras=True)
        vars(framed)["__signature__"] = inspect.Signature(list(wanted.values()))
        framed.__annotations__ = {n: hints.get(n, p.annotation) for n, p in wanted.items()}
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        app.command(name, epilog=epilog)(framed)
        return framed

    return register


def _command_name(ctx: typer.Context) -> str:
    return " ".join(ctx.command_path.split()[1:])


def _watcher(*, quiet: bool) -> Watcher:
    if quiet:
        return Silent()
    from opsctl.cli.render import StepPrinter

    return StepPrinter()


class _Frame:
    """Runs one command's body and turns whatever comes out of it into one `Ending`."""

    def __init__(self, run: Invocation, *, emergency: bool, reports_failures: bool, since: datetime | None) -> None:
        self.invocation = run
        self.emergency = emergency
        self.reports_failures = reports_failures
        self.since = since

    def run(self, work: Callable[[], Report]) -> int:
        with _signals(self.invocation.deadline):
            report = self._report_of(work)
        # From here on the answer is known; a signal may still end the process, in the default way.
        ending = self._ending(report)
        self._keep(ending)
        ending = self._alert(ending)
        return _deliver(ending, self.invocation)

    def _report_of(self, work: Callable[[], Report]) -> Report:
        try:
            return work()
        except OpsctlError as error:
            return _failed(error)
        except Interrupted as error:
            name = signal.Signals(error.exit_code - 128).name
            return _report(error.exit_code, Failure("interrupted", f"stopped by {name}"))
        except KeyboardInterrupt:
            return _report(130, Failure("interrupted", "stopped by SIGINT"))
        except BrokenPipeError:
            return _report(141, Failure("broken-pipe", "nobody reads the output any more"))
        except Exception as error:  # noqa: BLE001 - the last line of defence: nothing leaves here as a traceback
            return _report(70, self._bug(error))

    def _bug(self, error: Exception) -> Failure:
        """A bug's message could hold a row or a password, so only its kind and place are shown."""
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno} in {place.name}"
        if os.environ.get("OPSCTL_DEBUG") == "1":
            sys.stderr.write("".join(traceback.format_tb(error.__traceback__)))
        return Failure(
            "bug",
            f"this is a bug in opsctl: {type(error).__name__} at {where}",
            hint="report it with the line above; OPSCTL_DEBUG=1 prints where it came through",
        )

    def _ending(self, report: Report) -> Ending:
        run = self.invocation
        elapsed_s = round(_seconds_since_start(self.since), 3)
        rto = None
        if report.rto_scope is not None:
            target_s = float(run.raw_settings["RTO_TARGET_SECONDS"])
            met = False if elapsed_s > target_s else report.rto_met
            rto = Rto(target_s, elapsed_s, report.rto_scope, met, run.journal.steps)
        return Ending(
            command=run.command,
            run_id=run.run_id,
            report=report,
            rto=rto,
            steps=run.journal.steps,
            elapsed_s=elapsed_s,
            emergency=self.emergency,
            options=run.options,
        )

    def _keep(self, ending: Ending) -> None:
        if ending.rto is None:
            return
        from opsctl.state import State

        State(self.invocation.raw_settings.state_dir).append(
            "history",
            {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "run_id": ending.run_id,
                "command": ending.command,
                "exit_code": ending.exit_code,
                "elapsed_s": ending.elapsed_s,
                "target_s": ending.rto.target_s,
                "scope": ending.rto.scope,
                "met": ending.rto.met,
                "steps": [[s.name, s.seconds, s.ok] for s in ending.steps],
            },
        )

    def _alert(self, ending: Ending) -> Ending:
        nobody_watches = not sys.stderr.isatty()
        wanted = ending.exit_code in {1, 4, 6, 70} or (ending.exit_code in {3, 5} and nobody_watches)
        if not wanted or not self.reports_failures:
            return ending
        try:
            settings = self.invocation.raw_settings
        except SettingsError:
            return ending
        if not settings["SENTRY_DSN"]:
            return ending
        from opsctl import sentry

        return replace(ending, sentry_event_id=sentry.report_failure(ending, settings))


def _failed(error: OpsctlError) -> Report:
    return _report(error.exit_code, Failure(error.kind, error.message, error.hint, error.runbook))


def _report(exit_code: int, failure: Failure) -> Report:
    return Report(summary=failure.message, exit_code=exit_code, failure=failure)


def _seconds_since_start(since: datetime | None) -> float:
    """Since the outage where the operator said when it was, else since this process was started (proc_pid_stat(5))."""
    if since is not None:
        return max(0.0, (datetime.now(UTC) - since.replace(tzinfo=since.tzinfo or UTC)) / timedelta(seconds=1))
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


class _signals:  # noqa: N801 - reads as a statement: `with _signals(deadline):`
    """Turns SIGTERM, SIGHUP and the deadline into exceptions, so that what was staged is cleaned up."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def __enter__(self) -> None:
        self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop)}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._stop)
        remaining = self.deadline.remaining()
        if remaining is not None:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._too_late)
            signal.setitimer(signal.ITIMER_REAL, remaining + BACKSTOP_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not tear the cleaning up
        raise Interrupted(number)

    def _too_late(self, _: int, __: FrameType | None) -> NoReturn:
        raise SourceUnavailable(f"not done within {self.deadline.seconds:g} s", kind="deadline", hint="opsctl triage")


def _deliver(ending: Ending, run: Invocation) -> int:
    """Print the answer; a reader that went away (`| head`) does not change the exit code."""
    from opsctl.cli import render

    try:
        if run.json:
            render.as_json(ending)
        else:
            render.as_text(ending, quiet=run.quiet, verbose=run.verbose)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
    except OSError as error:
        _close_stdout()
        _say(f"opsctl: the answer could not be written: {error.strerror}")
        return ending.exit_code or 70
    return ending.exit_code


def _close_stdout() -> None:
    # The interpreter flushes stdout once more at its end; into /dev/null that cannot fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
    except OSError:
        return


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit code. Usage errors speak JSON too where `--json` was typed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, prog_name="opsctl", standalone_mode=False)
    except typer.TyperException as error:  # what was typed makes no sense
        return _usage_failed(error, as_json="--json" in words)
    except typer.Abort:
        return 130
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        _close_stdout()
        return 0
    return int(code or 0)


def _usage_failed(error: typer.TyperException, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message().strip()
    path = context.command_path if context else "opsctl"
    if not as_json:
        if context is not None and "Usage:" not in message:
            _say(context.get_usage())
        _say(message if "Usage:" in message else f"Error: {message}\nTry '{path} --help'.")
        return 2
    from opsctl.cli import render

    first = message.splitlines()[0] if "Usage:" not in message else "a command is missing"
    failure = Failure("usage", first, hint=f"{path} --help")
    name = " ".join(path.split()[1:])
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    render.as_json(Ending(name, run_id, _report(2, failure), None, (), 0.0, emergency=False, options={}))
    return 2
