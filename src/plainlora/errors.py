"""Errors for the person who typed the command: one line each on standard error, exit code 2."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from plainlora.interruption import RERUN_OR_RESUME, Stopped, ended_by_signals, stop_with_launcher
from plainlora.lora.errors import LoRAError
from plainlora.lost_process import describe_lost, is_of_another_process

EXIT_CODE = 2
LONGEST = 1500  # characters of a line
EXTRAS = {  # a package -> the extra of pyproject.toml that installs it
    **dict.fromkeys(("trl", "datasets", "matplotlib", "yaml", "tqdm", "tensorboard", "sklearn"), "train"),
    **{"bitsandbytes": "qlora", "scipy": "classify", "optuna": "sweep", "sqlalchemy": "sweep"},
    **{"deepspeed": "deepspeed", "gguf": "export", "gradio": "playground"},
}
INTERRUPTED = 130  # a shell's exit code for a program that Ctrl-C ended


class UserError(Exception):
    """What is wrong, where, and what to do: one line for each fault.

    Args:
        *faults: One or more messages.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(text: str) -> str:
    """A text as one line, with control characters escaped."""
    line = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in line
    )


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.5) -> str:
    """A hint at the known name that is nearest to a wrong one, or another hint if none is near.

    Args:
        name: The wrong name.
        known: The right ones.
        otherwise: The other hint.
        cutoff: The least similarity, see `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def _shortened(line: str) -> str:
    """A very long line without its middle."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def _tell(line: str) -> None:
    """Writes a line to standard error in one call, so that the processes of one run do not write into each other's."""
    sys.stderr.write(line + "\n")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints `UserError` and `LoRAError` as one line on standard error, and exits with code 2.

    Ctrl-C prints `interrupted` and exits with code 130. Any other error is a bug and keeps its traceback.
    """
    try:
        yield
    except (UserError, LoRAError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:  # a path on the command line
            raise
        sys.stdout.flush()
        for fault in error.args if isinstance(error, UserError) else [error]:
            _tell("error: " + _shortened(one_line(str(fault))))
        raise SystemExit(EXIT_CODE) from error
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _tell(f'error: this needs {error.name}: pip install "plainlora[{extra}]"')
        raise SystemExit(EXIT_CODE) from error
    except KeyboardInterrupt as error:
        _tell("interrupted")
        raise SystemExit(INTERRUPTED) from error


def run_program(main: Callable[[], None]) -> None:
    """Runs a training program's `main` under `one_line_errors`.

    Ctrl-C, SIGTERM and the loss of another process print how to resume.
    """
    stop_with_launcher()
    try:
        with ended_by_signals(), one_line_errors():
            try:
                main()
            except RuntimeError as error:
                if not is_of_another_process(error):
                    raise
                raise UserError(f"{describe_lost(error)}; {RERUN_OR_RESUME}") from error
    except Stopped as stopped:
        sys.stdout.flush()
        if str(stopped):
            _tell(str(stopped))
        raise SystemExit(stopped.exit_code) from stopped
    leave_if_not_first()


def leave_if_not_first() -> None:
    """Ends a process that has done its part of a distributed run, without the interpreter's own end.

    There PyTorch's threads were seen to abort twice ("terminate called without an active exception"), for which the
    launcher ended the first process too, before it had written its results.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
