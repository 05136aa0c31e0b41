"""A recipe's settings read on past every error: stale names, wrong values, contradictions, all of them at once."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from plainlora.doctor.finding import Examination
from plainlora.errors import UserError
from plainlora.settings.checks import refused_values
from plainlora.settings.parsing import StrictParser, read_yaml, set_environment
from plainlora.settings.programs import Program
from plainlora.settings.renames import RENAMES

# What decides how a run ends, in the order of the recipes' blocks. Others are shown where a recipe sets them.
SHOWN = (
    *("model_name_or_path", "model_revision", "dtype", "load_in_4bit", "use_bnb_nested_quant", "base_dropout"),
    *("method", "lora_backend", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "adapter_dtype"),
    *("dataset_name", "prompt_template", "max_length", "on_overflow", "max_truncated", "packing"),
    *("completion_only_loss", "text_column", "label_column", "labels", "balance_classes"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("gradient_checkpointing", "bf16", "fp16", "train_sampling_strategy", "seed"),
    *("eval_strategy", "save_strategy", "output_dir", "report_to", "merge"),
)
HIDDEN = ("activation_checkpointing", "hub_token", "push_to_hub_token")  # another name for one shown; secrets


@dataclass(frozen=True)
class Setting:
    """What a setting will be, and where that comes from: the YAML, the command line, the default, or why else."""

    name: str
    value: Any
    origin: str


class _PatientParser(StrictParser):
    """Writes down what a dataclass refuses, and goes on without the setting that it refuses."""

    def __init__(self, dataclass_types: Sequence[Any], examination: Examination) -> None:
        super().__init__(dataclass_types)
        self.examination = examination
        self.standard = {action.dest: action.default for action in self._actions}

    def make(self, kind: Any, settings: dict[str, Any]) -> Any:
        """See `StrictParser.make`; every refusal is an error found."""
        standard = {name: self.standard[name] for name in settings}
        while True:
            try:
                return super().make(kind, settings)
            except UserError as error:
                if settings == standard:
                    raise
                self.examination.add("error", "settings", "contradiction", str(error))
                fewer = next(self._with_fewer(kind, settings, str(error)), standard)
                left_out = [name for name in self.origins if name in settings and settings[name] != fewer[name]]
                self.origins |= dict.fromkeys(left_out, "default, because of the error above")
                settings = fewer

    def _with_fewer(self, kind: Any, settings: dict[str, Any], said: str) -> Iterator[dict[str, Any]]:
        """The settings without one of those given: first what is accepted, then what is refused for another reason."""
        refused = []
        for name in reversed([name for name in self.origins if name in settings]):
            fewer = settings | {name: self.standard[name]}
            try:
                super().make(kind, fewer)
            except UserError as error:
                refused += [fewer] if str(error) != said else []
            else:
                yield fewer
        yield from refused


def read_settings(
    program: Program, config: str, flags: Sequence[str], examination: Examination
) -> tuple[tuple[Any, ...], dict[str, str]]:
    """The program's dataclasses, and where each setting that is not a default came from.

    Args:
        program: Which program the recipe is for.
        config: The recipe's YAML.
        flags: More of its flags.
        examination: Told of every name, value and combination that the program would refuse.

    Raises:
        UserError: The file is no YAML mapping.
    """
    parser = _PatientParser(program.kinds, examination)
    content = read_yaml(config)
    examination.ask("settings", "env", set_environment, config, content.pop("env", None) or {})
    kept: dict[str, Any] = {}
    left_out: set[str] = set()
    from_yaml: list[str] = []
    for name, value in content.items():
        try:
            from_yaml += parser.as_words(config, name, value)
            kept[name] = value
        except UserError as error:
            today, meant = _meant(str(name), value, parser.names, content.keys() | kept.keys())
            words = []
            if today is not None:
                try:
                    words = parser.as_words(config, today, meant)
                except UserError:
                    today = None
            examination.add("error", "settings", _check_of(name, parser), f"{error}; {_read_as(today, meant)}")
            if today is None:
                left_out.add(_todays(str(name)))
            else:
                from_yaml += words
                kept[today] = meant
    typed = list(_typed(flags, parser, examination, left_out))
    parts = parser.build(config, kept, from_yaml, typed)
    for fault in program.faults(*parts):
        examination.add("error", "settings", "contradiction", fault)
    _set_aside({*refused_values(*parts), *(left_out - parser.origins.keys())}, parts, parser)
    if not examination.at("error"):
        said = f"{len(content)} in {config} and {sum(word.startswith('--') for word in typed)} flags, none stale"
        examination.add("ok", "settings", "names", said + ", none that contradict each other")
    return parts, parser.origins


def _set_aside(names: set[str], parts: Sequence[Any], parser: _PatientParser) -> None:
    """Gives refused settings their defaults, so that what depends on them can be examined.

    No length is a default that could be meant: rows are then of any length.
    """
    for name in names:
        for part in (part for part in parts if name in vars(part)):
            setattr(part, name, None if name == "max_length" else parser.standard[name])
            said = "open" if name == "max_length" else "default"
            parser.origins[name] = f"{said}, because of the error above"


def _todays(name: str) -> str:
    """Today's name of a setting, as far as there is one."""
    name = name.replace("-", "_")
    rename = RENAMES.get(name)
    return name if rename is None or rename.today is None else rename.today


def _check_of(name: object, parser: StrictParser) -> str:
    return "value" if name in parser.names else "name"


def _read_as(today: str | None, meant: object) -> str:
    return "left out here" if today is None else f"read here as {today}: {meant}"


def _meant(name: str, value: Any, names: Sequence[str], there: set[str]) -> tuple[str | None, Any]:
    """Today's name and value of a stale setting; `None` where nobody but its author knows, or it stands there too."""
    rename = RENAMES.get(name.replace("-", "_"))
    if rename is None or rename.today not in names or rename.today in there or rename.translate is None:
        return None, None
    meant = rename.translate(value)
    return (None, None) if meant is None else (rename.today, meant)


def _typed(flags: Sequence[str], parser: StrictParser, examination: Examination, left_out: set[str]) -> Iterator[str]:
    """The words of a command line that can be read, flag by flag, stale ones under today's name.

    The names of those that cannot be read are added to `left_out`.
    """
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for group in groups:
        try:
            parser.check_typed(group)
        except UserError as error:
            flag, _, glued = group[0].partition("=")
            values = [glued] if glued else group[1:]
            name = flag.lstrip("-").replace("-", "_")
            today, meant = _meant(name, values[0] if values else True, parser.names, set())
            examination.add("error", "settings", _check_of(name, parser), f"{error}; {_read_as(today, meant)}")
            if today is None:
                left_out.add(_todays(name))
                continue
            renamed = [f"--{today}", str(meant), *values[1:]]
            with suppress(UserError):
                parser.check_typed(renamed)
                yield from renamed
        else:
            yield from group


def list_settings(parts: Sequence[Any], origins: dict[str, str], decided: dict[str, tuple[Any, str]]) -> list[Setting]:
    """The settings that matter: those of `SHOWN`, and any other that the recipe sets.

    Args:
        parts: The program's dataclasses.
        origins: From `read_settings`.
        decided: What a setting that was left open will be, and why.
    """
    values = {name: value for part in parts for name, value in vars(part).items()}
    names = [name for name in SHOWN if name in values]
    names += [name for name in origins if name in values and name not in (*names, *HIDDEN)]
    return [
        Setting(name, *decided[name]) if name in decided else Setting(name, values[name], origins.get(name, "default"))
        for name in names
    ]
