"""The two programs of `recipes/`: the settings of each, and which of them a recipe is for."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from plainlora.errors import UserError
from plainlora.settings.adapter import twice_given
from plainlora.settings.arguments import (
    ClassifyArguments,
    ClassifyConfig,
    RecipeArguments,
    SFTArguments,
    SFTRecipeConfig,
)
from plainlora.settings.checks import classify_faults, refused_values, sft_faults
from plainlora.settings.held_locks import warn_of_held_locks
from plainlora.settings.launcher import asks_for_deepspeed
from plainlora.settings.parsing import Fault, StrictParser, read_yaml

RecipeT = TypeVar("RecipeT", bound=RecipeArguments)
TrainingT = TypeVar("TrainingT", bound=TrainingArguments)


@dataclass(frozen=True)
class Settings(Generic[RecipeT, TrainingT]):
    """A recipe's settings.

    Attributes:
        recipe: The flags that this project adds.
        script: The data set.
        training: How to train, and the output folder.
        model: The base, how it is stored, and the adapter.
        origins: Where each setting that is not a default came from.
        faults: What the program refuses. Refused settings have their defaults, so that the rest can be examined.
    """

    recipe: RecipeT
    script: ScriptArguments
    training: TrainingT
    model: ModelConfig
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def parts(self) -> tuple[RecipeT, ScriptArguments, TrainingT, ModelConfig]:
        """The dataclasses, in the order in which the program parses them."""
        return self.recipe, self.script, self.training, self.model

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return str(self.model.model_name_or_path)

    @property
    def inputs(self) -> dict[str, str | None]:
        """The Hub ids and paths that the run reads."""
        return {
            "base model": self.model.model_name_or_path,
            "dataset": self.script.dataset_name,
            "test dataset": self.recipe.eval_dataset_name,
            "validation dataset": getattr(self.recipe, "validation_dataset_name", None),
            "adapter": self.recipe.adapter_name_or_path,
        }


SFTSettings = Settings[SFTArguments, SFTRecipeConfig]
ClassifySettings = Settings[ClassifyArguments, ClassifyConfig]
SettingsT = TypeVar("SettingsT", bound=Settings[Any, Any])


@dataclass(frozen=True)
class Program(Generic[SettingsT]):
    """One of the programs.

    Attributes:
        name: Its file in `recipes/`.
        dataclass_types: The dataclasses of its settings, in the order in which `faults` takes them.
        faults: Yields what is wrong with the settings.
    """

    name: str
    dataclass_types: tuple[Any, ...]
    faults: Callable[..., Iterator[str]]

    @property
    def path(self) -> Path:
        """The program's file, relative to a checkout's root."""
        return Path("recipes", self.name)

    def find(self) -> Path:
        """The program's file, if the working directory is a checkout's root.

        Raises:
            UserError: It is not.
        """
        if not self.path.is_file():
            raise UserError(f"there is no {self.path} here; call this from the root of a checkout")
        return self.path

    def parser(self) -> StrictParser:
        """A parser of the program's flags."""
        return StrictParser(self.dataclass_types)

    def parse(self, words: Sequence[str] | None = None, **defaults: Any) -> SettingsT:
        """The settings of a command line.

        Args:
            words: The command line; this process's if left out.
            **defaults: Other defaults.

        Raises:
            UserError: The settings have faults; the error lists all.
        """
        settings = self.read(words, **defaults)
        if settings.faults:
            raise UserError(*(fault.error for fault in settings.faults)) from settings.faults[0].error
        return settings

    def read(self, words: Sequence[str] | None = None, **defaults: Any) -> SettingsT:
        """As `parse`, but faults are only collected in the settings' `faults`.

        Raises:
            UserError: Nothing can be read, for example because the file is not a YAML mapping.
        """
        if asks_for_deepspeed():
            warn_of_held_locks()
        parser = self.parser()
        parser.set_defaults(**defaults)
        parts = parser.read(words)
        recipe, script, training, model = parts
        found = [*self.faults(*parts), *twice_given(model, recipe, parser.origins)]
        messages = (fault for fault in found if _setting_of(fault) not in parser.left_out)
        faults = [*parser.faults, *(Fault("contradiction", UserError(message)) for message in messages)]
        _reset({name for name, _ in refused_values(*parts)} | parser.left_out, parts, parser)
        return cast(SettingsT, Settings(recipe, script, training, model, parser.origins, faults))


def _setting_of(fault: str) -> str:
    """The name of the setting, with which a fault begins."""
    return fault.split(maxsplit=1)[0].rstrip(":")


def _reset(names: Collection[str], parts: Sequence[Any], parser: StrictParser) -> None:
    """Gives refused settings their defaults, and a refused `max_length` no limit."""
    for name in names:
        for part in (part for part in parts if name in vars(part)):
            setattr(part, name, None if name == "max_length" else parser.defaults[name])
            reset_to = "open" if name == "max_length" else "default"
            parser.origins[name] = f"{reset_to}, because of the error above"


SFT: Program[SFTSettings] = Program(
    "sft.py", (SFTArguments, ScriptArguments, SFTRecipeConfig, ModelConfig), sft_faults
)
CLASSIFY: Program[ClassifySettings] = Program(
    "classify.py", (ClassifyArguments, ScriptArguments, ClassifyConfig, ModelConfig), classify_faults
)


def find_program(config: str, flags: Sequence[str] = ()) -> Program[Any]:
    """The program that a recipe is for: it has more of the settings that the other one lacks. On a tie, `sft.py`.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags.

    Raises:
        UserError: The file is not a YAML mapping.
    """
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    given |= read_yaml(config).keys()
    sft, classify = (
        {field.name for kind in program.dataclass_types for field in fields(kind)} for program in (SFT, CLASSIFY)
    )
    return CLASSIFY if len(given & (classify - sft)) > len(given & (sft - classify)) else SFT
