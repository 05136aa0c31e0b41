"""Checks that a resumed run has the rows, their order and the training settings of its checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from plainlora.errors import UserError
from plainlora.run.adapter_base import read_run
from plainlora.run.record import digest_of_rows, resolve_arguments

# Settings that may not change. The run's length, logging and output may. Rows are compared by their digest, the
# adapter's own settings with the checkpoint's config.
WHAT_IS_TRAINED = (
    *("method", "model_name_or_path", "model_revision", "last_layers", "train_head", "base_dropout", "adapter_dtype"),
    *("adapter_name_or_path", "loraplus_lr_ratio", "model_init_kwargs"),
    *("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head"),
    *("lora_target_modules", "lora_exclude_modules", "lora_layers_to_transform"),
)
WHICH_ROWS = (
    *("seed", "data_seed", "validation_split_size", "test_split_size", "balance_classes"),
    *("packing", "packing_strategy", "padding_free", "train_sampling_strategy", "dataloader_drop_last"),
)
HOW_IT_LEARNS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "loss_type", "bf16", "fp16"),
    *("label_smoothing_factor", "neftune_noise_alpha", "dtype", "load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant"),
)
ADVICE = "give the same settings, or start anew in another --output_dir"


def check_same_settings(checkpoint: str | Path, arguments: Sequence[Any], labels: Sequence[str] | None = None) -> None:
    """Checks that the settings are those of the checkpoint's `run.json`, if there is one.

    Args:
        checkpoint: The checkpoint to resume.
        arguments: The program's parsed dataclasses.
        labels: A classifier's classes now, in order.

    Raises:
        UserError: A setting differs; the error names the first, with both values.
    """
    run = read_run(checkpoint)
    then, now = dict(run.get("arguments") or {}), resolve_arguments(arguments)
    if labels is not None:
        check_same_labels(checkpoint, run.get("labels"), labels)
    if (rows := _rows_a_step(then, run.get("processes"))) is not None:
        then["rows a step"], now["rows a step"] = rows, _rows_a_step(now, PartialState().num_processes)
    packs = ("max_length",) if now.get("packing") else ()  # other rows are compared as they are cut
    for name in (*WHAT_IS_TRAINED, *WHICH_ROWS, *packs, "rows a step", *HOW_IT_LEARNS):
        if name in then and name in now and _comparable(name, then[name]) != _comparable(name, now[name]):
            raise _another(checkpoint, name, then[name], now[name])


def check_same_labels(checkpoint: str | Path, then: Sequence[str] | None, now: Sequence[str]) -> None:
    """Checks that a classifier's classes and their order are those of the checkpoint.

    Args:
        checkpoint: The checkpoint to resume.
        then: Its classes; `None` if they are not known.
        now: The run's classes.

    Raises:
        UserError: They differ.
    """
    if then is not None and list(then) != list(now):
        raise _another(checkpoint, "labels", list(then), list(now))


def _another(checkpoint: str | Path, name: str, then: object, now: object) -> UserError:
    return UserError(f"resume_from_checkpoint: {checkpoint} was trained with {name} {then}, now it is {now}; {ADVICE}")


def check_same_rows(checkpoint: str | Path, rows: Dataset) -> None:
    """Checks that the training rows are those of the checkpoint's `run.json`, if there is one.

    Raises:
        UserError: They differ.
    """
    then = ((read_run(checkpoint).get("rows") or {}).get("train") or {}).get("sha256")
    if then is not None and then != digest_of_rows(rows):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} was trained on other rows, or on the same with another template, "
            f"max_length or order; {ADVICE}"
        )


def _rows_a_step(settings: Mapping[str, Any], processes: Any) -> int | None:
    """Number of rows of one optimizer step, over all processes and accumulated batches."""
    factors = [settings.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    if not all(isinstance(factor, int) for factor in (*factors, processes)):
        return None
    return int(factors[0]) * int(factors[1]) * int(processes)  # type: ignore[arg-type]


def _comparable(name: str, value: Any) -> Any:
    """A setting's value in a form in which equivalent values are equal: paths, lists in any order, empty values."""
    if name == "model_name_or_path" and Path(str(value)).expanduser().exists():
        return str(Path(str(value)).expanduser().resolve())
    if isinstance(value, list | tuple):
        return sorted(map(str, value)) or None
    return json.loads(json.dumps(value, default=str)) if value != {} else None
