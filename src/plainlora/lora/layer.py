"""LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    h = W0 x + (alpha / r) B A x        A: (r, d_in)   B: (d_out, r)   W0 frozen

`...` is any batch shape. Nothing here depends on models, files or quantisation: the base layer is only called.
A variant of LoRA is a subclass with its own `delta`, `delta_weight` and `add_delta`.

The from-scratch form `h = W0 x + alpha * (x @ A' @ B')` with `A'` (d_in, r), `B'` (r, d_out) and alpha not divided
by r is this one with `A = A'.T`, `B = B'.T` and `lora_alpha = alpha * r`. To start from its `A'` (`randn / sqrt(r)` or
Kaiming-uniform), copy the transpose into `lora_A.weight`.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import nn

from plainlora.lora import numerics
from plainlora.lora.storage import storage_of


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732); dimensionless."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class LoRALinear(nn.Module):
    """A frozen linear map plus a trained low-rank one.

    The order of operations, `base(x) + B(A(dropout(x))) * scaling`, is part of the contract: it is the order of PEFT's
    `lora.Linear`, so in fp32 on CPU the two agree to the last bit.

    Args:
        base_layer: A linear layer, `(..., d_in) -> (..., d_out)`, that `plainlora.lora.storage` supports.
        d_in: Input features.
        d_out: Output features.
        r: Rank, at least 1.
        lora_alpha: Numerator of the scaling (dimensionless).
        lora_dropout: Probability of dropping an element of the adapter's input, in [0, 1).
        use_rslora: Scale by `alpha / sqrt(r)` instead of `alpha / r`.
        init_lora_weights: How A and B are initialised, see `reset_lora_parameters`.
        device: Where A and B are created; `"meta"` if their values are loaded from a file.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        d_in: int,
        d_out: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | Literal["gaussian"] = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features, self.r = d_in, d_out, r
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_A = nn.Linear(d_in, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, d_out, bias=False, device=device)
        self.reset_lora_parameters(init_lora_weights)
        self.enabled = True

    def reset_lora_parameters(self, init_lora_weights: bool | Literal["gaussian"]) -> None:
        """Initialises A at random and B with zeros, so that the adapter adds nothing at first.

        `True`: A Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(d_in), 1/sqrt(d_in)), as in Microsoft's loralib.
        `"gaussian"`: A from N(0, 1/r^2). `False`: both as in `nn.Linear`, so the adapter starts as noise.
        """
        if init_lora_weights is False:
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`h + delta(x)`, `(..., d_in) -> (..., d_out)`, in the base's dtype."""
        h = self.base_layer(x, *args, **kwargs)  # (..., d_out)
        if not self.enabled:
            return h
        return (h + self.delta(x)).to(h.dtype)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """`(alpha / r) B A dropout(x)`, `(..., d_in) -> (..., d_out)`, in the adapter's dtype."""
        x = x.to(storage_of(self.base_layer).dropped_dtype(x, self.lora_A.weight.dtype))
        return self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling

    def delta_weight(self) -> torch.Tensor:
        """`(alpha / r) B A`, `(d_out, d_in)`: without dropout, `delta(x)` is its product with x."""
        return self.lora_B.weight @ self.lora_A.weight * self.scaling

    def check_delta(self, weight: torch.Tensor) -> None:
        """Raises `LoRAError` if `add_delta` would overflow the weight's dtype.

        Args:
            weight: W0, `(d_out, d_in)`.
        """
        numerics.check_product(weight, self.lora_B.weight, self.lora_A.weight, self.scaling)

    def add_delta(self, weight: torch.Tensor) -> None:
        """`W0 <- W0 + (alpha / r) B A`, in place, without allocating `delta_weight()`.

        Args:
            weight: W0, `(d_out, d_in)`.
        """
        numerics.add_product(weight, self.lora_B.weight, self.lora_A.weight, self.scaling)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: `lora_A.weight`, `(r, d_in)`, and `lora_B.weight`, `(d_out, r)`."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base_layer.")}

    @property
    def weight(self) -> torch.Tensor:
        """W0 as the base stores it: model code reads `linear.weight.dtype`."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias, if it has one."""
        return cast(torch.Tensor | None, self.base_layer.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"d_in={self.in_features}, d_out={self.out_features}, r={self.r}, scaling={self.scaling:g}"
