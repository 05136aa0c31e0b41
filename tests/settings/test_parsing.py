"""YAML first, command line last, and nothing ignored."""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from plainlora.errors import UserError
from plainlora.settings.arguments import dtype_of, parse_pattern
from plainlora.settings.parsing import read_yaml
from plainlora.settings.programs import CLASSIFY, SFT, Program
from tests.conftest import ROOT

BASE = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\n"
NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="not run: there is an accelerator")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def parse(text: str | bytes | None = None, *typed: str) -> dict[str, Any]:
    """Every setting after reading a YAML with this text and this command line."""
    if text is not None:
        content = text if isinstance(text, bytes) else (BASE + text).encode()
        Path("recipe.yaml").write_bytes(content)
        typed = ("--config", "recipe.yaml", *typed)
    parsed = SFT.parse(typed)
    return {name: value for part in parsed.parts for name, value in vars(part).items()}


def refusal(text: str | bytes | None, *typed: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(text, *typed)
    return str(raised.value)


def test_the_yaml_sets_and_the_command_line_wins() -> None:
    text = "seed: 1\nlora_r: 4\nsample_prompts: [a, b]\nmax_length: null\n"
    settings = parse(text, "--seed", "2", "--max-length", "7")
    assert (settings["seed"], settings["lora_r"], settings["max_length"]) == (2, 4, 7)
    assert parse(text, "--sample_prompts", "c")["sample_prompts"] == ["c"]
    assert parse(text)["sample_prompts"] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("learning_rate: 2.0e-4", "learning_rate", 2e-4),
        ("max_length: null", "max_length", None),
        ("packing: true", "packing", True),
        ("merge: no", "merge", False),
        ("eval_strategy: no", "eval_strategy", IntervalStrategy.NO),  # which YAML reads as false
        ("save_strategy: off", "save_strategy", SaveStrategy.NO),
        ("lora_init: true", "lora_init", "true"),
        ("lora_init: false", "lora_init", "false"),
        ("sample_prompts: []", "sample_prompts", []),
        ("sample_prompts: [--seed, -x, '- a']", "sample_prompts", ["--seed", "-x", "- a"]),
        ("sample_prompts:\n  - |\n    a\n    b", "sample_prompts", ["a\nb\n"]),
        ("lora_layers_to_transform: [0, 1]", "lora_layers_to_transform", [0, 1]),
        ("lora_target_modules: all-linear", "lora_target_modules", "all-linear"),
        ("report_to: [none]", "report_to", []),
        ("gradient_checkpointing_kwargs:\n  use_reentrant: false", "gradient_checkpointing_kwargs",
         {"use_reentrant": False}),
        ("lora_rank_pattern:\n  q_proj: 4", "lora_rank_pattern", '{"q_proj": 4}'),
        ("run_name: 50% of a=b", "run_name", "50% of a=b"),
        ("env:\n", "seed", 42),
    ],
)  # fmt: skip
def test_a_yaml_value_has_its_options_type(line: str, name: str, value: object) -> None:
    found = parse(line + "\n")[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "typed", "expected"),
    [
        ("", [], None),  # open until the recipe has counted
        ("gradient_checkpointing: null\n", [], None),
        ("gradient_checkpointing: true\n", [], True),
        ("gradient_checkpointing: false\n", [], False),
        ("gradient_checkpointing: false\n", ["--gradient_checkpointing"], True),
        ("gradient_checkpointing: true\n", ["--gradient_checkpointing", "false"], False),
        ("activation_checkpointing: true\n", [], True),
        ("", ["--activation_checkpointing=false"], False),
        ("gradient_checkpointing_kwargs:\n  use_reentrant: false\n", [], True),
        ("activation_checkpointing_kwargs:\n  use_reentrant: false\n", [], True),
        ("gradient_checkpointing_kwargs:\n  use_reentrant: false\n", ["--gradient_checkpointing", "false"], False),
    ],
)
def test_gradient_checkpointing_is_open_unless_said(text: str, typed: list[str], expected: bool | None) -> None:
    settings = parse(text, *typed)
    assert settings["gradient_checkpointing"] is expected
    assert settings["activation_checkpointing"] is expected


