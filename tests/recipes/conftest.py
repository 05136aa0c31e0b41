"""Runs the real `recipes/sft.py`: in this process where the start-up would dominate, in its own where that matters."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

RunSFT = Callable[..., Path]


@pytest.fixture
def run_sft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path) -> RunSFT:
    """`run_sft("gpt2", "name", "--flag", ...)`: a short GPT-2 recipe on a tiny model; returns its output folder.

    Later flags win, so a test says only what it is about.
    """

    def run(kind: str, name: str, *flags: str, config: str = "recipes/gpt2-alpaca-gpt4/lora.yaml") -> Path:
        output = tmp_path / name
        command = [
            *("recipes/sft.py", "--config", config),
            *("--model_name_or_path", str(model_dirs[kind]), "--dataset_name", str(rows_file)),
            *("--test_split_size", "8", "--max_length", "256", "--output_dir", str(output)),
            *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--lora_dropout", "0.1"),
            *("--max_steps", "6", "--save_steps", "3", "--eval_steps", "3", "--logging_steps", "1"),
            *("--report_to", "none", "--disable_tqdm", "true", "--max_new_tokens", "4", "--use_cpu", "true"),
            *("--learning_rate", "5e-3"),
            *flags,
        ]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path("recipes/sft.py", run_name="__main__")
        return output

    return run
