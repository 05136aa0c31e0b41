"""SIGTERM and Ctrl-C end training after the current step, with a checkpoint, if every process is still there."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 5.0  # seconds in which a signal sent once may arrive several times
RESEND_AFTER = 0.5  # seconds after which a signal is sent again if its `Stopped` was caught
RERUN_OR_RESUME = "give the same command again, with --resume_from_checkpoint true if output_dir holds a checkpoint"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
Handler = Callable[[int, FrameType | None], object]


class Stopped(BaseException):
    """Training was stopped by a signal. Not an `Exception`, so that libraries do not handle it.

    Args:
        number: The signal's number.
        what: What happened, in one clause; empty if another process prints it.

    Attributes:
        advice: How to continue, in one clause.
        exit_code: The exit code that a shell gives a program that this signal ended.
    """

    advice = RERUN_OR_RESUME

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.advice}" if self.args[0] else ""


class _Reminder:
    """Sends this process the signal again until `Stopped` reaches the end of `ended_by_signals`.

    A bare `except:` catches `Stopped`, such as those around the pickling of functions in
    https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/fingerprint.py

    Attributes:
        number: The signal's number; 0 if none is to be sent.
    """

    number: int = 0
    _timer: threading.Timer | None = None

    def start(self, number: int) -> None:
        self.cancel()
        self.number = number
        self._timer = threading.Timer(RESEND_AFTER, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self.number = 0
        if self._timer is not None:
            self._timer.cancel()


_reminder = _Reminder()


def lost_ranks() -> list[int]:
    """Ranks of this run's processes on this machine that are no longer children of the launcher.

    If one process is gone, `accelerate launch` sends the others SIGTERM. This tells that signal from one that a person
    sent.

    Returns:
        The ranks; an empty list also if they cannot be known, as without a launcher.
    """
    alive = set()
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):  # of one that has just ended
                alive.add(process.environ().get("RANK"))
    if (own := os.environ.get("RANK")) is None or own not in alive:
        return []
    first = int(own) - int(os.environ["LOCAL_RANK"])
    return [rank for rank in range(first, first + int(os.environ["LOCAL_WORLD_SIZE"])) if str(rank) not in alive]


def describe_lost_ranks() -> str:
    """`lost_ranks` in words, such as `process 1 is gone`; empty if there are none."""
    lost = lost_ranks()
    many = len(lost) > 1
    return f"process{'es' * many} {', '.join(map(str, lost))} {'are' if many else 'is'} gone" if lost else ""


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Raises `Stopped`, and again until it reaches the end of `ended_by_signals`."""
    _reminder.start(number)
    raise Stopped(number, f"{signal.Signals(number).name}: {describe_lost_ranks() or 'stopped'}")


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Handles the signals by `handler` within the block. An ignored signal, as in a background job, stays ignored."""
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
    """Within the block SIGTERM and Ctrl-C raise `Stopped`; afterwards the old handlers are restored."""
    with _handled_by(stop_at_once):
        try:
            yield
        finally:
            _reminder.cancel()


class StopRequest:
    """Records whether a signal has asked for a stop.

    Attributes:
        number: The signal's number; 0 if none has arrived.
    """

    number: int = 0
    _since: float = 0.0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Records a signal. Another one after more than `ECHO` seconds stops at once.

        So does the first one if another process is gone, because this step cannot end then.

        One Ctrl-C can arrive three times: directly, passed on by the launcher, and, when the launcher dies of it, by
        `stop_with_launcher`.
        """
        if self.number and time.monotonic() - self._since > ECHO:
            stop_at_once(number)
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if describe_lost_ranks():
                stop_at_once(number)
            name = signal.Signals(number).name
            # Not print, which raises if the handler interrupts another print to the same stream.
            os.write(
                2,
                f"\n{name}: ending this step, then saving; another signal after {ECHO:.0f} s stops at once\n".encode(),
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are recorded; afterwards the old handlers are restored.

        Raises:
            Stopped: An earlier `Stopped` was caught by other code.
        """
        with _handled_by(self.note):
            if _reminder.number:
                stop_at_once(_reminder.number)
            yield


def end_with_parent(number: int) -> None:
    """Makes the kernel send this process a signal when its parent dies. Linux only: prctl(2), PR_SET_PDEATHSIG = 1."""
    if _LIBC is not None:
        _LIBC.prctl(1, number)


def stop_with_launcher() -> None:
    """Makes a program that `accelerate launch` started get SIGTERM when the launcher dies.

    The launcher does not pass on a signal that only it receives.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        end_with_parent(signal.SIGTERM)
