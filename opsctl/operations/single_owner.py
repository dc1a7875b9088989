"""Nobody else may own the sessions while they are moved: two owners of one ratchet lose messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsctl import services
from opsctl.errors import DatabaseUnavailable, Refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from opsctl.db import Connection
    from opsctl.settings import Settings

PROVEN, OPERATOR, ACCEPTED = "proven", "operator", "accepted"


def require_stopped(
    settings: Settings,
    open_connection: Callable[[], AbstractContextManager[Connection]] | None,
    *,
    operators_word: bool,
    accept_live: bool,
) -> str:
    """How it is known that no service owns the sessions. Raises `Refused` where it is not.

    With a service manager it is proven: every service is stopped, and if the database answers, nobody changes its
    tables for three seconds. Without one the operator's word is all there is.
    """
    if accept_live:
        return ACCEPTED
    manager = services.manager(settings)
    if manager is None:
        if operators_word:
            return OPERATOR
        raise Refused(
            "SERVICE_MANAGER is none, so nobody here can tell whether the service is stopped",
            kind="live-service",
            hint="stop it, and add --service-stopped: your word for it",
        )
    proof = services.proven_stopped(manager)
    if not proof.stopped:
        running = "; opsctl changes nothing under a running service" if proof.stopped is False else ""
        raise Refused(
            f"the service is not proven stopped: {proof.reason}{running}",
            kind="live-service",
            hint="stop it, then type this again",
        )
    if not nobody_writes(open_connection):
        raise somebody_writes()
    return PROVEN


def how_stopped(
    settings: Settings,
    open_connection: Callable[[], AbstractContextManager[Connection]] | None,
    *,
    operators_word: bool,
    accept_live: bool,
) -> str:
    """The same for what only makes a copy: without a service manager and a word it is empty, and the copy may be stale.

    Raises `Refused` where there is a service manager, and the services are not proven stopped.
    """
    if settings["SERVICE_MANAGER"] == "none" or accept_live:
        return OPERATOR if operators_word and not accept_live else ""
    return require_stopped(settings, open_connection, operators_word=operators_word, accept_live=False)


def somebody_writes() -> Refused:
    """The refusal where a program that no service manager knows changes the tables."""
    return Refused(
        "the services are stopped, but somebody goes on changing the tables of sessions",
        kind="live-service",
        hint="look for it in pg_stat_activity, stop it, then type this again",
    )


def nobody_writes(open_connection: Callable[[], AbstractContextManager[Connection]] | None) -> bool:
    """Whether the tables of sessions stand still for three seconds, or the database does not answer."""
    if open_connection is None:
        return True
    try:
        with open_connection() as connection:
            return services.stands_still(connection)
    except DatabaseUnavailable:  # which the next step will say
        return True
