"""Optimizer steps of a language model through the real SFTTrainer, at the sizes that the recipes train."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS
from plainlora.base.dropout import set_dropouts
from plainlora.base.loading import load_causal_lm
from plainlora.bench.baton import Baton
from plainlora.bench.case import AS_SHIPPED, FLOOR, FUSED, MATCHED, PEFT, REFERENCE, Case, Target
from plainlora.bench.rows import draw_lengths, make_rows
from plainlora.bench.turns import Turns
from plainlora.fusing import fuse
from plainlora.loss_head import use_one_pass_head
from plainlora.parity.tiny import byte_tokenizer, random_model
from plainlora.training.trainers import AdapterTrainer, hand_over

SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
TINY_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2}
CONFIGS: dict[str, Callable[[bool], PretrainedConfig]] = {
    "gpt2": lambda full: GPT2Config(**({} if full else {"n_embd": 64, "n_layer": 2, "n_head": 2}) | SPECIAL),
    "qwen2": lambda full: Qwen2Config(
        **({"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
           if full else {"hidden_size": 64, "intermediate_size": 128} | TINY_HEADS),
        num_key_value_heads=2, vocab_size=151_936 if full else 1000, tie_word_embeddings=True, **SPECIAL,
    ),
    "llama2": lambda full: LlamaConfig(  # the class's own sizes are those of 7b
        **({} if full else {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000} | TINY_HEADS), **SPECIAL
    ),
}  # fmt: skip
FIRST = {"gpt2": "c_attn", "qwen2": "q_proj", "llama2": "q_proj"}
TWO_LINES = "peft, two lines more"
KEPT, BF16, NO_CHECKPOINTING = "fused, base dropouts kept", "fused, bf16", "fused, no checkpointing"


def cases(suite: str, size: str, device: str) -> list[Case]:
    """Matched and as shipped; Llama-2-7b matched alone, and on a GPU alone."""
    if suite == "llama2":
        return _llama2_cases(size, device)
    options = {"model": suite, "size": size, "r": 2, "rows": "alpaca", "length": 1024 if size == "full" else 64}
    lean = {"gradient_checkpointing": False, "bf16": device == "cuda"}
    matched = {arm: {"backend": arm, "training": lean, "base_dropout": 0.0} for arm in (FUSED, PEFT, FLOOR)}
    if suite == "gpt2":  # two more arms of Qwen2 would not fit into 24 GiB beside these
        matched[REFERENCE] = matched[FUSED] | {"backend": REFERENCE}
        matched[TWO_LINES] = matched[PEFT] | {"two_lines": True}
    own_dropout = 0.0 if suite == "gpt2" else None  # as the recipe says
    shipped: dict[str, dict[str, Any]] = {FUSED: {"backend": FUSED, "training": lean, "base_dropout": own_dropout}}
    if suite == "gpt2":
        shipped[KEPT] = {"backend": FUSED, "training": lean}
    if device == "cpu":
        bf16 = {"gradient_checkpointing": False, "bf16": True}
        shipped[BF16] = {"backend": FUSED, "training": bf16, "base_dropout": own_dropout}
    shipped[PEFT] = {"backend": PEFT, "training": {}}
    wanted = {
        "gpt2": ((0.60, 0.35), (Target("time", PEFT, 0.35), Target("peak", PEFT, 0.8))),
        "qwen2": ((0.70, 0.65), (Target("time", PEFT, 0.50),)),
    }
    (time, peak), as_shipped = wanted[suite]
    both = (Target("time", PEFT, time), Target("peak above weights", PEFT, peak))
    name = {"gpt2": "GPT-2 124M", "qwen2": "Qwen2-0.5B"}[suite] + ", r=2 on every linear layer, packed 1 x 1024"
    return [
        Case(suite, name, matched, options, MATCHED, both),
        Case(suite, name, shipped, options, AS_SHIPPED, as_shipped),
    ]


def _llama2_cases(size: str, device: str) -> list[Case]:
    options = {"model": "llama2", "size": size, "r": 8, "length": 512 if size == "full" else 32, "batch": 4}
    options |= {"p": 0.1, "nf4": True}
    with_gc, without = ({"gradient_checkpointing": on, "bf16": device == "cuda"} for on in (True, False))
    gigabyte = 1e9
    return [
        Case(
            suite="llama2",
            name="Llama-2-7b NF4, r=8 on q_proj and v_proj, 4 x 512",
            arms={
                FUSED: {"backend": FUSED, "training": with_gc},
                NO_CHECKPOINTING: {"backend": FUSED, "training": without},
                PEFT: {"backend": PEFT, "training": with_gc},
                REFERENCE: {"backend": REFERENCE, "training": with_gc},
                FLOOR: {"backend": FLOOR, "training": with_gc},
            },
            options=options,
            table=MATCHED,
            targets=(
                Target("time", PEFT, 0.85),
                Target("peak", "", 5.8 * gigabyte),
                Target("time", PEFT, 0.62, NO_CHECKPOINTING),
                Target("peak", "", 12 * gigabyte, NO_CHECKPOINTING),
            ),
            not_run="" if device == "cuda" or size != "full" else "no GPU",
        )
    ]


def _nf4_model(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """Random weights through a checkpoint on disk, as a user's are, into NF4; computing in bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return load_causal_lm(folder, dtype=dtype, quantization=quantization)


def take_part(arm: str, options: dict[str, Any], turns: Turns) -> None:
    """Trains until there are no more turns.

    The floor is the frozen base: an adapter of rank 1 in its first block alone, so that the gradient passes through
    the whole of it.
    """
    del arm
    backend, length = options["backend"], options["length"]
    config = CONFIGS[options["model"]](options["size"] == "full")
    if options.get("base_dropout") is not None:
        set_dropouts(config, options["base_dropout"])
    model = _nf4_model(config, turns.device) if options.get("nf4") else random_model(config)
    adapter: dict[str, Any] = {"r": options["r"], "lora_alpha": 2 * options["r"], "target_modules": "all-linear"}
    if options["model"] == "llama2":
        adapter["target_modules"] = ["q_proj", "v_proj"]
    if backend == FLOOR:
        adapter |= {"r": 1, "target_modules": [FIRST[options["model"]]], "layers_to_transform": [0]}
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=options.get("p", 0.0), **adapter)
    lengths = draw_lengths(options["rows"], 240, length) if options.get("rows") else [length] * 64
    rows = make_rows(lengths, config.vocab_size)
    arguments = SFTConfig(
        output_dir=turns.scratch,
        per_device_train_batch_size=options.get("batch", 1),
        max_length=length,
        packing=bool(options.get("rows")),
        max_steps=1_000_000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=turns.device == "cpu",
        dataloader_pin_memory=turns.device != "cpu",
        **options["training"],
    )
    common: dict[str, Any] = {
        "train_dataset": rows,
        "processing_class": byte_tokenizer(),
        "callbacks": [Baton(turns, "step")],
    }
    if backend == PEFT:
        trainer: SFTTrainer = SFTTrainer(model, args=arguments, peft_config=lora, **common)
        if options.get("two_lines"):
            fuse(trainer.model)  # type: ignore[type-var]
            use_one_pass_head(trainer)
    else:
        form = BACKENDS[FUSED if backend == FLOOR else backend]
        adapted = form.attach(model, lora)
        trainer = AdapterTrainer(adapted, form, args=hand_over(arguments), **common)
    trainer.train()
