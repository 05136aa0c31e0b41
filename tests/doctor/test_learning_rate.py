"""An adapter trained with the libraries' default learning rate is said, and no recipe does it."""

from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from plainlora.doctor.finding import Examination
from plainlora.doctor.learning_rate import examine_learning_rate
from plainlora.settings.arguments import ClassifyConfig, SFTRecipeConfig
from plainlora.settings.parsing import read_yaml
from tests.conftest import ROOT
from tests.recipes.conftest import RunClassify, RunSFT, run_classify, run_sft  # noqa: F401  # fixtures


@pytest.mark.parametrize(("kind", "upstream"), [(SFTRecipeConfig, SFTConfig), (ClassifyConfig, TrainingArguments)])
def test_the_libraries_default_is_a_warning_and_another_rate_is_none(
    kind: type[TrainingArguments], upstream: type[TrainingArguments], tmp_path: Path
) -> None:
    for given, level in (({}, "warning"), ({"learning_rate": 2e-4}, "ok")):
        examination, training = Examination(), kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
        examine_learning_rate(training, examination)
        (finding,) = examination.findings
        assert finding.level == level
    default = upstream(output_dir=str(tmp_path), use_cpu=True, bf16=False).learning_rate
    examination = Examination()
    examine_learning_rate(kind(output_dir=str(tmp_path), use_cpu=True, bf16=False), examination)
    assert examination.findings[0].message.startswith(f"learning_rate {default:g} is the default, ")


def test_the_programs_say_it_of_an_adapter_and_of_nothing_else(
    run_sft: RunSFT,  # noqa: F811
    run_classify: RunClassify,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    short = ["--max_steps", "2", "--eval_strategy", "no", "--learning_rate"]

    def warned() -> bool:
        return "warning: adapter: learning_rate" in capfd.readouterr().out

    run_sft("gpt2", "default", *short, "2e-5")
    assert warned()
    run_sft("gpt2", "own", *short, "2e-4")
    assert not warned()
    run_classify("bert", "lora", *short, "5e-5")
    assert warned()
    run_classify("bert", "full", *short, "5e-5", "--method", "full")
    assert not warned()


def test_every_recipe_sets_its_own() -> None:
    recipes = sorted(ROOT.glob("recipes/*/*.yaml"))
    assert len(recipes) == 10
    for recipe in recipes:
        assert "learning_rate" in read_yaml(recipe), recipe
