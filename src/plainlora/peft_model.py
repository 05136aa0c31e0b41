"""A `PeftModel` behind the verbs of `plainlora.backends`: PEFT's own code for what a `LoraConfig` asks for.

PEFT implements more of its `LoraConfig` than the hand-written LoRA. Some of it needs what PEFT leaves to a script:

- PiSSA, OLoRA, CorDA and LoRA-GA start from B A that is not 0 and subtract it from the base. Their adapter belongs to
  that changed base, which for most of them cannot be made again. The final save is converted to one for the unchanged
  base, of twice the rank: `W0 + s (B A - B0 A0)`.
- EVA, CorDA and LoRA-GA compute the start from rows. Without them PEFT would start at random, or fail.
"""

import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import prepare_model_inputs_fn_language_modeling as tokens_for_eva
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
    condense,
    find_modules_to_save,
    find_new_weights,
    find_tied,
    modules_to_save,
    select,
)

CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # beginnings of init_lora_weights
NEEDS_ROWS = ("eva", "corda", "lora_ga")
MADE_AGAIN = ("pissa", "olora")  # PEFT repeats these on loading, with the same result
FROM_WEIGHTS = (*CONVERTED, "loftq", "mica", "orthogonal")  # need weights, or their dtype, in 16 or 32 bits
IGNORED_IN_BITS = ("kasa_config", "megatron_config", "monteclora_config", "use_bdlora")  # plain LoRA, without a word

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _init_of(config: LoraConfig) -> str:
    return str(config.init_lora_weights).lower()


def changes_base(config: LoraConfig) -> bool:
    """Whether PEFT changes the base's weights or layers when it attaches or loads an adapter of this config."""
    own = config.kasa_config is not None or bool(config.layer_replication)
    return own or _init_of(config).startswith((*CONVERTED, "loftq"))


def needs_rows(config: LoraConfig) -> bool:
    """Whether the adapter's initial values are computed from training rows."""
    return _init_of(config) in NEEDS_ROWS


def check_bits(config: LoraConfig, bits: int | None, on_cpu: bool) -> None:
    """Raises `LoRAError` for what PEFT ignores, computes wrongly or cannot compute on bitsandbytes' layers.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py (`resolve_lora_variant`)

    Args:
        config: The adapter's config.
        bits: 4 or 8, in which the base is stored; `None` for a dense one.
        on_cpu: Whether it is trained on a CPU.
    """
    if bits is None:
        return
    init = f"init_lora_weights={config.init_lora_weights!r}"
    if ignored := [name for name in IGNORED_IN_BITS if getattr(config, name)]:
        fault = f"{some(ignored)}: PEFT ignores it on a base in {bits} bits, and would train plain LoRA"
    elif _init_of(config) == "olora":
        off = {4: "1.7 %", 8: "0.5 %"}[bits]
        fault = f"{init}: PEFT rounds the base that it changes to {bits} bits again, and the adapter, saved for the "
        fault += f"unchanged base, is another model than was trained: the logits of a tiny Llama were off by {off}"
    elif _init_of(config).startswith(FROM_WEIGHTS):
        fault = f"{init}: PEFT starts this adapter from the base's weights in 16 or 32 bits, and these are in {bits}"
    elif bits == 8 and config.layer_replication:
        fault = "layer_replication: in 8 bits the copies of a layer compute without the scales of its weights, which "
        fault += "bitsandbytes takes out of the weight that they share"
    elif bits == 8 and config.use_dora and on_cpu:
        fault = "use_dora: on a CPU in 8 bits PEFT loses the scales of the weights, and fails"
    else:
        return
    raise LoRAError(f"{fault}; leave it out, or load the base without load_in_{bits}bit")


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
    _check_conversion(config)
    found = select(model, config)
    selected = found.selected
    check_patterns(config, [*selected, *found.selected_parameters])
    find_modules_to_save(model, config, ())
    new = find_new_weights(model, config, new_weights)
    if _on_meta(model):
        config = _for_shapes(config)
    elif needs_rows(config):
        if not batches:
            raise LoRAError(
                f"init_lora_weights={config.init_lora_weights!r} computes the adapter from training rows: train it "
                "with recipes/sft.py or recipes/classify.py"
            )
        _by_peft("cannot initialise this adapter from rows", _prepare, model, config, selected, batches)
    biases = _copies_of_biases(model, config)
    adapted = _by_peft("refuses this adapter", get_peft_model, model, config)
    adapted.biases = biases  # type: ignore[assignment]
    if _init_of(config) == "eva" and batches:
        _by_peft("cannot initialise this adapter from rows", _initialize_eva, adapted, _for_eva(adapted, batches))
    if not _on_meta(model) and find_unsupported(config):
        _by_peft("cannot compute with this adapter", _run_once, adapted)
    if config.use_qalora and not any(hasattr(module, "qalora_group_size") for module in adapted.modules()):
        raise LoRAError("use_qalora: PEFT applies it to GPTQ layers alone, and ignores it on this base; leave it out")
    if changes_base(config) and not _on_meta(model):
        adapted.initial = {  # type: ignore[assignment]
            name: value.detach().cpu().clone() for name, value in adapted.named_parameters() if value.requires_grad
        }
    if new:
        names = [name for name, parameter in adapted.named_parameters() if parameter in new]
        save = MethodType(partial(_save_pretrained, new_weights=names), adapted)
        adapted.save_pretrained = save  # type: ignore[method-assign]
    return adapted


