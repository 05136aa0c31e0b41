"""What the finetuning modes train: a classifier's adapter, or the last layers or every weight of any model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from trl import ModelConfig

from plainlora.backends import Backend, attach_adapter
from plainlora.base.config import class_names, load_config, quantization_method
from plainlora.base.loading import describe_quantization
from plainlora.errors import UserError
from plainlora.lora.config import check_config
from plainlora.lora.targets import check_patterns, find_modules_to_save, select
from plainlora.run.folder import holds_adapter
from plainlora.run.resumption import check_same_labels
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.arguments import PROJECTIONS, ClassifyArguments
from plainlora.tasks.plan import TrainableModel
from plainlora.tasks.projections import find_head, find_projections


def build_classifier_lora(model: ModelConfig, recipe: ClassifyArguments, skeleton: PreTrainedModel) -> LoraConfig:
    """The adapter of a classifier: targets by projection or by name; the head frozen, adapted, or trained whole.

    With a frozen head there is no `task_type`, because with `SEQ_CLS` PEFT adds the head to `modules_to_save`.

    Args:
        model: Rank, alpha and the like.
        recipe: The projections, and how the head is trained.
        skeleton: The model on the meta device.

    Raises:
        UserError: The projections of the architecture are not known.
        LoRAError: The names do not match the model.
    """
    projection_names = [name for name in PROJECTIONS if getattr(recipe, f"lora_{name}")]
    config = build_lora_config(model, recipe)
    config.task_type = "SEQ_CLS" if recipe.train_head else None
    if projection_names:
        config.target_modules = find_projections(skeleton, projection_names, recipe.lora_layers_to_transform)
        config.layers_to_transform = None  # in the names already; PEFT would skip a head, which lies in no layer
    if recipe.train_head:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *find_head(skeleton)})
    check_config(config)
    targets = select(skeleton, config).selected
    check_patterns(config, targets)
    find_modules_to_save(skeleton, config, targets)
    return config


def check_dense(name: str, config: PretrainedConfig, method: str) -> None:
    """Raises `UserError` if a method that trains the base's own weights is to train a quantised checkpoint."""
    if method != "lora" and quantization_method(config):
        raise UserError(
            f"method {method} trains the base's own weights, and {name} is stored in 4 or 8 bits; give the base in 16 "
            "or 32 bits, or use lora"
        )


@contextmanager
def _initial_values(initial: dict[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    trained = {parameter: parameter.detach().cpu().clone() for parameter in initial}
    try:
        for parameter, value in initial.items():
            parameter.data.copy_(value)
        yield
    finally:
        for parameter, value in trained.items():
            parameter.data.copy_(value)


def train_weights(model: PreTrainedModel, modules: Collection[str] | None) -> TrainableModel:
    """Makes some modules of a model trainable, or all of it, and freezes the rest.

    Args:
        model: A base whose weights are not quantised.
        modules: Full names of the modules; `None` for all.
    """
    model.requires_grad_(modules is None)
    for name in modules or ():
        model.get_submodule(name).requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = {parameter: parameter.detach().cpu().clone() for parameter in trained}
    return TrainableModel(model, None, partial(_initial_values, initial), describe_quantization(model))


def train_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    backend: Backend,
    adapter_dtype: str,
    new_weights: Collection[str],
    batches: Sequence[dict[str, torch.Tensor]] = (),
) -> TrainableModel:
    """Puts a new adapter into a classifier.

    Args:
        model: A classifier.
        config: From `build_classifier_lora`.
        backend: The implementation of LoRA.
        adapter_dtype: See `attach_adapter`.
        new_weights: Names of the parameters that the base's checkpoint lacks, to be saved with the adapter.
        batches: Batches of training rows, from which PEFT computes some initial values.

    Raises:
        UserError: The adapter does not fit the model.
        LoRAError: The adapter does not fit the model.
    """
    quantization = describe_quantization(model)
    adapted = attach_adapter(model, config, backend, adapter_dtype, new_weights, batches)
    return TrainableModel(adapted, backend, partial(backend.disabled, adapted), quantization)


def check_same_method(checkpoint: str | Path, method: str, labels: Sequence[str] | None = None) -> None:
    """Checks that a checkpoint holds an adapter or a whole model as the run needs, and has the same classes.

    Args:
        checkpoint: The checkpoint to resume.
        method: The run's finetuning mode.
        labels: Names of a classifier's classes now, in order.

    Raises:
        UserError: They differ.
    """
    if holds_adapter(checkpoint) != (method == "lora"):
        held = "an adapter" if holds_adapter(checkpoint) else "a whole model"
        raise UserError(f"resume_from_checkpoint: {checkpoint} holds {held}, which method {method} cannot resume")
    if labels is not None:
        check_same_labels(checkpoint, _labels_of(checkpoint), labels)


def _labels_of(checkpoint: str | Path) -> list[str] | None:
    """A whole model's classes, from its config; `None` for an adapter, whose classes are only in `run.json`."""
    if holds_adapter(checkpoint):
        return None
    return class_names(load_config(str(checkpoint)))
