"""What a tracker is sent: the log of `trainer_state.json`, step by step, read back from the tracker's own file."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from tests.recipes.conftest import RunSFT, run_sft  # noqa: F401  # fixtures

EVERY = ("--max_steps", "4", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2")
Values = list[tuple[int, float]]


def logged(folder: Path, name: str) -> Values:
    """Step and value of `loss` or `eval_loss`, as Trainer kept them."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[name]) for entry in log if name in entry]


def check(output: Path, train: Values, evaluation: Values) -> None:
    assert [step for step, _ in train] == [1, 2, 3, 4]
    assert train == logged(output, "loss")
    expected = logged(output, "eval_loss")
    assert [step for step, _ in expected] == [2, 4]
    assert evaluation[: len(expected)] == expected


@pytest.mark.integration
def test_tensorboard_gets_the_losses_of_the_log(run_sft: RunSFT) -> None:  # noqa: F811
    output = run_sft("llama", "run", *EVERY, "--report_to", "tensorboard")
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    train, evaluation = (
        [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(f"{part}/loss")]  # in float32
        for part in ("train", "eval")
    )
    check(output, train, evaluation)


@pytest.mark.integration
def test_trackio_gets_the_losses_of_the_log(tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path) -> None:
    """In a process of its own: trackio reads its folder when it is imported."""
    output = tmp_path / "run"
    command = [
        *(sys.executable, "recipes/sft.py", "--config", "recipes/quickstart/lora.yaml", "--merge", "false", *EVERY),
        *("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--use_cpu", "true"),
        *("--test_split_size", "8", "--per_device_train_batch_size", "2", "--max_length", "256"),
        *("--exact_match_rows", "0"),
        *("--output_dir", str(output), "--report_to", "trackio", "--run_name", "mine", "--project", "all"),
    ]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "all.db")) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"mine"}
    found = [json.loads(metrics) for _, metrics in rows]
    train, evaluation = (
        [(int(entry["train/global_step"]), entry[name]) for entry in found if name in entry]
        for name in ("train/loss", "eval/loss")
    )
    check(output, train, evaluation)
