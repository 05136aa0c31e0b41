"""The quickstart keeps its promises: its data, its builder, and the whole run that `make quickstart` does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, run_program

QUICKSTART = ROOT / "recipes" / "quickstart"
CHECK = "recipes/quickstart/check.py"
GOOD = {
    "exact_match_base": 0.0, "exact_match_adapter": 0.9882, "eval_loss_base": 3.6, "eval_loss_adapter": 0.05,
    "merge_max_abs_diff": 3e-5, "trainable_params": 186368, "total_params": 1662368,
}  # fmt: skip


def rows_of(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_have_the_alpaca_fields_as_text_with_and_without_an_input(split: str) -> None:
    rows = rows_of(split)
    for row in rows:
        assert set(row) == {"instruction", "input", "output"}
        assert all(isinstance(value, str) for value in row.values())
        assert row["instruction"].strip()
        assert row["output"].strip()
    assert 0 < sum(bool(row["input"]) for row in rows) < len(rows)


def test_no_test_prompt_is_trained_on() -> None:
    train, test = ({(row["instruction"], row["input"]) for row in rows_of(split)} for split in ("train", "test"))
    assert len(test) == len(rows_of("test"))
    assert not train & test


def test_the_base_is_small_and_loads() -> None:
    assert sum(file.stat().st_size for file in (QUICKSTART / "base").iterdir()) <= 8_000_000
    loads(QUICKSTART / "base")


def loads(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer("The capital of Kenya", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_builder_repeats_rows_and_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    done = run_program(QUICKSTART / "build.py", "--steps", "2", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("train.jsonl", "test.jsonl", "base/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes(), name
    loads(tmp_path / "base")


@pytest.mark.parametrize(
    "broken",
    [
        {"exact_match_base": 0.06}, {"exact_match_adapter": 0.79}, {"eval_loss_adapter": 3.6},
        {"merge_max_abs_diff": 1e-3}, {"trainable_params": 1662368},
        {"exact_match_adapter": float("nan")}, {"eval_loss_adapter": float("nan")},
    ],
)  # fmt: skip
def test_the_check_names_the_promise_that_is_broken(tmp_path: Path, broken: dict[str, float]) -> None:
    results = tmp_path / "all_results.json"
    results.write_text(json.dumps(GOOD | broken))
    done = run_program(CHECK, results)
    assert done.returncode == 1
    assert f"does not hold: {next(iter(broken))} " in done.stderr
    assert done.stdout == ""


def test_the_check_says_in_one_line_that_all_holds(tmp_path: Path) -> None:
    results = tmp_path / "all_results.json"
    results.write_text(json.dumps(GOOD))
    done = run_program(CHECK, results)
    assert done.returncode == 0
    assert done.stdout == "quickstart: base 0.0 %, adapter 98.8 %: as expected\n"


def test_make_quickstart_ends_with_the_check() -> None:
    target = (ROOT / "Makefile").read_text().split("\nquickstart: install\n")[1].split("\n\n")[0]
    assert target.splitlines()[-1].strip() == f"$(BIN)/python {CHECK} outputs/quickstart/all_results.json"


def test_the_whole_quickstart_reaches_what_it_promises(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--main_process_port", "0"),
        *("recipes/sft.py", "--config", "recipes/quickstart/lora.yaml", "--output_dir", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check = run_program(CHECK, tmp_path / "run" / "all_results.json")
    assert check.returncode == 0, check.stderr
    assert check.stdout.startswith("quickstart: base ")
