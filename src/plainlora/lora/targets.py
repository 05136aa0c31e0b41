"""What a `LoraConfig` selects on a model. Every name must match, and every target must be one LoRA can wrap."""

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache

from peft import LoraConfig, TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from plainlora.lora.errors import LoRAError
from plainlora.lora.storage import is_quantized, is_supported
from plainlora.lora.time_limit import time_limit

# The new heads that PEFT trains and saves whole beside the adapters.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

MATCH_SECONDS = 10.0  # a field's patterns on all names of a model take less than a thousandth of it
BYPASSING_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
BYPASSED = {"out_proj", "conv1d"}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _names(entry: str, module_name: str) -> bool:
    """PEFT's rule for an entry of a list: the whole name, or its end after a dot."""
    return module_name == entry or module_name.endswith(f".{entry}")


def _near_misses(entry: str, candidates: Iterable[str], kind: str = "linear layers") -> str:
    leaves = sorted({_leaf(name) for name in candidates if not _leaf(name).isdigit()})
    near = difflib.get_close_matches(_leaf(entry), leaves, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"the {kind} are {', '.join(leaves)}"


def _pattern_hint(pattern: str, linear: Iterable[str]) -> str:
    if re.fullmatch(r"[\w.]+([, ]+[\w.]+)+", pattern):  # several names in one text
        return f"for several names write a list: [{', '.join(re.split('[, ]+', pattern))}]"
    return _near_misses(pattern, linear)


def _is_excluded(name: str, config: LoraConfig) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    if excluded and any(_names(entry, name) for entry in excluded):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ())


def _layer_of(name: str, config: LoraConfig) -> int | None:
    """PEFT's rule for the layer that a module lies in: the first number in its name. A head lies in none."""
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]*"]:
        prefix = r".*?\." if not patterns else r"(?:^|.*?\.)"
        if match := re.match(rf"{prefix}{pattern}\.(?P<layer>\d+)\.", name):
            return int(match["layer"])
    return None


def _in_layers(names: list[str], wanted: Collection[str], config: LoraConfig, strict: bool) -> list[str]:
    """The names that `layers_to_transform` lets through; as in PEFT, also each that is written out in full."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return names
    layers = [layers] if isinstance(layers, int) else layers
    numbers = {name: _layer_of(name, config) for name in names}
    unknown = [layer for layer in layers if layer not in numbers.values()]
    if strict and unknown:
        there = sorted({number for number in numbers.values() if number is not None})
        has = f"they lie in the layers {there[0]} to {there[-1]}" if there else "they lie in no layer"
        raise LoRAError(f"layers_to_transform: there is no target module in layer {unknown[0]}; {has}")
    return [name for name in names if name in wanted or numbers[name] in layers]


def check_patterns_end(model: nn.Module, config: LoraConfig) -> None:
    """Raises `LoRAError` for a field whose regular expressions fail, or have no end, on a model's names."""
    names = [name for name, _ in model.named_modules()]
    whole = re.compile(config.target_modules if isinstance(config.target_modules, str) else "")
    excluding = "exclude_modules" if isinstance(config.exclude_modules, str) else "modules_to_save"
    checks: list[tuple[str, Callable[[str], object]]] = [
        ("target_modules", whole.fullmatch),
        (excluding, lambda name: _is_excluded(name, config)),
        ("layers_pattern", lambda name: _layer_of(name, config)),
        ("rank_pattern", lambda name: value_for(config.rank_pattern or {}, name, 0)),
        ("alpha_pattern", lambda name: value_for(config.alpha_pattern or {}, name, 0)),
    ]
    for field, match in checks:
        try:
            with time_limit(MATCH_SECONDS):
                for name in names:
                    match(name)
        except (re.error, ValueError) as error:  # such as a group of a name, or a flag, that has no place there
            raise LoRAError(f"{field}: it cannot be matched with names of modules ({error})") from error
        except TimeoutError as error:
            raise LoRAError(
                f"{field}: what it says takes more than {MATCH_SECONDS:g} seconds to be matched with the names of "
                f"this {type(model).__name__}; write it without repetitions in repetitions, or list names"
            ) from error


def _check_all_excluded(names: Iterable[str], linear: Iterable[str], config: LoraConfig) -> None:
    """PEFT lets a name that excludes nothing pass, and then adapts what was to be left out."""
    excluded = config.exclude_modules
    for entry in () if isinstance(excluded, str) else excluded or ():
        if not any(_names(entry, name) for name in names):
            raise LoRAError(f"exclude_modules: {entry!r} matches no module; {_near_misses(entry, linear)}")


def _all_linear(model: nn.Module, config: LoraConfig) -> list[str]:
    """Every linear layer but the output head (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 4)."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return [name for name, module in model.named_modules() if is_supported(module) and module is not head]


def default_targets(model: nn.Module) -> list[str] | str:
    """PEFT's own choice for the architecture, as of the installed version: names or a regular expression.

    Raises:
        LoRAError: PEFT has no default for this architecture.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise LoRAError(
            f"there are no default target modules for {model_type or type(model).__name__}; "
            'set target_modules to a list of names, or to "all-linear"'
        )
    targets = DEFAULT_TARGETS[model_type]
    return targets if isinstance(targets, str) else list(targets)


def condense(names: list[str], model: nn.Module) -> list[str]:
    """The shortest ends of names that select exactly these modules: what a config file should say."""
    for parts in (1, 2):  # `c_proj`, or `mlp.c_proj`
        ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
        selected = [name for name, _ in model.named_modules() if any(_names(end, name) for end in ends)]
        if set(selected) == set(names):
            return ends
    return sorted(set(names))


