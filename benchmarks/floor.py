"""The floor of a step: its counted operations over the peak of the machine's own matrix product."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from benchmarks.timer import Timer
from plainlora.resources.plan import Plan

TRIES = 2  # of each product in a round; the best of all counts


def shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Name: (in, out) of every linear layer of the blocks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def count_step(config: PretrainedConfig, r: int, documents: Sequence[int]) -> int:
    """FLOPs that no form of a step can leave out, with LoRA of rank r on every linear layer of the blocks.

    N tokens in documents of n_1, n_2, ...; M are predicted, all but the first of each. The embeddings and every W0
    are frozen.

        each W0 (in x out):  2 N in out forward + 2 N in out backward (dX; no gradient of W0)
        each A, B:           2 N r (in + out) forward + 4 N r (in + out) backward (dX, dA, dB)
        the head (d x V):    2 M d V forward + 2 M d V backward
        attention (width a = heads x head size), each block and document:
                             2 a n (n + 1) forward (Q K^T and P V, the causal half) + twice as much backward

    No gradient passes below the first block's q, k and v, whose dX is left out. Norms, activations, softmax, the
    optimizer and what is computed twice count nothing.

    Args:
        config: Of the base.
        r: Rank.
        documents: Tokens of each document of the step.
    """
    tokens = sum(documents)
    predicted = tokens - len(documents)
    flops = 4 * predicted * config.hidden_size * config.vocab_size
    for name, (d_in, d_out) in shapes(config).items():
        lowest = ".0." in name and name.endswith(("c_attn", "q_proj", "k_proj", "v_proj"))
        flops += (2 if lowest else 4) * tokens * d_in * d_out
        flops += 6 * tokens * r * (d_in + d_out) - (2 * tokens * r * d_in if lowest else 0)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size
    return flops + config.num_hidden_layers * sum(6 * width * n * (n + 1) for n in documents)


def products(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: str) -> list[Callable[[], int]]:
    """The distinct products of the blocks, forward and backward; each computes one and returns its FLOPs."""
    made: list[Callable[[], int]] = []
    for d_in, d_out in sorted(set(shapes(config).values())):
        weight = torch.randn(d_out, d_in, dtype=dtype, device=device)
        x, gradient = (torch.randn(tokens, width, dtype=dtype, device=device) for width in (d_in, d_out))
        flops = 2 * tokens * d_in * d_out
        made.append(lambda x=x, w=weight, flops=flops: (x @ w.T, flops)[1])  # type: ignore[misc]
        made.append(lambda g=gradient, w=weight, flops=flops: (g @ w, flops)[1])  # type: ignore[misc]
    return made


def run_floor(plan: Plan, steps: Sequence[Sequence[int]], timer: Timer) -> NoReturn:
    """Measures the peak in every round, and answers with the seconds that the round's step would take at it.

    Args:
        plan: The run, whose dtype is that of the products.
        steps: Tokens of each document of each step.
        timer: Of this variant.
    """
    assert isinstance(plan.lora, LoraConfig)
    dtype = plan.dtype
    run = products(plan.config, sum(steps[0]), dtype, timer.device)
    timer.facts |= {"products in": str(dtype).removeprefix("torch."), "FLOPs": [], "FLOP/s": []}
    timer.ready()
    epochs = itertools.cycle(steps)
    while True:  # until the parent asks for no more
        documents = next(epochs)
        timer.begin()
        rates = [_rate(product, timer) for _ in range(TRIES) for product in run]
        flops = count_step(plan.config, plan.lora.r, documents)
        timer.facts["FLOPs"].append(flops)
        timer.facts["FLOP/s"].append(max(rates))
        timer.answer(flops / max(rates))


def _rate(product: Callable[[], int], timer: Timer) -> float:
    timer.synchronize()
    started = time.perf_counter()
    flops = product()
    timer.synchronize()
    return flops / (time.perf_counter() - started)
