"""Fine-tuning of a sequence classifier, stage by stage: LoRA, the last layers only, or every weight.

    settings -> config, tokenizer -> rows -> adapter -> model -> trainer -> results

The stages are those of `plainlora.tasks.sft`, under the same names.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plainlora.backends import BACKENDS, count_parameters
from plainlora.base.classifier import build_skeleton, classifier_config, load_classifier
from plainlora.base.config import context_length, load_config
from plainlora.base.loading import loading_options
from plainlora.base.tokenizer import load_tokenizer
from plainlora.hub.model_card import write_classifier_card
from plainlora.plots import plot_confusion, plot_loss
from plainlora.report import write_json
from plainlora.resources.plan import Plan
from plainlora.run.resumption import check_same_settings
from plainlora.run.run import Run
from plainlora.settings.precision import list_precisions, precision_line
from plainlora.settings.programs import ClassifySettings
from plainlora.tasks import rows as data
from plainlora.tasks.modes import (
    build_classifier_lora,
    check_same_method,
    find_last_layers,
    train_adapter,
    train_weights,
)
from plainlora.tasks.plan import AdapterPlan, TrainableModel, check_room
from plainlora.tasks.rows import PreparedTexts, read_texts
from plainlora.tasks.summary import classifier_summary
from plainlora.training.metrics import Scores, flatten, judge_rows, score
from plainlora.training.metrics import measure as measure_rows
from plainlora.training.trainers import ClassifierTrainer, args_for_trainer

read_rows = read_texts


def read_config(settings: ClassifySettings) -> PretrainedConfig:
    """The base's config, as it is stored.

    Raises:
        UserError: It cannot be had.
    """
    return load_config(settings.base, settings.model.model_revision)


def read_tokenizer(settings: ClassifySettings) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        UserError: It cannot be had.
    """
    return load_tokenizer(settings.base, settings.model.model_revision)


def longest_text(settings: ClassifySettings, config: PretrainedConfig | None) -> int | None:
    """Tokens that texts are cut to: `max_length`, or what the base has positions for."""
    return settings.recipe.max_length or (None if config is None else context_length(config))


def prepare_rows(
    settings: ClassifySettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    log: Callable[[str], None],
) -> PreparedTexts:
    """Labelled texts, split and tokenised.

    Args:
        settings: Which.
        tokenizer: The base's.
        config: The base's; `None` where it is not known.
        log: Told one line about each split.

    Raises:
        UserError: They cannot be had, or one is none that can be used.
    """
    return data.prepare_texts(settings, tokenizer, longest_text(settings, config), log)


def plan_adapter(settings: ClassifySettings, labels: Sequence[str], pad_token_id: int | None) -> AdapterPlan:
    """What is trained, by the method: an adapter, some modules, or every weight.

    Args:
        settings: The method and its layers.
        labels: Names of the classes, in order.
        pad_token_id: The tokenizer's.

    Raises:
        UserError: The base is a classifier of other classes, or has no such layers.
        LoRAError: The adapter does not fit.
    """
    recipe, name = settings.recipe, settings.base
    config = classifier_config(name, labels, pad_token_id, settings.model.model_revision)
    skeleton = build_skeleton(config)
    build = partial(build_skeleton, config)
    if recipe.method == "lora":
        return AdapterPlan(config, build, build_classifier_lora(settings.model, recipe, skeleton))
    modules = find_last_layers(skeleton, recipe.last_layers) if recipe.method == "last_layers" else None
    return AdapterPlan(config, build, None, modules)


def check_resumable(run: Run, adapter: AdapterPlan, texts: PreparedTexts) -> None:
    """Makes sure that the run is the one that its checkpoint began.

    Raises:
        UserError: It has another method, adapter, other settings, classes or rows.
    """
    if run.checkpoint is not None:
        check_same_method(run.checkpoint, run.settings.recipe.method, texts.labels)
        # Before the adapter, so that a flag such as lora_mlp is named rather than the modules that it stands for.
        check_same_settings(run.checkpoint, run.settings.parts, texts.labels)
        run.check_resumable(texts.train, adapter.lora, texts.labels)


def plan_run(
    settings: ClassifySettings, adapter: AdapterPlan, tokenizer: PreTrainedTokenizerBase, texts: PreparedTexts
) -> Plan:
    """The run as far as memory, disk and time depend on it."""
    recipe, lengths = settings.recipe, texts.train["length"][:]
    return Plan(
        adapter.config,
        adapter.lora,
        settings.training,
        settings.model,
        longest=max(lengths),
        rows=len(lengths),
        tokens=sum(lengths),
        backend=None if adapter.lora is None else BACKENDS[recipe.lora_backend],
        adapter_dtype=recipe.adapter_dtype,
        base_dropout=recipe.base_dropout,
        labels=texts.labels,
        trained_modules=adapter.modules,
        merge=recipe.merge,
        tokenizer=tokenizer,
        evaluated=max(len(rows) for rows in texts.splits(recipe.measured_train_rows).values()),
    )


