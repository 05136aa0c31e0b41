"""One adapted layer, forward and backward: six shapes of the models that the recipes train."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.case import FLOOR, FUSED, PEFT, Case, Target
from benchmarks.counting import count
from benchmarks.timer import Timer
from plainlora.fast.fuse import fuse
from plainlora.lora.inject import inject

# name: (d_in, d_out, r, whether the weight is stored transposed)
SHAPES = {
    "GPT-2 c_attn": (768, 2304, 2, True),
    "DistilBERT q_lin": (768, 768, 8, False),
    "Qwen2-0.5B v_proj": (896, 128, 2, False),
    "Qwen2-0.5B gate_proj": (896, 4864, 2, False),
    "Llama-2-7b q_proj": (4096, 4096, 8, False),
    "Llama-2-7b gate_proj": (4096, 11008, 8, False),
}
ITERATION_FLOPS = 2e10  # an iteration repeats a small layer until it is about this long


def cases(size: str, device: str) -> list[Case]:
    """Every shape, without dropout and with 0.1."""
    del device
    tokens, factor = (1024, 1) if size == "full" else (32, 16)
    found = []
    for name, (d_in, d_out, r, transposed) in SHAPES.items():
        for p in (0.0, 0.1):
            limits = [Target("time", PEFT, 0.88 if p == 0 else 1.0)]
            limits.append(Target("saved bytes", PEFT, 0.63) if p else Target("time", FLOOR, 1.12))
            passes = max(1, round(ITERATION_FLOPS / (4 * tokens * d_in * d_out))) if size == "full" else 1
            shape = {"d_in": d_in // factor, "d_out": d_out // factor, "r": r, "transposed": transposed}
            found.append(
                Case(
                    suite="layer",
                    name=f"{name} {d_in} -> {d_out}, r={r}, dropout {p:g}",
                    variants={variant: {} for variant in (FUSED, PEFT, FLOOR)},
                    options=shape | {"p": p, "tokens": tokens, "passes": passes},
                    targets=tuple(limits),
                )
            )
    return found


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Makes the layer in the variant's form, counts one pass, and runs."""
    d_in, d_out, tokens = options["d_in"], options["d_out"], options["tokens"]
    base = Conv1D(d_out, d_in) if options["transposed"] else nn.Linear(d_in, d_out)
    model: nn.Module = nn.ModuleDict({"layer": base.requires_grad_(False)})
    config = LoraConfig(r=options["r"], lora_alpha=16, lora_dropout=options["p"], target_modules=["layer"])
    if variant == PEFT:
        model = get_peft_model(model, config).get_base_model()
    elif variant != FLOOR:
        model = inject(model, config)
    if variant == FUSED:
        fuse(model)
    layer = model.to(timer.device).train().get_submodule("layer")
    x = torch.randn(1, tokens, d_in, device=timer.device, requires_grad=True)
    gradient = torch.randn(1, tokens, d_out, device=timer.device)
    timer.facts |= count(lambda: layer(x), model.parameters())
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    timer.facts["passes per iteration"] = options["passes"]
    timer.ready()
    while True:
        timer.begin()
        for _ in range(options["passes"]):
            for tensor in trained:
                tensor.grad = None
            layer(x).backward(gradient)
        timer.end()
