"""`plainlora doctor`: what it says of every recipe of the project, and of broken ones."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from plainlora.base.loading import load_causal_lm
from plainlora.commands import main
from plainlora.errors import UserError
from plainlora.settings.programs import CLASSIFY, find_program
from tests.conftest import ROOT
from tests.refusals import Run, snapshot

RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
KINDS = {"gpt2-alpaca-gpt4": "gpt2", "qwen2-0.5b-alpaca-gpt4": "qwen2", "llama2-7b-guanaco": "llama",
         "distilbert-imdb": "distilbert", "gpt2-sms-spam": "gpt2", "instruct": "llama"}  # fmt: skip
CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
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


def hollow(base: Path) -> None:
    """Takes every value out of the weights: what is left says which there are."""
    for path in base.glob("*.safetensors"):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:header] + bytes(len(content) - header))


@pytest.fixture
def small(
    model_dirs: dict[str, Path], backbone_dirs: dict[str, Path], rows_file: Path, texts_file: Path, tmp_path: Path
) -> Callable[[Path], list[str]]:
    """Flags that put a tiny base and rows of this disk in the place of a recipe's own; no weight has its value."""

    def flags(recipe: Path) -> list[str]:
        classifies = find_program(str(recipe)) is CLASSIFY
        source = (backbone_dirs if classifies else model_dirs)[KINDS[recipe.parent.name]]
        base = tmp_path / "base"
        shutil.copytree(source, base)
        hollow(base)
        if recipe.parent.name == "instruct":
            (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
        rows = {"dataset_name": texts_file, "text_column": "text", "test_split_size": 20} if classifies else {}
        rows = rows or {"dataset_name": rows_file, "max_length": 256, "test_split_size": 8, "num_train_epochs": 100}
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
    assert len(examined) == 9


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


@pytest.mark.parametrize(("terminal", "json_too"), [(True, False), (True, True), (False, False)])
def test_progress_is_for_a_terminal_alone(
    terminal: bool,
    json_too: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main(["doctor", "--config", "recipes/quickstart/lora.yaml", *(["--json"] if json_too else [])])
    said = capsys.readouterr().err
    told = dict.fromkeys(re.findall(r"\r(\w+) [^\r]*\| (\d)/6 ", said))  # a bar is drawn more often than it changes
    if terminal and not json_too:
        assert list(told) == [
            ("reading", "1"), ("looking", "2"), ("reading", "3"), ("looking", "4"), ("building", "5"),
            ("counting", "6"),
        ]  # fmt: skip
    else:
        assert said == ""


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
            ("test rows", "missing"),  # for an evaluation each epoch
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
    assert "its trained part is green\n  \033[1;32m" in coloured


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
    assert set(errors(found)) >= {("base", "config"), ("tokenizer", "loading")}
    assert "not tokenised: there is no tokenizer" in said
    code, said = doctor("--config", recipe, "--json", "--", "--dataset_name", "gone.jsonl")
    found = json.loads(said)
    assert code == 1
    assert errors(found) == [("rows", "reading")]
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
        "resume_from_checkpoint: gone is not a checkpoint folder",
        "the output head cannot carry LoRA",
        "  warning  output folder: a new run needs --overwrite: out holds another run (run.json)",
    ):
        assert part in said, part


def test_a_recipe_that_cannot_be_read_is_refused(plainlora: Run, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf-8")
    assert "must be a YAML mapping" in plainlora("doctor", "--config", tmp_path / "list.yaml")
    assert "there is no file gone.yaml" in plainlora("doctor", "--config", "gone.yaml")
    assert "required: --config" in plainlora("doctor")


def recipe_for(folder: Path, base: Path, rows: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {base}\ndataset_name: {rows}\nprompt_template: alpaca\nmax_length: 256\n"
        "lora_target_modules: [q_proj]\nlora_r: 4\noutput_dir: out\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def own_base(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A base to be damaged."""
    return Path(shutil.copytree(model_dirs["llama"], tmp_path / "base"))


def damage(base: Path, how: str) -> None:
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    if how in ("missing", "pickled"):
        weights.unlink()
    if how == "pickled":
        (base / "pytorch_model.bin").write_bytes(b"x")
    if how == "empty":
        weights.write_bytes(b"")
    if how == "cut":
        weights.write_bytes(content[: len(content) // 2])
    if how == "pointer":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 12\n")
    if how == "reshaped":
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}), encoding="utf-8")
    if how == "sharded":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        weights.unlink()


DAMAGES = {
    "missing": "no file named model.safetensors",
    "pickled": "holds pytorch_model.bin and no model.safetensors",
    "empty": "model.safetensors is empty; copy it again",
    "cut": "model.safetensors is cut short or damaged (",
    "pointer": "is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`",
    "reshaped": "proj.weight is stored as (",
    "sharded": "model-00001-of-00002.safetensors is missing, which model.safetensors.index.json names",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_weights_that_could_not_be_loaded_are_an_error_here_and_to_the_programs(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path, how: str
) -> None:
    damage(own_base, how)
    code, said = doctor("--config", recipe_for(tmp_path, own_base, rows_file), "--json")
    found = json.loads(said)
    assert code == 1
    assert errors(found) == [("base", "loading")], said
    (error,) = [one["message"] for one in found["findings"] if one["level"] == "error"]
    assert DAMAGES[how] in error
    with pytest.raises(UserError) as raised:
        load_causal_lm(str(own_base))
    assert " ".join(str(raised.value).split()) == error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attn_implementation", "foo"], "attn_implementation 'foo' cannot be used here ("),
        (["--model_init_kwargs", '{"foo": 1}'], "model_init_kwargs: there is no 'foo' for "),
    ],
)
def test_what_the_base_does_not_take_is_an_error_and_not_the_end(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    code, written = doctor("--config", recipe_for(tmp_path, own_base, rows_file), "--json", "--", *flags)
    found = json.loads(written)
    assert code == 1
    assert [one["message"].startswith(said) for one in found["findings"] if one["level"] == "error"] == [True]


def test_a_tokenizer_that_is_not_there_is_said_to_be_missing(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    (own_base / "tokenizer_config.json").unlink()
    recipe = recipe_for(tmp_path, own_base, rows_file)
    assert "copy the base's tokenizer_config.json, which is missing" in doctor("--config", recipe)[1]
    (own_base / "tokenizer.json").unlink()
    assert (
        "holds no tokenizer (no tokenizer.json or the like)"
        in doctor("--config", recipe_for(tmp_path, own_base, rows_file))[1]
    )


def test_an_error_of_a_library_does_not_lose_the_report(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    recipe = recipe_for(tmp_path, own_base, rows_file)
    steps = {"check_vocabulary": ("tokenizer", "vocabulary"), "examine_rows": ("doctor", "examination")}
    for name, step in steps.items():
        with monkeypatch.context() as patched:
            patched.setattr(f"plainlora.doctor.stages.{name}", breaks)
            code, written = doctor("--config", recipe, "--json")
        found = json.loads(written)
        assert code == 1
        assert errors(found) == [step]
        assert "it could not be examined: RuntimeError: first" in written
        assert found["settings"]["lora_r"]["value"] == 4


def test_a_template_that_is_none_is_one_error(doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, own_base, rows_file)
    found = json.loads(doctor("--config", recipe, "--json", "--", "--prompt_template", "nope")[1])
    assert errors(found) == [("tokenizer", "template")]
    assert errors(json.loads(doctor("--config", recipe, "--json", "--", "--output_dir", "")[1])) == [
        ("settings", "contradiction")
    ]


def test_a_batch_is_never_larger_than_the_rows(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, own_base, rows_file)
    flags = ["--per_device_train_batch_size", "1000000", "--per_device_eval_batch_size", "1000000"]
    code, said = doctor("--config", recipe, "--json", "--", *flags)
    assert code == 0
    assert json.loads(said)["footprint"]["memory"]["peak"] < 64e9
    code, said = doctor("--config", recipe, "--", *flags, "--dataloader_drop_last", "true")
    assert code == 1
    assert "40 rows make no whole batch of 1,000,000" in said


def test_a_strangers_folder_is_an_error(doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine", encoding="utf-8")
    code, said = doctor("--config", recipe_for(tmp_path, own_base, rows_file))
    assert code == 1
    assert "  error    output folder: out is not a run's folder, but holds README.md" in said


def test_a_rank_and_a_scale_that_cannot_be_meant_are_warnings(
    doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, own_base, rows_file)
    code, said = doctor("--config", recipe, "--", "--lora_r", "5000", "--lora_alpha", "-8")
    assert code == 0
    assert "r exceeds the smaller of in and out features" in said
    assert "lora_alpha -8 is below 0; was that meant?" in said


LLAMAS = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "70B": (8192, 28672, 80, 8),
}


def bare_base(folder: Path, size: str) -> Path:
    """A base of that size without weights: its config and the quickstart's tokenizer."""
    width, inner, layers, keys = LLAMAS[size]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=keys, eos_token_id=0, pad_token_id=1, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes/quickstart/base" / name, folder)
    return folder


HALF = ("--precision", "bf16", "--dtype", "auto", "--per_device_train_batch_size", "1", "--max_steps", "4")


@pytest.mark.parametrize(
    ("size", "devices", "choice", "gigabytes"),
    [
        pytest.param("7B", "2x24GB", "ddp.yaml", 13.5, marks=pytest.mark.integration),
        pytest.param("13B", "8x24GB", "fsdp2.yaml", 26.0, marks=pytest.mark.integration),
        pytest.param("70B", "8x80GB", "fsdp2.yaml", 138.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_planned_from_a_config_without_weights(
    size: str, devices: str, choice: str, gigabytes: float, doctor: Doctor, rows_file: Path, tmp_path: Path
) -> None:
    base = bare_base(tmp_path / "base", size)
    recipe = recipe_for(tmp_path, base, rows_file)
    code, said = doctor("--devices", devices, "--config", recipe, "--json", "--", *HALF)
    found = json.loads(said)
    assert code == 0, said
    plan = found["footprint"]["devices"]
    assert plan["choice"] == choice
    assert plan["devices"] == int(devices[0])
    ddp, _, fsdp, _ = plan["engines"]
    assert ddp["weights"] == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert fsdp["weights"] == pytest.approx(ddp["weights"] / plan["devices"], rel=0.01)
    assert ddp["sent"] < 0.01 * fsdp["sent"]
    assert plan["tokens_per_step"] > 0


def test_a_plan_is_a_table_under_the_findings(doctor: Doctor, own_base: Path, rows_file: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, own_base, rows_file)
    code, said = doctor("--devices", "4x80GiB", "--config", recipe, "--", "--precision", "fp32")
    assert code == 0
    table = said.split("4 x 85.8993 GB, one process on each: ")[1].splitlines()
    assert re.fullmatch(r"with(out)? gradient checkpointing, [\d,]+ tokens a step", table[0])
    assert table[1].split()[:4] == ["engine", "weights", "gathered", "adapters"]
    assert [line.split()[0] for line in table[2:6]] == ["DDP", "ZeRO-2", "FSDP2", "ZeRO-3"]
    assert all(line.endswith("  fits") for line in table[2:6])
    assert table[6].startswith("  choose: ddp.yaml;")
    assert "note     formats: counted in float32, as above; for GPUs with bfloat16 add -- --precision bf16" in said
    assert "ok       devices: 4 x 85.8993 GB: choose accelerate_configs/ddp.yaml (DDP), with" in said
    assert "free on cpu" not in said  # this machine's memory says nothing of theirs
    code, said = doctor("--devices", "2x0.001GB", "--config", recipe)
    assert code == 1
    assert "  error    devices: 2 x 0.001 GB: no engine fits; the least is 0.0 GB on each, with" in said
    assert "  choose: none fits;" in said


def test_devices_that_cannot_be_read_are_one_line(
    capsys: pytest.CaptureFixture[str], own_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--devices", "8 GPUs", "--config", str(recipe_for(tmp_path, own_base, rows_file))])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert said.err == "error: --devices '8 GPUs' does not say how many and how large; write it as 8x24GB\n"
