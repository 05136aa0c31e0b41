"""A `PeftModel` that is attached, loaded, saved for the unchanged base, switched off and merged."""

import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from plainlora.errors import UserError, first_line
from plainlora.lora import interchange
from plainlora.lora.config import check_config, check_types, find_unsupported
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.peft_versions import convert_peft_adapter_state_dict_for_transformers
from plainlora.lora.strength import interpolated
from plainlora.lora.targets import (
    check_expressions,
    check_patterns,
    find_modules_to_save,
    find_new_weights,
    find_tied,
    select,
)
from plainlora.peft_model.config import (
    changes_base,
    check_base_is_known,
    check_bits,
    check_conversion,
    for_shapes,
    init_of,
    is_converted,
    needs_rows,
)
from plainlora.peft_model.initial import initialize_eva, prepare

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _bits_of(model: nn.Module) -> int | None:
    """4 or 8 for a base that Transformers has loaded in bitsandbytes' bits, else `None`."""
    return next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)


def _by_peft(what: str, run: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Runs PEFT's code; what it raises, of whatever class, becomes one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(*args, **kwargs)
        except (LoRAError, UserError):
            raise
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, NotImplementedError)) else f"{type(error).__name__}: "
            raise UserError(f"PEFT {what}: {kind}{first_line(error)}") from error


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def attach(
    model: PreTrainedModel,
    config: LoraConfig,
    new_weights: Collection[str] = (),
    batches: Sequence[dict[str, torch.Tensor]] = (),
) -> nn.Module:
    """`peft.get_peft_model`, with the initial values that need rows, and without what PEFT ignores in a config.

    Args:
        model: The base; one on the `meta` device gets an adapter of the same shapes.
        config: The adapter's config.
        new_weights: Names of the parameters that the base's checkpoint lacks; they are saved with the adapter.
        batches: Batches of training rows, for `needs_rows`.

    Raises:
        LoRAError: A name matches nothing, or a new weight cannot be saved with the adapter.
        UserError: PEFT refuses the config or cannot compute the initial values.
    """
    check_config(config)
    check_bits(config, _bits_of(model), model.device.type == "cpu")
    found = select(model, config)
    selected = found.selected
    check_conversion(config, {name: model.get_submodule(name) for name in selected})
    check_patterns(config, [*selected, *found.selected_parameters])
    find_modules_to_save(model, config, ())
    new = find_new_weights(model, config, new_weights)
    if _on_meta(model):
        config = for_shapes(config)
    elif needs_rows(config):
        _by_peft("cannot initialise this adapter from rows", prepare, model, config, selected, batches)
    biases = _copies_of_biases(model, config)
    adapted = _by_peft("refuses this adapter", get_peft_model, model, config)
    adapted.biases = biases  # type: ignore[assignment]
    if init_of(config) == "eva" and batches:
        _by_peft("cannot initialise this adapter from rows", initialize_eva, adapted, batches)
    if not _on_meta(model) and find_unsupported(config):
        _by_peft("cannot compute with this adapter", _run_once, adapted)
    if config.use_qalora and not any(hasattr(module, "qalora_group_size") for module in adapted.modules()):
        raise LoRAError("use_qalora: PEFT applies it to GPTQ layers alone, and ignores it on this base; leave it out")
    if changes_base(config) and not _on_meta(model):
        adapted.initial = {  # type: ignore[assignment]
            name: value.detach().cpu().clone() for name, value in adapted.named_parameters() if value.requires_grad
        }
    names = [name for name, parameter in adapted.named_parameters() if parameter in new]
    save = MethodType(partial(_save_pretrained, new_weights=names), adapted)
    adapted.save_pretrained = save  # type: ignore[method-assign]
    return adapted


def _copies_of_biases(model: nn.Module, config: LoraConfig) -> dict[nn.Parameter, torch.Tensor]:
    """The base's biases, of which some are trained, with copies of their values; none if none is trained."""
    if config.bias == "none" or _on_meta(model):
        return {}
    return {each: each.detach().cpu().clone() for name, each in model.named_parameters() if name.endswith("bias")}


@torch.no_grad()
def _run_once(adapted: PeftModel) -> None:
    """One forward pass: some kinds of PEFT's fail on some layers only when they compute."""
    if any(hasattr(parameter, "ds_id") for parameter in adapted.parameters()):
        return  # ZeRO-3 has divided the weights, and gathers them only for its engine
    was_training = adapted.training
    with torch.random.fork_rng():
        adapted.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long, device=adapted.device))
    adapted.train(was_training)


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
    options |= {"state_dict": state_dict, "is_main_process": is_main_process}
    with _quiet_about_saved_tensors():
        PeftModel.save_pretrained(model, save_directory, **options)
    if new_weights and is_main_process:
        state = model.state_dict() if state_dict is None else state_dict
        interchange.add_tensors(save_directory, {name: state[name] for name in new_weights})


@contextmanager
def _quiet_about_saved_tensors() -> Iterator[None]:
    """Silences PEFT, which takes trained biases of `lora_B` for shards, and says that it saves targeted embeddings.

    Of shards it still warns: they are matrices too, which it names first.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py (`get_peft_model_state_dict`)
    """
    biases = r"(\S+\.lora_B\.bias:\([1-9]\d*,\)(, |\. | ))+(\(\+|A 1-D)"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape: {biases}")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True` as embedding layers found")
        yield


@contextmanager
def _quiet_about_conversion() -> Iterator[None]:
    """Silences what PEFT says of a config whose adapter is converted: that it changes the base, or had been CorDA's.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py (`_check_new_adapter_config`)
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py (`__post_init__`)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*changes the base weights of the model")
        warnings.filterwarnings("ignore", "`corda_config` specified but will be ignored")
        yield


@contextmanager
def _with_values(values: dict[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Other values of some parameters within the block."""
    trained = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, value in trained.items():
            parameter.data = value


