"""Which modules of a model a `LoraConfig` selects, by PEFT's own code. Every name must match a linear layer."""

import difflib
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from plainlora.lora.errors import LoRAError, UnsupportedError, some
from plainlora.lora.peft_versions import (
    NoMatchingPeftModuleError,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from plainlora.lora.storage import find_storage, is_quantized, is_supported

# The new heads that PEFT trains and saves whole beside the adapters.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


class _Matched(Exception):
    """PEFT has matched every target."""


class Selection(LoraModel):
    """The modules that PEFT selects for a config on a model. The model is not changed.

    This runs PEFT's `BaseTuner.inject_adapter`, with a `_create_and_replace` that only records each target. PEFT's
    conversions of module names between versions of Transformers are included.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py

    Args:
        model: The base; it is not changed.
        config: The adapter's config.

    Attributes:
        selected: Full names of the modules that PEFT adapts, in the model's own order.
        selected_parameters: Full names of the parameters that PEFT adapts outside linear layers.
        target_parameters: The config's entries that select those. For some mixtures of experts PEFT turns the names of
            projections into such entries, even if a model has no experts, and then skips the projections.
        converted: These names of projections.

    Raises:
        ValueError: PEFT refuses the config.
    """

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        self.selected: list[str] = []
        self.selected_parameters: list[str] = []
        resolved = deepcopy(config)  # PEFT writes into it
        resolved.layer_replication = None  # for which PEFT would replicate the model's layers
        with suppress(_Matched), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about what is an error here
            super().__init__(model, resolved, "default")
        self.target_parameters = set(resolved.target_parameters or ())
        self.converted = _converted(model, config)

    def _create_and_replace(self, *_: Any, current_key: str, parameter_name: str | None = None, **__: Any) -> None:  # type: ignore[override]
        (self.selected if parameter_name is None else self.selected_parameters).append(current_key)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        try:
            super()._check_target_module_compatiblity(peft_config, model, target_name)
        except ValueError as error:
            raise LoRAError(
                f"target_modules: {target_name!r} cannot be adapted, because Mamba layers read its weight without "
                f"calling it; name other modules, or add {target_name!r} to exclude_modules"
            ) from error

    def set_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """PEFT calls this first after all targets are matched."""
        raise _Matched


def _converted(model: nn.Module, config: LoraConfig) -> set[str]:
    """The names in `target_modules` that PEFT turns into entries of `target_parameters`."""
    given, resolved = config.target_modules, deepcopy(config)
    if not isinstance(given, (list, set)):
        return set()
    convert_peft_config_for_transformers(resolved, model, None)
    return set(given) - set(resolved.target_modules or ())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _names(entry: str, module_name: str) -> bool:
    """PEFT's rule for an entry of a list: it is the whole name, or the end of the name after a dot."""
    return module_name == entry or module_name.endswith(f".{entry}")


def _near_misses(entry: str, candidates: Iterable[str], kind: str = "linear layers") -> str:
    leaves = sorted({_leaf(name) for name in candidates if not _leaf(name).isdigit()})
    near = difflib.get_close_matches(_leaf(entry), leaves, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"the {kind} are {', '.join(leaves)}"


def _pattern_hint(pattern: str, linear: Iterable[str]) -> str:
    if re.fullmatch(r"[\w.]+([, ]+[\w.]+)+", pattern):  # several names in one text
        return f"for several names write a list: [{', '.join(re.split('[, ]+', pattern))}]"
    return _near_misses(pattern, linear)


def _matches(name: str, **fields: Any) -> object:
    """Whether PEFT matches a module's name, given only these fields of a config."""
    return check_target_module_exists(
        SimpleNamespace(**{"target_modules": [], "target_parameters": None} | fields), name
    )


def without_unmatched(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """A saved adapter's config without the names and patterns that match nothing in its base, which PEFT ignores.

    Args:
        model: The base.
        config: The adapter's config.
    """
    check_expressions(model, config)
    names, config = [name for name, _ in model.named_modules() if name], deepcopy(config)
    try:
        found = Selection(model, config)
    except ValueError:  # PEFT refuses it, and is to say why
        return config
    adapted = [*found.selected, *found.selected_parameters]
    for field in ("target_modules", "exclude_modules"):
        entries = getattr(config, field)
        if isinstance(entries, (list, set)):
            kept = [e for e in entries if e in found.converted or any(_names(e, name) for name in names)]
            setattr(config, field, kept)
    for field in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, field) or {}
        setattr(config, field, {key: number for key, number in given.items() if any(map(_end(key).match, adapted))})
    if config.target_parameters is not None:
        config.target_parameters = [e for e in config.target_parameters if any(_names(e, name) for name in adapted)]
    return config


def _check_layers(matched: list[str], config: LoraConfig) -> None:
    """Raises `LoRAError` if `layers_to_transform` names a layer without a target."""
    layers = config.layers_to_transform
    ends = set(map(_leaf, matched))

    def has_target(layer: int) -> bool:
        fields = {"target_modules": ends, "layers_to_transform": layer, "layers_pattern": config.layers_pattern}
        return any(_matches(name, **fields) for name in matched)

    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not has_target(layer):
            numbers = sorted({int(part) for name in matched for part in name.split(".") if part.isdecimal()})
            present = [number for number in numbers if has_target(number)]
            has = f"they lie in the layers {present[0]} to {present[-1]}" if present else "they lie in no layer"
            raise LoRAError(f"layers_to_transform: there is no target module in layer {layer}; {has}")


def check_expressions(model: nn.Module, config: LoraConfig) -> None:
    """Raises `LoRAError` for a field whose regular expressions fail on the names of a model's modules."""
    names = [name for name, _ in model.named_modules()]
    layers = {"target_modules": set(map(_leaf, names)), "layers_to_transform": 0}
    checks: list[tuple[str, Callable[[str], object]]] = [
        ("target_modules", lambda name: _matches(name, target_modules=config.target_modules or ())),
        ("exclude_modules", lambda name: _matches(name, exclude_modules=config.exclude_modules)),
        ("modules_to_save", lambda name: _matches(name, modules_to_save=config.modules_to_save)),
        ("layers_pattern", lambda name: _matches(name, layers_pattern=config.layers_pattern, **layers)),
        ("rank_pattern", lambda name: value_for(config.rank_pattern or {}, name, 0)),
        ("alpha_pattern", lambda name: value_for(config.alpha_pattern or {}, name, 0)),
    ]
    for field, match in checks:
        try:
            for name in names:
                match(name)
        except (re.error, ValueError) as error:  # such as a flag in the middle of the expression
            raise LoRAError(f"{field}: it cannot be matched with names of modules ({error})") from error


def _check_parameters(model: nn.Module, config: LoraConfig, selected: list[str]) -> None:
    """Raises `LoRAError` for an entry of `target_parameters` that matches nothing; PEFT only warns of it."""
    for entry in sorted(config.target_parameters or ()):
        if not any(_names(entry, name) for name in selected):
            near = _near_misses(entry, [name for name, _ in model.named_parameters()], "parameters")
            raise LoRAError(f"target_parameters: {entry!r} matches no parameter; {near}")


def _check_names(model: nn.Module, config: LoraConfig, linear: list[str], converted: set[str]) -> None:
    """Raises `LoRAError` for a name or a layer number that matches nothing; PEFT ignores it (peft#3693).

    Args:
        model: The base.
        config: The adapter's config.
        linear: Names of the base's linear layers.
        converted: Names that PEFT has turned into `target_parameters`.
    """
    names, wanted = [name for name, _ in model.named_modules() if name], config.target_modules
    if wanted is not None and not isinstance(wanted, str):
        for entry in sorted({*wanted} - converted):
            if not any(_names(entry, name) for name in names):
                raise LoRAError(f"target_modules: {entry!r} matches no module; {_near_misses(entry, linear)}")
        if not converted:
            _check_layers([name for name in names if any(_names(entry, name) for entry in wanted)], config)
    excluded = config.exclude_modules
    for entry in () if isinstance(excluded, str) else excluded or ():
        if not any(_names(entry, name) for name in names):
            raise LoRAError(f"exclude_modules: {entry!r} matches no module; {_near_misses(entry, linear)}")


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _explain_none(model: nn.Module, config: LoraConfig, linear: list[str]) -> LoRAError:
    """The error for a config with which PEFT finds no target."""
    wanted: str | Sequence[str] | None = config.target_modules
    wanted = DEFAULT_TARGETS[_model_type(model)] if wanted is None else wanted
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    if everything or any(_matches(name, target_modules=wanted) for name, _ in model.named_modules() if name):
        return LoRAError(
            "target_modules: no module is left to adapt after layers_to_transform, exclude_modules and modules_to_save"
        )
    if isinstance(wanted, str):
        return LoRAError(f"target_modules: the pattern {wanted!r} matches no module; {_pattern_hint(wanted, linear)}")
    return LoRAError(
        f"target_modules: none of {', '.join(sorted(wanted))} names a module of this {type(model).__name__}; "
        "the adapter is for another architecture"
    )


def _explain_parameters(model: nn.Module, found: Selection, strict: bool) -> UnsupportedError:
    """The error for a config with which PEFT adapts parameters outside linear layers: experts and their router."""
    parameters = found.selected_parameters or sorted(found.target_parameters)
    linear = [name for name in found.selected if is_supported(model.get_submodule(name))]
    advice = "name other modules"
    if linear:
        advice = f"to adapt the linear layers alone, set target_modules to [{', '.join(condense(linear, model))}]"
    return UnsupportedError(
        f"target_modules: in this {type(model).__name__} PEFT adapts parameters that are no linear layer's "
        f"({some(parameters)}), by target_parameters, which this LoRA does not implement; "
        f"{advice if strict else 'load this adapter with PEFT'}"
    )


def _renamed_by_peft(model: nn.Module, config: LoraConfig, selected: Sequence[str]) -> list[str]:
    """Modules whose A and B PEFT would rename on loading, as if they came from an older checkpoint.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py
    """
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in selected}
    saved: dict[str, torch.Tensor] = {key: torch.empty(1, 1) for key in keys}
    found = convert_peft_adapter_state_dict_for_transformers(
        model=model, peft_config=config, adapter_state_dict=saved, adapter_name="default"
    )
    return [name for key, name in keys.items() if key not in found]


def condense(names: list[str], model: nn.Module) -> list[str]:
    """The shortest suffixes that select exactly these modules, for `target_modules` of a config file."""
    for parts in (1, 2):  # `c_proj`, or `mlp.c_proj`
        ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
        selected = [name for name, _ in model.named_modules() if any(_names(end, name) for end in ends)]
        if set(selected) == set(names):
            return ends
    return sorted(set(names))


def find_targets(model: nn.Module, config: LoraConfig, strict: bool = True) -> list[str]:
    """Full names of the modules to adapt, see `find_target_modules`."""
    return list(find_target_modules(model, config, strict))


def select(model: nn.Module, config: LoraConfig, strict: bool = True) -> Selection:
    """The modules and parameters that PEFT would adapt.

    Args:
        model: The base model; one on the meta device will do.
        config: `target_modules` is a list of names, a regular expression, `"all-linear"`, or `None` for the default.
        strict: Whether a single name of a list that matches nothing is an error (PEFT ignores it, peft#3693).

    Raises:
        LoRAError: Nothing matches, a name matches nothing, or PEFT would not find its weights in a saved adapter.
    """
    check_expressions(model, config)
    linear = [name for name, module in model.named_modules() if is_supported(module)]
    named = config.target_modules is not None or config.target_parameters
    if not named and _model_type(model) not in DEFAULT_TARGETS:
        raise LoRAError(
            f"there are no default target modules for {_model_type(model) or type(model).__name__}; "
            'set target_modules to a list of names, or to "all-linear"'
        )
    try:
        found = Selection(model, config)
    except LoRAError:
        raise
    except ValueError as error:
        if strict:
            _check_names(model, config, linear, set())
        if isinstance(error, NoMatchingPeftModuleError):
            raise _explain_none(model, config, linear) from error
        raise LoRAError(f"target_modules: PEFT refuses this adapter: {error}") from error
    if strict:
        _check_names(model, config, linear, found.converted)
        _check_parameters(model, config, found.selected_parameters)
    if lost := _renamed_by_peft(model, config, found.selected):
        ends = ", ".join(map(repr, condense(lost, model)))
        raise LoRAError(
            f"target_modules: PEFT would not find {some(lost)} again in a saved adapter, because it renames weights "
            f"on loading, as Transformers does; name others, or add {ends} to exclude_modules"
        )
    return found


def find_target_modules(model: nn.Module, config: LoraConfig, strict: bool = True) -> dict[str, nn.Module]:
    """The modules that the hand-written LoRA adapts, by full name, in the model's own order: those of PEFT.

    Args:
        model: As for `select`.
        config: As for `select`.
        strict: As for `select`.

    Raises:
        UnsupportedError: A match is not a linear layer, PEFT would also adapt parameters outside linear layers, or a
            target shares its weight with another module.
        LoRAError: See `select`.
    """
    found, modules = select(model, config, strict), dict(model.named_modules())
    if found.target_parameters:
        raise _explain_parameters(model, found, strict)
    for name in found.selected:
        if not is_supported(modules[name]):
            layers = ", ".join(sorted({_leaf(item) for item, module in modules.items() if is_supported(module)}))
            advice = f"name others, or add {_leaf(name)!r} to exclude_modules" if strict else "load it with PEFT"
            raise UnsupportedError(
                f"target_modules: {name!r} is {_what(modules[name])}; this LoRA adapts linear "
                f"layers ({layers}); {advice}"
            )
    _refuse_tied(model, found.selected, strict)
    return {name: modules[name] for name in found.selected}


def find_tied(model: nn.Module, targets: Iterable[str]) -> tuple[str, str] | None:
    """The first target that shares its weight with another module, and that module; `None` if there is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(parameter, []).append(name.rpartition(".")[0])
    for target in targets:
        shared = owners[parameters[f"{target}.weight"]] if f"{target}.weight" in parameters else []
        if len(shared) > 1:
            return target, next(name for name in shared if name != target)
    return None


def _refuse_tied(model: nn.Module, targets: Iterable[str], strict: bool) -> None:
    """Raises `UnsupportedError` if a target shares its weight with another module (peft#2018)."""
    if (tied := find_tied(model, targets)) is not None:
        target, other = tied
        advice = f"leave {target!r} out, or train it whole with modules_to_save" if strict else "load it with PEFT"
        raise UnsupportedError(
            f"target_modules: {target!r} shares its weight with {other!r}, so a delta on one would be lost or "
            f"doubled when merged; {advice}"
        )


def _what(module: nn.Module) -> str:
    """The class for a message; for a linear layer also its weight's: `a Linear whose weight is a Float8Tensor`."""
    unknown = isinstance(module, (nn.Linear, Conv1D)) and find_storage(module) is None
    return f"a {type(module).__name__}" + (f" whose weight is a {type(module.weight).__name__}" if unknown else "")


def find_modules_to_save(model: nn.Module, config: LoraConfig, targets: Collection[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` selects (PEFT's rule: the name ends with the entry).

    Raises:
        LoRAError: An entry that the user wrote matches nothing, or a module that holds one of the targets.
    """
    entries = config.modules_to_save
    if not entries:
        return []
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    heads = {head for heads in TASK_HEADS.values() for head in heads}
    for entry in entries:
        if entry not in heads and not any(name.endswith(entry) for name in names):
            raise LoRAError(f"modules_to_save: {entry!r} matches no module; {_near_misses(entry, names, 'modules')}")
    whole = [name for name in names if any(name.endswith(entry) for entry in entries)]
    for inner, outer in itertools.permutations(whole, 2):
        if inner.startswith(f"{outer}."):
            raise LoRAError(
                f"modules_to_save: {inner!r} is inside {outer!r}, which is trained whole already; name one"
            )
    for target in targets:
        if any(f"{target}.".startswith(f"{name}.") for name in whole):
            raise LoRAError(
                f"target_modules: {target!r} is already trained whole by modules_to_save (a name ends with one of "
                f"{', '.join(entries)}); add {_leaf(target)!r} to exclude_modules"
            )
    return whole


def modules_to_save(config: LoraConfig) -> list[str]:
    """`modules_to_save` of the config, with the heads that PEFT adds for its task type."""
    own = config.modules_to_save or []
    return [*own, *(head for head in TASK_HEADS.get(config.task_type or "", ()) if head not in own)]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the backbone, by name."""
    backbone = getattr(model, "base_model_prefix", "")
    if backbone and not hasattr(model, backbone):
        return {}  # the model is a backbone itself
    return {name: value for name, value in model.named_parameters() if not name.startswith(f"{backbone}.")}


def find_new_weights(model: nn.Module, config: LoraConfig, names: Collection[str]) -> set[nn.Parameter]:
    """The frozen parameters that must be saved with the adapter because the base's checkpoint lacks them.

    Otherwise such a head would be initialised anew at every loading (peft#876).

    Args:
        model: The base model, without an adapter.
        config: Parameters in its `modules_to_save` are left out: their trained copy is saved.
        names: Names of the parameters that the base's checkpoint lacks.

    Raises:
        LoRAError: A name is not that of a parameter, or the parameter is quantised or inside the backbone.
    """
    if not names:
        return set()
    parameters, head = dict(model.named_parameters()), head_parameters(model)
    entries = tuple(modules_to_save(config))
    found = set()
    for name in names:
        if name not in parameters:
            raise LoRAError(f"new_weights: {name!r} is not a parameter of this {type(model).__name__}")
        owner = name.rpartition(".")[0]
        if any(parent.endswith(entries) for parent in itertools.accumulate(owner.split("."), "{}.{}".format)):
            continue
        if name not in head:
            raise LoRAError(
                f"new_weights: the base's checkpoint lacks {name!r}, a part of the pretrained model, which would stay "
                f"random; train it whole: add {owner!r} to modules_to_save"
            )
        if is_quantized(model.get_submodule(owner)):
            raise LoRAError(f"new_weights: {name!r} is quantised; add {owner!r} to llm_int8_skip_modules")
        found.add(parameters[name])
    return found


@cache  # there may be more keys than the 512 that `re` caches
def _end(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def value_for(pattern: dict[str, int], name: str, default: int) -> int:
    """The entry of `rank_pattern` or `alpha_pattern` for a module: the first key that matches the end of its name."""
    return next((value for key, value in pattern.items() if _end(key).match(name)), default)


def check_patterns(config: LoraConfig, targets: Collection[str]) -> None:
    """Raises `LoRAError` for a key of `rank_pattern` or `alpha_pattern` that matches no target."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            if not any(map(_end(key).match, targets)):
                raise LoRAError(f"{field}: {key!r} matches no target module; {_near_misses(key, targets)}")