def test_the_fused_back_end_is_the_one_that_is_taken() -> None:
    assert parse("")["lora_backend"] == "fused"
    assert parse("", "--lora_backend", "reference")["lora_backend"] == "reference"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_seq_length", "max_length"),
        ("torch_dtype", "dtype"),
        ("evaluation_strategy", "eval_strategy"),
        ("warmup_ratio", "warmup_steps"),
        ("no_cuda", "use_cpu"),
        ("group_by_length", "train_sampling_strategy"),
        ("overwrite_output_dir", "overwrite"),
        ("learing_rate", "learning_rate"),
        ("lora_target_module", "lora_target_modules"),
        ("learning", "learning_rate"),  # no abbreviations
        ("lr", "learning_rate"),  # and not lora_r
        ("r", "lora_r"),
        ("epochs", "num_train_epochs"),
        ("lora_target", "lora_target_modules"),
        ("per_device_batch", "per_device_train_batch_size"),
    ],
)
def test_u22_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    said = f"{name} is not an option; did you mean {nearest}?"
    assert refusal(f"{name}: 5\n") == f"recipe.yaml: {said}"
    assert refusal("", f"--{name}", "5") == f"--{name} is not an option; did you mean {nearest}?"
    assert refusal("", f"--{name}=5").endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("word", ["zzzzzz", "--zzzzzz", "-x", "recipe.yaml", "--"])
def test_u22_what_resembles_nothing_is_refused(word: str) -> None:
    assert "is not an option; see --help for the names" in refusal("", word)


