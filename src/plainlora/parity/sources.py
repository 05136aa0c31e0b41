"""Comparisons of the user's own: a recipe of either program, a trained adapter, or any model."""

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.base.config import load_config
from plainlora.base.dropout import check_dropout
from plainlora.base.loading import load_pretrained
from plainlora.base.tokenizer import check_known
from plainlora.data.encoding import Encoder
from plainlora.data.layouts import find_schema
from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.lora.interchange import read_config, saved_shapes
from plainlora.parity.case import FORMS, Case, seed_everything
from plainlora.parity.suite import training_arguments
from plainlora.parity.tiny import byte_tokenizer, model_class, random_batch
from plainlora.run.adapter_base import (
    class_labels,
    find_base,
    load_quantized_base_of,
    load_tokenizer_of,
    training_quantization,
)
from plainlora.settings.arguments import SFTArguments
from plainlora.settings.device import trains_on_cpu
from plainlora.settings.programs import CLASSIFY, SFT, Program, SettingsT
from plainlora.tasks import classify, sft
from plainlora.tasks.plan import AdapterPlan
from plainlora.training.trainers import ArgumentsT

MOST_TEXTS = 32  # in the batch of a classifier


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The rendered prompt as one row, without padding."""
    ids = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


def _as_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _for_comparison(training: ArgumentsT, steps: int) -> ArgumentsT:
    """The recipe's training arguments for a few steps, with every step logged and no checkpoints."""
    settings = copy.copy(training)
    settings.max_steps, settings.logging_steps = steps, 1
    settings.save_strategy = settings.eval_strategy = "no"
    settings.load_best_model_at_end = settings.push_to_hub = False
    settings.report_to, settings.disable_tqdm = [], True
    if isinstance(settings, SFTConfig):
        settings.assistant_only_loss = False
    return settings


def _parse(
    program: Program[SettingsT], config: str, flags: list[str], lora_backend: str | None
) -> tuple[SettingsT, str]:
    """A recipe's settings, and the `lora_backend` to compare.

    Raises:
        UserError: The settings are refused, two back ends are given, or the recipe uses PEFT's LoRA.
    """
    defaults: dict[str, Any] = {"lora_backend": None}  # shows whether the recipe sets it
    if trains_on_cpu(use_cpu=False):
        defaults["precision"] = "fp32"  # in which the two sides can be compared most closely
    settings = program.parse(["--config", config, *flags], **defaults)
    given = settings.recipe.lora_backend
    if given not in (None, *FORMS):
        raise UserError(
            f"{config}: with lora_backend {given}, PEFT would be compared with itself; end the command with -- "
            f"--lora_backend {lora_backend or FORMS[0]}"
        )
    if given and lora_backend and given != lora_backend:
        raise UserError(
            f"--lora_backend {lora_backend} contradicts the recipe's lora_backend {given}; leave the first out, or "
            f"end the command with -- --lora_backend {lora_backend}"
        )
    if (method := settings.recipe.method) != "lora":
        raise UserError(f"method {method} trains no LoRA, so there is nothing to compare; give a LoRA recipe")
    settings.recipe.lora_backend = FORMS[0]  # the plan says whether it implements the adapter
    return settings, given or lora_backend or FORMS[0]


def _hand_written(config: str, adapter: AdapterPlan) -> LoraConfig:
    """The config of an adapter that the hand-written LoRA implements.

    Raises:
        UserError: PEFT alone implements it.
    """
    if adapter.backend not in FORMS:
        why = adapter.notes[-1].partition(": ")[2]
        raise UserError(f"{config}: there is nothing hand-written to compare with PEFT: {why}")
    return cast(LoraConfig, adapter.lora)


def recipe_case(config: str, flags: list[str], steps: int, lora_backend: str | None = None) -> Case:
    """A recipe's own model, adapter, rows and training.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags, as for `recipes/sft.py`.
        steps: Number of optimizer steps of the trajectory.
        lora_backend: One of `FORMS`; the recipe's if left out, and the first if the recipe sets none.

    Raises:
        UserError: As in `recipes/sft.py`, or the recipe sets another back end.
    """
    # TRL's own config, in which gradient checkpointing has a default, so that the program need not decide it.
    program = replace(SFT, dataclass_types=(SFTArguments, ScriptArguments, SFTConfig, ModelConfig))
    settings, form = _parse(program, config, flags, lora_backend)
    recipe, training = settings.recipe, settings.training
    base_config, tokenizer = sft.read_config(settings), sft.read_tokenizer(settings)
    lora = _hand_written(config, sft.plan_adapter(settings, base_config))
    check_dropout(recipe.base_dropout, base_config)
    sft.install_template(settings, tokenizer)
    rows, _ = sft.read_rows(settings)
    enough = 4 * steps * training.train_batch_size * training.gradient_accumulation_steps
    ids = _prompt_ids((recipe.sample_prompts or ["Name three colours."])[0], tokenizer)
    return Case(
        name=config,
        # Placed by the libraries: a dense base is compared on the CPU, where the two agree to the last bit.
        make_base=lambda: sft.load_weights(settings, device_map=None).eval(),
        config=lora,
        inputs=_as_batch(ids),
        arguments=_for_comparison(training, steps),
        rows=_rows_within(rows, tokenizer, training, enough),
        tokenizer=tokenizer,
        adapter_dtype=recipe.adapter_dtype,
        prompts=ids,
        lora_backend=form,
        seed=training.seed,
    )


