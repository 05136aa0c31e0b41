"""What only a GPU can show. Elsewhere each of these is reported as not run."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from plainlora import inject
from plainlora.fast.activations import swiglu
from plainlora.fast.attention import DocumentAttention
from plainlora.fast.head import TokenLogProbs
from plainlora.fast.isolation import collate
from plainlora.fast.lora import fused_forward
from tests.conftest import fused_in_place, load_quantized, make_model, random_ids, run_program

pytestmark = pytest.mark.gpu


FORMS = {"reference": inject, "fused": lambda model, config: fused_in_place(inject(model, config))}


@pytest.mark.parametrize(
    ("form", "dtype"), [("reference", torch.float32), ("reference", torch.bfloat16), ("fused", torch.float32)]
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_and_gradients_on_a_gpu_are_pefts(kind: str, form: str, dtype: torch.dtype) -> None:
    sides = []
    for attach in (FORMS[form], get_peft_model):
        torch.manual_seed(1)
        model = attach(make_model(kind, dtype), LoraConfig(target_modules="all-linear", lora_dropout=0.1)).cuda()
        ids = random_ids().cuda()
        torch.manual_seed(2)
        output = model.train()(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        sides.append([output.logits, *gradients])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dora_by_hand_is_put_into_a_base_that_is_on_a_gpu_already() -> None:
    sides = []
    for attach in (inject, get_peft_model):
        torch.manual_seed(1)
        model = attach(make_model("llama").cuda(), LoraConfig(target_modules="all-linear", use_dora=True))
        sides.append(model(input_ids=random_ids().cuda()).logits)
    torch.testing.assert_close(*sides)


def test_nf4_on_a_gpu_trains_what_peft_trains(tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path) -> None:
    for backend in ("reference", "fused", "peft"):
        done = run_program(
            *("recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml", "--lora_backend", backend),
            *("--model_name_or_path", model_dirs["llama"], "--dataset_name", rows_file, "--load_in_4bit", "true"),
            *("--dtype", "bfloat16", "--max_length", "256", "--test_split_size", "8", "--max_steps", "6"),
            *("--report_to", "none", "--max_new_tokens", "2", "--output_dir", tmp_path / backend),
        )
        assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for backend, tolerance in (("reference", 1e-4), ("fused", 1e-3)):  # the fused form computes A and B in bf16
        for name, tensor in load_file(tmp_path / backend / "adapter_model.safetensors").items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=tolerance)


def test_the_quantised_bytes_stay_as_they_are_on_a_gpu(model_dirs: dict[str, Path]) -> None:
    model = load_quantized(model_dirs["llama"], load_in_4bit=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("q_proj.weight")}
    inject(model, LoraConfig(target_modules=["q_proj"]))
    ids = random_ids().cuda()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name.replace(".weight", ".base_layer.weight")], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_elements_that_are_dropped_are_pefts(
    base: str, autocast: torch.dtype | None, dtype: torch.dtype, model_dirs: dict[str, Path]
) -> None:
    """With the same of half of the input dropped, outputs differ by rounding alone; with others by their own size."""
    outputs = []
    for attach in (get_peft_model, inject, FORMS["fused"]):
        model = load_quantized(model_dirs["llama"], load_in_4bit=True) if base == "nf4" else make_model("llama", dtype)
        torch.manual_seed(1)
        adapted: Any = attach(model.cuda(), LoraConfig(target_modules=["up_proj"], lora_dropout=0.5)).cuda().train()
        layer = next(module for name, module in adapted.named_modules() if name.endswith("layers.0.mlp.up_proj"))
        torch.manual_seed(2)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        x = torch.randn(3, 50, 64, device="cuda", dtype=dtype)
        with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
            outputs.append(layer(x).float())
    scale = float(outputs[0].abs().max())
    for ours in outputs[1:]:
        assert float((ours - outputs[0]).abs().max()) < 0.03 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_the_head_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    """Under a gradient of the loss that fp16 has no number for."""
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(5000, 64, device="cuda", dtype=dtype) / 64
    labels = torch.randint(5000, (3000,), device="cuda")
    upstream = torch.linspace(-1e5, 1e5, 3000, device="cuda")
    exact = hidden.detach().double().requires_grad_()
    expected = (exact @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    log_probs = TokenLogProbs.apply(hidden, labels, weight, None, None)
    (gradient,) = torch.autograd.grad(log_probs, hidden, upstream)
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    assert float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()) < torch.finfo(dtype).eps


def lora(p: float) -> Callable[[torch.Tensor], torch.Tensor]:
    base = nn.Linear(64, 128, device="cuda").requires_grad_(False)
    a, b = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((8, 64), (128, 8)))
    return lambda x: fused_forward(base, x, a, b, 2.0, p)


def one_pass_head() -> Callable[[torch.Tensor], torch.Tensor]:
    weight, labels = torch.randn(500, 64, device="cuda"), torch.randint(500, (300,), device="cuda")
    return lambda x: TokenLogProbs.apply(x, labels, weight, None, None)


FUNCTIONS: dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]] = {
    "lora": lambda: lora(0.0),
    "lora with dropout": lambda: lora(0.1),
    "head": one_pass_head,
    "swiglu": lambda: lambda x: swiglu(x, x.sin()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(name: str) -> None:
    function = FUNCTIONS[name]()
    x = torch.randn(300, 64, device="cuda", requires_grad=True)
    found = []
    for inside in (False, True):
        torch.manual_seed(1)
        y = function(x)
        with torch.autocast("cuda", torch.float16, enabled=inside):
            found += torch.autograd.grad(y, x, torch.cos(y.detach()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_over_documents_on_a_gpu_is_the_models_own(kind: str, dtype: torch.dtype) -> None:
    """In half precision a kernel of its own; it may differ by twice what the model's own differs from fp64 by."""
    model = make_model(kind, dtype).cuda()
    rows = [random_ids(1, length)[0].tolist() for length in (13, 1, 30, 40, 7)]
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in collate(rows, True, 1).items()
    }

    def results(of: Any) -> list[torch.Tensor]:
        of.zero_grad()
        output = of(**batch)
        output.loss.backward()
        return [output.logits.detach().double(), *(each.grad.double() for each in of.parameters())]

    def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        pairs = zip(found, expected, strict=True)
        return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)) for ours, theirs in pairs)

    own, exact = results(model), results(copy.deepcopy(model).double())
    DocumentAttention(model)
    allowed = 1e-5 if dtype == torch.float32 else 2 * difference(own, exact)
    assert difference(results(model), exact if dtype != torch.float32 else own) <= allowed
