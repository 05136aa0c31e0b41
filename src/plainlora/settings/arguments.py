"""The flags that this project adds to those of TRL and Transformers."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from plainlora.errors import UserError

PROJECTIONS = ("query", "key", "value", "projection", "mlp", "head")  # each a flag of `classify.py`, lora_query etc.


@dataclass
class RecipeArguments:
    """The flags of both programs beyond TRL's `ScriptArguments` and `ModelConfig`."""

    method: Literal["lora", "last_layers", "full"] = field(
        default="lora",
        metadata={
            "help": "What to train: LoRA, the last layers only, or every weight. The last two do not use lora_*, "
            "train_head and adapter_dtype."
        },
    )
    last_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "What `--method last_layers` trains: names of modules, or a number N: the last N blocks, the "
            "final norm and the head. If left out, a classifier's head, or 1 block of a language model."
        },
    )
    lora_backend: Literal["fused", "reference", "peft", "peft_fused"] = field(
        default="fused",
        metadata={
            "help": "Which LoRA to train: `reference`, written by hand in plainlora.lora and equal to PEFT's to the "
            "last bit; `fused`, the same in less time and memory, equal up to rounding; `peft`; or `peft_fused`, "
            "a PeftModel with the fused layers."
        },
    )
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Which biases to train, as in peft.LoraConfig."}
    )
    lora_init: Literal["true", "false", "gaussian"] = field(
        default="true", metadata={"help": "How the adapter is initialised: init_lora_weights of peft.LoraConfig."}
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
    lora_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Any other field of peft.LoraConfig, as JSON: {"init_lora_weights": "pissa"}. What the '
            "hand-written LoRA does not implement is trained by PEFT's own code, lora_backend peft_fused."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Go on training a saved adapter: a folder or a Hub id, of this project or of another tool that "
            "writes PEFT's files. Its own config is kept."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+: the learning rate of B divided by that of A, which is learning_rate. 16 is usual."},
    )
    adapter_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the trained adapter, whatever the base is stored in."}
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata={
            "help": "`bf16`: the base as it is stored, its products in bfloat16, adapter and softmax in float32; "
            "`fp32`: everything in float32; `auto`: bf16 if the CPU or GPU has units for it. What --bf16, --fp16 and "
            "--dtype say on the command line is kept."
        },
    )
    base_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Every dropout probability of the frozen base; the base's own if left out. Not the adapter's, "
            "which is lora_dropout."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local file of the test rows, if dataset_name does not hold them."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of rows to hold out for testing, if there is no test split."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations in a row without a better metric_for_best_model, and keep the "
            "best checkpoint's weights. It sets load_best_model_at_end, and evaluates and saves at every tenth of the "
            "run if eval_steps and save_steps are left out."
        },
    )
    merge: bool = field(
        default=False, metadata={"help": "Also write the merged model to output_dir/merged, and check it."}
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base, for --push_to_hub if the base is a local folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of another run in output_dir."})

    def __post_init__(self) -> None:
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            parse_pattern(name, getattr(self, name))
        parse_mapping("lora_config", self.lora_config)
        check_size("test_split_size", self.test_split_size)


@dataclass
class SFTArguments(RecipeArguments):
    """The flags of `recipes/sft.py` beyond TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`."""

    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only, for a trial."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "`alpaca`, `llama2`, or a .jinja file; the tokenizer's own chat template if left out."},
    )
    on_overflow: Literal["drop", "truncate"] = field(
        default="drop",
        metadata={"help": "What happens to a row longer than max_length. A truncated row is trained without its EOS."},
    )
    max_truncated: float = field(
        default=0.01, metadata={"help": "Share of rows that may be longer than max_length before it is an error."}
    )
    exact_match_rows: int = field(
        default=0, metadata={"help": "Answer this many test rows before and after, and report the exact matches."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts that base and tuned model answer at the end."}
    )
    sample_steps: int | None = field(
        default=None,
        metadata={"help": "Also answer the sample prompts every this many optimizer steps, into samples.md."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})


@dataclass
class SFTRecipeConfig(SFTConfig):
    """TRL's `SFTConfig`, in which `gradient_checkpointing` may be `None`: the program then decides.

    `activation_checkpointing`, Transformers' newer name for it, is then `None` too.
    """

    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass instead of keeping them; if left out, only if "
            "they would not fit into the free memory.",
            "nargs": "?",
            "const": True,
        },
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When --push_to_hub publishes: at the end, because checkpoints are not."}
    )

    def __post_init__(self) -> None:
        if self.gradient_checkpointing_kwargs or self.activation_checkpointing_kwargs:  # these imply it
            self.gradient_checkpointing = self.gradient_checkpointing is not False
        if self.greater_is_better is None and self.metric_for_best_model in ("perplexity", "eval_perplexity"):
            self.greater_is_better = False  # Transformers maximises every metric whose name does not end in loss
        is_open = self.gradient_checkpointing is None and self.activation_checkpointing is None
        super().__post_init__()
        if is_open:
            self.gradient_checkpointing = self.activation_checkpointing = None


