"""Checks of the weights: trained ones get gradients and end with an effect, frozen ones do not change, all are finite.

Each of these has failed silently in other projects: layers without gradients under gradient checkpointing
(open-unlearning#178), an adapter without effect (peft#2566).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from plainlora.errors import UserError
from plainlora.lora.errors import some
from plainlora.lora.numerics import is_finite
from plainlora.lora.storage.tensors import inner_tensors
from plainlora.training.engines.engine import shard_of

SAMPLED = 64  # values of each frozen weight that are compared


@dataclass(frozen=True)
class Matrices:
    """The trained weights of one LoRA layer: A, `(r, d_in)`, and B, `(d_out, r)`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter


def lora_matrices(model: nn.Module) -> dict[str, Matrices]:
    """Every LoRA layer's A and B by the layer's name, for any back end: PEFT's names contain `default`."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"(.*)\.(lora_[AB])(\.default)?\.weight", name):
            found.setdefault(match[1], {})[match[2]] = parameter
    return {layer: Matrices(**sides) for layer, sides in found.items()}


def _are_zero(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each tensor is all zeros, with one transfer from the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors], torch.inf)
    return [norm == 0 for norm in torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()]


class FirstGradients:
    """Checks in the first step that every trained weight gets a gradient, by hooks in the backward pass.

    B is 0 then, so the gradient of A is 0, and that of B must not be. Without an adapter a trained weight of the base
    may have a gradient of 0, but the loss must depend on it. Hooks are needed because an engine that shards gradients
    leaves none on the parameters after the backward pass.

    Args:
        model: The model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = lora_matrices(model)
        self._largest: dict[int, torch.Tensor] = {}  # absolute value of each weight's gradient
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._own = {} if self._layers else trained
        sides = [side for layer in self._layers.values() for side in (layer.lora_A, layer.lora_B)]
        sides += self._own.values()
        self._hooks = [side.register_hook(partial(self._note, id(side))) for side in sides if side.requires_grad]

    def _note(self, side: int, gradient: torch.Tensor) -> None:
        largest = gradient.detach().abs().max().float()
        self._largest[side] = torch.maximum(largest, self._largest.get(side, largest))

    def check(self, of_all_processes: Callable[..., list[list[float]]]) -> None:
        """Raises `UserError` if an adapter or a weight would not be trained; the error names the first ones.

        Args:
            of_all_processes: Returns the given numbers of every process.
        """
        for hook in self._hooks:
            hook.remove()
        if self._own:
            self._check_own(of_all_processes)
        if not self._layers:
            return
        sides = [side for layer in self._layers.values() for side in (layer.lora_A, layer.lora_B)]
        here = [self._largest.get(id(side), 0.0) for side in sides]  # read with one transfer from the device
        found = [max(column) for column in zip(*of_all_processes(*here), strict=True)]
        without = [name for at, name in enumerate(self._layers) if found[2 * at] == found[2 * at + 1] == 0]
        if without:
            raise UserError(
                f"{len(without)} of {len(self._layers)} adapters got no gradient in the first step ({some(without)}), "
                "so they would not be trained: the loss does not depend on them; leave them out with "
                "lora_exclude_modules"
            )

    def _check_own(self, of_all_processes: Callable[..., list[list[float]]]) -> None:
        here = [float(id(each) in self._largest) for each in self._own.values()]
        found = [max(column) for column in zip(*of_all_processes(*here), strict=True)]
        if without := [name for name, reached in zip(self._own, found, strict=True) if not reached]:
            raise UserError(
                f"{len(without)} of {len(found)} weights got no gradient in the first step ({some(without)}), so they "
                "would not be trained: the loss does not depend on them; name the modules that are to be trained with "
                "--method last_layers --last_layers"
            )


def check_effect(model: nn.Module, steps: int, learning_rate: float, best: int | None = None) -> None:
    """Checks after training that every adapter has an effect: neither A nor B is all zeros.

    Args:
        model: A model with or without adapters.
        steps: Number of optimizer steps taken.
        learning_rate: The run's, for the message.
        best: The step of the best evaluation, if its weights have been loaded again.

    Raises:
        UserError: An adapter has no effect; the error names its layer.
    """
    layers = lora_matrices(model)
    zero = _are_zero([side for layer in layers.values() for side in (layer.lora_A, layer.lora_B)])
    without = [name for at, name in enumerate(layers) if zero[2 * at] or zero[2 * at + 1]]
    if not without:
        return
    fault = f"{len(without)} of {len(layers)} adapters change nothing ({some(without)}), so nothing was saved"
    if best is not None:
        raise UserError(
            f"the best of the evaluations is that of step {best}, at which {fault}; lower learning_rate (now "
            f"{learning_rate:g})"
        )
    raise UserError(
        f"after {steps} step{'s' * (steps != 1)} {fault}; raise learning_rate (now {learning_rate:g}), or train for "
        "longer: a warm-up begins with a rate of 0"
    )


def check_values(model: nn.Module) -> None:
    """Checks before a save that every trained weight is finite and not empty (empty ones were saved in peft#1443).

    Raises:
        UserError: A weight is not; the error names the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (parameter.numel() and is_finite(parameter.detach())):
            fault = "holds values that are not finite" if parameter.numel() else "is empty"
            raise UserError(
                f"{name} {fault}, so the model was not saved; what was saved before is untouched; lower "
                "learning_rate, or train in float32"
            )


class FrozenWeights:
    """Digests of some values of every frozen weight, or of this process's part, to check later that none has changed.

    Args:
        model: The model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = self._digests(model)

    @staticmethod
    @torch.no_grad()
    def _digests(model: nn.Module) -> dict[str, str]:
        digests = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and shard_of(parameter).numel():
                digest = hashlib.sha256()
                for values in inner_tensors(shard_of(parameter)):
                    flat = values.flatten()
                    sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().cpu()
                    digest.update(sample.view(torch.uint8).numpy().tobytes())
                digests[name] = digest.hexdigest()
        return digests

    def check(self, model: nn.Module) -> None:
        """Raises `UserError` if a frozen weight has changed; the error names it."""
        now = self._digests(model)
        moved = [name for name, digest in self._before.items() if now.get(name, digest) != digest]
        if moved:
            raise UserError(
                f"{len(moved)} of {len(self._before)} frozen weights changed in the first step ({some(moved)}); "
                "this is a fault of the program: please report it with the command"
            )
