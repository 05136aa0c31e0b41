"""Optimizer steps of a language model through the real SFTTrainer, at the sizes that the recipes train."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerCallback,
)
from trl import ModelConfig, SFTConfig, SFTTrainer, pack_dataset

from benchmarks.case import AS_SHIPPED, FLOOR, FUSED, MATCHED, PEFT, REFERENCE, Case, Target
from benchmarks.floor import run_floor
from benchmarks.rows import draw_lengths, make_rows
from benchmarks.step_record import StepRecord
from benchmarks.step_timer import StepTimer
from benchmarks.timer import Timer
from plainlora.backends import BACKENDS, Backend
from plainlora.base.dropout import set_dropouts
from plainlora.base.loading import keep_4bit_weights_unpacked
from plainlora.fast.fuse import fuse
from plainlora.parity.case import seed_everything
from plainlora.parity.tiny import byte_tokenizer, random_model
from plainlora.resources.plan import Plan
from plainlora.settings.device import computes_in_bf16
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
    "smollm2": lambda full: LlamaConfig(
        **({"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49_152, "max_position_embeddings": 8192}
           if full else {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000} | TINY_HEADS),
        tie_word_embeddings=True, **SPECIAL,
    ),
    "llama2": lambda full: LlamaConfig(  # the class's own sizes are those of 7b
        **({} if full else {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000} | TINY_HEADS), **SPECIAL
    ),
}  # fmt: skip
FIRST = {"llama2": "q_proj"}
TARGETS = {"llama2": ["q_proj", "v_proj"]}  # every linear layer of the others
NAMES = {
    "gpt2": "GPT-2 124M, r=2 on every linear layer, packed 1 x 1024",
    "qwen2": "Qwen2-0.5B, r=2 on every linear layer, packed 1 x 1024",
    "smollm2": "SmolLM2-135M, r=16 on every linear layer, 4 rows of different lengths",
}
ONE_LINE, KEPT, NO_CHECKPOINTING = "peft, one line more", "fused, base dropouts kept", "fused, no checkpointing"
FROZEN = "frozen base"


def has_bf16(device: str) -> bool:
    """Whether the device has units for bf16, so that `--precision auto` computes in it."""
    return device == "cuda" or computes_in_bf16()


def cases(suite: str, size: str, device: str) -> list[Case]:
    """Matched and as shipped; SmolLM2 matched, in fp32 and NF4; Llama-2-7b matched, and on a GPU alone."""
    if suite == "llama2":
        return _llama2_cases(size, device)
    options: dict[str, Any] = {"model": suite, "size": size, "r": 2, "rows": "alpaca", "packed": True}
    options["length"] = 1024 if size == "full" else 64
    lean = {"gradient_checkpointing": False, "bf16": device == "cuda"}
    matched: dict[str, dict[str, Any]] = {
        form: {"backend": form, "training": lean, "base_dropout": 0.0} for form in (FUSED, PEFT)
    }
    floor: dict[str, dict[str, Any]] = {FLOOR: {"backend": FLOOR, "training": lean}}
    if suite == "smollm2":
        options |= {"r": 16, "packed": False, "batch": 4, "count": 64, "drawn": True}
        nf4 = Target("time", PEFT, 0.60), Target("peak above weights", PEFT, 0.7)
        return [
            Case(suite, NAMES[suite], matched | floor, options, MATCHED, (Target("time", PEFT, 0.50),)),
            Case(suite, f"{NAMES[suite]}, NF4", matched, options | {"nf4": True}, MATCHED, nf4),
        ]
    time, of_floor, shipped_time = {"gpt2": (0.50, 1.15, 0.20), "qwen2": (0.62, 1.25, 0.30)}[suite]
    targets = [Target("time", PEFT, time), Target("time", FLOOR, of_floor)]
    if suite == "gpt2":
        matched[ONE_LINE] = matched[PEFT] | {"one_line": True}
        targets.append(Target("time", FUSED, 1.03, ONE_LINE))
    stored = "float32" if suite == "gpt2" else "bfloat16"  # on the Hub
    auto: dict[str, Any] = {"backend": FUSED, "training": lean}
    if has_bf16(device):
        auto = {"backend": FUSED, "training": lean | {"bf16": True}, "dtype": stored}
        floor_shipped = {FLOOR: floor[FLOOR] | {"dtype": "bfloat16"}}
    else:
        floor_shipped = floor
    shipped = {FUSED: auto}
    if suite == "gpt2":  # the recipe says 0
        shipped = {FUSED: auto | {"base_dropout": 0.0}, KEPT: auto}
    shipped |= {PEFT: {"backend": PEFT, "training": {}}} | floor_shipped
    asked = Target("time", PEFT, shipped_time), Target("time", FLOOR, 2.0), Target("peak", PEFT, 0.6)
    return [
        Case(suite, NAMES[suite], matched | floor, options, MATCHED, tuple(targets)),
        Case(suite, NAMES[suite], shipped, options, AS_SHIPPED, asked),
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
                FROZEN: {"backend": FROZEN, "training": with_gc},
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

    The frozen base has an adapter of rank 1 in its first block alone, so that the gradient passes through the whole
    of it.

    Args:
        options: Of the case and the variant.
        device: `cpu` or `cuda`.
        folder: For whatever the trainer writes.
    """
    config = base_config(options)
    if options.get("base_dropout") is not None:
        set_dropouts(config, options["base_dropout"])
    adapter: dict[str, Any] = {"r": options["r"], "lora_alpha": 2 * options["r"]}
    adapter["target_modules"] = TARGETS.get(options["model"], "all-linear")
    if options["backend"] == FROZEN:
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
        backend=BACKENDS[FUSED if options["backend"] in (FROZEN, FLOOR) else options["backend"]],
    )


