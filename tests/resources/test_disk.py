"""Checkpoints are as large and as many as was said."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.resources.disk import count_saves
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import CONFIGS
from tests.resources.plans import ask, make_plan, settings


def test_a_checkpoint_takes_what_was_said_and_the_run_has_as_many_steps(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=64, target_modules="all-linear")
    training = settings(
        tmp_path, num_train_epochs=1.5, per_device_train_batch_size=3, gradient_accumulation_steps=2, save_steps=3,
        save_total_limit=2, logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    config = CONFIGS["llama"]()
    found = ask(config, training, lora, rows=37, tokens=37 * 24, tokenizer=tokenizer)
    rows = Dataset.from_dict({name: [[5] * 24] * 37 for name in ("input_ids", "labels")})
    backend = BACKENDS["fused"]
    model = attach_adapter(AutoModelForCausalLM.from_config(config), lora, backend)
    trainer = AdapterTrainer(
        model, backend, args=args_for_sft(training), train_dataset=rows, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in checkpoints]
    assert found.time.steps == trainer.state.global_step == 11
    assert found.time.tokens == pytest.approx(1.5 * 37 * 24, rel=0.1)
    assert len(sizes) == 2
    assert found.disk.checkpoints == 3  # the third is written before the first goes
    assert max(sizes) == pytest.approx(found.disk.checkpoint, rel=0.05)
    assert found.disk.needed == 3 * found.disk.checkpoint + found.disk.result


@pytest.mark.parametrize(
    ("options", "saves"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 5}, 5),
        ({"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": 100}, 5),  # so many that are trained
        ({"save_strategy": "epoch", "num_train_epochs": 5, "save_total_limit": 1}, 2),
        ({"save_strategy": "steps", "save_steps": 30}, 4),
        ({"save_strategy": "steps", "save_steps": 0.5}, 2),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 20}, 10),
        (
            {
                "save_strategy": "steps", "save_steps": 10, "save_total_limit": 1, "load_best_model_at_end": True,
                "eval_strategy": "steps", "eval_steps": 10,
            },
            3,
        ),
    ],
)  # fmt: skip
def test_as_many_checkpoints_lie_there_as_the_limit_lets(options: dict[str, Any], saves: int, tmp_path: Path) -> None:
    assert count_saves(settings(tmp_path, **options), 100, 20) == saves
    assert make_plan(CONFIGS["llama"](), settings(tmp_path, max_steps=7)).steps == 7
