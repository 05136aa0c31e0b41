"""SIGTERM and Ctrl-C end training after the step at hand, with a checkpoint, instead of losing what was learnt."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 5.0  # seconds in which a signal may come again although it was sent once
AGAIN = 0.5  # seconds after which a stop that was caught on its way is asked for again
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
Handler = Callable[[int, FrameType | None], object]


class Stopped(BaseException):
    """Training was asked to stop and did. No `Exception`, so that no library takes it for an error of its own.

    Args:
        number: Of the signal.
        message: Where things stand and how to go on, in one line; empty where another process says it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # what a shell reports for a program that a signal ended


class _Reminder:
    """Sends this process the signal again, as long as the stop that it asks for has not arrived.

    A bare `except:` catches a stop, such as those around the pickling of functions in
    https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/fingerprint.py

    Attributes:
        number: Of the signal; 0 if no stop is on its way.
    """

    number: int = 0
    _timer: threading.Timer | None = None

    def start(self, number: int) -> None:
        self.cancel()
        self.number = number
        self._timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self.number = 0
        if self._timer is not None:
            self._timer.cancel()


_reminder = _Reminder()


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Raises `Stopped` for a signal's number, and again as long as it does not reach the end of `ended_by_signals`."""
    _reminder.start(number)
    raise Stopped(
        number,
        f"{signal.Signals(number).name}: stopped; give the same command again, with --resume_from_checkpoint true if "
        "output_dir holds a checkpoint",
    )


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Within, the signals go to `handler`. One that is ignored stays so: SIGINT is in a shell's background job."""
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in found.items() if old not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C raise `Stopped`; afterwards they do what they did before."""
    with _handled_by(stop_at_once):
        try:
            yield
        finally:
            _reminder.cancel()


class StopRequest:
    """Whether a signal has asked for a stop.

    Attributes:
        number: Of that signal; 0 as long as none has come.
    """

    number: int = 0
    _since: float = 0.0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Notes a signal; one that comes after more than `ECHO` seconds stops at once.

        A launcher hands on what its whole process group was sent, and dies of it, which `stop_with_launcher` makes
        another signal: one Ctrl-C arrives up to three times.
        """
        if self.number and time.monotonic() - self._since > ECHO:
            stop_at_once(number)
        if not self.number:
            self.number, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            # Not print: a handler that interrupts another print to the same stream raises an error in its place.
            os.write(2, f"\n{name}: ending this step, then saving; again after {ECHO:.0f} s: at once\n".encode())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted; afterwards they do what they did before.

        Raises:
            Stopped: A stop that was asked for earlier is still on its way; something has caught it.
        """
        with _handled_by(self.note):
            if _reminder.number:
                stop_at_once(_reminder.number)
            yield


def end_with_parent(number: int) -> None:
    """Has this process sent a signal when its parent dies. Linux only: prctl(2), PR_SET_PDEATHSIG = 1."""
    if _LIBC is not None:
        _LIBC.prctl(1, number)


def stop_with_launcher() -> None:
    """Lets a program that `accelerate launch` started get SIGTERM when the launcher dies, instead of living on alone.

    The launcher does not pass a signal on that it alone is sent.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        end_with_parent(signal.SIGTERM)
