"""Early stopping: it stops, the best weights are saved, and a resumed run stops at the same step."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.conftest import RunClassify, RunSFT, run_classify, run_sft  # noqa: F401  # fixtures

# The worst is taken for the best: it is the first, and nothing is better after it.
WORST = ["--metric_for_best_model", "mean_token_accuracy", "--greater_is_better", "false"]


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def weights(folder: Path) -> bytes:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return (folder / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_stops_saves_the_best_and_stops_at_the_same_step_when_resumed(
    run_sft: RunSFT,  # noqa: F811
    method: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ["--method", method, "--early_stopping_patience", "3", *WORST, "--learning_rate", "2e-2"]
    flags += ["--max_steps", "40", "--eval_steps", "3", "--save_steps", "3", "--save_total_limit", "9"]
    whole = run_sft("llama", "whole", *flags)
    state = state_of(whole)
    best = state["best_global_step"]
    assert state["global_step"] == best + 9 < 40
    line = f"stopped early after step {best + 9} of 40: no better evaluation in the last 3; step {best} is kept\n"
    assert line in capfd.readouterr().out
    assert weights(whole) == weights(whole / f"checkpoint-{best}") != weights(whole / f"checkpoint-{best + 9}")
    run = json.loads((whole / "run.json").read_text())
    assert run["steps"] == best + 9
    assert run["arguments"]["load_best_model_at_end"] is True
    for after in (6, 9):  # in between, and where it had stopped
        name = f"after-{after}"
        for step in range(3, best + after + 1, 3):
            shutil.copytree(whole / f"checkpoint-{step}", whole.parent / name / f"checkpoint-{step}")
        resumed = run_sft("llama", name, *flags, "--resume_from_checkpoint", "true")
        again = state_of(resumed)
        assert (again["global_step"], again["best_global_step"]) == (best + 9, best)
        assert weights(resumed) == weights(whole)
        assert line in capfd.readouterr().out


def test_a_run_that_gets_better_goes_on_to_its_end_and_is_not_warned_of_the_bases_evaluation(
    run_sft: RunSFT,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    output = run_sft("llama", "run", "--early_stopping_patience", "1", "--max_steps", "12", "--learning_rate", "1e-3")
    assert state_of(output)["global_step"] == 12
    assert "stopped early" not in capfd.readouterr().out
    assert "early stopping" not in caplog.text


def test_a_start_that_is_the_best_is_told_from_a_rate_that_is_too_low(
    run_sft: RunSFT,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ["--early_stopping_patience", "1", *WORST, "--warmup_steps", "2", "--learning_rate", "2e-2"]
    with pytest.raises(SystemExit):
        run_sft("llama", "run", *flags, "--max_steps", "8", "--eval_steps", "1", "--save_steps", "1")
    said = capfd.readouterr()
    assert "stopped early after step 2 of 8: no better evaluation in the last 1; step 1 is kept" in said.out
    assert "the best of the evaluations is that of step 1, at which 14 of 14 adapters change nothing (" in said.err
    assert "so nothing was saved; lower learning_rate (now 0.02)\n" in said.err


def test_a_classifier_stops_too(run_classify: RunClassify) -> None:  # noqa: F811
    flags = ["--early_stopping_patience", "2", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    output = run_classify(
        *("distilbert", "run", *flags, "--max_steps", "30"), *("--eval_steps", "2", "--save_steps", "2")
    )
    state = state_of(output)
    assert state["global_step"] == state["best_global_step"] + 4 < 30
    assert weights(output) == weights(output / f"checkpoint-{state['best_global_step']}")
