"""The search space of a sweep: names, ranges and choices, and their translation to the recipe's flags."""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

from plainlora.base.config import load_config
from plainlora.errors import UserError, did_you_mean
from plainlora.experiments.runs import OWN_FLAGS
from plainlora.settings.arguments import PROJECTIONS
from plainlora.settings.programs import CLASSIFY, Program
from plainlora.tasks.projections import ARCHITECTURES

# The default search of a classifier. A name with + in it is several flags that get the same value.
LORA = {"learning_rate": "1e-5..5e-3", "lora_r": "2|4|8|16|32", "lora_alpha": "8|16|32|64|128"}
WEIGHTS = {
    "last_layers": {"learning_rate": "1e-5..1e-2", "weight_decay": "0..0.1"},
    "full": {"learning_rate": "5e-6..2e-4", "weight_decay": "0..0.1"},
}
# Of a language model: the learning rate, which matters most, then the rank and, where PEFT knows them, the targets.
LANGUAGE = {
    "lora": {"learning_rate": "1e-5..5e-3", "lora_r": "4|8|16|32|64"},
    "last_layers": {"learning_rate": "1e-5..5e-3"},
    "full": {"learning_rate": "1e-6..1e-3"},
}


def parse_spec(name: str, spec: str) -> BaseDistribution:
    """Parses `1e-5..1e-3` (a range, logarithmic from a ratio of 10), `2..5` (whole numbers) or `4|8|16` (a choice).

    Choices are kept as text, so that the recipe's own parser reads them. A comma in one separates the words of a list.

    Raises:
        UserError: It is none of these, or the range or choice is empty.
    """
    form = "write a range such as 1e-5..1e-3, whole numbers such as 2..5, or a choice such as 4|8|16"
    if ".." not in spec:
        choices = spec.split("|")
        if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            raise UserError(f"--search {name}={spec} is not a choice of different values; {form}")
        return CategoricalDistribution(choices)
    ends = spec.split("..", 1)
    try:
        low, high = map(float, ends)
    except ValueError as error:
        raise UserError(f"--search {name}={spec}: the ends of a range are numbers; {form}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--search {name}={spec}: the first end must be below the second; {form}")
    if all(re.fullmatch(r"[+-]?\d+", end) for end in ends):
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=low > 0 and high / low >= 10)


def default_search(program: Program[Any], settings: dict[str, Any], fixed: set[str]) -> dict[str, str]:
    """The default search of a finetuning mode.

    Args:
        program: The recipe's program.
        settings: From `resolve`.
        fixed: Names that flags set, which are not searched.

    Raises:
        UserError: The base model's config cannot be loaded.
    """
    if program is not CLASSIFY:
        search = LANGUAGE[settings["method"]] | (_targets(settings) if settings["method"] == "lora" else {})
    elif settings["method"] != "lora":
        search = dict(WEIGHTS[settings["method"]])
    else:
        search = LORA | ({} if settings["lora_target_modules"] else _projections(settings))
    if settings["adapter_name_or_path"]:  # which keeps its own rank, alpha and targets
        search = {"learning_rate": search["learning_rate"]}
    return {name: spec for name, spec in search.items() if not fixed & set(name.split("+"))}


def _architecture(settings: dict[str, Any]) -> str | None:
    """The base's `model_type`, if the settings name a base."""
    name = settings["model_name_or_path"]
    trust = bool(settings.get("trust_remote_code"))
    return load_config(str(name), settings["model_revision"], trust).model_type if name else None


def _targets(settings: dict[str, Any]) -> dict[str, str]:
    """Every linear layer, or PEFT's default targets; nothing if these are not known, or other settings name layers."""
    names = DEFAULT_TARGETS.get(_architecture(settings) or "")
    named = any(settings[f"lora_{name}"] for name in ("layers_to_transform", "rank_pattern", "alpha_pattern"))
    return {"lora_target_modules": f"all-linear|{','.join(names)}"} if names and not named else {}


