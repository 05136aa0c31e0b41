"""`fuse` on a PeftModel and on an injected model: the same model, computed otherwise."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from trl import SFTConfig, SFTTrainer

from plainlora import inject, load_adapter, merge, save_adapter
from plainlora.fast.fuse import fuse, unfuse
from plainlora.fast.head import is_covered
from plainlora.parity.tiny import byte_tokenizer
from tests.conftest import fused_in_place, load_quantized, make_model, random_ids, run_program

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


def config(kind: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS[kind]} | options)


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def observe(model: nn.Module, train: bool = False) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every trained parameter."""
    ids = random_ids()
    model.train(train).zero_grad()
    torch.manual_seed(7)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": output.logits.detach()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 5e-6) -> None:
    assert left.keys() == right.keys()
    for name, expected in left.items():
        assert float((right[name] - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def is_fused(model: nn.Module) -> list[bool]:
    return ["forward" in module.__dict__ for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_peft_model_computes_the_same_and_goes_back(kind: str, dropout: float) -> None:
    model = filled(get_peft_model(make_model(kind), config(kind, lora_dropout=dropout)))
    before = observe(model, train=kind == "llama")  # GPT-2's own dropouts are left out of this
    fuse(model)
    assert all(is_fused(model))
    assert_same(before, observe(model, train=kind == "llama"))
    unfuse(model)
    assert not any(is_fused(model))
    again = observe(model, train=kind == "llama")
    assert all(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", TARGETS)
def test_an_injected_model_computes_the_same(kind: str) -> None:
    model = filled(inject(make_model(kind), config(kind)))
    before = observe(model)
    assert_same(before, observe(fused_in_place(model)))


def test_fp64_agrees_to_1e_12() -> None:
    model = filled(inject(make_model("llama", torch.float64), config("llama")))
    before = observe(model)
    after = observe(fused_in_place(model))
    for name, expected in before.items():
        assert float((after[name] - expected).abs().max() / expected.abs().max()) < 1e-12, name


def test_several_active_adapters_are_one_sum() -> None:
    model = get_peft_model(make_model("llama"), config("llama"))
    model.add_adapter("second", config("llama", r=2, lora_alpha=3))
    filled(model).base_model.set_adapter(["default", "second"])
    before = observe(model)
    assert any("second" in name for name in before)
    assert_same(before, observe(fused_in_place(model)))


def test_a_disabled_a_merged_and_a_switched_adapter_are_respected() -> None:
    model = fused_in_place(filled(get_peft_model(make_model("llama"), config("llama")))).eval()
    plain = make_model("llama")
    ids = random_ids()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        adapted = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def test_what_is_not_covered_is_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = filled(get_peft_model(make_model("llama"), config("llama", use_dora=True)))
    before = observe(model)
    after = observe(fused_in_place(model))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    mixed = get_peft_model(make_model("llama"), config("llama", target_modules=["q_proj", "embed_tokens"]))
    with caplog.at_level(logging.WARNING, logger="plainlora.fast.fuse"):
        fuse(mixed)
    assert "not fused: base_model.model.model.embed_tokens" in caplog.text
    assert sum(is_fused(mixed)) == 2


@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=["nf4", "8-bit"]
)
def test_quantised_bases(model_dirs: dict[str, Any], options: dict[str, Any]) -> None:
    model = filled(get_peft_model(load_quantized(model_dirs["llama"], **options), config("llama")))
    before = observe(model)
    after = observe(fused_in_place(model))
    assert all(is_fused(model)) == ("load_in_4bit" in options)
    assert_same(before, after)


def test_under_checkpointing_and_autocast() -> None:
    for checkpointing, autocast in ((True, False), (False, True)):
        found = []
        for fused in (False, True):
            model = filled(get_peft_model(make_model("llama"), config("llama", lora_dropout=0.1)))
            if checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            if fused:
                fuse(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(observe(model, train=True))
        assert_same(found[0], found[1], 3e-2 if autocast else 5e-6)


def test_a_copy_is_fused_on_its_own_and_files_are_the_same(tmp_path: Any) -> None:
    model = fused_in_place(filled(inject(make_model("llama"), config("llama"))))
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, make_model("llama")(ids).logits)
        adapted = model(ids).logits
        assert not torch.equal(adapted, twin(ids).logits)
        save_adapter(model, tmp_path)
        loaded = fused_in_place(load_adapter(make_model("llama"), tmp_path))
        assert torch.equal(loaded(ids).logits, adapted)
        peft = fused_in_place(PeftModel.from_pretrained(make_model("llama"), str(tmp_path)))
        assert torch.equal(peft(ids).logits, adapted)
        torch.testing.assert_close(merge(model)(ids).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attach", [inject, get_peft_model])
def test_under_torch_compile(attach: Any) -> None:
    torch.manual_seed(0)
    model = fused_in_place(
        attach(make_model("llama"), LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = random_ids()

    def run(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    torch._dynamo.reset()
    # One graph of our own model; PEFT's wrapper may break it.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=attach is inject)
    for found, expected in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_packages_names_are_functions_however_they_are_imported() -> None:
    program = (
        "import plainlora; from plainlora import *; from plainlora import fuse, merge; import plainlora.fast.fuse; "
    )
    program += "assert all(callable(getattr(plainlora, name)) for name in plainlora.__all__); assert callable(fuse)"
    assert run_program("-c", program).returncode == 0


def test_a_model_without_values_is_fused_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """A run builds several on the way to the one that it trains, which alone is worth a line."""
    said = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = inject(make_model("llama"), LoraConfig(use_dora=True))
        caplog.clear()
        assert fuse(model).unchanged
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == []
    (line,) = said[1]
    assert line.startswith("4 layers are not fused: ")


def test_a_bias_of_b_that_comes_later_is_computed(tmp_path: Any) -> None:
    model = filled(get_peft_model(make_model("llama"), config("llama")))
    fuse(model)
    model.add_adapter("other", config("llama", lora_bias=True))
    for name, parameter in model.named_parameters():
        if "other" in name:
            nn.init.normal_(parameter, std=0.2)
    model.set_adapter("other")
    found = observe(model)
    unfuse(model)
    expected = observe(model)
    assert any("lora_B.other.bias" in name for name in expected)
    assert_same(expected, found)


def test_lora_fa_by_pefts_own_optimizer_trains_the_same(tmp_path: Path) -> None:
    """It freezes A, and preconditions the gradient of B by `(A A^T)^-1`."""
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 16).tolist()]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no", disable_tqdm=True, seed=1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    losses, a_of = [], []
    for fused in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(make_model("llama"), config("llama"))
        start = [value.clone() for name, value in model.named_parameters() if "lora_A" in name]
        optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=1e-2)
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
            optimizers=(optimizer, None),
        )  # fmt: skip
        if fused:
            assert fuse(trainer).fused["LoRA layers"] == 8
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        a_of.append((start, [value for name, value in model.named_parameters() if "lora_A" in name]))
    assert len(losses[0]) == 6
    assert losses[0][0] - losses[0][-1] > 0.01
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for start, end in a_of:
        assert all(torch.equal(*pair) for pair in zip(start, end, strict=True))


@pytest.mark.parametrize("alpha", [12, 20])
def test_an_adapter_is_hot_swapped_into_a_fused_model(alpha: int, tmp_path: Path) -> None:
    """By PEFT's `hotswap_adapter`, which copies values and changes the scaling."""
    first = filled(get_peft_model(make_model("llama"), config("llama")))
    other = get_peft_model(make_model("llama"), config("llama", lora_alpha=alpha))
    torch.manual_seed(6)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    for name, model in (("first", first), ("other", other)):
        model.save_pretrained(tmp_path / name)
    ids = random_ids()
    with torch.no_grad():
        expected = other.eval()(ids).logits
        model = fused_in_place(PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "first"))).eval()
        before = model(ids).logits
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
        found = model(ids).logits
    assert all(is_fused(model))
    assert float((found - expected).abs().max()) <= 5e-6 * float(expected.abs().max())
    assert float((found - before).abs().max()) > 0.1 * float(expected.abs().max())


class Swapped(nn.Module):
    """Hands its layer an input whose batch and length cannot be joined, as Mamba's `x_proj` gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.transpose(1, 2))


def test_an_input_that_is_a_transposed_view_has_its_gradients() -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = filled(inject(Swapped(), LoraConfig(r=2, lora_dropout=0.5, target_modules=["proj"])))
        if fused:
            fuse(model)
        x = torch.randn(3, 6, 5).requires_grad_()
        torch.manual_seed(1)
        model.train()(x).square().sum().backward()
        found.append([x.grad, *(each.grad for each in model.parameters() if each.requires_grad)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_fused_model_may_be_saved_whole_and_loaded(tmp_path: Any) -> None:
    model = filled(get_peft_model(make_model("llama"), config("llama")))
    fuse(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert all(is_fused(again))
    assert_same(observe(model), observe(again), 0.0)


def test_a_trained_bias_of_the_head_gets_its_gradient(tmp_path: Any) -> None:
    """The one-pass head has none for it, so TRL's takes its place."""
    head = make_model("llama")
    head.lm_head = nn.Linear(64, 320)
    assert is_covered(head.requires_grad_(False))
    head.lm_head.bias.requires_grad_(True)
    assert not is_covered(head)
