"""The proof must be able to fail: every fault planted in the hand-written side is caught, at its own level."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PhiConfig, PreTrainedModel

from plainlora.data import encoding
from plainlora.fast import fuse as fusing
from plainlora.fast import head as loss
from plainlora.fast import loss_head
from plainlora.lora import inject, interchange, load, merge
from plainlora.lora.record import lora_layers
from plainlora.parity.case import FORMS, Case
from plainlora.parity.compare import compare
from plainlora.parity.observe import LEVELS
from plainlora.parity.suite import built_in_cases
from plainlora.parity.tiny import VOCABULARY, quiet_models, random_model

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_models():
        yield


def case(form: str, name: str = "GPT-2, Conv1D") -> Case:
    return replace(next(case for case in built_in_cases(steps=3) if case.name == name), lora_backend=form)


def failed_levels(of: Case) -> list[str]:
    return [verdict.level for verdict in compare(of).verdicts if verdict.status == "fail"]


def after_injection(patch: Patch, change: Callable[[nn.Module], None]) -> None:
    """Lets `inject` finish, then spoils the model."""
    original = inject.inject

    def spoiled(model: Any, config: Any, **options: Any) -> Any:
        model = original(model, config, **options)
        change(model)
        return model

    patch.setattr(inject, "inject", spoiled)
    patch.setattr(load, "inject", spoiled)


def each_layer(change: Callable[[Any], None]) -> Callable[[nn.Module], None]:
    return lambda model: [change(layer) for _, layer in lora_layers(model)] and None


def scaling_off(patch: Patch) -> None:
    after_injection(patch, each_layer(lambda layer: setattr(layer, "scaling", layer.scaling * 1.01)))


def scaling_by_the_root(patch: Patch) -> None:
    after_injection(patch, each_layer(lambda layer: setattr(layer, "scaling", 6 / math.sqrt(layer.r))))


def transposed_start(patch: Patch) -> None:
    @torch.no_grad()
    def transpose(layer: Any) -> None:
        for weight in (layer.lora_A.weight, layer.lora_B.weight):
            weight.copy_(weight.T.reshape(weight.shape))

    after_injection(patch, each_layer(transpose))


def dropout_skipped(patch: Patch) -> None:
    after_injection(patch, each_layer(lambda layer: setattr(layer, "lora_dropout", nn.Identity())))


def dropout_at_evaluation(patch: Patch) -> None:
    class Always(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    after_injection(patch, each_layer(lambda layer: setattr(layer, "lora_dropout", Always(0.1))))


def bias_trained(patch: Patch) -> None:
    after_injection(patch, each_layer(lambda layer: layer.base_layer.bias.requires_grad_(True)))


def layer_missed(patch: Patch) -> None:
    def take_one_out(model: nn.Module) -> None:
        name, layer = list(lora_layers(model))[-1]
        model.set_submodule(name, layer.base_layer)

    after_injection(patch, take_one_out)


def merged_twice(patch: Patch) -> None:
    original = merge.merge

    @torch.no_grad()
    def merged(model: Any) -> Any:
        for _, layer in lora_layers(model):
            layer.lora_B.weight.mul_(2)
        return original(model)

    patch.setattr(merge, "merge", merged)


def spoiled_file(patch: Patch, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    original = interchange.save_adapter

    def save(model: nn.Module, directory: Path) -> None:
        original(model, directory)
        path = directory / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    patch.setattr(interchange, "save_adapter", save)


def key_renamed(patch: Patch) -> None:
    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = min(state)
        return {(key.replace("lora_A", "lora_a") if key == first else key): value for key, value in state.items()}

    spoiled_file(patch, rename)


def saved_in_half(patch: Patch) -> None:
    spoiled_file(patch, lambda state: {key: value.half() for key, value in state.items()})


def eos_dropped(patch: Patch) -> None:
    original = encoding.Encoder.__call__

    def encode(self: encoding.Encoder, row: dict[str, Any]) -> dict[str, Any]:
        encoded = original(self, row)
        if row["output"] == "yes":
            encoded |= {name: encoded[name][:-1] for name in ("input_ids", "labels")}
        return encoded

    patch.setattr(encoding.Encoder, "__call__", encode)


FAULTS = {
    "scaling off by 1 %": (scaling_off, "forward"),
    "alpha/r swapped with alpha/sqrt(r)": (scaling_by_the_root, "forward"),
    "A and B transposed": (transposed_start, "init"),
    "dropout skipped": (dropout_skipped, "dropout"),
    "dropout at evaluation": (dropout_at_evaluation, "forward"),
    "a bias trained that should be frozen": (bias_trained, "gradients"),
    "one target layer missed": (layer_missed, "init"),
    "a delta merged twice": (merged_twice, "merge"),
    "a saved key renamed": (key_renamed, "files"),
    "an fp32 adapter saved as fp16": (saved_in_half, "files"),
    "EOS dropped from one row": (eos_dropped, "trajectory"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_at_its_own_level(fault: str, form: str, monkeypatch: Patch) -> None:
    plant, level = FAULTS[fault]
    plant(monkeypatch)
    verdicts = compare(case(form)).verdicts
    failed = [verdict.level for verdict in verdicts if verdict.status == "fail"]
    assert failed, "the fault went unnoticed"
    assert failed[0] == level
    assert next(verdict for verdict in verdicts if verdict.level == level).reason


@pytest.mark.parametrize("form", FORMS)
def test_without_a_fault_the_same_case_holds(form: str) -> None:
    verdicts = compare(case(form)).verdicts
    assert [verdict.level for verdict in verdicts] == list(LEVELS)
    assert all(verdict.status == "pass" for verdict in verdicts)
    assert form == "fused" or all(verdict.identical for verdict in verdicts if verdict.level != "merge")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [scaling_off, layer_missed])
def test_a_fault_is_caught_on_a_quantised_base_too(
    fault: Callable[[Patch], None], form: str, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    assert failed_levels(case(form, "Llama, NF4"))


def bias_from_another_layer(patch: Patch) -> None:
    def swap(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = sorted(name for name in state if name.endswith("c_fc.base_layer.bias"))
        return state | dict(zip(names, [state[name] for name in reversed(names)], strict=True))

    spoiled_file(patch, swap)


def original_head_saved(patch: Patch) -> None:
    original = interchange.adapter_state_dict

    def state(model: nn.Module) -> dict[str, torch.Tensor]:
        found = original(model)
        for name, module in interchange.saved_modules(model):
            found[f"base_model.model.{name}.weight"] = module.original_module.weight.detach()
        return found

    patch.setattr(interchange, "save_adapter", lambda model, path: saved_with(model, path, state))


def saved_with(model: nn.Module, path: Any, state: Callable[[nn.Module], dict[str, torch.Tensor]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interchange, "adapter_state_dict", state)
        REAL_SAVE(model, path)


REAL_SAVE = interchange.save_adapter


def scaling_doubled_by_loading(patch: Patch) -> None:
    original = load.load_adapter

    def loaded(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        for _, layer in lora_layers(model):
            layer.scaling *= 2
        return model

    patch.setattr(load, "load_adapter", loaded)


def frozen_weight_moved(patch: Patch) -> None:
    from plainlora.training.trainers import AdapterTrainer

    original = AdapterTrainer.train

    def train(self: Any, *arguments: Any, **options: Any) -> Any:
        outcome = original(self, *arguments, **options)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data.mul_(1.5)
        return outcome

    patch.setattr(AdapterTrainer, "train", train)


def another_prompt(patch: Patch) -> None:
    original = encoding.split_row

    def split(row: dict[str, Any], schema: Any) -> Any:
        _, answer = original(row, schema)
        return [{"role": "user", "content": "WRONG"}], answer

    patch.setattr(encoding, "split_row", split)


def identity_kept_after_merging(patch: Patch) -> None:
    patch.setattr(merge, "restore_attributes", lambda model, record: None)


MORE_FAULTS = {
    "a bias saved under another layer": (bias_from_another_layer, "GPT-2, patterns, rsLoRA, biases", "files"),
    "the untrained head saved": (original_head_saved, "Llama, head trained whole", "files"),
    "scaling doubled by loading": (scaling_doubled_by_loading, "GPT-2, Conv1D", "files"),
    "a frozen weight moved": (frozen_weight_moved, "GPT-2, Conv1D", "trajectory"),
    "another prompt trained": (another_prompt, "GPT-2, Conv1D", "trajectory"),
    "an adapter's save_pretrained left after merging": (identity_kept_after_merging, "GPT-2, Conv1D", "merge"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_a_subtler_fault_is_caught_too(fault: str, form: str, monkeypatch: Patch) -> None:
    plant, name, level = MORE_FAULTS[fault]
    plant(monkeypatch)
    assert failed_levels(case(form, name))[:1] == [level]


# Faults of the fused form alone. What it computes is taken from the function itself; a path of the way back is cut, or
# added, around it, so that none of these depends on how the function is written.

Fused = Callable[..., torch.Tensor]


def spoiled_map(patch: Patch, change: Callable[..., torch.Tensor]) -> None:
    original = fusing.fused_forward

    def spoiled(base: nn.Module, x: Any, lora_a: Any, lora_b: Any, scaling: float, p: float = 0.0) -> torch.Tensor:
        return change(original, base, x, lora_a, lora_b, scaling, p)

    patch.setattr(fusing, "fused_forward", spoiled)


def silent(value: torch.Tensor) -> torch.Tensor:
    """Zero on the way there, the whole gradient on the way back."""
    return value - value.detach()


def fused_scale_off(patch: Patch) -> None:
    spoiled_map(patch, lambda form, base, x, a, b, s, p: form(base, x, a, b, s * 1.01, p))


def kept_elements_not_scaled_up(patch: Patch) -> None:
    spoiled_map(patch, lambda form, base, x, a, b, s, p: form(base, x, a, b, s * (1 - p), p))


def another_random_stream(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        torch.rand(1)
        return form(base, x, a, b, s, p)

    spoiled_map(patch, change)


def dx_without_the_low_rank_part(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        return form(base, x.detach(), a, b, s, p) + silent(base(x))

    spoiled_map(patch, change)


def dx_without_the_mask(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        low_rank = x @ a.detach().T @ b.detach().T * (s / (1 - p))
        return form(base, x.detach(), a, b, s, p) + silent(base(x) + low_rank)

    spoiled_map(patch, change)


def da_without_the_mask(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        low_rank = x.detach() @ a.T @ b.detach().T * (s / (1 - p))
        return form(base, x, a.detach(), b, s, p) + silent(low_rank)

    spoiled_map(patch, change)


def db_without_scaling(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        return form(base, x, a, b.detach() + silent(b / s), s, p)

    spoiled_map(patch, change)


def no_gradient_of_the_bias(patch: Patch) -> None:
    def change(form: Fused, base: Any, x: Any, a: Any, b: Any, s: float, p: float) -> torch.Tensor:
        base.bias.requires_grad_(False)
        h = form(base, x, a, b, s, p)
        base.bias.requires_grad_(True)
        return h

    spoiled_map(patch, change)


def spoiled_head(patch: Patch, change: Callable[..., Any]) -> None:
    """`change(forward, arguments)` takes the place of the forward pass of a model with the one-pass head."""
    original = loss_head.LossHead._forward

    def spoiled(head: Any, model: Any, *args: Any, **given: Any) -> Any:
        if head.form != "one pass":
            return original(head, model, *args, **given)
        return change(lambda **options: original(head, model, *args, **options), given)

    patch.setattr(loss_head.LossHead, "_forward", spoiled)


def head_counts_masked_tokens(patch: Patch) -> None:
    spoiled_head(patch, lambda forward, given: forward(**given | {"labels": given["labels"].clamp(min=0)}))


def head_does_not_divide(patch: Patch) -> None:
    spoiled_head(patch, lambda forward, given: forward(**given | {"num_items_in_batch": torch.tensor(1)}))


def spoiled_log_probs(patch: Patch, change: Callable[..., torch.Tensor]) -> None:
    original = loss.TokenLogProbs.apply
    patch.setattr(loss.TokenLogProbs, "apply", lambda *arguments: change(original, *arguments))


def head_without_its_bias(patch: Patch) -> None:
    spoiled_log_probs(patch, lambda form, hidden, labels, weight, _, *rest: form(hidden, labels, weight, None, *rest))


def head_without_the_labels_row(patch: Patch) -> None:
    """d log p / dh = -softmax(z) W, where W[y] is missing."""

    def change(form: Any, hidden: Any, labels: Any, weight: Any, *rest: Any) -> Any:
        return form(hidden, labels, weight, *rest) - silent((hidden * weight[labels]).sum(-1))

    spoiled_log_probs(patch, change)


def entropy_in_bits(patch: Patch) -> None:
    def change(form: Any, hidden: Any, labels: Any, weight: Any, bias: Any, statistics: Any, *rest: Any) -> Any:
        found = form(hidden, labels, weight, bias, statistics, *rest)
        statistics[0] /= math.log(2)
        return found

    spoiled_log_probs(patch, change)


def accuracy_of_the_next_token(patch: Patch) -> None:
    def change(form: Any, hidden: Any, labels: Any, weight: Any, bias: Any, statistics: Any, *rest: Any) -> Any:
        found = form(hidden, labels, weight, bias, statistics, *rest)
        statistics[1] = ((hidden @ weight.T).argmax(-1) == labels.roll(1)).to(statistics.dtype)
        return found

    spoiled_log_probs(patch, change)


FUSED_FAULTS = {
    "scaling off by 1 %": (fused_scale_off, "GPT-2, Conv1D", "forward"),
    "what is kept not divided by 1 - p": (kept_elements_not_scaled_up, "GPT-2, Conv1D", "dropout"),
    "the mask drawn from elsewhere in the stream": (another_random_stream, "GPT-2, Conv1D", "dropout"),
    "dx without s B A": (dx_without_the_low_rank_part, "GPT-2, Conv1D", "gradients"),
    "dB without scaling": (db_without_scaling, "Llama, nn.Linear", "gradients"),
    "no gradient of a trained bias": (no_gradient_of_the_bias, "GPT-2, patterns, rsLoRA, biases", "gradients"),
    "dx without the mask": (dx_without_the_mask, "Llama, nn.Linear", "dropout"),
    "dA without the mask": (da_without_the_mask, "GPT-2, Conv1D", "dropout"),
    "masked tokens in the loss": (head_counts_masked_tokens, "GPT-2, Conv1D", "trajectory"),
    "the loss not divided by the tokens": (head_does_not_divide, "GPT-2, Conv1D", "trajectory"),
    "the label's own row missing from the head's gradient": (
        head_without_the_labels_row,
        "GPT-2, Conv1D",
        "trajectory",
    ),
    "entropy in bits": (entropy_in_bits, "GPT-2, Conv1D", "trajectory"),
    "accuracy against the wrong tokens": (accuracy_of_the_next_token, "GPT-2, Conv1D", "trajectory"),
}


@pytest.mark.parametrize("fault", FUSED_FAULTS)
def test_a_fault_of_the_fused_form_is_caught_at_its_own_level(fault: str, monkeypatch: Patch) -> None:
    plant, name, level = FUSED_FAULTS[fault]
    plant(monkeypatch)
    assert failed_levels(case("fused", name))[:1] == [level]
    assert failed_levels(case("reference", name)) == [], "the fault is not one of the fused form alone"


def phi() -> PreTrainedModel:
    """A decoder whose head has a bias."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = random_model(PhiConfig(**sizes, vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=1))
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    return model


def test_a_head_that_forgets_its_bias_is_not_used(monkeypatch: Patch) -> None:
    with_bias = replace(case("fused", "Qwen2, PEFT's targets"), make_base=phi)
    head_without_its_bias(monkeypatch)
    assert failed_levels(with_bias) == []  # the run compares it with the model's own loss, and takes TRL's
    monkeypatch.setattr(loss_head.OwnLoss, "differs", lambda *_: 0.0)
    assert failed_levels(with_bias) == ["trajectory"]
