"""Import this first in a program: it keeps the libraries from talking, and from keeping a processor busy in vain.

A deprecation inside Transformers or TRL is this project's business, not that of the person who runs a recipe, and
neither is where in an import a Ctrl-C came. Importing the package as a library changes nothing.
"""

import logging
import os
import sys
import warnings
from types import TracebackType

# Threads of OpenMP that wait sleep instead of spinning: on a CPU shared with other work, spinning makes small models
# many times slower. PyTorch's OpenMP reads this when it is loaded; the processes that a program starts inherit it.
# https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # PEFT, on Conv1D
warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)  # see `read_config`
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def show_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Says in one line that Ctrl-C came while the libraries were imported; anything else keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("SIGINT: stopped before anything was read or written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = show_uncaught
