"""Which `LoraConfig` fields the hand-written LoRA implements, and which of their values are never valid."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeGuard, get_type_hints

from peft import LoraConfig

from plainlora.lora.errors import LoRAError, UnsupportedError, some

SUPPORTED_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("bias", "fan_in_fan_out", "task_type", "use_dora"),
}
BOOKKEEPING_FIELDS = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "megatron_core"),
}

INIT_FIELDS = {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}  # each belongs to an init_lora_weights
INITS_OF_A_AND_B = ("eva", "orthogonal")  # PEFT's values of init_lora_weights that do not change the base
SWITCHES = [name for name, kind in get_type_hints(LoraConfig).items() if kind is bool]

MOST_RANK = 2**20
LARGEST = 10**38  # of fp32; a whole number may be larger than any float


def _is_names(value: object) -> bool:
    return isinstance(value, (list, set, tuple)) and all(isinstance(name, str) for name in value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < LARGEST and math.isfinite(value)


def _is_pattern(value: object) -> TypeGuard[dict[str, Any]]:
    """A mapping with module names as keys. Its numbers are checked in `_wrong_numbers`, with `r` and `lora_alpha`."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_whole, value))


def _is_layers(value: object) -> bool:
    return _is_whole(value) or _is_numbers(value)


def _is_ranges(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_numbers(pair) and len(pair) == 2 for pair in value)


def _is_tokens(value: object) -> bool:
    return _is_numbers(value) or (_is_pattern(value) and all(map(_is_numbers, value.values())))


def _is_name_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


# PEFT accepts any value and fails on it later.
TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": (_is_name_or_names, "a list of names, or one pattern"),
    "exclude_modules": (_is_name_or_names, "a list of names, or one pattern"),
    "layers_pattern": (_is_name_or_names, "a list of names, or one"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "a list of whole numbers, or one"),
    "rank_pattern": (_is_pattern, "a mapping of names to whole numbers"),
    "alpha_pattern": (_is_pattern, "a mapping of names to numbers"),
    "trainable_token_indices": (_is_tokens, "a list of whole numbers, or a mapping of names to such lists"),
    "alora_invocation_tokens": (_is_numbers, "a list of whole numbers"),
    "layer_replication": (_is_ranges, "a list of pairs of whole numbers"),
}


def _wrong_types(config: LoraConfig) -> Iterator[tuple[str, str]]:
    for name, (is_right, expected) in TYPES.items():
        value = getattr(config, name, None)  # an older PEFT has fewer fields
        if value is not None and not is_right(value):
            yield name, f"{name} must be {expected}, not {value!r:.100}"
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool | None):
            yield name, f"{name} must be true or false, not {getattr(config, name)!r:.100}"


def _broken_patterns(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Fields whose text is used as a regular expression and is not one."""
    whole = {name: getattr(config, name) for name in ("target_modules", "exclude_modules", "layers_pattern")}
    patterns = [(name, value) for name, value in whole.items() if isinstance(value, str)]
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        patterns += [(name, key) for key in getattr(config, name) or ()]
    for name, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield name, f"{name}: {pattern!r} is not a regular expression ({error})"


def _unreadable(config: LoraConfig) -> Iterator[tuple[str, str]]:
    wrong = list(_wrong_types(config))
    yield from wrong or _broken_patterns(config)


def check_types(config: LoraConfig) -> None:
    """Raises `LoRAError` for a field of the wrong type, on which PEFT itself would fail."""
    for _, fault in _unreadable(config):
        raise LoRAError(fault)


def _wrong_numbers(config: LoraConfig) -> Iterator[tuple[str, str]]:
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": rank for key, rank in (config.rank_pattern or {}).items()}
    for name, rank in ranks.items():
        if not _is_whole(rank) or rank < 1:
            yield name.partition("[")[0], f"{name} must be a whole number of at least 1, not {rank!r:.100}"
        elif rank > MOST_RANK:
            yield name.partition("[")[0], f"{name} is {rank:,}, more than any layer is wide; lower it"
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for name, alpha in alphas.items():
        if not _is_number(alpha):
            yield name.partition("[")[0], f"{name} must be a finite number, not {alpha!r:.100}"
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        yield "lora_dropout", f"lora_dropout must lie in [0, 1), not {config.lora_dropout!r:.100}"


def find_unsupported(config: LoraConfig) -> dict[str, str]:
    """The fields that are set and not implemented here: name -> `name=value`."""
    found = {}
    for field in fields(config):
        if field.name in SUPPORTED_FIELDS | BOOKKEEPING_FIELDS | INIT_FIELDS:
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if value != default and value not in (None, False, [], {}, set()):
            found[field.name] = field.name if is_dataclass(value) else f"{field.name}={value!r}"
    if config.runtime_config.ephemeral_gpu_offload:
        found["runtime_config"] = "runtime_config.ephemeral_gpu_offload=True"
    if config.init_lora_weights not in (True, False, "gaussian"):
        found["init_lora_weights"] = f"init_lora_weights={config.init_lora_weights!r}"
    return found


def as_loaded(config: LoraConfig) -> LoraConfig:
    """The config for an adapter that is loaded: an initialisation that did not change the base no longer matters."""
    if config.init_lora_weights not in INITS_OF_A_AND_B:
        return config
    config = copy.copy(config)
    config.init_lora_weights, config.eva_config = True, None
    return config


def find_faults(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Yields each field with a value that no back end accepts for any model, and what is wrong with it."""
    unreadable = list(_unreadable(config))
    yield from unreadable or _wrong_numbers(config)
    if config.bias not in ("none", "all", "lora_only"):
        yield "bias", f"bias must be none, all or lora_only, not {config.bias!r}"


def check_config(config: LoraConfig) -> None:
    """Raises `LoRAError` if a field has a value that no back end accepts for any model."""
    for _, fault in find_faults(config):
        raise LoRAError(fault)


def check_supported(config: LoraConfig) -> None:
    """Checks that the hand-written LoRA implements a config.

    Raises:
        UnsupportedError: A field is set that only PEFT implements.
        LoRAError: A field has a wrong value.
    """
    if unsupported := list(find_unsupported(config).values()):
        raise UnsupportedError(f"the hand-written LoRA does not implement {some(unsupported)}, PEFT does")
    check_config(config)
