"""The flags that TRL and Transformers lack."""

import json
from dataclasses import dataclass, field
from typing import Literal

import torch

from plainlora.errors import UserError


@dataclass
class RecipeArguments:
    """What a recipe needs beyond TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`."""

    lora_backend: Literal["reference", "peft"] = field(
        default="reference",
        metadata={"help": "Which LoRA to train: `reference`, written by hand in plainlora.lora, or `peft`."},
    )
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Which biases to train, as in peft.LoraConfig."}
    )
    lora_init: Literal["true", "false", "gaussian"] = field(
        default="true", metadata={"help": "How the adapter starts: init_lora_weights of peft.LoraConfig."}
    )
    lora_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names to leave out of lora_target_modules."}
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt; all of them if left out."}
    )
    lora_rank_pattern: dict[str, int] | str | None = field(
        default=None, metadata={"help": 'Other ranks for some modules, as JSON: {"q_proj": 4}.'}
    )
    lora_alpha_pattern: dict[str, int] | str | None = field(
        default=None, metadata={"help": 'Other alphas for some modules, as JSON: {"q_proj": 8}.'}
    )
    adapter_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the trained adapter, whatever the base is stored in."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local file of the test rows, if dataset_name does not hold them."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of rows to hold out for testing, if there is no test split."},
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only, for a trial."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "`alpaca`, `llama2`, or a .jinja file; the tokenizer's own chat template if left out."},
    )
    on_overflow: Literal["drop", "truncate"] = field(
        default="drop",
        metadata={"help": "What happens to a row longer than max_length. A truncated row is trained without its EOS."},
    )
    max_overflow: float = field(
        default=0.01, metadata={"help": "Share of rows that may be longer than max_length before it is an error."}
    )
    exact_match_rows: int = field(
        default=0, metadata={"help": "Answer this many test rows before and after, and report the exact matches."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts that base and tuned model answer at the end."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    merge: bool = field(
        default=False, metadata={"help": "Also write the merged model to output_dir/merged, and check it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of another run in output_dir."})

    def __post_init__(self) -> None:
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            parse_pattern(name, getattr(self, name))
        size = float(self.test_split_size or 0)
        if not (0 <= size < 1 or (size > 0 and size.is_integer())):
            raise UserError(f"test_split_size is a share below 1 or a whole number of rows, not {size}")


def parse_pattern(name: str, value: dict[str, int] | str | None) -> dict[str, int]:
    """`{"q_proj": 4}` from its JSON.

    Raises:
        UserError: It is not JSON, or not a mapping to whole numbers.
    """
    try:
        pattern = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error}); write it as '{{\"q_proj\": 4}}'") from error
    if not isinstance(pattern, dict) or not all(type(number) is int and number > 0 for number in pattern.values()):
        raise UserError(f"{name} maps module names to whole numbers above 0, as in '{{\"q_proj\": 4}}', not {value!r}")
    return pattern


def dtype_of(name: str | None) -> torch.dtype | str:
    """`"bfloat16"` -> `torch.bfloat16`; `"auto"` stays, for `from_pretrained`."""
    return "auto" if name in (None, "auto") else getattr(torch, name)
