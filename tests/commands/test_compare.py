"""`plainlora compare` as typed."""

import json
import sys
from pathlib import Path

import pytest

from plainlora.commands import main
from plainlora.lora.layer import LoRALinear
from plainlora.parity.observe import LEVELS
from tests.commands.test_generate import with_template
from tests.merging.test_merge import trained_adapter

GPT2 = ["--config", "recipes/gpt2-alpaca-gpt4/lora.yaml"]
CLASSIFY = ["--config", "recipes/gpt2-sms-spam/lora.yaml"]


def recipe(tmp_path: Path, model: Path, rows: Path, *form: str) -> list[str]:
    return [
        *(
            "compare",
            "--config",
            "recipes/gpt2-alpaca-gpt4/lora.yaml",
            "--steps",
            "3",
            "--output",
            str(tmp_path / "out"),
            *form,
        ),
        *("--", "--model_name_or_path", str(model), "--dataset_name", str(rows), "--max_length", "256"),
        *("--per_device_train_batch_size", "2", "--lora_dropout", "0.1", "--test_split_size", "8"),
    ]


@pytest.mark.parametrize("form", ["fused", "reference"])
def test_an_adapter_that_peft_alone_implements_is_one_line_with_its_fields(
    form: str, tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = recipe(tmp_path, model_dirs["gpt2"], rows_file, "--lora_backend", form)
    with pytest.raises(SystemExit):
        main([*command, "--lora_config", '{"init_lora_weights": "orthogonal", "velora_config": {}}'])
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: recipes/gpt2-alpaca-gpt4/lora.yaml: there is nothing hand-written to compare with PEFT: the "
        "hand-written LoRA does not implement velora_config, init_lora_weights='orthogonal', PEFT does"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["fused", "reference"])
def test_a_recipes_own_model_adapter_and_rows_are_compared(
    form: str, tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(recipe(tmp_path, model_dirs["gpt2"], rows_file, "--lora_backend", form))
    printed, said = capfd.readouterr()
    assert f"the {form} form of PlainLoRA beside PEFT" in printed
    assert "8 levels hold" in printed
    assert "0 fail; 0 did not run" in printed
    assert "not fused" not in said
    found = json.loads((tmp_path / "out" / "parity.json").read_text())
    (case,) = found["cases"]
    assert case["lora_backend"] == form
    assert [level["level"] for level in case["levels"]] == list(LEVELS)
    assert case["losses"]["plainlora"] == pytest.approx(case["losses"]["PEFT"], rel=1e-6 if form == "fused" else 0)
    assert len(case["losses"]["PEFT"]) == 3
    layers = {"fused layers": "8 of 8"} if form == "fused" else {}
    assert case["environment"] == {"base dtype": "float32", "device": "cpu"} | layers
    assert {"torch", "peft", "trl", "python"} <= found["versions"].keys()
    assert {row["relative"] for row in found["tolerances"].values()} >= {0, 1e-12, 1e-6}
    identical = {level["level"] for level in case["levels"] if level["identical"]}
    assert identical >= (set(LEVELS) - {"merge"} if form == "reference" else {"init", "generation"})
    table = (tmp_path / "out" / "parity.md").read_text()
    assert f"The {form} form of PlainLoRA beside PEFT." in table
    assert "| = |" in table
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], "fused"),
        ([], ["--lora_backend", "reference"], "reference"),
        ([], ["--lora-backend=reference"], "reference"),
        (["--lora_backend", "reference"], ["--lora_backend", "reference"], "reference"),
    ],
)
def test_a_recipes_own_form_is_the_one_compared(
    before: list[str],
    after: list[str],
    expected: str,
    tmp_path: Path,
    model_dirs: dict[str, Path],
    rows_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    main([*recipe(tmp_path, model_dirs["gpt2"], rows_file, *before), *after])
    assert f"the {expected} form of PlainLoRA" in capfd.readouterr().out


def test_a_level_that_does_not_hold_is_exit_code_1(
    tmp_path: Path,
    model_dirs: dict[str, Path],
    rows_file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: original(self, x) * 1.001)
    with pytest.raises(SystemExit) as stopped:
        main(recipe(tmp_path, model_dirs["gpt2"], rows_file, "--lora_backend", "reference"))
    assert stopped.value.code == 1
    assert "logits differs by" in capfd.readouterr().out
    assert "**FAIL**" in (tmp_path / "out" / "parity.md").read_text()


def test_a_trained_adapter_is_loaded_into_both(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_template(trained_adapter("llama", model_dirs, tmp_path / "adapter"))
    main(["compare", "--adapter", str(adapter), "--prompt", "Name it.", "--output", str(tmp_path / "out")])
    printed = capfd.readouterr().out
    assert "0 fail" in printed
    assert "trajectory" in printed
    assert "not run  no rows to train on" in printed


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_which_case_side_and_level_of_how_many(
    terminal: bool,
    tmp_path: Path,
    model_dirs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = with_template(trained_adapter("llama", model_dirs, tmp_path / "adapter"))
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main(["compare", "--adapter", str(adapter), "--output", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.split("\r") if ", level " in line]
    levels = [f"level {number} of {len(LEVELS)}: " for number in range(1, len(LEVELS) + 1)]
    for side in ("plainlora", "PEFT"):
        own = [line for line in lines if f", {side}, level " in line]
        told = list(dict.fromkeys(line.partition("%")[0] for line in own))  # a bar is drawn more often than it changes
        assert [level in line for level, line in zip(levels, told, strict=terminal)] == [True] * len(told)
        assert all("| 0/1 [" in line for line in own)
    assert bool(lines) is terminal


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--config", "a.yaml", "--adapter", "b"], "not allowed with argument"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--", "--lora_r", "3"], "is for --config only"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--lora_backend", "peft"], "invalid choice: 'peft'"),
        ([*GPT2, "--", "--lora_backend", "peft"], "PEFT would be compared with itself"),
        (["--lora_backend", "fused", *GPT2, "--", "--lora_backend", "reference"], "contradicts the recipe's"),
        (["--lora_backend", "reference", *GPT2, "--", "--lora-backend=fused"], "contradicts the recipe's"),
        (["--lora_backend", "fused", *CLASSIFY, "--", "--lora_backend", "reference"], "contradicts the recipe's"),
        ([*GPT2, "--", "--lora_backend", "foo"], "invalid choice: 'foo'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    typed: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--output", str(tmp_path / "out"), *typed])
    assert stopped.value.code == 2
    message = capfd.readouterr().err.strip()
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
