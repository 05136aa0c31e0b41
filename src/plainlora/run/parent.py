"""The adapter that a run trains on, `adapter_name_or_path`: this project's, or of a tool that writes PEFT's files."""

from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig
from transformers.utils.hub import extract_commit_hash

from plainlora.base.identity import describe_base, find_difference, name_base
from plainlora.errors import UserError, first_line
from plainlora.folders import sha256_of
from plainlora.lora.config import BOOKKEEPING_FIELDS, as_loaded
from plainlora.lora.interchange import read_config, saved_shapes
from plainlora.peft_model.config import check_base_is_known
from plainlora.run.adapter_base import class_labels, read_run

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS, "run.json")
FOUND_OUT = {*BOOKKEEPING_FIELDS, "task_type", "fan_in_fan_out"}  # by PEFT or the program, not set by a recipe
KEPT = [each.name for each in fields(LoraConfig) if each.name not in FOUND_OUT]
SPELLED_OUT = ("target_modules", "target_parameters")  # where a recipe gives a pattern, all-linear or nothing


@dataclass(frozen=True)
class Parent:
    """A saved adapter.

    Attributes:
        name: As the setting names it.
        folder: Where its files are.
        config: Its config, which the run keeps.
    """

    name: str
    folder: Path
    config: LoraConfig

    def describe(self) -> dict[str, Any]:
        """Its name, its commit on the Hub, and the digest of its weights, for the record."""
        weights = self.folder / WEIGHTS
        return {
            "name": self.name,
            "commit": extract_commit_hash(str(weights), None),
            "sha256": sha256_of(weights),
        }

    def line(self, settings: LoraConfig) -> str:
        """A sentence for the log: what of the recipe's adapter is not used.

        Args:
            settings: The adapter that the other settings describe.
        """
        differing = [
            f"{name} {_shown(getattr(self.config, name))} (the recipe: {_shown(getattr(settings, name))})"
            for name in KEPT
            if not (name in SPELLED_OUT and isinstance(getattr(settings, name), str | None))
            and _shown(getattr(self.config, name)) != _shown(getattr(settings, name))
        ]
        kept = f"; it keeps its own {', '.join(differing)}" if differing else ""
        return f"goes on from the adapter {self.name}{kept}"


def _shown(value: object) -> str:
    if value is None or value in ({}, [], set(), ""):
        return "none"
    return f"[{', '.join(sorted(map(str, value)))}]" if isinstance(value, (list, set, tuple)) else str(value)


def find_parent(
    name: str, base: str, revision: str | None, trust_remote_code: bool = False, classifies: bool = False
) -> Parent:
    """Finds a saved adapter in a folder or on the Hub, and checks that it was trained on this base.

    Args:
        name: A folder, or a Hub id.
        base: The run's base.
        revision: Of the base.
        trust_remote_code: As for the base.
        classifies: Whether the run trains a classifier.

    Raises:
        UserError: There is no such adapter, or it was trained for another task or on another base.
        LoRAError: Its files cannot be read.
    """
    folder = _locate(name)
    config = deepcopy(as_loaded(read_config(folder)))
    saved_shapes(folder)
    check_base_is_known(config, folder)
    if classifies != (class_labels(folder) is not None):
        own = ("language model", "sft") if classifies else ("classifier", "classify")
        raise UserError(f"adapter_name_or_path: {name} is a {own[0]}'s; train it with recipes/{own[1]}.py")
    _check_base(name, folder, config, base, revision, trust_remote_code)
    config.inference_mode = False
    config.base_model_name_or_path, config.revision = base, revision
    return Parent(name, folder, config)


def _locate(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise UserError(f"adapter_name_or_path: there is no folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"adapter_name_or_path: {name} is neither a folder here nor an adapter that can be loaded from the Hub "
            f"({first_line(error)})"
        ) from error


def _check_base(
    name: str, folder: Path, config: LoraConfig, base: str, revision: str | None, trust_remote_code: bool
) -> None:
    """Raises `UserError` for another base: by the record of its run, or else by the name in its config."""
    if trained := read_run(folder).get("base"):
        if find_difference(trained, describe_base(base, revision, trust_remote_code)) in (None, "precision"):
            return
        raise UserError(
            f"adapter_name_or_path: {name} was trained on {name_base(trained)}, and {base} has other weights; "
            "give its own base with --model_name_or_path"
        )
    named = config.base_model_name_or_path
    if named and named != base and Path(named).expanduser().resolve() != Path(base).expanduser().resolve():
        raise UserError(
            f"adapter_name_or_path: {name} names the base {named}, not {base}; give --model_name_or_path {named}, or, "
            f"if both are the same, correct base_model_name_or_path in its adapter_config.json"
        )
