"""The configs within a `peft.LoraConfig`, such as `eva_config`: the names and types of what a recipe gives them."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from peft import LoraConfig

from plainlora.errors import UserError, did_you_mean

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", NoneType: "null"}


def find_sub_configs() -> dict[str, type]:
    """The fields of `LoraConfig` that are configs, with their classes, by their annotations."""
    hints = get_type_hints(LoraConfig)
    kinds = ((name, kind) for name, hint in hints.items() for kind in (hint, *get_args(hint)))
    return {name: kind for name, kind in kinds if isinstance(kind, type) and is_dataclass(kind)}


def check_sub_configs(given: Mapping[str, Any]) -> None:
    """Checks what a recipe gives the configs within `lora_config`: PEFT drops unknown names, and takes any type.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py (`_get_lora_subconfig`)

    Args:
        given: The recipe's `lora_config`.

    Raises:
        UserError: A name is unknown, or a value is of another type than PEFT's annotation.
    """
    for field, kind in find_sub_configs().items():
        value = given.get(field)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"lora_config: {field} must be a mapping of settings to values, not {value!r:.100}")
        hints = get_type_hints(kind)
        names = [each.name for each in fields(kind) if each.init]
        for name, entry in value.items():
            if name not in names:
                hint = did_you_mean(str(name), names, f"there are {', '.join(names)}")
                raise UserError(f"lora_config: {field} has no {name!r}; {hint}")
            if not _fits(entry, hints[name]):
                raise UserError(f"lora_config: {field}.{name} must be {_words(hints[name])}, not {entry!r:.100}")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from JSON or YAML has the type of an annotation: true is no number, and 1 is a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) < math.inf
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """An annotation in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each entry {_words(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(map(_words, get_args(hint)))
    return WORDS.get(hint, str(hint))
