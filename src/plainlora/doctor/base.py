"""Checks that the base can be loaded and fits the recipe. Only names and shapes of its weights are read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

from plainlora.base.config import check_length, check_mergeable, check_storage, context_length
from plainlora.base.dropout import check_dropout
from plainlora.base.files import is_on_disk
from plainlora.doctor.finding import Examination
from plainlora.settings.programs import Settings, SettingsT


def examine_base(
    settings: Settings[Any, Any], config: PretrainedConfig, longest: int | None, examination: Examination
) -> None:
    """Checks the length of rows, dropout and merging against the base.

    Args:
        settings: The settings of either program.
        config: The base's config.
        longest: The longest row, in tokens.
        examination: Gets the findings.
    """
    positions = context_length(config) or "any number of"
    before = len(examination.findings)
    examination.ask("base", "length", check_length, longest, config)
    examination.ask("base", "dropout", check_dropout, settings.recipe.base_dropout, config)
    if settings.recipe.merge:
        examination.ask("base", "merge", check_mergeable, settings.base, config)
    if len(examination.findings) == before:
        examination.add("ok", "base", "config", f"{settings.base}: {config.model_type}, {positions} positions")


def examine_weights(
    settings: SettingsT,
    config: PretrainedConfig,
    load: Callable[..., object],
    examination: Examination,
) -> bool:
    """Checks that the program can load the base, by loading it on the meta device, where no value is read.

    Args:
        settings: The base, and how it is stored.
        config: The base's config.
        load: The program's function that loads it.
        examination: Gets the findings.
    """
    name, model = settings.base, settings.model
    quantized = model.load_in_4bit or model.load_in_8bit
    if not is_on_disk(name, model.model_revision):
        examination.add(
            "note", "base", "loading", "the weights are downloaded when training starts, and are not checked here"
        )
        return True
    if getattr(config, "quantization_config", None) is not None:
        right = examination.passes("base", "loading", check_storage, name, config, quantized)
        if right:
            examination.add("note", "base", "loading", "the weights are stored quantised, and are not checked here")
        return right
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        dense = replace(model, load_in_4bit=False, load_in_8bit=False)  # quantising needs values
        options = {"device_map": "meta", "local_files_only": True}
        loads = examination.passes("base", "loading", load, replace(settings, model=dense), **options)
    finally:
        if shown:
            logging.enable_progress_bar()
    if loads:
        examination.add("ok", "base", "loading", "all weights are there, in the shapes that the config gives")
    return loads
