"""The real `accelerate launch`, with one process and with two."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from plainlora.run.checkpoints import find_problem
from plainlora.run.folder import UNFINISHED, list_checkpoints
from tests.conftest import ROOT
from tests.engines.matrix import logged, relative


def launch(processes: int, batch_size: int, output: Path, model: Path, rows: Path) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *("--main_process_port", "0", "recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml"),
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(output)),
        *("--packing", "false", "--max_length", "256", "--test_split_size", "7", "--max_steps", "4"),
        *("--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", "1"),
        *("--per_device_eval_batch_size", str(batch_size)),
        *("--learning_rate", "5e-3", "--report_to", "none", "--logging_steps", "1", "--exact_match_rows", "2"),
        *("--max_new_tokens", "2", "--merge", "--precision", "fp32"),
    ]
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    merges = threading.Thread(target=wait_for_merge, args=(output, launcher, alone := []))
    merges.start()
    said, errors = launcher.communicate(timeout=300)
    merges.join()
    assert launcher.returncode == 0, errors[-2000:]
    assert alone == [1], "no process waits for the merge, which may take longer than a collective's timeout"
    assert said.count("adapter, model card, ") == 1, "every process printed the summary"
    assert said.count(" GB free: no gradient checkpointing") == 1, "the processes decide together"


def wait_for_merge(output: Path, launcher: subprocess.Popen[str], alive: list[int]) -> None:
    """Waits until a merged model is there, and notes how many processes of the run there still are."""
    while launcher.poll() is None and not (output / "merged").exists():
        time.sleep(0.02)
    with suppress(psutil.NoSuchProcess):
        processes = [launcher.pid, *(each.pid for each in psutil.Process(launcher.pid).children(recursive=True))]
        alive.append(sum("RANK" in psutil.Process(each).environ() for each in processes))


def stop(folder: Path, model: Path, rows: Path, *flags: str, send: Callable[[subprocess.Popen[str]], None]) -> str:
    """Launches a run that would take minutes, sends a signal when it trains, and waits until every process has ended.

    Returns:
        What was printed after the signal.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *flags, "--main_process_port", "0"),
        *("recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml", "--packing", "false"),
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(folder)),
        *("--max_length", "256", "--test_split_size", "8", "--max_steps", "20000", "--save_steps", "10000"),
        *("--eval_strategy", "no", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
        *("--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
        *("--gradient_checkpointing", "false"),
    ]
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    end = threading.Timer(240, os.killpg, (launcher.pid, signal.SIGKILL))
    end.start()
    try:
        assert launcher.stdout is not None
        before = []
        while "'loss'" not in (line := launcher.stdout.readline()):
            before.append(line)
            assert line, "".join(before)
        send(launcher)
        said = launcher.stdout.read()  # to its end, which every process that prints holds open
        assert launcher.wait() != 0
    finally:
        end.cancel()
    return said


def stopped_at(folder: Path, said: str) -> Path:
    """The checkpoint that was saved, of the step that the message names."""
    stopped = re.findall(r"stopped after step (\d+) of 20000; (\S+) is saved; resume with the same command and", said)
    assert len(stopped) == 1, said
    step, saved = stopped[0]
    assert [Path(saved)] == list_checkpoints(folder)
    assert find_problem(Path(saved)) is None
    assert json.loads((Path(saved) / "trainer_state.json").read_text())["global_step"] == int(step)
    assert not (folder / UNFINISHED).exists()
    return Path(saved)


def test_u10_ctrl_c_in_a_terminal_which_reaches_the_launcher_too_saves_and_ends(
    tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path
) -> None:
    """The launcher dies of it at once, which is another signal for the training process."""
    said = stop(
        tmp_path / "run", model_dirs["gpt2"], rows_file, "--config_file", "accelerate_configs/single_gpu.yaml",
        send=lambda launcher: os.killpg(launcher.pid, signal.SIGINT),
    )  # fmt: skip
    stopped_at(tmp_path / "run", said)


def test_u10_two_processes_whose_launcher_is_told_to_end_stop_at_the_same_step_and_save(
    tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path
) -> None:
    flags = ("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2")
    said = stop(
        tmp_path / "run", model_dirs["gpt2"], rows_file, *flags,
        send=lambda launcher: os.kill(launcher.pid, signal.SIGTERM),
    )  # fmt: skip
    saved = stopped_at(tmp_path / "run", said)
    assert sorted(path.name for path in saved.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_two_processes_train_what_one_process_trains_with_twice_the_batch(
    tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, 4, one, model_dirs["llama"], rows_file)
    launch(2, 2, two, model_dirs["llama"], rows_file)
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (one, two)]
    assert results[1]["eval_loss_adapter"] < results[1]["eval_loss_base"]
    assert results[1]["exact_match_rows"] == results[0]["exact_match_rows"] == 2  # one answered by each process
    assert results[1]["exact_match_adapter"] == results[0]["exact_match_adapter"]
    # Of 7 test rows, two processes with batches of 2 would measure one twice.
    for name, rel in (("eval_loss_base", 1e-6), ("eval_loss_adapter", 1e-4)):
        assert results[1][name] == pytest.approx(results[0][name], rel=rel)


def launch_classifier(processes: int, output: Path, model: Path, rows: Path) -> None:
    """Two epochs of 41 rows, eight a step, with 13 rows to evaluate: both uneven on two processes."""
    size = str(8 // processes)
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *("--main_process_port", "0", "recipes/classify.py", "--config", "recipes/distilbert-imdb/lora.yaml"),
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(output)),
        *("--labels", "ham", "spam", "--text_column", "text", "--validation_split_size", "13"),
        *("--test_split_size", "13", "--max_train_rows", "41", "--num_train_epochs", "2"),
        *("--per_device_train_batch_size", size, "--per_device_eval_batch_size", size),
        *(
            "--bf16",
            "false",
            "--dtype",
            "float32",
            "--base_dropout",
            "0",
            "--lora_dropout",
            "0",
            "--adam_epsilon",
            "1e-5",
        ),
        *("--learning_rate", "5e-3", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"),
        *("--eval_strategy", "steps", "--eval_steps", "4", "--label_smoothing_factor", "0.1"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:6000]


def test_a_classifier_trains_and_counts_every_row_once_on_two_processes(
    tmp_path: Path, backbone_dirs: dict[str, Path], texts_file: Path
) -> None:
    """Of the last step of an epoch, one row, the second process has none."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch_classifier(1, one, backbone_dirs["distilbert"], texts_file)
    launch_classifier(2, two, backbone_dirs["distilbert"], texts_file)
    for name in ("loss", "eval_loss", "eval_accuracy", "eval_f1"):
        expected, found = (logged(folder, name) for folder in (one, two))
        assert expected
        assert found == pytest.approx(expected, rel=1e-5)
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert max(relative(together[name], alone[name]) for name in alone) < 1e-4
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (one, two)]
    for split in ("validation", "test"):
        for name in (f"{split}_confusion", f"{split}_confusion_base", f"{split}_accuracy", f"{split}_f1"):
            assert results[1][name] == results[0][name]
        assert sum(map(sum, results[1][f"{split}_confusion"])) == 13
        assert results[1][f"{split}_loss"] == pytest.approx(results[0][f"{split}_loss"], rel=1e-5)
