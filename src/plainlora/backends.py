"""The single switch between the hand-written LoRA and PEFT. No other module distinguishes them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from plainlora.errors import UserError
from plainlora.fast.fuse import fuse
from plainlora.lora import inject, interchange, load
from plainlora.lora.config import check_supported, check_types
from plainlora.lora.layer import LoRALinear
from plainlora.lora.record import replace_module
from plainlora.lora.targets import check_expressions, find_new_weights, find_targets

FIXED_BY_CHECKPOINT = (
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("exclude_modules", "layers_to_transform", "base_model_name_or_path"),
)
CONDENSED_FROM = 20  # names; PEFT replaces so many target_modules by shorter ones that match the same modules


class Attach(Protocol):
    """A function that puts a new adapter into a base model."""

    def __call__(self, model: PreTrainedModel, config: LoraConfig, new_weights: Collection[str] = ()) -> nn.Module:
        """See `plainlora.inject`."""


@dataclass(frozen=True)
class Backend:
    """One implementation of LoRA.

    Attributes:
        attach: Puts a new adapter into a base model.
        load: Puts a saved adapter into a base model, for inference.
        reload: Copies a saved adapter into a model that already carries one, to resume training.
        disabled: A context in which the adapter is switched off.
        fast: Whether the trainer uses the loss head and the attention of `plainlora.fast`.
    """

    attach: Attach
    load: Callable[[PreTrainedModel, str | Path], nn.Module]
    reload: Callable[[nn.Module, str | Path], None]
    disabled: Callable[[nn.Module], AbstractContextManager[object]]
    fast: bool = False


def _reference_attach(model: PreTrainedModel, config: LoraConfig, new_weights: Collection[str] = ()) -> nn.Module:
    return inject.inject(model, config, new_weights=new_weights)


def _save_pretrained(
    model: PeftModel,
    save_directory: str,
    *,
    new_weights: list[str],
    state_dict: dict[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """PEFT's `save_pretrained`, which also saves the weights that the base's checkpoint lacks.

    https://github.com/huggingface/peft/issues/876
    """
    PeftModel.save_pretrained(model, save_directory, state_dict=state_dict, is_main_process=is_main_process, **options)
    if is_main_process:
        state = model.state_dict() if state_dict is None else state_dict
        interchange.add_tensors(save_directory, {name: state[name] for name in new_weights})


def _peft_attach(model: PreTrainedModel, config: LoraConfig, new_weights: Collection[str] = ()) -> nn.Module:
    check_supported(config)
    find_targets(model, config)  # raises for a name that matches nothing, which PEFT ignores
    new = find_new_weights(model, config, new_weights)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"PEFT refuses this adapter: {error}") from error
    if new:
        names = [name for name, parameter in adapted.named_parameters() if parameter in new]
        save = MethodType(partial(_save_pretrained, new_weights=names), adapted)
        adapted.save_pretrained = save  # type: ignore[method-assign]
    return adapted


def _check_readable(model: nn.Module, directory: str | Path) -> None:
    """Raises `LoRAError` if PEFT would fail on the files, or would unpickle `adapter_model.bin`.

    PEFT unpickles it if there is no `adapter_model.safetensors`.

    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/save_and_load.py (`load_peft_weights`)
    """
    config = interchange.read_config(directory)
    interchange.saved_shapes(directory)
    check_types(config)
    check_expressions(model, config)


def _peft_load(model: PreTrainedModel, directory: str | Path) -> nn.Module:
    _check_readable(model, directory)
    return PeftModel.from_pretrained(model, str(directory))


def _peft_reload(model: nn.Module, directory: str | Path) -> None:
    _check_readable(model, directory)
    cast(PeftModel, model).load_adapter(str(directory), "default", is_trainable=True)


def _fused(model: nn.Module) -> nn.Module:
    fuse(model)
    return model


BACKENDS = {
    "fused": Backend(
        attach=lambda *args, **options: _fused(_reference_attach(*args, **options)),
        load=lambda model, directory: _fused(load.load_adapter(model, directory)),
        reload=interchange.load_adapter_weights,
        disabled=inject.disabled,
        fast=True,
    ),
    "reference": Backend(
        attach=_reference_attach,
        load=load.load_adapter,
        reload=interchange.load_adapter_weights,
        disabled=inject.disabled,
    ),
    "peft": Backend(
        attach=_peft_attach,
        load=_peft_load,
        reload=_peft_reload,
        disabled=lambda model: cast(PeftModel, model).disable_adapter(),
    ),
    "peft_fused": Backend(
        attach=lambda *args, **options: _fused(_peft_attach(*args, **options)),
        load=lambda model, directory: _fused(_peft_load(model, directory)),
        reload=_peft_reload,
        disabled=lambda model: cast(PeftModel, model).disable_adapter(),
        fast=True,
    ),
}


@contextmanager
def loaded(backend: Backend, model: PreTrainedModel, directory: str | Path) -> Iterator[nn.Module]:
    """A saved adapter on a base within the block. Afterwards the base is as it was, ready for another adapter.

    What the adapter's file holds of the base's own parameters, such as a bias or a head, is restored too.

    Raises:
        LoRAError: See `load_adapter`.
    """
    modules, base = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    names = [
        name.removeprefix(interchange.PREFIX).replace(".base_layer.", ".")
        for name in interchange.saved_shapes(directory)
    ]
    own = {name: base[name].detach().clone() for name in names if name in base}
    adapted = backend.load(model, directory)
    try:
        yield adapted
    finally:
        adapted.unload() if isinstance(adapted, PeftModel) else inject.unwrap(adapted)
        for name, module in modules.items():  # PEFT leaves the trained copies of modules_to_save
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        for name, value in own.items():
            base[name].data.copy_(value)


def _comparable(name: str, value: Any) -> Any:
    """A config's value in a form in which equivalent values are equal."""
    if name in ("modules_to_save", "exclude_modules"):
        return value if isinstance(value, str) else sorted(value or ())
    if name in ("rank_pattern", "alpha_pattern"):
        return value or {}
    if name == "base_model_name_or_path" and value and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def check_same_adapter(checkpoint: str | Path, config: LoraConfig) -> None:
    """Checks that a resumed run has the adapter of its checkpoint: another alpha, for one, would be used silently.

    `target_modules` are compared only if both are short lists, because PEFT stores others resolved or condensed.

    Raises:
        UserError: A setting differs; the error names the first, with both values.
        LoRAError: The checkpoint's config cannot be read.
    """
    saved = interchange.read_config(checkpoint)
    names = list(FIXED_BY_CHECKPOINT)
    targets = (saved.target_modules, config.target_modules)
    if all(isinstance(value, (list, set)) and len(value) < CONDENSED_FROM for value in targets):
        names.append("target_modules")
    for name in names:
        before, now = (_comparable(name, getattr(one, name)) for one in (saved, config))
        if isinstance(before, (list, set)) and isinstance(now, (list, set)):
            before, now = sorted(before), sorted(now)
        if before != now:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was trained with {name} {before}, now it is {now}; "
                "give the same settings, or start anew in another --output_dir"
            )


