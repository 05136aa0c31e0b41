"""Which modules a config names: PEFT's choice where there is one, an error where PEFT would pass over a mistake."""

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from plainlora import inject
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import adapter_state, lora_layers
from plainlora.lora.targets import condense, find_targets, without_unmatched
from tests.lora.oracle import assert_same_as_peft, config, make, requires_grad, snapshot

QV = ["q_proj", "v_proj"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
SELECTIONS = {
    "list": ("llama", {"target_modules": QV}),
    "longer ends": ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.down_proj"]}),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\..*(q_proj|gate_proj)"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "All-Linear": ("qwen2", {"target_modules": "All-Linear"}),
    "all-linear Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "default": ("llama", {"target_modules": None}),
    "default Conv1D": ("gpt2", {"target_modules": None}),
    "c_proj": ("gpt2", {"target_modules": ["c_proj"]}),
    "exclude list": ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]}),
    "exclude regex": ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": r".*\.1\.mlp\..*"}),
    "one layer": ("llama", {"target_modules": QV, "layers_to_transform": 1}),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [0, 1]}),
    "no layers": ("llama", {"target_modules": QV, "layers_to_transform": []}),
    "layers of default": ("gpt2", {"layers_to_transform": [1]}),
    "layers pattern": ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": ["layers", "h"]}),
    "empty pattern": ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ""}),
    "full names know no layers": (
        "llama",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "not the head trained whole": ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_config_selects_what_peft_selects(selection: str) -> None:
    kind, options = SELECTIONS[selection]
    ours, theirs = assert_same_as_peft(kind, **options)
    names = {name.removeprefix("base_model.model.") for name in theirs.base_model.targeted_module_names}
    assert {name for name, _ in lora_layers(ours)} == names
    # What is written down selects the same again.
    assert set(find_targets(make(kind), adapter_state(ours).config)) == names


def refused(kind: str, match: str, **options: object) -> None:
    """The error, and a model that it left as it was."""
    model = make(kind)
    before, needed = snapshot(model), requires_grad(model)
    with pytest.raises(LoRAError, match=match) as caught:
        inject(model, config(**options))
    assert "\n" not in str(caught.value)
    assert snapshot(model).keys() == before.keys()
    assert requires_grad(model) == needed
    assert not hasattr(model, "plainlora")


@pytest.mark.parametrize("target_modules", [["q_prj"], ["v_proj", "q_prj"], ["v_proj", "model.q_prj"]])
def test_u14_a_name_that_matches_nothing_is_an_error(target_modules: list[str]) -> None:
    refused("llama", r"q_prj' matches no module; did you mean .*q_proj", target_modules=target_modules)


def test_u14_a_name_unlike_any_other_is_answered_with_the_linear_layers() -> None:
    refused("gpt2", r"'zzz' matches no module; the linear layers are c_attn, c_fc, c_proj", target_modules=["zzz"])


def test_u14_the_end_of_a_word_is_no_match() -> None:
    refused("llama", "'proj' matches no module", target_modules=["proj"])


def test_u14_a_pattern_that_matches_nothing_is_an_error() -> None:
    refused("llama", r"pattern '.\*q_prj' matches no module; did you mean .*q_proj", target_modules=".*q_prj")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": QV, "exclude_modules": QV},
        {"target_modules": QV, "exclude_modules": ".*"},
        {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_nothing_left_to_adapt_is_an_error(options: dict[str, object]) -> None:
    refused("llama", "no module is left to adapt", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers_to_transform": [0, 7]}, r"no target module in layer 7; they lie in the layers 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"in layer 0; they lie in no layer"),
        ({"exclude_modules": ["q_prj"]}, r"exclude_modules: 'q_prj' matches no module; did you mean q_proj"),
    ],
)
def test_a_number_or_name_that_changes_nothing_is_an_error(options: dict[str, object], said: str) -> None:
    refused("llama", said, target_modules=QV, **options)


@pytest.mark.parametrize(
    ("kind", "target", "type_name"),
    [("llama", "embed_tokens", "Embedding"), ("gpt2", "wte", "Embedding"), ("llama", "mlp", "LlamaMLP")],
)
def test_a_module_that_is_not_linear_is_an_error(kind: str, target: str, type_name: str) -> None:
    linear = "c_attn" if kind == "gpt2" else "q_proj"
    refused(kind, rf"{target}' is a {type_name}; this LoRA adapts linear", target_modules=[linear, target])


