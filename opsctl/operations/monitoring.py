"""Health in the words of monitoring systems: a Nagios plugin's line and a file for Prometheus' textfile collector."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from opsctl.errors import Refused, UsageError
from opsctl.operations.health_checks import State
from opsctl.report import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from opsctl.operations.health import Health
    from opsctl.operations.health_checks import HealthRow

_CODES = {State.OK: 0, State.HIDDEN: 0, State.WARNING: 1, State.CRITICAL: 2, State.UNKNOWN: 3}
_FOR_ALL = 0o644
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_UNITS = {"%": ("%", 1.0), "s": ("s", 1.0), "ms": ("s", 0.001), "B": ("B", 1.0)}
"""What the plugin guidelines know, and by what a value of ours has to be multiplied; anything else is a bare number."""


def plugin(health: Health) -> Plugin:
    """One line with performance data, and 0, 1, 2 or 3 (Monitoring Plugins development guidelines)."""
    code = _CODES[health.worst]
    said = [f"{row.check}: {row.seen}" for row in health.rows if _CODES[row.state] == code and code]
    text = "; ".join(said) or f"{len(health.rows)} checks"
    line = f"OPSCTL {_WORDS[code]}: {' '.join(text.replace('|', '/').split())}"
    data = " ".join(_performance(row) for row in health.rows if row.value is not None)
    return Plugin(code, f"{line} | {data}" if data else line)


def _performance(row: HealthRow) -> str:
    unit, factor = _UNITS.get(row.unit, ("", 1.0))
    value, warning, critical = (
        "" if number is None else f"{number * factor:.10g}" for number in (row.value, row.warning, row.critical)
    )
    if row.falling:
        warning, critical = f"{warning}:", f"{critical}:"  # an alert is what is below
    label = row.check.translate(str.maketrans("='|", "___"))
    return f"'{label}'={value}{unit};{warning};{critical}"


def write_metrics(health: Health, file: Path) -> None:
    """Write every value and state, in place in one step and for every user's collector: nothing of it is secret.

    Raises `UsageError` without the package, or `Refused`.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ModuleNotFoundError:
        raise UsageError("--prometheus needs prometheus-client", hint="pip install 'opsctl[metrics]'") from None
    registry = CollectorRegistry()
    labels = ["check", "group"]
    states = Gauge(
        "opsctl_health_state", "0 ok, 1 warning, 2 critical, 3 not known, per check", labels, registry=registry
    )
    values = Gauge("opsctl_health_value", "What a check measured", [*labels, "unit"], registry=registry)
    limits = Gauge("opsctl_health_threshold", "From where on it is that", [*labels, "state"], registry=registry)
    for row in health.rows:
        states.labels(row.check, row.group.value).set(_CODES[row.state])
        if row.value is not None:
            values.labels(row.check, row.group.value, row.unit).set(row.value)
        for state, limit in ((State.WARNING, row.warning), (State.CRITICAL, row.critical)):
            if limit is not None:
                limits.labels(row.check, row.group.value, state.value).set(limit)
    Gauge("opsctl_health_up", "1 if the database answered, to the end", registry=registry).set(health.answered)
    Gauge("opsctl_health_duration_seconds", "How long all checks took", registry=registry).set(health.elapsed_s)
    Gauge("opsctl_health_timestamp_seconds", "When they ended", registry=registry).set(time.time())
    try:
        _replace(file, generate_latest(registry))
    except OSError as error:
        raise Refused(f"{file} cannot be written: {error.strerror}", hint="check --prometheus FILE") from None


def _replace(file: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, each whole. The name in between is none that a collector reads."""
    unseen = file.with_name(f"{file.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(unseen, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FOR_ALL)
        with os.fdopen(descriptor, "wb") as out:
            os.fchmod(descriptor, _FOR_ALL)  # whatever the umask
            out.write(content)
        unseen.replace(file)
    except BaseException:
        with suppress(OSError):
            unseen.unlink(missing_ok=True)
        raise
