"""Base weights that the checkpoint lacks travel with the adapter, so that a reload predicts the same (peft#876).

Both back ends, and training itself, are in `tests/test_backends.py`.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from plainlora import disabled, load_adapter, merge, save_adapter, unwrap
from plainlora.lora.errors import LoRAError
from plainlora.lora.inject import inject
from plainlora.lora.interchange import adapter_state_dict, load_adapter_weights
from plainlora.lora.record import adapter_state
from tests.conftest import random_ids
from tests.lora.oracle import (
    HEAD,
    IN_THE_BACKBONE,
    Q_LIN,
    assert_equal_tensors,
    config,
    load_classifier,
    logits,
    move,
    requires_grad,
    save_backbone,
    snapshot,
)
from tests.lora.test_interchange import WEIGHTS, edit_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
PREFIX = "base_model.model."
EMBEDDINGS = f"{PREFIX}distilbert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_backbone(kind, tmp_path_factory.mktemp(kind)) for kind in IN_THE_BACKBONE}


def adapted(directory: Path, **options: object) -> PreTrainedModel:
    """A classifier that carries an adapter away from its start and the head of seed 0."""
    model, missing = load_classifier(directory)
    torch.manual_seed(1)
    inject(model.eval(), config(**options), new_weights=missing)
    move(model)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("distilbert", {"target_modules": Q_LIN}, ["classifier.bias", "classifier.weight", "pre_classifier.bias",
                                                   "pre_classifier.weight"]),
        ("gpt2", {"target_modules": ["c_attn", "score"]}, ["score.base_layer.weight"]),
        ("bert", {"target_modules": ["query", "classifier"], "bias": "lora_only"}, ["classifier.base_layer.weight"]),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, []),
        ("distilbert", {"target_modules": Q_LIN, "task_type": "SEQ_CLS"}, []),
        ("distilbert", {"target_modules": Q_LIN, "modules_to_save": ["pre_classifier"]}, ["classifier.bias",
                                                                                        "classifier.weight"]),
    ],
)  # fmt: skip
def test_what_is_neither_trained_nor_in_the_checkpoint_is_saved_frozen(
    kind: str, options: dict[str, object], expected: list[str], backbones: dict[str, Path]
) -> None:
    model, missing = load_classifier(backbones[kind])
    bare = adapter_state_dict(inject(load_classifier(backbones[kind])[0], config(**options)))
    state = adapter_state_dict(inject(model, config(**options), new_weights=missing))
    assert sorted(name.removeprefix(PREFIX) for name in state.keys() - bare.keys()) == expected
    assert not any(requires_grad(model)[name] for name in expected)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in state.values()} <= own


@pytest.mark.parametrize("lora_on_head", [False, True])
@pytest.mark.parametrize("kind", ["distilbert", "bert", "gpt2"])
def test_saving_what_was_loaded_writes_the_same_file(
    kind: str, lora_on_head: bool, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model = adapted(backbones[kind], target_modules=IN_THE_BACKBONE[kind] + [HEAD[kind]] * lora_on_head)
    save_adapter(model, tmp_path / "first")
    other = load_classifier(backbones[kind], seed=9)[0].eval()
    save_adapter(load_adapter(other, tmp_path / "first"), tmp_path / "second")
    assert torch.equal(logits(other), logits(model))
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()


def test_plain_peft_loads_the_head_but_loses_it_when_it_saves(backbones: dict[str, Path], tmp_path: Path) -> None:
    """Upstream's behaviour, peft#876: its `save_pretrained` writes what is trained. Our `peft` back end adds to it."""
    model = adapted(backbones["distilbert"], target_modules=Q_LIN)
    save_adapter(model, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(load_classifier(backbones["distilbert"], seed=9)[0], tmp_path / "ours").eval()
    assert torch.equal(logits(loaded), logits(model))

    loaded.save_pretrained(tmp_path / "peft")
    saved, kept = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "peft"))
    assert {name.removeprefix(PREFIX) for name in saved.keys() - kept.keys()} == {
        *("classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight")
    }
    assert_equal_tensors(kept, {name: tensor for name, tensor in saved.items() if ".lora_" in name})
    other = load_adapter(load_classifier(backbones["distilbert"], seed=9)[0], tmp_path / "peft")
    assert not torch.equal(logits(other), logits(model))


