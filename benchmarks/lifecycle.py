"""Inject, save, load and merge, at Llama-2-7b's number of layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.case import FUSED, PEFT, Case, Target
from benchmarks.timer import Timer
from plainlora.backends import BACKENDS
from plainlora.lora.inject import unwrap
from plainlora.lora.merge import merge

OPERATIONS = ("inject", "save", "load", "merge")
# What is adapted, in a model of which width and width of the MLP. All of Llama-2-7b does not fit into memory twice:
# its attention does, at its own width, and all layers do at a quarter of it.
MODELS: dict[str, tuple[list[str] | str, int, int]] = {
    "q_proj and v_proj of width 4096": (["q_proj", "v_proj"], 4096, 64),
    "every linear layer of width 1024": ("all-linear", 1024, 2752),
}


def cases(size: str, device: str) -> list[Case]:
    """Every operation, for two layers a block and for all seven."""
    del device
    return [
        Case(
            suite="lifecycle",
            name=f"{operation}, 32 blocks, r=8 on {name}",
            variants={FUSED: {}, PEFT: {}},
            options={
                "operation": operation,
                "targets": targets,
                "width": width if size == "full" else 64,
                "mlp": mlp if size == "full" else 128,
                "blocks": 32 if size == "full" else 2,
            },
            targets=(Target("time", PEFT, 0.3),)
            + ((Target("peak above weights", PEFT, 0.1),) if operation == "merge" else ()),
        )
        for name, (targets, width, mlp) in MODELS.items()
        for operation in OPERATIONS
    ]


def _base(width: int, mlp: int, blocks: int, device: str) -> PreTrainedModel:
    """A Llama whose weights are all 0.01: their values are of no matter here, and drawing billions takes long."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=max(width // 128, 1),
        vocab_size=1000,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    return model.eval()


def _fill(model: nn.Module) -> None:
    """Trained values for A and B."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)


@dataclass(frozen=True)
class _Verbs:
    """One implementation's way of each operation."""

    attach: Callable[[PreTrainedModel, LoraConfig], Any]
    load: Callable[[PreTrainedModel, str], Any]
    release: Callable[[Any], object]
    merge: Callable[[Any], object]


VERBS = {
    FUSED: _Verbs(BACKENDS[FUSED].attach, BACKENDS[FUSED].load, unwrap, merge),
    PEFT: _Verbs(
        get_peft_model, PeftModel.from_pretrained, lambda model: model.unload(), lambda model: model.merge_and_unload()
    ),
}


def run_variant(variant: str, options: dict[str, Any], timer: Timer) -> None:
    """Does the operation again and again; what leads up to it and away from it is not timed.

    Each is as the first of its process: what the one before has freed goes back to the system.
    """
    base = _base(options["width"], options["mlp"], options["blocks"], timer.device)
    verbs, operation, folder = VERBS[variant], options["operation"], f"{timer.scratch}/{variant}"

    def attach() -> Any:
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=options["targets"])
        return verbs.attach(base, config)

    def save(model: Any) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    with torch.no_grad():
        model = attach()
        _fill(model)
        save(model)
        verbs.release(model)
        timer.ready()
        while True:
            if operation in ("save", "merge"):
                model = attach()
                _fill(model)
            timer.memory.start()
            timer.begin()
            if operation == "inject":
                model = attach()
            elif operation == "load":
                model = verbs.load(base, folder)
            elif operation == "save":
                save(model)
            else:
                verbs.merge(model)
            timer.end()
            if operation != "merge":
                verbs.release(model)