def test_a_subclass_of_linear_is_a_target_only_if_it_is_a_linear_map() -> None:
    falcon = FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64))
    names = [name for name, _ in lora_layers(inject(falcon, config(target_modules="all-linear")))]
    assert len(names) == 4
    router = PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4))
    with pytest.raises(LoRAError, match=r"router' is a PhimoeTopKRouter; .*add 'router' to exclude_modules"):
        inject(router, config(target_modules="all-linear"))
    inject(router, config(target_modules="all-linear", exclude_modules=["router"]))


@pytest.mark.parametrize(("kind", "twin"), [("qwen2", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_u08_a_tied_head_is_no_target(kind: str, twin: str) -> None:
    refused(kind, f"'lm_head' shares its weight with '{twin}'.*modules_to_save", target_modules=["lm_head"])
    with pytest.raises(LoRAError, match=r"'lm_head' shares its weight with .*; load it with PEFT"):  # a saved adapter
        inject(make(kind), config(target_modules=["lm_head"]), strict=False)


def test_a_module_in_two_places_is_no_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    with pytest.raises(LoRAError, match="'0' shares its weight with '2'"):
        inject(model, config(target_modules=["0"]))
    assert model[0] is model[2]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["q_prj", "k_proj", "lm_head"])
def test_u15_a_pattern_s_key_must_fit_a_target(field: str, key: str) -> None:
    refused("llama", rf"{field}: '{key}' matches no target module; .*q_proj", target_modules=QV, **{field: {key: 2}})


def test_u14_a_module_to_save_that_matches_nothing_is_an_error() -> None:
    refused("llama", r"modules_to_save: 'lm_haed' matches no module.*lm_head", modules_to_save=["lm_haed"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("distilbert", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),  # pre_classifier ends in classifier
        ("llama", {"target_modules": ["gate_proj"], "modules_to_save": ["lp"]}),  # so does mlp in lp
    ],
)
def test_a_module_is_adapted_or_trained_whole(kind: str, options: dict[str, object]) -> None:
    refused(kind, r"modules_to_save .*exclude_modules", **options)


def test_fan_in_fan_out_is_an_error_where_nothing_is_transposed() -> None:
    refused("llama", "fan_in_fan_out=True, but no target", fan_in_fan_out=True)


def test_an_architecture_without_default_targets_is_an_error() -> None:
    with pytest.raises(LoRAError, match=r'no default target modules for Sequential.*"all-linear"'):
        inject(nn.Sequential(nn.Linear(4, 4)), config())


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)),
}


EXPERTS = [
    "all-linear",
    ["q_proj", "v_proj"],
    r".*(k_proj|down_proj)",
    ["o_proj", "gate"],
    ["q_proj", "w1", "w2", "w3"],
]


@pytest.mark.parametrize("targets", EXPERTS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_and_routers_are_adapted_as_in_peft_or_refused(kind: str, targets: str | list[str]) -> None:
    model, lora = MIXTURES[kind](), config(target_modules=targets)
    peft = get_peft_model(MIXTURES[kind](), copy.deepcopy(lora)).base_model
    parameters, linear = peft.targeted_parameter_names, list(peft.targeted_module_names)
    leaves = {name.split(".")[-1] for name, _ in model.named_modules()}
    unknown = [] if isinstance(targets, str) else sorted(set(targets) - leaves)
    if parameters:
        with pytest.raises(LoRAError, match=f"PEFT adapts parameters that are no.*{parameters[0]}") as caught:
            inject(model, lora)
        named = re.search(r"set target_modules to \[(.*)\]", str(caught.value))
        assert (named is not None) == bool(linear)
        assert named is None or linear == find_targets(model, config(target_modules=named[1].split(", ")))
    elif unknown:  # PEFT lets it pass
        with pytest.raises(LoRAError, match=f"'{unknown[0]}' matches no module"):
            inject(model, lora)
    else:
        assert [name for name, _ in lora_layers(inject(model, lora))] == linear


def test_projections_that_peft_passes_over_for_experts_that_are_not_there_are_refused() -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, mlp_only_layers=[0, 1]))
    peft = get_peft_model(copy.deepcopy(model), config(target_modules="all-linear")).base_model
    assert not peft.targeted_parameter_names
    assert not any("mlp" in name for name in peft.targeted_module_names)
    with pytest.raises(LoRAError, match=r"\(down_proj, gate.weight, gate_up_proj\), by target_parameters"):
        inject(model, config(target_modules="all-linear"))


