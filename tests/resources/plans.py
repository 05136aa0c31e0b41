"""Runs of tiny models to count memory, disk and time of."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig
from trl import ModelConfig

from plainlora.backends import BACKENDS
from plainlora.resources.footprint import Footprint, estimate
from plainlora.resources.plan import Plan
from plainlora.settings.arguments import SFTRecipeConfig

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules="all-linear")


def settings(folder: Path, **options: Any) -> SFTRecipeConfig:
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": 64, "per_device_train_batch_size": 2}
    return SFTRecipeConfig(output_dir=str(folder), **plain | options)


def make_plan(config: PretrainedConfig, training: Any, lora: LoraConfig | None = LORA, **options: Any) -> Plan:
    model = ModelConfig(model_name_or_path="somewhere", dtype="float32", **options.pop("model", {}))
    backend = None if lora is None else BACKENDS[options.pop("backend", "fused")]
    numbers = {"longest": 64, "rows": 40, "tokens": 1200} | options
    return Plan(config, lora, training, model, backend=backend, **numbers)


def ask(config: PretrainedConfig, training: Any, lora: LoraConfig | None = LORA, **options: Any) -> Footprint:
    return estimate(make_plan(config, training, lora, **options))
