"""`plainlora merge` and its sisters as typed: certificates, warnings, and bases that are not the adapter's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from plainlora.base.identity import describe_base
from plainlora.commands import main
from plainlora.folders import sha256_of
from plainlora.report import write_json
from tests.base.test_identity import flip
from tests.conftest import CONFIGS
from tests.merging.test_merge import trained_adapter
from tests.refusals import Run
from tests.test_prediction import TEXT, make_classifier


@pytest.fixture
def adapter(tmp_path: Path, model_dirs: dict[str, Path]) -> Path:
    """An adapter that changes nothing, beside a record of its base."""
    folder = trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.0)
    write_json(folder / "run.json", {"quantization_config": None, "base": describe_base(str(model_dirs["llama"]))})
    return folder


def test_u02_u15_a_certificate_is_the_same_bytes_twice_and_says_that_an_adapter_has_no_effect(
    adapter: Path, tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Say the number after 3.\n\nIt is 4.\n")
    base = str(shutil.copytree(model_dirs["llama"], tmp_path / "base"))
    for name in ("once", "twice"):
        command = ["merge", "--adapter", str(adapter), "--output", str(tmp_path / name), "--text", str(text)]
        main([*command, "--base_model", base])
        shown = capfd.readouterr()
        assert "warning: the adapter changes no logit: the merged model answers as its base does\n" in shown.err
        assert f"perplexity on the text {text.name} (1 rows, " in shown.out
        assert re.search(r"\nmerged, reloaded +[\d.]+ +(\d+) of \1  0.0e\+00, ", shown.out)
    files = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()}

    certificate = json.loads(files["certificate.json"])
    written = certificate["merged"]["sha256"]
    assert set(written) == files.keys() - {"certificate.json", "manifest.json"}
    assert all(sha256_of(tmp_path / "once" / name) == digest for name, digest in written.items())
    read = certificate["adapter"]["sha256"]
    assert read["adapter_model.safetensors"] == sha256_of(adapter / "adapter_model.safetensors")
    assert certificate["base"]["identity"]["weights"] == describe_base(base)["weights"]
    perplexities = certificate["figures"]["bases"]["16bit"]
    assert perplexities["base"]["perplexity"] == perplexities["adapter"]["perplexity"]


def test_a_classifier_s_certificate_counts_equal_classes(
    tmp_path: Path,
    backbone_dirs: dict[str, Path],
    word_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    adapter = make_classifier(tmp_path / "adapter", backbone_dirs["distilbert"], word_tokenizer)
    text = tmp_path / "texts.txt"
    text.write_text("win a big prize\nsee you soon\n")
    main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--text", str(text)])
    shown = capfd.readouterr().out
    assert re.search(r"\nmerged, reloaded +2 of 2  ", shown)
    figures = json.loads((tmp_path / "merged" / "certificate.json").read_text())["figures"]
    assert figures["merged"]["perplexity"] is None
    assert figures["merged"]["against"]["16bit"]["equal_classes"] == 2


def test_u03_every_command_refuses_another_base(
    plainlora: Run, adapter: Path, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    changed = shutil.copytree(model_dirs["llama"], tmp_path / "changed")
    flip(changed / "model.safetensors", -1)
    config = CONFIGS["llama"]()
    config.intermediate_size = 192
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    for base, said in (
        (changed, "holds other weights of the same shapes; give"),
        (tmp_path / "wide", "has other tensors or shapes; give"),
        (model_dirs["gpt2"], "is another architecture; give"),
        (tmp_path / "gone", "there is no folder"),
    ):
        for verb in (["merge", "--output", tmp_path / "out"], ["generate", "--prompt", "hi"]):
            assert said in plainlora(*verb, "--adapter", adapter, "--base_model", base)


def test_u03_another_base_is_taken_with_a_warning_if_that_is_asked_for(
    adapter: Path, tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(model_dirs["llama"], tmp_path / "changed")
    flip(changed / "model.safetensors", -1)
    command = ["generate", "--adapter", str(adapter), "--prompt", "hi", "--max_new_tokens", "2"]
    main([*command, "--base_model", str(changed), "--allow_other_base"])
    assert re.search(r"warning: .* was trained on .* holds other weights of the same", capfd.readouterr().err)


def test_bad_flags(plainlora: Run, adapter: Path, tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    merge = ["merge", "--adapter", adapter, "--output", tmp_path / "out"]
    assert "cannot be read as text" in plainlora(*merge, "--text", tmp_path / "gone.txt")
    assert "holds the base model" in plainlora(
        *merge[:4], model_dirs["llama"], "--base_model", model_dirs["llama"], "--overwrite"
    )


def test_u03_predictions_on_the_original_of_a_quantised_base_come_with_the_loss_on_both(
    tmp_path: Path,
    backbone_dirs: dict[str, Path],
    word_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
    plainlora: Run,
) -> None:
    base = backbone_dirs["distilbert"]
    adapter = make_classifier(tmp_path / "adapter", base, word_tokenizer)
    run = json.loads((adapter / "run.json").read_text())
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    run |= {"quantization_config": nf4.to_dict(), "base": describe_base(str(base))}
    write_json(adapter / "run.json", run)
    main(["predict", "--model", str(adapter), *TEXT, "--base_model", str(base)])
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == 1  # the answer alone
    losses = re.search(
        r"trained on quantised weights.*: [01] of 1 texts get .* is ([\d.]+) on the checkpoint and ([\d.]+) on",
        shown.err,
    )
    assert losses
    assert losses[1] != losses[2]
    other = backbone_dirs["bert"]
    assert "is another architecture" in plainlora("predict", "--model", adapter, *TEXT, "--base_model", other)
    merged = tmp_path / "whole"
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(merged)
    said = plainlora("predict", "--model", merged, *TEXT, "--base_model", other)
    assert "is a whole model, which needs no base; leave it out" in said
