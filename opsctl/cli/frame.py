"""What every command gets, once: settings, deadline, clock, common flags, confirmation, output, Sentry, exit code.

`@command` is the only way to register a command, so none can forget. A command returns a `Report` or raises one of
`opsctl.errors`; everything else that can end it (a bug, a signal, a deadline, a broken pipe) is answered here.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import secrets
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ParameterInfo

from opsctl.errors import Interrupted, OpsctlError, Refused, SettingsError, SourceUnavailable, UsageError
from opsctl.journal import Journal, Silent, Watcher
from opsctl.report import Ending, Failure, Plugin, Report, Rto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from opsctl.notify import Notices
    from opsctl.settings import Settings
    from opsctl.stores.postgres import Snapshot

EMERGENCY_DEADLINE_S = 60.0
SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S = 0.1, 86400.0
_RECEIVERS = ("SENTRY_DSN", "HEALTHCHECK_URL", "TELEGRAM_BOT_TOKEN")
_EMERGENCY_FAILED = frozenset({4, 5, 6, 70})
BACKSTOP_S = 3.0
"""How long after its deadline a command that does not look at the clock itself is interrupted."""


def seconds(text: str) -> float:
    """An option's value in seconds."""
    with suppress(ValueError):
        if SHORTEST_DEADLINE_S <= (number := float(text)) <= LONGEST_DEADLINE_S:  # which nan is not
            return number
    raise typer.BadParameter(
        f"{text!r} is not a number of seconds from {SHORTEST_DEADLINE_S} to {LONGEST_DEADLINE_S:g}"
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time like 2026-01-31T03:04Z") from None
    if moment.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no time zone; in UTC it is {text}Z")
    if moment > datetime.now(UTC):
        raise typer.BadParameter(f"{text!r} is in the future")
    return moment


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing unless something is abnormal.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the details too.")]
EnvFile = Annotated[
    Path | None, typer.Option("--env-file", metavar="FILE", help="Read settings from FILE instead of ./.env.")
]
DeadlineSeconds = Annotated[
    float | None,
    typer.Option("--deadline", metavar="SECONDS", parser=seconds, help="Give up after this many seconds."),
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
        parser=_moment,
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


class Group(TyperGroup):
    """A group of commands that starts as fast as Typer can.

    Typer hands every option's value to pydantic, whose import takes longer than all the rest of a start; a flag that
    already is True or False is spared that. So a group's own options must be flags with a default: `--help` gets one
    here, and Typer's two completion options are left out where another command was typed.
    """

    def get_help_option(self, ctx: Any) -> Any:  # noqa: ANN401 - Typer keeps the types of both to itself
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - as above
        if args and not args[0].startswith("-"):
            self.params = [param for param in self.params if param.name not in _COMPLETION_OPTIONS]
        return super().parse_args(ctx, args)


_COMPLETION_OPTIONS = {"install_completion", "show_completion"}


class Command(TyperCommand):
    """A command that imports pydantic only where an option with a value was typed: most runs have none."""

    def __init__(self, *args: Any, **more: Any) -> None:  # noqa: ANN401 - Typer's own
        super().__init__(*args, **more)
        for param in self.params:
            vars(param)["get_runtime_param"] = partial(_IfGiven, getattr(param, "get_runtime_param"))  # noqa: B009

    def get_help_option(self, ctx: Any) -> Any:  # noqa: ANN401 - Typer keeps the types of both to itself
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


@dataclass(frozen=True)
class _IfGiven:
    """What turns an option's text into its value, made when there is one: making it takes pydantic."""

    made: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ANN401 - as Typer calls it
        """The value, as Typer's own would give it."""
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        return self.made().coerce(value, param=param, ctx=ctx)


class Deadline:
    """The moment at which a command stops waiting; None is never."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None where there is no deadline."""
        return None if self.seconds is None else max(0.0, self._started + self.seconds - self._clock())

    def lift(self) -> None:
        """No end any more: what is done from here on has limits of its own, step by step."""
        self.seconds = None
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def limited(self, seconds: float) -> Iterator[Callable[[], float | None]]:
        """An end in so many seconds, for the block; gives what is left of them."""
        self.seconds, self._started = seconds, self._clock()
        signal.setitimer(signal.ITIMER_REAL, seconds + BACKSTOP_S)
        try:
            yield self.remaining
        finally:
            self.lift()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a person is asked: thinking does not use the deadline up."""
        asked = self._clock()
        backstop, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            yield
        finally:
            self._started += self._clock() - asked
            signal.setitimer(signal.ITIMER_REAL, backstop)


def _to_nobody(report: Report) -> None:
    """Where no frame listens."""


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
    plugin: bool = False
    """`--nagios`: one line, and the exit codes of monitoring plugins."""
    emit: Callable[[Report], None] = _to_nobody
    """Print a report before the last one, as the last one will be: JSON lines, with `--json`."""

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

    def database(self) -> Callable[[], AbstractContextManager[Snapshot]]:
        """Opens one snapshot of the database under the run's deadline, when called. Raises `SettingsError`."""
        from opsctl import db
        from opsctl.stores.postgres import snapshot

        address = db.address(self.settings)

        @contextmanager
        def open_snapshot() -> Iterator[Snapshot]:
            with db.connect(address, self.deadline.remaining()) as connection, snapshot(connection) as opened:
                yield opened

        return open_snapshot

    def confirm(self, question: str) -> None:
        """Ask before something that can hurt. Without a terminal `--yes` is needed (2); a no is a refusal (5)."""
        if self.yes:
            return
        if self.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"this asks before it acts ({question}) and nobody can answer here", hint="add --yes")
        from opsctl.cli.render import clean

        with self.deadline.paused():
            # Not typer.confirm: it turns Ctrl-C and SIGTERM into an exception of its own.
            sys.stderr.write(f"{clean(question)} [y/N] ")
            sys.stderr.flush()
            answer = sys.stdin.buffer.readline()
        if answer.strip().lower() not in {b"y", b"yes"}:
            raise Refused("not confirmed, so nothing was changed")


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

    `emergency` commands change where the sessions live or put back what an incident took: their failures go to Sentry
    as fatal and without a cooldown, and to Telegram. `deadline_s` is the default of `--deadline`;
    `needs_settings=False` is for the commands that look at broken settings; drills do not report their failures.
    """

    def register(body: Callable[..., Report]) -> Callable[..., int]:
        parameters = inspect.signature(body, eval_str=True).parameters
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
                run_id=_new_run_id(),
                deadline=Deadline(deadline_s if seconds is None else seconds),
                journal=Journal(_watcher(quiet=flags["quiet"] or flags["json"])),
                yes=bool(given.get("yes", False)),
                plugin=bool(given.get("nagios", False)),
                options={n: v for n, v in {**given, "deadline": seconds}.items() if v not in (None, False, [])},
                **flags,
            )
            ctx.obj = run

            def work() -> Report:
                if needs_settings:
                    run.settings.require_sound()
                return body(ctx, **given)

            frame = _Frame(
                run,
                emergency=emergency,
                has_target="since" in parameters,
                reports_failures=reports_failures,
                since=given.get("since"),
            )
            return frame.run(work)

        wanted = {**parameters, **common}
        hints = get_type_hints(body, include_extras=True)
        vars(framed)["__signature__"] = inspect.Signature(list(wanted.values()))
        framed.__annotations__ = {n: hints.get(n, p.annotation) for n, p in wanted.items()}
        for annotation in framed.__annotations__.values():
            for told in getattr(annotation, "__metadata__", ()):
                if isinstance(told, ParameterInfo):
                    told.readable = False  # what may not be read is for the command to name, with what to do
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        app.command(name, cls=Command, epilog=epilog)(framed)
        return framed

    return register


def _command_name(ctx: typer.Context) -> str:
    return " ".join(ctx.command_path.split()[1:])


def _new_run_id() -> str:
    """Sorts by time, also within a second: 2 microseconds' worth of 19 bits, and 5 random ones."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond // 2 << 5 | secrets.randbelow(32):06x}"


def _watcher(*, quiet: bool) -> Watcher:
    if quiet:
        return Silent()
    from opsctl.cli.render import StepPrinter

    return StepPrinter()


class _Frame:
    """Runs one command's body and turns whatever comes out of it into one `Ending`."""

    def __init__(
        self,
        run: Invocation,
        *,
        emergency: bool,
        has_target: bool,
        reports_failures: bool,
        since: datetime | None,
    ) -> None:
        self.invocation = run
        self.emergency = emergency
        self.reports_failures = reports_failures
        self.since = since
        self.has_target = has_target
        """Whether the RTO is counted, also of a run that failed: of what takes `--since`, not of the way back."""
        from opsctl.jobs import job_of

        self.job = job_of(run.command, run.options)
        self.watched_job = None if sys.stdin.isatty() or sys.stderr.isatty() else self.job
        """Nobody has to watch what a person runs and sees."""
        self.notices: Notices | None = None
        run.emit = self._emit

    def run(self, work: Callable[[], Report]) -> int:
        run = self.invocation
        with _never_in_the_way("announced"):
            self._begin()
        report = self._report_of(work)
        with _never_in_the_way("compared with earlier ones"):
            report = self._compared(report)
        ending = self._ending(report)
        with _never_in_the_way("kept in the history"):
            self._keep(ending)
        if run.json and not run.plugin:  # the one document names the event
            with _never_in_the_way("reported"):
                ending = replace(ending, sentry_event_id=self._notify(ending))
            return _deliver(ending, json=True, quiet=run.quiet, verbose=run.verbose)
        try:
            if run.plugin:
                return _deliver_to_plugin_host(ending.report)
            return _deliver(ending, json=False, quiet=run.quiet, verbose=run.verbose)
        finally:  # others are told when the answer is there, which never waits for them
            with _never_in_the_way("reported"):
                self._notify(ending)

    def _emit(self, report: Report) -> None:
        """Print one of several reports; a reader that went away (`| head -1`) ends the run."""
        from opsctl.cli import render

        run, ending = self.invocation, self._ending(report)
        try:
            if run.json:
                render.as_json(ending)
            else:
                render.as_text(ending, quiet=run.quiet, verbose=run.verbose)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard(sys.stdout)
            raise Interrupted(signal.SIGPIPE) from None

    def _report_of(self, work: Callable[[], Report]) -> Report:
        try:
            # Inside the `try`, so that a signal at the last moment is answered too. Afterwards the answer is known,
            # and a signal ends the process in the default way.
            with _signals(self.invocation.deadline):
                return work()
        except OpsctlError as error:
            return _failed(error)
        except Interrupted as error:
            name = signal.Signals(error.exit_code - 128).name
            return _report(error.exit_code, Failure("interrupted", f"stopped by {name}"))
        except KeyboardInterrupt:
            return _report(130, Failure("interrupted", "stopped by SIGINT"))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the last line of defence: no traceback leaves here
            return _report(70, _bug(error))

    def _ending(self, report: Report) -> Ending:
        run = self.invocation
        elapsed_s = round(seconds_since_start(self.since), 3)
        if (
            self.has_target
            and not run.options.get("dry_run")
            and report.exit_code in _EMERGENCY_FAILED
            and report.rto_scope is None
        ):
            # The clock of the outage runs on, whatever this run could not do.
            asked = tuple(run.options.get("company") or ())
            report = replace(report, rto_scope="files", rto_met=False, companies=report.companies or asked)
        rto = None
        if report.rto_scope is not None:
            target_s = float(run.raw_settings["RTO_TARGET_SECONDS"])
            after_s = 0.0 if report.rto_reached_at is None else time.monotonic() - report.rto_reached_at
            counted_s = round(elapsed_s - after_s, 3) if report.rto_elapsed_s is None else report.rto_elapsed_s
            met = False if counted_s > target_s else report.rto_met
            rto = Rto(target_s, counted_s, report.rto_scope, met, run.journal.steps)
        return Ending(
            command=run.command,
            run_id=run.run_id,
            report=report,
            rto=rto,
            steps=run.journal.steps,
            elapsed_s=elapsed_s,
            emergency=self.emergency and not run.options.get("dry_run"),
            options=run.options,
        )

    def _begin(self) -> None:
        """Tell those who watch the job that it has begun."""
        if self.watched_job:
            self.notices = self._new_notices()
        if self.notices:
            self.notices.begin()

    def _new_notices(self) -> Notices | None:
        """None where there is nobody to tell."""
        settings = self._settings()
        if settings is None or not any(settings[name] for name in _RECEIVERS):
            return None
        from opsctl.notify import Notices

        return Notices(settings, self.watched_job)

    def _settings(self) -> Settings | None:
        try:
            return self.invocation.raw_settings
        except SettingsError:
            return None

    def _compared(self, report: Report) -> Report:
        """With a warning for each way in which this run of a job is unlike the last ones."""
        settings = self._settings()
        if self.watched_job is None or settings is None:
            return report
        from opsctl.jobs import unusual
        from opsctl.state import State

        warnings = tuple(unusual(self.watched_job, State(settings.state_dir), report, seconds_since_start()))
        return replace(report, warnings=(*report.warnings, *warnings), noteworthy=True) if warnings else report

    def _keep(self, ending: Ending) -> None:
        if ending.rto is None and self.watched_job is None:
            return
        from opsctl.state import State

        state = State(self.invocation.raw_settings.state_dir)
        if self.watched_job:
            from opsctl.jobs import remember

            remember(self.watched_job, state, ending)
        if ending.rto is None:
            return
        state.append(
            "history",
            {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "run_id": ending.run_id,
                "command": ending.command,
                "exit_code": ending.exit_code,
                "elapsed_s": ending.elapsed_s,
                "target_s": ending.rto.target_s,
                "scope": ending.rto.scope,
                "facts": dict(ending.report.facts),
                "met": ending.rto.met,
                "steps": [[s.name, s.seconds, s.ok] for s in ending.steps],
            },
        )

    def _notify(self, ending: Ending) -> str | None:
        """Tell others, also what earlier runs could not; gives the id of the event that Sentry has taken."""
        notices = self.notices or self._new_notices()
        if notices is None:
            return None
        alarming = ending.exit_code in {1, 4, 6, 70} or (ending.exit_code in {3, 5} and not sys.stderr.isatty())
        announced = self.job is not None and self.job.announced and (alarming or ending.exit_code == 0)
        event_id = notices.end(
            ending,
            event=self.reports_failures and (alarming or ending.report.noteworthy),
            message=announced or (alarming and ending.emergency),
        )
        self._tell_refusals(ending, notices.refusals)
        return event_id

    def _tell_refusals(self, ending: Ending, refusals: Sequence[str]) -> None:
        """Where those who should watch a job do not listen, whoever reads cron's mail has to know."""
        if self.watched_job is None or not refusals:
            return
        from opsctl.jobs import remember_warnings
        from opsctl.state import State

        _say(f"opsctl {ending.command}: warning: {'; '.join(refusals)}")
        remember_warnings(self.watched_job, State(self.invocation.raw_settings.state_dir), ending, refusals)


@contextmanager
def _never_in_the_way(what: str) -> Iterator[None]:
    """Around what comes after the work: neither a bug nor Ctrl-C there may take the answer away."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - see above
        _say(f"opsctl: this run could not be {what}: {type(error).__name__}")


def _bug(error: BaseException) -> Failure:
    """A bug's message could hold a row or a password, so only its kind and place are shown."""
    import traceback

    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno} in {place.name}"
    if os.environ.get("OPSCTL_DEBUG") == "1":
        _say("".join(traceback.format_tb(error.__traceback__)).rstrip())
    return Failure(
        "bug",
        f"this is a bug in opsctl: {type(error).__name__} at {where}",
        hint="report it with the line above; OPSCTL_DEBUG=1 prints where it came through",
    )


