"""Weights and low-rank products are summed in place, rounded once; what is not finite is found."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from plainlora.lora.errors import LoRAError
from plainlora.lora.numerics import ROWS, add_product, check_product, is_finite
from plainlora.lora.storage import storage_of


def drawn(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of rank 3 for a layer from 40 to 200: more rows, stored either way, than are summed at a time or not."""
    torch.manual_seed(0)
    return torch.randn(200, 3).to(dtype), torch.randn(3, 40).to(dtype)


def layer(kind: type[nn.Module], dtype: torch.dtype, value: float | None = None) -> nn.Module:
    torch.manual_seed(1)
    module = (nn.Linear(40, 200) if kind is nn.Linear else Conv1D(200, 40)).to(dtype).requires_grad_(False)
    if value is not None:
        module.weight.fill_(value)
    return module


def exact_sum(module: nn.Module, lora_b: torch.Tensor, lora_a: torch.Tensor, scaling: float) -> torch.Tensor:
    delta = scaling * (lora_b.double() @ lora_a.double())
    return module.weight.double() + (delta.T if isinstance(module, Conv1D) else delta)


def writable(module: nn.Module) -> torch.Tensor:
    return storage_of(module).writable_weight(module)


kinds = pytest.mark.parametrize("kind", [nn.Linear, Conv1D])


@kinds
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [0.5, -20.0])  # the second is too much to be let through by its bound in fp16
def test_u13_the_sum_is_rounded_once(
    kind: type[nn.Module], factors: torch.dtype, dtype: torch.dtype, scaling: float
) -> None:
    module, (lora_b, lora_a) = layer(kind, dtype), drawn(factors)
    weight, exact = module.weight, exact_sum(module, lora_b, lora_a, scaling)
    check_product(writable(module), lora_b, lora_a, scaling)
    add_product(writable(module), lora_b, lora_a, scaling)
    assert module.weight is weight
    assert weight.dtype == dtype
    slack = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * exact.abs().max()
    assert ((weight.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_u16_the_bound_lets_no_overflow_through(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Weights as large as there are: whatever is let through stays finite, and a whole last place is refused."""
    largest = torch.finfo(dtype).max
    unit = largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.zeros((), dtype=dtype)).item()
    lora_b, lora_a = (ones * unit**0.5 for ones in (torch.ones(200, 1).double(), torch.ones(1, 40).double()))
    for share in (0.1, 0.24, 0.26, 0.45):
        module = layer(kind, dtype, largest)
        check_product(writable(module), lora_b, lora_a, share)
        add_product(writable(module), lora_b, lora_a, share)
        assert torch.isfinite(module.weight).all()
    for share in (1.0, 3.0):
        module = layer(kind, dtype, largest)
        with pytest.raises(LoRAError, match=f"not finite in {dtype}; merge in a wider dtype"):
            check_product(writable(module), lora_b, lora_a, share)
        assert (module.weight == largest).all()
    check_product(writable(layer(kind, dtype, largest)), lora_b, lora_a, -3.0)
    check_product(writable(layer(kind, dtype, -largest)), lora_b, lora_a, 3.0)


class NewStorages(TorchDispatchMode):
    """The sizes in bytes of the storages that operations make, those of given tensors left out."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_the_weight_s_size_is_allocated(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = (nn.Linear(512, 1024) if kind is nn.Linear else Conv1D(1024, 512)).to(dtype).requires_grad_(False)
    precision = torch.promote_types(dtype, torch.float32)
    lora_b, lora_a = torch.randn(1024, 4, dtype=precision), torch.randn(4, 512, dtype=precision)
    with NewStorages(module.weight, lora_b, lora_a) as made:
        check_product(writable(module), lora_b, lora_a, 0.01)
        add_product(writable(module), lora_b, lora_a, 0.01)
    assert made.sizes  # of the bound at least
    in_place = lora_b.nbytes
    by_rows = ROWS * max(storage_of(module).features(module)) * precision.itemsize
    assert max(made.sizes) <= (in_place if dtype == precision else by_rows)
    assert 4 * by_rows <= module.weight.numel() * precision.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_finite_is_told_from_not_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.zeros(0, dtype=dtype))
    assert is_finite(torch.tensor([[3, -4]], dtype=dtype))
    if dtype.is_floating_point:
        assert is_finite(torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype))  # their sum is not
        for value in (float("nan"), float("inf"), -float("inf")):
            assert not is_finite(torch.tensor([1.0, value, 2.0], dtype=dtype))
        assert not is_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
