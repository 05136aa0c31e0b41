"""Whether the base can be had, and fits what a recipe asks of it. Its weights are not looked at."""

from transformers import PretrainedConfig
from trl import ModelConfig

from plainlora.doctor.finding import Examination
from plainlora.models import check_dropout, check_length, context_length, describe_remote_code, load_config
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
        if len(examination.findings) == before:
            examination.add("ok", "base", "config", f"{name}: {config.model_type}, {positions} positions")
    return config
