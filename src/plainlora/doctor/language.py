"""A recipe of `recipes/sft.py`: its base, rows, tokenizer and adapter."""

from collections.abc import Callable
from typing import Any, cast

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments

from plainlora.backends import BACKENDS
from plainlora.base.loading import build_decoder, load_base
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.data.prompts import install_template
from plainlora.doctor.base import dense, examine_base, examine_weights
from plainlora.doctor.diagnosis import Diagnosis
from plainlora.doctor.finding import Examination
from plainlora.doctor.layers import examine_layers
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.doctor.precision import list_precisions
from plainlora.doctor.resources import examine_resources
from plainlora.doctor.rows import examine_rows
from plainlora.doctor.sample import split_sample
from plainlora.doctor.tokens import examine_template
from plainlora.resources.footprint import Footprint, estimate
from plainlora.resources.plan import Plan
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.arguments import SFTArguments, SFTRecipeConfig
from plainlora.training.preparation import PreparedRows, prepare_rows, read_rows

Parts = tuple[SFTArguments, ScriptArguments, SFTRecipeConfig, ModelConfig]


def examine_language_model(found: Diagnosis, parts: Parts, say: Callable[[str], None]) -> dict[str, tuple[Any, str]]:
    """Fills the diagnosis; returns what each setting that was left open will be, and why.

    Args:
        found: With the settings examined.
        parts: The program's dataclasses.
        say: Told which stage begins.
    """
    recipe, script, training, model = parts
    examination, trust = found.examination, training.trust_remote_code
    say("looking at the base")
    config = examine_base(recipe, model, training.max_length, examination, trust)
    found.precisions = list_precisions(training, model, config, recipe.adapter_dtype)
    tokenizer, rows = _examine_tokenizer(parts, config, examination), None
    if script.dataset_name:
        say("reading rows")
        if tokenizer is None:
            _say_rows(examination.ask("rows", "there", read_rows, recipe, script, training), examination)
        else:
            rows = examination.ask("rows", "there", prepare_rows, recipe, script, training, tokenizer, lambda _: None)
    if rows is not None and tokenizer is not None:
        say("looking at rows")
        found.reports = rows.reports
        examination.findings += examine_rows(rows, tokenizer, config).findings
        if len(rows.train):
            found.sample = split_sample(rows.train[0]["input_ids"], rows.train[0]["labels"], tokenizer)
    say("laying out the model")
    lora = examination.ask("adapter", "config", build_lora_config, model, recipe)
    examine_learning_rate(training, examination)
    loads = config is not None and _examine_weights(parts, config, examination)
    targets: list[str] = []
    if config is not None and lora is not None:
        targets = examine_layers(build_decoder(config, trust), lora, examination)
    if config is not None and loads and lora is not None and targets and rows is not None and len(rows.train):
        say("counting memory")
        report = rows.reports["train"]
        plan = Plan(
            config,
            lora,
            training,
            model,
            longest=training.max_length if training.packing and training.max_length else _longest(rows.train),
            rows=report.kept,
            tokens=report.tokens,
            trained_tokens=report.trained_tokens,
            backend=BACKENDS[recipe.lora_backend],
            adapter_dtype=recipe.adapter_dtype,
            base_dropout=recipe.base_dropout,
            merge=recipe.merge,
            tokenizer=tokenizer,
            evaluated=None if rows.test is None else len(rows.test),
        )
        found.footprint = examination.ask("resources", "estimate", estimate, plan)
    if found.footprint is not None:
        examine_resources(found.footprint, examination)
    examination.add("ok", "evaluation", "memory", "an evaluation keeps the loss alone, no logits are gathered")
    return _decided(parts, targets, rows, found.footprint)


def _examine_tokenizer(
    parts: Parts, config: PretrainedConfig | None, examination: Examination
) -> PreTrainedTokenizerBase | None:
    recipe, _, training, model = parts
    if not model.model_name_or_path:
        return None
    tokenizer = examination.ask(
        "tokenizer",
        "there",
        load_tokenizer,
        model.model_name_or_path,
        model.model_revision,
        eos_token=training.eos_token,
        pad_token=training.pad_token,
        trust_remote_code=training.trust_remote_code,
    )
    if tokenizer is None:
        return None
    if config is not None:
        examination.ask("tokenizer", "vocabulary", check_vocabulary, tokenizer, config)
    template, own = recipe.prompt_template or training.chat_template_path, tokenizer.chat_template
    if not examination.passes("tokenizer", "template", install_template, tokenizer, template):
        return None
    examination.ask("tokenizer", "own template", examine_template, tokenizer, template, own, examination)
    return tokenizer


def _examine_weights(parts: Parts, config: PretrainedConfig, examination: Examination) -> bool:
    recipe, _, training, model = parts

    def load(**options: Any) -> object:
        asked = cast(dict[str, Any], training.model_init_kwargs or {})
        return load_base(dense(model), training.trust_remote_code, asked | options, recipe.base_dropout)

    return examine_weights(config, load, examination, model)


def _say_rows(read: tuple[Dataset, Dataset | None] | None, examination: Examination) -> None:
    """What can be said of rows that no tokenizer is there for."""
    if read is not None:
        train, test = read
        said = f"{len(train):,} to train on and {len(test) if test is not None else 0:,} to test on were read"
        examination.add("note", "rows", "there", f"{said}, but not tokenised: there is no tokenizer, or no template")


def _longest(rows: Dataset) -> int:
    return max(map(len, rows["input_ids"]))


def _decided(
    parts: Parts, targets: list[str], rows: PreparedRows | None, footprint: Footprint | None
) -> dict[str, tuple[Any, str]]:
    """What each setting that was left open will be, and why."""
    recipe, _, training, model = parts
    decided: dict[str, tuple[Any, str]] = {}
    if recipe.prompt_template is None:
        template = training.chat_template_path or "the tokenizer's own"
        unused = rows is not None and not rows.rendered
        decided["prompt_template"] = ("none" if unused else template, "plain texts" if unused else "left open")
    if training.gradient_checkpointing is None:
        decided["gradient_checkpointing"] = ("only if a step would not fit", "counted at the start")
        if footprint is not None:
            checkpointing = footprint.memory.checkpointing
            decided["gradient_checkpointing"] = (checkpointing, "by what fits; counted again at the start")
    if training.completion_only_loss is None and rows is not None:
        decided["completion_only_loss"] = (rows.answers_only, "by the rows' columns")
    if model.lora_target_modules is None and targets:
        decided["lora_target_modules"] = (targets, "PEFT's choice for this architecture")
    return decided
