"""Weights are loaded as they are stored, and a setting is given once."""

import logging
import platform
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import warning_once
from trl import ModelConfig

from plainlora.base.loading import dequantized, load_base, load_causal_lm, load_pretrained, placement
from plainlora.errors import UserError
from plainlora.resources.memory import resident_memory
from tests.gpu_host import gpu_host


def test_a_base_in_four_bits_is_loaded_as_one_or_not_at_all(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["llama"]), dtype="float32", load_in_4bit=True)
    load_base(args).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is stored in 4 or 8 bits: load it in them"):
        load_causal_lm(str(tmp_path))
    args.model_name_or_path = str(tmp_path)
    assert load_base(args).is_loaded_in_4bit


def test_a_dequantised_base_keeps_its_dtype_and_nothing_is_said_of_it(
    model_dirs: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    warning_once.cache_clear()
    options = {"dtype": torch.bfloat16, "quantization": BitsAndBytesConfig(load_in_4bit=True)}
    model = dequantized(load_causal_lm(str(model_dirs["llama"]), **options))
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert "dequantized" not in caplog.text


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not run: another C library than glibc")
def test_quantising_leaves_no_freed_memory_behind(model_dirs: dict[str, Path]) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    load_pretrained(AutoModelForCausalLM, str(model_dirs["llama"]), quantization=quantization)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once: from then on, smaller blocks come from the heap
    blocks = [torch.ones(4 * 2**20, dtype=torch.uint8) for _ in range(64)]
    whole = resident_memory()
    del blocks[::2]  # holes, each between two blocks that stay
    with_holes = resident_memory()
    load_pretrained(AutoModelForCausalLM, str(model_dirs["llama"]), quantization=quantization)
    assert whole - with_holes < 2**20
    assert with_holes - resident_memory() > 100 * 2**20


@pytest.mark.parametrize(
    ("device", "quantized", "expected"),
    [
        ("cuda:1", False, "cuda:1"),
        ("cuda:1", True, "cuda:1"),
        ("cpu", True, "cpu"),  # bitsandbytes' quantiser would take the GPU under use_cpu
        ("cpu", False, None),
    ],
)
def test_a_base_is_put_where_training_runs(
    device: str, quantized: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = {} if expected is None else {"device_map": {"": expected}}
    assert placement(torch.device(device), quantized) == placed
    assert placement(None, quantized) == {}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert placement(torch.device(device), quantized) == {}


def test_a_base_in_four_bits_stays_on_the_cpu_of_a_host_with_a_gpu(model_dirs: dict[str, Path]) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["llama"]), dtype="float32", load_in_4bit=True)
    with gpu_host():
        model = load_base(args, device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
