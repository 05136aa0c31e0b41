"""Optimizer steps of a language model through the real SFTTrainer, at the sizes that the recipes train."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerCallback,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from benchmarks.case import AS_SHIPPED, FLOOR, FUSED, MATCHED, PEFT, REFERENCE, Case, Target
from benchmarks.rows import draw_lengths, make_rows
from benchmarks.step_timer import StepTimer
from benchmarks.timer import Timer
from plainlora.backends import BACKENDS, Backend
from plainlora.base.dropout import set_dropouts
from plainlora.base.loading import keep_4bit_weights_unpacked
from plainlora.fast.fuse import fuse
from plainlora.parity.case import seed_everything
from plainlora.parity.tiny import byte_tokenizer, random_model
from plainlora.resources.plan import Plan
from plainlora.training.trainers import AdapterTrainer, adapter_precision_kept, args_for_sft

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
    options |= {"packed": True}
    lean = {"gradient_checkpointing": False, "bf16": device == "cuda"}
    matched = {form: {"backend": form, "training": lean, "base_dropout": 0.0} for form in (FUSED, PEFT, FLOOR)}
    if suite == "gpt2":  # two more variants of Qwen2 would not fit into 24 GiB beside these
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
    options |= {"p": 0.1, "nf4": True, "dtype": "bfloat16" if device == "cuda" else "float32"}
    with_gc, without = ({"gradient_checkpointing": on, "bf16": device == "cuda"} for on in (True, False))
    gigabyte = 1e9
    return [
        Case(
            suite="llama2",
            name="Llama-2-7b NF4, r=8 on q_proj and v_proj, 4 x 512",
            variants={
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


def plan_run(options: dict[str, Any], device: str, folder: str) -> Plan:
    """A variant's run: base, adapter, rows and arguments, before a weight is made.

    The floor is the frozen base: an adapter of rank 1 in its first block alone, so that the gradient passes through
    the whole of it.

    Args:
        options: Of the case and the variant.
        device: `cpu` or `cuda`.
        folder: For whatever the trainer writes.
    """
    config = CONFIGS[options["model"]](options["size"] == "full")
    if options.get("base_dropout") is not None:
        set_dropouts(config, options["base_dropout"])
    adapter: dict[str, Any] = {"r": options["r"], "lora_alpha": 2 * options["r"], "target_modules": "all-linear"}
    if options["model"] == "llama2":
        adapter["target_modules"] = ["q_proj", "v_proj"]
    if options["backend"] == FLOOR:
        adapter |= {"r": 1, "target_modules": [FIRST[options["model"]]], "layers_to_transform": [0]}
    batch, packed, lengths = options.get("batch", 1), bool(options.get("packed")), row_lengths(options)
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_length=options["length"],
        packing=packed,
        max_steps=1_000_000,
        train_sampling_strategy="sequential",  # each variant's step number i is over the same rows
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        **options["training"],
    )
    return Plan(
        config=config,
        lora=LoraConfig(task_type="CAUSAL_LM", lora_dropout=options.get("p", 0.0), **adapter),
        training=arguments,
        model_args=ModelConfig(dtype=options.get("dtype", "float32"), load_in_4bit=bool(options.get("nf4"))),
        longest=options["length"] if packed else max(lengths),
        rows=len(lengths),
        tokens=sum(lengths),
        backend=BACKENDS[FUSED if options["backend"] == FLOOR else options["backend"]],
    )


def row_lengths(options: dict[str, Any]) -> list[int]:
    """Tokens of each row, all the same or a data set's.

    Rows that are not packed go from the longest to the shortest, as `train_sampling_strategy: group_by_length` sorts
    each fifty batches: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_pt_utils.py
    """
    if "rows" not in options:
        return [options["length"]] * 64
    lengths = draw_lengths(options["rows"], options.get("count", 240), options["length"])
    return lengths if options.get("packed") else sorted(lengths, reverse=True)


def random_base(plan: Plan) -> PreTrainedModel:
    """The base with the same random weights every time.

    One that is quantised is drawn and quantised where it is trained, so that no checkpoint, 13.5 GB of Llama-2-7b, is
    written or read; what the dense weights took is given back to the device.
    """
    if plan.quantization is None:
        return random_model(plan.config, plan.dtype)
    seed_everything(0)
    with torch.device(plan.device):
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(plan.config), dtype=plan.dtype)
    model: PreTrainedModel = type(dense).from_pretrained(
        None,
        config=copy.deepcopy(plan.config),
        state_dict=dense.state_dict(),
        dtype=plan.dtype,
        quantization_config=plan.quantization,
        device_map={"": plan.device},
    )
    del dense
    keep_4bit_weights_unpacked(model)
    torch.cuda.empty_cache()
    return model


def make_trainer(plan: Plan, form: str, rows: Dataset, callbacks: list[TrainerCallback]) -> SFTTrainer:
    """The base in a variant's form, in the trainer that goes with it; what is trained is fp32 in every variant.

    Args:
        plan: The run.
        form: `peft` for PEFT with SFTTrainer; else the form is the plan's.
        rows: To train on.
        callbacks: Of the trainer.
    """
    base, lora = random_base(plan), cast(LoraConfig, copy.deepcopy(plan.lora))
    arguments, backend = cast(SFTConfig, plan.training), cast(Backend, plan.backend)
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": byte_tokenizer(), "callbacks": callbacks}
    if form == PEFT:
        model = get_peft_model(base, lora)
        with adapter_precision_kept(model):
            return SFTTrainer(model, args=arguments, **common)
    return AdapterTrainer(backend.attach(base, lora), backend, args=args_for_sft(arguments), **common)


class StepRecord(TrainerCallback):
    """Keeps the loss of each step, and how many tokens had a label; both are read after the clock has stopped.

    Args:
        trainer: Whose steps; its `StepTimer` comes first, and stops the clock.
        facts: Where `losses` (nats per token) and `tokens` are kept.
    """

    def __init__(self, trainer: SFTTrainer, facts: dict[str, Any]) -> None:
        self.losses: list[float] = facts.setdefault("losses", [])
        self.tokens: list[int] = facts.setdefault("tokens", [])
        self._step = trainer.training_step
        trainer.training_step = self._training_step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def _training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        labels = inputs["labels"]
        loss = self._step(model, inputs, *args, **kwargs)
        self._last = loss, labels
        return loss

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The clock has stopped."""
        loss, labels = self._last
        self.losses.append(loss.item())
        self.tokens.append(int((labels != -100).sum()))


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Trains until no more steps are asked for."""
    del variant
    plan = plan_run(options, timer.device, timer.scratch)
    rows = make_rows(row_lengths(options), plan.config.vocab_size)
    trainer = make_trainer(plan, options["backend"], rows, [StepTimer(timer, "step")])
    if options.get("two_lines"):
        fuse(trainer)
    trained = (parameter for parameter in cast(nn.Module, trainer.model).parameters() if parameter.requires_grad)
    timer.facts["trained in"] = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})
    StepRecord(trainer, timer.facts)
    trainer.train()
