"""A lower bound of a run's duration: its floating-point operations, at the speed of a bare matrix product."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plainlora.resources.activations import precision
from plainlora.resources.plan import Plan


@dataclass(frozen=True)
class TimeNeed:
    """The operations of a run, and a lower bound of its duration.

    Attributes:
        tokens: Number of tokens that are trained on, over all epochs.
        steps: Number of optimizer steps.
        flops: Floating-point operations of the matrix products with weights; attention's own are left out.
        flops_per_second: The speed of a bare product of two matrices here, in the dtype that training computes in.
        seconds_at_least: `flops / flops_per_second`.
    """

    tokens: int
    steps: int
    flops: int
    flops_per_second: float
    seconds_at_least: float


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a bare matrix product: the best of five, after one to warm up.

    Args:
        device: The device that multiplies.
        dtype: The dtype of both matrices.
    """
    size = 1024 if device.type == "cpu" else 4096
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        _ = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def count_flops(model: PreTrainedModel, tokens: int, trained_tokens: int, checkpointing: bool, frozen: bool) -> int:
    """Floating-point operations of the products with weights.

    A weight of P numbers takes 2 P operations a token in the forward pass, 2 P for the gradient of its input, and 2 P
    for its own gradient if it is trained. Checkpointing runs the forward pass of the blocks twice. The output head is
    applied only to tokens with a label. With `last_layers` no gradient passes through frozen weights.

    Args:
        model: The model with its adapter, on any device.
        tokens: Number of tokens of the run.
        trained_tokens: Number of those with a label.
        checkpointing: Whether activations are computed again.
        frozen: Whether gradients pass through frozen weights.
    """
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight
        seen = trained_tokens if module is head else tokens
        passes = 1 + (frozen or weight.requires_grad) + weight.requires_grad
        passes += checkpointing and module is not head
        total += 2 * weight.numel() * seen * passes
    return total


def count_time(plan: Plan, model: PreTrainedModel, checkpointing: bool) -> TimeNeed:
    """Counts the operations of one process, and measures its speed.

    Args:
        plan: The run.
        model: The model that it trains, on the `meta` device.
        checkpointing: Whether activations are computed again.
    """
    share = 1.0 if plan.trained_tokens is None else plan.trained_tokens / max(plan.tokens, 1)
    tokens, processes = plan.all_tokens, plan.training.world_size
    flops = count_flops(
        model, tokens // processes, int(tokens * share) // processes, checkpointing, frozen=plan.lora is not None
    )
    rate = measure_flops(plan.device, precision(plan.training) or plan.dtype)
    return TimeNeed(tokens, plan.steps, flops, rate, flops / rate)
