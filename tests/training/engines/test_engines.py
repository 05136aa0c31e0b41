"""Two processes on FSDP2 compute what one does, hold a part of the base each, and save the same.

DeepSpeed is launched, in tests/engines: in processes that have a process group already, Accelerate counts one.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerState, set_seed
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.folders import MANIFEST, find_damage
from plainlora.training.engines.engine import shard_of
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import make_model
from tests.two_processes import in_two_processes

TEXTS = [f"{name} is number {number}" for number, name in enumerate(("one", "two", "three", "four", "five"), 1)]


def ask_for_fsdp2() -> None:
    """Sets what `accelerate launch` sets."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def train(
    folder: Path, engine: str, processes: int, resume: str | None, callbacks: list[TrainerCallback] | None = None,
    kind: str = "llama", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Four steps of five rows, or the last two of them; the trainer saves after two."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    arguments = SFTConfig(
        output_dir=str(folder / engine), max_steps=4, save_steps=2, logging_steps=1, learning_rate=0.05,
        per_device_train_batch_size=4 // processes, gradient_checkpointing=False, bf16=False, report_to="none",
        adam_epsilon=1e-5, lr_scheduler_type="linear", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    set_seed(0)
    backend, model = BACKENDS["fused"], make_model(kind)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules="all-linear", **options or {"modules_to_save": ["norm"]}
    )
    trainer = AdapterTrainer(
        attach_adapter(model, lora, backend), backend, args=args_for_sft(arguments),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}), processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.engine.reshard(trainer.adapted)
    frozen = [parameter for parameter in trainer.adapted.parameters() if not parameter.requires_grad]
    held = sum(shard_of(parameter).numel() for parameter in frozen)
    # Chosen when the model has been sharded, and before the first batch.
    assert trainer.padding_free
    assert trainer.adapted.config._attn_implementation == "plainlora"
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "held": held, "engine": type(trainer.engine).__name__}


class Dies(TrainerCallback):
    """Ends a process after its third step, as a kill would."""

    def __init__(self, answer: Path) -> None:
        self.answer = answer

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == 3:
            self.answer.write_text("null")
            os._exit(0)


def lose_the_other(rank: int, folder: Path, answers: Path) -> str:
    """What is said by the process that is left."""
    with pytest.raises(UserError) as caught:
        train(folder, "one is lost", 2, None, [Dies(answers / "1.json")] if rank == 1 else [])
    return str(caught.value)


def train_a_bias(rank: int, folder: Path) -> str:
    ask_for_fsdp2()
    with pytest.raises(UserError) as bias:
        train(folder, "refused", 2, None, kind="qwen2", bias="lora_only")
    return str(bias.value)


def train_together(rank: int, folder: Path, resume: str | None) -> dict[str, Any]:
    ask_for_fsdp2()
    return train(folder, "FSDP2", 2, resume)


def train_with_dropout(rank: int, folder: Path, resume: str | None) -> dict[str, Any]:
    ask_for_fsdp2()
    return train(folder, "dropout", 2, resume, lora_dropout=0.5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, dict[str, Any]]:
    """One process, in this one."""
    folder = tmp_path_factory.mktemp("engines")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, train(folder, "one process", 1, None)


def differ(found: Path, expected: Path) -> float:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def test_two_processes_compute_and_save_what_one_does(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Five rows in batches of four, so that the last batch is uneven; a norm is trained whole, the output is not tied.

    Then from the checkpoint of one process: what is saved is the same on every engine.
    """
    folder, one = alone
    ours, theirs = folder / "FSDP2", folder / "one process"
    (tmp_path / "first").mkdir()
    for each in in_two_processes(tmp_path / "first", train_together, folder, None):
        assert each["engine"] == "FSDP2"
        assert each["losses"] == pytest.approx(one["losses"], rel=1e-3)  # logged with four digits
        assert each["held"] < 0.6 * one["held"]
    assert differ(ours, theirs) < 1e-4
    for saved in (ours, theirs, ours / "checkpoint-2"):
        assert (saved / MANIFEST).is_file()
        assert find_damage(saved) is None
    found, expected = (
        torch.load(run / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"] for run in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for number, state in expected.items():
        for name, value in state.items():
            torch.testing.assert_close(found[number][name], value, rtol=1e-4, atol=1e-7)

    (tmp_path / "second").mkdir()
    (ours / "adapter_model.safetensors").unlink()
    in_two_processes(tmp_path / "second", train_together, folder, str(theirs / "checkpoint-2"))
    assert differ(ours, theirs) < 1e-4


def test_a_sharded_run_that_is_resumed_draws_the_same_dropout(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Its first batch is laid out as the others: what is drawn depends on the shape."""
    folder, _ = alone
    weights, found = folder / "dropout" / "adapter_model.safetensors", []
    for name, resume in (("whole", None), ("resumed", str(folder / "dropout" / "checkpoint-2"))):
        (tmp_path / name).mkdir()
        in_two_processes(tmp_path / name, train_with_dropout, folder, resume)
        found.append(weights.read_bytes())
        weights.unlink()
    assert found[0] == found[1]


def test_a_process_that_is_left_alone_says_what_is_kept(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = alone
    said, _ = in_two_processes(tmp_path, lose_the_other, folder, tmp_path)
    assert said.startswith("process 0 of 2: another process is gone (")
    assert f"{folder}/one is lost/checkpoint-2 is kept; resume with the same command" in said


def test_a_bias_that_fsdp2_cannot_train_is_refused(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = alone
    for said in in_two_processes(tmp_path, train_a_bias, folder):
        assert said.startswith("FSDP2 cannot train the bias of ")
