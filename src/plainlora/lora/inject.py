"""`inject` puts LoRA layers into a model and freezes the rest; `unwrap` takes them out again."""

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from plainlora.lora.config import check_supported
from plainlora.lora.dora import DoRALinear
from plainlora.lora.errors import LoRAError
from plainlora.lora.interchange import save_adapter
from plainlora.lora.layer import LoRALinear
from plainlora.lora.module_to_save import ModuleToSave
from plainlora.lora.record import AdapterState, ModelT, adapter_state, lora_layers, replace_module, saved_modules
from plainlora.lora.storage import storage_of
from plainlora.lora.targets import (
    check_patterns,
    condense,
    find_modules_to_save,
    find_new_weights,
    find_target_modules,
    modules_to_save,
    value_for,
)


def _resolve(model: nn.Module, config: LoraConfig, strict: bool) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """A copy of the config with everything made explicit for this model, and the selected modules by name."""
    check_supported(config)
    config = copy.deepcopy(config)
    config.modules_to_save = modules_to_save(config) or config.modules_to_save
    targets = find_target_modules(model, config, strict)
    if strict:
        check_patterns(config, targets)
    transposed = any(storage_of(module).transposed for module in targets.values())
    if config.fan_in_fan_out and not transposed:
        raise LoRAError(
            "fan_in_fan_out=True, but no target stores its weight as (in, out); leave it out: it is detected"
        )
    config.fan_in_fan_out = transposed
    if config.target_modules is None or isinstance(config.target_modules, str):
        config.target_modules = condense(list(targets), model)
    else:
        config.target_modules = sorted(config.target_modules)
    if isinstance(config.exclude_modules, set):  # PEFT makes it a set, which JSON cannot hold
        config.exclude_modules = sorted(config.exclude_modules)
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return config, targets


def _place(layer: LoRALinear, weight: torch.Tensor) -> None:
    """Moves A and B to W0's device, in fp32 or, if W0's dtype is wider, in that.

    On a half-precision base the initial values are rounded to the base's dtype and kept in fp32, as in PEFT.
    """
    for parameter in layer.adapter_tensors().values():
        values = parameter.data
        if not values.is_meta:
            values = values.to(weight.device)
        if weight.is_floating_point() and not storage_of(layer.base_layer).packed:
            values = values.to(weight.dtype)
        parameter.data = values.to(torch.promote_types(values.dtype, torch.float32))


def _biases_to_train(model: nn.Module, bias: str, targets: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The base's biases that are trained beside A and B. Those of `modules_to_save` are left out."""
    if bias == "lora_only":
        return [module.bias for module in targets if isinstance(module.bias, nn.Parameter)]
    if bias == "none":
        return []
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and ".original_module." not in name and ".trained_module." not in name
    ]


def _save_pretrained(model: nn.Module, save_directory: str, *, is_main_process: bool = True, **_: Any) -> None:
    """Replaces the model's own `save_pretrained`: writes the adapter, as `PeftModel.save_pretrained` does.

    Transformers' own would write the wrapped base under renamed keys, and `from_pretrained` would re-initialise those
    weights without an error.
    """
    if is_main_process:
        save_adapter(model, save_directory)


def inject(
    model: ModelT,
    config: LoraConfig,
    *,
    strict: bool = True,
    new_weights: Collection[str] = (),
    low_cpu_mem_usage: bool = False,
    layer_class: type[LoRALinear] | None = None,
) -> ModelT:
    """Puts LoRA layers into a model, in place, and freezes everything else.

    Under one seed the new matrices are those of `peft.get_peft_model(model, config)`, bit for bit.

    Args:
        model: Any model whose targets are `nn.Linear`, Transformers' `Conv1D`, bitsandbytes' 4-bit or 8-bit layers, or
            torchao's int8 (see `plainlora.lora.storage`).
        config: `plainlora.lora.config.SUPPORTED_FIELDS` are implemented; any other field with a value that is not its
            default is an error.
        strict: Whether every single name and pattern must match. Loading turns this off and checks the file's keys.
        new_weights: Names of the parameters that the base's checkpoint lacks, Transformers' `missing_keys`. They stay
            frozen and are saved with the adapter.
        low_cpu_mem_usage: As in PEFT: leaves A and B on the meta device, for `load_adapter_weights` to fill.
        layer_class: The class that wraps each target, a variant of `LoRALinear`; left out for `LoRALinear`, or
            `DoRALinear` if the config says `use_dora`.

    Returns:
        The same model.

    Raises:
        UnsupportedError: Only PEFT implements a field, or can adapt a module. The model is then unchanged.
        LoRAError: A name matches nothing, the model carries an adapter already, or a new weight cannot be saved with
            the adapter. The model is then unchanged.
    """
    if getattr(model, "plainlora", None) is not None:
        raise LoRAError("this model already carries a PlainLoRA adapter; unwrap() or merge() it first")
    resolved, targets = _resolve(model, config, strict)
    to_save = find_modules_to_save(model, resolved, targets)
    new = find_new_weights(model, resolved, new_weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    if layer_class is None:
        layer_class = DoRALinear if resolved.use_dora else LoRALinear
    for name, base in targets.items():
        layer = layer_class(
            base,
            *storage_of(base).features(base),
            r=value_for(resolved.rank_pattern or {}, name, resolved.r),
            lora_alpha=value_for(resolved.alpha_pattern or {}, name, resolved.lora_alpha),
            lora_dropout=resolved.lora_dropout,
            use_rslora=resolved.use_rslora,
            init_lora_weights=not low_cpu_mem_usage and resolved.init_lora_weights,  # type: ignore[arg-type]
            device="meta" if low_cpu_mem_usage else None,
        )
        _place(layer, layer.weight)
        layer.train(base.training)
        replace_module(model, name, layer)
    for name in to_save:
        replace_module(model, name, ModuleToSave(model.get_submodule(name)))
    biases: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in _biases_to_train(model, resolved.bias, targets.values()):
        parameter.requires_grad_(True)
        biases[parameter] = parameter.detach().clone()
    own_save = model.__dict__.get("save_pretrained")
    model.plainlora = AdapterState(resolved, trainable, biases, new, own_save)  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
    return model


def unwrap(model: ModelT) -> ModelT:
    """Takes the adapter out, in place: the inverse of `inject`. Trained biases get their old values back.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    state = adapter_state(model)
    for name, layer in list(lora_layers(model)):
        replace_module(model, name, layer.base_layer)
    for name, module in list(saved_modules(model)):
        replace_module(model, name, module.original_module)
    for bias, value in state.biases.items():
        bias.data.copy_(value)
    restore_attributes(model, state)
    return model


def restore_attributes(model: nn.Module, state: AdapterState) -> None:
    """Restores `requires_grad` and `save_pretrained` after the LoRA modules were taken out, and deletes the record."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    model.__dict__.pop("plainlora")
    model.__dict__.pop("save_pretrained", None)
    if state.save_pretrained is not None:
        model.save_pretrained = state.save_pretrained  # type: ignore[assignment]


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Switches the adapter off within the block: the model computes what its base computes.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    biases = adapter_state(model).biases
    switched = [module for module in model.modules() if isinstance(module, (LoRALinear, ModuleToSave))]
    before = [module.enabled for module in switched]
    trained = {bias: bias.data for bias in biases}
    try:
        for bias, value in biases.items():
            bias.data = value.to(bias.device, bias.dtype)
        for module in switched:
            module.enabled = False
        yield model
    finally:
        for module, was_enabled in zip(switched, before, strict=True):
            module.enabled = was_enabled
        for bias, data in trained.items():
            bias.data = data
