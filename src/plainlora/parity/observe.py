"""Observes one side, level by level, as named tensors and facts. Only one model is in memory at a time."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTTrainer

from plainlora.lora.errors import LoRAError
from plainlora.lora.storage import dense_weight, is_quantized
from plainlora.lora.storage.tensors import inner_tensors, is_plain
from plainlora.parity.case import Case, seed_everything
from plainlora.parity.sides import Side

LEVELS = ("init", "forward", "gradients", "dropout", "trajectory", "files", "merge", "generation")
BOOKKEEPING = ("auto_mapping", "peft_version")  # fields about the program that wrote the file
SAVED = "the trainer saves the adapter as it is"
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")  # the last two by SFTTrainer only


@dataclass
class Observation:
    """The observation of one level of one side.

    Attributes:
        tensors: Numbers, which may differ by a tolerance.
        facts: Names, dtypes, config fields and the like, which must be equal.
        not_run: Why the level did not run; empty if it did.
        notes: Notes for the report; not compared.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    not_run: str = ""
    notes: dict[str, str] = field(default_factory=dict)


def _clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}


def _is_quantized(model: nn.Module) -> bool:
    return any(is_quantized(module) for module in model.modules())


def _attach(side: Side, case: Case) -> nn.Module:
    base = case.make_base()
    seed_everything(case.seed)
    model = side.load(base, case.adapter) if case.adapter else side.attach(base, case.fresh_config())
    for parameter in model.parameters():
        if parameter.requires_grad and case.adapter_dtype != "float32":
            parameter.data = parameter.data.to(getattr(torch, case.adapter_dtype))
    return model


@torch.no_grad()
def fill(side: Side, model: nn.Module, seed: int) -> None:
    """Gives every trained weight random values, because B and some biases start at zero, and a head as the base's.

    Both sides get the same values, because they are drawn in the order of the names.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(side.weights(model).items()):
        noise = 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / tensor.shape[-1] ** 0.5
        tensor.copy_(noise.to(tensor.dtype))


def observe_init(side: Side, case: Case, model: nn.Module) -> Observation:
    """The initial A and B, and the dtypes of what is trained."""
    weights = side.weights(model)
    first = next(model.parameters())
    return Observation(
        _clone(weights),
        {
            "dtypes": {name: str(value.dtype) for name, value in weights.items()},
            "base dtype": str(first.dtype).removeprefix("torch."),
            "device": first.device.type,
            "quantised": _is_quantized(model),
        },
        notes=side.notes(model),
    )


@torch.no_grad()
def _logits(model: nn.Module, case: Case) -> torch.Tensor:
    return model(**_on(model, case.inputs)).logits


def observe_forward(side: Side, case: Case, model: nn.Module) -> Observation:
    """The logits of the batch, without dropout."""
    return Observation(_clone({"logits": _logits(model.eval(), case)}))


@contextmanager
def _embedding_gradient_kept(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Keeps the gradient of the output of the input embeddings, at the end of the backward pass."""
    seen: dict[str, torch.Tensor] = {}

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.requires_grad_(True)
        output.retain_grad()
        seen["input embeddings"] = output
        return output.clone()  # CTRL and others scale it in place

    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # CANINE hashes its characters
        yield seen
        return
    handle = embeddings.register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