def _failed(error: OpsctlError) -> Report:
    return _report(error.exit_code, Failure(error.kind, error.message, error.hint, error.runbook))


def _report(exit_code: int, failure: Failure) -> Report:
    return Report(summary=failure.message, exit_code=exit_code, failure=failure)


def seconds_since_start(since: datetime | None = None) -> float:
    """Since the outage where the operator said when it was, else since this process was started (proc_pid_stat(5))."""
    if since is not None:
        return (datetime.now(UTC) - since) / timedelta(seconds=1)
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


class _signals:  # noqa: N801 - reads as a statement: `with _signals(deadline):`
    """Turns SIGTERM, SIGHUP and the deadline into exceptions, so that what was staged is cleaned up.

    SIGINT is Python's own KeyboardInterrupt; the second one skips the cleaning up, because a person asked twice.
    """

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def __enter__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._stop)
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)
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
        raise SourceUnavailable(
            f"not done within {self.deadline.seconds:g} s", kind="deadline", hint="raise --deadline"
        )


def _deliver(ending: Ending, *, json: bool, quiet: bool, verbose: bool) -> int:
    """Print the answer and give the exit code, which a reader that went away (`| head`) does not change."""
    from opsctl.cli import render

    try:
        if json:
            render.as_json(ending)
        else:
            render.as_text(ending, quiet=quiet, verbose=verbose)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        code = _unwritable(error)
        return ending.exit_code or code
    except Exception as error:
        report = ending.report
        if not (report.rows or report.facts):
            raise
        # A value that cannot be shown is a bug; what was done is told all the same.
        failure = report.failure or _bug(error)
        told = replace(report, rows=(), facts={}, exit_code=report.exit_code or 70, failure=failure)
        return _deliver(replace(ending, report=told), json=json, quiet=quiet, verbose=verbose)
    return ending.exit_code