def test_u22_a_key_that_is_no_name_is_refused() -> None:
    for key in ("5", "null", "config"):
        assert f"recipe.yaml: {yaml.safe_load(key)} is not an option" in refusal(f"{key}: 5\n")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("seed", "abc", "invalid int value: 'abc'"),
        ("seed", "1.5", "invalid int value: '1.5'"),
        ("learning_rate", "fast", "invalid float value: 'fast'"),
        ("packing", "2", "Truthy value expected"),
        ("lora_backend", "foo", "invalid choice: 'foo' (choose from 'fused', 'reference', 'peft', 'peft_fused')"),
        ("on_overflow", "error", "invalid choice: 'error' (choose from 'drop', 'truncate')"),
        ("eval_strategy", "sometimes", "invalid choice: 'sometimes' (choose from 'no', 'steps', 'epoch')"),
        ("dtype", "int8", "invalid choice: 'int8'"),
    ],
)
def test_u22_a_wrong_type_or_choice_is_refused_from_both_sides(name: str, value: str, reason: str) -> None:
    from_file, typed = refusal(f"{name}: {value}\n"), refusal("", f"--{name}", value)
    assert from_file.startswith("recipe.yaml: argument --" + name)
    assert typed.startswith("argument --" + name)
    assert reason in from_file
    assert reason in typed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("seed: [1, 2]", "seed takes one value, not a list"),
        ("seed: []", "seed takes one value, not a list"),
        ("run_name: {a: b}", "run_name takes one value, not a mapping"),
        ("seed: null", "seed has no value"),
        ("merge:", "merge has no value"),
        ("sample_prompts: [yes, a]", "YAML reads yes, no, on and off as true and false; put the entry in quotes"),
        ("do_train: true", "do_train is not an option; leave it out: these programs always train"),
        ("use_peft: true", r"use_peft is not an option; did you mean method? (lora trains an adapter)"),
        ("sample_prompts: [a, null]", "an entry of the list is one value, not None"),
        ("sample_prompts: [[a]]", "an entry of the list is one value, not ['a']"),
        ("lora_layers_to_transform: [a]", "invalid literal for int()"),
        ("model_name_or_path: x", "'model_name_or_path' is given twice; keep one of them"),
        ("env: {A: 1, A: 2}", "'A' is given twice"),
        ("env: [A]", "env must be a mapping of variables, not a list"),
        ("env: {A=B: 1}", "env: 'A=B' cannot be set"),
        ("run_name: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("a: b: c", "is not valid YAML"),
        ("run_name: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
        ("? [a, b]\n: c", "is not valid YAML"),
        ("run_name: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_u22_a_yaml_line_that_cannot_be_meant_is_refused(line: str, reason: str) -> None:
    said = refusal(line + "\n")
    assert said.startswith("recipe.yaml")
    assert reason in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must be a YAML mapping of `name: value` lines; it is empty"),
        (b"- a\n", "must be a YAML mapping of `name: value` lines; it is a list"),
        (b"hello\n", "must be a YAML mapping of `name: value` lines; it is a str"),
        (b"\xff\x00\x17", "is not valid YAML"),
        (b"\0" * 20, "is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML: expected a single document"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(content: bytes, reason: str) -> None:
    said = refusal(content)
    assert said.startswith("recipe.yaml ")
    assert reason in said


def test_a_windows_file_with_byte_order_mark_is_read() -> None:
    assert parse(b"\xef\xbb\xbf" + (BASE + "seed: 3\n").replace("\n", "\r\n").encode())["seed"] == 3


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (["--config", "nope.yaml"], "there is no file nope.yaml; the recipes are recipes/*/*.yaml"),
        (["--config=nope.yaml"], "there is no file nope.yaml"),
        (["--config", "."], ". cannot be read: Is a directory"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config="], "--config needs the path of a YAML file"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(typed: list[str], reason: str) -> None:
    assert reason in refusal(None, *typed)


def test_the_env_block_sets_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PLAINLORA_TEST_A", "PLAINLORA_TEST_B"):
        monkeypatch.setenv(name, "before")
    parse("env:\n  PLAINLORA_TEST_A: 1\n  PLAINLORA_TEST_B:\n")
    assert os.environ["PLAINLORA_TEST_A"] == "1"
    assert not os.environ["PLAINLORA_TEST_B"]


@NO_ACCELERATOR
@pytest.mark.parametrize("text", ["fp16: true\ndtype: float16\n", "bf16: true\ndtype: bfloat16\n", ""])
def test_a_recipe_for_a_gpu_trains_in_fp32_on_a_cpu(text: str) -> None:
    settings = parse(text)
    assert (settings["fp16"], settings["bf16"], settings["dtype"]) == (False, False, "float32")


@NO_ACCELERATOR
def test_precision_typed_on_the_command_line_stays() -> None:
    settings = parse("fp16: true\ndtype: float16\n", "--bf16", "true", "--dtype", "bfloat16", "--use_cpu")
    assert (settings["fp16"], settings["bf16"], settings["dtype"]) == (False, True, "bfloat16")


@NO_ACCELERATOR
@pytest.mark.parametrize("typed", [["--fp16"], ["--fp16", "true"], ["--fp16=true", "--use_cpu", "true"]])
def test_fp16_typed_on_a_cpu_is_refused(typed: list[str]) -> None:
    assert refusal("", *typed) == "fp16 needs a GPU: leave --fp16 out, and a CPU trains in float32"


@pytest.mark.parametrize(("text", "typed"), [("use_cpu: true\n", []), ("", ["--use_cpu=true"]), ("", ["--use_cpu"])])
def test_use_cpu_means_fp32_wherever_it_is_said(text: str, typed: list[str]) -> None:
    settings = parse("bf16: true\ndtype: bfloat16\n" + text, *typed)
    assert (settings["use_cpu"], settings["bf16"], settings["dtype"]) == (True, False, "float32")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("packing: true\npacking_strategy: wrapped", "packing_strategy=wrapped is refused"),
        ("packing: true\nmax_length: null", "packing needs max_length"),
        ("dataset_streaming: true", "dataset_streaming is not supported"),
        ("ignore_bias_buffers: true", "ignore_bias_buffers is not supported"),
        ("dataset_kwargs: {a: 1}", "dataset_kwargs is not supported"),
        ("use_liger_kernel: true", "use_liger_kernel is not supported"),
        ("load_in_4bit: true\nload_in_8bit: true", "8 bit and 4 bit precision at the same time"),
        ("dtype: null", "dtype must be auto, float32, float16 or bfloat16, not None"),
        ("report_to: wandbb", "there is no tracker 'wandbb'; known are none, "),
        ("report_to: os.path", "there is no tracker 'os.path'"),
        ("lr_scheduler_kwargs: fast", "lr_scheduler_kwargs must be a mapping"),
        ("lora_rank_pattern: '{\"q_proj\": '", "lora_rank_pattern is not JSON"),
        ("lora_rank_pattern: '[1]'", "lora_rank_pattern maps module names to whole numbers above 0"),
        ("lora_alpha_pattern: {q_proj: true}", "lora_alpha_pattern maps module names to whole numbers above 0"),
        ("lora_alpha_pattern: {q_proj: 0}", "lora_alpha_pattern maps module names to whole numbers above 0"),
        ("test_split_size: 1.5", "test_split_size is a share below 1 or a whole number of rows, not 1.5"),
        ("test_split_size: -1", "test_split_size is a share below 1 or a whole number of rows, not -1"),
        ("test_split_size: .nan", "test_split_size is a share below 1"),
        ("test_split_size: .inf", "test_split_size is a share below 1"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused(line: str, reason: str) -> None:
    assert reason in refusal(line + "\n")


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("max_length", "0", "at least 1"),
        ("max_length", "-5", "at least 1"),
        ("max_train_rows", "0", "at least 1"),
        ("max_truncated", "2", "between 0 and 1"),
        ("max_truncated", "nan", "between 0 and 1"),
        ("exact_match_rows", "-1", "at least 0"),
        ("max_new_tokens", "0", "at least 1"),
        ("dataset_num_proc", "0", "at least 1"),
        ("per_device_train_batch_size", "0", "at least 1"),
        ("gradient_accumulation_steps", "0", "at least 1"),
        ("num_train_epochs", "-1", "at least 0"),
        ("learning_rate", "nan", "above 0"),
        ("learning_rate", "inf", "above 0"),
        ("learning_rate", "0", "above 0"),
        ("adam_beta1", "1.5", "at least 0 and below 1"),
        ("adam_beta2", "1", "at least 0 and below 1"),
        ("seed", "-1", "between 0 and 4294967295"),
        ("seed", "9" * 30, "between 0 and 4294967295"),
    ],
)
def test_a_number_out_of_range_is_refused(name: str, value: str, limits: str) -> None:
    assert f"{name} must be {limits}, not " in refusal("", f"--{name}", value)


@pytest.mark.parametrize("p", ["1", "1.5", "-0.1", "nan"])
def test_a_base_dropout_that_is_no_probability_below_1_is_refused(p: str) -> None:
    assert refusal(f"base_dropout: {p.replace('nan', '.nan')}\n") == (
        f"base_dropout must be at least 0 and below 1, not {float(p)}"
    )
    assert parse("", "--base_dropout", "0.99")["base_dropout"] == 0.99
    assert parse("")["base_dropout"] is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora_alpha: 0", "lora_alpha 0 multiplies every adapter by 0"),
        ("packing: false\neval_packing: true", "eval_packing True: test rows are packed as training rows are"),
        ("packing: true\npacking_strategy: bfd_split", "packing_strategy=bfd_split: longer rows are dropped or trunc"),
        (
            "env: {HF_HUB_OFFLINE: 1}",
            "env: HF_HUB_OFFLINE was read when the libraries were imported",
        ),
        ("lora_target_modules: []", "lora_target_modules is an empty list; name modules, or leave it out"),
        ("max_steps: 0", "max_steps 0 takes no step"),
        ("num_train_epochs: 0", "num_train_epochs 0 takes no step"),
        ("optim: lomo", "optim lomo: You need to install `lomo_optim`"),
        ("optim: galore_adamw", "optim galore_adamw: You need to install `galore_torch`"),
        ("optim_args: nonsense", "optim adamw_torch_fused: it cannot be made here ("),
        ("fsdp: full_shard", "fsdp is for several processes, and this is one"),
        ("fsdp: full_shard\nmethod: full", "method full: FSDP2 shards the base's weights, which this method trains"),
        ("lora_config: {init_lora_weights: pisa}", "init_lora_weights is 'pisa'; did you mean pissa?"),
        ("fsdp: full_shard\nfsdp_config: {version: 1}", "fsdp: version 1 is not supported; set fsdp_version: 2"),
        (
            "fsdp: full_shard\nfsdp_config: {cpu_ram_efficient_loading: true}",
            "cpu_ram_efficient_loading loses adapters",
        ),
        (
            "metric_for_best_model: accuracy",
            "there is no 'accuracy'; there are loss, perplexity, entropy, mean_token_a",
        ),
        ("metric_for_best_model: perplexity\ngreater_is_better: true", "the lower, the better"),
    ],
)
def test_what_would_fail_after_the_base_is_loaded_or_train_nothing_is_refused(line: str, said: str) -> None:
    assert said in refusal(line + "\n")


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
def test_keeping_the_end_of_rows_that_are_dropped_is_refused() -> None:
    line = "truncation_mode: keep_end\n"
    assert "truncation_mode keep_end: longer rows are dropped; set on_overflow to truncate" in refusal(line)
    assert parse(f"{line}on_overflow: truncate\n")["truncation_mode"] == "keep_end"


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "perplexity", "eval_entropy", "mean_token_accuracy"])
def test_what_an_evaluation_logs_may_choose_the_best_checkpoint(metric: str) -> None:
    text = "save_strategy: best\neval_strategy: steps\ngreater_is_better: false\n"
    assert parse(f"{text}metric_for_best_model: {metric}\n")["metric_for_best_model"] == metric


