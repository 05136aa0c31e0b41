"""`plainlora predict`, and the other commands on a classifier: what they answer, and the one line when they cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plainlora import inject, save_adapter
from plainlora.backends import BACKENDS
from plainlora.base.classifier import classifier_config, load_classifier
from plainlora.commands import main
from plainlora.prediction import classify, load_trained_classifier
from plainlora.run.adapter_base import class_labels
from tests.conftest import make_model
from tests.refusals import Run

TEXT = ["--text", "win a big prize"]
HEADS = {
    "frozen": {"target_modules": ["q_lin"]},
    "lora": {"target_modules": ["q_lin", "pre_classifier", "classifier"]},
    "whole": {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"},
}


def make_classifier(
    folder: Path, base: Path, tokenizer: PreTrainedTokenizerFast, head: str = "frozen", labels: str = "ham spam"
) -> Path:
    """What recipes/classify.py leaves for `predict`; with another head each time the base is loaded."""
    names = labels.split()
    model, new = load_classifier(classifier_config(str(base), names, tokenizer.pad_token_id), str(base))
    inject(model, LoraConfig(r=2, base_model_name_or_path=str(base), **HEADS[head]), new_weights=new)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    run = {"quantization_config": None, "labels": names, "arguments": {"max_length": 16}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, backbone_dirs: dict[str, Path], word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A classifier's adapter with nothing wrong."""
    return make_classifier(tmp_path / "adapter", backbone_dirs["distilbert"], word_tokenizer)