def _deliver_to_plugin_host(report: Report) -> int:
    """One line and 0, 1, 2 or 3; whatever kept the command from an answer of that kind is 3, unknown."""
    from opsctl.cli import render

    plugin = report.plugin or Plugin(3, f"OPSCTL UNKNOWN: {report.summary}")
    with suppress(OSError):
        sys.stdout.write(render.clean(plugin.line) + "\n")
        sys.stdout.flush()
    return plugin.code


def _unwritable(error: OSError) -> int:
    _discard(sys.stdout)
    _say(f"opsctl: the answer could not be written: {error.strerror}")
    return 70


def _discard(stream: TextIO) -> None:
    """Let what is left in it go to /dev/null: the interpreter's last flush, if it failed, would end with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(line + "\n")


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr (`>&-`) becomes /dev/null, else the next file that is opened becomes it.

    Text that stdout's encoding lacks is escaped, as on stderr, instead of raising.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - for the whole process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit code. Usage errors speak JSON too where `--json` was typed."""
    _open_standard_streams()
    code = _exit_code(app, list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    return code


def _exit_code(app: typer.Typer, words: list[str]) -> int:
    as_json = "--json" in words
    try:
        code = _typed_part(app, words)(words, prog_name="opsctl", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:  # what was typed makes no sense
        code = _usage_failed(error, as_json=as_json)
        return 3 if "--nagios" in words else code
    except (BrokenPipeError, SystemExit):  # Typer makes the first into the second while it prints a help text
        _discard(sys.stdout)
        return 0
    except OSError as error:
        return _unwritable(error)
    except Exception as error:  # noqa: BLE001 - the last line of defence, outside of a command
        return _ended_early("opsctl", 70, _bug(error), as_json=as_json)
    return int(code or 0)


def _typed_part(app: typer.Typer, words: list[str]) -> typer.Typer:
    """The tree with only the group that is typed: to build every command takes Typer longer than most of them run."""
    typed = [group for group in app.registered_groups if words and group.name == words[0]]
    if not typed:
        return app
    part = copy.copy(app)
    part.registered_groups = typed
    return part


def _usage_failed(error: typer.TyperException, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "opsctl"
    message = error.format_message().strip()
    if as_json:
        return _ended_early(path, 2, Failure("usage", message, hint=f"{path} --help"), as_json=True)
    if context is None:
        _say(f"Error: {message}\nTry '{path} --help'.")
    elif message == "Missing command.":
        _say(context.get_help())
    else:
        _say(f"{context.get_usage()}\nError: {message}\nTry '{path} --help'.")
    return 2


def _ended_early(path: str, exit_code: int, failure: Failure, *, as_json: bool) -> int:
    """Answer where no command has begun."""
    name = " ".join(path.split()[1:])
    report = _report(exit_code, failure)
    ending = Ending(name, _new_run_id(), report, None, (), 0.0, emergency=False, options={})
    return _deliver(ending, json=as_json, quiet=False, verbose=False)
