"""What comes from elsewhere runs no code here."""

import json
import os
import re
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from plainlora import inject, load_adapter, save_adapter
from plainlora.base.classifier import build_skeleton
from plainlora.base.config import load_config
from plainlora.base.loading import load_causal_lm
from plainlora.base.remote_code import code_options, describe_remote_code
from plainlora.base.tokenizer import load_tokenizer
from plainlora.commands import main
from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.folders import MANIFEST, write_manifest
from plainlora.settings.parsing import read_yaml
from plainlora.settings.programs import CLASSIFY
from tests.conftest import ROOT, make_model
from tests.refusals import the_one_line, without_progress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


class Payload:
    """A pickle of it touches a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


Recipe = Callable[..., object]


@pytest.fixture
def sft(model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Runs recipes/sft.py in this process for a step or two; gives its exit code."""

    def run(*flags: str | Path) -> object:
        monkeypatch.setattr(
            sys,
            "argv",
            [
                *("recipes/sft.py", "--model_name_or_path", str(model_dirs["llama"]), "--lora_r", "2"),
                *("--dataset_name", str(rows_file), "--output_dir", str(tmp_path / "out"), "--max_length", "256"),
                *("--prompt_template", "alpaca", "--use_cpu", "true", "--max_steps", "2", "--save_steps", "1"),
                *("--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true"),
                *map(str, flags),
            ],
        )
        try:
            runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
        except SystemExit as ended:
            return ended.code
        return 0

    return run


# Pickles