def _initial(model: nn.Module) -> dict[nn.Parameter, torch.Tensor] | None:
    """The values before training of what is trained, if the adapter was subtracted from the base; else `None`."""
    initial: dict[str, torch.Tensor] | None = getattr(model, "initial", None)
    return None if initial is None else {each: initial[n] for n, each in model.named_parameters() if n in initial}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it computed before training.

    An adapter that was subtracted from the base gets its initial values back; any other is switched off, and trained
    biases of the base, which PEFT leaves as they are, get theirs.
    """
    initial = _initial(model)
    if initial is not None:
        with _with_values(initial):
            yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with cast(PeftModel, model).disable_adapter(), _with_values(getattr(model, "biases", {})):
            yield


@contextmanager
def scaled(model: nn.Module, strength: float) -> Iterator[None]:
    """Within the block the adapter acts with this strength (dimensionless), see `plainlora.lora.strength`."""
    config = cast(LoraConfig, cast(PeftModel, model).active_peft_config)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with interpolated(layers, strength) if config.use_dora else rescale_adapter_scale(model, strength):
        yield


@contextmanager
def for_unchanged_base(model: nn.Module) -> Iterator[None]:
    """Within the block, `save_pretrained` writes an adapter for the base as it was before `attach`.

    PEFT's conversion makes a LoRA of twice the rank: `[B, -B0] [A; A0]`. KaSA and LoftQ stay adapters of a base that
    PEFT changes again on loading.
    """
    initial, config = _initial(model), cast(LoraConfig, cast(PeftModel, model).active_peft_config)
    if initial is None or not is_converted(config):
        yield
        return
    save = cast(Callable[..., None], model.save_pretrained)
    with tempfile.TemporaryDirectory() as start:
        with _with_values(initial), _quiet_about_saved_tensors():
            PeftModel.save_pretrained(cast(PeftModel, model), start)
        cast(Any, model).save_pretrained = partial(save, path_initial_model_for_weight_conversion=start)
        try:
            with _quiet_about_conversion():
                yield
        finally:
            cast(Any, model).save_pretrained = save


def _check_readable(model: nn.Module, directory: str | Path) -> LoraConfig:
    """Raises `LoRAError` if PEFT would fail on the files, or would unpickle `adapter_model.bin`.

    PEFT unpickles it if there is no `adapter_model.safetensors`.

    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/save_and_load.py (`load_peft_weights`)
    """
    config = interchange.read_config(directory)
    interchange.saved_shapes(directory)
    check_types(config)
    check_expressions(model, config)
    return config


def load(model: PreTrainedModel, directory: str | Path) -> nn.Module:
    """`PeftModel.from_pretrained`, of which every weight must be in the file.

    Raises:
        LoRAError: The files cannot be read, a weight is missing, or PEFT would load it onto another base than it was
            trained on.
        UserError: PEFT refuses the adapter.
    """
    config = _check_readable(model, directory)
    check_base_is_known(config, directory)
    biases = _copies_of_biases(model, config)
    with torch.device("meta") if _on_meta(model) else nullcontext():  # A and B too: they may start from the base's
        adapted = _by_peft(f"cannot load {directory}", PeftModel.from_pretrained, model, str(directory))
    adapted.biases = biases  # type: ignore[assignment]
    _check_whole(adapted, directory)
    return adapted


def _check_whole(adapted: PeftModel, directory: str | Path) -> None:
    """Raises `LoRAError` if a weight was not in the file: PEFT leaves it as it was initialised, without a word."""
    with _quiet_about_saved_tensors():
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if wanted <= set(interchange.saved_shapes(directory)):
        return
    renamed = (
        convert_peft_adapter_state_dict_for_transformers(  # as on loading: an older checkpoint's names of experts
            model=adapted.get_base_model(),
            peft_config=interchange.read_config(directory),
            adapter_state_dict=interchange.read_tensors(directory),
            adapter_name="default",
        )
    )
    if missing := sorted(wanted - set(renamed)):
        raise LoRAError(f"{directory}/adapter_model.safetensors lacks {some(missing)}; its saving was not finished")


def reload(model: nn.Module, directory: str | Path) -> None:
    """Copies a saved adapter into a model that carries one of its config already, to train it further.

    Raises:
        LoRAError: The files cannot be read, or a weight is missing.
        UserError: PEFT refuses the adapter, which has other shapes for one.
    """
    _check_readable(model, directory)
    adapted = cast(PeftModel, model)
    _by_peft(f"cannot load {directory}", adapted.load_adapter, str(directory), "default", is_trainable=True)
    _check_whole(adapted, directory)


def merge(model: nn.Module) -> PreTrainedModel:
    """`PeftModel.merge_and_unload`. The model may be on the `meta` device, to see whether it can be merged.

    Raises:
        UserError: PEFT cannot merge this kind of adapter, or would lose or double a delta.
    """
    config = cast(LoraConfig, cast(PeftModel, model).active_peft_config)
    if config.layer_replication:
        raise UserError(
            "layer_replication: copies of a layer share its weights and have deltas of their own, so this adapter "
            "cannot be merged; load it with PEFT"
        )
    targets = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    tied = None if config.ensure_weight_tying else find_tied(model, [f"{name}.base_layer" for name in targets])
    if tied is not None:
        raise UserError(
            f"{tied[0].removesuffix('.base_layer')} shares its weight with {tied[1]}, which a merge would change too, "
            "so this adapter cannot be merged; load it with PEFT"
        )
    return cast(PreTrainedModel, _by_peft("cannot merge this adapter", cast(Any, model).merge_and_unload))