def test_the_names_of_an_older_transformers_are_refused_where_only_half_of_a_fused_one_is_meant() -> None:
    with pytest.raises(LoRAError, match=r"PEFT refuses this adapter: .*gate_proj without also targeting up_proj"):
        inject(MIXTURES["qwen3_moe"](), config(target_modules=r".*\.(q_proj|gate_proj)"))


def test_a_layer_that_peft_would_not_find_again_in_a_saved_adapter_is_refused(tmp_path: Path) -> None:
    sizes = SIZES | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = LagunaForCausalLM(LagunaConfig(**sizes, num_attention_heads_per_layer=[4, 4]))
    lost = [name for name, _ in model.named_modules() if "shared_experts." in name and name.endswith("_proj")]
    assert lost
    peft = get_peft_model(copy.deepcopy(model), config(target_modules=["up_proj"]))
    peft.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*shared_experts"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    with pytest.raises(LoRAError, match=r"again in a saved adapter.*add 'shared_experts\.down_proj', "):
        inject(model, config(target_modules="all-linear"))


def test_condensing_says_no_more_and_no_less() -> None:
    model = make("llama")
    queries = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert condense(queries, model) == ["q_proj"]
    assert condense(queries[:1], model) == queries[:1]
    assert condense([*queries, "lm_head"], model) == ["lm_head", "q_proj"]


def test_a_model_need_not_come_from_transformers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inject(model, config(target_modules="all-linear", r=2))
    assert [name for name, _ in lora_layers(model)] == ["0", "2"]
    assert model(torch.randn(3, 4)).shape == (3, 2)


def test_a_module_inside_another_that_is_trained_whole_is_refused() -> None:
    with pytest.raises(LoRAError, match="up_proj' is inside"):
        inject(make("llama"), config(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))


def test_u12_a_module_that_mamba_reads_without_calling_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(LoRAError, match="out_proj' cannot be adapted"):
        inject(model, config(target_modules="all-linear"))
    inject(model, config(target_modules=["in_proj", "x_proj"]))
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(MambaForCausalLM(model.config), config(target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("rank_pattern", {"rank_pattern": {"(?i)q_proj": 3}}),
        ("layers_pattern", {"layers_pattern": ["(?P<idx>layers)"], "layers_to_transform": [0]}),
    ],
)
def test_a_regular_expression_that_fits_no_larger_one_is_refused(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(LoRAError, match=f"^{field}: it cannot be matched with names of modules"):
        inject(make("llama"), config(**({"target_modules": ["q_proj"]} | options)), strict=False)


def test_a_rank_for_every_one_of_many_modules_takes_no_time() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({f"layer_{number}": nn.Linear(2, 2) for number in range(900)})
    ranks = dict.fromkeys(model, 4)
    started = time.monotonic()
    assert len(find_targets(model, config(target_modules=list(model), rank_pattern=ranks))) == 900
    assert time.monotonic() - started < 5


def test_names_in_one_text_and_modules_that_are_not_there_are_told_as_what_they_are() -> None:
    refused("llama", r"for several names write a list: \[q_proj, v_proj\]", target_modules="q_proj, v_proj")
    refused("llama", r"'zzz' matches no module; the modules are .*embed_tokens", modules_to_save=["zzz"])


def test_a_wrong_name_among_many_is_an_error_too() -> None:
    """PEFT condenses lists of twenty names and more."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(12) for name in ("q_proj", "v_proj")]
    assert len(find_targets(model, config(target_modules=names))) == 24
    with pytest.raises(LoRAError, match=r"target_modules: 'model.layers.11.self_attn.v_prj' matches no module"):
        find_targets(model, config(target_modules=[*names[:-1], "model.layers.11.self_attn.v_prj"]))


def test_a_saved_config_loses_the_names_that_match_nothing_in_its_base() -> None:
    """Tools write one list for every architecture; PEFT ignores what a base does not have."""
    given = config(
        target_modules=["q_proj", "gate_prj"], exclude_modules=["k_proj", "no"], rank_pattern={"q_proj": 2, "no": 3}
    )
    found = without_unmatched(make("llama"), given)
    assert set(found.target_modules or ()) == {"q_proj"}
    assert (list(found.exclude_modules or ()), found.rank_pattern) == (["k_proj"], {"q_proj": 2})
    assert set(given.target_modules or ()) == {"q_proj", "gate_prj"}
