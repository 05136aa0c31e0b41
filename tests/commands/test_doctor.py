"""`plainlora doctor`: what it says of every recipe of the project, and of broken ones."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plainlora.commands import main
from plainlora.settings.programs import CLASSIFY, find_program
from tests.conftest import ROOT
from tests.refusals import Run, snapshot

RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
KINDS = {"gpt2-alpaca-gpt4": "gpt2", "qwen2-0.5b-alpaca-gpt4": "qwen2", "llama2-7b-guanaco": "llama",
         "distilbert-imdb": "distilbert", "gpt2-sms-spam": "gpt2"}  # fmt: skip
Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the verb in this process, in a folder that it must leave as it was: its exit code and what it wrote."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        capfd.readouterr()
        code = 0
        try:
            main(["doctor", *map(str, arguments)])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        assert snapshot(tmp_path) == before
        return code, capfd.readouterr().out

    return run


@pytest.fixture
def small(
    model_dirs: dict[str, Path], backbone_dirs: dict[str, Path], rows_file: Path, texts_file: Path, tmp_path: Path
) -> Callable[[Path], list[str]]:
    """Flags that put a tiny base and rows of this disk in the place of a recipe's own, as weights were never there."""

    def flags(recipe: Path) -> list[str]:
        classifies = find_program(str(recipe)) is CLASSIFY
        source = (backbone_dirs if classifies else model_dirs)[KINDS[recipe.parent.name]]
        base = tmp_path / "base"
        shutil.copytree(source, base, ignore=shutil.ignore_patterns("*.safetensors"))
        rows = {"dataset_name": texts_file, "text_column": "text", "test_split_size": 20} if classifies else {}
        rows = rows or {"dataset_name": rows_file, "max_length": 256, "test_split_size": 8}
        labels = ["--labels", "ham", "spam"] if classifies else []
        return ["--", f"--model_name_or_path={base}", *(f"--{name}={value}" for name, value in rows.items()), *labels]

    return flags


def test_every_recipe_is_healthy(doctor: Doctor, small: Callable[[Path], list[str]], tmp_path: Path) -> None:
    examined = []
    for recipe in RECIPES:
        if recipe.parent.name == "quickstart":
            continue
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        code, said = doctor("--config", recipe, "--json", *small(recipe))
        found = json.loads(said)
        assert (code, found["passed"]) == (0, True), said
        assert found["counts"]["warning"] == found["counts"]["error"] == 0, said
        assert found["counts"]["ok"] >= 10
        assert found["footprint"]["memory"]["peak"] > 0
        examined.append(recipe.parent.name)
    assert len(examined) == 8


def test_the_quickstart_is_healthy_as_it_is(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code, said = doctor("--config", "recipes/quickstart/lora.yaml")
    assert code == 0
    assert said.endswith("nothing wrong\n")
    for part in (
        "recipes/quickstart/lora.yaml, for recipes/sft.py\n",
        "train rows: 2,155 of 2,155 rows, 104,107 tokens (6,090 trained); median 44, 95 % up to 60, longest 66\n",
        "  lora_r                       16                       default\n",
        "  learning_rate                0.002                    lora.yaml\n",
        "  What is the plural of family?\n",
        "  ⟦families<|endoftext|>⟧\n",
        "the inference prompt's tokens begin every row",
        "LoRA on 28 layers (4 q_proj, ",
        "  adapter          float32\n",
        "\nmemory, disk and time, counted from the config\n  parameters  186,368 of 1,662,368 are trained (11.21%)\n",
    ):
        assert part in said, part
    assert "\033" not in said


BAD = """
model_name: BASE
torch_dtype: float16
max_seq_length: 256
save_safetensors: true
evaluation_strategy: epoch
lora_target_modules: [q_proj, v_prj]
dataset_name: ROWS
prompt_template: TEMPLATE
packing: true
packing_strategy: wrapped
output_dir: out
"""


def write_bad(folder: Path, base: Path, rows: Path) -> Path:
    template = folder / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    content = BAD.replace("BASE", str(base)).replace("ROWS", str(rows)).replace("TEMPLATE", str(template))
    (folder / "bad.yaml").write_text(content, encoding="utf-8")
    return folder / "bad.yaml"


def errors(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["subject"], one["check"]) for one in found["findings"] if one["level"] == "error"]