def _check_conversion(config: LoraConfig) -> None:
    """Raises `LoRAError` for what PEFT would lose, or fail on, when it converts an adapter to the unchanged base.

    It keeps A and B alone, and adds a second adapter, which it does not do beside a trained bias.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py (`subtract_mutated_init`)
    """
    if not _init_of(config).startswith(CONVERTED):
        return
    patterns = config.use_rslora and (config.rank_pattern or config.alpha_pattern)
    trained = {
        "bias": config.bias != "none",
        "modules_to_save": bool(modules_to_save(config)),
        "use_dora": config.use_dora,
        "trainable_token_indices": config.trainable_token_indices is not None,
        "rank_pattern and alpha_pattern with use_rslora": bool(patterns),
    }
    if lost := [name for name, is_set in trained.items() if is_set]:
        raise LoRAError(
            f"{some(lost)}: PEFT saves init_lora_weights={config.init_lora_weights!r} for the unchanged base, and can "
            "convert A and B alone; leave it out, or choose another init_lora_weights"
        )


def _copies_of_biases(model: nn.Module, config: LoraConfig) -> dict[nn.Parameter, torch.Tensor]:
    """The base's biases, of which some are trained, with copies of their values; none if none is trained."""
    if config.bias == "none" or _on_meta(model):
        return {}
    return {each: each.detach().cpu().clone() for name, each in model.named_parameters() if name.endswith("bias")}


def _for_shapes(config: LoraConfig) -> LoraConfig:
    """A config for a base without values: what is computed from values is left out."""
    config = deepcopy(config)
    if needs_rows(config):
        config.init_lora_weights = True
        config.eva_config = config.corda_config = config.lora_ga_config = None
    config.kasa_config = None  # a diagonal of r values beside A and B, and a truncated base
    return config


@torch.no_grad()
def _run_once(adapted: PeftModel) -> None:
    """One forward pass: some kinds of PEFT's fail on some layers only when they compute."""
    if any(hasattr(parameter, "ds_id") for parameter in adapted.parameters()):
        return  # ZeRO-3 has divided the weights, and gathers them only for its engine
    was_training = adapted.training
    with torch.random.fork_rng():
        adapted.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long, device=adapted.device))
    adapted.train(was_training)


def _prepare(
    model: PreTrainedModel, config: LoraConfig, selected: list[str], batches: Sequence[dict[str, torch.Tensor]]
) -> None:
    """Computes what CorDA and LoRA-GA need before they are attached; both look for targets by their names.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/corda.py
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/loraga.py
    """
    config.target_modules = condense(selected, model)
    if _init_of(config) == "corda":
        try:
            from peft.tuners.lora.corda import preprocess_corda  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UserError(
                f"init_lora_weights='corda': PEFT's CorDA needs the package {error.name}: pip install attrs"
            ) from error
        was_training = model.training
        preprocess_corda(model.eval(), config, run_model=partial(_run_rows, model, batches))
        model.train(was_training)
    elif _init_of(config) == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga  # noqa: PLC0415

        preprocess_loraga(model, config, partial(_accumulate_gradients, model, batches))


@torch.no_grad()
def _run_rows(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """One row at a time and unpadded: CorDA's covariances are those of one sequence, padding included."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None].to(model.device))


def _accumulate_gradients(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()


def _initialize_eva(adapted: PeftModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    from peft import initialize_lora_eva_weights  # noqa: PLC0415

    on_device = [{name: value.to(adapted.device) for name, value in batch.items()} for batch in batches]
    initialize_lora_eva_weights(adapted, on_device, show_progress_bar=False)


def _for_eva(adapted: PeftModel, batches: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The batches that PEFT's EVA can use, without labels of whole rows, which it would take for those of tokens.

    It passes over a batch with fewer tokens than components, prints a line a layer, and has no end if all are such.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/eva.py (`SVDHook`, `_get_eva_state_dict`)

    Raises:
        LoRAError: There is none.
    """
    config = cast(LoraConfig, adapted.active_peft_config)
    eva = cast(EvaConfig, config.eva_config)
    components = round(max([config.r, *(config.rank_pattern or {}).values()]) * eva.rho)
    of_tokens = [
        {name: value for name, value in batch.items() if name != "labels" or value.dim() > 1} for batch in batches
    ]
    sizes = [len(tokens_for_eva(batch, config)) for batch in of_tokens]
    if max(sizes) < components:
        raise LoRAError(
            f"init_lora_weights='eva' computes {components} components (r times rho), and no batch of training rows "
            f"has more than {max(sizes)} trained tokens; raise per_device_train_batch_size, or lower r"
        )
    return [batch for batch, size in zip(of_tokens, sizes, strict=True) if size >= components]


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
    if initial is None or not _init_of(config).startswith(CONVERTED):
        yield
        return
    save = cast(Callable[..., None], model.save_pretrained)
    with tempfile.TemporaryDirectory() as start:
        with _with_values(initial):
            PeftModel.save_pretrained(cast(PeftModel, model), start)
        cast(Any, model).save_pretrained = partial(save, path_initial_model_for_weight_conversion=start)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*changes the base weights of the model")  # it is converted
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


def check_base_is_known(config: LoraConfig, directory: str | Path) -> None:
    """Raises `LoRAError` for an adapter of a changed base that PEFT cannot make again."""
    if _init_of(config).startswith(CONVERTED) and _init_of(config) not in MADE_AGAIN:
        raise LoRAError(
            f"{directory} was saved with init_lora_weights={config.init_lora_weights!r}, for a changed base that PEFT "
            "cannot make again: use the final adapter of its run, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


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
            f"{tied[0].removesuffix('.base_layer')} shares its weight with {tied[1]}, which a merge would change too; "
            "set ensure_weight_tying in lora_config, or do not merge"
        )
    return cast(PreTrainedModel, _by_peft("cannot merge this adapter", cast(Any, model).merge_and_unload))
