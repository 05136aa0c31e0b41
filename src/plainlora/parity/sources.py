"""Cases of the user's own: a recipe, a trained adapter, or any model."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.arguments import RecipeArguments
from plainlora.backends import build_lora_config
from plainlora.checks import check_combinations
from plainlora.data.datasets import load_train_and_test
from plainlora.data.encoding import Encoder, find_schema
from plainlora.data.prompts import install_template, render_prompt
from plainlora.errors import UserError
from plainlora.lora.interchange import read_config
from plainlora.merging import load_tokenizer_of, training_quantization
from plainlora.models import keep_4bit_weights_unpacked, load_base, load_config, load_tokenizer
from plainlora.parity.case import Case, seed_everything
from plainlora.parity.suite import training_arguments
from plainlora.parity.tiny import byte_tokenizer, model_class, random_batch
from plainlora.parsing import StrictParser


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The rendered prompt as one row, so that no padding comes between the two sides."""
    ids = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


def _as_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _for_comparison(training: SFTConfig, steps: int) -> SFTConfig:
    """The recipe's own training, cut to some steps, every one logged and nothing saved on the way."""
    settings = copy.copy(training)
    settings.max_steps, settings.logging_steps = steps, 1
    settings.save_strategy = settings.eval_strategy = "no"
    settings.load_best_model_at_end = settings.push_to_hub = False
    settings.report_to, settings.disable_tqdm = [], True
    settings.assistant_only_loss = False
    return settings


def recipe_case(config: str, flags: list[str], steps: int) -> Case:
    """A recipe's own model, adapter, rows and training.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags, as for `recipes/sft.py`.
        steps: Optimizer steps of the trajectory.

    Raises:
        UserError: As `recipes/sft.py` would.
    """
    parser = StrictParser((RecipeArguments, ScriptArguments, SFTConfig, ModelConfig))
    recipe, script, training, model = parser.parse(["--config", config, *flags])
    check_combinations(recipe, script, training, model)
    tokenizer = load_tokenizer(str(model.model_name_or_path), model.model_revision, eos_token=training.eos_token)
    install_template(tokenizer, recipe.prompt_template or training.chat_template_path)
    rows, _ = load_train_and_test(
        str(script.dataset_name),
        config=script.dataset_config,
        train_split=script.dataset_train_split,
        test_split=script.dataset_test_split,
        test_name=None,
        test_split_size=None,
        max_train_rows=recipe.max_train_rows,
        seed=training.seed,
    )
    enough = 4 * steps * training.train_batch_size * training.gradient_accumulation_steps
    ids = _prompt_ids((recipe.sample_prompts or ["Name three colours."])[0], tokenizer)
    return Case(
        name=config,
        make_base=lambda: load_base(model, training.trust_remote_code, training.model_init_kwargs).eval(),
        config=build_lora_config(model, recipe),
        inputs=_as_batch(ids),
        arguments=_for_comparison(training, steps),
        rows=_rows_within(rows, tokenizer, training, enough),
        tokenizer=tokenizer,
        adapter_dtype=recipe.adapter_dtype,
        prompts=ids,
        seed=training.seed,
    )


def _rows_within(rows: Dataset, tokenizer: PreTrainedTokenizerBase, training: SFTConfig, enough: int) -> Dataset:
    """The first rows that fit whole: TRL would cut a longer one, this package would drop it."""
    column, longest = training.dataset_text_field, training.max_length or 10**9
    encode = Encoder(tokenizer, find_schema(rows, column, "rows"), column, answers_only=False)
    first = range(min(len(rows), 4 * enough))
    kept = [number for number in first if len(encode(rows[number])["input_ids"]) <= longest]
    if not kept:
        raise UserError(f"no row of the recipe fits max_length={longest}; raise it with --max_length")
    return rows.select(kept[:enough])


def adapter_case(adapter: str, prompt: str | None) -> Case:
    """A trained adapter, loaded into both sides, on a base stored as it was in training.

    Raises:
        UserError: Its base cannot be had.
        LoRAError: The folder holds no LoRA adapter.
    """
    config = read_config(adapter)
    name, quantization = str(config.base_model_name_or_path), training_quantization(adapter)
    tokenizer = load_tokenizer_of(adapter)
    is_classifier = config.task_type == "SEQ_CLS"
    ids = _prompt_ids(prompt or "Name three primary colours.", tokenizer)
    batch = _as_batch(ids) | ({"labels": torch.zeros(1, dtype=torch.long)} if is_classifier else {})
    stored = "" if quantization is None else f", base in {'4' if quantization.get('load_in_4bit') else '8'} bits"
    return Case(
        name=adapter + stored,
        make_base=lambda: _load(name, config.revision, quantization, is_classifier),
        config=config,
        adapter=adapter,
        inputs=batch,
        prompts=None if is_classifier else ids,
    )


def _load(
    name: str, revision: str | None, quantization: dict[str, object] | None = None, is_classifier: bool = False
) -> PreTrainedModel:
    """The model of the class its config is for; a new classification head is the same every time."""
    config = load_config(name, revision)
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; compare knows decoders and encoders")
    auto = AutoModelForSequenceClassification if is_classifier else model_class(config)
    seed_everything(0)
    options = {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    try:
        model: PreTrainedModel = auto.from_pretrained(
            name, revision=revision, dtype="auto", use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # a decoder with a classification head looks for the last token before it
    keep_4bit_weights_unpacked(model)
    return model.eval()


def model_case(name: str, targets: list[str], steps: int) -> Case:
    """Any decoder or encoder that Transformers' Auto classes load, on random tokens.

    A decoder is trained by SFTTrainer, a classifier by Transformers' Trainer.

    Raises:
        UserError: The model cannot be had, or is neither.
    """
    config = load_config(name)
    _load(name, None)  # what cannot be loaded is the user's to know at once
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
        make_base=lambda: _load(name, None),
        config=lora,
        inputs=batch,
        arguments=TrainingArguments(**settings) if is_classifier else SFTConfig(**settings, max_length=None),
        rows=None if is_classifier else Dataset.from_dict(rows),
        tokenizer=None if is_classifier else byte_tokenizer(),
        prompts=None if is_classifier else batch["input_ids"][:2, :8],
    )
