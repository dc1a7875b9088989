"""What the operator does next: every expected failure is one of these, and its class owns the exit code.

A message is one sentence in lower case without a full stop, names the thing and holds no secret; `hint` is the next
line to type; `kind` is the stable word that alerts are grouped by.
"""

EXIT_CODES = {
    0: "done; warnings too",
    1: "it worked, and the world is not well",
    2: "usage",
    3: "settings",
    4: "no usable source",
    5: "refused, nothing changed",
    6: "half done: look first",
    70: "a bug in opsctl",
    75: "another run holds the lock",
    129: "stopped by SIGHUP",
    130: "stopped by SIGINT",
    141: "its reader went away",
    143: "stopped by SIGTERM",
}
"""Every code that a command ends with; `db health --nagios` alone has those of monitoring plugins."""


class OpsctlError(Exception):
    """An expected failure. Subclasses say which move comes next."""

    exit_code = 70
    kind = "bug"
    runbook: str | None = None
    """The page that says how to go on."""

    def __init__(
        self, message: str, *, hint: str | None = None, kind: str | None = None, runbook: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.kind = kind or type(self).kind
        self.runbook = runbook or type(self).runbook


class UsageError(OpsctlError):
    """The line that was typed does not make sense."""

    exit_code = 2
    kind = "usage"


class SettingsError(OpsctlError):
    """A setting is missing or makes no sense; the message names the variable."""

    exit_code = 3
    kind = "settings"


class SourceUnavailable(OpsctlError):
    """No source that can be used: it cannot be reached, lacks its tables, or did not answer in time."""

    exit_code = 4
    kind = "no-source"
    runbook = "runbooks/1-postgresql-unreachable.md"


ANOTHER_SERVER = "point DATABASE_URL at a server that answers (a replica, a restored backup), then type it again"
HINTS = {
    "deadline": "type it again with a longer --deadline",
    "corrupt": "point DATABASE_URL at a replica or a restored backup, then type it again",
    "authentication": "opsctl config show, then correct the role or its password",
    "missing-database": "opsctl config show, then correct the database's name",
    "missing-table": "opsctl config show: is this the right database?",
    "missing-column": "opsctl config show: is this the right database?",
    "no-rows": "opsctl config show: is this the right database? If so, point DATABASE_URL at a restored backup",
    "permission": "grant the role SELECT on whatsapp_auth and whatsapp_keys",
    "tls": "check sslmode in DATABASE_URL, or POSTGRES_SSL_MODE",
    "too-many-clients": "end idle sessions on the server, then type it again",
}
"""What to type next, by what is wrong with the database; else another server is needed."""


class DatabaseUnavailable(SourceUnavailable):
    """PostgreSQL did not give what was asked; `kind` says in which way and `transient` whether waiting may help."""

    kind = "database-unavailable"

    def __init__(
        self, message: str, *, hint: str | None = None, kind: str | None = None, transient: bool = False
    ) -> None:
        super().__init__(message, hint=hint or HINTS.get(kind or "", ANOTHER_SERVER), kind=kind)
        self.transient = transient


class Refused(OpsctlError):
    """It could have been done and was not, because it would hurt. Nothing was changed."""

    exit_code = 5
    kind = "refused"


AS_OWNER = "type it as the owner of the folders, or as root"


def unreadable(path: object, error: OSError) -> Refused:
    """The refusal to work on files that this user may not read, or that cannot be read at all."""
    hint = AS_OWNER if isinstance(error, PermissionError) else f"ls -ld {path}"
    return Refused(f"{path} cannot be read: {error.strerror}", kind="unreadable", hint=hint)


class HalfDone(OpsctlError):
    """Something was changed and not all of it: look before typing on."""

    exit_code = 6
    kind = "half-done"


class Locked(OpsctlError):
    """Another run works on the same thing; the message says which pid, where and since when."""

    exit_code = 75
    kind = "locked"


class AlreadyRunning(Locked):
    """The same job, started by cron a minute ago, is not done yet. Nothing abnormal: `--quiet` says nothing."""

    kind = "already-running"


class Interrupted(KeyboardInterrupt):
    """A signal asked this run to stop. Not an `Exception`: only the frame answers it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number
