"""Errors for the person who typed the command: one line on standard error, exit code 2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plainlora.lora.errors import LoRAError

EXIT_CODE = 2
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the errors this package raises on purpose into one line on standard error and exit code 2.

    Everything else keeps its traceback: it is a bug here, and the traceback is what a report needs.
    """
    try:
        yield
    except (UserError, LoRAError) as error:
        sys.stdout.flush()
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(EXIT_CODE) from error


def run_program(main: Callable[[], None]) -> None:
    """Runs a training program's `main` under `one_line_errors`; Ctrl-C says how to go on."""
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt as error:
        sys.stdout.flush()
        print("interrupted; go on with --resume_from_checkpoint true", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error
