"""The two programs of `recipes/`: what each is told, and which of them a recipe is for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trl import ModelConfig, ScriptArguments

from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments, SFTRecipeConfig
from plainlora.settings.checks import classify_faults, sft_faults
from plainlora.settings.parsing import read_yaml


@dataclass(frozen=True)
class Program:
    """One of the programs.

    Attributes:
        name: Its file in `recipes/`.
        kinds: The dataclasses of its settings, in the order in which `faults` takes them.
        faults: What of the settings it cannot honour.
    """

    name: str
    kinds: tuple[Any, ...]
    faults: Callable[..., Iterator[str]]


SFT = Program("sft.py", (SFTArguments, ScriptArguments, SFTRecipeConfig, ModelConfig), sft_faults)
CLASSIFY = Program("classify.py", (ClassifyArguments, ScriptArguments, ClassifyConfig, ModelConfig), classify_faults)


def find_program(config: str, flags: Sequence[str] = ()) -> Program:
    """Which program a recipe is for: the one that more of its settings belong to alone; `sft.py` if none does.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags.

    Raises:
        UserError: The file is no YAML mapping.
    """
    said = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    said |= read_yaml(config).keys()
    sft, classify = ({field.name for kind in program.kinds for field in fields(kind)} for program in (SFT, CLASSIFY))
    return CLASSIFY if len(said & (classify - sft)) > len(said & (sft - classify)) else SFT
