"""The programs examine their rows before they load a weight: warnings are said, errors stop them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROWS, TEXTS
from tests.recipes.conftest import RunClassify, RunSFT

Capture = pytest.CaptureFixture[str]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_run_of_sft_says_what_was_examined(run_sft: RunSFT, tmp_path: Path, capfd: Capture) -> None:
    test = write(tmp_path / "test.jsonl", [ROWS[0], ROWS[1]])
    run_sft("gpt2", "run", "--max_steps", "2", "--eval_dataset_name", test)
    said = capfd.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(said) if line.startswith("train rows: "))
    assert said[at + 1].startswith("test rows: ")
    assert said[at + 2] == (
        "warning: test rows: 2 of 2 have the prompt of a training row, so the test figures are too good"
    )
    assert re.fullmatch(r"doctor: \d+ checks, 1 warning", said[at + 3])
    assert said[at + 4] == (
        "number formats: base float32, compute float32, adapter float32, optimizer state float32, as what is trained "
        "(adamw_torch_fused)"
    )


def test_a_run_of_classify_says_what_was_examined(run_classify: RunClassify, tmp_path: Path, capfd: Capture) -> None:
    rows = write(tmp_path / "rows.jsonl", [*TEXTS, TEXTS[0] | {"label": "ham"}])
    run_classify("bert", "run", "--max_steps", "1", "--eval_strategy", "no", "--dataset_name", rows)
    said = capfd.readouterr().out
    assert "warning: train rows: 2 have the text of another row and another class; no model can learn both\n" in said
    assert re.search(r"doctor: \d+ checks, 1 warning\n", said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_target_modules", "q_prj"], "'q_prj' matches no module"),
        (["--max_length", "20"], "32 of 32 rows are longer than max_length=20 tokens"),
        (["--test_split_size", "0"], "need test rows"),
    ],
)
def test_an_error_stops_sft_before_a_weight_is_loaded(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path, capfd: Capture, flags: list[str], said: str
) -> None:
    base = tmp_path / "base"  # without weights, which nobody gets to miss
    shutil.copytree(model_dirs["llama"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", "--model_name_or_path", str(base), *flags)
    assert stopped.value.code == 2
    assert said in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_error_stops_classify_before_a_weight_is_loaded(
    run_classify: RunClassify, backbone_dirs: dict[str, Path], tmp_path: Path, capfd: Capture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(backbone_dirs["bert"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SystemExit) as stopped:
        run_classify("bert", "run", "--model_name_or_path", str(base), "--validation_split_size", "0")
    assert stopped.value.code == 2
    assert "eval_strategy needs validation rows" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
