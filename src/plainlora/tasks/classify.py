"""Fine-tuning of a sequence classifier, stage by stage: LoRA, the last layers only, or every weight.

    settings -> config, tokenizer -> rows -> adapter -> model -> trainer -> results

The stages have the same names as those of `plainlora.tasks.sft`.
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
from plainlora.base.classifier import build_skeleton, check_order, classifier_config, load_classifier
from plainlora.base.config import context_length, load_config
from plainlora.base.loading import loading_options
from plainlora.base.tokenizer import load_tokenizer
from plainlora.hub.model_card import write_classifier_card
from plainlora.peft_model.config import needs_rows
from plainlora.plots import plot_confusion, plot_loss
from plainlora.report import write_json
from plainlora.resources.plan import Plan
from plainlora.run.resumption import check_same_settings
from plainlora.run.run import Run
from plainlora.settings.precision import list_precisions, precision_line
from plainlora.settings.programs import ClassifySettings
from plainlora.tasks import rows as data
from plainlora.tasks.calibration import calibration_batches
from plainlora.tasks.last_layers import find_last_layers
from plainlora.tasks.modes import (
    build_classifier_lora,
    check_dense,
    check_same_method,
    train_adapter,
    train_weights,
)
from plainlora.tasks.plan import AdapterPlan, TrainableModel, check_room, load_parent, plan_lora
from plainlora.tasks.projections import find_head
from plainlora.tasks.rows import PreparedTexts
from plainlora.tasks.summary import classifier_summary
from plainlora.training.classifier_loss import mean_over_rows
from plainlora.training.early_stopping import early_stopping
from plainlora.training.metrics import Scores, flatten, judge_rows, score
from plainlora.training.metrics import measure as measure_rows
from plainlora.training.trainers import ClassifierTrainer, args_for_trainer

read_rows = data.read_texts


def read_config(settings: ClassifySettings) -> PretrainedConfig:
    """The base's config.

    Raises:
        UserError: It cannot be loaded.
    """
    return load_config(settings.base, settings.model.model_revision)


def read_tokenizer(settings: ClassifySettings) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        UserError: It cannot be loaded.
    """
    return load_tokenizer(settings.base, settings.model.model_revision)


def longest_text(settings: ClassifySettings, config: PretrainedConfig | None) -> int | None:
    """The length in tokens to which texts are cut: `max_length`, or the base's context length."""
    return settings.recipe.max_length or (None if config is None else context_length(config))


def prepare_rows(
    settings: ClassifySettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    log: Callable[[str], None],
) -> PreparedTexts:
    """Reads, splits and tokenises labelled texts.

    Args:
        settings: The data set and its columns.
        tokenizer: The base's tokenizer.
        config: The base's config; `None` if it is not known.
        log: Called with one line for each split.

    Raises:
        UserError: The rows cannot be read, or one cannot be used.
    """
    return data.prepare_texts(settings, tokenizer, longest_text(settings, config), log)


def plan_adapter(settings: ClassifySettings, labels: Sequence[str], pad_token_id: int | None) -> AdapterPlan:
    """Resolves what is trained, by the finetuning mode: an adapter, some modules, or every weight.

    Args:
        settings: The mode and its layers.
        labels: Names of the classes, in order.
        pad_token_id: The tokenizer's pad token.

    Raises:
        UserError: The base is a classifier with other classes, or has no such layers.
        LoRAError: The adapter does not fit the model.
    """
    recipe, name = settings.recipe, settings.base
    config = classifier_config(name, labels, pad_token_id, settings.model.model_revision)
    if recipe.adapter_name_or_path is None:  # which keeps the order that it was trained with
        check_order(name, labels, settings.model.model_revision)
    check_dense(name, config, recipe.method)
    skeleton = build_skeleton(config)
    build = partial(build_skeleton, config)
    if recipe.method == "lora":
        return plan_lora(settings, config, build, build_classifier_lora(settings.model, recipe, skeleton), labels)
    modules = None
    if recipe.method == "last_layers":
        modules = find_last_layers(skeleton, recipe.last_layers, find_head)
    return AdapterPlan(config, build, None, modules=modules)


def check_resumable(run: Run, adapter: AdapterPlan, texts: PreparedTexts) -> None:
    """Checks that the run continues the one of its checkpoint, if it has one.

    Raises:
        UserError: The finetuning mode, the adapter, the settings, the classes or the rows differ.
    """
    if run.checkpoint is not None:
        check_same_method(run.checkpoint, run.settings.recipe.method, texts.labels)
        # Before the adapter, so that the error names a flag such as lora_mlp rather than its modules.
        check_same_settings(run.checkpoint, run.settings.parts, texts.labels)
        run.check_resumable(texts.train, adapter.lora, texts.labels)


