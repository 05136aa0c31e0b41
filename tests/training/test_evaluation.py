"""What the weights are worth that training left is measured once, and is what another measurement would find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from tests.recipes.conftest import RunClassify, RunSFT, run_classify, run_sft  # noqa: F401  # fixtures

Passes = list[str]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Notes for every pass over held-out rows what it is called."""
    noted: Passes = []
    loop: Callable[..., Any] = Trainer.evaluation_loop

    def noting(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        noted.append(kwargs["metric_key_prefix"])
        return loop(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluation_loop", noting)
    return noted


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def test_a_language_model_is_evaluated_once_at_the_end(run_sft: RunSFT, passes: Passes) -> None:  # noqa: F811
    fresh = results_of(run_sft("gpt2", "fresh", "--eval_strategy", "no", "--lora_dropout", "0"))
    assert passes == ["base", "eval"]
    for name, flags, expected in (
        ("steps", [], ["eval", "eval", "base"]),
        ("epoch", ["--eval_strategy", "epoch"], ["eval", "base"]),
        ("before", ["--eval_delay", "9"], ["base", "eval"]),
    ):
        passes.clear()
        results = results_of(run_sft("gpt2", name, *flags, "--lora_dropout", "0"))
        assert passes == expected, name
        for figure in ("eval_loss_base", "eval_loss_adapter", "eval_perplexity_adapter"):
            assert results[figure] == fresh[figure], (name, figure)


def test_the_figures_of_the_best_checkpoint_are_its_own(run_sft: RunSFT, passes: Passes) -> None:  # noqa: F811
    worst = ["--metric_for_best_model", "mean_token_accuracy", "--greater_is_better", "false"]
    for name, flags, best, expected in (
        ("last", [], 1, ["eval", "eval", "base"]),
        ("first", worst, 0, ["eval", "eval", "base", "eval"]),
    ):
        passes.clear()
        output = run_sft("gpt2", name, "--load_best_model_at_end", "true", "--learning_rate", "5e-2", *flags)
        assert passes == expected
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert losses[0] != losses[1]
        assert results_of(output)["eval_loss_adapter"] == losses[best]


def test_weights_that_are_cast_for_evaluation_are_evaluated_again(run_sft: RunSFT, passes: Passes) -> None:  # noqa: F811
    run_sft("gpt2", "run", "--bf16_full_eval", "true")
    assert passes == ["eval", "eval", "base", "eval"]


def test_a_classifiers_validation_rows_are_classified_once_at_the_end(
    run_classify: RunClassify,  # noqa: F811
    passes: Passes,
) -> None:
    fresh = results_of(run_classify("bert", "fresh", "--base_dropout", "0", "--eval_strategy", "no"))
    assert passes == ["test"] * 6  # training, validation and test rows, before and after
    passes.clear()
    results = results_of(run_classify("bert", "run", "--base_dropout", "0"))
    assert passes == ["eval"] * 2 + ["test"] * 5
    figures = [name for name in fresh if name.startswith(("training_", "validation_", "test_"))]
    assert len(figures) == 27
    for name in figures:
        same = results[name] if "loss" not in name else pytest.approx(results[name], rel=1e-6)
        assert fresh[name] == same, name
