"""The number formats that a recipe gets on its device, unless they are given on the command line."""

import os
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_torch_tf32_available

HALF = ("float16", "bfloat16")


def trains_on_cpu(use_cpu: bool) -> bool:
    """Whether there is no accelerator, or `use_cpu` or the Accelerate config chooses the CPU."""
    chosen = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return chosen or not torch.accelerator.is_available()


def computes_in_bf16() -> bool:
    """Whether this CPU has units for products of bfloat16 numbers.

    Others convert to float32 and back, in more time than float32 takes. PyTorch before 2.13 does not say.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@dataclass(frozen=True)
class Device:
    """The device that trains.

    Attributes:
        kind: `cpu`, `cuda`, or another accelerator's name.
        bf16: Whether its hardware computes in bfloat16. Cards before Ampere, such as a T4, emulate it in float32.
        tf32: Whether it has TF32 products, 8 times as fast as those in float32 on an A100.
    """

    kind: str
    bf16: bool = True
    tf32: bool = False


def this_device(use_cpu: bool = False) -> Device:
    """The device that a run with this setting trains on."""
    if trains_on_cpu(use_cpu):
        return Device("cpu", computes_in_bf16())
    if not torch.cuda.is_available():
        return Device(str(torch.accelerator.current_accelerator()))
    return Device("cuda", torch.cuda.is_bf16_supported(including_emulation=False), is_torch_tf32_available())


def fit_formats(
    parsed: Namespace, given: Collection[str], typed: Collection[str], device: Device
) -> dict[str, tuple[Any, str]]:
    """The settings to change for a device: name -> new value and reason. Those on the command line are kept.

    Args:
        parsed: Every setting, from the YAML, the command line and the defaults.
        given: Names of the settings that the YAML or the command line gives.
        typed: Names of the settings on the command line.
        device: The device that trains.
    """
    if device.kind not in ("cpu", "cuda"):
        return {}
    if parsed.precision == "fp32":
        changes = _in_float32(parsed, typed, "precision fp32")
    elif parsed.precision == "bf16":
        changes = _in_bfloat16(parsed, given, typed, "precision bf16")
    elif device.kind == "cuda":
        changes = _on_cuda(parsed, given, typed, device)
    elif not device.bf16 or parsed.bf16 is False or (parsed.fp16 and "fp16" in typed):
        changes = _in_float32(parsed, typed, "no GPU here")  # Accelerate refuses fp16 on a CPU
    else:
        changes = _in_bfloat16(parsed, given, typed, "this CPU computes in bfloat16")
    # Without `use_cpu` several processes on a CPU do not find each other.
    return changes | ({"use_cpu": (True, "no GPU here")} if device.kind == "cpu" else {})


def _in_float32(parsed: Namespace, typed: Collection[str], why: str) -> dict[str, tuple[Any, str]]:
    """Every number in float32."""
    changes: dict[str, Any] = {name: False for name in ("bf16", "fp16") if name not in typed}
    if parsed.dtype in (*HALF, "auto") and "dtype" not in typed:
        changes["dtype"] = "float32"
    return {name: (value, why) for name, value in changes.items()}


def _in_bfloat16(
    parsed: Namespace, given: Collection[str], typed: Collection[str], why: str
) -> dict[str, tuple[Any, str]]:
    """Mixed precision: the base as it is stored, its products in bfloat16, everything else in float32."""
    changes: dict[str, tuple[Any, str]] = {}
    changes |= {name: (value, why) for name, value in (("bf16", True), ("fp16", False)) if name not in typed}
    if "dtype" not in given or (parsed.dtype == "float16" and "dtype" not in typed):
        changes["dtype"] = _dtype_of_base(parsed, "bfloat16")
    return changes


def _dtype_of_base(parsed: Namespace, compute: str) -> tuple[str, str]:
    """A dtype that autocast need not cast at every product.

    Autocast caches the casts of trained weights only, so a frozen base in float32 would be cast in every forward pass
    and again in every backward pass. Kept as it is stored, which is mostly half precision, the base loses nothing.
    TRL's 4-bit layers compute in `dtype`, so it must be the format of mixed precision. Weights that are trained are in
    float32, in which a small step is not rounded away.
    """
    if parsed.method != "lora" or getattr(parsed, "train_head", False):
        return "float32", "its own weights are trained"
    return (compute, "mixed precision") if parsed.load_in_4bit else ("auto", "as it is stored")


def _on_cuda(
    parsed: Namespace, given: Collection[str], typed: Collection[str], device: Device
) -> dict[str, tuple[Any, str]]:
    """A mixed precision that the card supports."""
    changes: dict[str, tuple[Any, str]] = {}
    bf16 = parsed.bf16 or (parsed.bf16 is None and not parsed.fp16)
    if bf16 and not device.bf16 and not {"bf16", "fp16"} & {*typed}:
        why = "this GPU has no bfloat16"
        changes = {"bf16": (False, why), "fp16": (True, why)}
        if parsed.dtype == "bfloat16" and "dtype" not in typed:
            changes["dtype"] = ("float16", why)
        bf16 = False
    if bf16 and parsed.bf16 is None:
        changes["bf16"] = (True, "this GPU has bfloat16")
    fp16 = parsed.fp16 or "fp16" in changes
    if (bf16 or fp16) and "dtype" not in given:
        changes["dtype"] = _dtype_of_base(parsed, "bfloat16" if bf16 else "float16")
    if not bf16 and not fp16 and parsed.tf32 is None and device.tf32 and not {"bf16", "fp16"} & {*typed}:
        changes["tf32"] = (True, "this GPU has TF32")
    return changes
