"""What DoRA costs beside LoRA: forward and backward passes of SmolLM2's shape with random weights, interleaved.

    python -m docs.what-matters.cost [--rounds 9]

Writes `cost.json` and prints the table of the page.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from plainlora import fuse, inject
from plainlora.markdown import table
from plainlora.report import package_versions, write_json

HERE = Path(__file__).parent
TOKENS = 512


def make(kind: str) -> nn.Module:
    """Four blocks of SmolLM2-135M's shape with an adapter of rank 8 on every linear layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=1024,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora="DoRA" in kind)
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, lora) if "PEFT" in kind else inject(base, lora)
    if kind == "LoRA, fused":
        fuse(model)
    return model.train()


def step(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    """Measures, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    kinds = ("LoRA, fused", "LoRA, by hand", "LoRA, PEFT", "DoRA, by hand", "DoRA, PEFT")
    models = {kind: make(kind) for kind in kinds}
    ids = torch.randint(0, 1024, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    for model in models.values():
        step(model, ids)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in tqdm(range(rounds)):
        for kind in kinds:
            times[kind].append(min(step(models[kind], ids) for _ in range(2)))
    write_json(HERE / "cost.json", {"tokens": TOKENS, "seconds": times, "versions": package_versions()})
    rows = []
    for kind in kinds:
        ratios = [one / beside for one, beside in zip(times[kind], times["LoRA, PEFT"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([kind, f"{1e3 * statistics.median(times[kind]):.0f} ms", spread])
    print(table(["adapter", "a pass", "/ PEFT's LoRA"], rows, right=(1, 2)))


if __name__ == "__main__":
    main()
