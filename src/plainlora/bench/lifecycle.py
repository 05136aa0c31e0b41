"""Inject, save, load and merge, at Llama-2-7b's number of layers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from plainlora.backends import BACKENDS
from plainlora.bench.case import FUSED, PEFT, Case, Target
from plainlora.bench.turns import Turns
from plainlora.lora.inject import unwrap
from plainlora.lora.merge import merge
from plainlora.parity.tiny import random_model

TARGETS = {"q_proj and v_proj": ["q_proj", "v_proj"], "every linear layer": "all-linear"}
OPERATIONS = ("inject", "save", "load", "merge")


def cases(size: str, device: str) -> list[Case]:
    """Every operation, for two layers a block and for all seven."""
    del device
    return [
        Case(
            suite="lifecycle",
            name=f"{operation}, 32 blocks of width 1024, r=8 on {layers}",
            arms={FUSED: {}, PEFT: {}},
            options={"operation": operation, "targets": targets, "full": size == "full"},
            targets=(Target("time", PEFT, 0.3),)
            + ((Target("peak above weights", PEFT, 0.1),) if operation == "merge" else ()),
        )
        for layers, targets in TARGETS.items()
        for operation in OPERATIONS
    ]


def _base(full: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_attention_heads": 8,
        "num_hidden_layers": 32,
    }
    if not full:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    return random_model(LlamaConfig(vocab_size=32_000 if full else 1000, **sizes))


def _fill(model: nn.Module) -> None:
    """Trained values for A and B."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)


def take_part(arm: str, options: dict[str, Any], turns: Turns) -> None:
    """Does the operation again and again; what leads up to it and away from it is not timed."""
    base = _base(options["full"]).to(turns.device)  # type: ignore[arg-type]
    ours = BACKENDS[FUSED]
    attach: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module]
    release: Callable[[Any], object]
    fold: Callable[[Any], object]
    if arm == PEFT:
        attach = lambda: get_peft_model(base, LoraConfig(**settings))  # noqa: E731
        load = lambda folder: PeftModel.from_pretrained(base, str(folder))  # noqa: E731
        release = lambda model: model.unload()  # noqa: E731
        fold = lambda model: model.merge_and_unload()  # noqa: E731
    else:
        attach = lambda: ours.attach(base, LoraConfig(**settings))  # noqa: E731
        load = lambda folder: ours.load(base, folder)  # noqa: E731
        release, fold = unwrap, merge
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    settings["target_modules"] = options["targets"]
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch)
        model = attach()
        _fill(model)
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
        release(model)
        if options["operation"] == "merge":
            model = attach()
            _fill(model)
        turns.ready()
        while True:
            if options["operation"] == "inject":
                turns.begin()
                model = attach()
                turns.end()
                release(model)
            elif options["operation"] == "load":
                turns.begin()
                model = load(folder)
                turns.end()
                release(model)
            elif options["operation"] == "save":
                model = attach()
                turns.begin()
                model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
                turns.end()
                release(model)
            else:
                turns.begin()
                fold(model)
                turns.end()
                model = attach()
                _fill(model)
