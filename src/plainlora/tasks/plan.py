"""What a run trains: resolved before weights are loaded (`AdapterPlan`), and the loaded model (`TrainableModel`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.backends import Backend, count_parameters
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
        modules: Full names of the base's modules that are trained; `None` for all.
    """

    config: PretrainedConfig
    build: Callable[[], PreTrainedModel | None]
    lora: LoraConfig | None
    modules: list[str] | None = None


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
