"""The built-in suite of cases."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig

from plainlora.parity.case import Case
from plainlora.parity.tiny import (
    CONFIGS,
    VOCABULARY,
    byte_tokenizer,
    llama_config,
    quantized_model,
    random_batch,
    random_model,
)

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Repeat the input.", "input": "one two", "output": "one two"},
    {"instruction": "Add one.", "input": "41", "output": "42"},
    {"instruction": "Say yes.", "input": "", "output": "yes"},
    {"instruction": "Which word is last?", "input": "sun moon star", "output": "star"},
    {"instruction": "Name an animal.", "input": "", "output": "A goose."},
]


def training_arguments(steps: int, **options: Any) -> dict[str, Any]:
    """The arguments of both trainers: every step is logged, nothing else is written.

    The learning rate is 1e-3. Even if a gradient is zero except for rounding, such as that of a key's bias, Adam moves
    the weight by the learning rate. At 1e-2 the gradient norms of two correct implementations differ by 1e-5 within 50
    steps; at 1e-3 by 2e-7.
    """
    return {
        "output_dir": "unused",
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "use_cpu": not torch.accelerator.is_available(),
    } | options


def _causal(
    name: str,
    make_base: Callable[[], PreTrainedModel],
    steps: int,
    training: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    adapter: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1}
    batch = random_batch(VOCABULARY)
    return Case(
        name=name,
        make_base=make_base,
        config=LoraConfig(**(adapter | options)),
        inputs=batch,
        arguments=SFTConfig(
            **training_arguments(steps, max_length=512, completion_only_loss=False, **(training or {}))
        ),
        rows=Dataset.from_list(ROWS),
        tokenizer=byte_tokenizer(),
        prompts=batch["input_ids"][:, :8],
    )


def built_in_cases(steps: int) -> Iterator[Case]:
    """The suite: storages, architectures, dtypes, and every supported initialisation.

    alpha / r is 1.5, not a power of two, so that another order of operations shows in the last bit.
    """

    def llama() -> PreTrainedModel:
        return random_model(llama_config())

    def gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return random_model(CONFIGS["gpt2"](), dtype)

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    yield _causal("Llama, nn.Linear", llama, steps, target_modules="all-linear")
    yield _causal("GPT-2, Conv1D", gpt2, steps, target_modules="all-linear")
    yield _causal("Qwen2, PEFT's targets", lambda: random_model(CONFIGS["qwen2"]()), steps)
    yield Case(
        name="DistilBERT, classifier",
        make_base=lambda: random_model(CONFIGS["distilbert"]()),
        config=LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_lin", "v_lin", "lin1"]
        ),
        inputs=random_batch(VOCABULARY, classes=2, rows=6),
        arguments=TrainingArguments(**training_arguments(steps)),
    )
    yield _causal("Llama, NF4", lambda: quantized_model(llama_config(), **nf4), steps)
    yield _causal(
        "Llama, NF4 nested", lambda: quantized_model(llama_config(), bnb_4bit_use_double_quant=True, **nf4), steps
    )
    yield _causal("Llama, 8-bit", lambda: quantized_model(llama_config(), load_in_8bit=True), steps)
    yield _causal(
        *("GPT-2, patterns, rsLoRA, biases", gpt2, steps),
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"c_fc": 3},
        alpha_pattern={r"h\.1\.attn\.c_attn": 5},
        use_rslora=True,
        bias="lora_only",
    )
    yield _causal("Llama, head trained whole", llama, steps, modules_to_save=["lm_head"])
    yield _causal("Llama, gaussian start", llama, steps, init_lora_weights="gaussian")
    yield _causal("GPT-2, random start", gpt2, steps, init_lora_weights=False)
    yield _causal("Llama, DoRA", llama, steps, target_modules="all-linear", use_dora=True)
    yield _causal("GPT-2, fp64", lambda: gpt2(torch.float64), steps)
    yield _causal("Llama, bf16", lambda: random_model(llama_config(), torch.bfloat16), steps)
    yield _causal("Llama, checkpointing", llama, steps, training={"gradient_checkpointing": True})
    yield _causal("GPT-2, packed", gpt2, steps, training={"packing": True})
