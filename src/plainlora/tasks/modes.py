"""What a classifier trains: LoRA, its last layers, or every weight. One set of verbs for all three."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from trl import ModelConfig

from plainlora.backends import BACKENDS, Backend, attach_adapter
from plainlora.base.config import load_config
from plainlora.base.loading import describe_quantization
from plainlora.errors import UserError
from plainlora.lora.config import check_supported
from plainlora.lora.targets import check_patterns, find_modules_to_save, find_targets
from plainlora.run.folder import holds_adapter
from plainlora.run.resumption import check_same_labels
from plainlora.settings.adapter import build_lora_config
from plainlora.settings.arguments import PROJECTIONS, ClassifyArguments
from plainlora.tasks.plan import TrainableModel
from plainlora.tasks.projections import find_head, find_kinds


def build_classifier_lora(model: ModelConfig, recipe: ClassifyArguments, skeleton: PreTrainedModel) -> LoraConfig:
    """The adapter of a classifier: targets by kind or by name, the head frozen, adapted, or trained whole.

    A frozen head gets no `task_type`, because PEFT would then train it: `SEQ_CLS` adds it to `modules_to_save`.

    Args:
        model: Rank, alpha and the like.
        recipe: Which kinds of layer, and what becomes of the head.
        skeleton: The architecture, without weights.

    Raises:
        UserError: The architecture's kinds of layer are not known.
        LoRAError: The names do not fit the model.
    """
    kinds = [kind for kind in PROJECTIONS if getattr(recipe, f"lora_{kind}")]
    config = build_lora_config(model, recipe)
    config.task_type = "SEQ_CLS" if recipe.train_head else None
    if kinds:
        config.target_modules = find_kinds(skeleton, kinds, recipe.lora_layers_to_transform)
        config.layers_to_transform = None  # the names say it; PEFT would pass a head over, which lies in no layer
    if recipe.train_head:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *find_head(skeleton)})
    check_supported(config)
    targets = find_targets(skeleton, config)
    check_patterns(config, targets)
    find_modules_to_save(skeleton, config, targets)
    return config


def find_last_layers(skeleton: PreTrainedModel, names: Collection[str] | None) -> list[str]:
    """Full names of the modules that `last_layers` trains: the head's, or those named.

    Raises:
        UserError: A name is no module, or the architecture's head is not known.
    """
    modules = [name for name, _ in skeleton.named_modules() if name]
    for name in names or ():
        if name not in modules:
            ends = sorted(module for module in modules if module.endswith(f".{name}"))
            hint = f"did you mean {ends[-1]}?" if ends else f"the last are {', '.join(modules[-3:])}"
            raise UserError(f"last_layers: there is no module {name!r}; {hint}")
    return list(names) if names else find_head(skeleton)


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
    """Trains some modules of a model, or all of it, and freezes the rest.

    Args:
        model: A classifier.
        modules: Full names; `None` for all.
    """
    model.requires_grad_(modules is None)
    for name in modules or ():
        model.get_submodule(name).requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = {parameter: parameter.detach().cpu().clone() for parameter in trained}
    return TrainableModel(model, None, partial(_initial_values, initial), describe_quantization(model))


def train_adapter(
    model: PreTrainedModel, config: LoraConfig, recipe: ClassifyArguments, new_weights: Collection[str]
) -> TrainableModel:
    """Puts a fresh adapter into a classifier.

    Args:
        model: A classifier.
        config: From `build_classifier_lora`.
        recipe: Which back end, which precision.
        new_weights: What the base's checkpoint lacks, to be saved with the adapter.

    Raises:
        UserError: The adapter does not fit the model.
        LoRAError: Likewise.
    """
    backend, quantization = BACKENDS[recipe.lora_backend], describe_quantization(model)
    adapted = attach_adapter(model, config, backend, recipe.adapter_dtype, new_weights)
    biases = {}
    if config.bias != "none":
        trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        biases = {value: value.detach().cpu().clone() for name, value in trained.items() if name.endswith("bias")}
    return TrainableModel(adapted, backend, partial(_before_training, backend, adapted, biases), quantization)


@contextmanager
def _before_training(backend: Backend, model: nn.Module, biases: dict[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Without adapters, and with trained biases as they were: PEFT, which warns of it, leaves these as they are."""
    with _initial_values(biases), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with backend.disabled(model):
            yield


def check_same_method(checkpoint: str | Path, method: str, labels: Sequence[str]) -> None:
    """A run goes on with the kind of weights and the classes that its checkpoint holds.

    Args:
        checkpoint: To resume from.
        method: The run's.
        labels: Names of the classes now, in order.

    Raises:
        UserError: It holds others.
    """
    if holds_adapter(checkpoint) != (method == "lora"):
        held = "an adapter" if holds_adapter(checkpoint) else "a whole model"
        raise UserError(f"resume_from_checkpoint: {checkpoint} holds {held}, which method {method} cannot go on from")
    check_same_labels(checkpoint, _labels_of(checkpoint), labels)


def _labels_of(checkpoint: str | Path) -> list[str] | None:
    """A whole model's classes, from its config; an adapter's stand in `run.json` alone."""
    if holds_adapter(checkpoint):
        return None
    return list((load_config(str(checkpoint)).id2label or {}).values())
