"""Whether the base can be had, and fits what a recipe asks of it. Of its weights, names and shapes are looked at."""

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig
from transformers.utils import logging
from trl import ModelConfig

from plainlora.base.config import check_length, check_mergeable, check_storage, context_length, load_config
from plainlora.base.dropout import check_dropout
from plainlora.base.files import is_on_disk
from plainlora.base.remote_code import describe_remote_code
from plainlora.doctor.finding import Examination
from plainlora.settings.arguments import RecipeArguments


def examine_base(
    recipe: RecipeArguments, model: ModelConfig, longest: int | None, examination: Examination, trust: bool
) -> PretrainedConfig | None:
    """The base's config, if it can be had; whether rows, dropout and code of its own are as it allows.

    Args:
        recipe: With `base_dropout`.
        model: Which base.
        longest: The longest row asked for, in tokens.
        examination: Told what was found.
        trust: Whether the base's own code may run.
    """
    name = model.model_name_or_path
    if not name:
        return None  # which the settings have said
    if trust and (said := examination.ask("base", "code", describe_remote_code, name, model.model_revision)):
        examination.add("warning", "base", "code", said)
    config = examination.ask("base", "config", load_config, name, model.model_revision, trust)
    if config is not None:
        positions = context_length(config) or "any number of"
        before = len(examination.findings)
        examination.ask("base", "length", check_length, longest, config)
        examination.ask("base", "dropout", check_dropout, recipe.base_dropout, config)
        if recipe.merge:
            examination.ask("base", "merge", check_mergeable, name, config)
        if len(examination.findings) == before:
            examination.add("ok", "base", "config", f"{name}: {config.model_type}, {positions} positions")
    return config


def examine_weights(
    config: PretrainedConfig, load: Callable[..., object], examination: Examination, model: ModelConfig
) -> bool:
    """Whether the program could load the base: it is loaded on the `meta` device, of whose weights no value is read.

    Args:
        config: The base's.
        load: As the program loads it, given the device and where the weights may come from.
        examination: Told what was found.
        model: Which base, and how it is stored in memory.
    """
    name, quantized = str(model.model_name_or_path), model.load_in_4bit or model.load_in_8bit
    if not is_on_disk(name, model.model_revision):
        examination.add(
            "note", "base", "loading", "the weights are downloaded when training starts, and not looked at here"
        )
        return True
    if getattr(config, "quantization_config", None) is not None:
        right = examination.passes("base", "loading", check_storage, name, config, quantized)
        if right:
            examination.add("note", "base", "loading", "the weights are stored quantised, and not looked at here")
        return right
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loads = examination.passes("base", "loading", load, device_map="meta", local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    if loads:
        examination.add("ok", "base", "loading", "all weights are there, in the shapes that the config says")
    return loads


def dense(model: ModelConfig) -> ModelConfig:
    """The same base without quantising it, which needs values."""
    return replace(model, load_in_4bit=False, load_in_8bit=False)
