"""The fused form beside the reference form, and beside the equation in fp64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from plainlora.fast.lora import Dropped, drop, drop_in_one_kernel, fused_forward
from plainlora.lora import storage
from plainlora.lora.layer import LoRALinear
from tests.fake_gpu import fake_gpu

D_IN, D_OUT, R = 64, 128, 8
WIDE = 768
BASES = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "no bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def make_layer(base: nn.Module, dtype: torch.dtype, p: float = 0.0, alpha: float = 12.0) -> LoRALinear:
    layer = LoRALinear(base.to(dtype).requires_grad_(False), D_IN, D_OUT, R, alpha, p).to(dtype)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def both(layer: LoRALinear, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Output and every gradient, of the reference form and of the fused one."""
    found = []
    for fused in (False, True):
        layer.zero_grad()
        inputs = x.clone().requires_grad_(True)
        torch.manual_seed(1)
        p = layer.lora_dropout.p if layer.training and isinstance(layer.lora_dropout, nn.Dropout) else 0.0
        a, b = layer.lora_A.weight, layer.lora_B.weight
        h = fused_forward(layer.base_layer, inputs, a, b, layer.scaling, p) if fused else layer(inputs)
        (h * h.detach().sin()).sum().backward()
        gradients = {"x": inputs.grad, "A": a.grad.clone(), "B": b.grad.clone()}
        if layer.bias is not None and layer.bias.requires_grad:
            gradients["bias"] = layer.bias.grad.clone()
        found.append({"h": h.detach()} | gradients)
    return found


def assert_close(found: list[dict[str, torch.Tensor]], tolerance: float) -> None:
    reference, fused = found
    assert reference.keys() == fused.keys()
    for name, expected in reference.items():
        assert fused[name].dtype == expected.dtype
        assert float((fused[name] - expected).abs().max() / expected.abs().max()) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_those_of_the_reference_form(base: str, p: float, dtype: torch.dtype) -> None:
    layer = make_layer(BASES[base](), dtype, p)
    for shape in ((33, D_IN), (4, 33, D_IN), (2, 3, 5, D_IN)):
        assert_close(both(layer, torch.randn(shape, dtype=dtype)), TOLERANCE[dtype])


