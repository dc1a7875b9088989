"""Signals that come at a bad moment."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from opsctl.signals import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator


class Came(Exception):
    pass


@pytest.fixture
def raising() -> Iterator[None]:
    """SIGUSR1 raises, as the signals do that ask a run to stop."""

    def stop(_: int, __: object) -> None:
        raise Came

    before = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_wakes_nobody_is_answered_all_the_same(raising: None) -> None:
    def signal_myself() -> None:  # Python then answers it in the main thread, which sleeps on
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        time.sleep(1)

    thread = threading.Thread(target=signal_myself)
    thread.start()
    started = time.monotonic()
    with pytest.raises(Came):
        wait_for(threading.Event(), 20)
    assert time.monotonic() - started < 2
    thread.join()


def test_it_says_whether_it_came() -> None:
    event = threading.Event()
    assert not wait_for(event, 0.15)
    threading.Timer(0.15, event.set).start()
    assert wait_for(event, 5)
    assert wait_for(event, 0)
