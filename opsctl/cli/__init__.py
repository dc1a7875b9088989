"""The command tree."""

import sys
from typing import Annotated

import typer

import opsctl
from opsctl.cli import cache, config, cron, db, drill, frame, keys, runbook, selftest, sessions, standby, switch, triage

EMERGENCY = """\
PostgreSQL is down and WhatsApp with it? In this order:

  opsctl triage                                      what is broken, and the next line
  opsctl sessions restore --switch                   everything, until WhatsApp is connected
or step by step:
  pm2 stop SERVICES                                  nobody may own the sessions
  opsctl sessions restore --service-stopped          sessions back as files, proven
  opsctl sessions verify DIR                         will they log in?
  opsctl sessions undo                               the folders as they were
"""

app = typer.Typer(
    cls=frame.Group,
    name="opsctl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(triage.app)  # without a name of its own: the first thing that is typed is one word
app.add_typer(sessions.app, name="sessions")
app.add_typer(switch.app, name="switch")
app.add_typer(db.app, name="db")
app.add_typer(standby.app, name="standby")
app.add_typer(cache.app, name="cache")
app.add_typer(keys.app, name="keys")
app.add_typer(drill.app, name="drill")
app.add_typer(runbook.app, name="runbook")
app.add_typer(config.app, name="config")
app.add_typer(cron.app, name="cron")
app.add_typer(selftest.app, name="selftest")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"opsctl {opsctl.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def opsctl_(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Restore WhatsApp sessions when their database is gone, and bring everything back afterwards."""
    if ctx.invoked_subcommand is None:
        sys.stdout.write(EMERGENCY + "\n" + ctx.get_help() + "\n")


def main() -> None:
    """The whole of a run, from `sys.argv` to its exit code."""
    sys.exit(frame.main(app))