def test_u23_a_pickle_in_a_checkpoint_is_not_run(
    sft: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sft() == 0
    out, marker = tmp_path / "out", tmp_path / "marker"
    whole = shutil.copytree(out, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        checkpoint = out / "checkpoint-1"
        assert (checkpoint / name).is_file() or name == "training_args.bin"
        torch.save(Payload(marker), checkpoint / name)
        if (checkpoint / MANIFEST).is_file():
            write_manifest(checkpoint)  # who wrote the one can write the other
        capfd.readouterr()
        code = sft("--resume_from_checkpoint", checkpoint)
        assert not marker.exists(), name
        if name == "training_args.bin":  # Trainer writes one, and nobody reads it
            assert code == 0
        else:
            said = the_one_line(code, "", capfd.readouterr().err)
            assert name in said or str(checkpoint) in said
    torch.load(checkpoint / "training_args.bin", weights_only=False)  # it would have
    assert marker.exists()


def test_u23_a_base_of_pickles_alone_is_not_loaded(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds pytorch_model.bin and no model.safetensors; .* convert it") as raised:
        load_causal_lm(str(base))
    command = re.search(r'python -c "(.*)"$', str(raised.value))
    assert command is not None
    exec(command[1])  # in a shell of their own it would be a process
    assert torch.equal(load_causal_lm(str(base)).lm_head.weight, make_model("llama").lm_head.weight)


# Code of a model


@pytest.fixture
def own_code(model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with code of its own, which touches `marker` beside it when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "own_code")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    return folder


@pytest.fixture
def silent_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input that is open and says nothing: whoever asks waits."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield
    os.close(writing)


@pytest.mark.usefixtures("silent_terminal")
def test_u23_code_of_a_model_is_refused_and_nobody_is_asked(
    sft: Recipe, own_code: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(own_code))
    save_adapter(inject(make_model("llama"), adapter), tmp_path / "adapter")
    started = time.monotonic()
    assert sft("--model_name_or_path", own_code) == 2
    with pytest.raises(SystemExit):
        main(["generate", "--adapter", str(tmp_path / "adapter"), "--prompt", "a"])
    lines = without_progress(capfd.readouterr().err)
    assert len(lines) == 2
    assert all(re.fullmatch(r"error: .*own_code cannot be loaded .*contains custom code.*", line) for line in lines)
    config = json.loads((own_code / "config.json").read_text())
    known = {"model_type": "mamba", "auto_map": {"AutoModelForSequenceClassification": "own.OwnModel"}}
    (own_code / "config.json").write_text(json.dumps(config | known))
    with pytest.raises(UserError, match="no sequence classifier"):
        build_skeleton(load_config(str(own_code)))
    known = {"model_type": "distilbert", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (own_code / "config.json").write_text(json.dumps(config | known))
    with pytest.raises(UserError, match="contains custom code"):
        load_causal_lm(str(own_code))
    assert time.monotonic() - started < 14  # the question waits 15 s for an answer
    assert not (tmp_path / "marker").exists()


def test_u23_code_of_a_local_folder_runs_when_asked_for_and_is_named(
    sft: Recipe, own_code: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model_name_or_path", own_code, "--trust_remote_code", "true", "--lora_target_modules", "q_proj")
    assert sft(*flags, "--merge", "true") == 2
    assert "leave merge or trust_remote_code out" in capfd.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert sft(*flags) == 0
    assert (
        f"WARNING trust_remote_code: code of {own_code} runs here with your rights: own.py" in capfd.readouterr().out
    )
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:10], COMMIT.upper(), f"{COMMIT}0"])
def test_u23_code_of_the_hub_needs_a_commit(
    sft: Recipe, capfd: pytest.CaptureFixture[str], revision: str | None
) -> None:
    flags = ["--model_revision", revision] if revision else []
    code = sft("--model_name_or_path", "nobody/nothing", "--trust_remote_code", "true", *flags)
    said = the_one_line(code, *capfd.readouterr())
    assert "trust_remote_code runs the code of nobody/nothing from the Hub: read it, and give the commit" in said


def test_u23_a_commit_is_enough_for_code_of_the_hub(sft: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    code = sft(
        "--model_name_or_path", "nobody/nothing", "--trust_remote_code", "true", "--model_revision", COMMIT
    )  # fmt: skip
    assert "'nobody/nothing' cannot be loaded from the Hub" in the_one_line(code, *capfd.readouterr())


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_u23_code_of_another_repository_is_refused(own_code: Path, file: str) -> None:
    content = json.loads((own_code / file).read_text())
    auto_map = {"AutoTokenizer": ["other/repo--own.Own", None]} if "tok" in file else {"AutoConfig": "a/b--own.Own"}
    (own_code / file).write_text(json.dumps(content | {"auto_map": auto_map}))
    with pytest.raises(UserError, match=r"runs code from another repository .*which model_revision does not pin"):
        describe_remote_code(str(own_code), None)


def test_u23_the_classifier_runs_no_code_of_a_model() -> None:
    with pytest.raises(UserError, match="--trust_remote_code is not an option"):
        CLASSIFY.parse(["--trust_remote_code", "true"])


# Links, which many a collection of models is made of


def test_a_base_and_an_adapter_may_be_links_to_files_elsewhere(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(inject(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")
    for folder in (model_dirs["llama"], tmp_path / "adapter"):
        (tmp_path / "links" / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (tmp_path / "links" / folder.name / path.name).symlink_to(path)
    base = str(tmp_path / "links" / model_dirs["llama"].name)
    load_tokenizer(base)
    linked = load_adapter(load_causal_lm(base), tmp_path / "links" / "adapter")
    real = load_adapter(make_model("llama"), tmp_path / "adapter")
    assert linked.state_dict().keys() == real.state_dict().keys()
    assert all(value.equal(real.state_dict()[name]) for name, value in linked.state_dict().items())


# What is data, and what may not reach out of its sandbox


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: !!python/object/apply:os.mkdir [MARKER]", "could not determine a constructor"),
        ("a: !!python/object/new:os.mkdir {args: [MARKER]}", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("!!python/object/apply:os.mkdir [MARKER]: 1", "could not determine a constructor"),
        (BOMB, r"an alias \(\*a\) is not read; write the value out"),
        ("a: &a [*a]", r"an alias \(\*a\) is not read"),
        ("a: " + "[" * 100_000, "is not valid YAML"),
        ("\n".join(f"k{number}: 1" for number in range(20_000)) + "\nk7: 2", "'k7' is given twice"),
    ],
)
def test_u23_a_yaml_is_data(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content.replace("MARKER", str(tmp_path / "marker")))
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
        read_yaml(path)
    assert time.monotonic() - started < 20
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.__init__.__globals__ }}", "access to attribute '__init__' of 'list' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.mkdir('x') }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ open('/etc/passwd').read() }}", "'open' is undefined"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
    ],
)
def test_u23_a_chat_template_is_held_in_its_sandbox(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"the chat template cannot render a conversation of user: .*{said}"):
        render_prompt("hi", tokenizer)


@pytest.mark.parametrize(
    ("commit", "trusted", "pinned"), [("0" * 40, True, True), ("0" * 40, False, False), (None, True, False)]
)
def test_u23_code_that_runs_before_the_weights_are_loaded_is_that_of_the_commit(
    commit: str | None, trusted: bool, pinned: bool
) -> None:
    config = LlamaConfig(auto_map={"AutoModelForCausalLM": "modeling.Own"})
    config._commit_hash = commit
    expected = {"trust_remote_code": trusted} | ({"code_revision": commit} if pinned else {})
    assert code_options(config, AutoModelForCausalLM, trusted) == expected
    assert "code_revision" not in code_options(config, AutoModelForSequenceClassification, trusted)