def test_u22_a_bad_recipe_is_told_everything_at_once(
    doctor: Doctor, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    recipe = write_bad(tmp_path, model_dirs["llama"], rows_file)
    code, said = doctor("--config", recipe, "--json")
    found = json.loads(said)
    assert code == 1
    assert sorted(errors(found)) == sorted(
        [
            *[("settings", "name")] * 5,
            ("settings", "contradiction"),  # wrapped packing
            ("train rows", "eos"),  # a template without EOS
            ("test rows", "there"),  # for an evaluation each epoch
            ("adapter", "layers"),  # v_prj
        ]
    )
    assert found["settings"]["max_length"] == {"value": 256, "origin": str(recipe)}
    text = doctor("--config", recipe)[1]
    assert (
        "  error    name: max_seq_length is not an option; did you mean max_length?; read here as max_length: 256\n"
        in text
    )
    assert re.search(r"doctor: \d+ checks, 9 errors", text)
    coloured = doctor("--config", recipe, "--color")[1]
    assert "  \033[1;31merror  \033[0m  name: max_seq_length" in coloured
    assert "trained is what is green\n  \033[1;32m" in coloured


@pytest.mark.parametrize("program", ["sft", "classify"])
def test_a_base_or_rows_that_cannot_be_had_leave_the_other_checks(
    doctor: Doctor, model_dirs: dict[str, Path], backbone_dirs: dict[str, Path], rows_file: Path, texts_file: Path,
    tmp_path: Path, program: str,
) -> None:  # fmt: skip
    base, rows = (model_dirs["llama"], rows_file) if program == "sft" else (backbone_dirs["bert"], texts_file)
    kind = (
        "prompt_template: alpaca\nmax_length: 256\nlora_target_modules: [q_proj]\n"
        if program == "sft"
        else "lora_query: true\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{kind}model_name_or_path: {base}\ndataset_name: {rows}\noutput_dir: out\n", encoding="utf-8")
    code, said = doctor("--config", recipe, "--json", "--", "--model_name_or_path", "nobody/nothing")
    found = json.loads(said)
    assert code == 1
    assert set(errors(found)) >= {("base", "config"), ("tokenizer", "there")}
    assert "not tokenised: there is no tokenizer" in said
    code, said = doctor("--config", recipe, "--json", "--", "--dataset_name", "gone.jsonl")
    found = json.loads(said)
    assert code == 1
    assert errors(found) == [("rows", "there")]
    assert ("adapter", "layers", "ok") in [(one["subject"], one["check"], one["level"]) for one in found["findings"]]


def test_an_empty_recipe_lacks_base_and_rows(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n", encoding="utf-8")
    code, said = doctor("--config", tmp_path / "recipe.yaml")
    assert code == 1
    assert "model_name_or_path is missing" in said
    assert "dataset_name is missing" in said


def test_settings_that_fit_no_base_or_no_start(
    doctor: Doctor, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {model_dirs['llama']}\ndataset_name: {rows_file}\nprompt_template: alpaca\n"
        "output_dir: out\nlora_target_modules: [lm_head]\n",
        encoding="utf-8",
    )
    flags = ["--max_length=9999", "--base_dropout=0.5", "--lr_scheduler_type=cosine_with_min_lr", "--eos_token=<nope>"]
    code, said = doctor("--config", "recipe.yaml", "--", *flags, "--resume_from_checkpoint=gone")
    assert code == 1
    for part in (
        "max_length 9999 is longer than the model's context of 256 tokens; lower it",
        "lr_scheduler_type cosine_with_min_lr",
        "eos_token '<nope>' is not in the vocabulary",
        "resume_from_checkpoint: gone is no checkpoint folder",
        "the output head cannot carry LoRA",
        "  warning  output folder: training would not start: out holds another run (run.json)",
    ):
        assert part in said, part


def test_a_recipe_that_cannot_be_read_is_refused(plainlora: Run, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf-8")
    assert "must be a YAML mapping" in plainlora("doctor", "--config", tmp_path / "list.yaml")
    assert "there is no file gone.yaml" in plainlora("doctor", "--config", "gone.yaml")
    assert "required: --config" in plainlora("doctor")
