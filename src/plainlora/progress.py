"""One line of progress that writes over itself."""

import sys


def show_progress(what: str) -> None:
    """Shows what happens now, on a terminal; an empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
