"""An end to what was written elsewhere and may never end by itself: a chat template, a regular expression."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN = 1.0  # seconds after which an end that something swallowed is asked for again


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` where the block takes longer than this many seconds.

    It is raised again where the block swallows it, as Jinja does when it computes constants beforehand. It needs a
    POSIX system and the main thread, as Python's signals do; elsewhere the block runs without an end. A timer that was
    running goes on afterwards.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), every)