def plan_run(
    settings: ClassifySettings, adapter: AdapterPlan, tokenizer: PreTrainedTokenizerBase, texts: PreparedTexts
) -> Plan:
    """The figures of the run on which memory, disk space and time depend."""
    recipe, lengths = settings.recipe, texts.train["length"][:]
    evaluated = list(texts.splits(recipe.measured_train_rows).values())
    return Plan(
        adapter.config,
        adapter.lora,
        settings.training,
        settings.model,
        longest=max(lengths),
        rows=len(lengths),
        tokens=sum(lengths),
        backend=None if adapter.backend is None else BACKENDS[adapter.backend],
        adapter_dtype=recipe.adapter_dtype,
        base_dropout=recipe.base_dropout,
        labels=texts.labels,
        trained_modules=adapter.modules,
        merge=recipe.merge,
        tokenizer=tokenizer,
        evaluated=max(map(len, evaluated)),
        longest_evaluated=max(length for rows in evaluated for length in rows["length"]),
    )


def load_weights(
    settings: ClassifySettings, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the base with a head for the classes; also returns the names of the weights that its checkpoint lacks.

    Args:
        settings: The base, and how it is stored.
        config: From `plan_adapter`.
        **options: For `from_pretrained`.

    Raises:
        UserError: It cannot be loaded.
    """
    given = loading_options(settings.model) | {"dropout": settings.recipe.base_dropout} | options
    return load_classifier(copy.deepcopy(config), settings.base, device=settings.training.device, **given)


def load_model(
    settings: ClassifySettings,
    adapter: AdapterPlan,
    texts: PreparedTexts,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
) -> TrainableModel:
    """Loads the base with its new head, then attaches the adapter; see `plainlora.tasks.sft.load_model`."""
    adapter_dtype = settings.recipe.adapter_dtype if adapter.lora is not None else None
    log(precision_line(list_precisions(settings.training, settings.model, adapter.config, adapter_dtype)))
    base, new_weights = load_weights(settings, adapter.config)
    for note in adapter.notes:
        log(note)
    if adapter.lora is None or adapter.backend is None:
        model = train_weights(base, adapter.modules)
    else:
        rows = texts.train
        batches = list(calibration_batches(rows, tokenizer, settings.training)) if needs_rows(adapter.lora) else []
        backend = BACKENDS[adapter.backend]
        model = train_adapter(base, adapter.lora, backend, settings.recipe.adapter_dtype, new_weights, batches)
        load_parent(adapter, backend, model.model)
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
    """Makes the `ClassifierTrainer`.

    Raises:
        UserError: The run's output does not fit on the disk.
    """
    check_room(settings, adapter, model, tokenizer)
    return ClassifierTrainer(
        model.model,
        model.backend,
        args=args_for_trainer(settings.training),
        train_dataset=texts.train,
        eval_dataset=texts.validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),  # pads to the longest text of the batch
        compute_loss_func=partial(mean_over_rows, smoothing=settings.training.label_smoothing_factor),
        compute_metrics=partial(score, classes=len(texts.labels)),
        preprocess_logits_for_metrics=judge_rows,
        loraplus_lr_ratio=settings.recipe.loraplus_lr_ratio,
        callbacks=early_stopping(settings.recipe.early_stopping_patience),
    )


@dataclass
class Results:
    """The results of a run.

    Attributes:
        figures: The content of `all_results.json`.
        before: Scores of every split before training.
        after: Scores of every split after training.
        history: The trainer's log.
    """

    figures: dict[str, Any]
    before: dict[str, Scores]
    after: dict[str, Scores]
    history: list[dict[str, float]]


def measure(
    settings: ClassifySettings, trainer: ClassifierTrainer, model: TrainableModel, texts: PreparedTexts
) -> Results:
    """Measures accuracy, F1 and confusion of every split before and after training. To be called in every process.

    The state before training is measured after training, see `plainlora.tasks.sft.measure`.
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
    """Writes figures, plots and model card to the run's folder."""
    before, after = results.before, results.after
    shown = next(split for split in ("test", "validation", "training") if split in before)
    tables = {f"{shown} rows before": before[shown].confusion, "after": after[shown].confusion}
    plot_confusion(results.figures["labels"], tables, run.folder / "confusion.png")
    base_loss = before["validation"].loss if "validation" in before else None
    plot_loss(results.history, base_loss, run.folder / "loss.png", unit="text", rows="validation")
    write_json(run.folder / "all_results.json", results.figures)
    write_classifier_card(run.folder, run.settings, adapter.config, adapter.lora, results.figures, adapter.backend)


def summarize(run: Run, results: Results) -> str:
    """The summary of a run for the terminal."""
    return classifier_summary(results.figures, str(run.folder))
