"""A recipe's settings -> the `peft.LoraConfig` of its adapter, and the faults that do not depend on the model."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from peft import LoraConfig
from trl import ModelConfig

from plainlora.errors import UserError, did_you_mean, first_line
from plainlora.lora.config import BOOKKEEPING_FIELDS, find_faults, find_unsupported
from plainlora.lora.errors import some
from plainlora.settings.arguments import RecipeArguments, parse_mapping, parse_pattern
from plainlora.settings.sub_configs import check_sub_configs


def keep_names_a_list(targets: list[str] | str | None) -> list[str] | str | None:
    """Makes one name a list again: `ModelConfig` turns it into a string, which PEFT would read as a pattern.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/model_config.py (`__post_init__`)
    """
    if isinstance(targets, str) and targets != "all-linear" and targets.replace(".", "").replace("_", "").isalnum():
        return [targets]
    return targets


def build_lora_config(model: ModelConfig, recipe: RecipeArguments) -> LoraConfig:
    """TRL's and this project's flags as one `peft.LoraConfig`.

    Raises:
        UserError: Layers are numbered for modules that a pattern selects, or PEFT refuses `lora_config`.
    """
    if recipe.lora_layers_to_transform and isinstance(keep_names_a_list(model.lora_target_modules), str):
        raise UserError(
            f"lora_layers_to_transform needs names of modules, not the pattern {model.lora_target_modules!r}: list "
            "them in lora_target_modules, or put the layers' numbers into the pattern"
        )
    return _make_config(_flags(model, recipe) | _own_fields(recipe))


def _flags(model: ModelConfig, recipe: RecipeArguments) -> dict[str, Any]:
    """The fields of `LoraConfig` that have a flag of their own."""
    return {
        "task_type": model.lora_task_type,
        "base_model_name_or_path": model.model_name_or_path,
        "revision": model.model_revision,
        "r": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "target_modules": keep_names_a_list(model.lora_target_modules),
        "target_parameters": model.lora_target_parameters,
        "modules_to_save": model.lora_modules_to_save,
        "use_rslora": model.use_rslora,
        "use_dora": model.use_dora,
        "bias": recipe.lora_bias,
        "init_lora_weights": "gaussian" if recipe.lora_init == "gaussian" else recipe.lora_init == "true",
        "exclude_modules": recipe.lora_exclude_modules,
        "layers_to_transform": recipe.lora_layers_to_transform,
        "rank_pattern": parse_pattern("lora_rank_pattern", recipe.lora_rank_pattern),
        "alpha_pattern": parse_pattern("lora_alpha_pattern", recipe.lora_alpha_pattern),
    }


def _flag_of(field: str) -> str:
    """The name of the flag of a field of `LoraConfig`; the field's own name if it has none."""
    settings = {each.name for kind in (ModelConfig, RecipeArguments) for each in fields(kind)}
    flag = {"init_lora_weights": "lora_init"}.get(field, f"lora_{field}")
    return flag if flag in settings else field


def twice_given(model: ModelConfig, recipe: RecipeArguments, origins: Mapping[str, str]) -> Iterator[str]:
    """Yields what is wrong with each field that `lora_config` and a flag of its own give different values.

    Args:
        model: The flags of TRL.
        recipe: The flags of this project.
        origins: The settings that were given, whatever their value, and where.
    """
    flags = _flags(model, recipe)
    own = parse_mapping("lora_config", recipe.lora_config)
    for field, value in own.items() if recipe.method == "lora" else ():  # else lora_config is refused as a whole
        if field in flags and (flag := _flag_of(field)) in origins and flags[field] != value:
            where = f"{flag} is {flags[field]!r} ({origins[flag]})"
            yield f"lora_config: {field} is {value!r}, but {where}; give only one"


def _own_fields(recipe: RecipeArguments) -> dict[str, Any]:
    """The fields that the setting `lora_config` gives.

    Raises:
        UserError: A name is not a field of `LoraConfig`, the program sets it, or a config within it is refused.
    """
    given = parse_mapping("lora_config", recipe.lora_config)
    names = {field.name for field in fields(LoraConfig)} - BOOKKEEPING_FIELDS - {"task_type"}
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names, "see PEFT's documentation for its fields")
            raise UserError(f"lora_config: {name!r} is not a field of peft.LoraConfig that a recipe can set; {hint}")
    check_sub_configs(given)
    return given


def _unknown_init(config: LoraConfig) -> Iterator[str]:
    """Yields what is wrong with an `init_lora_weights` that PEFT does not know; it fails only when layers are made.

    Its annotation leaves `lora_ga` out.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py
    """
    value = config.init_lora_weights
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value)):
        return
    _, literals = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
    known = [*get_args(literals), "lora_ga"]
    if str(value).lower() not in known:
        hint = did_you_mean(str(value), known, f"PEFT knows {', '.join(known)}", cutoff=0.6)
        yield f"lora_config: init_lora_weights is {value!r}; {hint}"


def _make_config(values: dict[str, Any]) -> LoraConfig:
    """The config.

    Raises:
        UserError: PEFT refuses it, or would ignore a part of it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = LoraConfig(**values)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"lora_config: PEFT refuses it: {first_line(error)}") from error
    for warning in caught:
        if "ignored" in str(warning.message) or "won't be able" in str(warning.message):
            raise UserError(f"lora_config: {' '.join(str(warning.message).split())}")
    return config


def adapter_faults(model: ModelConfig, recipe: RecipeArguments) -> Iterator[tuple[str, str]]:
    """Yields each setting of the adapter that is refused whatever the base is, and what is wrong with it."""
    try:
        config = build_lora_config(model, recipe)
    except UserError as error:
        yield str(error).partition(":")[0].partition(" ")[0], str(error)
        return
    if recipe.lora_backend == "reference" and (names := list(find_unsupported(config).values())):
        yield (
            "lora_backend",
            f"lora_backend reference does not implement {some(names)}; use peft_fused, or leave it out",
        )
    for fault in _unknown_init(config):
        yield "lora_config", fault
    given = parse_mapping("lora_config", recipe.lora_config)
    for field, fault in find_faults(config):
        yield ("lora_config", f"lora_config: {fault}") if field in given else (_flag_of(field), fault)
