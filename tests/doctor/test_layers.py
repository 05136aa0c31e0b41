"""What the doctor says of the layers that LoRA would sit on."""

from peft import LoraConfig
from torch import nn
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from plainlora.base.loading import build_decoder
from plainlora.doctor.finding import Examination
from plainlora.doctor.layers import examine_layers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


def examine(config: PretrainedConfig, targets: str | list[str]) -> Examination:
    examination = Examination()
    examine_layers(
        build_decoder(config), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"), "fused", examination
    )
    return examination


def test_experts_that_all_linear_leaves_frozen_are_told() -> None:
    config = GptOssConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    (warning,) = examine(config, "all-linear").at("warning")
    assert "all-linear leaves model.layers.0.mlp.experts.gate_up_proj, " in warning.message
    assert "1 more frozen, as PEFT does" in warning.message
    assert not examine(config, ["q_proj"]).at("warning")


def test_a_convolution_is_no_expert() -> None:
    skeleton = build_decoder(LlamaConfig(**SIZES))
    assert skeleton is not None
    skeleton.tower = nn.Conv1d(4, 4, 3, device="meta")
    examination = Examination()
    examine_layers(skeleton, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), "fused", examination)
    assert [finding.level for finding in examination.findings] == ["ok"]


def test_experts_that_peft_adapts_are_an_error_that_says_what_to_do() -> None:
    (error,) = examine(MixtralConfig(**SIZES), "all-linear").at("error")
    assert "PEFT adapts parameters that are no linear layer's (model.layers.0.mlp.gate.weight, " in error.message
    assert "set target_modules to [k_proj, o_proj, q_proj, v_proj]" in error.message
