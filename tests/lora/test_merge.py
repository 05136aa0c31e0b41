"""W0 + (alpha / r) B A: an fp64 sum, and PEFT's merge, up to rounding."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plainlora import merge
from plainlora.lora.errors import LoRAError
from plainlora.lora.layer import LoRALinear
from plainlora.lora.module_to_save import ModuleToSave
from plainlora.lora.record import lora_layers
from tests.conftest import load_quantized
from tests.lora.oracle import (
    Q_LIN,
    assert_equal_tensors,
    by_us,
    logits,
    make,
    move,
    pair,
    requires_grad,
    snapshot,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
OPTIONS = {"r": 6, "lora_alpha": 16, "target_modules": "all-linear"}
CASES = {
    "llama": ("llama", OPTIONS),
    "qwen2": ("qwen2", OPTIONS | {"use_rslora": True}),
    "gpt2": ("gpt2", OPTIONS),
    "patterns": ("llama", OPTIONS | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "biases": ("gpt2", OPTIONS | {"bias": "all"}),
    "head": ("llama", OPTIONS | {"modules_to_save": ["lm_head"]}),
    "tied head": ("qwen2", OPTIONS | {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("gpt2", OPTIONS | {"modules_to_save": ["wte"]}),
    "classifier": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN}),
}
cases = pytest.mark.parametrize("case", CASES)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    model = by_us(make(kind, dtype), **options)
    move(model)
    return model


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@cases
def test_u13_merged_weights_are_peft_s(case: str) -> None:
    kind, options = CASES[case]
    base = snapshot(make(kind))
    for dtype, relative in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2**-7)):
        ours, theirs = pair(kind, dtype, **options)
        move(ours, theirs)
        adapted = {f"{name}.weight" for name, _ in lora_layers(ours)}
        merged = merge(ours)
        assert merged is ours
        found, expected = snapshot(merged), snapshot(theirs.merge_and_unload())
        assert found.keys() == expected.keys() == base.keys()
        for name in adapted:  # PEFT rounds B A before it adds it to W0; here products and sum are one operation
            weight = found.pop(name)
            difference = (weight - expected[name]).abs().max()
            assert difference <= relative * expected.pop(name).abs().max(), (dtype, name)
            assert not torch.allclose(weight.float(), base[name], atol=0.01), name
        assert_equal_tensors(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_u13_u16_the_merged_weight_is_the_fp64_sum(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype, **OPTIONS)
    exact = {}
    for name, layer in lora_layers(model):
        delta = 16 / 6 * (layer.lora_B.weight.double() @ layer.lora_A.weight.double())
        exact[name] = layer.weight.double() + (delta.T if isinstance(layer.base_layer, Conv1D) else delta)
        assert delta.abs().max() > 0.1
    merge(model)
    for name, expected in exact.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        computed_in = torch.promote_types(dtype, torch.float32)
        slack = 4 * torch.finfo(computed_in).eps * expected.abs().max()
        error = (weight.double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + slack).all(), name  # rounded once


@cases
def test_nothing_of_the_adapter_is_left(case: str) -> None:
    kind, options = CASES[case]
    needed = requires_grad(make(kind))
    model = merge(adapted(kind, **options))
    assert not any(isinstance(module, (LoRALinear, ModuleToSave)) for module in model.modules())
    assert requires_grad(model) == needed
    assert not hasattr(model, "plainlora")
    with pytest.raises(LoRAError, match="no PlainLoRA adapter"):
        merge(model)


@cases
def test_u08_a_merged_model_is_reloaded_as_it_was(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    model = adapted(kind, **options)
    expected = logits(model)
    merge(model)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reloaded), logits(model))
    if kind != "distilbert":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_u08_tied_embeddings_stay_tied(kind: str, tmp_path: Path) -> None:
    base = make(kind).get_input_embeddings().weight
    model = merge(adapted(kind, **OPTIONS))
    model.save_pretrained(tmp_path)
    for merged in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert is_tied(merged)
        assert merged.config.tie_word_embeddings
        assert torch.equal(merged.get_input_embeddings().weight, base)


@pytest.mark.parametrize(("kind", "trained"), [("qwen2", "lm_head"), ("qwen2", "embed_tokens"), ("gpt2", "wte")])
def test_u08_a_twin_trained_whole_is_untied(kind: str, trained: str, tmp_path: Path) -> None:
    model = adapted(kind, **OPTIONS, modules_to_save=[trained])
    expected = logits(model)
    merge(model).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(reloaded), expected, rtol=1e-5, atol=1e-5)
    for merged in (model, reloaded):
        assert not is_tied(merged)
        assert not merged.config.tie_word_embeddings
        assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def refused(model: PreTrainedModel, match: str) -> None:
    """The error, and a model that it left as it was."""
    before, needed, layers = snapshot(model), requires_grad(model), len(list(lora_layers(model)))
    with pytest.raises(LoRAError, match=match) as caught:
        merge(model)
    assert "\n" not in str(caught.value)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    assert requires_grad(model) == needed
    assert len(list(lora_layers(model))) == layers


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_u01_merging_into_a_quantised_base_is_refused(options: dict[str, object], model_dirs: dict[str, Path]) -> None:
    model = by_us(load_quantized(model_dirs["llama"], **options), **OPTIONS)
    move(model)
    refused(model, r"cannot merge into quantised weights: .*peft#2321.*load the base in 16 bit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_refused(which: str, value: float) -> None:
    model = adapted("llama", **OPTIONS)
    name, matrix = [item for item in trainable(model).items() if which in item[0]][-1]
    matrix.data[0, 0] = value
    refused(model, f"{name.partition('.lora_')[0]}' holds values that are not finite; nothing was merged")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e6), (torch.float32, 3e38), (torch.bfloat16, 3e38)])
def test_u16_an_overflow_is_refused(kind: str, dtype: torch.dtype, value: float) -> None:
    model = adapted(kind, dtype, **OPTIONS)
    (*_, (_, last)) = lora_layers(model)
    last.lora_A.weight.data.fill_(1.0)
    last.lora_B.weight.data.fill_(value)  # finite, as is all of the adapter
    refused(model, f"not finite in {dtype}; merge in a wider dtype")


def test_a_base_weight_that_is_not_finite_stays_as_it_is() -> None:
    model = adapted("llama", **OPTIONS)
    name, layer = next(iter(lora_layers(model)))
    layer.weight.data[1, 2] = float("nan")
    weight = merge(model).get_submodule(name).weight
    assert weight.isnan().nonzero().tolist() == [[1, 2]]


def test_u16_a_dtype_wide_enough_takes_the_same_delta() -> None:
    model = adapted("llama", torch.bfloat16, **OPTIONS)
    (*_, (name, last)) = lora_layers(model)
    last.lora_B.weight.data.fill_(1e6)
    assert merge(model).get_submodule(name).weight.abs().max() > torch.finfo(torch.float16).max
