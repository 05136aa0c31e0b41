"""The two programs of `recipes/`: what each is told, and which of them a recipe is for."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from plainlora.errors import UserError
from plainlora.settings.arguments import (
    ClassifyArguments,
    ClassifyConfig,
    RecipeArguments,
    SFTArguments,
    SFTRecipeConfig,
)
from plainlora.settings.checks import classify_faults, refused_values, sft_faults
from plainlora.settings.parsing import Fault, StrictParser, read_yaml

RecipeT = TypeVar("RecipeT", bound=RecipeArguments)
TrainingT = TypeVar("TrainingT", bound=TrainingArguments)


@dataclass(frozen=True)
class Settings(Generic[RecipeT, TrainingT]):
    """A recipe's settings, read past every fault.

    Attributes:
        recipe: What this project adds.
        script: The data set, as TRL's scripts name it.
        training: How to train, and where to.
        model: The base, how it is stored, and the adapter.
        origins: Where each setting that is not a default came from.
        faults: What the program refuses. What was refused has its default, so that the rest can be looked at.
    """

    recipe: RecipeT
    script: ScriptArguments
    training: TrainingT
    model: ModelConfig
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def parts(self) -> tuple[RecipeT, ScriptArguments, TrainingT, ModelConfig]:
        """The dataclasses, in the order in which a program takes them."""
        return self.recipe, self.script, self.training, self.model

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return str(self.model.model_name_or_path)

    @property
    def inputs(self) -> dict[str, str | None]:
        """What the run reads, by what it is."""
        return {
            "base model": self.model.model_name_or_path,
            "dataset": self.script.dataset_name,
            "test dataset": self.recipe.eval_dataset_name,
            "validation dataset": getattr(self.recipe, "validation_dataset_name", None),
        }


SFTSettings = Settings[SFTArguments, SFTRecipeConfig]
ClassifySettings = Settings[ClassifyArguments, ClassifyConfig]
SettingsT = TypeVar("SettingsT", bound=Settings[Any, Any])


@dataclass(frozen=True)
class Program(Generic[SettingsT]):
    """One of the programs.

    Attributes:
        name: Its file in `recipes/`.
        kinds: The dataclasses of its settings, in the order in which `faults` takes them.
        faults: What of the settings it cannot honour.
    """

    name: str
    kinds: tuple[Any, ...]
    faults: Callable[..., Iterator[str]]

    @property
    def path(self) -> Path:
        """Its file, from a checkout's root."""
        return Path("recipes", self.name)

    def find(self) -> Path:
        """The same, where the working directory is a checkout's root.

        Raises:
            UserError: It is none.
        """
        if not self.path.is_file():
            raise UserError(f"there is no {self.path} here; call this from the root of a checkout")
        return self.path

    def parser(self) -> StrictParser:
        """What reads its flags."""
        return StrictParser(self.kinds)

    def parse(self, words: Sequence[str] | None = None, **standard: Any) -> SettingsT:
        """The settings of a command line that has nothing wrong.

        Args:
            words: The command line; this process's if left out.
            **standard: Other defaults.

        Raises:
            UserError: Every fault of the settings.
        """
        settings = self.read(words, **standard)
        if settings.faults:
            raise UserError(*(fault.error for fault in settings.faults)) from settings.faults[0].error
        return settings

    def read(self, words: Sequence[str] | None = None, **standard: Any) -> SettingsT:
        """The same past every fault.

        Raises:
            UserError: There is nothing to read: the file is no YAML mapping, for one.
        """
        parser = self.parser()
        parser.set_defaults(**standard)
        parts = parser.read(words)
        said = (fault for fault in self.faults(*parts) if _setting_of(fault) not in parser.left_out)
        faults = [*parser.faults, *(Fault("contradiction", UserError(fault)) for fault in said)]
        _set_aside({name for name, _ in refused_values(*parts)} | parser.left_out, parts, parser)
        recipe, script, training, model = parts
        return cast(SettingsT, Settings(recipe, script, training, model, parser.origins, faults))


def _setting_of(fault: str) -> str:
    """A fault begins with the name of the setting."""
    return fault.split(maxsplit=1)[0].rstrip(":")


def _set_aside(names: Collection[str], parts: Sequence[Any], parser: StrictParser) -> None:
    """Gives refused settings their defaults. No length is one that could be meant: rows are then of any length."""
    for name in names:
        for part in (part for part in parts if name in vars(part)):
            setattr(part, name, None if name == "max_length" else parser.standard[name])
            said = "open" if name == "max_length" else "default"
            parser.origins[name] = f"{said}, because of the error above"


SFT: Program[SFTSettings] = Program(
    "sft.py", (SFTArguments, ScriptArguments, SFTRecipeConfig, ModelConfig), sft_faults
)
CLASSIFY: Program[ClassifySettings] = Program(
    "classify.py", (ClassifyArguments, ScriptArguments, ClassifyConfig, ModelConfig), classify_faults
)


def find_program(config: str, flags: Sequence[str] = ()) -> Program[Any]:
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
