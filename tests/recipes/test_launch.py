"""The real `accelerate launch`, with one process and with two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT


def launch(processes: int, batch_size: int, output: Path, model: Path, rows: Path) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *("--main_process_port", "0", "recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml"),
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(output)),
        *("--packing", "false", "--max_length", "256", "--test_split_size", "8", "--max_steps", "4"),
        *("--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", "1"),
        *("--learning_rate", "5e-3", "--report_to", "none", "--logging_steps", "1", "--exact_match_rows", "2"),
        *("--max_new_tokens", "2", "--merge"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("adapter, model card, loss.png") == 1, "every process printed the summary"
    assert done.stdout.count(" GB free: no gradient checkpointing") == 1, "the processes decide together"


def test_two_processes_train_what_one_process_trains_with_twice_the_batch(
    tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, 4, one, model_dirs["llama"], rows_file)
    launch(2, 2, two, model_dirs["llama"], rows_file)
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
    results = json.loads((two / "all_results.json").read_text())
    assert results["eval_loss_adapter"] < results["eval_loss_base"]