def _rows_within(rows: Dataset, tokenizer: PreTrainedTokenizerBase, training: SFTConfig, enough: int) -> Dataset:
    """The first rows that fit into `max_length`: TRL would cut longer ones, this package would drop them."""
    column, longest = training.dataset_text_field, training.max_length or 10**9
    encode = Encoder(tokenizer, find_schema(rows, column, "rows"), column, answers_only=False)
    first = range(min(len(rows), 4 * enough))
    kept = [number for number in first if len(encode(rows[number])["input_ids"]) <= longest]
    if not kept:
        raise UserError(f"no row of the recipe fits max_length={longest}; raise it with --max_length")
    return rows.select(kept[:enough])


def classifier_case(config: str, flags: list[str], steps: int, lora_backend: str | None = None) -> Case:
    """A classification recipe's own model, adapter, rows and training; its method must be LoRA.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags, as for `recipes/classify.py`.
        steps: Number of optimizer steps of the trajectory.
        lora_backend: See `recipe_case`.

    Raises:
        UserError: As in `recipes/classify.py`, or the recipe sets another back end.
    """
    settings, form = _parse(CLASSIFY, config, flags, lora_backend)
    recipe, training = settings.recipe, settings.training
    base_config, tokenizer = classify.read_config(settings), classify.read_tokenizer(settings)
    check_dropout(recipe.base_dropout, base_config)
    enough = max(2, min(steps * training.train_batch_size, MOST_TEXTS))
    recipe.max_train_rows = min(recipe.max_train_rows or enough, enough)
    texts = classify.prepare_rows(settings, tokenizer, base_config, lambda _: None)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in texts.train]
    adapter = classify.plan_adapter(settings, texts.labels, tokenizer.pad_token_id)

    def make_base() -> PreTrainedModel:
        seed_everything(training.seed)  # for the new head
        return classify.load_weights(settings, adapter.config, device_map=None)[0].eval()

    return Case(
        name=config,
        make_base=make_base,
        config=_hand_written(config, adapter),
        inputs=dict(DataCollatorWithPadding(tokenizer)(rows)),
        arguments=_for_comparison(training, steps),
        adapter_dtype=recipe.adapter_dtype,
        lora_backend=form,
        seed=training.seed,
    )


def adapter_case(adapter: str, prompt: str | None) -> Case:
    """A trained adapter, loaded into both sides, on a base stored as it was in training.

    Raises:
        UserError: Its base cannot be loaded.
        LoRAError: The folder holds no LoRA adapter, or an unreadable one.
    """
    config = read_config(adapter)
    saved_shapes(adapter)  # raises for unreadable tensors, which a level would report as not run
    quantization = training_quantization(adapter)
    base = find_base(adapter, allow_other_base=True)  # both sides use the same base
    tokenizer = load_tokenizer_of(adapter, base)
    classifies = class_labels(adapter) is not None
    ids = _prompt_ids(prompt or "Name three primary colours.", tokenizer)
    check_known(ids.flatten().tolist(), tokenizer, load_config(base.name, base.revision))
    batch = _as_batch(ids) | ({"labels": torch.zeros(1, dtype=torch.long)} if classifies else {})
    stored = "" if quantization is None else f", base in {'4' if quantization.get('load_in_4bit') else '8'} bits"

    def make_base() -> PreTrainedModel:
        seed_everything(0)
        return load_quantized_base_of(adapter, base).eval()

    return Case(
        name=adapter + stored + (", on another base" if base.warning else ""),
        make_base=make_base,
        config=config,
        adapter=adapter,
        inputs=batch,
        prompts=None if classifies else ids,
    )


def _load(name: str) -> PreTrainedModel:
    """Loads a model as the class of its config; a new classification head is the same every time."""
    config = load_config(name)
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; compare supports decoders and encoders only")
    seed_everything(0)
    model, _ = load_pretrained(model_class(config), name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # a decoder's classification head reads the last token before the padding
    return model.eval()


def model_case(name: str, targets: list[str], steps: int) -> Case:
    """Any decoder or encoder of Transformers' Auto classes, on random tokens.

    A decoder is trained by SFTTrainer, a classifier by Transformers' Trainer.

    Raises:
        UserError: The model cannot be loaded, or is an encoder-decoder.
    """
    config = load_config(name)
    _load(name)  # raises now if it cannot be loaded
    is_classifier = model_class(config) is AutoModelForSequenceClassification
    wanted = "all-linear" if targets == ["all-linear"] else targets
    lora = LoraConfig(
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=wanted,
        exclude_modules=r".*(classifier|score).*"
        if is_classifier and wanted == "all-linear"
        else None,  # trained whole
    )
    batch = random_batch(config.get_text_config().vocab_size, classes=2 if is_classifier else None, rows=8)
    rows = {"input_ids": batch["input_ids"].tolist(), "labels": batch["labels"].tolist()}
    settings = training_arguments(steps)
    return Case(
        name=name,
        make_base=lambda: _load(name),
        config=lora,
        inputs=batch,
        arguments=TrainingArguments(**settings) if is_classifier else SFTConfig(**settings, max_length=None),
        rows=None if is_classifier else Dataset.from_dict(rows),
        tokenizer=None if is_classifier else byte_tokenizer(),
        prompts=None if is_classifier else batch["input_ids"][:2, :8],
    )
