"""How strongly a trained adapter acts: `h = W0 x + t dW x`, dW the change of the weight that was trained.

t (dimensionless) is the strength: 0 is the base, 1 the adapter as it was trained. LoRA's dW is linear in its scaling,
which is multiplied by t. DoRA's is not: there `W0 x` and the layer's output are interpolated (or extrapolated). What
is trained whole beside the adapter, such as a bias or a head, has no strength and stays as it was trained.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from plainlora.lora.dora import DoRALinear
from plainlora.lora.inject import ModelT
from plainlora.lora.record import adapter_state, lora_layers


@contextmanager
def scaled(model: ModelT, strength: float) -> Iterator[ModelT]:
    """Within the block the adapter acts with this strength; at 1 the model computes what it computed, bit for bit.

    Args:
        model: A model with an adapter of this package.
        strength: t above, dimensionless.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    adapter_state(model)
    layers = [layer for _, layer in lora_layers(model)]
    products = [layer for layer in layers if not isinstance(layer, DoRALinear)]
    before = [layer.scaling for layer in products]
    with interpolated((layer for layer in layers if isinstance(layer, DoRALinear)), strength):
        try:
            for layer in products:
                layer.scaling *= strength
            yield model
        finally:
            for layer, scaling in zip(products, before, strict=True):
                layer.scaling = scaling


@contextmanager
def interpolated(layers: Iterable[nn.Module], strength: float) -> Iterator[None]:
    """Within the block each layer gives `h0 + t (h - h0)`, h its output and h0 that of its `base_layer`.

    Args:
        layers: Layers of any adapter that call a `base_layer`.
        strength: t, dimensionless.
    """
    with ExitStack() as hooks:
        for layer in layers if strength != 1 else ():
            base: dict[str, torch.Tensor] = {}
            inner = cast(nn.Module, layer.base_layer)
            hooks.callback(inner.register_forward_hook(partial(_keep, base)).remove)
            hooks.callback(layer.register_forward_hook(partial(_between, base, strength)).remove)
        yield


def _keep(base: dict[str, torch.Tensor], module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    base["output"] = output


def _between(
    base: dict[str, torch.Tensor], strength: float, module: nn.Module, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    wide = torch.promote_types(output.dtype, torch.float32)
    start = base.pop("output").to(wide)
    return (start + strength * (output.to(wide) - start)).to(output.dtype)