@pytest.mark.parametrize("base", BASES)
def test_the_output_may_be_changed_in_place_as_longformer_does(base: str) -> None:
    layer = make_layer(BASES[base](), torch.float64)
    x = torch.randn(4, 33, D_IN, dtype=torch.float64)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    gradients = []
    for h in (layer(x), fused_forward(layer.base_layer, x, a, b, layer.scaling)):
        h.div_(3.0)
        gradients.append(torch.autograd.grad(h.sin().sum(), (a, b)))
    for expected, found in zip(*gradients, strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = make_layer(nn.Linear(D_IN, D_OUT), torch.float64)
    layer.base_layer.bias.requires_grad_(True)
    assert_close(both(layer, torch.randn(7, D_IN, dtype=torch.float64)), 1e-12)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_base_is_dequantised_for_the_input_gradient_alone(quant_type: str, nested: bool) -> None:
    base = Linear4bit(D_IN, D_OUT, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=nested).to(
        "cpu"
    )
    layer = LoRALinear(base, D_IN, D_OUT, R, 12.0)
    nn.init.normal_(layer.lora_B.weight)
    before = base.weight.data.clone()
    assert_close(both(layer, torch.randn(9, D_IN)), 1e-6)
    assert torch.equal(base.weight.data, before)
    dense = storage.dense_weight(base, torch.float32)
    assert dense.shape == (D_OUT, D_IN)


@pytest.mark.parametrize("form", [drop, drop_in_one_kernel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_is_what_dropout_drops(
    dtype: torch.dtype, form: Callable[[torch.Tensor, float, torch.dtype], Dropped]
) -> None:
    x = torch.randn(50, 70, dtype=dtype)
    torch.manual_seed(3)
    expected = nn.functional.dropout(x.float(), 0.3)
    torch.manual_seed(3)
    kept, mask, divisor = form(x, 0.3, torch.float32)
    assert mask is not None
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected != 0)
    assert kept.dtype == dtype
    torch.testing.assert_close(kept / divisor, expected.to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_reference_form_where_one_kernel_drops(
    base: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's branch, whose kernel a CPU has too."""
    monkeypatch.setattr("plainlora.fast.lora.drop", drop_in_one_kernel)
    layer = make_layer(BASES[base](), dtype, 0.3)
    assert_close(both(layer, torch.randn(4, 33, D_IN, dtype=dtype)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", BASES)
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(base: str, p: float, dtype: torch.dtype) -> None:
    layer = make_layer(BASES[base](), dtype)
    layer.lora_A.float()
    layer.lora_B.float()
    x = torch.randn(4, 33, D_IN, dtype=dtype, requires_grad=True)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    found = []
    for inside in (False, True):
        torch.manual_seed(1)
        h = fused_forward(layer.base_layer, x, a, b, layer.scaling, p)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(h, (x, a, b), h.detach().sin()))
    for outside, within in zip(*found, strict=True):
        assert outside.dtype == within.dtype
        assert torch.equal(outside, within)


class DroppedInputs(TorchDispatchMode):
    """The dtype of what each dropout's own kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_dropout.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_drops_in_one_kernel_and_in_the_adapters_dtype(dtype: torch.dtype, autocast: bool) -> None:
    with fake_gpu() as device, FakeTensorMode(), device:
        base = nn.Linear(D_IN, D_OUT, dtype=dtype)
        layer = LoRALinear(base, D_IN, D_OUT, R, 12.0, 0.1)
        x = torch.empty(4, 33, D_IN, dtype=dtype)
        a, b = layer.lora_A.weight, layer.lora_B.weight
        with DroppedInputs() as found, torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.no_grad():
            for form in (layer, lambda x: fused_forward(base, x, a, b, layer.scaling, 0.1)):
                form(x)
    assert found.dtypes == [torch.float32] * 2


def saved_bytes(form: str, p: float) -> int:
    """Bytes that one layer keeps for its way back, beyond its parameters."""
    base = nn.Linear(WIDE, D_OUT).requires_grad_(False)
    layer = LoRALinear(base, WIDE, D_OUT, R, 12.0, p)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage_ = tensor.untyped_storage()
        if storage_.data_ptr() not in own:
            kept[storage_.data_ptr()] = storage_.nbytes()
        return tensor

    x = torch.randn(256, WIDE, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if form == "fused":
            h = fused_forward(layer.base_layer, x, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, p)
        else:
            h = layer(x)
    h.sum().backward()
    return sum(kept.values())


def test_fewer_bytes_are_kept_for_the_way_back() -> None:
    x, down, mask = 256 * WIDE * 4, 256 * R * 4, 256 * WIDE
    assert saved_bytes("fused", 0.0) == x + down
    assert saved_bytes("fused", 0.1) == x + down + mask
    assert saved_bytes("fused", 0.1) <= 0.63 * saved_bytes("reference", 0.1)


def test_no_gradient_is_made_for_what_needs_none() -> None:
    layer = make_layer(nn.Linear(D_IN, D_OUT), torch.float32)
    x = torch.randn(5, D_IN)  # as the first layer of a model sees it
    h = fused_forward(layer.base_layer, x, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    h.sum().backward()
    assert x.grad is None
    assert layer.lora_A.weight.grad is not None
    assert layer.base_layer.weight.grad is None


def test_the_saved_input_may_not_change_before_the_way_back() -> None:
    layer = make_layer(nn.Linear(D_IN, D_OUT), torch.float32)
    x = torch.randn(5, D_IN, requires_grad=True) * 1.0
    h = fused_forward(layer.base_layer, x, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_the_base_module_is_called_and_stays_as_it_is() -> None:
    layer = make_layer(nn.Linear(D_IN, D_OUT), torch.float32)
    before = copy.deepcopy(layer.state_dict())
    calls: list[torch.Size] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    both(layer, torch.randn(3, D_IN))
    assert calls == [torch.Size([3, D_OUT])] * 2
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
