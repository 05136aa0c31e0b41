"""Hosts with GPUs, or with another CPU, as far as a program asks torch about them: nothing is computed there."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers.utils import import_utils


@contextmanager
def gpu_host(count: int = 1, capability: tuple[int, int] = (8, 0), free: int = 80 * 10**9) -> Iterator[None]:
    """Within, torch answers as on a host with GPUs.

    Args:
        count: How many.
        capability: Theirs; (7, 5) is a T4's, (8, 0) an A100's.
        free: Bytes free on each.
    """
    properties = SimpleNamespace(major=capability[0], minor=capability[1], name="a GPU")
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability[0] >= 8,
        "mem_get_info": lambda device=None: (free, free),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        patch.setattr(torch.version, "cuda", "12.8")
        _forget_answers()
        try:
            yield
        finally:
            _forget_answers()
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def cpu_host(bf16: bool) -> Iterator[None]:
    """Within, torch answers as on a host whose CPU has units for bfloat16, or has none."""
    with pytest.MonkeyPatch.context() as patch:
        found = dict(torch.cpu.get_capabilities()) | {"amx_bf16": bf16, "avx512_bf16": bf16}
        patch.setattr(torch.cpu, "get_capabilities", lambda: found)
        yield


def _forget_answers() -> None:
    """Transformers asks once and remembers."""
    for name in ("is_torch_tf32_available", "is_torch_bf16_gpu_available", "is_torch_cuda_available"):
        if hasattr(question := getattr(import_utils, name), "cache_clear"):
            question.cache_clear()
