"""What of a folder is published, and what is refused before anything is sent."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast

from plainlora.base.identity import describe_base
from plainlora.commands import build_parser
from plainlora.errors import UserError
from plainlora.folders import write_manifest
from plainlora.hub.model_card import HERE
from plainlora.hub.publication import collect_publication
from plainlora.lora.errors import LoRAError
from tests.conftest import CONFIGS, make_model
from tests.peft_model.test_model import base_of, config_of
from tests.refusals import Run

BASE = "openai-community/gpt2"
WEIGHTS = "adapter_model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Written by PEFT, for a base on the Hub."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(make_model("llama"), config)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    return tmp_path / "adapter"


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole model in several files."""
    make_model("llama").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def set_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def text_of(folder: Path, name: str, base_model: str | None = None) -> str:
    content = collect_publication(folder, base_model).files[name]
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def rename_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return {name.removeprefix("base_model.") if name == first else name: each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all: {name: each[:0] for name, each in all.items()}, r"is empty, of shape \(0, \d+\); gather it"),
        (lambda all: {name: each / 0 for name, each in all.items()}, "holds values that are not finite"),
        (lambda all: {name: each[..., 0].clone() for name, each in all.items()}, "which do not fit r=4"),
        (lambda all: {name: each for name, each in all.items() if "lora_A" in name}, "has lora_A alone"),
        (lambda all: {name: each for name, each in all.items() if "v_proj" not in name}, "holds nothing of v_proj"),
        (rename_one, "is not a name that PEFT gives"),
        (lambda _: {}, "holds no tensor"),
    ],
)  # fmt: skip
def test_u11_tensors_that_are_empty_not_finite_or_do_not_fit_are_not_published(
    adapter: Path, change: Change, said: str
) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    with pytest.raises(UserError, match=said):
        collect_publication(adapter)


def test_u11_a_whole_models_tensors_are_looked_at_in_every_file(model: Path) -> None:
    last = sorted(model.glob("*.safetensors"))[-1]
    save_file({name: each[:0] for name, each in load_file(last).items()}, last)
    with pytest.raises(UserError, match="is empty, of shape"):
        collect_publication(model, BASE)


