"""One line of progress that writes over itself."""

import sys
from collections.abc import Callable


def show_progress(what: str) -> None:
    """Shows what happens now, on a terminal; an empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def numbered(say: Callable[[str], None], at: int, of: int) -> Callable[[str], None]:
    """Says before a text which of how many it belongs to."""
    return lambda what: say(f"{at} of {of}: {what}")
