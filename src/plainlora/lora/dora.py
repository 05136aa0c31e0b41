"""DoRA (Liu et al. 2024, arXiv:2402.09353, section 4.1): each row's length is trained apart from its direction.

    h = g (W0 + s B A) x        g = m / n, (d_out,)   n = ||W0 + s B A||, the length of each row, without a gradient

m, `(d_out,)`, is trained beside A and B and starts as n, so that g is 1 at first. s is LoRA's scaling.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from plainlora.lora.errors import LoRAError
from plainlora.lora.layer import LoRALinear
from plainlora.lora.numerics import is_finite
from plainlora.lora.storage import dense_weight


class DoRALinear(LoRALinear):
    """A frozen linear map whose rows are turned by LoRA and made longer or shorter by m.

    Args:
        *args: As for `LoRALinear`.
        **options: As for `LoRALinear`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        on_meta = self.lora_A.weight.is_meta
        start = torch.empty(self.out_features, device="meta") if on_meta else self.lengths(self.base_weight())
        self.lora_magnitude_vector = nn.Parameter(start)  # PEFT's name for m

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`W0 x + delta(x)`, `(..., d_in) -> (..., d_out)`, in the base's dtype."""
        h = self.base_layer(x, *args, **kwargs)  # (..., d_out)
        if not self.enabled:
            return h
        dropped = self.training and not isinstance(self.lora_dropout, nn.Identity)
        product = None if dropped else h if self.bias is None else h - self.bias
        return (h + self.delta(x, product)).to(h.dtype)

    def delta(self, x: torch.Tensor, product: torch.Tensor | None = None) -> torch.Tensor:
        """`(g - 1) W0 x + g s B A x`, `(..., d_in) -> (..., d_out)`, with dropout on x in both terms.

        Args:
            x: `(..., d_in)`.
            product: `W0 x`, `(..., d_out)`, if it has been computed.
        """
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))
        weight = self.base_weight()
        g = self.lora_magnitude_vector / self.lengths(weight)
        if product is None:
            product = functional.linear(x, weight)
        return (g - 1) * product + g * self.lora_B(self.lora_A(x)) * self.scaling

    def delta_weight(self) -> torch.Tensor:
        """`g (W0 + s B A) - W0`, `(d_out, d_in)`."""
        weight = self.base_weight()
        g = self.lora_magnitude_vector / self.lengths(weight)
        return g[:, None] * (weight + super().delta_weight()) - weight

    def check_delta(self, weight: torch.Tensor) -> None:
        """See `LoRALinear`."""
        if not is_finite(self._merged(weight)):
            raise LoRAError(f"the merged weight is not finite in {weight.dtype}; merge in a wider dtype")

    def add_delta(self, weight: torch.Tensor) -> None:
        """`W0 <- g (W0 + s B A)`, in place, rounded once.

        Args:
            weight: W0, `(d_out, d_in)`.
        """
        weight.copy_(self._merged(weight))

    def base_weight(self) -> torch.Tensor:
        """W0, `(d_out, d_in)`, in the adapter's dtype or, if its own is wider, in that."""
        own = self.weight.dtype if self.weight.is_floating_point() else torch.float32
        return dense_weight(self.base_layer, torch.promote_types(self.lora_A.weight.dtype, own))

    @torch.no_grad()
    def lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """n, `(d_out,)`. It has no gradient: a constant, as in the paper's section 4.3.

        Args:
            weight: W0, `(d_out, d_in)`.
        """
        delta = LoRALinear.delta_weight(self).to(weight.device)  # before A and B are placed they are on the CPU
        return torch.linalg.vector_norm(weight + delta, dim=1)

    @torch.no_grad()
    def _merged(self, weight: torch.Tensor) -> torch.Tensor:
        """`g (W0 + s B A)` in W0's dtype."""
        precise = weight.to(torch.promote_types(weight.dtype, self.lora_A.weight.dtype))
        g = self.lora_magnitude_vector / self.lengths(precise)
        return (g[:, None] * (precise + LoRALinear.delta_weight(self))).to(weight.dtype)
