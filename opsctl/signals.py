"""Signals that ask a run to stop, held back while an exception in the middle would do harm.

Python answers a signal between any two steps, also inside of callbacks that swallow what is raised in them (those of
a fork, for instance), and between making a folder and remembering that it has to be removed.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

_LOOK_S = 0.1
_ASKING_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@contextmanager
def held_back(*forgotten: signal.Signals) -> Iterator[None]:
    """Answer signals at the end of the block, the `forgotten` ones never. But a second Ctrl-C is answered at once.

    Only for the main thread, which is the one that answers signals.
    """
    came: list[int] = []
    stopping = isinstance(sys.exc_info()[1], KeyboardInterrupt)

    def remember(number: int, _: object) -> None:
        if number == signal.SIGINT and (stopping or came):
            raise KeyboardInterrupt
        came.append(number)

    before = {n: signal.signal(n, remember) for n in _ASKING_TO_STOP if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in came:
        if late not in forgotten:
            signal.raise_signal(late)


def wait_for(event: threading.Event, timeout_s: float) -> bool:
    """Wait as the event's own `wait` does, but answer a signal that came the moment before, too.

    Python notices a signal between two steps, and the kernel wakes who sleeps: who just goes to sleep has missed both.
    """
    until = time.monotonic() + timeout_s
    while (left_s := until - time.monotonic()) > 0:
        if event.wait(min(left_s, _LOOK_S)):
            return True
    return event.is_set()
