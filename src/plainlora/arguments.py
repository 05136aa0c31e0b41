"""The flags that TRL and Transformers lack, and a parser that ignores nothing.

A recipe is read in two layers: its YAML first, the command line last. Both go through one argument parser, so a value
from the YAML is checked exactly as a typed one.
"""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import torch
import yaml
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from plainlora.errors import UserError

# What older recipes say, where the nearest of today's names would mislead.
RENAMED = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "overwrite_output_dir": "overwrite",
    "warmup_ratio": "warmup_steps",
}

# Smallest and largest value, both allowed. The libraries would notice late, or not at all.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (1, math.inf),
    "max_train_rows": (1, math.inf),
    "max_overflow": (0, 1),
    "exact_match_rows": (0, math.inf),
    "max_new_tokens": (1, math.inf),
    "dataset_num_proc": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}


@dataclass
class RecipeArguments:
    """What a recipe needs beyond TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`."""

    lora_backend: Literal["reference", "peft"] = field(
        default="reference",
        metadata={"help": "Which LoRA to train: `reference`, written by hand in plainlora.lora, or `peft`."},
    )
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Which biases to train, as in peft.LoraConfig."}
    )
    lora_init: Literal["true", "false", "gaussian"] = field(
        default="true", metadata={"help": "How the adapter starts: init_lora_weights of peft.LoraConfig."}
    )
    lora_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names to leave out of lora_target_modules."}
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt; all of them if left out."}
    )
    lora_rank_pattern: dict[str, int] | str | None = field(
        default=None, metadata={"help": 'Other ranks for some modules, as JSON: {"q_proj": 4}.'}
    )
    lora_alpha_pattern: dict[str, int] | str | None = field(
        default=None, metadata={"help": 'Other alphas for some modules, as JSON: {"q_proj": 8}.'}
    )
    adapter_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the trained adapter, whatever the base is stored in."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local file of the test rows, if dataset_name does not hold them."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of rows to hold out for testing, if there is no test split."},
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only, for a trial."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "`alpaca`, `llama2`, or a .jinja file; the tokenizer's own chat template if left out."},
    )
    on_overflow: Literal["drop", "truncate"] = field(
        default="drop",
        metadata={"help": "What happens to a row longer than max_length. A truncated row is trained without its EOS."},
    )
    max_overflow: float = field(
        default=0.01, metadata={"help": "Share of rows that may be longer than max_length before it is an error."}
    )
    exact_match_rows: int = field(
        default=0, metadata={"help": "Answer this many test rows before and after, and report the exact matches."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts that base and tuned model answer at the end."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    merge: bool = field(
        default=False, metadata={"help": "Also write the merged model to output_dir/merged, and check it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of another run in output_dir."})

    def __post_init__(self) -> None:
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            parse_pattern(name, getattr(self, name))
        size = float(self.test_split_size or 0)
        if not (0 <= size < 1 or (size > 0 and size.is_integer())):
            raise UserError(f"test_split_size is a share below 1 or a whole number of rows, not {size}")


def parse_pattern(name: str, value: dict[str, int] | str | None) -> dict[str, int]:
    """`{"q_proj": 4}` from its JSON.

    Raises:
        UserError: It is not JSON, or not a mapping to whole numbers.
    """
    try:
        pattern = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error}); write it as '{{\"q_proj\": 4}}'") from error
    if not isinstance(pattern, dict) or not all(type(number) is int and number > 0 for number in pattern.values()):
        raise UserError(f"{name} maps module names to whole numbers above 0, as in '{{\"q_proj\": 4}}', not {value!r}")
    return pattern