def base_config(options: dict[str, Any]) -> PretrainedConfig:
    """Of the model, or of the checkpoint in `folder`; with as many positions as a row has tokens."""
    folder = options.get("folder")
    config = AutoConfig.from_pretrained(folder) if folder else CONFIGS[options["model"]](options["size"] == "full")
    config.max_position_embeddings = max(config.max_position_embeddings, options["length"])
    return cast(PretrainedConfig, config)


def step_documents(options: dict[str, Any]) -> list[list[int]]:
    """Tokens of each document of each step, as SFTTrainer packs or batches the rows."""
    lengths, batch = row_lengths(options), options.get("batch", 1)
    found = [[length] for length in lengths]
    if options.get("packed"):
        rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        found = list(pack_dataset(rows, options["length"])["seq_lengths"])
    steps = [found[start : start + batch] for start in range(0, len(found), batch)]
    return [[length for row in step for length in row] for step in steps]


def row_lengths(options: dict[str, Any]) -> list[int]:
    """Tokens of each row, all the same or a data set's.

    Rows that are not packed go from the longest to the shortest, as `train_sampling_strategy: group_by_length` sorts
    each fifty batches; with `drawn` in random order, as by default: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_pt_utils.py
    """
    if "rows" not in options:
        return [options["length"]] * 64
    lengths = draw_lengths(options["rows"], options.get("count", 240), options["length"])
    return lengths if options.get("packed") or options.get("drawn") else sorted(lengths, reverse=True)


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
    model = _loaded(type(dense), plan, None, state_dict=dense.state_dict())
    del dense
    torch.cuda.empty_cache()
    return model


def stored_base(plan: Plan, folder: str) -> PreTrainedModel:
    """The base of a checkpoint."""
    return _loaded(AutoModelForCausalLM, plan, folder)


def _loaded(kind: Any, plan: Plan, folder: str | None, **given: Any) -> PreTrainedModel:
    if plan.quantization is not None:
        given |= {"quantization_config": plan.quantization, "device_map": {"": plan.device}}
    config = copy.deepcopy(plan.config)
    model: PreTrainedModel = kind.from_pretrained(folder, config=config, dtype=plan.dtype, **given)
    if plan.quantization is not None:
        keep_4bit_weights_unpacked(model)
    return model


def make_trainer(
    base: PreTrainedModel, plan: Plan, form: str, rows: Dataset, callbacks: list[TrainerCallback]
) -> SFTTrainer:
    """The base in a variant's form, in the trainer that goes with it; what is trained is fp32 in every variant.

    Args:
        base: With its weights.
        plan: The run.
        form: `peft` for PEFT with SFTTrainer; else the form is the plan's.
        rows: To train on.
        callbacks: Of the trainer.
    """
    lora = cast(LoraConfig, copy.deepcopy(plan.lora))
    arguments, backend = cast(SFTConfig, plan.training), cast(Backend, plan.backend)
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": byte_tokenizer(), "callbacks": callbacks}
    if form == PEFT:
        model = get_peft_model(base, lora)
        with adapter_precision_kept(model):
            return SFTTrainer(model, args=arguments, **common)
    return AdapterTrainer(backend.attach(base, lora), backend, args=args_for_sft(arguments), **common)


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Trains until no more steps are asked for; the floor multiplies instead."""
    del variant
    plan = plan_run(options, timer.device, timer.scratch)
    if options["backend"] == FLOOR:
        run_floor(plan, step_documents(options), timer)
    rows = make_rows(row_lengths(options), plan.config.vocab_size, answers=options.get("answers"))
    folder = options.get("folder")
    base = stored_base(plan, folder) if folder else random_base(plan)
    seed_everything(0)  # the same A, wherever the base is from
    trainer = make_trainer(base, plan, options["backend"], rows, [StepTimer(timer, "step")])
    if options.get("one_line"):
        fuse(trainer)
    trained = (parameter for parameter in cast(nn.Module, trainer.model).parameters() if parameter.requires_grad)
    timer.facts["trained in"] = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})
    StepRecord(trainer, timer.facts)
    trainer.train()
