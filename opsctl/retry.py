"""What of PostgreSQL's failures is tried again, how often, and how long apart."""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from opsctl.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    import tenacity

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 3
WAITS_S = (0.1, 0.2, 0.4)
"""As the service waits itself."""


def retrying(give_up_at: float = float("inf")) -> tenacity.Retrying:
    """Calls what it is given until it does not fail transiently, and not after `give_up_at` (monotonic seconds)."""
    import tenacity

    def wait(state: tenacity.RetryCallState) -> float:
        return WAITS_S[min(state.attempt_number, len(WAITS_S)) - 1]

    return tenacity.Retrying(
        stop=lambda state: state.attempt_number >= ATTEMPTS or time.monotonic() >= give_up_at,
        wait=wait,
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, DatabaseUnavailable) and e.transient),
        reraise=True,
    )


def repeatable(step: Callable[P, T]) -> Callable[P, T]:
    """Make a step that connects and changes nothing there anew, where the server broke off in the middle of it.

    One that writes is not for this: nobody knows what became of its last commit.
    """

    @wraps(step)
    def tried_again(*args: P.args, **kwargs: P.kwargs) -> T:
        return retrying()(step, *args, **kwargs)

    return tried_again
