"""What the search for leaks types, phase by phase, and how it breaks what the lines need."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from opsctl import process
from opsctl.operations.leak_stage import STEP_LIMIT_S, Phase, with_a_full_disk
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opsctl.operations.leak_stage import Stage

_UNTIL_KILLED_S = 0.5


def _expired_and_mistyped(stage: Stage) -> None:
    stage.execute(query("leaks_expire"), query("leaks_mistype"))


def _a_key_less(stage: Stage) -> None:
    """What a repair puts back; and folders that differ from their rows."""
    stage.execute(query("drill_corrupt_creds"), company_id="962302")


def _rows_forbidden(stage: Stage) -> None:
    stage.execute(query("drill_delete_keys"), company_id="962302")
    stage.execute(query("leaks_forbid"))


def _torn(stage: Stage) -> None:
    """Credentials and a cache that end in the middle, beside a table whose credentials are damaged."""
    stage.execute(query("drill_corrupt_creds"), company_id="962303")
    for path in (*stage.scene.sessions.glob("company_*/creds.json"), stage.folder / "app" / ".baileys-cache.json"):
        if path.exists():
            os.truncate(path, path.stat().st_size // 2)


def _killed(stage: Stage) -> None:
    """Restores that are stopped while they work, by both signals."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        words = process.opsctl_words("sessions", "restore", "--replace", "--discard-changes", "--yes")
        restore = process.start(words, environment=stage.scene.environment)
        with suppress(subprocess.TimeoutExpired):
            restore.wait(_UNTIL_KILLED_S)
        restore.send_signal(request)
        restore.wait(STEP_LIMIT_S)


def _tables_gone(stage: Stage) -> None:
    stage.execute(query("drill_drop_tables"))


def _receivers_fail(stage: Stage) -> None:
    stage.server.stop()
    stage.catcher.status = 500


def _receivers_answer(stage: Stage) -> None:
    stage.catcher.status = 200


def _frozen(stage: Stage) -> None:
    stage.server.freeze()


def _thawed(stage: Stage) -> None:
    stage.server.thaw()


def _read_only(stage: Stage) -> dict[str, str]:
    """The same server, as one without a disk to write to answers."""
    url = stage.planted.url(stage.server.port)
    return {"DATABASE_URL": f"{url}?options=-c%20default_transaction_read_only%3Don"}


def _wrong_password(stage: Stage) -> dict[str, str]:
    url = stage.planted.url(stage.server.port, stage.planted.other_password)
    return {"DATABASE_URL": url, "OPSCTL_REPLICA_URL": url}


def _torn_address(form: str) -> Callable[[Stage], dict[str, str]]:
    """An address with a password in it, as nobody can read it."""
    return lambda stage: {"DATABASE_URL": form.format(stage.planted.password, port=stage.server.port)}


def _torn_settings(stage: Stage) -> dict[str, str]:
    """Secrets where they do not belong, and a file whose quotes are open."""
    planted = stage.planted
    path = stage.folder / "app" / "torn.env"
    path.write_text(
        f"POSTGRES_PASSWORD='{planted.other_password}\nSENTRY_DSN=\"{planted.sentry_key}\n", encoding="utf-8"
    )
    return {
        "OPSCTL_ENV_FILE": str(path),
        "SENTRY_DSN": planted.sentry_key,
        "TELEGRAM_BOT_TOKEN": f"token {planted.bot_token}",
        "HEALTHCHECK_URL": planted.ping_key,
    }


def _services_that_tell(stage: Stage) -> dict[str, str]:
    """Programs that print secrets and fail, a log and an env file that hold some, a fallback that cannot be made."""
    app, planted = stage.folder / "app", stage.planted
    told = f"DATABASE_URL={planted.url(stage.server.port)}\nPASSWORD='{planted.password}'\nTOKEN={planted.bot_token}\n"
    (app / ".env").write_text(told, encoding="utf-8")
    log = app / "service.log"
    log.write_text(f"company 962302 failed to decrypt: Bad MAC {told}" * 20, encoding="utf-8")
    program = app / "tells"
    program.write_text(f"#!/bin/sh\ncat {app}/.env; cat {app}/.env >&2; exit 1\n", encoding="utf-8")
    program.chmod(0o755)
    commands = {f"SERVICE_{verb}_COMMAND": str(program) for verb in ("STATUS", "STOP", "START")}
    fallback = {"FALLBACK_DIR": str(stage.folder / "fallback"), "FALLBACK_DRY_BOOT_COMMAND": str(program)}
    return {"SERVICE_MANAGER": "command", "SERVICE_NAMES": "service", "SERVICE_LOG": str(log), **commands, **fallback}


