"""What early stopping sets of the other settings, and what it refuses by name."""

from pathlib import Path

import pytest
import yaml

from plainlora.errors import UserError
from plainlora.settings.programs import CLASSIFY, SFT, Program

PROGRAMS = pytest.mark.parametrize("program", [SFT, CLASSIFY], ids=["sft", "classify"])


def parse(program: Program, folder: Path, *flags: str, **yaml_settings: object) -> object:  # type: ignore[type-arg]
    content = {"model_name_or_path": "gpt2", "dataset_name": "rows.jsonl", "output_dir": str(folder / "out")}
    if program is CLASSIFY:
        content |= {"lora_target_modules": ["c_attn"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | yaml_settings))
    return program.parse(["--config", str(folder / "recipe.yaml"), "--use_cpu", "true", *flags])


@PROGRAMS
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("steps", "steps", 0.1, 0.1)),
        ({"eval_steps": 30}, ("steps", "steps", 30, 30)),
        ({"save_steps": 30}, ("steps", "steps", 30, 30)),
        ({"eval_strategy": "epoch", "num_train_epochs": 9}, ("epoch", "epoch", None, 500)),
        ({"save_strategy": "epoch", "num_train_epochs": 9}, ("epoch", "epoch", None, 500)),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, ("steps", "best", 0.1, 500)),
    ],
    ids=str,
)
def test_what_nobody_gave_is_set(
    program: Program,  # type: ignore[type-arg]
    tmp_path: Path,
    given: dict[str, object],
    expected: tuple[object, ...],
) -> None:
    settings = parse(program, tmp_path, "--early_stopping_patience", "3", **given)
    training = settings.training  # type: ignore[attr-defined]
    found = training.eval_strategy.value, training.save_strategy.value, training.eval_steps, training.save_steps
    assert found == expected
    assert training.load_best_model_at_end
    assert training.metric_for_best_model == "loss"
    assert settings.origins["load_best_model_at_end"] == "early_stopping_patience needs it"  # type: ignore[attr-defined]


@PROGRAMS
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_strategy": "no"}, "early_stopping_patience: eval_strategy no leaves no checkpoint to judge"),
        ({"save_strategy": "no"}, "early_stopping_patience: save_strategy no leaves no checkpoint to judge"),
        ({"load_best_model_at_end": False}, "saves the best checkpoint; leave load_best_model_at_end out"),
        ({"eval_strategy": "steps", "save_strategy": "epoch"}, "eval_strategy is steps and save_strategy epoch"),
        ({"eval_steps": 30, "save_steps": 60}, "eval_steps is 30 and save_steps 60; set them to the same"),
        ({"eval_strategy": "epoch", "num_train_epochs": 4}, "of 4 evaluations none could stop the run before its end"),
        ({"eval_steps": 30, "max_steps": 100}, "of 3.33 evaluations none could stop the run before its end"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be at least 1, not 0"),
    ],
    ids=str,
)
def test_what_contradicts_it_is_refused_by_name(
    program: Program,  # type: ignore[type-arg]
    tmp_path: Path,
    given: dict[str, object],
    said: str,
) -> None:
    with pytest.raises(UserError) as raised:
        parse(program, tmp_path, **{"early_stopping_patience": 3} | given)
    assert said in str(raised.value)


@PROGRAMS
def test_without_it_nothing_is_set(program: Program, tmp_path: Path) -> None:  # type: ignore[type-arg]
    training = parse(program, tmp_path).training  # type: ignore[attr-defined]
    assert not training.load_best_model_at_end
    assert training.eval_strategy == "no"
