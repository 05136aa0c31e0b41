"""Which `LoraConfig` fields are implemented. Any other, away from its default, is an error that names it."""

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, fields

from peft import LoraConfig

from plainlora.lora.errors import LoRAError

SUPPORTED_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("bias", "fan_in_fan_out", "task_type"),
}
BOOKKEEPING_FIELDS = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "megatron_core"),
}

MOST_RANK = 2**20
LARGEST = 10**38  # of fp32; a whole number may be larger than any float


def _is_names(value: object) -> bool:
    return isinstance(value, (list, set, tuple)) and all(isinstance(name, str) for name in value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < LARGEST and math.isfinite(value)


def _is_pattern(value: object) -> bool:
    """Module names to whole numbers; each number is checked with the one it replaces."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_layers(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, (list, tuple)) and all(map(_is_whole, value)))


def _is_name_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


# PEFT takes whatever a file says, and stumbles over it later.
TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": (_is_name_or_names, "a list of names, or one pattern"),
    "exclude_modules": (_is_name_or_names, "a list of names, or one pattern"),
    "layers_pattern": (_is_name_or_names, "a list of names, or one"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "a list of whole numbers, or one"),
    "rank_pattern": (_is_pattern, "a mapping of names to whole numbers"),
    "alpha_pattern": (_is_pattern, "a mapping of names to numbers"),
}


def check_types(config: LoraConfig) -> None:
    """Raises `LoRAError` for a field whose value PEFT itself would stumble over."""
    for name, (is_right, expected) in TYPES.items():
        value = getattr(config, name)
        if value is not None and not is_right(value):
            raise LoRAError(f"{name} must be {expected}, not {value!r:.100}")
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(getattr(config, name), bool | None):
            raise LoRAError(f"{name} must be true or false, not {getattr(config, name)!r:.100}")
    _check_patterns_compile(config)


def _check_numbers(config: LoraConfig) -> None:
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": rank for key, rank in (config.rank_pattern or {}).items()}
    for name, rank in ranks.items():
        if not _is_whole(rank) or rank < 1:
            raise LoRAError(f"{name} must be a whole number of at least 1, not {rank!r:.100}")
        if rank > MOST_RANK:
            raise LoRAError(f"{name} is {rank:,}, more than any layer is wide; lower it")
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for name, alpha in alphas.items():
        if not _is_number(alpha):
            raise LoRAError(f"{name} must be a finite number, not {alpha!r:.100}")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise LoRAError(f"lora_dropout must lie in [0, 1), not {config.lora_dropout!r:.100}")


def _check_patterns_compile(config: LoraConfig) -> None:
    """Every text that is matched as a regular expression must be one."""
    whole = {name: getattr(config, name) for name in ("target_modules", "exclude_modules", "layers_pattern")}
    patterns = [(name, value) for name, value in whole.items() if isinstance(value, str)]
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        patterns += [(name, key) for key in getattr(config, name) or ()]
    for name, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise LoRAError(f"{name}: {pattern!r} is not a regular expression ({error})") from error


def find_unsupported(config: LoraConfig) -> list[str]:
    """`field=value` for every field of the config that this package does not implement."""
    unsupported = []
    for field in fields(config):
        if field.name in SUPPORTED_FIELDS | BOOKKEEPING_FIELDS:
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if value != default and value not in (None, False, [], {}, set()):
            unsupported.append(f"{field.name}={value!r}")
    if config.runtime_config.ephemeral_gpu_offload:
        unsupported.append("runtime_config.ephemeral_gpu_offload=True")
    if config.init_lora_weights not in (True, False, "gaussian"):
        unsupported.append(f"init_lora_weights={config.init_lora_weights!r}")
    return unsupported


def check_supported(config: LoraConfig) -> None:
    """Raises `LoRAError` naming every field of the config that this package does not implement."""
    if unsupported := find_unsupported(config):
        raise LoRAError(f"this LoRA does not implement {', '.join(unsupported)}, with either back end; leave it out")
    check_types(config)
    _check_numbers(config)
    if config.bias not in ("none", "all", "lora_only"):
        raise LoRAError(f"bias must be none, all or lora_only, not {config.bias!r}")
