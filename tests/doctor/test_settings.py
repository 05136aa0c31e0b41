"""Settings are read past every error, and every error is told."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from plainlora.doctor.finding import Examination
from plainlora.doctor.settings import list_settings, read_settings
from plainlora.errors import UserError
from plainlora.settings.parsing import READ_BY_NOTHING
from plainlora.settings.programs import CLASSIFY, SFT, Program, find_program
from plainlora.settings.renames import RENAMES
from tests.conftest import ROOT
from tests.gpu_host import cpu_host

BASE = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\n"
NAMES = {
    program: {field.name for kind in program.dataclass_types for field in fields(kind)} - {*READ_BY_NOTHING}
    for program in (SFT, CLASSIFY)
}


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, *flags: str, program: Program = SFT) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Every setting, the message of every error, and where each setting came from."""
    Path("recipe.yaml").write_text(BASE + text, encoding="utf-8")
    examination = Examination()
    with cpu_host(bf16=False):
        settings = read_settings(program, "recipe.yaml", flags, examination)
    values = {name: value for part in settings.parts for name, value in vars(part).items()}
    return values, [finding.message for finding in examination.at("error")], settings.origins


@pytest.mark.parametrize("name", RENAMES)
def test_u22_a_stale_name_is_no_option_and_todays_name_is_one(name: str) -> None:
    assert not any(name in names for names in NAMES.values())
    today = RENAMES[name].today
    assert today is None or any(today in names for names in NAMES.values())


def test_u22_every_stale_name_is_told_at_once_and_read_under_todays() -> None:
    values, errors, origins = read(
        "torch_dtype: torch.bfloat16\nmax_seq_length: 300\nevaluation_strategy: epoch\nwarmup_ratio: 0.1\n"
        "group_by_length: true\nsave_safetensors: true\noverwrite_output_dir: true\nno_cuda: true\n"
        "logging_dir: logs\nuse_4bit: true\nuse_nested_quant: true\nlora_rank: 4\ntokenizer: t\n"
    )
    assert len(errors) == 13
    assert all("is not an option" in error for error in errors)
    expected = {
        "max_length": 300, "eval_strategy": "epoch", "warmup_steps": 0.1, "lora_r": 4, "overwrite": True,
        "train_sampling_strategy": "group_by_length", "use_cpu": True, "load_in_4bit": True,
        "use_bnb_nested_quant": True, "dtype": "float32",  # on a CPU
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert (
        "recipe.yaml: max_seq_length is not an option; did you mean max_length?; read here as max_length: 300"
        in errors
    )
    gone = "recipe.yaml: save_safetensors is not an option; leave it out: weights are always saved as safetensors"
    assert f"{gone}; left out here" in errors
    assert origins["lora_r"] == "recipe.yaml"
    assert origins["dtype"] == "no GPU here"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("group_by_length: false\n", "train_sampling_strategy", "random"),
        ("block_size: 7\nmax_length: 9\n", "max_length", 9),  # what stands there under today's name wins
        ("block_size: 7\nmax_seq_length: 9\n", "max_length", 7),
        ("max_seq_length: many\n", "max_length", None),  # and not TRL's 1024, which nobody wrote
        ("max_length: 128.0\n", "max_length", None),
        ("alpha: 4\n", "lora_alpha", 32),  # divided by r or not: only its author knows
        ("learing_rate: 1.0\n", "learning_rate", 2e-5),  # the nearest name is a guess
        ("seed: soon\n", "seed", 42),
        ("seed: [1]\n", "seed", 42),
        ("lora_backend: best\n", "lora_backend", "fused"),
    ],
)
def test_u22_what_cannot_be_read_for_certain_is_left_out(text: str, name: str, value: object) -> None:
    values, errors, _ = read(text)
    assert values[name] == value
    assert any(error.endswith("; left out here") for error in errors)


def test_u22_stale_flags_are_read_like_stale_lines() -> None:
    values, errors, origins = read(
        "",
        "--max_seq_length=300",
        "--no_cuda",
        "--target_modules",
        "q_proj",
        "v_proj",
        "--lora_r",
        "x",
        "--rnk",
        "4",
        "y",
    )
    assert (values["max_length"], values["use_cpu"]) == (300, True)
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert values["lora_r"] == 16
    assert len(errors) == 5
    assert origins["max_length"] == "command line"
    assert read("", "stray", "--seed", "3")[1][0].startswith("stray is not an option")