@pytest.fixture
def whole(tmp_path: Path, backbone_dirs: dict[str, Path], word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole classifier with nothing wrong."""
    base = str(backbone_dirs["distilbert"])
    model, _ = load_classifier(classifier_config(base, ["ham", "spam"], word_tokenizer.pad_token_id), base)
    model.save_pretrained(tmp_path / "whole")
    word_tokenizer.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("head", HEADS)
def test_without_its_run_json_an_adapter_is_still_a_classifier_s(
    tmp_path: Path,
    backbone_dirs: dict[str, Path],
    word_tokenizer: PreTrainedTokenizerFast,
    plainlora: Run,
    capfd: pytest.CaptureFixture[str],
    head: str,
) -> None:
    folder = make_classifier(tmp_path / "adapter", backbone_dirs["distilbert"], word_tokenizer, head, "a b c")
    main(["predict", "--model", str(folder), *TEXT])
    said, share = capfd.readouterr().out.split()[:2]
    (folder / "run.json").unlink()
    assert class_labels(folder) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    main(["predict", "--model", str(folder), *TEXT])
    assert capfd.readouterr().out.split()[:2] == [f"LABEL_{'abc'.index(said)}", share]
    assert "use plainlora predict" in plainlora("generate", "--adapter", folder, "--prompt", "hi")


@pytest.mark.parametrize("head", ["frozen", "whole"])
def test_peft_s_auto_class_loads_it_too(
    tmp_path: Path, backbone_dirs: dict[str, Path], word_tokenizer: PreTrainedTokenizerFast, head: str
) -> None:
    folder = make_classifier(tmp_path / "adapter", backbone_dirs["distilbert"], word_tokenizer, head, "a b c")
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=3).eval()
    expected = classify(load_trained_classifier(folder, BACKENDS["reference"]), [TEXT[1]])[0]
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(folder)(TEXT[1], return_tensors="pt")).logits
    torch.testing.assert_close(logits.softmax(-1)[0], torch.tensor(expected))


def test_a_long_text_is_cut_as_in_training(adapter: Path) -> None:
    classifier = load_trained_classifier(adapter, BACKENDS["reference"])
    assert classifier.max_length == 16
    long, longer = classify(classifier, ["win " * 14, "win " * 500])
    assert long == longer
    (adapter / "run.json").unlink()
    assert load_trained_classifier(adapter, BACKENDS["reference"]).max_length == 64  # the context


@pytest.mark.parametrize("texts", [["--text", ""], ["--text", "a", "--text", "  "]])
def test_an_empty_text_is_refused(plainlora: Run, adapter: Path, texts: list[str]) -> None:
    assert "there is an empty text, or none: give --text" in plainlora("predict", "--model", adapter, *texts)


@pytest.mark.parametrize("flags", [[], ["--with_peft"]])
def test_a_folder_that_is_not_there(plainlora: Run, tmp_path: Path, flags: list[str]) -> None:
    assert "there is no folder" in plainlora("predict", "--model", tmp_path / "gone", *TEXT, *flags)


def test_what_is_no_classifier(
    plainlora: Run, tmp_path: Path, model_dirs: dict[str, Path], backbone_dirs: dict[str, Path]
) -> None:
    for folder in (model_dirs["llama"], backbone_dirs["bert"]):
        assert "is not a sequence classifier" in plainlora("predict", "--model", folder, *TEXT)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path="x")
    save_adapter(inject(make_model("llama"), config), tmp_path / "sft")
    assert "is not a classifier's adapter; use plainlora generate" in plainlora(
        "predict", "--model", tmp_path / "sft", *TEXT
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "run.json is damaged (Expecting"),
        ("[]", "run.json is damaged (it is not a mapping)"),
        ('{"quantization_config": 4}', "run.json is damaged (its quantization_config is not a mapping)"),
        ('{"quantization_config": null, "arguments": []}', "run.json is damaged (its arguments is not a mapping)"),
        ('{"quantization_config": null, "labels": "ham"}', "run.json is damaged (its labels are not a list of names)"),
        (
            '{"quantization_config": null, "labels": [0, 1]}',
            "run.json is damaged (its labels are not a list of names)",
        ),
        (
            '{"quantization_config": null, "arguments": {"max_length": "x"}}',
            "run.json is damaged (its max_length is not a whole number)",
        ),
        ('{"quantization_config": null, "labels": ["a", "b", "c"]}', "has shape (2,), the model needs (3,)"),
    ],
)
def test_a_damaged_run_json(plainlora: Run, adapter: Path, content: str, said: str) -> None:
    (adapter / "run.json").write_text(content)
    assert said in plainlora("predict", "--model", adapter, *TEXT)


@pytest.mark.parametrize("run_json", [True, False])
def test_tensors_cut_short_or_gone(plainlora: Run, adapter: Path, run_json: bool) -> None:
    if not run_json:
        (adapter / "run.json").unlink()
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:60])
    assert "is corrupt or cut short" in plainlora("predict", "--model", adapter, *TEXT)
    for verb in ("merge", "compare"):
        said = plainlora(verb, "--adapter", adapter, "--output", adapter.parent / "out")
        assert "is corrupt or cut short" in said
    tensors.unlink()
    assert "has no adapter_model.safetensors" in plainlora("predict", "--model", adapter, *TEXT)


def test_a_base_that_is_gone_or_another(plainlora: Run, adapter: Path, backbone_dirs: dict[str, Path]) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, said in (
        ("/gone/base", "names the base /gone/base, which is not a folder here"),
        (str(backbone_dirs["bert"]), "the adapter is for another architecture"),
        (None, "names no base model"),
    ):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert said in plainlora("predict", "--model", adapter, *TEXT)


def test_a_whole_model_with_a_part_missing(plainlora: Run, whole: Path, tmp_path: Path) -> None:
    assert "holds no adapter, so there is nothing for PEFT to load" in plainlora(
        "predict", "--model", whole, *TEXT, "--with_peft"
    )
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:60])
    assert "cut/model.safetensors is cut short or damaged (" in plainlora("predict", "--model", cut, *TEXT)
    for file in whole.glob("token*"):
        file.unlink()
    assert "whole holds no tokenizer, or one without a vocabulary" in plainlora("predict", "--model", whole, *TEXT)


def test_the_other_commands_send_a_classifier_to_predict(
    plainlora: Run, adapter: Path, whole: Path, tmp_path: Path
) -> None:
    for folder in (adapter, whole):
        said = plainlora("generate", "--adapter", folder, "--prompt", "hi")
        assert f"use plainlora predict --model {folder}" in said
    for verb in ("merge", "compare"):
        said = plainlora(verb, "--adapter", whole, "--output", tmp_path / "out")
        assert "whole is a whole model, not an adapter: it has no adapter_config.json" in said


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_merged_classifier_is_said_to_load_as_one(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: str
) -> None:
    merged = tmp_path / "merged"
    main(["merge", "--adapter", str(adapter), "--output", str(merged), "--dtype", dtype])
    assert f"{merged} loads with AutoModelForSequenceClassification.from_pretrained" in capfd.readouterr().out
    before, after = (
        classify(load_trained_classifier(folder, BACKENDS["reference"]), [TEXT[1]])[0] for folder in (adapter, merged)
    )
    assert before == pytest.approx(after, abs=1e-5 if dtype == "auto" else 2e-2)
