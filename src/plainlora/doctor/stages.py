"""Checks the results of the stages before a weight is loaded. Called by the programs and by the doctor."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from plainlora.base.tokenizer import check_ending, check_vocabulary
from plainlora.doctor.base import examine_base
from plainlora.doctor.finding import Examination
from plainlora.doctor.layers import examine_layers
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.doctor.rows import examine_rows
from plainlora.doctor.steps import examine_steps
from plainlora.doctor.texts import examine_texts
from plainlora.doctor.tokens import examine_template
from plainlora.resources.weights import stored_dtype
from plainlora.settings.arguments import dtype_of
from plainlora.settings.programs import ClassifySettings, Settings, SFTSettings
from plainlora.tasks import sft
from plainlora.tasks.last_layers import tied_head
from plainlora.tasks.plan import AdapterPlan
from plainlora.tasks.rows import PreparedRows, PreparedTexts


@dataclass
class Stages:
    """The results of the stages before weights are loaded; `None` if a stage failed.

    Attributes:
        config: The base's config.
        tokenizer: The base's tokenizer, for a language model with the chat template installed.
        adapter: What will be trained.
        own_template: The tokenizer's own chat template.
    """

    config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    adapter: AdapterPlan | None = None
    own_template: str | dict[str, str] | None = None


def examine_start(
    settings: Settings[Any, Any],
    config: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    found: Examination | None = None,
) -> Examination:
    """Checks that base, tokenizer and settings fit together. It needs no rows, whose preparation may take long.

    Args:
        settings: The settings of either program.
        config: The base's config; `None` if it could not be loaded.
        tokenizer: The base's tokenizer; `None` if it could not be loaded.
        found: Findings to add to.
    """
    found = Examination() if found is None else found
    longest = getattr(settings.recipe, "max_length", None) or getattr(settings.training, "max_length", None)
    if config is not None:
        examine_base(settings, config, longest, found)
        if tokenizer is not None:
            found.ask("tokenizer", "vocabulary", check_vocabulary, tokenizer, config)
            found.ask("tokenizer", "ending", check_ending, tokenizer, config)
    return found


def examine_sft(settings: SFTSettings, stages: Stages, rows: PreparedRows | None, found: Examination) -> Examination:
    """Checks tokenizer, rows, learning rate and adapter of a language model.

    Args:
        settings: The program's settings.
        stages: The results of the other stages.
        rows: From `prepare_rows`.
        found: Findings to add to.
    """
    tokenizer = stages.tokenizer
    if tokenizer is not None:
        template, own = sft.template_name(settings), stages.own_template
        found.ask("tokenizer", "own template", examine_template, tokenizer, template, own, found)
        if rows is not None:
            found.findings += examine_rows(rows, tokenizer, stages.config).findings
            if stages.config is not None:
                found.ask("prompts", "room", sft.choose_questions, settings, rows, tokenizer, stages.config)
        if rows is not None and len(rows.train) and stages.adapter is not None:
            steps = sft.plan_run(settings, stages.adapter, tokenizer, rows).steps
            examine_steps(steps, settings.training, found)
    examine_learning_rate(settings.training, found, settings.recipe.method)
    if stages.adapter is not None:
        _examine_method(settings, stages.adapter, found)
    return found


def examine_classifier(
    settings: ClassifySettings, stages: Stages, texts: PreparedTexts | None, found: Examination
) -> Examination:
    """Checks texts, learning rate and adapter of a classifier. Arguments are those of `examine_sft`."""
    tokenizer, adapter = stages.tokenizer, stages.adapter
    if tokenizer is not None and texts is not None:
        found.findings += examine_texts(texts, tokenizer, stages.config).findings
    examine_learning_rate(settings.training, found, settings.recipe.method)
    if adapter is not None:
        _examine_method(settings, adapter, found)
    return found


def _examine_method(settings: Settings[Any, Any], adapter: AdapterPlan, found: Examination) -> None:
    if adapter.lora is not None and adapter.backend is not None:
        for note in adapter.notes:
            found.add("note", "adapter", "plan", note)
        examine_layers(adapter.build(), adapter.lora, adapter.backend, found, settings.recipe.merge)
        return
    asked = dtype_of(settings.model.dtype)
    dtype = stored_dtype(adapter.config) if isinstance(asked, str) else asked
    if dtype in (torch.bfloat16, torch.float16) and not settings.training.fp16:  # which trains float32 copies
        message = f"the weights are trained in {settings.model.dtype}: small steps are rounded away; set dtype float32"
        found.add("warning", "method", "dtype", message)
    if adapter.modules is None:
        found.add("ok", "method", "layers", "every weight is trained")
    else:
        found.add("ok", "method", "layers", f"these are trained: {', '.join(adapter.modules)}")
        skeleton = adapter.build()
        if skeleton is not None and (head := tied_head(skeleton)):
            message = f"{head} has the weight of the input embedding, so it is trained only if the embedding is named"
            found.add("note", "method", "head", message)