def test_of_perplexities_the_lower_is_the_better_unless_said_otherwise() -> None:
    text = "load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: steps\nmetric_for_best_model: "
    assert parse(f"{text}eval_perplexity\n")["greater_is_better"] is False
    assert parse(f"{text}mean_token_accuracy\n")["greater_is_better"] is True


def test_max_steps_makes_epochs_idle() -> None:
    assert parse("num_train_epochs: 0\nmax_steps: 3\n")["max_steps"] == 3


def test_a_setting_of_the_other_program_is_said_to_be_its_own() -> None:
    assert (
        refusal("text_column: x\n") == "recipe.yaml: text_column is not an option; it belongs to recipes/classify.py"
    )
    with pytest.raises(UserError, match=r"it belongs to recipes/sft\.py"):
        CLASSIFY.parse(["--packing", "true"])


@pytest.mark.parametrize("asked", ["by a flag", "by the launcher"])
def test_a_package_that_is_missing_is_said_in_one_line_with_the_extra_that_brings_it(
    asked: str, tmp_path: Path
) -> None:
    """In a process that finds every package that is installed but DeepSpeed."""
    for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        for path in Path(folder).iterdir():
            if not path.name.startswith("deepspeed"):
                (tmp_path / path.name).symlink_to(path)
    launched = {"ACCELERATE_USE_DEEPSPEED": "true"} if asked == "by the launcher" else {}
    flags = ("--deepspeed", "ds.json") if asked == "by a flag" else ()
    done = subprocess.run(
        [sys.executable, "-S", "recipes/sft.py", "--config", "recipes/quickstart/lora.yaml", *flags],
        cwd=ROOT, env=os.environ | launched | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(tmp_path)))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1:] == ['error: this needs deepspeed: pip install "plainlora[deepspeed]"']
    assert "Traceback" not in done.stderr


