"""What a run trains: resolved before weights are loaded (`AdapterPlan`), and the loaded model (`TrainableModel`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.backends import Backend, BackendName, choose_backend, count_parameters, fields_on_whole_weights
from plainlora.errors import UserError
from plainlora.lora.errors import some
from plainlora.lora.targets import without_unmatched
from plainlora.peft_model.config import check_bits, check_conversion, needs_rows
from plainlora.resources.disk import merged_bytes
from plainlora.run.adapter_base import class_labels, read_run
from plainlora.run.parent import Parent, find_parent
from plainlora.settings.device import trains_on_cpu
from plainlora.settings.launcher import sharding_engine
from plainlora.settings.programs import Settings
from plainlora.tasks.ranges import check_ranges
from plainlora.training import saving


@dataclass(frozen=True)
class AdapterPlan:
    """What a run will train.

    Attributes:
        config: The base's config; a classifier's has its classes.
        build: Builds the base on the meta device; returns `None` if its code fails there.
        lora: The adapter's config; `None` if the base's own weights are trained.
        backend: The name of the back end that trains the adapter; `None` without one.
        parent: The adapter that is trained on; `None` for a new one.
        notes: Sentences for the log.
        modules: Full names of the base's modules that are trained; `None` for all.
    """

    config: PretrainedConfig
    build: Callable[[], PreTrainedModel | None]
    lora: LoraConfig | None
    backend: BackendName | None = None
    modules: list[str] | None = None
    parent: Parent | None = None
    notes: tuple[str, ...] = ()


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
    labels: Sequence[str] | None = None,
) -> AdapterPlan:
    """The plan of an adapter, a new one or one that is trained on, whose own config is kept.

    Args:
        settings: The back end that is asked for, and the adapter to train on.
        config: The base's config.
        build: Builds the base on the meta device.
        lora: The adapter that the settings describe.
        labels: Names of a classifier's classes, in order.

    Raises:
        UserError: The adapter to train on cannot be found, or is another base's or another task's; or the base lacks
            tokens or layers that the adapter names.
        LoRAError: The hand-written form is asked for, and does not implement the config; or the adapter cannot be
            trained on a base in 4 or 8 bits, or saved for its unchanged base.
    """
    recipe, parent, notes = settings.recipe, None, []
    if recipe.adapter_name_or_path is not None:
        trust = bool(getattr(settings.training, "trust_remote_code", False))
        where = recipe.adapter_name_or_path, settings.base, settings.model.model_revision
        parent = find_parent(*where, trust, classifies=labels is not None)
        if labels is not None:
            _check_classes(parent, labels)
        notes.append(parent.line(lora))
        skeleton = build()
        lora = parent.config if skeleton is None else without_unmatched(skeleton, parent.config)
    check_ranges(lora, build)
    _check_engine(sharding_engine(settings.training), lora)
    backend, only_peft = choose_backend(recipe.lora_backend, lora, build())
    if backend in ("peft", "peft_fused"):
        bits = 4 if settings.model.load_in_4bit else 8 if settings.model.load_in_8bit else None
        check_bits(lora, bits, trains_on_cpu(settings.training.use_cpu))
        check_conversion(lora)
    if only_peft is not None:
        notes.append(f"PEFT's own code trains this adapter: {only_peft}")
    if needs_rows(lora):
        notes.append("PEFT first computes its initial values from training rows, which can take minutes")
    return AdapterPlan(config, build, lora, backend, parent=parent, notes=tuple(notes))


def _check_engine(engine: str | None, lora: LoraConfig) -> None:
    """Raises `UserError` if the adapter computes with the base's weights, and the engine shards these."""
    if engine is not None and (fields := fields_on_whole_weights(lora)):
        raise UserError(
            f"{some(fields)}: {engine} shards the base's weights, which this adapter computes with; use "
            "accelerate_configs/ddp.yaml"
        )


def _check_classes(parent: Parent, labels: Sequence[str]) -> None:
    """Raises `UserError` if the adapter to train on has other classes; PEFT's files tell their number alone."""
    names = read_run(parent.folder).get("labels")
    count = len(names or class_labels(parent.folder) or ())
    if count != len(labels) or (names and list(names) != list(labels)):
        there = ", ".join(names) if names else f"{count} classes"
        raise UserError(f"adapter_name_or_path: {parent.name} has {there}, and the rows have {', '.join(labels)}")


def load_parent(adapter: AdapterPlan, backend: Backend, model: nn.Module) -> None:
    """Copies the weights of the adapter that is trained on into a model that carries one of its config."""
    if adapter.parent is not None:
        backend.reload(model, adapter.parent.folder)


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
