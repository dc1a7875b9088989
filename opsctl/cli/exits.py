"""With which exit codes each command can end (`opsctl.errors.EXIT_CODES` says what they mean).

`opsctl runbook check` holds pages against it, docs/commands.md shows it, and each run of the tests has to keep to it.
"""

ALWAYS = frozenset({0, 2, 70, 129, 130, 141, 143})
"""A line may be mistyped, have a bug, be stopped by a signal, or lose its reader, whatever the command."""
_CHANGES = frozenset({1, 3, 4, 5, 6, 75})
_OFFLINE = frozenset[int]()

_OWN = {
    "triage": frozenset({1, 3, 4}),
    "sessions restore": _CHANGES,
    "sessions failback": _CHANGES,
    "sessions repair": _CHANGES,
    "sessions undo": _CHANGES,
    "sessions verify": frozenset({1, 3, 4, 5}),
    "sessions list": frozenset({1, 3, 4, 5}),
    "switch prepare": _CHANGES,
    "switch status": frozenset({1, 3, 4, 5}),
    "db health": frozenset({1, 3, 4, 5}),
    "standby sync": _CHANGES,
    "standby status": frozenset({1, 3, 4, 5}),
    "cache inspect": frozenset({1, 3, 4, 5}),
    "cache warm": _CHANGES,
    "cache clear": _CHANGES,
    "keys stats": frozenset({3, 4, 5}),
    "keys cleanup": _CHANGES,
    "keys runs": frozenset({3, 4, 5}),
    "keys undo": _CHANGES,
    "keys doctor": _CHANGES,
    "drill run": frozenset({1, 3, 4, 5}),
    "drill history": frozenset({3, 4, 5}),
    "runbook list": _OFFLINE,
    "runbook show": _OFFLINE,
    "runbook check": frozenset({1}),
    "config show": frozenset({3, 4}),
    "config check": frozenset({1, 3, 4}),
    "cron show": frozenset({1, 3, 4}),
    "selftest leaks": frozenset({1, 4, 5}),
}


def codes(command: str) -> frozenset[int]:
    """All of them, for `sessions restore`."""
    return ALWAYS | _OWN[command]
