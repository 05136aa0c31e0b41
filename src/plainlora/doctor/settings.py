"""A recipe's settings: old names, wrong values and contradictions, and the values of the main settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plainlora.doctor.finding import Examination
from plainlora.settings.programs import Program, Settings, SettingsT

# The main settings, in the order of the recipes' blocks. Others are shown if a recipe sets them.
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
    """A setting's value and its origin: the YAML, the command line, the default, or another reason."""

    name: str
    value: Any
    origin: str


def read_settings(
    program: Program[SettingsT], config: str, flags: Sequence[str], examination: Examination
) -> SettingsT:
    """Reads the program's settings, and goes on after faults.

    Args:
        program: The recipe's program.
        config: The recipe's YAML.
        flags: More of the recipe's flags.
        examination: Gets an error for each fault.

    Raises:
        UserError: The file is not a YAML mapping.
    """
    settings = program.read(["--config", config, *flags])
    for fault in settings.faults:
        read_as = f"; {fault.read_as}" if fault.read_as else ""
        examination.add("error", "settings", fault.check, f"{fault.error}{read_as}")
    if not settings.faults:
        message = f"{len(settings.origins)} from {config} and the command line: no old names, no contradictions"
        examination.add("ok", "settings", "names", message)
    return settings


def list_settings(settings: Settings[Any, Any], decided: dict[str, tuple[Any, str]]) -> list[Setting]:
    """The main settings (`SHOWN`), and any other that the recipe sets.

    Args:
        settings: The settings of either program.
        decided: The values of settings that were left open, and the reasons.
    """
    origins = settings.origins
    values = {name: value for part in settings.parts for name, value in vars(part).items()}
    names = [name for name in SHOWN if name in values]
    names += [name for name in origins if name in values and name not in (*names, *HIDDEN)]
    return [
        Setting(name, *decided[name]) if name in decided else Setting(name, values[name], origins.get(name, "default"))
        for name in names
    ]