def test_u23_weights_that_are_pickles_or_lie_elsewhere_are_not_published(adapter: Path, model: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(LoRAError, match="is a pickle, which can run code"):
        collect_publication(adapter)
    for damaged in ("../adapter/model.safetensors", "below/model.safetensors", ["model.safetensors"]):
        set_json(model / "model.safetensors.index.json", weight_map={"lm_head.weight": damaged})
        with pytest.raises(UserError, match="names files outside of its folder"):
            collect_publication(model, BASE)
    (model / "model.safetensors.index.json").unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has no model\.safetensors; only whole models in safetensors are published"):
        collect_publication(model, BASE)


def test_u23_of_what_lies_there_only_what_is_known_is_published(model: Path) -> None:
    whole = set(collect_publication(model, BASE).files)
    for name in ("training_args.bin", "optimizer.pt", "modeling_own.py", "notes.txt", ".env", "key.json"):
        (model / name).write_text("x")
    (model / "runs").mkdir()
    (model / "runs" / "events.out.tfevents.1").write_text("x")
    assert set(collect_publication(model, BASE).files) == whole
    shards = {path.name for path in model.glob("*.safetensors")}
    assert whole == shards | {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *(
            "vocab.txt",
            "merges.txt",
            "loss.png",
            "spiece.model",
            "chat_template.jinja",
            "run.json",
            "certificate.json",
        ),
        *("README.md", "config.json", "tokenizer.json", "model.safetensors.index.json", "SHARD"),
    ],
)
def test_u23_what_a_link_brings_in_from_elsewhere_is_not_published(model: Path, name: str, tmp_path: Path) -> None:
    path = model / name if name != "SHARD" else min(model.glob("*.safetensors"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(path.read_bytes() if path.is_file() else PNG if name == "loss.png" else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"is not published: {path.name} is a link to .*, outside of the folder; put"):
        collect_publication(model, BASE)


def test_u23_a_snapshot_of_the_hubs_cache_is_links_and_may_be_published(model: Path, tmp_path: Path) -> None:
    whole = collect_publication(model, BASE).files
    repository = tmp_path / "models--ann--llama"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert set(collect_publication(snapshot, BASE).files) == set(whole)


def test_u23_of_pictures_those_that_training_draws_are_published(adapter: Path) -> None:
    """A file is no picture because it is called one."""
    for name in ("loss.png", "confusion.png", "passport.png"):
        (adapter / name).write_bytes(PNG)
    assert {name for name in collect_publication(adapter).files if name.endswith(".png")} == {
        *("loss.png", "confusion.png")
    }
    (adapter / "loss.png").write_text("the notes of a patient")
    assert "loss.png" not in collect_publication(adapter).files


def test_u23_what_a_run_had_in_its_environment_is_not_published(adapter: Path, model: Path) -> None:
    """Whoever wrote it, and under whichever name: `env` of a recipe may hold anything."""
    run = {"config": {"seed": 7, "env": {"DATABASE": "postgres://ann:hunter2@host"}}, "env": {"A": "hunter2"}}
    (model / "run.json").write_text(json.dumps(run | {"arguments": {"seed": 7}}))
    published = text_of(model, "run.json", BASE)
    assert json.loads(published) == {"arguments": {"seed": 7}, "config": {"seed": 7}}


def test_a_file_that_changed_since_it_was_written_is_named(adapter: Path) -> None:
    write_manifest(adapter)
    collect_publication(adapter)
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{WEIGHTS} has .* bytes instead of .*; write it again"):
        collect_publication(adapter)
    (adapter / "manifest.json").unlink()
    with pytest.raises(LoRAError, match="corrupt or cut short"):
        collect_publication(adapter)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, "names no base model; give its Hub id with --base_model"),
        ("FOLDER", "names the base .*, a folder of this disk; give its Hub id with --base_model"),
        ("/gone/llama", "names the base /gone/llama, a folder of this disk"),
        ("recipes/quickstart/base", "names the base recipes/quickstart/base, a folder of this disk"),
        ("near/base", "names the base near/base, a folder of this disk"),
    ],
)
def test_u18_a_base_that_nobody_else_has_is_refused(
    adapter: Path, model: Path, named: str | None, said: str, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "near" / "base")
    set_json(adapter / "adapter_config.json", base_model_name_or_path=str(model) if named == "FOLDER" else named)
    before = (adapter / "adapter_config.json").read_bytes()
    with pytest.raises(UserError, match=said):
        collect_publication(adapter)
    config = json.loads(text_of(adapter, "adapter_config.json", BASE))
    assert config["base_model_name_or_path"] == BASE
    assert f"base_model: {BASE}\n" in text_of(adapter, "README.md", BASE)
    assert (adapter / "adapter_config.json").read_bytes() == before
    with pytest.raises(UserError, match="--base_model /x is not a Hub id"):
        collect_publication(adapter, "/x")