def observe_gradients(side: Side, case: Case, model: nn.Module) -> Observation:
    """The gradients of every trained parameter and of the input embeddings' output, without dropout."""
    # Checkpointing needs training mode; the dropouts are set to evaluation mode below.
    checkpointing = bool(case.arguments and case.arguments.gradient_checkpointing)
    if checkpointing:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.gradient_checkpointing_enable()  # type: ignore[operator]
        base.enable_input_require_grads()  # type: ignore[operator]
    model.train(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    seed_everything(case.seed + 2)  # some attention kernels apply dropout themselves in training mode
    _, gradients = _forward_and_backward(model, case)
    return Observation(gradients, {"trained parameters": _trained(model)})


def _forward_and_backward(model: nn.Module, case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the gradients of every trained parameter and of the input embeddings' output."""
    model.zero_grad()
    with _embedding_gradient_kept(model) as seen:
        output = model(**_on(model, case.inputs))
        output.loss.backward()
    gradients = {
        _on_disk(name): p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    gradients |= {name: output.grad for name, output in seen.items() if output.grad is not None}
    gradients = _clone(gradients)
    model.zero_grad()
    return output.logits, gradients


def _trained(model: nn.Module) -> list[str]:
    return sorted(_on_disk(name) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _on_disk(name: str) -> str:
    """A parameter's name without the parts that either side adds in memory."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"\.(default|trained_module|modules_to_save)(?=\.|$)", "", name)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def observe_dropout(side: Side, case: Case, model: nn.Module) -> Observation:
    """The logits and gradients in training mode under one seed, so that the dropout masks must be the same."""
    if case.config.lora_dropout == 0:
        return Observation(not_run="the config has no dropout")
    seed_everything(case.seed + 1)
    logits, gradients = _forward_and_backward(model.train(), case)
    return Observation(_clone({"logits": logits}) | gradients)


def observe_files(side: Side, case: Case, model: nn.Module, directory: Path) -> Observation:
    """The saved adapter, and the logits after loading it.

    Names, shapes, dtypes, values and the fields of the config are facts, which must be equal.
    """
    side.save(model, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    fields = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    facts: dict[str, object] = {  # an empty list or text means the same as null
        name: sorted(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name not in BOOKKEEPING and name not in ("target_modules", "modules_to_save") and value not in ("", [], {})
    }
    facts = {name: value for name, value in facts.items() if value is not None}
    facts |= {name: _fingerprint(tensor) for name, tensor in tensors.items()}
    loaded = side.load(case.make_base(), directory, trainable=False)
    logits = {"logits after loading": _logits(loaded.eval(), case)}
    del loaded
    loaded = side.load(case.make_base(), directory)
    facts["trained after loading"] = _trained(loaded)
    seed_everything(case.seed + 1)
    logits["logits after loading, training mode"] = _logits(loaded.train(), case)
    return Observation(_clone(logits), facts)


def _fingerprint(tensor: torch.Tensor) -> str:
    """A tensor's dtype, shape, and a digest of all bytes."""
    digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {digest[:16]}"


def _dequantized(base: PreTrainedModel) -> PreTrainedModel:
    """The base with dense weights. Transformers' `dequantize` supports bitsandbytes only.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/quantizers/quantizer_torchao.py
    """
    quantized = [module for module in base.modules() if is_quantized(module)]
    if any(type(module) is not nn.Linear for module in quantized):
        return base.dequantize()
    for module in quantized:
        weight = cast(torch.Tensor, module.weight)
        module.weight = nn.Parameter(dense_weight(module, weight.dtype), requires_grad=False)
    return base


def observe_merge(side: Side, case: Case, model: nn.Module, directory: Path) -> Observation:
    """The merged weights and the logits of the merged model. A quantised base is dequantised before merging."""
    if _is_quantized(model):
        model = side.load(_dequantized(case.make_base()), directory)
    merged = side.merge(model).eval()
    logits = _logits(merged, case)
    facts: dict[str, object] = {
        "class": type(merged).__name__,
        "saves as its base does": "save_pretrained" not in vars(merged) and not hasattr(merged, "plainlora"),
    }
    return Observation(_clone({"logits": logits} | dict(merged.state_dict())), facts)


def observe_generation(side: Side, case: Case, model: nn.Module) -> Observation:
    """The tokens of greedy generation."""
    if case.prompts is None or not getattr(model, "can_generate", lambda: True)():
        return Observation(not_run="the model does not generate")
    ids = case.prompts.to(next(model.parameters()).device)
    tokens = model.eval().generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
    )
    return Observation(_clone({"tokens": tokens}))


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def _checksums(model: nn.Module) -> dict[str, float]:
    """A checksum of each frozen weight."""
    frozen = {_on_disk(name): p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: float(sum(values.double().abs().sum() for values in inner_tensors(p))) for name, p in frozen.items()}


def observe_trajectory(side: Side, case: Case) -> Observation:
    """The real trainer's logs of every optimizer step, the adapter that it saves, and the final logits."""
    if case.arguments is None:
        return Observation(not_run="no rows to train on: give --config")
    with tempfile.TemporaryDirectory() as scratch:
        model = _attach(side, case)
        frozen = _checksums(model)
        trainer = side.trainer(model, case, scratch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(scratch)
        final = _clone(side.weights(model))
        saved = load_file(Path(scratch) / "adapter_model.safetensors")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves = {
            name: torch.tensor([entry[name] for entry in log]).double() for name in LOGGED if name in (log or [{}])[0]
        }
        if isinstance(
            trainer, SFTTrainer
        ):  # its own logs are divided by the number of tokens; this is the head itself
            with torch.no_grad():
                outcome = model.eval()(**_on(model, case.inputs), fused_lm_head=True)
            curves["head's own loss"] = outcome.loss[None].double()  # TRL's is fp32 whatever the base
        curves["logits after training"] = _logits(
            model.eval(), case
        )  # they depend on the last step, unlike the losses
        facts: dict[str, object] = {
            "frozen weights changed": [name for name, value in _checksums(model).items() if value != frozen[name]],
            "device": str(trainer.args.device.type),
            SAVED: _same(saved, final),
        }
        return Observation(_clone(curves | {f"final {key}": value for key, value in final.items()}), facts)


@torch.no_grad()
def move_last_bits(model: nn.Module, seed: int) -> None:
    """Changes every floating-point weight to one of its two adjacent numbers, at random."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        if weight.is_floating_point() and is_plain(weight):
            up = torch.randint(2, weight.shape, generator=generator).to(weight.device)
            weight.copy_(torch.nextafter(weight, torch.where(up == 1, torch.inf, -torch.inf).to(weight.dtype)))


def observe_last_bits(side: Side, case: Case) -> dict[str, Observation]:
    """The levels without an optimizer, with the last bit of every weight changed."""
    model = _attach(side, case)
    if not case.adapter:
        fill(side, model, case.seed)
    move_last_bits(model, case.seed)
    return {
        "forward": _attempt(lambda: observe_forward(side, case, model)),
        "gradients": _attempt(lambda: observe_gradients(side, case, model)),
        "dropout": _attempt(lambda: observe_dropout(side, case, model)),
    }


def _on(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _attempt(level: Callable[[], Observation]) -> Observation:
    """Runs a level; an exception becomes the reason why it did not run, which the comparison judges."""
    try:
        return level()
    except Exception as error:  # whatever a library raises
        return Observation(not_run=_reason(error))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else text[:197] + "..."


def observe(side: Side, case: Case, directory: Path, progress: Callable[[str], None]) -> dict[str, Observation]:
    """Observes every level of one side.

    Args:
        side: The implementation.
        case: The comparison.
        directory: The folder for its adapter files, which the round trips need.
        progress: Called with the side and the level as each begins.

    Returns:
        An observation for each of `LEVELS`; one that could not run has the reason.

    Raises:
        LoRAError: The adapter is refused.
    """

    def begin(level: str, number: int) -> None:
        progress(f"{side.name}, level {number} of {len(LEVELS)}: {level}")

    begin("init", 1)
    try:
        model = _attach(side, case)
    except LoRAError:
        raise
    except Exception as error:  # whatever a library raises
        return {level: Observation(not_run=_reason(error)) for level in LEVELS}
    found = {"init": _attempt(lambda: observe_init(side, case, model))}
    if not case.adapter:
        fill(side, model, case.seed)
    steps: dict[str, Callable[[], Observation]] = {
        "forward": lambda: observe_forward(side, case, model),
        "gradients": lambda: observe_gradients(side, case, model),
        "dropout": lambda: observe_dropout(side, case, model),
        "files": lambda: observe_files(side, case, model, directory),
        "generation": lambda: observe_generation(side, case, model),
        "merge": lambda: observe_merge(side, case, model, directory),  # uses the model up
        "trajectory": lambda: observe_trajectory(side, case),
    }
    for number, (level, step) in enumerate(steps.items(), start=2):
        begin(level, number)
        found[level] = _attempt(step)
    if SAVED in found["trajectory"].facts:  # this belongs to the level `files`
        found["files"].facts[SAVED] = found["trajectory"].facts.pop(SAVED)
    return {level: found[level] for level in LEVELS}