def find_targets(model: nn.Module, config: LoraConfig, strict: bool = True) -> list[str]:
    """Full names of the modules to adapt, see `find_target_modules`."""
    return list(find_target_modules(model, config, strict))


def find_target_modules(model: nn.Module, config: LoraConfig, strict: bool = True) -> dict[str, nn.Module]:
    """The modules to adapt by full name, in the model's own order.

    Args:
        model: The base model.
        config: `target_modules` is a list of names, a regular expression, `"all-linear"`, or `None` for the default.
        strict: Whether a single name of a list that matches nothing is an error (PEFT lets it pass, peft#3693).

    Raises:
        LoRAError: Nothing matches, a name matches nothing, or a match is not a linear layer.
    """
    check_patterns_end(model, config)
    wanted = config.target_modules
    if wanted is None:
        wanted = default_targets(model)
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if is_supported(module)]

    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        matched = _all_linear(model, config)
    elif isinstance(wanted, str):
        matched = [name for name in modules if name and re.fullmatch(wanted, name)]
        if not matched:
            raise LoRAError(
                f"target_modules: the pattern {wanted!r} matches no module; {_pattern_hint(wanted, linear)}"
            )
    else:
        matched = [name for name in modules if name and any(_names(entry, name) for entry in wanted)]
        for entry in sorted(wanted):
            if strict and not any(_names(entry, name) for name in matched):
                raise LoRAError(f"target_modules: {entry!r} matches no module; {_near_misses(entry, linear)}")
        if not matched:
            raise LoRAError(
                f"target_modules: none of {', '.join(sorted(wanted))} names a module of this {type(model).__name__}; "
                "the adapter is for another architecture"
            )
        matched = _in_layers(matched, wanted, config, strict)

    if strict:
        _check_all_excluded(modules, linear, config)
    targets = [name for name in matched if not _is_excluded(name, config)]
    if not targets:
        raise LoRAError(
            "target_modules: no module is left to adapt after layers_to_transform, exclude_modules and modules_to_save"
        )
    for name in targets:
        if not is_supported(modules[name]):
            raise LoRAError(
                f"target_modules: {name!r} is a {type(modules[name]).__name__}; LoRA here adapts linear layers "
                f"({', '.join(sorted({_leaf(item) for item in linear}))})"
            )
    _refuse_bypassed(model, targets)
    return {name: modules[name] for name in targets}


def _refuse_bypassed(model: nn.Module, targets: list[str]) -> None:
    """Mamba's fused kernels read these weights without calling the modules, so an adapter there would do nothing.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
    (`_check_lora_target_modules_mamba`)
    """
    if getattr(getattr(model, "config", None), "model_type", None) in BYPASSING_MODELS:
        for name in targets:
            if _leaf(name) in BYPASSED:
                raise LoRAError(
                    f"target_modules: {name!r} cannot be adapted, because Mamba layers read its weight without "
                    f"calling it; name other modules, or add {_leaf(name)!r} to exclude_modules"
                )


def find_modules_to_save(model: nn.Module, config: LoraConfig, targets: Collection[str]) -> list[str]:
    """Full names of the modules trained whole beside the adapters (PEFT's rule: the name ends with the entry).

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
    """The entries of the config, and the heads that PEFT adds to them for its task: a new head must be trained."""
    own = config.modules_to_save or []
    return [*own, *(head for head in TASK_HEADS.get(config.task_type or "", ()) if head not in own)]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the backbone, by name: what a task adds to a pretrained checkpoint."""
    backbone = getattr(model, "base_model_prefix", "")
    if backbone and not hasattr(model, backbone):
        return {}  # the model is a backbone itself
    return {name: value for name, value in model.named_parameters() if not name.startswith(f"{backbone}.")}


def find_new_weights(model: nn.Module, config: LoraConfig, names: Collection[str]) -> set[nn.Parameter]:
    """The parameters that must be saved with the adapter because neither the base's checkpoint nor it holds them.

    A head that is neither trained nor in a checkpoint would be drawn anew at every loading (peft#876).

    Args:
        model: The base model, untouched.
        config: A parameter of one of its `modules_to_save` is left out: the trained copy is saved.
        names: Names of the parameters that the base's checkpoint lacks.

    Raises:
        LoRAError: A name is no parameter's, or its parameter is quantised or inside the backbone.
    """
    if not names:
        return set()
    parameters, head = dict(model.named_parameters()), head_parameters(model)
    entries = tuple(modules_to_save(config))
    found = set()
    for name in names:
        if name not in parameters:
            raise LoRAError(f"new_weights: {name!r} is no parameter of this {type(model).__name__}")
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


@cache  # there may be more keys than the 512 that `re` remembers
def _end(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def value_for(pattern: dict[str, int], name: str, default: int) -> int:
    """The entry of `rank_pattern` or `alpha_pattern` for a module: the first key that matches the end of its name."""
    return next((value for key, value in pattern.items() if _end(key).match(name)), default)


def check_patterns(config: LoraConfig, targets: Collection[str]) -> None:
    """Raises `LoRAError` for a key of `rank_pattern` or `alpha_pattern` that fits no target."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            if not any(map(_end(key).match, targets)):
                raise LoRAError(f"{field}: {key!r} matches no target module; {_near_misses(key, targets)}")
