"""What each side does, as named tensors, level by level. One side is observed at a time, so one model is in memory."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback

from plainlora.parity.case import Case, seed_everything
from plainlora.parity.sides import Side

LEVELS = ("init", "forward", "gradients", "dropout", "trajectory", "files", "merge", "generation")
BOOKKEEPING = ("auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path", "revision")


@dataclass
class Observation:
    """One level of one side.

    Attributes:
        tensors: What is compared as numbers.
        facts: What is compared as equal or not: names, dtypes, config fields.
        not_run: Why the level did not run; empty if it did.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    not_run: str = ""


def _clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}


def _attach(side: Side, case: Case) -> nn.Module:
    base = case.make_base()
    if case.training.get("gradient_checkpointing"):
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    seed_everything(case.seed)
    return side.load(base, case.adapter) if case.adapter else side.attach(base, case.fresh_config())


@torch.no_grad()
def fill(side: Side, model: nn.Module, seed: int) -> None:
    """Makes every adapter matrix count: B starts at zero, which would hide whatever happens before it.

    Both sides draw the same values, because they draw in the order of the names.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(side.weights(model).items()):
        if ".lora_" in name:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / tensor.shape[1] ** 0.5
            tensor.copy_((0.5 * noise).to(tensor.dtype))


def observe_init(side: Side, case: Case, model: nn.Module) -> Observation:
    """A and B, element by element, and which parameters are trained."""
    weights = side.weights(model)
    first = next(model.parameters())
    return Observation(
        _clone(weights),
        {
            "dtypes": {name: str(value.dtype) for name, value in weights.items()},
            "base dtype": str(first.dtype).removeprefix("torch."),
            "device": first.device.type,
        },
    )


def observe_forward(side: Side, case: Case, model: nn.Module) -> Observation:
    """Logits of the batch, dropout off."""
    with torch.no_grad():
        return Observation(_clone({"logits": model.eval()(**_on(model, case.inputs)).logits}))


@contextmanager
def _embedding_output_watched(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Keeps the gradient that arrives at the output of the input embeddings: the end of the way back."""
    seen: dict[str, torch.Tensor] = {}

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.requires_grad_(True)
        output.retain_grad()
        seen["input embeddings"] = output
        return output

    handle = model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()


def observe_gradients(side: Side, case: Case, model: nn.Module) -> Observation:
    """Gradients of every trained parameter and of the input embeddings' output, dropout off."""
    # Checkpointing works in training mode only; modules that drop nothing keep the two sides comparable there.
    model.train(bool(case.training.get("gradient_checkpointing")))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model.zero_grad()
    seed_everything(case.seed + 2)  # some attention kernels drop by themselves in training mode
    with _embedding_output_watched(model) as seen:
        model(**_on(model, case.inputs)).loss.backward()
    gradients = {
        _on_disk(name): p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    trained = sorted(_on_disk(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    gradients |= {name: output.grad for name, output in seen.items() if output.grad is not None}
    model.zero_grad()
    return Observation(_clone(gradients), {"trained parameters": trained})


def _on_disk(name: str) -> str:
    """A parameter's name without what either side adds while it is in memory."""
    for added in ("base_model.model.", ".default", ".trained_module", ".modules_to_save"):
        name = name.replace(added, "", 1)
    return name


def observe_dropout(side: Side, case: Case, model: nn.Module) -> Observation:
    """Logits in training mode under one seed: the same elements must be dropped."""
    if case.config.lora_dropout == 0:
        return Observation(not_run="the config drops nothing")
    seed_everything(case.seed + 1)
    with torch.no_grad():
        return Observation(_clone({"logits": model.train()(**_on(model, case.inputs)).logits}))


def observe_files(side: Side, case: Case, model: nn.Module, directory: Path) -> Observation:
    """The saved adapter: names, shapes, dtypes, values, and the fields of its config."""
    side.save(model, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    fields = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    selected = sorted(_on_disk(name) for name in tensors)
    facts: dict[str, object] = {
        name: sorted(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name not in BOOKKEEPING and name not in ("target_modules", "modules_to_save")
    }
    facts |= {"modules": selected, "dtypes": {name: str(value.dtype) for name, value in tensors.items()}}
    return Observation(tensors, facts)


def observe_merge(side: Side, case: Case, model: nn.Module) -> Observation:
    """Merged weights, and logits of the merged model."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return Observation(not_run="merging into quantised weights is refused (peft#2321)")
    merged = side.merge(model).eval()
    with torch.no_grad():
        logits = merged(**_on(merged, case.inputs)).logits
    return Observation(_clone({"logits": logits} | dict(merged.state_dict())))


def observe_generation(side: Side, case: Case, model: nn.Module) -> Observation:
    """Greedy tokens."""
    if case.prompts is None or not getattr(model, "can_generate", lambda: True)():
        return Observation(not_run="the model does not generate")
    ids = case.prompts.to(next(model.parameters()).device)
    tokens = model.eval().generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
    )
    return Observation(_clone({"tokens": tokens}))


def observe_trajectory(side: Side, case: Case) -> Observation:
    """Loss and gradient norm of every optimizer step through the real trainer, and the adapter at the end."""
    if "max_steps" not in case.training:
        return Observation(not_run="no rows to train on: give --config")
    with tempfile.TemporaryDirectory() as scratch:
        model = _attach(side, case)
        trainer = side.trainer(model, case, scratch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        steps = {
            name: torch.tensor([entry[name] for entry in log], dtype=torch.float64) for name in ("loss", "grad_norm")
        }
        return Observation(_clone(steps | {f"final {key}": value for key, value in side.weights(model).items()}))


def _on(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def observe(side: Side, case: Case, directory: Path, progress: Callable[[str], None]) -> dict[str, Observation]:
    """Every level of one side.

    Args:
        side: The implementation.
        case: What to do with it.
        directory: Where its adapter files go; they are needed for the round trips.
        progress: Told the side and the level as each begins.
    """
    found: dict[str, Observation] = {}
    progress(f"{side.name}: init")
    model = _attach(side, case)
    found["init"] = observe_init(side, case, model)
    if not case.adapter:
        fill(side, model, case.seed)
    for name, level in (("forward", observe_forward), ("gradients", observe_gradients), ("dropout", observe_dropout)):
        progress(f"{side.name}: {name}")
        found[name] = level(side, case, model)
    progress(f"{side.name}: files")
    found["files"] = observe_files(side, case, model, directory)
    progress(f"{side.name}: generation")
    found["generation"] = observe_generation(side, case, model)
    progress(f"{side.name}: merge")
    found["merge"] = observe_merge(side, case, model)
    del model
    progress(f"{side.name}: trajectory")
    found["trajectory"] = observe_trajectory(side, case)
    return {level: found[level] for level in LEVELS}
