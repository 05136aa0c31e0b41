"""Settings that this project cannot honour are refused by name, before anything is loaded or written."""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.arguments import ClassifyArguments, ClassifyConfig, RecipeArguments, SFTArguments
from plainlora.data.datasets import is_local
from plainlora.errors import UserError
from plainlora.parsing import trains_on_cpu

# Smallest and largest value, both allowed. The libraries would notice late, or not at all.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (1, math.inf),
    "max_train_rows": (1, math.inf),
    "max_eval_rows": (1, math.inf),
    "measured_train_rows": (1, math.inf),
    "max_overflow": (0, 1),
    "exact_match_rows": (0, math.inf),
    "max_new_tokens": (1, math.inf),
    "dataset_num_proc": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}


SCORES = ("accuracy", "f1")  # what a classifier's validation measures beside the loss


def check_common(
    recipe: RecipeArguments, script: ScriptArguments, training: TrainingArguments, model: ModelConfig
) -> None:
    """Refuses what neither program can honour, instead of ignoring it.

    Raises:
        UserError: Naming the setting and what to do.
    """
    if not model.model_name_or_path:
        raise UserError("model_name_or_path is missing: give a Hub id or a local folder")
    if not script.dataset_name:
        raise UserError("dataset_name is missing: give a Hub id or a local file")
    check_ranges(vars(recipe) | vars(script) | vars(training) | vars(model))
    _refuse(
        {
            "dataset_streaming": (script.dataset_streaming, "rows are checked before training, so all are read first"),
            "ignore_bias_buffers": (script.ignore_bias_buffers, "current Transformers models need no such workaround"),
        }
    )
    if recipe.base_dropout is not None and not 0 <= recipe.base_dropout < 1:
        raise UserError(f"base_dropout must be at least 0 and below 1, not {recipe.base_dropout}")
    sources = [getattr(recipe, name, None) for name in ("eval_dataset_name", "validation_dataset_name")]
    if script.dataset_config and all(is_local(name) for name in (script.dataset_name, *sources) if name):
        raise UserError(f"dataset_config {script.dataset_config}: local files have no configurations; leave it out")
    if model.model_revision not in (None, "main") and is_local(model.model_name_or_path):
        raise UserError(f"model_revision {model.model_revision}: a local folder has no revisions; leave it out")
    if training.dataloader_num_workers < 0:
        raise UserError(f"dataloader_num_workers must be at least 0, not {training.dataloader_num_workers}")
    if training.save_strategy == "best" and not training.metric_for_best_model:
        raise UserError("save_strategy best needs metric_for_best_model: give one, such as loss")
    wholly_trained = recipe.lora_bias != "none" or model.lora_modules_to_save or getattr(recipe, "train_head", False)
    if recipe.adapter_dtype != "float32" and wholly_trained and not training.bf16 and model.dtype != "bfloat16":
        raise UserError(
            f"adapter_dtype {recipe.adapter_dtype}: biases, heads and other modules that are trained whole would not "
            f"fit a base in {model.dtype}; leave it out, or give --bf16 or --dtype bfloat16"
        )
    if training.fp16 and trains_on_cpu(training.use_cpu):
        raise UserError("fp16 needs a GPU: leave --fp16 out, and a CPU trains in float32")
    check_writable(training.output_dir)
    trackers = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    for tracker in trackers:
        check_tracker(tracker)
    if model.dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise UserError(f"dtype must be auto, float32, float16 or bfloat16, not {model.dtype}")


def _refuse(settings: dict[str, tuple[object, str]]) -> None:
    for name, (is_set, reason) in settings.items():
        if is_set:
            raise UserError(f"{name} is not supported: {reason}")


def check_sft(recipe: SFTArguments, script: ScriptArguments, training: SFTConfig, model: ModelConfig) -> None:
    """Refuses settings of `recipes/sft.py` that cannot be honoured.

    Raises:
        UserError: Naming the setting and what to do.
    """
    check_common(recipe, script, training, model)
    _refuse(
        {
            "dataset_kwargs": (training.dataset_kwargs, "rows are prepared by this project, not by TRL"),
            "use_liger_kernel": (training.use_liger_kernel, "TRL has deprecated it; its own fused head is used"),
        }
    )
    if training.packing and training.packing_strategy == "wrapped":
        raise UserError(
            "packing_strategy=wrapped is refused: it cuts rows in two and lets examples attend to each other "
            "(trl#1230); use bfd"
        )
    if training.packing and training.max_length is None:
        raise UserError("packing needs max_length: give the length of a packed sequence")


def check_classify(
    recipe: ClassifyArguments, script: ScriptArguments, training: ClassifyConfig, model: ModelConfig
) -> None:
    """Refuses settings of `recipes/classify.py` that cannot be honoured.

    Raises:
        UserError: Naming the setting and what to do.
    """
    check_common(recipe, script, training, model)
    _refuse(
        {
            "use_liger_kernel": (training.use_liger_kernel, "its kernels are for causal language models"),
            "label_names": (training.label_names, "the column of classes is label_column"),
            "batch_eval_metrics": (training.batch_eval_metrics, "accuracy and F1 are those of all rows"),
            "prediction_loss_only": (training.prediction_loss_only, "every row is classified and counted"),
            "dataloader_drop_last": (training.dataloader_drop_last, "every row is classified and counted"),
            "eval_do_concat_batches": (not training.eval_do_concat_batches, "accuracy and F1 are those of all rows"),
        }
    )
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in ("loss", *SCORES):
        raise UserError(f"metric_for_best_model: there is no {metric!r}; there are loss, {', '.join(SCORES)}")
    if model.lora_task_type not in ("CAUSAL_LM", "SEQ_CLS"):  # the first is ModelConfig's default
        raise UserError(f"lora_task_type {model.lora_task_type}: this program classifies sequences; leave it out")
    if recipe.lora_head and recipe.train_head:
        raise UserError("lora_head and train_head: the head carries LoRA or is trained whole, not both; give one")
    if recipe.method != "lora" and (model.load_in_4bit or model.load_in_8bit):
        raise UserError(f"method {recipe.method} trains the base's own weights, which 4 or 8 bits cannot be; use lora")
    if recipe.method != "lora" and recipe.merge:
        raise UserError(f"merge: method {recipe.method} leaves a whole model, there is nothing to merge")
    if recipe.last_layers and recipe.method != "last_layers":
        raise UserError(f"last_layers belongs to --method last_layers, not {recipe.method}")


def check_ranges(settings: dict[str, Any]) -> None:
    """Raises `UserError` for a number outside `BOUNDS`, or for `..._kwargs` that are no mapping."""
    for name, (low, high) in BOUNDS.items():
        value = settings.get(name)
        if value is not None and (not low <= value <= high or value == math.inf):
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{name} must be {limits}, not {value}")
    for name, value in settings.items():
        if name.endswith("_kwargs") and isinstance(value, str):
            raise UserError(f"{name} must be a mapping, as JSON on the command line, not {value!r}")


def check_writable(folder: str | None, option: str = "output_dir") -> None:
    """Raises `UserError` if the folder cannot be made or written to: better now than after hours of training."""
    if not folder:
        raise UserError(f"{option} is empty; give a folder")
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option} {folder}: {existing} cannot be written to")


def check_tracker(name: str) -> None:
    """Raises `UserError` if `report_to` names a tracker that Transformers does not know, or that is not installed."""
    if name in ("none", "all", *get_available_reporting_integrations()):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise UserError(
            f"report_to: there is no tracker {name!r}; known are none, {', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    if find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name}, or set --report_to none")
