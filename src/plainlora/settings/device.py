"""The number formats that a recipe gets on the device that runs it, where nobody typed them."""

import os
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_torch_tf32_available

HALF = ("float16", "bfloat16")


def trains_on_cpu(use_cpu: bool) -> bool:
    """Whether there is no accelerator, or `use_cpu` or the Accelerate config turns it down."""
    chosen = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return chosen or not torch.accelerator.is_available()


@dataclass(frozen=True)
class Device:
    """What trains.

    Attributes:
        kind: `cpu`, `cuda`, or another accelerator's name.
        bf16: Whether it computes in bfloat16 itself. Cards before Ampere, a T4 for one, emulate it in float32.
        tf32: Whether it has TF32 products, 8 times as fast as those in float32 on an A100.
    """

    kind: str
    bf16: bool = True
    tf32: bool = False


def this_device(use_cpu: bool = False) -> Device:
    """The device that a run with this setting trains on."""
    if trains_on_cpu(use_cpu):
        return Device("cpu")
    if not torch.cuda.is_available():
        return Device(str(torch.accelerator.current_accelerator()))
    return Device("cuda", torch.cuda.is_bf16_supported(including_emulation=False), is_torch_tf32_available())


def fit_formats(
    told: Namespace, given: Collection[str], typed: Collection[str], device: Device
) -> dict[str, tuple[Any, str]]:
    """The settings that are changed for a device, with their values and why. What was typed stays.

    Args:
        told: Every setting, from the YAML, the command line and the defaults.
        given: Names of those that are no defaults.
        typed: Names of those on the command line.
        device: What trains.
    """
    if device.kind == "cpu":
        return _on_cpu(told, typed)
    return _on_cuda(told, given, typed, device) if device.kind == "cuda" else {}


def _on_cpu(told: Namespace, typed: Collection[str]) -> dict[str, tuple[Any, str]]:
    """Float32: Accelerate refuses fp16 on a CPU, and bf16 (TRL's default) is slower than fp32 on most.

    Without `use_cpu`, processes launched on a CPU would not find each other.
    """
    changes: dict[str, Any] = {"use_cpu": True} | {name: False for name in ("bf16", "fp16") if name not in typed}
    if told.dtype in HALF and "dtype" not in typed:
        changes["dtype"] = "float32"
    return {name: (value, "no GPU here") for name, value in changes.items()}


def _on_cuda(
    told: Namespace, given: Collection[str], typed: Collection[str], device: Device
) -> dict[str, tuple[Any, str]]:
    """Mixed precision that the card has, and a base that is not cast anew at every product.

    Autocast keeps the casts of trained weights alone, so a frozen base in float32 would be cast in every forward pass
    and again in every backward pass. As it is stored, most are in half precision, and none loses a bit.
    """
    changes: dict[str, tuple[Any, str]] = {}
    bf16 = told.bf16 or (told.bf16 is None and not told.fp16)  # SFTConfig's default
    if bf16 and not device.bf16 and not {"bf16", "fp16"} & {*typed}:
        why = "this GPU has no bfloat16"
        changes = {"bf16": (False, why), "fp16": (True, why)}
        if told.dtype == "bfloat16" and "dtype" not in typed:
            changes["dtype"] = ("float16", why)
        bf16 = False
    fp16 = told.fp16 or "fp16" in changes
    if (bf16 or fp16) and "dtype" not in given:
        # What TRL loads in 4 bits computes in `dtype`, so that is the format of mixed precision there.
        compute = "bfloat16" if bf16 else "float16"
        changes["dtype"] = (compute, "mixed precision") if told.load_in_4bit else ("auto", "as it is stored")
    if not bf16 and not fp16 and told.tf32 is None and device.tf32 and not {"bf16", "fp16"} & {*typed}:
        changes["tf32"] = (True, "this GPU has TF32")
    return changes
