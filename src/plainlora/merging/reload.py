"""Loads a merged model with plain Transformers alone, and writes its answers.

It is run as a file, `python reload.py MODEL QUESTIONS ANSWERS`, so that nothing of this package is imported. Models in
the parent process are evaluated by the same `ask`, so that only the models differ.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Holds weights of 16 bits in float32 within the block, and computes so; they have their values again after it."""
    halves = [
        (tensor, tensor.dtype)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def ask(model: nn.Module, questions: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Runs a model on prompts and texts.

    Args:
        model: A causal language model or a sequence classifier of Transformers, with or without an adapter.
        questions: `prompts`: rows of `input_ids`, for a language model with the `start` of the answer in them.
            `texts`: rows of `input_ids` and `labels`, where -100 is ignored. `float32`: whether weights of 16 bits
            are computed with in float32.

    Returns:
        `logits.N` of prompt N in fp32, `(1, tokens, vocabulary)` or `(1, classes)`; `tokens.N`, the likeliest token at
        every position of its answer and after it, `(tokens - start + 1,)`; `losses`, the summed cross-entropy in nats
        and the number of labels of every text, `(texts, 2)` in fp64.
    """
    model.eval()
    device = next(model.parameters()).device
    answers = {}
    with in_float32(model) if questions.get("float32") else nullcontext():
        for number, prompt in enumerate(questions["prompts"]):
            ids = torch.tensor([prompt["input_ids"]], device=device)
            logits = model(input_ids=ids).logits.float().cpu().contiguous()
            answers[f"logits.{number}"] = logits
            if "start" in prompt:
                answers[f"tokens.{number}"] = logits[0, prompt["start"] - 1 :].argmax(-1)
        losses = [_loss(model, text, device) for text in questions["texts"]]
    answers["losses"] = torch.tensor(losses, dtype=torch.float64).reshape(-1, 2)
    return answers


def _loss(model: nn.Module, text: dict[str, list[int]], device: torch.device) -> tuple[float, int]:
    logits = model(input_ids=torch.tensor([text["input_ids"]], device=device)).logits[0, :-1].float().cpu()
    labels = torch.tensor(text["labels"][1:])
    return float(nn.functional.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())


def main(directory: str, questions: str, answers: str) -> None:
    """Reads the questions (JSON), writes the answers (safetensors)."""
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    quantization = asked.get("quantization_config")
    architecture = AutoConfig.from_pretrained(directory).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(
        directory,
        dtype="auto",
        device_map=asked.get("device"),
        quantization_config=quantization and BitsAndBytesConfig(**quantization),
    )
    save_file(ask(model, asked), answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
