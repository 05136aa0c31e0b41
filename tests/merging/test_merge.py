"""`merge_adapter`: the reloaded model is the adapter model, or nothing is written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from plainlora import inject, save_adapter
from plainlora.base.identity import describe_base
from plainlora.base.loading import describe_quantization
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.lora.layer import LoRALinear
from plainlora.merging.merge import TOLERANCES, merge_adapter, merging_device
from plainlora.report import write_json
from plainlora.run.adapter_base import training_quantization
from tests.conftest import CONFIGS, VOCABULARY, load_quantized, make_model, random_ids
from tests.gpu_host import gpu_host


def trained_adapter(kind: str, model_dirs: dict[str, Path], folder: Path, scale: float = 0.05) -> Path:
    """An adapter whose B is not zero, beside its tokenizer, as training leaves it."""
    model = make_model(kind)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", base_model_name_or_path=str(model_dirs[kind])
    )
    inject(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    save_adapter(model, folder)
    AutoTokenizer.from_pretrained(model_dirs[kind]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_u02_the_merged_model_is_reloaded_and_is_the_adapter_model(
    kind: str, dtype: torch.dtype, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = trained_adapter(kind, model_dirs, tmp_path / "adapter")
    result = merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    assert result.dtype == dtype
    assert 0 < result.relative_diff <= TOLERANCES[dtype]
    written = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert written["figures"]["merged"]["against"]["16bit"]["max_abs_diff"] == result.max_abs_diff
    assert written["measured_on"]["in_float32"]

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(make_model(kind), adapter)
    reach = TOLERANCES[dtype] * theirs(input_ids=random_ids()).logits.abs().max().item()
    torch.testing.assert_close(
        merged(input_ids=random_ids()).logits, theirs(input_ids=random_ids()).logits, rtol=0, atol=reach
    )
    embeddings_are_one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert embeddings_are_one == (kind in ("gpt2", "qwen2"))  # U8: what was tied stays tied
    assert (tmp_path / "merged" / "generation_config.json").exists()
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def quantized_run(model_dirs: dict[str, Path], folder: Path) -> Path:
    adapter = trained_adapter("llama", model_dirs, folder)
    base = load_quantized(model_dirs["llama"], load_in_4bit=True, bnb_4bit_quant_type="nf4")
    identity = describe_base(str(model_dirs["llama"]))
    write_json(adapter / "run.json", {"quantization_config": describe_quantization(base), "base": identity})
    return adapter


@pytest.fixture(scope="module")
def nf4_merges(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> dict[str, Path]:
    """One NF4 adapter, merged into the checkpoint and into what training saw of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nf4")
    merges = {"adapter": quantized_run(model_dirs, folder / "adapter")}
    for base in ("16bit", "dequantized"):
        merges[base] = folder / base
        merge_adapter(merges["adapter"], merges[base], base=base)
    return merges


def test_u03_an_nf4_adapter_merges_into_the_checkpoint_or_into_what_training_saw(
    nf4_merges: dict[str, Path], model_dirs: dict[str, Path]
) -> None:
    results = {
        base: AutoModelForCausalLM.from_pretrained(nf4_merges[base])(input_ids=random_ids()).logits
        for base in ("16bit", "dequantized")
    }
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    seen = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dirs["llama"], quantization_config=nf4, dtype=torch.float32),
        nf4_merges["adapter"],
    )
    seen.train()  # bitsandbytes rounds the block scales of an evaluating model on some CPUs
    with torch.no_grad():
        in_training = seen(input_ids=random_ids()).logits
    torch.testing.assert_close(results["dequantized"], in_training, rtol=1e-4, atol=1e-5)
    whole = PeftModel.from_pretrained(make_model("llama"), nf4_merges["adapter"])(input_ids=random_ids()).logits
    torch.testing.assert_close(results["16bit"], whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results["16bit"], results["dequantized"], atol=1e-3)


