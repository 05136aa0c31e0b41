"""Into a model and out again: every supported field against PEFT, every other field an error."""

import copy
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from plainlora import disabled, inject, load_adapter, merge, unwrap
from plainlora.lora.config import BOOKKEEPING_FIELDS
from plainlora.lora.errors import LoRAError
from plainlora.lora.layer import LoRALinear
from plainlora.lora.module_to_save import ModuleToSave
from plainlora.lora.record import adapter_state, lora_layers, saved_modules
from tests.lora.oracle import (
    Q_LIN,
    assert_equal_tensors,
    assert_same_as_peft,
    by_peft,
    by_us,
    config,
    logits,
    make,
    move,
    requires_grad,
    snapshot,
    trainable,
)
from tests.lora.test_targets import SELECTIONS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
ALL = {"target_modules": "all-linear"}
FIELDS = {
    "nothing": ("llama", {}),
    "r": ("llama", {"r": 3}),
    "lora_alpha": ("llama", {"lora_alpha": 32}),
    "rslora": ("gpt2", {"use_rslora": True, "r": 9}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "rank_pattern": ("llama", ALL | {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6, ".*down_proj": 3}}),
    "first key wins": ("llama", ALL | {"rank_pattern": {"[qk]_proj": 2, "q_proj": 5}}),
    "alpha_pattern": ("gpt2", ALL | {"alpha_pattern": {"c_attn": 2, "mlp.c_proj": 64}}),
    "rslora patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "bias none": ("qwen2", {"bias": "none"}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias all Conv1D": ("gpt2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "bias lora_only Conv1D": ("gpt2", {"bias": "lora_only"}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied modules_to_save": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "embedding to save": ("llama", {"modules_to_save": ["embed_tokens", "norm"]}),
    "bias and head": ("distilbert", {"bias": "all", "task_type": "SEQ_CLS", "target_modules": Q_LIN}),
    "init False": ("llama", {"init_lora_weights": False}),
    "init gaussian": ("gpt2", {"init_lora_weights": "gaussian"}),
    "fan_in_fan_out": ("gpt2", {"fan_in_fan_out": True}),
    "fan_in_fan_out found": ("gpt2", {"fan_in_fan_out": False}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA Conv1D": ("gpt2", {"use_dora": True}),
    "CAUSAL_LM": ("llama", {"task_type": "CAUSAL_LM"}),
    "SEQ_CLS": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN}),
    "SEQ_CLS Conv1D": ("gpt2-score", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "SEQ_CLS and more": ("gpt2-score", {"task_type": "SEQ_CLS", "modules_to_save": ["wpe"]}),
    "TOKEN_CLS": ("distilbert", {"task_type": "TOKEN_CLS", "target_modules": Q_LIN}),
    "QUESTION_ANS": ("distilbert-qa", {"task_type": "QUESTION_ANS", "target_modules": Q_LIN}),
}
REFUSED: dict[str, dict[str, object]] = {
    "megatron_config": {"megatron_config": {"hidden_size": 64}},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "loftq_config": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "eva_config": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "corda_config": {"init_lora_weights": "corda", "corda_config": peft.tuners.lora.config.CordaConfig()},
    "lora_ga_config": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "velora_config": {"velora_config": VeloraConfig()},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"qalora_group_size": 8},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "layer_replication": {"layer_replication": [(0, 2)]},
    "runtime_config": {"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["mlp.weight"]},
    "use_bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    "arrow_config": {"arrow_config": ArrowConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    "ensure_weight_tying": {"ensure_weight_tying": True},
}
OTHER_STARTS = ["eva", "olora", "pissa", "pissa_niter_4", "corda", "orthogonal", "mica", "lora_ga", "no_such"]


@pytest.mark.parametrize("case", FIELDS)
def test_a_supported_field_does_what_it_does_in_peft(case: str) -> None:
    kind, options = FIELDS[case]
    assert_same_as_peft(kind, **options)


def test_fan_in_fan_out_is_found_as_in_peft() -> None:
    ours, theirs = assert_same_as_peft("gpt2")
    assert adapter_state(ours).config.fan_in_fan_out is theirs.peft_config["default"].fan_in_fan_out is True


def test_modules_trained_whole_keep_the_base_s_dtype_as_in_peft() -> None:
    options = {"modules_to_save": ["lm_head"]}
    ours, theirs = by_us(make("llama", torch.bfloat16), **options), by_peft(make("llama", torch.bfloat16), **options)
    assert_equal_tensors(trainable(ours), trainable(theirs))
    assert trainable(ours)["lm_head.trained_module.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("field", REFUSED)
def test_u15_another_field_away_from_its_default_is_an_error(field: str) -> None:
    made = config()
    for name, value in REFUSED[field].items():  # not by the constructor, which may want optional packages
        setattr(made, name, value)
    with pytest.raises(LoRAError, match=rf"does not implement .*({field}|init_lora_weights)") as caught:
        inject(make("llama"), made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", OTHER_STARTS)
def test_u15_another_start_is_an_error(start: str) -> None:
    with pytest.raises(LoRAError, match=f"init_lora_weights='{start}'"):
        inject(make("llama"), config(init_lora_weights=start))


def test_u15_every_field_of_the_config_is_compared_or_refused() -> None:
    compared = {field for _, options in [*FIELDS.values(), *SELECTIONS.values()] for field in options}
    known = {field.name for field in fields(LoraConfig)}
    assert compared | REFUSED.keys() | BOOKKEEPING_FIELDS == known
    assert not compared & REFUSED.keys()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": -1}, "r must be"),
        ({"r": 2.5}, "r must be"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be"),
        ({"lora_dropout": -0.1}, "lora_dropout must lie in"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie in"),
        ({"lora_dropout": "much"}, "lora_dropout must lie in"),
        ({"lora_alpha": "much"}, "lora_alpha must be a finite number, not 'much'"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\] must be a finite number"),
        ({"bias": "some"}, "bias must be none, all or lora_only, not 'some'"),
    ],
)
def test_a_bad_value_is_an_error(options: dict[str, object], match: str) -> None:
    with pytest.raises(LoRAError, match=match):
        inject(make("llama"), config(**options))


def test_a_second_injection_is_an_error() -> None:
    model = by_us(make("llama"))
    before = snapshot(model)
    with pytest.raises(LoRAError, match="already carries"):
        inject(model, config())
    assert_equal_tensors(snapshot(model), before)


@pytest.mark.parametrize("use", [unwrap, merge, lambda model: disabled(model).__enter__()])
def test_a_model_without_an_adapter_is_an_error(use) -> None:
    with pytest.raises(LoRAError, match=r"LlamaForCausalLM carries no PlainLoRA adapter; call inject\(\)"):
        use(make("llama"))


def test_the_config_given_is_not_written_to() -> None:
    mine = config(target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["wpe"])
    before = copy.deepcopy(mine)
    inject(make("gpt2-score"), mine)
    assert mine == before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt2", ALL | {"bias": "all"}),
        ("gpt2", {"bias": "lora_only"}),
        ("qwen2", {"modules_to_save": ["lm_head"]}),
        ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN, "bias": "all"}),
    ],
)
def test_disabled_is_the_base_to_the_last_bit(kind: str, options: dict[str, object]) -> None:
    base = logits(make(kind))
    model = by_us(make(kind), **options)
    move(model)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    with disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model), base)
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)


