"""`plainlora export` where llama.cpp is not installed: what is written, what it says, and nothing half-written."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from plainlora.base.identity import describe_base
from plainlora.commands import main
from plainlora.errors import UserError
from plainlora.export.export import export_gguf
from plainlora.export.gguf_file import check_written, read_fields, read_tensors, write_gguf
from plainlora.folders import sha256_of
from plainlora.report import write_json
from tests.base.test_identity import flip
from tests.export.made import make_adapter
from tests.export.test_adapter_tensors import NAMES, restored
from tests.refusals import Run
from tests.test_prediction import make_classifier


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plainlora.export.export.find_llama_cpp", lambda: None)


def peft_merged(folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges in fp64."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    return dict(PeftModel.from_pretrained(base, folder / "adapter").double().merge_and_unload().named_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_every_weight_of_the_merged_file_is_the_merged_model_s(
    kind: str, tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """PEFT merges in fp64; f16 rounds each value by 2^-11 of itself, and below its smallest by 2^-25."""
    options: dict[str, Any] = {"tie_word_embeddings": tied}
    if kind == "llama":
        options |= {"attention_bias": True, "mlp_bias": True}
    adapter = make_adapter(tmp_path, kind, tokenizer, base=options)
    result = export_gguf(adapter, tmp_path / "out", merged=True)
    tensors = {name: values.double() for name, _, values in read_tensors(result.file)}
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "base").config
    ends = NAMES | {
        "embed_tokens": "token_embd", "wte": "token_embd", "wpe": "position_embd", "ln_1": "attn_norm",
        "ln_2": "ffn_norm", "ln_f": "output_norm", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for path, expected in peft_merged(tmp_path).items():
        *parts, what = path.split(".")
        short = next(ends[end] for end in (".".join(parts[-2:]), parts[-1]) if end in ends)
        block = next((f"blk.{part}." for part in parts if part.isdecimal()), "")
        found = restored(f"{block}{short}", tensors.pop(f"{block}{short}.{what}"), config)
        conv1d = kind == "gpt2" and parts[-1].startswith("c_") and what == "weight"
        torch.testing.assert_close(found, expected.T if conv1d else expected, rtol=2**-10, atol=2**-24)
    assert not tensors
    fields = read_fields(result.file)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == config.vocab_size


def test_the_certificate_says_what_was_written_and_that_llama_cpp_has_not_read_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    command = ["export", "--adapter", str(adapter), "--format", "gguf", "--merged", "--quantize", "q8_0"]
    main(command)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.startswith("llama.cpp has not read it: llama-cpp-python is not installed (make llama-cpp")
    output = tmp_path / "adapter-merged-gguf"
    certificate = json.loads((output / "export.json").read_text())
    file = output / "adapter-q8_0.gguf"
    assert certificate["proof"] is None
    assert certificate["file"]["sha256"] == sha256_of(file)
    assert 0 < certificate["file"]["rounding"]["Q8_0"] <= 1 / 254 + 2**-11
    assert certificate["adapter"]["sha256"]["adapter_config.json"] == sha256_of(adapter / "adapter_config.json")
    assert {path.name for path in output.iterdir()} == {
        *("adapter-q8_0.gguf", "export.json", "manifest.json", "servers.txt", "Modelfile"),
    }
    before = sha256_of(file)
    shutil.rmtree(output)
    main(command)
    assert sha256_of(file) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupted_export_leaves_no_file(
    error: BaseException,
    merged: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*_: object) -> None:
        raise error

    monkeypatch.setattr("plainlora.export.export.check_written", interrupt)  # after the file is written
    with pytest.raises(type(error)):
        export_gguf(adapter, tmp_path / "out", merged)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_not_what_was_meant_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"blk.0.ffn_up.weight": torch.randn(64, 64), "blk.0.attn_norm.weight": torch.randn(64)}
    for kind in ("f16", "q8_0", "q4_0", "q4_1"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, "llama", lambda writer: None, tensors, kind)
        assert set(check_written(path, tensors)) == {kind.upper(), "F32"}
        changed = tensors | {"blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"].flip(0)}
        with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight is off by"):
            check_written(path, changed)
    with pytest.raises(UserError, match="missing"):
        check_written(path, tensors | {"output.weight": torch.randn(64, 64)})


def test_values_beyond_f16_are_refused(tmp_path: Path) -> None:
    tensors = {"output.weight": torch.full((32, 32), 70_000.0)}
    with pytest.raises(UserError, match="holds values beyond f16"):
        write_gguf(tmp_path / "x.gguf", "llama", lambda writer: None, tensors, "f16")


def test_another_base_another_family_and_an_output_that_is_there_get_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, plainlora: Run
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    write_json(adapter / "run.json", {"quantization_config": None, "base": describe_base(str(tmp_path / "base"))})
    other = shutil.copytree(tmp_path / "base", tmp_path / "other")
    flip(other / "model.safetensors", -1)
    command = ("export", "--adapter", adapter, "--format", "gguf", "--output", tmp_path / "out")
    assert "holds other weights of the same shapes" in plainlora(*command, "--base_model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    said = plainlora(*command, "--base_model", other, "--allow_other_base")
    assert "llama.cpp does not compute the activation 'gelu'" in said or "another architecture" in said
    assert "--quantize is for a whole model" in plainlora(*command, "--quantize", "q8_0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "already exists" in plainlora(*command[:-1], tmp_path / "full")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_act": "gelu"}, "llama.cpp does not compute the activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of the type 'dynamic'"),
    ],
)
def test_a_config_that_llama_cpp_computes_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer, base=options)
    with pytest.raises(UserError, match=says):
        export_gguf(adapter, tmp_path / "out")


def test_an_adapter_of_a_quantised_run_goes_onto_the_checkpoint_in_16_bits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    whole = sha256_of(export_gguf(adapter, tmp_path / "whole", merged=True).file)
    write_json(adapter / "run.json", {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    assert sha256_of(export_gguf(adapter, tmp_path / "out", merged=True).file) == whole


def test_a_classifier_s_adapter_is_refused(
    tmp_path: Path, backbone_dirs: dict[str, Path], word_tokenizer: PreTrainedTokenizerFast, plainlora: Run
) -> None:
    adapter = make_classifier(tmp_path / "adapter", backbone_dirs["distilbert"], word_tokenizer)
    assert "is a classifier's adapter" in plainlora("export", "--adapter", adapter, "--format", "gguf")


def test_a_sliding_window_is_the_file_s_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Within it full attention is the same; llama.cpp has none for this family."""
    adapter = make_adapter(tmp_path, "mistral", tokenizer, base={"sliding_window": 128})
    fields = read_fields(export_gguf(adapter, tmp_path / "out", merged=True).file)
    assert fields["llama.context_length"] == 128


def test_without_its_extra_the_command_says_how_to_install_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, plainlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    for name in [name for name in sys.modules if name.startswith("plainlora.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)  # type: ignore[arg-type]  # what makes an import fail
    line = plainlora("export", "--adapter", adapter, "--format", "gguf")
    assert line == 'error: this needs gguf: pip install "plainlora[export]"'


def test_the_output_may_be_the_folder_in_which_the_command_is_called_and_commands_can_be_pasted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer).rename(tmp_path / "my run")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    result = export_gguf(adapter, ".", merged=True)
    assert result.file == tmp_path / "out" / "my run-f16.gguf"
    assert result.file.is_file()
    line = next(line for line in (tmp_path / "out" / "servers.txt").read_text().splitlines() if "llama-server" in line)
    assert shlex.split(line)[-1] == "my run-f16.gguf"
