"""Explains in one line why a base cannot be loaded."""

import os
from pathlib import Path
from typing import Literal

from plainlora.base.files import find_fault
from plainlora.errors import UserError, first_line

NO_EXPLANATION = (
    TypeError,
    ArithmeticError,
    AttributeError,
    LookupError,
)  # raised by a damaged config
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}', use_safetensors=False)"
    ".save_pretrained('{0}')\""
)


def explain(name: str, what: Literal["model", "tokenizer"], error: Exception) -> UserError:
    """The error for a failure of `from_pretrained`."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) and (fault := find_fault(path, what)):
        return UserError(fault)
    if what == "model" and (pickle := _only_pickle(path)):
        return UserError(
            f"{path} holds {pickle} and no model.safetensors; a pickle can run code when it is loaded, so weights are "
            f"read from safetensors only: if you trust it, convert it once with {CONVERT.format(path)}"
        )
    if os.path.isfile(path / "config.json"):
        advice = "; read it, then --trust_remote_code true runs it" if "custom code" in str(error) else ""
        damaged = what == "model" and isinstance(error, NO_EXPLANATION)
        subject = f"{path}/config.json is damaged: the model" if damaged else f"the {what} in {path}"
        return UserError(f"{subject} cannot be loaded ({first_line(error)}){advice}")
    if os.path.isdir(path):
        files = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        return UserError(f"{path} holds no usable {what} ({first_line(error)}); it holds {files}")
    if os.path.exists(path) or name.startswith(("/", ".", "~")):
        return UserError(
            f"there is no folder {name}; give a Hub id or a folder with config.json and model.safetensors"
        )
    return UserError(
        f"{name!r} cannot be loaded from the Hub ({first_line(error)}); give the path of a "
        "local folder instead, or run `make quickstart`, which needs no Hub"
    )


def _only_pickle(folder: Path) -> str | None:
    """The name of a file of pickled weights in a folder without safetensors."""
    if not os.path.isdir(folder):
        return None
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return None
    return next((name for name in names if name.endswith(PICKLES) and name != "training_args.bin"), None)


def check_folder(name: str) -> None:
    """Raises `UserError` if a local base's folder holds an adapter.

    Transformers would load the adapter silently, and LoRA would be trained on top of LoRA.
    """
    if os.path.isfile(os.path.join(os.path.expanduser(name), "adapter_config.json")):
        raise UserError(f"{name} is or holds an adapter, not a base model alone: merge it first (plainlora merge)")