def test_disabled_ends_with_an_exception() -> None:
    model = by_us(make("llama"), modules_to_save=["lm_head"])
    move(model)
    adapted = logits(model)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


def test_what_is_read_from_a_module_trained_whole_is_what_computes() -> None:
    model = by_us(make("distilbert"), task_type="SEQ_CLS", target_modules=Q_LIN)
    (_, head), *_ = saved_modules(model)
    assert head.weight is head.trained_module.weight
    assert head.bias is head.trained_module.bias
    with disabled(model):
        assert head.weight is head.original_module.weight
        assert head.bias is head.original_module.bias
    assert ModuleToSave(nn.Embedding(2, 2)).bias is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"r": 4}),
        ("gpt2", ALL | {"bias": "all"}),
        ("qwen2", {"bias": "lora_only", "modules_to_save": ["lm_head"]}),
        ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN}),
    ],
)
def test_unwrap_is_the_inverse_of_inject(kind: str, options: dict[str, object]) -> None:
    model = make(kind)
    model.get_input_embeddings().requires_grad_(False)  # not all alike before
    before, needed, computed = snapshot(model), requires_grad(model), logits(model)
    modes = {name: module.training for name, module in model.named_modules()}
    by_us(model, **options)
    move(model)
    assert not torch.equal(logits(model), computed)
    assert unwrap(model) is model
    assert_equal_tensors(snapshot(model), before)
    assert requires_grad(model) == needed
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(isinstance(module, (LoRALinear, ModuleToSave)) for module in model.modules())
    assert torch.equal(logits(model), computed)
    by_us(model, **options)  # and it can be done again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_low_cpu_mem_usage_draws_nothing_and_leaves_a_and_b_to_be_filled(dtype: torch.dtype) -> None:
    options = {"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}
    drawn, base = by_us(make("llama", dtype), **options), make("llama", dtype)
    before = torch.get_rng_state()
    model = inject(base, config(**options), low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), before)
    expected = trainable(drawn)
    assert trainable(model).keys() == expected.keys()
    for name, parameter in trainable(model).items():
        assert parameter.is_meta == (".lora_" in name)
        assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype)
    assert_equal_tensors(snapshot(unwrap(model)), snapshot(make("llama", dtype)))


@pytest.mark.parametrize("case", ["patterns", "bias and head", "tied modules_to_save", "embedding to save"])
def test_what_was_put_in_is_found_in_the_model_s_own_order(case: str) -> None:
    kind, options = (FIELDS | {"patterns": FIELDS["rank_pattern"]})[case]
    model = by_us(make(kind), **options)
    named = list(model.named_modules())
    assert list(lora_layers(model)) == [item for item in named if isinstance(item[1], LoRALinear)]
    assert list(saved_modules(model)) == [item for item in named if isinstance(item[1], ModuleToSave)]
    assert list(lora_layers(model))


def test_training_mode_passes_on_to_the_new_layers() -> None:
    for training in (True, False):
        model = by_us(make("llama").train(training), lora_dropout=0.1)
        assert {module.training for module in model.modules()} == {training}


def test_save_pretrained_writes_the_adapter_until_it_is_taken_out(tmp_path: Path) -> None:
    model = by_us(make("llama"))
    move(model)
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere").exists()

    model.save_pretrained(tmp_path / "adapter", safe_serialization=True)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path / "adapter")), logits(model))

    unwrap(model).save_pretrained(tmp_path / "base")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reloaded), logits(make("llama")))


def test_a_deep_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = by_us(make("qwen2"), modules_to_save=["lm_head"], bias="all")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    before = snapshot(model)
    move(twin)
    assert_equal_tensors(snapshot(model), before)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("qwen2"), tmp_path)), logits(twin))
    assert not torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(unwrap(twin)), logits(make("qwen2")))
    assert_equal_tensors(snapshot(model), before)
    assert len(list(lora_layers(model))) == 4