def test_auto_peft_finds_the_class_and_the_head(backbones: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(backbones["gpt2"], target_modules=["c_attn", "score"])
    save_adapter(model, tmp_path)
    torch.manual_seed(9)
    loaded = AutoPeftModel.from_pretrained(tmp_path, num_labels=3).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_the_head_is_the_base_s(backbones: dict[str, Path], tmp_path: Path) -> None:
    """Disabled, taken out or merged, a model has the head it was trained over, loaded or not."""
    base = logits(load_classifier(backbones["gpt2"])[0].eval())
    model = adapted(backbones["gpt2"], target_modules=["c_attn", "score"])
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_classifier(backbones["gpt2"], seed=9)[0], tmp_path / "adapter")
    for one in (model, loaded):
        expected = logits(one)
        merged = copy.deepcopy(one)
        with disabled(one):
            assert torch.equal(logits(one), base)
        assert torch.equal(logits(unwrap(one)), base)
        merge(merged).save_pretrained(tmp_path / "merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_a_deep_copy_saves_a_head_of_its_own(backbones: dict[str, Path]) -> None:
    model = adapted(backbones["gpt2"], target_modules=["c_attn"])
    twin = copy.deepcopy(model)
    twin.score.weight.data.fill_(0.5)
    name = f"{PREFIX}score.weight"
    assert torch.equal(adapter_state_dict(twin)[name], twin.score.weight)
    assert torch.equal(adapter_state_dict(model)[name], model.score.weight)
    assert not torch.equal(twin.score.weight, model.score.weight)


def test_resuming_puts_the_head_back(backbones: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(backbones["distilbert"], target_modules=[*Q_LIN, "classifier"])
    save_adapter(model, tmp_path)
    saved, needed = snapshot(model), requires_grad(model)
    move(model)
    for parameter in adapter_state(model).new_weights:
        parameter.data.add_(1)
    load_adapter_weights(model, tmp_path)
    assert_equal_tensors(snapshot(model), saved)
    assert requires_grad(model) == needed


def test_a_module_without_a_named_backbone_is_all_head(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    model, other = make(), make()
    other[0].load_state_dict(model[0].state_dict())
    inject(model, config(target_modules=["0"]), new_weights=["1.weight", "1.bias"])
    move(model)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["classifier.weight", "classifier.wieght"], "'classifier.wieght' is not a parameter of this BertForSequence"),
        (["classifier"], "'classifier' is not a parameter"),
        (["bert.pooler.dense.weight"], "lacks 'bert.pooler.dense.weight', .* add 'bert.pooler.dense' to modules_to_s"),
    ],
)
def test_a_new_weight_that_cannot_be_saved_is_refused(
    names: list[str], match: str, backbones: dict[str, Path]
) -> None:
    model, _ = load_classifier(backbones["bert"])
    before, needed = snapshot(model), requires_grad(model)
    with pytest.raises(LoRAError, match=f"new_weights: .*{match}") as caught:
        inject(model, config(target_modules=["query"]), new_weights=names)
    assert "\n" not in str(caught.value)
    assert_equal_tensors(snapshot(model), before)
    assert requires_grad(model) == needed
    assert not hasattr(model, "plainlora")


