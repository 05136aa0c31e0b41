"""Both back ends over a classifier whose head its checkpoint lacks: what is saved is what was trained (peft#876)."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from plainlora import inject, load_adapter, save_adapter
from plainlora.backends import BACKENDS, attach_adapter, check_same_adapter, loaded
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from tests.conftest import make_model, random_ids
from tests.lora.oracle import (
    HEAD,
    IN_THE_BACKBONE,
    assert_equal_tensors,
    config,
    load_classifier,
    logits,
    move,
    requires_grad,
    save_backbone,
    save_peft_adapter,
    snapshot,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FROZEN = {
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
    "bert": {"classifier.weight", "classifier.bias"},
    "gpt2": {"score.weight"},
}
HEADS = ("frozen", "LoRA", "whole")
backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", FROZEN)
heads = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_backbone(kind, tmp_path_factory.mktemp(kind)) for kind in IN_THE_BACKBONE}


def attach(backend: str, kind: str, head: str, backbones: dict[str, Path], **options: object) -> nn.Module:
    """An adapter in a classifier whose head is frozen, carries LoRA, or is trained whole as PEFT does for the task."""
    targets = IN_THE_BACKBONE[kind] + [HEAD[kind]] * (head == "LoRA")
    task = "SEQ_CLS" if head == "whole" else None
    base, missing = load_classifier(backbones[kind])
    assert set(missing) == FROZEN[kind]
    torch.manual_seed(1)
    made = config(target_modules=targets, task_type=task, lora_dropout=0.1, **options)
    return attach_adapter(base, made, BACKENDS[backend], new_weights=missing)


def plain_keys(directory: Path) -> set[str]:
    return {name.removeprefix(PREFIX) for name in load_file(directory / WEIGHTS) if ".lora_" not in name}


@backends
@kinds
@heads
def test_a_reload_over_another_random_head_predicts_the_same(
    backend: str, kind: str, head: str, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model = attach(backend, kind, head, backbones)
    needed = requires_grad(model)
    untrained = logits(model.eval())
    train(model)
    assert requires_grad(model) == needed
    expected = logits(model)
    assert not torch.equal(expected, untrained)
    model.save_pretrained(tmp_path)

    wrapped = {f"{HEAD[kind]}.{name}": f"{HEAD[kind]}.base_layer.{name}" for name in ("weight", "bias")}
    assert plain_keys(tmp_path) == {wrapped.get(name, name) if head == "LoRA" else name for name in FROZEN[kind]}
    assert not torch.equal(
        logits(load_classifier(backbones[kind], 9)[0].eval()), logits(load_classifier(backbones[kind])[0].eval())
    )
    forms = {name: each.load for name, each in BACKENDS.items()}
    for name, load in (forms | {"load_adapter": load_adapter, "PeftModel": PeftModel.from_pretrained}).items():
        base, _ = load_classifier(backbones[kind], seed=9)
        found = logits(load(base, tmp_path).eval())
        if ("fused" in name) == ("fused" in backend):
            assert torch.equal(found, expected), name
        else:  # sums in another order
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@kinds
@heads
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_back_ends_write_the_same_weights_to_the_byte(
    kind: str, head: str, bias: str, backbones: dict[str, Path], tmp_path: Path
) -> None:
    for backend in BACKENDS:
        model = attach(backend, kind, head, backbones, bias=bias)
        train(model)
        model.save_pretrained(tmp_path / backend)
    if head == "whole" and bias == "all":  # where PEFT writes the head's biases over again
        own, theirs = (load_file(tmp_path / backend / WEIGHTS) for backend in ("reference", "peft"))
        copies = (".modules_to_save.bias", ".original_module.bias")
        assert_equal_tensors(own, {name: tensor for name, tensor in theirs.items() if not name.endswith(copies)})
    else:
        assert (tmp_path / "reference" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("head", ["frozen", "LoRA"])
def test_a_file_of_the_peft_back_end_goes_through_ours_unchanged(
    head: str, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model = attach("peft", "distilbert", head, backbones)
    move(model)
    model.save_pretrained(tmp_path / "peft")
    save_adapter(load_adapter(load_classifier(backbones["distilbert"], 9)[0], tmp_path / "peft"), tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()


@backends
@kinds
@heads
def test_reload_puts_everything_back(
    backend: str, kind: str, head: str, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model = attach(backend, kind, head, backbones)
    move(model)
    model.save_pretrained(tmp_path)
    saved, needed = snapshot(model), requires_grad(model)
    move(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if HEAD[kind] in name and ".original_module." not in name:
                parameter.add_(1)
    BACKENDS[backend].reload(model, tmp_path)
    assert_equal_tensors(snapshot(model), saved)
    assert requires_grad(model) == needed


@backends
@heads
def test_trainer_s_checkpoints_hold_the_head(
    backend: str, head: str, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model = attach(backend, "bert", head, backbones)
    rows = [{"input_ids": ids, "labels": number % 3} for number, ids in enumerate(random_ids(4))]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    base, _ = load_classifier(backbones["bert"], seed=9)
    expected = logits(model.eval())
    assert torch.equal(logits(load_adapter(base, tmp_path / "checkpoint-2")), expected)
    assert plain_keys(tmp_path / "checkpoint-1") == plain_keys(tmp_path / "checkpoint-2") != set()
    assert not list(tmp_path.rglob("*.tmp"))

    resumed = attach(backend, "bert", head, backbones)
    BACKENDS[backend].reload(resumed, tmp_path / "checkpoint-1")
    assert not torch.equal(logits(resumed.eval()), expected)
    BACKENDS[backend].reload(resumed, tmp_path / "checkpoint-2")
    assert torch.equal(logits(resumed.eval()), expected)


@backends
def test_another_process_writes_nothing(backend: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    model = attach(backend, "gpt2", "LoRA", backbones)
    model.save_pretrained(tmp_path, state_dict=None, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_the_state_dict_that_trainer_gathered_is_what_is_saved(backbones: dict[str, Path], tmp_path: Path) -> None:
    model = attach("peft", "gpt2", "frozen", backbones)
    gathered = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all((tensor == 0.5).all() for tensor in load_file(tmp_path / WEIGHTS).values())


@backends
def test_without_new_weights_nothing_is_added(backend: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    model = BACKENDS[backend].attach(load_classifier(backbones["gpt2"])[0], config(target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    assert plain_keys(tmp_path) == set()


@backends
@pytest.mark.parametrize("name", ["classifier.wieght", "distilbert.embeddings.word_embeddings.weight"])
def test_a_new_weight_that_cannot_be_saved_is_refused(backend: str, name: str, backbones: dict[str, Path]) -> None:
    base, missing = load_classifier(backbones["distilbert"])
    before = snapshot(base)
    with pytest.raises(LoRAError, match=f"new_weights: .*{name}"):
        attach_adapter(base, config(target_modules=["q_lin"]), BACKENDS[backend], new_weights=[*missing, name])
    assert_equal_tensors(snapshot(base), before)


@backends
@pytest.mark.parametrize("kind", IN_THE_BACKBONE)
def test_the_head_of_a_classifier_may_carry_lora_and_that_of_a_language_model_may_not(
    backend: str, kind: str, backbones: dict[str, Path]
) -> None:
    base, missing = load_classifier(backbones[kind])
    head = config(target_modules=[HEAD[kind]])
    adapted = attach_adapter(base, head, BACKENDS[backend], new_weights=missing)
    assert any(f"{HEAD[kind]}.lora_A" in name for name, needed in requires_grad(adapted).items() if needed)
    with pytest.raises(UserError, match="the output head cannot carry LoRA"):
        attach_adapter(make_model("llama"), config(target_modules=["lm_head"]), BACKENDS[backend])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_saved_regular_expression_that_fits_no_larger_one_is_refused(name: str, tmp_path: Path) -> None:
    save_adapter(inject(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"(?i)q_proj": 3}}))
    with pytest.raises(LoRAError, match=r"^rank_pattern: it cannot be matched with names of modules"):
        BACKENDS[name].load(make_model("llama"), tmp_path)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_experts_are_refused_by_the_hand_written_form_before_the_model_is_touched(backend: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    before = snapshot(model)
    with pytest.raises(LoRAError, match=r"PEFT adapts parameters that .*\[k_proj, o_proj, q_proj, v_proj\]"):
        attach_adapter(model, config(target_modules="all-linear"), BACKENDS[backend])
    assert_equal_tensors(snapshot(model), before)


@pytest.mark.parametrize("name", ["reference", "peft"])
@pytest.mark.parametrize(
    "settings", [{}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head", "ln_f"]}]
)
def test_after_an_adapter_the_base_is_as_it_was(
    name: str, settings: dict[str, Any], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = save_peft_adapter(
        tmp_path / "adapter", model_dirs["gpt2"], "gpt2", target_modules=["c_attn"], **settings
    )
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    moved = {key: value + 0.1 for key, value in tensors.items() if "lora_" not in key}
    save_file(tensors | moved, f"{adapter}/adapter_model.safetensors")
    model = make_model("gpt2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        alone = model(input_ids=random_ids()).logits
        with loaded(BACKENDS[name], model, adapter) as adapted:
            tuned = adapted(input_ids=random_ids()).logits
        assert torch.equal(model(input_ids=random_ids()).logits, alone)
    assert not torch.allclose(tuned, alone)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@backends
def test_of_an_adapter_that_is_trained_on_every_weight_must_be_in_the_file(
    backend: str, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 4}
    adapter = Path(save_peft_adapter(tmp_path / "adapter", model_dirs["llama"], "llama", **options))
    tensors, model = (
        load_file(adapter / WEIGHTS),
        attach_adapter(make_model("llama"), config(**options), BACKENDS[backend]),
    )
    BACKENDS[backend].reload(model, adapter)
    for changed in (
        {name: each for name, each in tensors.items() if "layers.1" not in name},
        {name.replace("base_model.", "_orig_mod.base_model.", 1): each for name, each in tensors.items()},
        {
            name: torch.cat([each, each], -1 if "lora_A" in name else 0) for name, each in tensors.items()
        },  # a wider base's
    ):
        save_file(changed, adapter / WEIGHTS)
        with pytest.raises((LoRAError, UserError)) as caught:
            BACKENDS[backend].reload(model, adapter)
        assert "\n" not in str(caught.value)


@backends
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save: 'lm_hed' matches no module; did you mean lm_head"),
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern: 'q_prj' matches no target module; did you mean q_proj"),
        ({"alpha_pattern": {"q_prj": 4}}, "alpha_pattern: 'q_prj' matches no target module"),
        ({"target_modules": ["q_proj", "k_prj"]}, "target_modules: 'k_prj' matches no module; did you mean k_proj"),
    ],
)
def test_a_name_that_matches_nothing_is_named_by_every_back_end(
    backend: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(LoRAError, match=said):
        attach_adapter(make_model("llama"), config(**{"target_modules": ["q_proj"]} | options), BACKENDS[backend])


@backends
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_without_its_adapter_a_model_has_its_biases_of_before(backend: str, bias: str) -> None:
    expected = logits_of(make_model("gpt2"))
    model = attach_adapter(make_model("gpt2"), config(target_modules=["c_attn"], bias=bias), BACKENDS[backend])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    tuned = logits_of(model)
    with BACKENDS[backend].disabled(model):
        torch.testing.assert_close(logits_of(model), expected)  # GELU is fused
    assert torch.equal(logits_of(model), tuned)
    assert not torch.allclose(tuned, expected)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


def mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    experts = {"num_key_value_heads": 2, "vocab_size": 320, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts)).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"]])
def test_a_run_with_adapted_experts_may_be_resumed(targets: str | list[str], tmp_path: Path) -> None:
    """PEFT writes what it made of their names into the saved config."""

    def asked(r: int = 4) -> LoraConfig:
        return config(target_modules=targets, r=r, lora_alpha=8, lora_dropout=0.0)

    model = attach_adapter(mixtral(), asked(), BACKENDS["peft"])
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    check_same_adapter(tmp_path, asked())
    with pytest.raises(UserError, match="was trained with r 4, now it is 8"):
        check_same_adapter(tmp_path, asked(8))
    again = attach_adapter(mixtral(), asked(), BACKENDS["peft"])
    BACKENDS["peft"].reload(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_parameters": ["experts.gate_up_prj"]}, "target_parameters: 'experts.gate_up_prj' matches no param"),
        (
            {"target_modules": ["q_proj", "k_prj"], "target_parameters": ["experts.down_proj"]},
            "'k_prj' matches no mod",
        ),
        ({"target_modules": ["q_proj", "k_prj", "w1", "w2", "w3"]}, "target_modules: 'k_prj' matches no module"),
    ],
)
def test_names_beside_those_of_experts_are_checked_too(options: dict[str, Any], said: str) -> None:
    given = config(**{"target_modules": ["q_proj"], "lora_dropout": 0.0} | options)
    with pytest.raises(LoRAError, match=said):
        attach_adapter(mixtral(), given, BACKENDS["peft_fused"])


def test_an_adapter_of_experts_under_their_older_names_is_loaded(tmp_path: Path) -> None:
    """As Transformers 4 named them, when every expert had modules of its own; PEFT puts them together on loading."""
    config(target_modules=["w1", "w2", "w3"], r=2, lora_alpha=4, lora_dropout=0.0).save_pretrained(str(tmp_path))
    sizes, tensors = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}, {}
    for layer, expert, (name, (d_out, d_in)) in itertools.product(range(2), range(2), sizes.items()):
        module = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors |= {f"{module}.lora_A.weight": torch.randn(2, d_in), f"{module}.lora_B.weight": torch.randn(d_out, 2)}
    save_file(tensors, tmp_path / WEIGHTS)
    expected = logits_of(PeftModel.from_pretrained(mixtral(), str(tmp_path)))
    assert torch.equal(logits_of(BACKENDS["peft"].load(mixtral(), tmp_path)), expected)
    assert not torch.allclose(expected, logits_of(mixtral()))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [3]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"velora_config": {"num_groups": 16}},
        {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_what_pefts_conversion_to_the_unchanged_base_would_lose_is_refused_before_training(
    init: str, options: dict[str, Any]
) -> None:
    given = config(**{"target_modules": ["q_proj"], "init_lora_weights": init} | options)
    with pytest.raises(LoRAError, match=rf": PEFT saves init_lora_weights='{init}' for the unchanged base"):
        attach_adapter(make_model("llama"), given, BACKENDS["peft_fused"])
