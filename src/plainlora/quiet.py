"""Import this first in a program: it silences warnings of the libraries, and lets idle threads sleep.

Deprecations inside Transformers or TRL do not concern the person who runs a recipe. Importing the package as a library
does not import this module.
"""

import logging
import os
import sys
import warnings
from types import TracebackType

# Waiting OpenMP threads sleep instead of spinning, which on a CPU shared with other work makes small models many times
# slower. PyTorch's OpenMP reads this when it is loaded; child processes inherit it.
# https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Progress bars belong to a terminal; in a file each of their states would be a line. tqdm reads this when it is
# imported: https://github.com/tqdm/tqdm/blob/v4.70.1/tqdm/utils.py (`envwrap`)
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # PEFT, on Conv1D
warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)  # see `read_config`
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# DeepSpeed, where it is installed, says on every CPU that it found no accelerator, whether it is used or not.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def show_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Reports a Ctrl-C during the imports in one line; any other error keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("SIGINT: stopped before anything was read or written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = show_uncaught