def test_u18_the_revision_of_the_base_is_named(adapter: Path, model: Path) -> None:
    config = collect_publication(adapter, base_revision="607a30d").files["adapter_config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["revision"] == "607a30d"
    set_json(adapter / "adapter_config.json", revision="main")
    assert json.loads(text_of(adapter, "adapter_config.json"))["revision"] == "main"
    base = describe_base(str(model)) | {"commit": "e7da7f2"}
    (adapter / "run.json").write_text(json.dumps({"quantization_config": None, "base": base}))
    assert json.loads(text_of(adapter, "adapter_config.json"))["revision"] == "e7da7f2"
    assert json.loads(text_of(adapter, "adapter_config.json", BASE))["revision"] is None


@pytest.mark.parametrize(
    ("line", "by", "said"),
    [
        ("library_name: peft", "library_name: mlx", "library_name is 'mlx'; write `library_name: peft`"),
        ("library_name: peft", "", "library_name is None"),
        ("pipeline_tag: text-generation", "pipeline_tag: chatting", "pipeline_tag is 'chatting'; known are .*text-g"),
        ("tags: .*", "tags: lora", "tags is 'lora'; write a list of words"),
        ("tags: .*", "datasets: [./rows.jsonl]", r"datasets is \['./rows.jsonl'\]; write Hub ids"),
        (f"base_model: {BASE}", "base_model: /home/ann/gpt2", r"base_model is '/home/ann/gpt2'; write Hub ids"),
        (f"base_model: {BASE}", "base_model: a/b", f"base_model is a/b, but that of the weights is {BASE}"),
        (f"base_model: {BASE}", "base_model: [", "its metadata cannot be read"),
        ("---\n[^#]*---\n", "---\n- a\n---\n", "its metadata cannot be read .it is not a mapping.; fix the block"),
        (f"base_model: {BASE}", "base_model: 3", "base_model is 3; write Hub ids"),
        (f"base_model: {BASE}", f"base_model: {{{BASE}: 1}}", "base_model is {.*}; write Hub ids"),
        ("pipeline_tag: .*", "pipeline_tag: [text-generation]", r"pipeline_tag is \['text-generation'\]; known are"),
        ("pipeline_tag: .*", "pipeline_tag: {a: b}", "pipeline_tag is {'a': 'b'}; known are"),
        ("tags: .*", "model-index: 5", "its metadata cannot be read .*; fix the block between the ---"),
        ("tags: .*", "model-index: [5]", "its metadata cannot be read .*; fix the block between the ---"),
        ("tags: .*", "model-index: [{name: a, results: 5}]", "its metadata cannot be read"),
        ("tags: .*", "model-index: [{name: a, results: [{task: {type: a}, metrics: 5}]}]", "its metadata cannot be"),
        ("tags: .*", "5: 6", "its metadata cannot be read"),
        ("tags: .*", "self: 6", "its metadata cannot be read"),
        ("tags: .*", "tags: " + "[" * 5000, "its metadata cannot be read"),
        ("tags: .*", "tags: &a [b]\ndatasets: *a", r"README\.md: an alias \(\*a\) is not read; write the value out"),
        ("tags: .*", "library_name: peft", r"README\.md: 'library_name' is given twice; keep one of them"),
        ("tags: .*", "license: [mit, apache-2.0]", r"license is \['mit', 'apache-2.0'\]; write one word"),
        ("tags: .*", "language: 5", "language is 5; write a code such as en, or a list of them"),
        ("tags: .*", "language: [no]", r"language is \[False\]; .* in quotes where YAML reads something else"),
    ],
)  # fmt: skip
def test_u18_a_card_that_the_hub_would_refuse_is_refused_here(adapter: Path, line: str, by: str, said: str) -> None:
    card = text_of(adapter, "README.md")
    (adapter / "README.md").write_text(card)
    assert text_of(adapter, "README.md") == card
    changed = re.sub(line, by, card, count=1)
    assert changed != card
    (adapter / "README.md").write_text(changed)
    with pytest.raises(UserError, match=said):
        collect_publication(adapter)


def test_paths_of_this_disk_stay_here(adapter: Path) -> None:
    set_json(adapter / "adapter_config.json", base_model_name_or_path="/home/ann/models/llama")
    run = {
        "command": ["recipes/sft.py", "--output_dir=/home/ann/out", "--dataset_name", "/data/my rows.jsonl"],
        "line": "recipes/sft.py --output_dir /home/ann/out --seed 7 # see https://example.com/a/b and and/or 1/2",
        "arguments": {
            "model_name_or_path": "/home/ann/models/llama", "output_dir": "/home/ann/out", "dataset_name": "ann/rows",
            "chat_template_path": "~/templates/chat.jinja", "seed": 7, "max_length": None,
        },
        "quantization_config": {"load_in_4bit": True},
        "labels": None,
    }  # fmt: skip
    (adapter / "run.json").write_text(json.dumps(run))
    assert json.loads(text_of(adapter, "run.json", BASE)) == {
        "command": ["recipes/sft.py", "--output_dir=out", "--dataset_name", "my rows.jsonl"],
        "line": "recipes/sft.py --output_dir out --seed 7 # see https://example.com/a/b and and/or 1/2",
        "arguments": {
            "model_name_or_path": BASE, "output_dir": "out", "dataset_name": "ann/rows",
            "chat_template_path": "chat.jinja", "seed": 7, "max_length": None,
        },
        "quantization_config": {"load_in_4bit": True},
        "labels": None,
    }  # fmt: skip
    card = text_of(adapter, "README.md", BASE)
    extra = "\nTrained on `/home/ann/my/rows.jsonl` from `/home/ann/models/llama`; see [here](https://a.b/c/d).\n"
    spaced = "\nFrom `/Users/ann/My Drive/acme/x.jsonl` and 'C:\\\\Users\\\\Ann B\\\\y.jsonl', `and/or`, `a b`.\n"
    (adapter / "README.md").write_text(card + spaced)
    assert text_of(adapter, "README.md", BASE).endswith("\nFrom `x.jsonl` and 'y.jsonl', `and/or`, `a b`.\n")
    (adapter / "README.md").write_text(card + extra)
    assert text_of(adapter, "README.md", BASE).endswith(
        f"\nTrained on `rows.jsonl` from `{BASE}`; see [here](https://a.b/c/d).\n"
    )


def test_a_classifiers_adapter_without_a_card_is_called_one(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], base_model_name_or_path=BASE)
    get_peft_model(GPT2ForSequenceClassification(CONFIGS["gpt2"]()), config).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    set_json(tmp_path / "adapter_config.json", base_model_name_or_path=BASE)
    card = text_of(tmp_path, "README.md")
    assert "pipeline_tag: text-classification\n" in card
    assert f'AutoPeftModelForSequenceClassification.from_pretrained("{HERE}")' in card


