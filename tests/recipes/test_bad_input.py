"""Bad input to the recipe: one line that says what to do, exit code 2, and nothing written."""

import json
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from plainlora import errors
from plainlora.base.loading import load_causal_lm
from plainlora.errors import UserError
from tests.conftest import ROOT, ROWS, run_program
from tests.refusals import Run, snapshot, the_one_line, without_progress

Capture = pytest.CaptureFixture[str]

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TEMPLATE = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
ROW = '{"instruction": "a", "output": "b"}\n'


@pytest.fixture
def base(model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path) -> dict[str, str]:
    """A command line with nothing wrong."""
    return {
        "model_name_or_path": str(model_dirs["llama"]), "dataset_name": str(rows_file), "prompt_template": "alpaca",
        "output_dir": str(tmp_path / "out"), "max_steps": "1", "max_length": "200", "use_cpu": "true",
    }  # fmt: skip


def command(base: dict[str, str], changes: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in (base | changes).items()]


@pytest.fixture
def recipe(
    base: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs recipes/sft.py in this process, as `python recipes/sft.py` does, and returns its one line."""

    def run(*typed: str, **changes: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recipes/sft.py", *command(base, changes), *typed])
        output = Path(changes.get("output_dir", base["output_dir"]))
        before = snapshot(tmp_path)
        existed = output.exists()
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
        assert snapshot(tmp_path) == before
        assert output.exists() == existed
        return the_one_line(raised.value.code, *capfd.readouterr())

    return run


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_the_helper_sees_what_is_no_progress_bar() -> None:
    bars = "\rMap:   0%|          | 0/40 [00:00<?, ? examples/s]\rMap: 100%|####| 40/40 [00:00<00:00, 9 examples/s]\n"
    assert without_progress(bars) == []
    assert without_progress(bars + "UserWarning: x\nerror: y\n") == ["UserWarning: x", "error: y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_seq_length: 5\n", r"recipe.yaml: max_seq_length is not an option; did you mean max_length\?"),
        ("- a list\n", r"recipe.yaml must be a YAML mapping of `name: value` lines; it is a list"),
        ("seed: soon\n", r"recipe.yaml: argument --seed: invalid int value: 'soon'"),
    ],
)
def test_u22_a_bad_yaml(recipe: Run, tmp_path: Path, content: str, said: str) -> None:
    assert re.search(said, recipe("--config", write(tmp_path / "recipe.yaml", content)))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--learing_rate=1", r"--learing_rate is not an option; did you mean learning_rate\?"),
        ("--lora_target_modules=(((", r"'\(\(\(' is not a regular expression"),
        ("--eval_strategy=steps", r"need test rows: set test_split_size or eval_dataset_name"),
        ("--exact_match_rows=3", r"need test rows: set test_split_size or eval_dataset_name"),
        ("--lora_target_modules=foo", r"target_modules: 'foo' matches no module; the linear layers are .*q_proj"),
        ("--lora_target_modules=lm_head", r"the output head cannot carry LoRA"),
        ("--max_length=9999", r"max_length 9999 is longer than the model's context of 256 tokens; lower it"),
        ("--max_length=20", r"40 of 40 rows are longer than max_length=20 tokens"),
        ("--prompt_template=alpacca", r"neither a built-in template \(alpaca, llama2\) nor a .jinja file"),
        ("--eos_token=<nope>", r"eos_token '<nope>' is not in the vocabulary"),
        ("--resume_from_checkpoint=true", r"holds no whole checkpoint; leave it out to start"),
        ("--attn_implementation=flash_attention_2", r"attn_implementation 'flash_attention_2' cannot be used here \("),
        ("--attn_implementation=quick", r"attn_implementation 'quick' cannot be used here \(.*; leave it out"),
        ("--lr_scheduler_type=cosine_with_min_lr", r"lr_scheduler_type cosine_with_min_lr: .*min_lr.* see lr_sch"),
        ("--test_split_size=40", r"test_split_size: 40 of 40 rows leaves none to train on"),
        ("--lora_r=0", r"r must be a whole number of at least 1, not 0"),
        ("--model_name_or_path=nobody/nothing", r"'nobody/nothing' cannot be loaded from the Hub .*make quickstart"),
        ("--model_name_or_path=./nowhere", r"there is no folder ./nowhere"),
        ("--dataset_name=nobody/nothing", r"'nobody/nothing' cannot be loaded from the Hub .*make quickstart"),
        ("--dataset_name=nowhere.jsonl", r"there is no file nowhere.jsonl; give a Hub id, a folder, or a json"),
    ],
)
def test_a_bad_setting(recipe: Run, typed: str, said: str) -> None:
    assert re.search(said, recipe(typed))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"rows.jsonl is empty"),
        ("[]", r"rows.jsonl \(train\) has no rows"),
        (ROW + '{"instruction": "a", "output": null}\n', r"rows.jsonl \(train\) row 2: 'output' is missing or null"),
        (ROW + ROW + "{\n", r"rows.jsonl line 3: malformed JSON"),
        ('{"question": "a"}\n', r"rows.jsonl \(train\) has the columns question; needed are"),
        ('{"text": ""}\n', r"no row is left with a token to train on"),
        ('{"messages": 5}\n', r"row 1: 'messages' must be a list of messages, not int"),
    ],
)
def test_bad_rows(recipe: Run, tmp_path: Path, content: str, said: str) -> None:
    assert re.search(said, recipe(dataset_name=write(tmp_path / "rows.jsonl", content)))


@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
def test_u22_faults_of_the_settings_are_told_together_before_rows_are_read(
    base: dict[str, str], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    rows = write(tmp_path / "rows.jsonl", "{")  # which no reader takes
    wrong = {"lora_r": "0", "learning_rate": "-1", "packing_strategy": "wrapped", "packing": "true", "rnk": "4"}
    changes = wrong | {"dataset_name": rows, "lora_backend": backend}
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", *command(base, changes)])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
    lines = capfd.readouterr().err.splitlines()
    assert raised.value.code == 2
    assert [line.split()[:2] for line in lines] == [
        ["error:", "--rnk"], ["error:", "learning_rate"], ["error:", "r"], ["error:", "packing_strategy=wrapped"],
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert "r must be a whole number of at least 1, not 0" in lines[2]


def test_conversations_without_generation_markers_on_answers_only(recipe: Run, tmp_path: Path) -> None:
    rows, template = write(tmp_path / "rows.jsonl", CHAT), write(tmp_path / "own.jinja", TEMPLATE)
    said = recipe("--assistant_only_loss", dataset_name=rows, prompt_template=template)
    assert "cannot be derived" in said
    assert "give one with {% generation %} markers: --prompt_template FILE.jinja" in said


def test_another_runs_folder_is_left_as_it_was(recipe: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "run.json", "{}")
    assert re.search(r"out holds another run \(run.json\); .*--overwrite", recipe())
    # Even where it may be replaced: not before the rest of the input has been checked.
    assert "matches no module" in recipe("--overwrite", "--lora_target_modules=foo")


def test_a_strangers_folder_is_left_as_it_was(recipe: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "README.md", "mine")
    assert "is not a run's folder, but holds README.md; give another" in recipe("--overwrite")


def test_an_output_dir_that_holds_the_rows_or_the_base(
    recipe: Run, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    rows = write(tmp_path / "rows.jsonl", ROW)
    said = recipe("--overwrite", dataset_name=rows, output_dir=str(tmp_path))
    assert f"is or holds the dataset {rows}; give a folder of its own" in said
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    said = recipe("--overwrite", model_name_or_path=str(base), output_dir=str(base))
    assert f"is or holds the base model {base}; give a folder of its own" in said


def test_an_output_dir_that_holds_the_adapter_to_go_on_from(recipe: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    for adapter in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        said = recipe("--overwrite", adapter_name_or_path=str(adapter), output_dir=str(tmp_path / "run"))
        assert f"is or holds the adapter {adapter}; give a folder of its own" in said


def test_a_base_that_is_an_adapter(recipe: Run, tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    write(base / "adapter_config.json", "{}")
    assert "is or holds an adapter, not a base model alone" in recipe(model_name_or_path=str(base))
    with pytest.raises(UserError, match="merge it first"):
        load_causal_lm(str(base))


def test_a_base_whose_adapter_only_the_library_sees(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_hf_peft_config_loaded", True)
    with pytest.raises(UserError, match="holds an adapter beside the base model"):
        load_causal_lm(str(model_dirs["llama"]))


def test_a_base_that_cannot_be_loaded(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"base/model.safetensors is cut short or damaged \(.+\); copy it again$"):
        load_causal_lm(str(base))


def test_a_repository_that_cannot_be_made(recipe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give its Hub id with --hub_base_model" in recipe(push_to_hub="true")
    base = {"push_to_hub": "true", "hub_base_model": "meta-llama/Llama-2-7b-hf"}
    assert "hub_always_push: there is one push" in recipe(**base, hub_always_push="true")
    assert "'a/b/c' is not a name of a repository" in recipe(**base, hub_model_id="a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert "the Hub is switched off (HF_HUB_OFFLINE)" in recipe(**base)


def test_an_interrupted_run_says_how_to_go_on(capfd: Capture) -> None:
    with pytest.raises(SystemExit) as raised:
        errors.run_program(lambda: signal.raise_signal(signal.SIGINT))
    assert raised.value.code == 130
    said = capfd.readouterr().err
    assert re.fullmatch(r"SIGINT: stopped; .* --resume_from_checkpoint true .*\n", said)


def test_an_output_dir_below_a_file(recipe: Run, tmp_path: Path) -> None:
    write(tmp_path / "file", "x")
    assert re.search(r"output_dir .*file is a file; give a folder", recipe(output_dir=str(tmp_path / "file" / "out")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dataset_name": "CHAT", "prompt_template": "OWN", "assistant_only_loss": "true"},
            r"{% generation %} markers",
        ),
        ({"model_name_or_path": "nobody/nothing"}, r"'nobody/nothing' cannot be loaded from the Hub"),
        ({"dataset_name": "ROWS"}, r"row 2: 'output' is missing or null; fix or remove the row"),
    ],
)
def test_as_a_process_of_its_own(base: dict[str, str], tmp_path: Path, changes: dict[str, str], said: str) -> None:
    files = {
        "ROWS": write(tmp_path / "rows.jsonl", json.dumps(ROWS[0]) + '\n{"instruction": "a"}\n'),
        "CHAT": write(tmp_path / "chat.jsonl", CHAT),
        "OWN": write(tmp_path / "own.jinja", TEMPLATE),
    }
    changes = {name: files.get(value, value) for name, value in changes.items()}
    done = run_program("recipes/sft.py", *command(base, changes))
    assert re.search(said, the_one_line(done.returncode, done.stdout, done.stderr))
    assert not (tmp_path / "out").exists()
