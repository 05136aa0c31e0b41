"""An epoch of a classifier through the real Trainer, in batches of similar lengths, or of random rows."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    Trainer,
    TrainingArguments,
)

from benchmarks.case import AS_SHIPPED, FUSED, MATCHED, PEFT, Case, Target
from benchmarks.language import has_bf16
from benchmarks.rows import draw_lengths, make_rows
from benchmarks.step_record import StepRecord
from benchmarks.step_timer import StepTimer
from benchmarks.timer import Timer
from plainlora.backends import BACKENDS
from plainlora.parity.tiny import byte_tokenizer
from plainlora.training.trainers import ClassifierTrainer

SPECIAL: dict[str, Any] = {"pad_token_id": 1}
IN_FP32 = "fused, fp32"


def _config(model: str, full: bool) -> PretrainedConfig:
    sizes: dict[str, Any] = {} if full else {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2}
    if model == "distilbert":
        return DistilBertConfig(**sizes, **SPECIAL)
    sizes = {} if full else {"n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2Config(**sizes, **SPECIAL)


def cases(size: str, device: str) -> list[Case]:
    """DistilBERT on IMDb's lengths, GPT-2 on those of SMS spam; matched and as shipped each."""
    batches = {"distilbert": (12, 2), "gpt2": (8, 6)} if size == "full" else {"distilbert": (2, 2), "gpt2": (2, 2)}
    adapters = {
        "distilbert": {"r": 8, "target_modules": ["q_lin", "v_lin"]},
        "gpt2": {"r": 16, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    }
    names = {
        "distilbert": "DistilBERT, IMDb's lengths, r=8 on query and value",
        "gpt2": "GPT-2, lengths of SMS spam, r=16 on every linear layer",
    }
    found = []
    # Time of a matched step and of one as shipped, over PEFT's.
    asked = {"distilbert": ("imdb", 0.95, 0.45), "gpt2": ("sms", None, 0.45)}
    for model, (data, matched_time, shipped_time) in asked.items():
        batch, count = batches[model]
        options = {"model": model, "data": data, "size": size, "batch": batch, "batches": count}
        options |= {"adapter": adapters[model]}
        matched = {variant: {"backend": variant, "grouped": True} for variant in (FUSED, PEFT)}
        shipped: dict[str, dict[str, Any]] = {
            FUSED: {"backend": FUSED, "grouped": True, "bf16": has_bf16(device)},
            PEFT: {"backend": PEFT, "grouped": False},
        }
        if has_bf16(device):  # a flag, `--precision fp32`
            shipped[IN_FP32] = shipped[FUSED] | {"bf16": False}
        targets = () if matched_time is None else (Target("time", PEFT, matched_time),)
        found.append(Case("classify", names[model], matched, options, MATCHED, targets))
        found.append(
            Case("classify", names[model], shipped, options, AS_SHIPPED, (Target("time", PEFT, shipped_time),))
        )
    return found


def choose_rows(lengths: list[int], batch: int, batches: int, grouped: bool) -> list[int]:
    """Row numbers of a sample of an epoch, in the order of training.

    The same rows for every variant: those of `batches` batches, evenly spread, of rows grouped by length.

    Args:
        lengths: Of all rows.
        batch: Rows of a batch.
        batches: How many batches.
        grouped: In batches of similar lengths; in random order if not.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    step = len(order) // batches
    chosen = [row for number in range(batches) for row in order[number * step + step // 2 :][:batch]]
    if not grouped:
        chosen = [chosen[place] for place in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    return chosen


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Trains epochs of the sample until no more are asked for."""
    del variant
    config = _config(options["model"], options["size"] == "full")
    model = AutoModelForSequenceClassification.from_config(config)
    lengths = draw_lengths(options["data"], 50 * options["batch"], 512 if options["size"] == "full" else 16)
    chosen = choose_rows(lengths, options["batch"], options["batches"], options["grouped"])
    rows = make_rows([lengths[row] for row in chosen], config.vocab_size, labels=2)
    timer.facts["tokens an epoch"] = sum(lengths[row] for row in chosen)
    arguments = TrainingArguments(
        output_dir=timer.scratch,
        per_device_train_batch_size=options["batch"],
        train_sampling_strategy="sequential",  # the order is chosen above
        num_train_epochs=1_000_000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        bf16=bool(options.get("bf16")),
        use_cpu=timer.device == "cpu",
        dataloader_pin_memory=timer.device != "cpu",
    )
    common: dict[str, Any] = {
        "args": arguments,
        "train_dataset": rows,
        "data_collator": DataCollatorWithPadding(byte_tokenizer()),
        "callbacks": [StepTimer(timer, "epoch")],
    }
    lora = LoraConfig(task_type="SEQ_CLS", lora_alpha=16, **options["adapter"])
    trainer: Trainer
    if options["backend"] == PEFT:
        trainer = Trainer(get_peft_model(model, lora), **common)
    else:
        form = BACKENDS[options["backend"]]
        trainer = ClassifierTrainer(form.attach(model, lora), form, **common)
    StepRecord(trainer, timer.facts)
    trainer.train()