def _projections(settings: dict[str, Any]) -> dict[str, str]:
    """Every projection on or off; projections that share a weight (GPT-2's query, key, value) together."""
    table = ARCHITECTURES.get(_architecture(settings) or "", {})
    groups: dict[str, list[str]] = {}
    for projection in PROJECTIONS:
        if not (projection == "head" and settings["train_head"]):
            groups.setdefault(table.get(projection, projection), []).append(f"lora_{projection}")
    return {"+".join(flags): "true|false" for flags in groups.values()}


@cache
def _lists(program: Program[Any]) -> frozenset[str]:
    """The flags of a program that take several words."""
    return frozenset(action.dest for action in program.parser()._actions if action.nargs in ("+", "*"))


def words_of(program: Program[Any], flag: str, value: object) -> list[str]:
    """A flag with its value as words of a command line; for a list, a word for each value."""
    values = value if isinstance(value, list) else str(value).split(",")
    return [f"--{flag}", *map(str, values)] if flag in _lists(program) else [f"--{flag}={value}"]


def parse_search(program: Program[Any], words: Sequence[str], fixed: set[str]) -> dict[str, str]:
    """`["lora_r=4|8"]` -> `{"lora_r": "4|8"}`, with names and values checked by the recipe's own parser.

    Raises:
        UserError: A word is not `NAME=SPEC`; a name is unknown, or set by a flag; a value is refused.
    """
    search: dict[str, str] = {}
    parser = program.parser()
    known = vars(parser.parse_known_args([])[0])
    seen: set[str] = set()
    for word in words:
        name, equals, spec = word.partition("=")
        if not equals:
            raise UserError(f"--search {word}: write NAME=SPEC, as in --search learning_rate=1e-5..1e-3")
        for flag in name.split("+"):
            if flag not in known:
                hint = did_you_mean(flag, known, f"see {program.path} --help", cutoff=0.6)
                raise UserError(f"--search {word}: {flag} is not an option; {hint}")
            if flag in seen:
                raise UserError(f"--search: {flag} is given twice; keep one of them")
            if flag in fixed or flag in OWN_FLAGS or flag == "method":
                raise UserError(f"--search {word}: {flag} is the same in every trial")
            seen.add(flag)
            for value in _examples(parse_spec(name, spec)):
                parser.parse_known_args(words_of(program, flag, value))
        search[name] = spec
    return search


def _examples(distribution: BaseDistribution) -> Sequence[Any]:
    """All choices, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return distribution.low, distribution.high


def own_values(program: Program[Any], space: dict[str, BaseDistribution], settings: dict[str, Any]) -> dict[str, Any]:
    """The config's own values, as far as they are in the search space; the sweep tries them first."""
    parser = program.parser()
    values: dict[str, Any] = {}
    for name, distribution in space.items():
        flag = name.split("+")[0]

        def read(value: object, flag: str = flag) -> Any:
            return vars(parser.parse_known_args(words_of(program, flag, value))[0])[flag]

        if settings[flag] is None:
            continue
        own = read(settings[flag])
        if isinstance(distribution, CategoricalDistribution):
            equal = [choice for choice in distribution.choices if read(choice) == own]
        else:
            low, high = _examples(distribution)
            equal = [own] if low <= own <= high else []
        if equal:
            values[name] = equal[0]
    return values


def to_flags(program: Program[Any], parameters: dict[str, Any]) -> list[str]:
    """A trial's parameters as the recipe's flags."""
    pairs = [(flag, value) for name, value in parameters.items() for flag in name.split("+")]
    return [word for flag, value in pairs for word in words_of(program, flag, value)]


def no_projection(parameters: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a trial switches off every projection, which leaves LoRA nothing to adapt."""
    flags = [f"lora_{projection}" for projection in PROJECTIONS]
    values = {flag: value for name, value in parameters.items() for flag in name.split("+")}
    return not values.keys().isdisjoint(flags) and all(
        str(values.get(flag, settings[flag])).lower() == "false" for flag in flags
    )