def test_a_quantised_head_is_refused_and_one_beside_a_quantised_backbone_is_saved(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    def load(seed: int, skipped: str) -> tuple[PreTrainedModel, list[str]]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=[skipped], bnb_4bit_compute_dtype=torch.float32
        )
        return load_classifier(backbones["llama"], seed, dtype=torch.float32, quantization_config=quantization)

    model, missing = load(0, "no such module")
    with pytest.raises(LoRAError, match=r"'score.weight' is quantised; add 'score' to llm_int8_skip_modules"):
        inject(model, config(target_modules=["q_proj"]), new_weights=missing)

    model, missing = load(0, "score")
    inject(model.eval(), config(target_modules=["q_proj", "score"]), new_weights=missing)
    move(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_file(tmp_path / WEIGHTS)[f"{PREFIX}score.base_layer.weight"], model.score.weight)
    for put in (load_adapter, PeftModel.from_pretrained):
        loaded = put(load(9, "score")[0], tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))


def test_a_new_part_of_the_backbone_is_trained_whole(backbones: dict[str, Path]) -> None:
    model, missing = load_classifier(backbones["bert"])
    names = [*missing, "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    inject(model, config(target_modules=["query"], modules_to_save=["bert.pooler.dense"]), new_weights=names)
    saved = {name.removeprefix(PREFIX) for name in adapter_state_dict(model) if ".lora_" not in name}
    assert saved == set(names)


def update(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({PREFIX + name: tensor})


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another shape": (
        update("classifier.weight", torch.zeros(7, 64)), r"classifier.weight has shape \(7, 64\), .* needs \(3, 64\)"
    ),
    "NaN": (update("classifier.bias", torch.full((3,), float("nan"))), "classifier.bias holds values that are not fi"),
    "the backbone's": (lambda tensors: tensors.update({EMBEDDINGS: torch.zeros(320, 64)}), f"holds {EMBEDDINGS}, "),
    "nobody's": (update("clasifier.weight", torch.zeros(3, 64)), "holds .*clasifier.weight, which this model has no"),
    "under a wrapper": (
        update("classifier.base_layer.weight", torch.zeros(3, 64)), "holds .*classifier.base_layer.weight, which"
    ),
    "a bare name": (lambda tensors: tensors.update({"classifier.weight": torch.zeros(3, 64)}), "holds classifier.we"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_head_is_one_clear_line_and_no_harm(fault: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    carrier = adapted(backbones["distilbert"], target_modules=Q_LIN)
    save_adapter(carrier, tmp_path)
    spoil, match = BAD[fault]
    edit_tensors(tmp_path, spoil)

    model = load_classifier(backbones["distilbert"], seed=9)[0].train()
    before, needed = snapshot(model), requires_grad(model)
    with pytest.raises(LoRAError, match=match) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert_equal_tensors(snapshot(model), before)
    assert requires_grad(model) == needed
    assert all(module.training for module in model.modules())
    assert not hasattr(model, "plainlora")

    before = snapshot(carrier)
    with pytest.raises(LoRAError, match=match):
        load_adapter_weights(carrier, tmp_path)
    assert_equal_tensors(snapshot(carrier), before)


def test_a_head_that_is_not_finite_is_not_saved(backbones: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(backbones["gpt2"], target_modules=["c_attn"])
    model.score.weight.data[0, 0] = float("inf")
    with pytest.raises(LoRAError, match=r"score.weight holds values that are not finite; nothing was saved"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_backbone_alone_has_no_head(backbones: dict[str, Path], tmp_path: Path) -> None:
    backbone = AutoModel.from_pretrained(backbones["distilbert"]).eval()
    save_adapter(inject(backbone, config(target_modules=Q_LIN)), tmp_path)
    edit_tensors(tmp_path, update("embeddings.word_embeddings.weight", torch.zeros(320, 64)))
    model = AutoModel.from_pretrained(backbones["distilbert"]).eval()
    before = model(random_ids())[0]
    with pytest.raises(
        LoRAError, match=r"holds base_model.model.embeddings.word_embeddings.weight, a weight of the base with other"
    ):
        load_adapter(model, tmp_path)
    assert torch.equal(model(random_ids())[0], before)
