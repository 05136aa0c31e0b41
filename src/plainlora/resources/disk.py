"""The disk space that a run needs: checkpoints, the result, and a merged model."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from plainlora.base.classifier import is_classifier
from plainlora.folders import free_on_disk
from plainlora.resources.plan import Plan
from plainlora.resources.weights import count_bytes, stored_dtype

# Bytes of a checkpoint's other files (random states, schedule, arguments, configs, card, manifest), of a tensor's
# entry in a file beside its values, and of an entry of the log.
SMALL_FILES, TENSOR_ENTRY, LOG_ENTRY = 32_000, 300, 250


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of files.

    Attributes:
        checkpoint: Bytes of one checkpoint.
        checkpoints: The most checkpoints that exist at a time, including one that is being written.
        result: Bytes of the adapter or model and the tokenizer, once.
        merged: Bytes of the merged model, if it is asked for.
        needed: The sum.
        free: Bytes free on the disk of `output_dir`.
        fits: Whether these are enough.
    """

    checkpoint: int
    checkpoints: int
    result: int
    merged: int
    needed: int
    free: int
    fits: bool


def count_saves(training: TrainingArguments, steps: int, steps_an_epoch: int) -> int:
    """The most checkpoints that exist at a time: an old one is removed only when a new one is whole.

    Args:
        training: When to save, and how many checkpoints to keep.
        steps: Number of optimizer steps of the run.
        steps_an_epoch: Of these, in one epoch.
    """
    strategy = str(getattr(training.save_strategy, "value", training.save_strategy))
    every = training.eval_steps if strategy == "best" else training.save_steps
    if strategy == "no" or not steps:
        return 0
    if strategy == "epoch":
        saves = math.ceil(steps / max(1, steps_an_epoch))
    else:
        interval = float(every or training.logging_steps)
        saves = math.ceil(steps / max(1, math.ceil(steps * interval) if interval < 1 else interval))
    if training.save_total_limit is None or training.save_total_limit <= 0:
        return saves
    return min(saves, training.save_total_limit + 1 + bool(training.load_best_model_at_end))


def _saved_bytes(plan: Plan, model: PreTrainedModel) -> int:
    """Bytes of the file of weights: of the adapter, including a new frozen head, or of the whole model."""
    new_head = plan.labels is not None and not is_classifier(plan.config)
    saved = [
        parameter
        for name, parameter in model.named_parameters()
        if plan.lora is None
        or parameter.requires_grad
        or (new_head and f"{model.base_model_prefix}." not in name and "original_module" not in name)
    ]
    return count_bytes(saved) + TENSOR_ENTRY * len(saved)


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def merged_bytes(parameters: int, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Bytes of a merged model's folder: every weight dense, in the dtype of the base's checkpoint, and the tokenizer.

    Args:
        parameters: Number of parameters of the base.
        config: The base's config.
        tokenizer: The tokenizer that is saved with it.
    """
    return parameters * stored_dtype(config).itemsize + _tokenizer_bytes(tokenizer)


def count_disk(plan: Plan, base: PreTrainedModel, model: PreTrainedModel, optimizer: int) -> DiskNeed:
    """Adds up the files that exist at the same time.

    Args:
        plan: The run.
        base: Its base, on the `meta` device.
        model: The base as it is trained, with its adapter if there is one.
        optimizer: Bytes of the optimizer's state.
    """
    training, steps = plan.training, plan.steps
    files = _tokenizer_bytes(plan.tokenizer)
    result = _saved_bytes(plan, model) + files + SMALL_FILES
    checkpoint = result + LOG_ENTRY * math.ceil(steps / max(1, training.logging_steps))
    if not training.save_only_model:
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        checkpoint += optimizer + 3 * TENSOR_ENTRY * trained
    merged = 0
    if plan.merge:
        parameters = sum(parameter.numel() for parameter in base.parameters())
        merged = merged_bytes(parameters, plan.config, plan.tokenizer)
    checkpoints = count_saves(training, steps, plan.steps_an_epoch)
    needed, free = checkpoints * checkpoint + result + merged, free_on_disk(str(training.output_dir))
    return DiskNeed(checkpoint, checkpoints, result, merged, needed, free, needed <= free)
