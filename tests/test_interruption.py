"""Signals: noted once, at once when they come again, and handed back afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plainlora import interruption
from plainlora.errors import run_program
from plainlora.interruption import SIGNALS, Stopped, StopRequest, ended_by_signals
from tests.conftest import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_what_a_launcher_hands_on_of_it_is_not_a_second_one(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    request = StopRequest()
    with request.listening():
        assert request.number == 0
        for each in (number, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), each)
    assert request.number == number
    said = f"\n{number.name}: ending this step, then saving; another signal after 5 s stops at once\n"
    assert capfd.readouterr().err == said
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_stops_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "ECHO", 0.01)
    request = StopRequest()
    with ended_by_signals(), request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        with pytest.raises(Stopped, match=number.name) as stopped:
            os.kill(os.getpid(), number)
    assert stopped.value.exit_code == CODES[number]


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As SIGINT is in a shell script's background job, and SIGTERM if someone said so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_ends_with_the_code_a_shell_knows_and_one_line(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("a library would have taken the signal for an error of its own")

    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == CODES[number]
    said = capfd.readouterr().err
    assert said == (
        f"{number.name}: stopped; give the same command again, with --resume_from_checkpoint true if output_dir holds "
        "a checkpoint\n"
    )
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_stop_that_a_library_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "RESEND_AFTER", 0.05)
    swallowed = []

    def main() -> None:
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except:  # noqa: E722
                swallowed.append(True)
        time.sleep(10)
        pytest.fail("nothing came")

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 143
    assert len(swallowed) == 2
    time.sleep(0.1)  # and, once it has arrived, no more


def test_training_does_not_begin_once_a_stop_was_swallowed() -> None:
    """However short it would be: the reminder that comes half a second later is too late for that."""

    def main() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        with StopRequest().listening():
            pytest.fail("training began")

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 130


def test_a_stop_that_is_swallowed_during_training_comes_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "RESEND_AFTER", 0.05)
    monkeypatch.setattr(interruption, "ECHO", 0.0)

    def main() -> None:
        with StopRequest().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        pytest.fail("nothing came")

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 143


CHILD = """
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("interruption", sys.argv[1])
interruption = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interruption)
request = interruption.StopRequest()
with request.listening():
    interruption.stop_with_launcher()
    print(os.getpid(), flush=True)
    for _ in range(500):
        time.sleep(0.01)
        if request.number:
            open(sys.argv[2], "w").write(str(request.number))
            break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="not run: prctl is Linux's")
@pytest.mark.parametrize("launched", [True, False])
def test_training_ends_with_the_launcher_that_is_killed_and_only_with_that(tmp_path: Path, launched: bool) -> None:
    """The launcher here is a Python that starts another and waits, as `accelerate launch` does."""
    module, noted = ROOT / "src" / "plainlora" / "interruption.py", tmp_path / "noted"
    wait = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    environment = {"PATH": os.environ["PATH"]} | ({"ACCELERATE_MIXED_PRECISION": "no"} if launched else {})
    launcher = subprocess.Popen(
        [sys.executable, "-c", wait, CHILD, str(module), str(noted)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    if launched:
        assert launcher.stdout.read() == ""  # waits until the child has closed it, too
        assert noted.read_text() == str(int(signal.SIGTERM))
    else:
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)  # there still is one
        assert not noted.exists()
