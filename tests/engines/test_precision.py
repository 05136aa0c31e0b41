"""The number formats that are told are those of the files, under DeepSpeed too, which casts the model itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.matrix import Launch, carry_out


@pytest.mark.integration
def test_zero_2_in_bf16_has_a_bf16_adapter_and_a_float32_copy_of_it(tmp_path: Path) -> None:
    flags = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--precision", "bf16")
    launch = Launch("run", "deepspeed_zero2", 2, 400, (*flags, "--exact_match_rows", "1", "--max_new_tokens", "1"))
    assert carry_out(launch, tmp_path) == ""
    (line,) = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("number formats")]
    assert line == (
        "number formats: base bfloat16, compute bfloat16, by DeepSpeed, adapter bfloat16, with a float32 copy in the "
        "optimizer, optimizer state float32 (adamw_torch_fused)"
    )
    checkpoint = tmp_path / "run" / "checkpoint-2"
    adapter = load_file(checkpoint / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in adapter} == {torch.bfloat16}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert {each[name].dtype for each in state for name in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
