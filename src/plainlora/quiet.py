"""Import this first in a program: it silences what the libraries say about their own future and optional parts.

A deprecation inside Transformers or TRL is this project's business, not that of the person who runs a recipe.
Importing the package as a library changes nothing.
"""

import logging
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # PEFT, on Conv1D
warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)  # see `read_config`
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
