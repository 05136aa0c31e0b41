"""Reads settings: the YAML first, then the command line. Nothing is ignored, and all faults are reported at once.

Both go through one argument parser, so a value from the YAML is checked exactly as one from the command line.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, TrlParser

from plainlora.errors import EXTRAS, UserError, did_you_mean
from plainlora.settings.arguments import ClassifyArguments, SFTArguments
from plainlora.settings.device import fit_formats, this_device
from plainlora.settings.early_stopping import fit_early_stopping
from plainlora.settings.renames import RENAMES

# Settings that only one of the programs has.
OWNERS = {"sft.py": (SFTArguments, SFTConfig), "classify.py": (ClassifyArguments,)}


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, in which a repeated key is an error (else the last one wins), and so is an alias."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a repeated key."""
        seen: set[Hashable] = set()
        for part, _ in node.value:
            key = self.construct_object(part, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused by the safe loader itself
            if key in seen:
                raise UserError(f"{self.name}: {key!r} is given twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuses aliases: a few nested ones can expand to more values than memory holds."""
        if self.check_event(yaml.AliasEvent):
            raise UserError(f"{self.name}: an alias (*{self.peek_event().anchor}) is not read; write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader.

    Raises:
        UserError: The file is missing, is not YAML, is not a mapping, or names a key twice.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, StrictLoader)  # noqa: S506  # a SafeLoader
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; the recipes are recipes/*/*.yaml") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, or an impossible date
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path} must be a YAML mapping of `name: value` lines; it is {found}")
    return content


# Beginnings of the names of variables that torch and Hugging Face's libraries read once, when they are imported.
READ_AT_IMPORT = ("HF_HOME", "HF_HUB_", "HF_DATASETS_", "TRANSFORMERS_", "OMP_", "MKL_", "KMP_")


def set_environment(path: str, variables: object) -> None:
    """Exports the `env:` block of a YAML.

    Raises:
        UserError: It is not a mapping, a variable comes too late, or the system refuses a name or a value.
    """
    if not isinstance(variables, dict):
        raise UserError(f"{path}: env must be a mapping of variables, not a {type(variables).__name__}")
    for name, value in variables.items():
        if str(name).startswith(READ_AT_IMPORT):
            raise UserError(f"{path}: env: {name} was read when the libraries were imported; set it in the shell")
        try:
            os.environ[str(name)] = "" if value is None else str(value)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: env: {name!r} cannot be set ({error})") from error


@dataclass(frozen=True)
class Fault:
    """A setting that is refused.

    Attributes:
        check: `env`, `name`, `value`, or `contradiction` (with other settings or the machine).
        error: What is wrong, where, and what to do.
        read_as: How the doctor reads it nevertheless, in one clause; may be empty.
    """

    check: str
    error: UserError
    read_as: str = ""


# Fields of Transformers' and TRL's dataclasses that are for scripts of another kind; see `RENAMES` for what to do.
READ_BY_NOTHING = ("do_train", "do_eval", "do_predict", "use_peft")


class StrictParser(TrlParser):
    """`TrlParser` in which nothing is ignored: unknown keys, wrong types and bad choices are errors (trl#1564).

    It goes on after a fault, to find them all: an old name is read as its new one, other faulty settings are left out.

    Attributes:
        origins: After parsing, where each setting that is not a default came from.
        faults: After parsing, all faults in the order in which they were found.
        left_out: After parsing, the settings that have their defaults because of a fault.
        defaults: The default of each setting.
    """

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._types = {name: kind for owner in dataclass_types for name, kind in get_type_hints(owner).items()}
        self.defaults = {action.dest: action.default for action in self._actions}
        for action in [action for action in self._actions if action.dest in READ_BY_NOTHING]:
            self._remove_action(action)
            for option in action.option_strings:
                del self._option_string_actions[option]
        self.origins: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.left_out: set[str] = set()

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage of some three hundred flags, as argparse does."""
        raise UserError(message)

    @cached_property
    def names(self) -> list[str]:
        """The names of all settings."""
        return sorted({action.dest for action in self._actions if action.dest != "help"})

    def refuse_unknown(self, name: str, where: str) -> NoReturn:
        """Raises `UserError` for an unknown name, and suggests its new name or the nearest one."""
        name = name.replace("-", "_")
        hint = did_you_mean(name, self.names, "see --help for the names")
        for program, owners in OWNERS.items():
            if name in {field.name for owner in owners for field in fields(owner)}:
                hint = f"it belongs to recipes/{program}"
        if name == "config":
            hint = "--config names the recipe's file, once"
        if name in RENAMES and RENAMES[name].today in (None, *self.names):
            hint = RENAMES[name].hint()
        raise UserError(f"{where} is not an option; {hint}")

    def as_words(self, path: str, name: str, value: Any) -> list[str]:
        """One line of the YAML as words of a command line, checked by argparse.

        A list or a null is set as a default instead, and no words are returned.

        Raises:
            UserError: The name is unknown, or the value is refused.
        """
        if name not in self.names:
            self.refuse_unknown(str(name), f"{path}: {name}")
        kind = self._types[name]
        if value is None:
            if NoneType not in get_args(kind):
                raise UserError(f"{path}: {name} has no value; give one, or leave the line out")
            self.set_defaults(**{name: None})
            return []
        if isinstance(value, list):
            if "list[" not in str(kind):
                raise UserError(f"{path}: {name} takes one value, not a list")
            self.set_defaults(**{name: self._convert(f"{path}: {name}", name, value)})
            return []
        if isinstance(value, dict):
            if "dict[" not in str(kind):
                raise UserError(f"{path}: {name} takes one value, not a mapping")
            words = [f"--{name}", self._as_json(f"{path}: {name}", value)]
        else:
            words = [f"--{name}={self._as_typed(name, value)}"]
        try:
            self.parse_known_args(words)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return words

    def _as_typed(self, name: str, value: Any) -> Any:
        """A value as it would be typed. YAML reads `no` as false, which is undone for settings with a choice `no`."""
        if not isinstance(value, bool):
            return value
        choices = next(action.choices for action in self._actions if action.dest == name) or ()
        return "no" if not value and "no" in choices else str(value).lower()

    @staticmethod
    def _as_json(where: str, value: dict[Any, Any]) -> str:
        try:
            return json.dumps(value, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: the mapping cannot be written as JSON ({error}); fix its names") from error

    def _convert(self, where: str, name: str, values: list[Any]) -> list[Any]:
        """Converts every entry of a list as argparse would."""
        kind = next(action.type for action in self._actions if action.dest == name)
        converted = []
        for value in values:
            if value is None or isinstance(value, (list, dict)):
                raise UserError(f"{where}: an entry of the list is one value, not {value!r}")
            if isinstance(value, bool):
                raise UserError(f"{where}: YAML reads yes, no, on and off as true and false; put the entry in quotes")
            try:
                converted.append(kind(str(value)) if callable(kind) else str(value))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise UserError(f"{where}: {error}") from error
        return converted

    def check_typed(self, words: Sequence[str]) -> None:
        """Raises `UserError` for an unknown option or a wrong value on a command line."""
        _, unknown = self.parse_known_args(list(words))
        if unknown:
            word = unknown[0].partition("=")[0]
            self.refuse_unknown(word.lstrip("-"), word)

    def parse(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parses `--config FILE` and the command line into the dataclasses, in their order.

        Raises:
            UserError: Anything is unknown or refused by a dataclass; the error lists all faults.
        """
        parts = self.read(args)
        if self.faults:
            raise UserError(*(fault.error for fault in self.faults)) from self.faults[0].error
        return parts

    def read(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """As `parse`, but faults are only collected in `faults`.

        Raises:
            UserError: Nothing can be read: the file is not a YAML mapping, or `--config` is given twice.
        """
        path, typed = split_config(sys.argv[1:] if args is None else args)
        content: dict[str, Any] = {}
        if path is not None:
            content = read_yaml(path)
            try:
                set_environment(path, content.pop("env", None) or {})
            except UserError as error:
                self.faults.append(Fault("env", error))
        from_yaml, kept = self._read_yaml_lines(str(path), content)
        return self._build(path, kept, from_yaml, list(self._read_words(typed)))

    def _read_yaml_lines(self, path: str, content: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The lines of a YAML as words of a command line, and the names of the settings read."""
        words: list[str] = []
        kept: list[str] = []
        for name, value in content.items():
            try:
                words += self.as_words(path, name, value)
                kept.append(name)
            except UserError as error:
                today, meant = self._as_renamed(str(name), value, {*content, *kept})
                if today is not None:
                    try:
                        words += self.as_words(path, today, meant)
                        kept.append(today)
                    except UserError:
                        today = None
                self._add_fault(str(name), error, today, meant)
        return words, kept

    def _read_words(self, typed: Sequence[str]) -> Iterator[str]:
        """The valid words of a command line, flag by flag, with old names replaced."""
        groups: list[list[str]] = []
        for word in typed:
            if word.startswith("--") or not groups:
                groups.append([])
            groups[-1].append(word)
        for group in groups:
            try:
                self.check_typed(group)
                yield from group
            except UserError as error:
                flag, _, glued = group[0].partition("=")
                values = [glued] if glued else group[1:]
                name = flag.lstrip("-").replace("-", "_")
                today, meant = self._as_renamed(name, values[0] if values else True, set())
                renamed = [f"--{today}", str(meant), *values[1:]]
                if today is not None:
                    with suppress(UserError):
                        self.check_typed(renamed)
                        yield from renamed
                self._add_fault(name, error, today, meant)

    def _add_fault(self, name: str, error: UserError, today: str | None, meant: object) -> None:
        if today is None:
            self.left_out.add(_current_name(name))
        read_as = "left out here" if today is None else f"read here as {today}: {meant}"
        self.faults.append(Fault("value" if name in self.names else "name", error, read_as))

    def _as_renamed(self, name: str, value: Any, there: Collection[str]) -> tuple[str | None, Any]:
        """The new name and value of an old setting; `None` if they cannot be derived, or the new name is set too."""
        rename = RENAMES.get(name.replace("-", "_"))
        if rename is None or rename.today not in self.names or rename.today in there or rename.translate is None:
            return None, None
        meant = rename.translate(value)
        return (None, None) if meant is None else (rename.today, meant)

    def _build(
        self, path: str | None, kept: Sequence[str], from_yaml: list[str], typed: Sequence[str]
    ) -> tuple[Any, ...]:
        """The dataclasses, in their order.

        Args:
            path: The YAML.
            kept: Names of its settings, in order.
            from_yaml: Its settings as words, from `as_words`.
            typed: The command line, checked.
        """
        explicit = {word[2:].partition("=")[0].replace("-", "_") for word in typed if word.startswith("--")}
        parsed = self.parse_known_args([*from_yaml, *typed])[0]
        fitted = fit_formats(parsed, {*kept, *explicit}, explicit, this_device(parsed.use_cpu))
        try:
            fitted |= fit_early_stopping(parsed, {*kept, *explicit})
        except UserError as error:
            self.faults.append(Fault("contradiction", error))
        words = [f"--{name}={str(value).lower()}" for name, (value, _) in fitted.items()]
        self.origins = dict.fromkeys(kept, str(path)) | {name: why for name, (_, why) in fitted.items()}
        self.origins |= dict.fromkeys(explicit, "command line")
        self.left_out -= self.origins.keys()
        settings = vars(self.parse_known_args([*from_yaml, *words, *typed])[0])
        return tuple(
            self._make_accepted(
                kind, {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
            )
            for kind in self.dataclass_types
        )

    def _make_accepted(self, kind: Any, settings: dict[str, Any]) -> Any:
        """One of the dataclasses; settings that it refuses get their defaults."""
        defaults = {name: self.defaults[name] for name in settings}
        while True:
            try:
                return self._make(kind, settings)
            except UserError as error:
                if settings == defaults:
                    raise
                self.faults.append(Fault("contradiction", error))
                fewer = next(self._with_fewer(kind, settings, str(error)), defaults)
                refused = [name for name in self.origins if name in settings and settings[name] != fewer[name]]
                self.origins |= dict.fromkeys(refused, "default, because of the error above")
                settings = fewer

    def _with_fewer(self, kind: Any, settings: dict[str, Any], message: str) -> Iterator[dict[str, Any]]:
        """Yields the settings with one of those given reset: accepted ones first, then those with another error."""
        refused = []
        for name in reversed([name for name in self.origins if name in settings]):
            fewer = settings | {name: self.defaults[name]}
            try:
                self._make(kind, fewer)
            except UserError as error:
                refused += [fewer] if str(error) != message else []
            else:
                yield fewer
        yield from refused

    def _make(self, kind: Any, settings: dict[str, Any]) -> Any:
        """One of the dataclasses.

        Raises:
            UserError: The dataclass refuses the settings.
            ModuleNotFoundError: A package of an extra is missing, which no change of the settings would fix.
        """
        try:
            return kind(**settings)
        except (ValueError, ArithmeticError, ImportError, OSError) as error:
            forget_deepspeed()
            absent = EXTRAS.keys() & re.findall(r"\w+", str(error).lower())
            if isinstance(error, ImportError) and absent:
                raise ModuleNotFoundError(name=absent.pop()) from error
            if isinstance(error, PackageNotFoundError):  # its text has a preface
                raise UserError(f"{str(error.name).strip()} Install it, or leave out what asks for it") from error
            raise UserError(str(error)) from error


def _current_name(name: str) -> str:
    """The new name of a setting that was renamed, else the name itself."""
    name = name.replace("-", "_")
    rename = RENAMES.get(name)
    return name if rename is None or rename.today is None else rename.today


def forget_deepspeed() -> None:
    """Unregisters the DeepSpeed config, of refused arguments or of a run that has ended.

    Transformers registers a DeepSpeed config before it reads it. If the arguments are then refused, the incomplete
    config stays registered while anything refers to it, such as the traceback, and every model made meanwhile fails
    with an AttributeError. After a run under ZeRO-3, every model would be loaded in parts, by all processes together:
    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/deepspeed.py
    """
    unset_hf_deepspeed_config()


def split_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of `--config FILE`, and the other words of a command line.

    Raises:
        UserError: It is given twice, or without a file.
    """
    typed = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in typed:
        return None, typed
    at = typed.index("--config")
    if not "".join(typed[at + 1 : at + 2]):
        raise UserError("--config needs the path of a YAML file")
    if "--config" in typed[at + 1 :]:
        raise UserError("--config is given twice; keep one of them")
    return typed[at + 1], typed[:at] + typed[at + 2 :]