def load_weights(
    settings: ClassifySettings, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The base with a head for the classes, and the names of the weights that its checkpoint lacks.

    Args:
        settings: Which base, and how it is stored.
        config: From `plan_adapter`.
        **options: For `from_pretrained`.

    Raises:
        UserError: It cannot be had.
    """
    given = loading_options(settings.model) | {"dropout": settings.recipe.base_dropout} | options
    return load_classifier(copy.deepcopy(config), settings.base, device=settings.training.device, **given)


def load_model(settings: ClassifySettings, adapter: AdapterPlan, log: Callable[[str], None]) -> TrainableModel:
    """Base with its new head, then adapter. Arguments and errors are those of `plainlora.tasks.sft.load_model`."""
    adapter_dtype = settings.recipe.adapter_dtype if adapter.lora is not None else None
    log(precision_line(list_precisions(settings.training, settings.model, adapter.config, adapter_dtype)))
    base, new_weights = load_weights(settings, adapter.config)
    if adapter.lora is None:
        model = train_weights(base, adapter.modules)
    else:
        model = train_adapter(base, adapter.lora, settings.recipe, new_weights)
    trainable, total = count_parameters(model.model)
    log(f"{settings.recipe.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    return model


def make_trainer(
    settings: ClassifySettings,
    adapter: AdapterPlan,
    model: TrainableModel,
    texts: PreparedTexts,
    tokenizer: PreTrainedTokenizerBase,
) -> ClassifierTrainer:
    """Transformers' Trainer, as `plainlora.training.trainers` extends it.

    Raises:
        UserError: What the run writes would not fit on the disk.
    """
    check_room(settings, adapter, model, tokenizer)
    return ClassifierTrainer(
        model.model,
        model.backend,
        args=args_for_trainer(settings.training),
        train_dataset=texts.train,
        eval_dataset=texts.validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),  # to the longest text of the batch
        compute_metrics=partial(score, classes=len(texts.labels)),
        preprocess_logits_for_metrics=judge_rows,
    )


@dataclass
class Results:
    """What a run gave.

    Attributes:
        figures: For `all_results.json`.
        before: Scores of every split, as the model was before training.
        after: The same after it.
        history: What the trainer logged.
    """

    figures: dict[str, Any]
    before: dict[str, Scores]
    after: dict[str, Scores]
    history: list[dict[str, float]]


def measure(
    settings: ClassifySettings, trainer: ClassifierTrainer, model: TrainableModel, texts: PreparedTexts
) -> Results:
    """Accuracy, F1 and confusion of every split, before and after; every process takes part.

    The state before training is measured after it, see `plainlora.tasks.sft.measure`.
    """
    splits: dict[str, Dataset] = texts.splits(settings.recipe.measured_train_rows)
    classes = len(texts.labels)
    with model.disabled():
        before = {split: measure_rows(trainer, rows, classes, trained=False) for split, rows in splits.items()}
    after = {split: measure_rows(trainer, rows, classes, trained=True) for split, rows in splits.items()}
    trainable, total = count_parameters(model.model)
    figures = (
        flatten(before, "_base") | flatten(after) | {f"{split}_rows": len(rows) for split, rows in splits.items()}
    )
    figures |= {"method": settings.recipe.method, "labels": texts.labels}
    figures |= {"trainable_params": trainable, "total_params": total, "rows_trained": len(texts.train)}
    return Results(figures, before, after, trainer.state.log_history)


def report(run: Run, results: Results, adapter: AdapterPlan) -> None:
    """Writes figures, curves, confusion and model card to the run's folder."""
    before, after = results.before, results.after
    shown = next(split for split in ("test", "validation", "training") if split in before)
    tables = {f"{shown} rows before": before[shown].confusion, "after": after[shown].confusion}
    plot_confusion(results.figures["labels"], tables, run.folder / "confusion.png")
    base_loss = before["validation"].loss if "validation" in before else None
    plot_loss(results.history, base_loss, run.folder / "loss.png", unit="text", rows="validation")
    write_json(run.folder / "all_results.json", results.figures)
    write_classifier_card(run.folder, run.settings, adapter.config, adapter.lora, results.figures)


def summarize(run: Run, results: Results) -> str:
    """The end of a run, for the terminal."""
    return classifier_summary(results.figures, str(run.folder))
