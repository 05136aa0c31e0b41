"""The single switch between the hand-written LoRA and PEFT. No other module distinguishes them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from plainlora.errors import UserError
from plainlora.fast.fuse import fuse
from plainlora.lora import inject, interchange, load, strength
from plainlora.lora.config import as_loaded, check_supported, find_unsupported
from plainlora.lora.errors import LoRAError, UnsupportedError
from plainlora.lora.layer import LoRALinear
from plainlora.lora.merge import merge
from plainlora.lora.record import replace_module
from plainlora.lora.targets import find_targets, modules_to_save
from plainlora.peft_model import model as peft_model

BackendName = Literal["fused", "reference", "peft", "peft_fused"]

FIXED_BY_CHECKPOINT = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "bias", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "exclude_modules", "layers_to_transform", "base_model_name_or_path"),
)
CONVERTED_FOR_EXPERTS = ("target_parameters", "target_modules", "rank_pattern", "alpha_pattern")
CHOSEN_BY_EVA = ("rank_pattern", "alpha_pattern", "target_modules")
CONDENSED_FROM = 20  # names; PEFT replaces so many target_modules by shorter ones that match the same modules


class Attach(Protocol):
    """A function that puts a new adapter into a base model."""

    def __call__(
        self,
        model: PreTrainedModel,
        config: LoraConfig,
        new_weights: Collection[str] = (),
        batches: Sequence[dict[str, torch.Tensor]] = (),
    ) -> nn.Module:
        """See `plainlora.inject` and `plainlora.peft_model.model.attach`."""


@dataclass(frozen=True)
class Backend:
    """One implementation of LoRA.

    Attributes:
        attach: Puts a new adapter into a base model.
        load: Puts a saved adapter into a base model, for inference.
        reload: Copies a saved adapter into a model that already carries one, to resume training.
        disabled: A context in which the adapter is switched off.
        scaled: A context in which the adapter acts with a strength, see `plainlora.lora.strength`.
        merge: Adds the adapter to the base's weights, and takes it out.
        for_unchanged_base: A context in which an adapter is saved for the base as its checkpoint holds it.
        fast: Whether the trainer uses the loss head and the attention of `plainlora.fast`.
    """

    attach: Attach
    load: Callable[[PreTrainedModel, str | Path], nn.Module]
    reload: Callable[[nn.Module, str | Path], None]
    disabled: Callable[[nn.Module], AbstractContextManager[object]]
    scaled: Callable[[nn.Module, float], AbstractContextManager[object]]
    merge: Callable[[Any], PreTrainedModel]
    for_unchanged_base: Callable[[nn.Module], AbstractContextManager[object]]
    fast: bool = False


def _reference_attach(
    model: PreTrainedModel, config: LoraConfig, new_weights: Collection[str] = (), batches: Sequence[object] = ()
) -> nn.Module:
    return inject.inject(model, config, new_weights=new_weights)


def _fused(model: nn.Module) -> nn.Module:
    fuse(model)
    return model


_REFERENCE = Backend(
    attach=_reference_attach,
    load=load.load_adapter,
    reload=interchange.load_adapter_weights,
    disabled=inject.disabled,
    scaled=strength.scaled,
    merge=merge,
    for_unchanged_base=lambda model: nullcontext(),
)
_PEFT = Backend(
    attach=peft_model.attach,
    load=peft_model.load,
    reload=peft_model.reload,
    disabled=peft_model.disabled,
    scaled=peft_model.scaled,
    merge=peft_model.merge,
    for_unchanged_base=peft_model.for_unchanged_base,
)


def _fast(backend: Backend) -> Backend:
    """The same with the fused forms in it."""
    return replace(
        backend,
        attach=lambda *args, **options: _fused(backend.attach(*args, **options)),
        load=lambda model, directory: _fused(backend.load(model, directory)),
        fast=True,
    )


BACKENDS = {"fused": _fast(_REFERENCE), "reference": _REFERENCE, "peft": _PEFT, "peft_fused": _fast(_PEFT)}


def _check_implemented(config: LoraConfig, model: nn.Module | None, strict: bool = True) -> None:
    """Raises `UnsupportedError` if PEFT alone implements an adapter. Other faults are left to `attach` and `load`."""
    try:
        check_supported(config)
        if model is not None:
            find_targets(model, config, strict)
    except UnsupportedError:
        raise
    except LoRAError:
        return


def choose_backend(name: BackendName, config: LoraConfig, model: nn.Module | None) -> tuple[BackendName, str | None]:
    """The back end that trains an adapter: `peft_fused` in place of `fused` for what PEFT alone implements.

    For aLoRA it is `peft`: it looks for its tokens in each row, and fused batches are one row without padding.

    Args:
        name: The back end that is asked for.
        config: The adapter's config.
        model: The base on the `meta` device; `None` if it cannot be built there.

    Returns:
        The back end's name, and what PEFT alone implements if it is another than `name`.

    Raises:
        LoRAError: The back end that is asked for does not implement it.
    """
    if name == "peft_fused" and config.alora_invocation_tokens is not None:
        raise LoRAError("lora_backend peft_fused: it does not implement alora_invocation_tokens, PEFT does; use peft")
    if name in ("peft", "peft_fused"):
        return name, None
    try:
        _check_implemented(config, model)
    except UnsupportedError as error:
        if name == "reference":
            raise LoRAError(f"lora_backend reference: {error}; use peft_fused, or leave lora_backend out") from error
        why = str(error).partition(";")[0]  # without the advice to leave it out
        return "peft_fused" if config.alora_invocation_tokens is None else "peft", why
    return name, None


def choose_loader(adapter: str | Path, model: nn.Module | None) -> Backend:
    """The back end that loads a saved adapter for inference: `peft` for what PEFT alone implements, else `reference`.

    Args:
        adapter: The adapter's folder.
        model: Its base on the `meta` device; `None` if it cannot be built there.

    Raises:
        LoRAError: The folder holds no adapter.
    """
    try:
        _check_implemented(as_loaded(interchange.read_config(adapter)), model, strict=False)
    except UnsupportedError:
        return _PEFT
    return _REFERENCE


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


def _comparable(name: str, config: LoraConfig) -> Any:
    """A config's value in a form in which equivalent values are equal."""
    value = getattr(config, name)
    if name == "modules_to_save":
        return sorted(set(modules_to_save(config)))  # a saved config names the task's heads too
    if name == "exclude_modules":
        return value if isinstance(value, str) else sorted(value or ())
    if name in ("rank_pattern", "alpha_pattern"):
        return value or {}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
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
    names = [*FIXED_BY_CHECKPOINT, *sorted({*find_unsupported(saved), *find_unsupported(config)})]
    by_peft = config.target_parameters is None and bool(saved.target_parameters)  # of names of experts
    targets = (saved.target_modules, config.target_modules)
    if all(isinstance(value, (list, set)) and len(value) < CONDENSED_FROM for value in targets):
        names.append("target_modules")
    changed = CONVERTED_FOR_EXPERTS if by_peft else CHOSEN_BY_EVA if config.init_lora_weights == "eva" else ()
    names = [name for name in names if name not in changed]
    for name in names:
        before, now = (_comparable(name, one) for one in (saved, config))
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
    batches: Sequence[dict[str, torch.Tensor]] = (),
) -> nn.Module:
    """Puts a new adapter into a base model and sets its dtype.

    Args:
        model: The base, already quantised if need be.
        config: The adapter's config.
        backend: The implementation of LoRA.
        dtype: The dtype of the trained weights: `float32`, or `bfloat16` for half the optimizer memory.
        new_weights: Names of the parameters that the base's checkpoint lacks; they are saved with the adapter.
        batches: Batches of training rows, from which PEFT computes the initial values of what
            `plainlora.peft_model.config.needs_rows` names.

    Raises:
        UserError: The adapter does not fit the model.
        LoRAError: The adapter does not fit the model.
    """
    adapted = backend.attach(model, config, new_weights, batches)
    refuse_adapted_head(adapted)
    if dtype != "float32":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return adapted


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that carry an adapter, in the model's own order."""
    return [name for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoraLayer))]


def fields_on_whole_weights(config: LoraConfig) -> list[str]:
    """The fields of a config whose layers compute with the base's weights, not through its layers alone.

    DoRA does; of what PEFT alone implements it is presumed.
    """
    return [*(["use_dora"] if config.use_dora else []), *find_unsupported(config)]


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