def foundations(figures: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """On how many rows and tokens each figure of a certificate rests: perplexities and drifts, however deep."""
    if "perplexity" in figures:
        yield figures["perplexity_rows"], figures["perplexity_tokens"]
    if "max_abs_diff" in figures:
        yield figures["prompts"], figures["positions"]
    for inner in figures.values():
        if isinstance(inner, dict):
            yield from foundations(inner)


@pytest.mark.parametrize("chosen", ["16bit", "dequantized"])
def test_u01_u21_the_certificate_says_what_merging_into_nf4_would_have_cost(
    chosen: str, nf4_merges: dict[str, Path]
) -> None:
    """All of it on a CPU, with the real bitsandbytes."""
    certificate = json.loads((nf4_merges[chosen] / "certificate.json").read_text())
    figures = certificate["figures"]
    assert certificate["base"]["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert set(figures["bases"]) == {"16bit", "dequantized"}
    other = "dequantized" if chosen == "16bit" else "16bit"
    own, beside, rounded = (
        figures["merged"]["against"][chosen],
        figures["merged"]["against"][other],
        figures["requantized"]["against"][chosen],
    )
    assert own["relative_diff"] <= TOLERANCES[torch.float32]
    assert (own["equal_share"], own["first_difference"]) == (1.0, None)
    assert min(beside["relative_diff"], rounded["relative_diff"]) > 100 * TOLERANCES[torch.float32]
    assert rounded["first_difference"] is not None
    found = {arm: figures["bases"][chosen][arm]["perplexity"] for arm in ("base", "adapter")}
    assert figures["merged"]["perplexity"] == pytest.approx(found["adapter"], rel=1e-6)
    assert len({*found.values(), figures["requantized"]["perplexity"]}) == 3
    on, rests = certificate["measured_on"], list(foundations(figures))
    assert rests.count((on["rows"], on["tokens"])) == 6  # two bases, each with and without the adapter, and two merged
    drifts = [pair for pair in rests if pair != (on["rows"], on["tokens"])]
    assert len(drifts) == 6
    assert len({positions for _, positions in drifts}) == 1
    assert {prompts for prompts, _ in drifts} == {len(on["prompts"])}


def test_a_base_that_is_stored_in_4_bits_is_none_to_write_a_merged_model_of(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    base = load_quantized(model_dirs["llama"], load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(tmp_path / "base")
    adapter = trained_adapter("llama", {"llama": tmp_path / "base"}, tmp_path / "adapter")
    identity = describe_base(str(tmp_path / "base"))
    write_json(adapter / "run.json", {"quantization_config": describe_quantization(base), "base": identity})
    for kind in ("dequantized", "16bit"):
        with pytest.raises(UserError, match="base is stored in 4 or 8 bits; merge into the base in 16 bits"):
            merge_adapter(adapter, tmp_path / "merged", base=kind)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*merged*"))


def test_a_checkpoint_of_a_quantised_run_merges_as_the_run_does(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    run = quantized_run(model_dirs, tmp_path / "run")
    checkpoint = trained_adapter("llama", model_dirs, run / "checkpoint-3")
    found = training_quantization(checkpoint)
    assert found is not None
    assert found == training_quantization(run)
    assert training_quantization(trained_adapter("llama", model_dirs, tmp_path / "whole")) is None


def test_u01_dequantized_needs_a_quantised_run(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    adapter = trained_adapter("llama", model_dirs, tmp_path / "adapter")
    with pytest.raises(UserError, match="--base 16bit"):
        merge_adapter(adapter, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_drifts_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real merge drifts that far: this one adds every product twice."""
    adapter = trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.3)
    add_once = LoRALinear.add_delta

    def add_twice(*arguments: Any) -> None:
        add_once(*arguments)
        add_once(*arguments)

    monkeypatch.setattr(LoRALinear, "add_delta", add_twice)
    with pytest.raises(UserError, match=r"more than the 1e-05 allowed for torch.float32; \S+merged was not written$"):
        merge_adapter(adapter, tmp_path / "merged")
    advice = r"bfloat16; \S+merged was not written; plainlora merge --adapter \S+ --output \S+ --dtype float32$"
    with pytest.raises(UserError, match=advice):
        merge_adapter(adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = trained_adapter("gpt2", model_dirs, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        merge_adapter(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"not written by `plainlora merge` .*; give another --output"):
        merge_adapter(adapter, tmp_path / "merged", overwrite=True)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["notes.txt"]


def test_an_earlier_merge_is_replaced_also_in_the_current_folder(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained_adapter("gpt2", model_dirs, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in ("certificate.json", "old.safetensors"):
        (merged / name).write_text("{}")
    monkeypatch.chdir(merged)
    merge_adapter(adapter, ".", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}
    assert (merged / "model.safetensors").exists()
    assert not (merged / "old.safetensors").exists()


def test_a_published_generation_config_is_merged_and_keeps_every_end_and_one_pad_token(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    """Llama 2 shipped do_sample=false beside temperature and top_p; Llama 3 and Qwen name several EOS tokens.

    SmolLM2's configs pad with EOS, which training does not, and others' with nothing.
    """
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    config = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 9]}
    (base / "generation_config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    own = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(own | {"pad_token_id": None}))
    adapter = trained_adapter("llama", model_dirs | {"llama": base}, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged")
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert written.eos_token_id == [7, 9, 0]
    assert written.temperature in (None, 1.0)
    pad = AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id
    assert (written.pad_token_id, AutoConfig.from_pretrained(tmp_path / "merged").pad_token_id) == (pad, pad)


def test_a_relative_base_is_found_from_the_adapter_upwards(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    shutil.copytree(model_dirs["gpt2"], tmp_path / "recipes" / "own" / "base")
    adapter = trained_adapter("gpt2", model_dirs, tmp_path / "outputs" / "run")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def name_base(name: str) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    name_base("recipes/own/base")
    merge_adapter(adapter, tmp_path / "merged")
    name_base("recipes/gone/base")
    with pytest.raises(
        UserError, match="names the base recipes/gone/base, which is not a folder here; run from where"
    ):
        merge_adapter(adapter, tmp_path / "again")
    name_base("own")  # a Hub id, whatever lies around
    shutil.copytree(model_dirs["gpt2"], tmp_path / "own")
    with pytest.raises(UserError, match="'own' cannot be loaded from the Hub"):
        merge_adapter(adapter, tmp_path / "again")


def test_u08_a_vocabulary_that_was_resized_and_is_tied_survives_the_merge(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    resized = make_model("qwen2")
    resized.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    base = shutil.copytree(model_dirs["qwen2"], tmp_path / "base")
    resized.save_pretrained(base)
    adapter = trained_adapter("qwen2", model_dirs | {"qwen2": base}, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.tensor([[VOCABULARY + 6, 5, VOCABULARY]])
    torch.testing.assert_close(merged(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert len(merged.get_input_embeddings().weight) == VOCABULARY + 7


def test_u08_an_adapter_that_brings_its_own_vocabulary_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    """PEFT saves the embeddings it finds resized; putting the rest on the unresized base would lose the new tokens."""
    base = AutoModelForCausalLM.from_pretrained(model_dirs["qwen2"])
    base.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(LoRAError, match=r"the embeddings of 327 tokens, and the base has 320"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_merge_is_made_on_a_gpu_that_it_fits_on() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16)
    size = 2 * sum(parameter.numel() for parameter in skeleton.parameters())
    with gpu_host(free=2 * size):
        assert merging_device(skeleton, "auto") == torch.device("cuda:0")
        assert merging_device(skeleton, torch.float32) == torch.device("cpu")  # twice as large
        assert merging_device(None, "auto") == torch.device("cpu")
    with gpu_host(free=size):
        assert merging_device(skeleton, "auto") == torch.device("cpu")  # and its answers need room too
