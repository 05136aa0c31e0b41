"""`fuse(trainer)` on TRL's trainers: every one trains what it trains without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from plainlora import fuse, unfuse
from plainlora.lora.errors import LoRAError
from tests.conftest import CONFIGS, make_model

QUESTIONS = [f"Say the number after {number}." for number in range(8)]
RIGHT, WRONG = ([f"It is {number + step}." for number in range(8)] for step in (1, 2))
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
Make = Callable[[dict[str, Any], PreTrainedTokenizerFast], Trainer]


def preferences() -> Dataset:
    return Dataset.from_dict({"prompt": QUESTIONS, "chosen": RIGHT, "rejected": WRONG})


def sft(common: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Trainer:
    rows = Dataset.from_dict({"prompt": QUESTIONS, "completion": RIGHT})
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    args = SFTConfig(**common)
    return SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def dpo(common: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Trainer:
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    return DPOTrainer(
        make_model("llama"), args=DPOConfig(**common), train_dataset=preferences(), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip


def kto(common: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Trainer:
    rows = {"prompt": QUESTIONS * 2, "completion": RIGHT + WRONG, "label": [True] * 8 + [False] * 8}
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    return KTOTrainer(
        make_model("llama"), args=KTOConfig(**common), train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def reward(common: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Trainer:
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA)
    args = RewardConfig(**common)
    return RewardTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer, peft_config=lora)


def grpo(common: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Trainer:
    def longer(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    args = GRPOConfig(num_generations=2, max_completion_length=8, **common)
    return GRPOTrainer(
        make_model("llama"), reward_funcs=longer, args=args, train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
        processing_class=tokenizer, peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [sft, dpo, kto, reward, grpo])
def test_a_fused_trainer_trains_what_it_trains_without(
    make: Make, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    common = {
        "output_dir": str(tmp_path), "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2,
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    found = {}
    for how in ("own", "fused", "unfused"):
        trainer = make(common, tokenizer)
        if how != "own":
            report = fuse(trainer)
            assert report.fused["LoRA layers"] == 14  # seven in each of two blocks
            assert report.fused["SwiGLU"] == 2
            assert ("loss head" in report.fused) == (make is sft)
            assert not report.unchanged
            assert fuse(trainer) == report  # a second time it changes nothing
        if how == "unfused":
            unfuse(trainer)
        found[how] = losses(trainer)
    assert len(found["own"]) == 4
    assert found["unfused"] == found["own"]
    assert found["fused"] == pytest.approx(found["own"], rel=1e-6, abs=1e-7)


def test_a_trainer_that_would_copy_the_model_to_several_gpus_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", **LORA))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, processing_class=tokenizer)
    arguments._n_gpu = 2  # as Transformers counts two visible GPUs
    with pytest.raises(LoRAError, match=r"copy the model to 2 GPUs .*; start the script with accelerate launch"):
        fuse(trainer)
    assert not any("forward" in vars(module) for module in model.modules())