class _NoDuplicates(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{self.name}: {key!r} stands there twice; keep one of them")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader.

    Raises:
        UserError: The file is missing, is not YAML, is not a mapping, or names a key twice.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, _NoDuplicates)  # noqa: S506  # a SafeLoader
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; the recipes are recipes/*/*.yaml") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date such as 2024-13-45
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path} must be a YAML mapping of `name: value` lines; it is {found}")
    return content


def set_environment(path: str, variables: object) -> None:
    """Exports the `env:` block of a YAML.

    Raises:
        UserError: It is not a mapping, or the system refuses a name or a value.
    """
    if not isinstance(variables, dict):
        raise UserError(f"{path}: env must be a mapping of variables, not a {type(variables).__name__}")
    for name, value in variables.items():
        try:
            os.environ[str(name)] = "" if value is None else str(value)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: env: {name!r} cannot be set ({error})") from error


class StrictParser(TrlParser):
    """`TrlParser` in which nothing is ignored: unknown keys, wrong types and bad choices are errors (trl#1564)."""

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._types = {name: kind for owner in dataclass_types for name, kind in get_type_hints(owner).items()}

    def error(self, message: str) -> NoReturn:
        """Argparse would print the usage of some three hundred flags first."""
        raise UserError(message)

    def _names(self) -> list[str]:
        return sorted({action.dest for action in self._actions if action.dest != "help"})

    def _refuse_unknown(self, name: str, where: str) -> NoReturn:
        name = name.replace("-", "_")
        near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, self._names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see --help for the names"
        raise UserError(f"{where} is not an option; {hint}")

    def _as_arguments(self, path: str, content: dict[str, Any]) -> list[str]:
        """The YAML as if it had been typed, so that argparse checks it; lists and nulls become defaults."""
        arguments: list[str] = []
        for name, value in content.items():
            if name not in self._names():
                self._refuse_unknown(str(name), f"{path}: {name}")
            kind = self._types[name]
            if value is None:
                if NoneType not in get_args(kind):
                    raise UserError(f"{path}: {name} has no value; give one, or leave the line out")
                self.set_defaults(**{name: None})
            elif isinstance(value, list):
                if "list[" not in str(kind):
                    raise UserError(f"{path}: {name} takes one value, not a list")
                self.set_defaults(**{name: self._convert(f"{path}: {name}", name, value)})
            elif isinstance(value, dict):
                if "dict[" not in str(kind):
                    raise UserError(f"{path}: {name} takes one value, not a mapping")
                arguments += [f"--{name}", json.dumps(value, default=str)]
            else:  # `true` is what the options spell that way, such as lora_init
                arguments += [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
        return arguments

    def _convert(self, where: str, name: str, values: list[Any]) -> list[Any]:
        """Every entry of a list as its option converts a typed one."""
        kind = next(action.type for action in self._actions if action.dest == name)
        converted = []
        for value in values:
            if value is None or isinstance(value, (list, dict)):
                raise UserError(f"{where}: an entry of the list is one value, not {value!r}")
            try:
                converted.append(kind(str(value)) if callable(kind) else str(value))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise UserError(f"{where}: {error}") from error
        return converted

    def parse(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parses `--config FILE` and the command line into the dataclasses, in their order.

        Raises:
            UserError: Anything that would otherwise be ignored, or that a dataclass refuses.
        """
        typed = list(sys.argv[1:] if args is None else args)
        typed = [part for word in typed for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        from_yaml: list[str] = []
        if "--config" in typed:
            at = typed.index("--config")
            if not "".join(typed[at + 1 : at + 2]):
                raise UserError("--config needs the path of a YAML file")
            if "--config" in typed[at + 1 :]:
                raise UserError("--config stands there twice; keep one of them")
            path = typed[at + 1]
            del typed[at : at + 2]
            content = read_yaml(path)
            set_environment(path, content.pop("env", None) or {})
            from_yaml = self._as_arguments(path, content)
            self._check_values(from_yaml, path)
        explicit = {word[2:].partition("=")[0].replace("-", "_") for word in typed if word.startswith("--")}
        if trains_on_cpu(self.parse_known_args([*from_yaml, *typed])[0].use_cpu):
            from_yaml += full_precision_on_cpu(from_yaml, explicit)
        try:
            *parsed, unknown = self.parse_args_into_dataclasses([*from_yaml, *typed], return_remaining_strings=True)
        except (ValueError, ImportError, OSError) as error:  # what the libraries' dataclasses refuse settings with
            raise UserError(str(error)) from error
        if unknown:
            word = unknown[0].partition("=")[0]
            self._refuse_unknown(word.lstrip("-"), word)
        return tuple(parsed)

    def _check_values(self, from_yaml: list[str], path: str) -> None:
        """Parses the YAML's values alone, so that an error can say that they came from the file."""
        try:
            self.parse_known_args(from_yaml)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def trains_on_cpu(use_cpu: bool) -> bool:
    """Whether there is no accelerator, or `use_cpu` or the Accelerate config turns it down."""
    chosen = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return chosen or not torch.accelerator.is_available()


def full_precision_on_cpu(from_yaml: Sequence[str], explicit: set[str]) -> list[str]:
    """What to change in a recipe written for a GPU so that it trains in fp32 on a CPU.

    Accelerate refuses fp16 on a CPU, and bf16 (TRL's default) is slower than fp32 on most. What was typed on the
    command line stays. Without `use_cpu`, processes launched on a CPU would not find each other.
    """
    changes = ["--use_cpu=true", *(f"--{name}=false" for name in ("bf16", "fp16") if name not in explicit)]
    half = any(word in ("--dtype=float16", "--dtype=bfloat16") for word in from_yaml)
    return changes + (["--dtype=float32"] if half and "dtype" not in explicit else [])


def check_combinations(
    recipe: RecipeArguments, script: ScriptArguments, training: SFTConfig, model: ModelConfig
) -> None:
    """Refuses settings that this project cannot honour, instead of ignoring them.

    Raises:
        UserError: Naming the setting and what to do.
    """
    if not model.model_name_or_path:
        raise UserError("model_name_or_path is missing: give a Hub id or a local folder")
    if not script.dataset_name:
        raise UserError("dataset_name is missing: give a Hub id or a local file")
    check_ranges(vars(recipe) | vars(script) | vars(training) | vars(model))
    refused = {
        "dataset_streaming": (script.dataset_streaming, "rows are checked before training, so all are read first"),
        "ignore_bias_buffers": (script.ignore_bias_buffers, "current Transformers models need no such workaround"),
        "dataset_kwargs": (training.dataset_kwargs, "rows are prepared by this project, not by TRL"),
        "use_liger_kernel": (training.use_liger_kernel, "TRL has deprecated it; its own fused head is used"),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise UserError(f"{name} is not supported: {reason}")
    if training.packing and training.packing_strategy == "wrapped":
        raise UserError(
            "packing_strategy=wrapped is refused: it cuts rows in two and lets examples attend to each other "
            "(trl#1230); use bfd"
        )
    if training.packing and training.max_length is None:
        raise UserError("packing needs max_length: give the length of a packed sequence")
    if training.fp16 and trains_on_cpu(training.use_cpu):
        raise UserError("fp16 needs a GPU: leave --fp16 out, and a CPU trains in float32")
    check_writable(training.output_dir)
    trackers = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    for tracker in trackers:
        check_tracker(tracker)
    if model.dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise UserError(f"dtype must be auto, float32, float16 or bfloat16, not {model.dtype}")


def check_ranges(settings: dict[str, Any]) -> None:
    """Raises `UserError` for a number outside `BOUNDS`, or for `..._kwargs` that are no mapping."""
    for name, (low, high) in BOUNDS.items():
        value = settings[name]
        if value is not None and (not low <= value <= high or value == math.inf):
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{name} must be {limits}, not {value}")
    for name, value in settings.items():
        if name.endswith("_kwargs") and isinstance(value, str):
            raise UserError(f"{name} must be a mapping, as JSON on the command line, not {value!r}")


def check_writable(folder: str | None, option: str = "output_dir") -> None:
    """Raises `UserError` if the folder cannot be made or written to: better now than after hours of training."""
    if not folder:
        raise UserError(f"{option} is empty; give a folder")
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option} {folder}: {existing} cannot be written to")


def check_tracker(name: str) -> None:
    """Raises `UserError` if `report_to` names a tracker that Transformers does not know, or that is not installed."""
    if name in ("none", "all", *get_available_reporting_integrations()):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise UserError(
            f"report_to: there is no tracker {name!r}; known are none, {', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    if find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name}, or set --report_to none")


def dtype_of(name: str | None) -> torch.dtype | str:
    """`"bfloat16"` -> `torch.bfloat16`; `"auto"` stays, for `from_pretrained`."""
    return "auto" if name in (None, "auto") else getattr(torch, name)
