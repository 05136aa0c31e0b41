"""Activations are kept where they fit and computed again where they do not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, PreTrainedModel
from trl import ModelConfig, SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.resources import peak
from plainlora.resources.activations import Batch, Step, count_peak_bytes
from plainlora.resources.checkpointing import needs_checkpointing
from plainlora.resources.footprint import estimate
from plainlora.resources.model_states import optimizer_bytes
from plainlora.resources.peak import MARGIN
from plainlora.resources.plan import Plan
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY, load_quantized
from tests.resources.plans import ask, make_plan
from tests.resources.plans import settings as left_open
from tests.resources.test_weights import QUANTIZATIONS, real_bytes

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def settings(folder: Path) -> SFTConfig:
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 3, "max_length": 64}
    return SFTConfig(output_dir=str(folder), **plain)


def decide(folder: Path, free: int | None, config: PretrainedConfig, **model_args: Any) -> tuple[bool, str]:
    said: list[str] = []
    args = ModelConfig(model_name_or_path="m", dtype="float32", **model_args)
    plan = Plan(config, LORA, settings(folder), args, longest=64, rows=40, tokens=40 * 64, backend=BACKENDS["fused"])
    fits = needs_checkpointing(plan, free, said.append)
    (line,) = said
    return fits, line


def held_by_step() -> int:
    """Bytes of the tiny Llama's step, with the margin."""
    alive = count_peak_bytes(
        Step(
            CONFIGS["llama"](),
            lambda skeleton: attach_adapter(skeleton, copy.deepcopy(LORA), BACKENDS["fused"]),
            Batch(3, 64, masked=True),
            torch.device("cpu"),
        )
    )
    return alive + int(MARGIN * alive)


def held_beside(folder: Path, model: PreTrainedModel) -> int:
    """Bytes of a real model with its adapter, and of its optimizer's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return real_bytes(model) + optimizer_bytes(settings(folder), trained)


def test_what_fits_is_kept_and_what_does_not_is_computed_again(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    model = AutoModelForCausalLM.from_config(config)
    attach_adapter(model, copy.deepcopy(LORA), BACKENDS["fused"])
    held = held_by_step()
    enough = held + held_beside(tmp_path, model)
    assert decide(tmp_path, enough, config) == (
        False,
        f"activations: {held / 1e9:.1f} GB for 3 x 64 tokens, 0.0 GB free: no gradient checkpointing",
    )
    assert decide(tmp_path, enough - 1, config)[0]
    needed, said = decide(tmp_path, 0, config)
    assert needed
    assert said.endswith("0.0 GB free: gradient checkpointing")


def test_a_base_in_nf4_is_counted_with_its_scales_and_one_weight_made_dense(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    base = load_quantized(model_dirs["llama"], **QUANTIZATIONS["NF4"])
    largest = max(
        parameter.quant_state.shape.numel() for parameter in base.parameters() if hasattr(parameter, "quant_state")
    )
    attach_adapter(base, copy.deepcopy(LORA), BACKENDS["fused"])
    enough = held_by_step() + held_beside(tmp_path, base) + 4 * largest
    before = torch.get_rng_state()
    assert not decide(tmp_path, enough, CONFIGS["llama"](), load_in_4bit=True)[0]
    assert decide(tmp_path, enough - 1, CONFIGS["llama"](), load_in_4bit=True)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_run_and_the_doctor_decide_at_the_same_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ask(CONFIGS["llama"](), left_open(tmp_path, gradient_checkpointing=False)).memory.needed
    assert needed is not None
    plan = make_plan(CONFIGS["llama"](), left_open(tmp_path))
    for free, again in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(peak, "free_memory", lambda device, free=free: free)
        assert estimate(plan).memory.checkpointing is again
        assert needs_checkpointing(plan, free, lambda line: None) is again


def test_what_is_unknown_or_cannot_be_counted_means_checkpointing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decide(tmp_path, None, CONFIGS["llama"]()) == (
        True,
        "free memory of cpu is unknown: gradient checkpointing",
    )
    opt = OPTConfig(  # it takes no mask of four dimensions
        hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64,
        vocab_size=VOCABULARY, **SPECIAL,
    )  # fmt: skip
    needed, said = decide(tmp_path, 2**50, opt)
    assert needed
    assert said.startswith("memory cannot be counted (")
    assert said.endswith("): gradient checkpointing")
    assert "\n" not in said
    assert not caplog.records  # Torch would print a traceback
