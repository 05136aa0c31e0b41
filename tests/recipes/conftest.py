"""Runs the real programs of `recipes/`: in this process where the start-up would dominate, else in their own."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

RunSFT = Callable[..., Path]
RunClassify = Callable[..., Path]


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
            *("--learning_rate", "5e-3", "--precision", "fp32"),
            *flags,
        ]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path("recipes/sft.py", run_name="__main__")
        return output

    return run


@pytest.fixture
def run_classify(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbone_dirs: dict[str, Path], texts_file: Path
) -> RunClassify:
    """`run_classify("distilbert", "name", "--flag", ...)`: a short recipe on a tiny model; returns its output folder.

    Later flags win, so a test says only what it is about.
    """

    def run(kind: str, name: str, *flags: str, config: str = "recipes/distilbert-imdb/lora.yaml") -> Path:
        output = tmp_path / name
        command = [
            *("recipes/classify.py", "--config", config),
            *("--model_name_or_path", str(backbone_dirs[kind]), "--dataset_name", str(texts_file)),
            *("--labels", "ham", "spam", "--text_column", "text", "--output_dir", str(output)),
            *("--validation_split_size", "20", "--test_split_size", "20", "--per_device_train_batch_size", "8"),
            *("--num_train_epochs", "1", "--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "3"),
            *("--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9", "--logging_steps", "1"),
            *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--learning_rate", "5e-3"),
            *("--precision", "fp32"),
            *flags,
        ]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path("recipes/classify.py", run_name="__main__")
        return output

    return run
