"""The loss head alone: from hidden states to the loss and back to their gradient."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks.case import FLOOR, FUSED, PEFT, REFERENCE, Case, Target
from benchmarks.counting import count
from benchmarks.timer import Timer
from plainlora.fast.loss_head import LossHead

TOKENS = 512
HEADS = {"Llama-2-7b": (4096, 32_000), "GPT-2": (768, 50_257), "Qwen2-0.5B": (896, 151_936)}  # d, V
TRL_FIELDS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for at every step


def cases(size: str, device: str) -> list[Case]:
    """Three vocabularies, 512 tokens."""
    del device
    factor = 1 if size == "full" else 16
    return [
        Case(
            suite="head",
            name=f"{name} {d} x {vocabulary:,}, {TOKENS} tokens",
            variants={variant: {} for variant in (FUSED, PEFT, REFERENCE, FLOOR)},
            options={"d": d // factor, "vocabulary": vocabulary // factor, "tokens": TOKENS // factor},
            targets=(
                Target("time", PEFT, 0.45),
                Target("peak above weights", PEFT, 0.10),
                Target("tensor bytes", PEFT, 0.10),
                Target("time", REFERENCE, 0.70),
                Target("time", FLOOR, 1.2),
            ),
        )
        for name, (d, vocabulary) in HEADS.items()
    ]


def make_model(d: int, vocabulary: int) -> LlamaForCausalLM:
    """A language model without a layer: embeddings, the last norm, and a frozen head."""
    config = LlamaConfig(
        hidden_size=d, vocab_size=vocabulary, num_hidden_layers=0, num_attention_heads=1, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Runs one form of the head: in one pass, TRL's own, with all logits at once, or two bare products of matrices."""
    model = make_model(options["d"], options["vocabulary"]).to(timer.device)  # type: ignore[arg-type]
    if variant in (FUSED, PEFT):
        add_fused_lm_head(model, outputs=TRL_FIELDS)
    if variant == FUSED:
        LossHead(model).with_statistics = False
    hidden = torch.randn(1, options["tokens"], options["d"], device=timer.device, requires_grad=True)
    labels = torch.randint(options["vocabulary"], (1, options["tokens"]), device=timer.device)
    head: nn.Linear = model.get_output_embeddings()

    def run() -> torch.Tensor:
        if variant == REFERENCE:
            return model(inputs_embeds=hidden, labels=labels, use_cache=False).loss
        return model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).loss

    if variant != FLOOR:
        timer.facts |= count(run, [*model.parameters(), hidden, labels])
    else:
        timer.facts |= {"tensor bytes": 4 * (labels.numel() * options["vocabulary"] + hidden.numel())}
    timer.ready()
    while True:
        hidden.grad = None
        timer.begin()
        if variant == FLOOR:
            with torch.no_grad():
                logits = hidden[0] @ head.weight.T
                logits @ head.weight
                del logits
        else:
            run().backward()
        timer.end()