_ASKS = ("triage --json", "sessions restore --json", "db health --nagios")
_WRITES = (
    "sessions repair --company 962302 --from standby --service-stopped --yes --json",
    "sessions failback --service-stopped --yes --verbose",
    "keys doctor --fix --service-stopped --yes --verbose",
    "keys cleanup --yes --json",
    "standby sync --verbose",
    "cache warm --json",
)
_READS = ("config check --json", "sessions list --verbose")
PHASES = (
    Phase(
        "every command, all well",
        (
            "standby sync --verbose",
            "standby status --verbose",
            "triage --json",
            "config show --verbose",
            "cache warm --json",
            "cache inspect --against database --json",
            "cache clear --dry-run --json",
            "db health --verbose",
            "db health --nagios",
            "keys stats --json",
            "sessions list --verbose",
            "sessions restore --dry-run --verbose",
            "sessions restore --service-stopped --json",
            "sessions verify --verbose",
            "sessions verify --against database --json",
            "drill history --json",
            "drill run --scratch /nowhere --json",
            "runbook show first-five-minutes",
        ),
    ),
    Phase(
        "keys expired and mistyped",
        (
            "keys doctor --verbose",
            "keys doctor --fix --service-stopped --yes --json",
            "keys undo RUN --yes --json",
            "keys cleanup --explain",
            "keys cleanup --dry-run --verbose",
            "keys cleanup --type sender-key --retention-days 7 --policy all --dry-run --verbose",
            "keys cleanup --yes --json",
            "keys undo RUN --dry-run --verbose",
            "keys undo RUN --yes --json",
            "keys runs --verbose",
        ),
        prepare=_expired_and_mistyped,
    ),
    Phase(
        "folders brought back, and repaired",
        (
            "sessions failback --dry-run --verbose",
            "sessions failback --service-stopped --yes --json",
            "sessions failback --undo RUN --service-stopped --yes --json",
            "sessions repair --company 962302 --from standby --dry-run --verbose",
            "sessions repair --company 962302 --from standby --service-stopped --yes --json",
            "sessions undo --yes --json",
        ),
        prepare=_a_key_less,
    ),
    Phase(
        "services whose programs tell secrets",
        (
            "triage --json",
            "switch status --json",
            "switch prepare --json",
            "sessions restore --switch --yes --json",
            "sessions failback --yes --verbose",
            "cron show --check --json",
            "config show --json",
        ),
        settings=_services_that_tell,
    ),
    Phase(
        "rows that PostgreSQL refuses, quoting them",
        (
            "sessions repair --company 962302 --from standby --service-stopped --yes --json",
            "keys doctor --fix --service-stopped --yes --json",
        ),
        prepare=_rows_forbidden,
    ),
    Phase("stopped and killed while it works", ("sessions restore --deadline 0.1 --json",), prepare=_killed),
    Phase(
        "torn files and damaged credentials",
        (
            "triage --json",
            "cache inspect --verbose",
            "sessions verify --verbose",
            "sessions restore --json",
            "sessions failback --service-stopped --yes --json",
            "standby sync --json",
        ),
        prepare=_torn,
    ),
    Phase("a wrong password", (*_ASKS, "standby sync --verbose", "keys stats --json"), settings=_wrong_password),
    *(
        Phase(f"an address that cannot be read ({number})", _READS, settings=_torn_address(form))
        for number, form in enumerate(
            (
                "postgresql://postgres:{0}@127.0.0.1:{port}/postgres",
                "postgresql://postgres:%zz{0}@127.0.0.1/postgres",
                "host=127.0.0.1 password={0}",
                "password '{0}",
            ),
            1,
        )
    ),
    Phase(
        "settings that make no sense",
        ("config show --json", "config check --verbose", "triage --json"),
        settings=_torn_settings,
    ),
    Phase("a database that takes no writes", (*_ASKS, *_WRITES), settings=_read_only),
    Phase(
        "a disk that is full",
        ("sessions restore --service-stopped --discard-changes --yes --json", *_WRITES, "triage --verbose"),
        run=with_a_full_disk,
    ),
    Phase(
        "a database that is frozen",
        ("triage --json", "db health --nagios", *(f"{line} --deadline 2" for line in (*_ASKS[1:2], *_WRITES))),
        prepare=_frozen,
        tidy=_thawed,
    ),
    Phase("tables that are gone", (*_ASKS, "keys cleanup --yes --json"), prepare=_tables_gone),
    Phase(
        "no database, and receivers that fail",
        ("sessions restore --source database --json", "keys cleanup --yes --quiet", "standby sync --quiet"),
        prepare=_receivers_fail,
    ),
    Phase("receivers that answer again", ("sessions list --json",), prepare=_receivers_answer),
)
"""In this order: what one leaves is what the next one finds."""


def the_rest(commands: Sequence[str]) -> Phase:
    """Commands that have no line of their own, with nothing but their name."""
    lines = [line for phase in PHASES for line in phase.lines]
    return Phase(
        "the other commands",
        tuple(f"{name} --json" for name in commands if not any(line.startswith(name) for line in lines)),
    )
