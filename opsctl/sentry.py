"""Sentry (or GlitchTip): what an event says, how it is packed, and where it goes.

Of sentry_sdk only the formats are used: the DSN and the envelope. Its client obeys SENTRY_* variables that print or
copy every event, and its transport waits and prints at exit. Here an event holds what `event_of` puts into it.
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import opsctl
from opsctl.jobs import MARGIN_MIN
from opsctl.report import Outcome
from opsctl.scrub import scrubbed
from opsctl.web import CLIENT, Endpoint

if TYPE_CHECKING:
    from opsctl.jobs import Job
    from opsctl.report import Ending
    from opsctl.settings import Settings

NAMED_COMPANIES = 5
TAG_LIMIT = 200
"""Sentry drops a tag whose value is longer."""
_RELEASE = f"opsctl@{opsctl.__version__}"


def event_of(ending: Ending, settings: Settings, event_id: str) -> dict[str, Any]:
    """The event (https://develop.sentry.dev/sdk/data-model/event-payloads/), without any secret."""
    report, failure, kind = ending.report, ending.report.failure, ending.kind
    tags = {
        "command": ending.command,
        "company": ", ".join(report.companies) if len(report.companies) <= NAMED_COMPANIES else "several",
        "emergency": str(ending.emergency).lower(),
        "kind": kind,
        "exit_code": str(ending.exit_code),
        "run_id": ending.run_id,
        "runbook": failure.runbook if failure else None,
    }
    run = {
        "elapsed_s": ending.elapsed_s,
        "summary": report.summary,
        "hint": failure.hint if failure else None,
    }
    contexts: dict[str, Any] = {"run": run, "options": ending.options}
    if report.noteworthy:
        contexts["facts"] = report.facts
    if ending.rto:
        contexts["rto"] = {
            "target_s": ending.rto.target_s,
            "elapsed_s": ending.rto.elapsed_s,
            "scope": ending.rto.scope,
            "met": ending.rto.met,
        }
    words = {
        "message": failure.message if failure else report.summary,
        "fingerprint": [ending.command, kind],
        "tags": tags,
        "contexts": contexts,
        "breadcrumbs": {
            "values": [
                {
                    "category": "step",
                    "message": step.name,
                    "level": "info" if step.ok else "error",
                    "data": {"seconds": step.seconds, "ok": step.ok},
                }
                for step in ending.steps
            ]
        },
        "environment": settings.environment,
        "release": _RELEASE,
        "server_name": socket.gethostname(),
    }
    clean: dict[str, Any] = scrubbed(words, settings.secrets())
    clean["tags"] = {name: value[:TAG_LIMIT] for name, value in clean["tags"].items() if value}
    # Not scrubbed: these hold no word of ours, and a password like "20" must not make them unreadable to the endpoint.
    return clean | {
        "event_id": event_id,
        "timestamp": datetime.now(UTC).isoformat(),
        "level": _level(ending),
        "platform": "python",
        "logger": "opsctl",
    }


def _level(ending: Ending) -> str:
    if ending.report.outcome is not Outcome.FAILED:
        return "warning"
    return "fatal" if ending.emergency else "error"


def envelope(event: dict[str, Any]) -> bytes:
    """The event as it travels. Without `sent_at`: a spooled event would be moved to the time of its delivery."""
    from sentry_sdk.envelope import Envelope, Item, PayloadRef

    item = Item(payload=PayloadRef(json=event), type="event")
    return Envelope(headers={"event_id": event["event_id"]}, items=[item]).serialize()


def check_in(job: Job, settings: Settings, check_in_id: str, *, status: str, duration_s: float | None = None) -> bytes:
    """One signal of a watched job, as it travels; makes its monitor, or brings it up to date.

    https://develop.sentry.dev/sdk/telemetry/check-ins/
    """
    from sentry_sdk.envelope import Envelope, Item, PayloadRef

    words = {
        "check_in_id": check_in_id,
        "monitor_slug": f"opsctl-{job.name}",
        "status": status,
        "environment": scrubbed(settings.environment, settings.secrets()),
        "release": _RELEASE,
        "monitor_config": {
            "schedule": {"type": "crontab", "value": job.at(settings["CLEANUP_AT"])},
            "timezone": "UTC",
            "checkin_margin": MARGIN_MIN,
            "max_runtime": job.longest_min,
            "failure_issue_threshold": job.failures,
            "recovery_threshold": 1,
        },
    }
    if duration_s is not None:
        words["duration"] = duration_s
    return Envelope(items=[Item(payload=PayloadRef(json=words), type="check_in")]).serialize()


def endpoint(dsn: str) -> Endpoint:
    """Where envelopes go to; raises `ValueError` for a DSN that is none."""
    from sentry_sdk.utils import Dsn

    parsed = Dsn(dsn)
    if ":" in parsed.host:
        parsed.host = f"[{parsed.host}]"  # an IPv6 address; sentry_sdk takes its brackets away
    auth = parsed.to_auth(CLIENT)
    headers = {"Content-Type": "application/x-sentry-envelope", "X-Sentry-Auth": auth.to_header()}
    return Endpoint(auth.get_api_url(), headers)