def test_refused_arguments_leave_nothing_behind_in_the_process() -> None:
    with pytest.raises(UserError) as refused:
        parse("deepspeed: ds.json\n")
    AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8))
    assert refused.value.__cause__ is not None  # whose traceback still holds the arguments


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    assert "clearml" not in parse("report_to: all\n")["report_to"]
    assert refusal("report_to: clearml\n") == (
        "report_to: clearml is not installed; pip install clearml, or set --report_to none"
    )


def test_model_and_data_are_asked_for() -> None:
    assert "model_name_or_path is missing" in refusal(None)
    assert "dataset_name is missing" in refusal(None, "--model_name_or_path", "m")


def test_an_output_dir_that_cannot_be_made_is_refused_before_training() -> None:
    Path("file").write_text("x")
    for folder, reason in (("file", "is a file; give a folder"), ("file/x/y", "is a file"), ("", "is empty")):
        assert reason in refusal("", f"--output_dir={folder}")
    assert parse("", "--output_dir", "new/folder")["output_dir"] == "new/folder"
    assert not Path("new").exists()


def test_patterns_and_dtypes_by_name() -> None:
    assert parse_pattern("lora_rank_pattern", '{"q_proj": 4}') == {"q_proj": 4}
    assert parse_pattern("lora_rank_pattern", None) == {}
    assert [dtype_of(name) for name in (None, "auto", "bfloat16")] == ["auto", "auto", torch.bfloat16]


RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
ACCELERATE = sorted(ROOT.glob("accelerate_configs/*.yaml"))


def program_of(path: Path) -> Program:
    """The program that a recipe is for, as its header says."""
    return CLASSIFY if "recipes/classify.py" in path.read_text(encoding="utf-8") else SFT


def defaults(classes: tuple[Any, ...]) -> dict[str, Any]:
    """Every option's default as the parser has it, before a dataclass adjusts it."""
    found = {}
    for owner in classes:
        for field in dataclasses.fields(owner):
            factory = field.default_factory
            found[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found


def test_every_yaml_of_the_project_is_covered_here() -> None:
    on_disk = [
        Path(folder) / name
        for top in ("recipes", "accelerate_configs")
        for folder, _, names in os.walk(ROOT / top)
        for name in names
        if name.endswith((".yaml", ".yml"))
    ]
    assert RECIPES
    assert ACCELERATE
    assert sorted(on_disk) == sorted(RECIPES + ACCELERATE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_parses_and_says_only_what_differs_from_the_defaults(path: Path) -> None:
    parts = program_of(path).parse(["--config", str(path)]).parts
    settings = {name: value for part in parts for name, value in vars(part).items()}
    content = read_yaml(path)
    standard = defaults(program_of(path).dataclass_types)
    said = content.keys() - {"env", "report_to", "output_dir", "learning_rate"}  # of which every recipe says its own
    assert sorted(name for name in said if content[name] == standard[name]) == []
    assert settings["output_dir"] == content["output_dir"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_begins_with_its_launch_line_hardware_and_memory(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))])
    assert f"--config {path.relative_to(ROOT)}" in comment
    assert "accelerate launch" in comment
    assert "Hardware" in comment
    assert "Memory" in comment


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_an_accelerate_config_reads_with_no_key_twice(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    content = read_yaml(path)
    assert json.dumps(content)
    assert {"compute_environment", "distributed_type", "num_processes"} <= content.keys()
