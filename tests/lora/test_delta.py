"""The deltas of a saved adapter: PEFT's own, and what is measured of them is what a dense SVD in fp64 measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from plainlora.lora.delta import Delta, add_factors, concatenate, read_deltas
from plainlora.lora.errors import LoRAError
from tests.conftest import make_model
from tests.lora.oracle import deltas_by_peft, save_peft_adapter

TENSORS = "adapter_model.safetensors"


def random_delta(d_out: int, d_in: int, r: int, scaling: float = 1.7, dtype: torch.dtype = torch.float32) -> Delta:
    return Delta(torch.randn(r, d_in, dtype=dtype), torch.randn(d_out, r, dtype=dtype), scaling)


def dense(delta: Delta) -> torch.Tensor:
    return delta.scaling * delta.lora_B.double() @ delta.lora_A.double()


@pytest.mark.parametrize("scaling", [1.7, -0.4])
@pytest.mark.parametrize("shape", [(40, 24, 3), (24, 40, 8), (6, 50, 12), (50, 6, 12), (5, 5, 9), (7, 9, 1)])
def test_norm_rank_and_cosine_are_those_of_the_dense_product(shape: tuple[int, int, int], scaling: float) -> None:
    delta, other = random_delta(*shape, scaling), random_delta(*shape[:2], r=2)
    product, theirs = dense(delta), dense(other)
    values = torch.linalg.svdvals(product)
    found = delta.singular_values
    torch.testing.assert_close(found, values[: len(found)], rtol=1e-12, atol=1e-12 * float(values[0]))
    assert float(values[len(found) :].sum()) <= 1e-12 * float(values[0])
    assert delta.norm == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-12)
    cosine = float((product * theirs).sum() / (product.norm() * theirs.norm()))
    assert delta.cosine(other) == pytest.approx(cosine, abs=1e-12)
    assert delta.cosine(delta) == pytest.approx(1, abs=1e-12)
    shares = values.square().cumsum(0) / values.square().sum()
    assert delta.used_rank == next(number for number, share in enumerate(shares, 1) if share >= 0.99)


def test_the_rank_used_is_the_number_of_directions_that_matter() -> None:
    basis = torch.linalg.qr(torch.randn(30, 30)).Q
    for sizes, used in (([1.0], 1), ([1.0, 1.0, 1.0], 3), ([1.0, 0.05], 1), ([1.0, 0.2], 2), ([1.0, 0.0, 0.0], 1)):
        r = len(sizes)
        assert Delta(torch.diag(torch.tensor(sizes)) @ basis[:r], basis[:, :r], 3.0).used_rank == used
    nothing = Delta(torch.randn(4, 9), torch.zeros(5, 4), 2.0)
    assert (nothing.norm, nothing.used_rank, nothing.cosine(nothing)) == (0, 0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_concatenated_deltas_are_the_weighted_sum_and_added_factors_are_not(dtype: torch.dtype) -> None:
    deltas, weights = [random_delta(20, 30, 4, s) for s in (2.0, 0.5)], [0.7, -1.3]
    wanted = sum(weight * dense(delta) for delta, weight in zip(deltas, weights, strict=True))
    exact = concatenate(deltas, weights, dtype)
    assert exact.r == 8
    torch.testing.assert_close(
        dense(exact), wanted, rtol=0, atol=(3e-7 if dtype == torch.float32 else 1e-14) * wanted.norm()
    )
    assert (dense(add_factors(deltas, weights, dtype)) - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {"r": 2, "rank_pattern": {"0..*": 5}, "alpha_pattern": {"1..*": 3}},
    ],
)
def test_they_are_pefts(kind: str, settings: dict[str, Any], tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    layers = {"gpt2": "h", "llama": "layers"}[kind]
    patterns = {
        name: {f"{layers}.{key}": each for key, each in value.items()}
        for name, value in settings.items()
        if isinstance(value, dict)
    }
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs[kind], kind, **settings | patterns)
    deltas, others = read_deltas(adapter)
    theirs = deltas_by_peft(kind, adapter)
    assert deltas.keys() == theirs.keys()
    assert others == []
    for module, delta in deltas.items():
        torch.testing.assert_close(dense(delta), theirs[module], rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"init_lora_weights": "mica"}, {"velora_config": {"num_groups": 16}}])
def test_mica_and_velora_add_the_product_and_nothing_else(
    kind: str, settings: dict[str, Any], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[kind]
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs[kind], kind, target_modules=targets, **settings)
    deltas, others = read_deltas(adapter)
    assert others == []
    theirs = PeftModel.from_pretrained(make_model(kind), adapter, is_trainable=True).double().base_model.model
    for module, delta in deltas.items():
        layer = theirs.get_submodule(module)
        rows = torch.randn(2, 3, delta.shape[1], dtype=torch.float64)
        for mode in (True, False):
            added = layer.train(mode)(rows) - layer.base_layer(rows)
            torch.testing.assert_close(added, rows @ dense(delta).T, rtol=1e-10, atol=1e-12)
            assert float(added.detach().norm()) > 1


def test_what_was_trained_beside_them_is_named_and_layers_come_in_their_order(
    tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = save_peft_adapter(
        tmp_path / "adapter",
        model_dirs["gpt2"],
        "gpt2",
        target_modules=["c_attn"],
        bias="lora_only",
        modules_to_save=["ln_f"],
    )
    deltas, others = read_deltas(adapter)
    assert list(deltas) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert set(others) == {
        *("transformer.ln_f.weight", "transformer.ln_f.bias"),
        *(f"transformer.h.{layer}.attn.c_attn.base_layer.bias" for layer in (0, 1)),
    }
    tensors = load_file(f"{adapter}/{TENSORS}")
    tensors |= {name.replace("h.1", "h.10"): value.clone() for name, value in tensors.items() if "h.1" in name}
    save_file(tensors, f"{adapter}/{TENSORS}")
    assert [name.split(".")[2] for name in read_deltas(adapter)[0]] == ["0", "1", "10"]


def change_config(adapter: str, **fields: Any) -> None:
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensor(adapter: str, end: str, value: Any) -> None:
    tensors = load_file(f"{adapter}/{TENSORS}")
    name = next(name for name in tensors if name.endswith(end))
    tensors[name] = value(tensors[name])
    save_file(tensors, f"{adapter}/{TENSORS}")


def test_what_is_no_plain_product_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"])

    def refused(said: str) -> None:
        with pytest.raises(LoRAError, match=said):
            read_deltas(adapter)

    change_config(adapter, use_dora=True)
    refused("was trained with use_dora=True, so it may add more than")
    change_config(adapter, use_dora=False, r=5)
    refused(r"has A \(4, 128\) and B \(64, 4\), which do not fit its config's rank 5")
    change_config(adapter, r=4, lora_alpha=float("nan"))
    refused("lora_alpha must be a finite number")
    change_config(adapter, lora_alpha=4)
    whole = (Path(adapter) / TENSORS).read_bytes()
    for change, said in (
        (lambda value: value * torch.inf, "not finite numbers"),
        (lambda value: value.to(torch.int8), "not finite numbers"),
        (lambda value: value[0], "do not fit"),
        (lambda value: value[:, :3].contiguous(), "do not fit"),
    ):
        change_tensor(adapter, "lora_B.weight", change)
        refused(said)
        (Path(adapter) / TENSORS).write_bytes(whole)
    save_file({}, f"{adapter}/{TENSORS}")
    refused("holds no lora_A and lora_B")
    (Path(adapter) / TENSORS).write_bytes(b"cut")
    refused("corrupt or cut short")
    embedding = get_peft_model(make_model("llama"), LoraConfig(target_modules=["embed_tokens"]))
    embedding.save_pretrained(tmp_path / "embedding")
    adapter = str(tmp_path / "embedding")
    refused("holds no lora_A and lora_B of a linear layer")
