"""The proof must be able to fail: every fault planted in the hand-written side is caught, at its own level."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from plainlora.data import encoding
from plainlora.lora import inject, interchange, load, merge
from plainlora.lora.record import lora_layers
from plainlora.parity.case import Case
from plainlora.parity.compare import compare
from plainlora.parity.observe import LEVELS
from plainlora.parity.suite import built_in_cases
from plainlora.parity.tiny import quiet_models

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_models():
        yield


def case(name: str = "GPT-2, Conv1D") -> Case:
    return next(case for case in built_in_cases(steps=3) if case.name == name)


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
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.p, training=True)

    after_injection(patch, each_layer(lambda layer: setattr(layer, "lora_dropout", Always(0.1))))


def bias_trained(patch: Patch) -> None:
    after_injection(patch, each_layer(lambda layer: layer.base_layer.bias.requires_grad_(True)))


def layer_missed(patch: Patch) -> None:
    def take_one_out(model: nn.Module) -> None:
        name, layer = list(lora_layers(model))[-1]
        model.set_submodule(name, layer.base_layer)

    after_injection(patch, take_one_out)


def merged_twice(patch: Patch) -> None:
    original = merge.storage.merged_weight
    patch.setattr(merge.storage, "merged_weight", lambda module, delta: original(module, 2 * delta))


def spoiled_file(patch: Patch, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    original = interchange.save_file
    patch.setattr(interchange, "save_file", lambda state, path, metadata: original(change(state), path, metadata))


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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_at_its_own_level(fault: str, monkeypatch: Patch) -> None:
    plant, level = FAULTS[fault]
    plant(monkeypatch)
    verdicts = compare(case()).verdicts
    failed = [verdict.level for verdict in verdicts if verdict.status == "fail"]
    assert failed, "the fault went unnoticed"
    assert failed[0] == level
    assert next(verdict for verdict in verdicts if verdict.level == level).reason


def test_without_a_fault_the_same_case_holds_to_the_last_bit() -> None:
    verdicts = compare(case()).verdicts
    assert [verdict.level for verdict in verdicts] == list(LEVELS)
    assert all(verdict.status == "pass" and verdict.identical for verdict in verdicts)


@pytest.mark.parametrize("fault", [scaling_off, layer_missed])
def test_a_fault_is_caught_on_a_quantised_base_too(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert any(verdict.status == "fail" for verdict in compare(case("Llama, NF4")).verdicts)


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
    from plainlora.training import AdapterTrainer

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
    patch.setattr(merge, "restore_identity", lambda model, record: None)


MORE_FAULTS = {
    "a bias saved under another layer": (bias_from_another_layer, "GPT-2, patterns, rsLoRA, biases", "files"),
    "the untrained head saved": (original_head_saved, "Llama, head trained whole", "files"),
    "scaling doubled by loading": (scaling_doubled_by_loading, "GPT-2, Conv1D", "files"),
    "a frozen weight moved": (frozen_weight_moved, "GPT-2, Conv1D", "trajectory"),
    "another prompt trained": (another_prompt, "GPT-2, Conv1D", "trajectory"),
    "an adapter's save_pretrained left after merging": (identity_kept_after_merging, "GPT-2, Conv1D", "merge"),
}


@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_a_subtler_fault_is_caught_too(fault: str, monkeypatch: Patch) -> None:
    plant, name, level = MORE_FAULTS[fault]
    plant(monkeypatch)
    verdicts = compare(case(name)).verdicts
    assert [verdict.level for verdict in verdicts if verdict.status == "fail"][:1] == [level]