def test_a_token_in_a_file_is_not_published(adapter: Path) -> None:
    (adapter / "all_results.json").write_text(json.dumps({"note": "hf_" + "aB3d" * 8}))
    with pytest.raises(UserError, match=r"all_results\.json holds what looks like a Hub token; take it out") as raised:
        collect_publication(adapter)
    assert "aB3d" not in str(raised.value)
    (adapter / "all_results.json").unlink()
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata={"note": "hf_" + "aB3d" * 8})
    with pytest.raises(UserError, match=f"{WEIGHTS} holds what looks like a Hub token; take it out"):
        collect_publication(adapter)


def test_what_the_command_refuses_is_one_line(
    plainlora: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    push = ("push", "--repo", "ann/it", "--adapter")
    assert "is not a folder; give the one that training" in plainlora(*push, tmp_path / "gone")
    assert "is switched off (HF_HUB_OFFLINE)" in plainlora(*push, adapter)  # as the tests' own process is
    assert "not allowed with argument" in plainlora(*push, adapter, "--model", adapter)
    assert "one of the arguments --adapter --model is required" in plainlora("push", "--repo", "ann/it")
    (tmp_path / "empty").mkdir()
    assert "holds neither adapter_config.json nor config.json" in plainlora(*push, tmp_path / "empty")


def test_the_help_names_the_hub_and_what_each_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["push", "--help"])
    said = capsys.readouterr().out
    assert "Publish an adapter or a model on the Hub." in said
    assert "--model MODEL" in said


@pytest.mark.parametrize("name", ["embeddings", "target_parameters", "use_bdlora"])
def test_adapters_whose_matrices_are_of_other_shapes_are_published_too(name: str, tmp_path: Path) -> None:
    """PEFT's own: an embedding's A and B have other names, those of experts and of blocks another rank."""
    kind = "mixtral" if name == "target_parameters" else "llama"
    model = get_peft_model(base_of(kind), config_of(name, kind))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "README.md").unlink()
    assert WEIGHTS in collect_publication(tmp_path / "adapter", None).files