def test_u22_every_contradiction_is_told() -> None:
    values, errors, origins = read(
        "load_in_4bit: true\nload_in_8bit: true\nload_best_model_at_end: true\neval_strategy: epoch\n"
        "save_strategy: steps\ndataset_streaming: true\npacking: true\npacking_strategy: wrapped\nmax_length: null\n"
        "learning_rate: -1.0\nbase_dropout: 2.0\nreport_to: nobody\ndataset_config: c\n"
    )
    for part in (
        "8 bit and 4 bit precision at the same time",
        "--load_best_model_at_end requires the save and eval strategy to match",
        "dataset_streaming is not supported",
        "packing_strategy=wrapped is refused",
        "packing needs max_length",
        "learning_rate must be above 0, not -1.0",
        "base_dropout must be at least 0 and below 1",
        "there is no tracker 'nobody'",
    ):
        assert sum(part in error for error in errors) == 1, part
    # The rest of the recipe is still its own, and what had to go is said to have gone.
    assert (values["model_name_or_path"], values["max_length"], values["load_in_4bit"]) == ("m", None, True)
    assert values["load_in_8bit"] is False
    assert origins["load_in_8bit"] == "default, because of the error above"


@pytest.mark.parametrize(
    ("text", "name", "value", "said"),
    [
        ("per_device_train_batch_size: 0\n", "per_device_train_batch_size", 8, "must be at least 1, not 0"),
        ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps", 1, "must be at least 1, not 0"),
        ("max_length: 0\n", "max_length", None, "must be at least 1, not 0"),
        ("learning_rate: 0.0\n", "learning_rate", 2e-5, "must be above 0, not 0.0"),
        ("adam_beta1: 1.5\n", "adam_beta1", 0.9, "must be at least 0 and below 1, not 1.5"),
        ("max_steps: 0\n", "max_steps", -1, "takes no step"),
        ("num_train_epochs: 0\n", "num_train_epochs", 3.0, "takes no step"),
        ("lora_alpha: 0\n", "lora_alpha", 32, "it changes nothing"),
        ("lora_target_modules: []\n", "lora_target_modules", None, "is an empty list"),
        ("optim: lomo\n", "optim", "adamw_torch_fused", "You need to install `lomo_optim`"),
    ],
)
def test_u22_a_refused_value_is_told_once_and_not_gone_on_with(text: str, name: str, value: object, said: str) -> None:
    values, errors, origins = read(text)
    (error,) = errors
    assert error.startswith(f"{name} ")
    assert said in error
    assert values[name] == value
    assert origins[name].endswith(", because of the error above")


def test_u22_contradictions_of_a_classifier() -> None:
    _, errors, _ = read(
        "method: full\nload_in_4bit: true\nmerge: true\nlora_head: true\ntrain_head: true\nlabel_names: [a]\n"
        "metric_for_best_model: bleu\nlast_layers: [a]\nprediction_loss_only: true\n",
        program=CLASSIFY,
    )
    assert len(errors) == 7


def test_a_healthy_recipe_has_no_error_and_says_where_each_setting_is_from() -> None:
    Path("recipe.yaml").write_text(BASE + "lora_r: 4\nseed: 3\nhub_token: secret\n", encoding="utf-8")
    examination = Examination()
    read = read_settings(SFT, "recipe.yaml", ["--seed", "5"], examination)
    assert [finding.level for finding in examination.findings] == ["ok"]
    decided = {"gradient_checkpointing": ("as it fits", "counted")}
    settings = {setting.name: setting for setting in list_settings(read, decided)}
    assert (settings["lora_r"].value, settings["lora_r"].origin) == (4, "recipe.yaml")
    assert (settings["seed"].value, settings["seed"].origin) == (5, "command line")
    assert (settings["lora_alpha"].value, settings["lora_alpha"].origin) == (32, "default")
    assert (settings["gradient_checkpointing"].value, settings["gradient_checkpointing"].origin) == decided[
        "gradient_checkpointing"
    ]
    assert "hub_token" not in settings


def test_a_file_that_is_no_yaml_is_not_examined() -> None:
    Path("recipe.yaml").write_text("- a\n", encoding="utf-8")
    for config in ("recipe.yaml", "gone.yaml"):
        with pytest.raises(UserError):
            read_settings(SFT, config, [], Examination())


def test_which_program_a_recipe_is_for() -> None:
    recipes = sorted(ROOT.glob("recipes/*/*.yaml"))
    assert len(recipes) == 10
    for path in recipes:
        program = CLASSIFY if "recipes/classify.py" in path.read_text(encoding="utf-8") else SFT
        assert find_program(str(path)) is program, path
    Path("open.yaml").write_text(BASE, encoding="utf-8")
    assert find_program("open.yaml") is SFT
    assert find_program("open.yaml", ["--label_column", "x"]) is CLASSIFY
