"""What a run trains: resolved before weights are loaded (`AdapterPlan`), and the loaded model (`TrainableModel`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.backends import Backend, choose_backend, count_parameters
from plainlora.resources.disk import merged_bytes
from plainlora.settings.programs import Settings
from plainlora.training import saving


@dataclass(frozen=True)
class AdapterPlan:
    """What a run will train.

    Attributes:
        config: The base's config; a classifier's has its classes.
        build: Builds the base on the meta device; returns `None` if its code fails there.
        lora: The adapter's config; `None` if the base's own weights are trained.
        only_peft: What of `lora` PEFT alone implements, so that its own code trains it; `None` if nothing.
        modules: Full names of the base's modules that are trained; `None` for all.
    """

    config: PretrainedConfig
    build: Callable[[], PreTrainedModel | None]
    lora: LoraConfig | None
    modules: list[str] | None = None
    only_peft: str | None = None


@dataclass(frozen=True)
class TrainableModel:
    """A model that is ready to be trained.

    Attributes:
        model: The model, in which the trained parameters require gradients.
        backend: The adapter's back end; `None` without an adapter.
        disabled: A context in which the model computes as before training.
        quantization: From `plainlora.base.loading.describe_quantization`.
    """

    model: nn.Module
    backend: Backend | None
    disabled: Callable[[], AbstractContextManager[object]]
    quantization: dict[str, Any] | None


def plan_lora(
    settings: Settings[Any, Any],
    config: PretrainedConfig,
    build: Callable[[], PreTrainedModel | None],
    lora: LoraConfig,
) -> AdapterPlan:
    """The plan of an adapter. Sets `lora_backend` of the settings to the back end that can train it.

    Raises:
        LoRAError: The hand-written form is asked for, and does not implement the config.
    """
    recipe = settings.recipe
    recipe.lora_backend, only_peft = choose_backend(recipe.lora_backend, lora, build())
    return AdapterPlan(config, build, lora, only_peft=only_peft)


def backend_line(adapter: AdapterPlan) -> str | None:
    """A sentence for the log if another back end trains the adapter than was asked for."""
    if adapter.only_peft is None:
        return None
    return f"PEFT's own code trains this adapter: {adapter.only_peft}"


def check_room(
    settings: Settings[Any, Any], adapter: AdapterPlan, model: TrainableModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks that the run's output, with the merged model, fits on the disk.

    Raises:
        UserError: It does not.
    """
    merged = 0
    if settings.recipe.merge:
        trainable, total = count_parameters(model.model)
        merged = merged_bytes(total - trainable, adapter.config, tokenizer)
    saving.check_room(settings.training, model.model, model.backend is None, merged)
