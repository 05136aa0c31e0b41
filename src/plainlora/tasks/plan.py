"""What a run trains: found on the architecture before the weights are loaded, and the loaded model itself."""

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
    """What will be trained.

    Attributes:
        config: Of the base as it is trained: a classifier's with its classes.
        build: Makes the base without weights, on the `meta` device; `None` where its code cannot be run so.
        lora: The adapter; `None` where the base's own weights are trained.
        modules: Full names of the modules that are trained then; `None` for all.
    """

    config: PretrainedConfig
    build: Callable[[], PreTrainedModel | None]
    lora: LoraConfig | None
    modules: list[str] | None = None


@dataclass(frozen=True)
class TrainableModel:
    """A model that is ready to be trained.

    Attributes:
        model: With gradients required where they are wanted.
        backend: What attached its adapter; `None` if it has none.
        disabled: A context in which it computes as it did before training.
        quantization: How its base is stored, see `plainlora.base.loading.describe_quantization`.
    """

    model: nn.Module
    backend: Backend | None
    disabled: Callable[[], AbstractContextManager[object]]
    quantization: dict[str, Any] | None


def check_room(
    settings: Settings[Any, Any], adapter: AdapterPlan, model: TrainableModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks that what the run writes, the merged model included, fits on the disk.

    Raises:
        UserError: It would not.
    """
    merged = 0
    if settings.recipe.merge:
        trainable, total = count_parameters(model.model)
        merged = merged_bytes(total - trainable, adapter.config, tokenizer)
    saving.check_room(settings.training, model.model, model.backend is None, merged)
