"""Samples during training: what is kept, that it goes on when resumed, and that it changes nothing of training."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plainlora.training.samples import undisturbed
from tests.conftest import ROOT, make_model, random_ids
from tests.recipes.conftest import RunSFT, run_sft  # noqa: F401  # fixtures

PROMPTS = ["--sample_prompts", "Say 1.", "Say 2.", "--max_new_tokens", "6"]
STEPS = ["--sample_steps", "2"]


def saved(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes()
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (folder / name).exists()
    }


def history(folder: Path) -> list[dict[str, float]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if not re.search("runtime|per_second", name)} for entry in log
    ]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_the_same_to_the_last_bit_with_and_without(
    run_sft: RunSFT,  # noqa: F811
    method: str,
) -> None:
    # Dropout draws from the random stream in every step, GPT-2's own and the adapter's.
    flags = ["--method", method, *PROMPTS, "--base_dropout", "0.1"]
    without, with_ = run_sft("gpt2", "without", *flags), run_sft("gpt2", "with", *flags, *STEPS)
    assert len(saved(with_)) == 1
    assert saved(with_) == saved(without)
    assert history(with_) == history(without)
    for name in ("optimizer.pt", "rng_state.pth"):
        both = [torch.load(each / "checkpoint-6" / name, weights_only=False) for each in (without, with_)]
        assert str(both[0]) == str(both[1])


def test_answers_are_kept_by_step_beside_the_bases(run_sft: RunSFT) -> None:  # noqa: F811
    output = run_sft("llama", "run", *PROMPTS, *STEPS, "--learning_rate", "5e-2")
    text = (output / "samples.md").read_text()
    before, by_step = text.split("## By step\n")
    assert re.findall(r"^(base|step \d+)$", by_step, re.MULTILINE) == ["base", "step 2", "step 4", "step 6"] * 2
    blocks = re.findall(r"```text\n(.*?)\n```", by_step, re.DOTALL)
    assert [blocks[0], blocks[5]] == ["Say 1.", "Say 2."]
    # The base's and the last ones are those that the run measures at its end.
    final = re.findall(r"```text\n(.*?)\n```", before, re.DOTALL)
    assert final == ["Say 1.", blocks[1], blocks[4], "Say 2.", blocks[6], blocks[9]]
    assert blocks[1] != blocks[4]


def test_a_resumed_run_keeps_the_earlier_answers(run_sft: RunSFT) -> None:  # noqa: F811
    flags = [*PROMPTS, *STEPS, "--learning_rate", "5e-2"]
    whole = run_sft("llama", "whole", *flags)
    shutil.copytree(whole / "checkpoint-3", whole.parent / "resumed" / "checkpoint-3")
    resumed = run_sft("llama", "resumed", *flags, "--resume_from_checkpoint", "true")
    assert (resumed / "samples.md").read_text() == (whole / "samples.md").read_text()
    shutil.copytree(whole / "checkpoint-3", whole.parent / "others" / "checkpoint-3")
    others = run_sft("llama", "others", *flags, "--resume_from_checkpoint", "true", "--sample_prompts", "Say 3.")
    headings = re.findall(r"^(base|step \d+)$", (others / "samples.md").read_text(), re.MULTILINE)
    assert headings == ["base", "step 4", "step 6"]


def test_tensorboard_gets_them_as_text(run_sft: RunSFT) -> None:  # noqa: F811
    output = run_sft("llama", "run", *PROMPTS, *STEPS, "--report_to", "tensorboard")
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for number in (1, 2):
        found = events.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in found] == [0, 2, 4, 6]
        assert found[0].tensor_proto.string_val[0].decode().startswith(f"Say {number}.\n\n---\n\n")


def by_step(output: Path) -> list[list[str]]:
    """Step, prompt and answer, as `samples.md` has them."""
    _, text = (output / "samples.md").read_text().split("## By step\n")
    blocks = re.findall(r"```text\n(.*?)\n```", text, re.DOTALL)
    steps = ["base", "2", "4", "6"]
    return [[step, blocks[at], blocks[at + 1 + number]] for number, step in enumerate(steps) for at in (0, 5)]


def run_alone(folder: Path, *flags: str, **environment: str) -> Path:
    """A run in a process of its own: a tracker looks for its folder once in each."""
    output = folder / "run"
    command = [
        *(sys.executable, "recipes/sft.py", "--config", "recipes/quickstart/lora.yaml", "--output_dir", str(output)),
        *("--merge", "false", "--exact_match_rows", "0", "--max_steps", "6", *PROMPTS, *STEPS, *flags),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.integration
def test_wandb_gets_a_table_of_them(tmp_path: Path) -> None:
    output = run_alone(tmp_path, "--report_to", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert sorted(len(each["data"]) for each in tables) == [2, 4, 6, 8]
    last = max(tables, key=lambda each: len(each["data"]))
    assert last["columns"] == ["step", "prompt", "answer"]
    assert last["data"] == by_step(output)


@pytest.mark.integration
def test_trackio_gets_a_table_of_them_and_keeps_a_named_run_in_one(tmp_path: Path) -> None:
    named = ("--report_to", "trackio", "--run_name", "mine", "--project", "all")
    output = run_alone(tmp_path, *named, TRACKIO_DIR=str(tmp_path))
    with closing(sqlite3.connect(tmp_path / "all.db")) as database:
        logged = database.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _ in logged} == {"mine"}
    metrics = [json.loads(each) for _, each in logged]
    tables = [each["samples"]["_value"] for each in metrics if "samples" in each]
    assert [each["train/global_step"] for each in metrics if "samples" in each] == [0, 2, 4, 6]
    assert [list(row.values()) for row in tables[-1]] == by_step(output)
    assert any("eval/loss" in each for each in metrics)


def test_without_a_prompt_it_is_refused(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", *STEPS, "--exact_match_rows", "0", config="recipes/quickstart/lora.yaml")
    assert stopped.value.code == 2
    assert "sample_steps answers the sample prompts, and there are none" in capfd.readouterr().err


def test_modes_and_random_streams_are_restored() -> None:
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed(model, torch.device("cpu")):
        torch.rand(7)
        assert not model(random_ids()).logits.requires_grad
        assert not any(module.training for module in model.modules())
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
