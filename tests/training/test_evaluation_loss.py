"""The evaluation loss beside the losses of all tokens by the model's own forward, divided by their number.

As a program, launched in several processes, this module evaluates and writes the losses down.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import leave_if_not_first
from plainlora.fast.loss_head import base_of
from plainlora.parity.tiny import byte_tokenizer
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import ROOT, SPECIAL, VOCABULARY, make_model, random_ids

ROWS = [random_ids(1, 5 + 4 * number)[0].tolist() for number in range(10)]  # of many lengths
LABELS = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]


def own_loss(model: PreTrainedModel) -> float:
    """Row by row."""
    total = tokens = 0.0
    for row, labels in zip(ROWS, LABELS, strict=True):
        count = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            given = {"input_ids": torch.tensor([row]), "labels": torch.tensor([labels])}
            total += float(model(**given, **extra(model)).loss) * count
        tokens += count
    return total / tokens


def extra(model: PreTrainedModel) -> dict[str, Any]:
    """A router's loss belongs to a batch, not to its tokens."""
    return {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}


def make_trainer(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, backend: str = "fused", **options: Any
) -> AdapterTrainer:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=r".*(q_proj|c_attn)")
    given = {"packing": False, "max_length": 64, "output_dir": str(folder), "use_cpu": True, "bf16": False} | options
    rows = Dataset.from_dict({"input_ids": ROWS, "labels": LABELS})
    return AdapterTrainer(
        attach_adapter(model, lora, BACKENDS[backend]), BACKENDS[backend],
        args=args_for_sft(SFTConfig(report_to="none", gradient_checkpointing=False, disable_tqdm=True, **given)),
        train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
@pytest.mark.parametrize("packing", [False, True])
def test_it_is_the_same_for_every_batch_size(
    backend: str, packing: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = None
    for size in (1, 3, 4, 16):
        trainer = make_trainer(
            make_model("llama"), tmp_path, tokenizer, backend, packing=packing, per_device_eval_batch_size=size
        )
        expected = expected or own_loss(base_of(trainer.adapted))
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
        logged = trainer.state.log_history[-1]
        assert logged["eval_loss"] == found["eval_loss"]
        assert logged["eval_perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)
        assert trainer.evaluate(metric_key_prefix="base")["base_loss"] == found["eval_loss"]


def test_no_row_is_dropped_with_the_last_batch(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer(
        make_model("gpt2"), tmp_path, tokenizer, per_device_eval_batch_size=4, dataloader_drop_last=True
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own_loss(base_of(trainer.adapted)), rel=1e-6)


def test_a_routers_loss_is_trained_and_not_measured(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, num_local_experts=4, router_aux_loss_coef=0.5, **SPECIAL,
    )  # fmt: skip
    trainer = make_trainer(
        AutoModelForCausalLM.from_config(config).eval(), tmp_path, tokenizer, per_device_eval_batch_size=4
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own_loss(base_of(trainer.adapted)), rel=1e-6)
    assert trainer.aux_loss_enabled


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.2}, {"loss_type": "dft"}])
def test_it_is_the_cross_entropy_whatever_the_training_loss_is(
    options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = make_trainer(make_model("llama"), tmp_path, tokenizer, per_device_eval_batch_size=4, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own_loss(base_of(trainer.adapted)), rel=1e-6)
    assert trainer.args.loss_type == options.get("loss_type", trainer.args.loss_type)
    assert (trainer.label_smoother is None) == ("label_smoothing_factor" not in options)


def test_it_chooses_the_best_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer(
        make_model("llama"), tmp_path, tokenizer, per_device_eval_batch_size=4, max_steps=4, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=1e-3,
        metric_for_best_model="loss", per_device_train_batch_size=2, logging_steps=2,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(losses)
    assert trainer.state.best_metric == pytest.approx(own_loss(base_of(trainer.adapted)), rel=1e-6)


def evaluate(folder: Path) -> None:
    """In every process: the losses of packed and padded rows in batches of several sizes, by two back ends."""
    losses = []
    for backend in ("fused", "peft"):
        for packing in (False, True):
            for size in (1, 2, 3):
                model = make_model("gpt2")
                trainer = make_trainer(
                    model, folder, byte_tokenizer(), backend, packing=packing, per_device_eval_batch_size=size
                )
                losses.append(trainer.evaluate()["eval_loss"])
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(losses))


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Of ten rows, or three packed ones, batches in two processes leave some over, which are then given out twice."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2", "--main_process_port", "0"),
        *("--module", "tests.training.test_evaluation_loss", str(tmp_path)),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = own_loss(make_model("gpt2"))
    for process in range(2):
        losses = json.loads((tmp_path / f"{process}.json").read_text())
        assert losses == pytest.approx([expected] * 12, rel=1e-6)


if __name__ == "__main__":
    evaluate(Path(sys.argv[1]))
    leave_if_not_first()
