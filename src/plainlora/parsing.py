"""YAML first, command line last, and nothing ignored.

Both layers go through one argument parser, so a value from the YAML is checked exactly as a typed one.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Hashable, Sequence
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from trl import TrlParser

from plainlora.errors import UserError

# What older recipes say, where the nearest of today's names would mislead.
RENAMED = {
    "torch_dtype": "dtype",
    "lora_rank": "lora_r",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "overwrite_output_dir": "overwrite",
    "warmup_ratio": "warmup_steps",
}


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
