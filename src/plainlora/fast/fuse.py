"""`fuse(model or trainer)` replaces, in place, every forward pass that has a fused form; `unfuse` undoes it."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from plainlora.fast import attention
from plainlora.fast.activations import swiglu
from plainlora.fast.lora import fused_forward
from plainlora.lora import storage
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.layer import LoRALinear

GATED = (LlamaMLP, MistralMLP, Qwen2MLP)  # down(act(gate(x)) * up(x))

logger = logging.getLogger(__name__)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoraLayer)))


def _forward_plainlora(layer: LoRALinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not layer.enabled or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    p = _probability(layer.lora_dropout)
    return fused_forward(layer.base_layer, x, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, p)


def _forward_peft(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's `lora.Linear.forward` for its active adapters; anything beyond that is left to PEFT's own forward.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    p = max([0.0, *[_probability(layer.lora_dropout[name]) for name in names]])  # a list, for torch.compile
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or not names)
    own = any(name in layer.lora_variant or getattr(layer, "lora_bias", {}).get(name) for name in names)
    if not plain or own or (p > 0 and len(names) > 1):
        return type(layer).forward(layer, x, *args, **kwargs)
    lora_a, lora_b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    scaling = layer.scaling[names[0]]
    if len(names) > 1:  # one LoRA whose rank is the sum of the ranks
        lora_a = torch.cat([layer.lora_A[name].weight for name in names])
        lora_b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
        scaling = 1.0
    return fused_forward(layer.base_layer, x, lora_a, lora_b, scaling, p)


def _gelu(_: NewGELUActivation, x: torch.Tensor) -> torch.Tensor:
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` in one kernel, not eight, that keeps only x.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/activations.py
    """
    return functional.gelu(x, approximate="tanh")


def _gated(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`, keeping fewer tensors for the backward pass.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/modeling_llama.py
    """
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _activations(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., torch.Tensor]]]:
    """The activations and MLPs that have a fused forward pass, each with that forward pass."""
    for module in model.modules():
        if isinstance(module, NewGELUActivation):
            yield module, _gelu
        elif type(module) in GATED and isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
            yield module, _gated


def _base_of(model: nn.Module) -> PreTrainedModel | None:
    """The model of Transformers inside a PeftModel, or the model itself; `None` for any other module."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner if isinstance(inner, PreTrainedModel) else None


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _is_covered(layer: LoRALinear | LoraLayer) -> bool:
    base = layer.base_layer
    if not isinstance(base, nn.Module) or not storage.is_fusable(base) or base.weight.requires_grad:
        return False
    if isinstance(layer, LoRALinear):
        return type(layer) is LoRALinear  # a variant has its own delta
    return not any(getattr(layer, "lora_bias", {}).values())


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` covered.

    Attributes:
        fused: How many modules of each kind are fused.
        unchanged: Names of the LoRA layers that keep their own forward pass.
    """

    fused: dict[str, int]
    unchanged: list[str]

    def __str__(self) -> str:
        """One line."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.fused.items()) or "nothing"
        return f"fused: {counts}" + (f"; unchanged: {some(self.unchanged)}" if self.unchanged else "")


def fuse(target: nn.Module | Trainer) -> FuseReport:
    """Fuses a model, or the model of a trainer, in place; `unfuse` undoes it.

    LoRA layers become one autograd Function, GPT-2's GELU and SwiGLU keep fewer tensors for the backward pass, and
    attention with dropout keeps a byte for each score on a CPU. The loss of an SFTTrainer is computed in one pass if
    that gives the model's own loss; its attention goes over one document at a time, and its batches are not padded, if
    that keeps the documents apart. Unsupported layers are left unchanged: 8-bit layers, embeddings, convolutions, DoRA
    and other variants.

    In an existing TRL + PEFT script, add one line after the trainer is made. Nothing is copied, and state dictionaries
    do not change.

    Args:
        target: A model from `plainlora.inject`, `plainlora.load_adapter`, `peft.get_peft_model` or
            `PeftModel.from_pretrained`, or any Trainer of Transformers or TRL that trains one.

    Returns:
        How much is fused, and which LoRA layers are left unchanged.

    Raises:
        LoRAError: The trainer would train on several GPUs in one process.
    """
    if not isinstance(target, nn.Module):
        return _fuse_trainer(target)
    fused: Counter[str] = Counter()
    unchanged = []
    for name, layer in _layers(target):
        if _is_covered(layer):
            form: Callable[..., torch.Tensor] = _forward_plainlora if isinstance(layer, LoRALinear) else _forward_peft
            layer.forward = partial(form, layer)  # type: ignore[method-assign, union-attr]
            fused["LoRA layers"] += 1
        else:
            unchanged.append(name)
    for module, forward in _activations(target):
        module.forward = partial(forward, module)
        fused["GELU" if forward is _gelu else "SwiGLU"] += 1
    base = _base_of(target)
    if base is not None and attention.is_covered(base) and attention.has_attention_dropout(base):
        base.set_attn_implementation(attention.NAME)
        fused["attention with dropout"] = 1
    if unchanged and not any(parameter.is_meta for parameter in target.parameters()):  # which is only looked at
        logger.warning("%d layers are not fused: %s", len(unchanged), some(unchanged))
    return FuseReport(dict(fused), unchanged)


def _fuse_trainer(trainer: Trainer) -> FuseReport:
    if trainer.args.n_gpu > 1:
        raise LoRAError(
            f"Trainer would copy the model to {trainer.args.n_gpu} GPUs (nn.DataParallel), and the copies' forward "
            "passes would use the first one's weights; start the script with accelerate launch"
        )
    report = fuse(cast(nn.Module, trainer.model))
    trl = sys.modules.get("trl")  # imported already if this is a trainer of TRL
    if trl is None or not isinstance(trainer, trl.SFTTrainer):
        return report
    try:
        from plainlora.fast.documents import choose_documents  # noqa: PLC0415
        from plainlora.fast.loss_head import use_one_pass_head  # noqa: PLC0415
    except ImportError:  # a TRL from before it had a fused head
        return report
    given = vars(trainer)  # each is given once only, so that `unfuse` restores the trainer's own
    if "loss_choice" not in given:
        use_one_pass_head(trainer)
    if "documents" not in given:
        given["documents"] = choose_documents(trainer)
    fused = report.fused | {"loss head": 1}
    if (documents := given["documents"]) is not None:
        fused |= {"attention over documents": 1} | ({"padding-free collator": 1} if documents.collator else {})
    return FuseReport(fused, report.unchanged)


def unfuse(target: nn.Module | Trainer) -> None:
    """Restores every module's own forward pass, and a trainer's own loss: the inverse of `fuse`.

    Args:
        target: As for `fuse`.
    """
    if not isinstance(target, nn.Module):
        if (choice := vars(target).pop("loss_choice", None)) is not None:
            choice.undo()
            if (documents := vars(target).pop("documents", None)) is not None:
                documents.undo()
        target = cast(nn.Module, target.model)
    for module in [layer for _, layer in _layers(target)] + [module for module, _ in _activations(target)]:
        module.__dict__.pop("forward", None)
    base = _base_of(target)
    if base is not None and base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation("sdpa")