@dataclass
class ClassifyArguments(RecipeArguments):
    """The flags of `recipes/classify.py` beyond `ScriptArguments`, `ClassifyConfig` and `ModelConfig`."""

    lora_query: bool = field(default=False, metadata={"help": "LoRA on the query projections."})
    lora_key: bool = field(default=False, metadata={"help": "LoRA on the key projections."})
    lora_value: bool = field(default=False, metadata={"help": "LoRA on the value projections."})
    lora_projection: bool = field(default=False, metadata={"help": "LoRA on the attention's output projections."})
    lora_mlp: bool = field(default=False, metadata={"help": "LoRA on the feed-forward layers."})
    lora_head: bool = field(default=False, metadata={"help": "LoRA on the classification head, which stays frozen."})
    train_head: bool = field(
        default=False,
        metadata={"help": "Train the head whole beside the adapters (modules_to_save, the usual choice with PEFT)."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, as names or numbers."})
    labels: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in order; as found in the data if left out."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of a csv or tsv file that has no header line."}
    )
    dataset_validation_split: str = field(default="validation", metadata={"help": "Name of the validation split."})
    validation_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local file of the validation rows."}
    )
    validation_split_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of rows to hold out for validation, if there is no such split."},
    )
    balance_classes: bool = field(
        default=False, metadata={"help": "Cut every class to the size of the smallest before splitting."}
    )
    on_empty: Literal["drop", "keep", "error"] = field(
        default="drop", metadata={"help": "What happens to a row with an empty text."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Texts are cut to this many tokens; to the model's context if left out."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Train on this many rows, drawn at random with each class's share kept."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Validate and test on this many rows each, drawn in the same way."}
    )
    measured_train_rows: int = field(
        default=1000, metadata={"help": "How many training rows the accuracy on training rows is measured on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("validation_split_size", self.validation_split_size)


@dataclass
class ClassifyConfig(TrainingArguments):
    """Transformers' `TrainingArguments` with other defaults: batches of similar lengths, a log every 10 steps."""

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "How batches are drawn; `group_by_length` puts texts of similar lengths together.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many steps; a number below 1 is a share of all steps."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When --push_to_hub publishes: at the end, because checkpoints are not."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Mixed precision in bfloat16; as `precision` says if left out."}
    )

    def __post_init__(self) -> None:
        self.bf16 = bool(self.bf16)
        super().__post_init__()


def check_size(name: str, size: float | None) -> None:
    """Raises `UserError` unless a split's size is a share below 1 or a whole number of rows."""
    number = float(size or 0)
    if not (0 <= number < 1 or (number > 0 and number.is_integer())):
        raise UserError(f"{name} is a share below 1 or a whole number of rows, not {number}")


def parse_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """`{"use_rslora": true}` from its JSON.

    Raises:
        UserError: It is not JSON, or not a mapping.
    """
    try:
        mapping = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error}); write it as '{{\"use_rslora\": true}}'") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{name} maps names of fields to values, as in '{{\"use_rslora\": true}}', not {value!r}")
    return mapping


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


def optim_name(training: TrainingArguments) -> str:
    """The optimizer's name on the command line."""
    return str(getattr(training.optim, "value", training.optim))