def refuse_adapted_head(model: nn.Module) -> None:
    """Refuses LoRA on the output head: TRL's fused loss reads `lm_head.weight` without calling the module.

    TRL checks PEFT models only: https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py

    Raises:
        UserError: The output embedding carries LoRA.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, (LoRALinear, LoraLayer)):
        raise UserError(
            "lora_target_modules: the output head cannot carry LoRA, because SFTTrainer's fused loss reads its weight "
            "without calling it; leave it out, or train it whole with lora_modules_to_save"
        )


def attach_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    backend: Backend,
    dtype: str = "float32",
    new_weights: Collection[str] = (),
) -> nn.Module:
    """Puts a new adapter into a base model and sets its dtype.

    Args:
        model: The base, already quantised if need be.
        config: The adapter's config.
        backend: The implementation of LoRA.
        dtype: The dtype of the trained weights: `float32`, or `bfloat16` for half the optimizer memory.
        new_weights: Names of the parameters that the base's checkpoint lacks; they are saved with the adapter.

    Raises:
        UserError: The adapter does not fit the model.
        LoRAError: The adapter does not fit the model.
    """
    adapted = backend.attach(model, config, new_weights)
    refuse_adapted_head(adapted)
    if dtype != "float32":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return adapted


def count_of(parameter: torch.Tensor) -> int:
    """Number of values of a whole weight. A ZeRO-3 parameter is empty between steps; a DTensor says its whole size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, total)`; a 4-bit weight counts as the number of its values, not of its packed bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        values = count_of(parameter) if shape is None else int(torch.Size(shape).numel())
        total += values
        trainable += values if parameter.requires_grad else 0
    return trainable, total
