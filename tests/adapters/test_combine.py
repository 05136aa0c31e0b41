"""One adapter of several: the weighted sum of their deltas in fp64, or PEFT's own `linear`; in PEFT's files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plainlora import load_adapter
from plainlora.adapters.combine import combine_adapters
from plainlora.base.identity import describe_base
from plainlora.commands import main
from plainlora.folders import find_damage, sha256_of
from plainlora.hub.publication import collect_publication
from plainlora.merging.merge import merge_adapter
from plainlora.run.adapter_base import find_base
from tests.adapters.test_shared_base import NF4, record
from tests.conftest import make_model, random_ids
from tests.lora.oracle import deltas_by_peft, save_peft_adapter
from tests.lora.test_delta import change_config
from tests.refusals import Run

WEIGHTS = [0.7, -1.3]
ONE = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
OTHER = {"llama": ["up_proj"], "gpt2": ["mlp.c_proj"]}
BLOCKS = {"llama": "layers", "gpt2": "h"}

# What two adapters of one base may differ in.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal": ({}, {}),
    "alphas": ({"lora_alpha": 3}, {"lora_alpha": 16}),
    "ranks": ({"r": 2}, {"r": 5}),
    "rslora": ({"lora_alpha": 5, "use_rslora": True}, {"lora_alpha": 5}),
    "patterns": ({"rank_pattern": {"0..*": 6}, "alpha_pattern": {"1..*": 3}}, {"r": 3}),
    "overlapping": ({"r": 2}, {"target_modules": ONE}),
    "disjoint": ({"target_modules": ONE, "r": 6}, {"target_modules": OTHER, "r": 2}),
    "different dropout": ({"lora_dropout": 0.5}, {"init_lora_weights": "gaussian"}),
}


def make_pair(kind: str, name: str, folder: Path, base: Path, scale: float = 0.3) -> list[str]:
    def resolved(field: str, value: Any) -> Any:
        if field.endswith("_pattern"):
            return {f"{BLOCKS[kind]}.{key}": each for key, each in value.items()}
        return value[kind] if field == "target_modules" else value

    return [
        save_peft_adapter(
            folder / f"parent{number}",
            base,
            kind,
            scale,
            **{field: resolved(field, value) for field, value in each.items()},
        )
        for number, each in enumerate(PAIRS[name])
    ]


def weighted_sum(kind: str, adapters: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, delta in deltas_by_peft(kind, adapter).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cat_is_the_weighted_sum_of_the_deltas(
    kind: str, name: str, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapters = make_pair(kind, name, tmp_path, model_dirs[kind])
    result = combine_adapters(adapters, WEIGHTS, tmp_path / "out")
    found, wanted = deltas_by_peft(kind, str(tmp_path / "out")), weighted_sum(kind, adapters, WEIGHTS)
    assert found.keys() == wanted.keys()
    worst = max(float((found[module] - wanted[module]).norm() / wanted[module].norm()) for module in wanted)
    assert worst < 1e-7  # A is rounded once to fp32
    assert result.deviation <= 1e-7
    assert result.modules == len(wanted)

    by_hand = make_model(kind, torch.float64)
    for module, delta in wanted.items():
        weight = by_hand.get_submodule(module).weight
        weight.data += delta.T if kind == "gpt2" else delta
    theirs = PeftModel.from_pretrained(make_model(kind), tmp_path / "out").eval()
    ours = load_adapter(make_model(kind), tmp_path / "out")
    in_fp64 = load_adapter(make_model(kind, torch.float64), tmp_path / "out")
    with torch.no_grad():
        logits = [model(input_ids=random_ids()).logits for model in (theirs, ours, in_fp64, by_hand)]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[3], rtol=0, atol=1e-5 * float(logits[3].abs().max()))


@pytest.mark.parametrize("combination", ["linear", "cat"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["equal", "alphas", "different dropout"])
def test_both_are_pefts_add_weighted_adapter(
    name: str, kind: str, combination: Any, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapters = make_pair(kind, name, tmp_path, model_dirs[kind])
    result = combine_adapters(adapters, WEIGHTS, tmp_path / "out", combination)
    model = PeftModel.from_pretrained(make_model(kind), adapters[0], adapter_name="0")
    model.load_adapter(adapters[1], "1")
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "mixed", combination)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(found) == 2 * len(layers)
    for module, layer in layers.items():
        assert layer.scaling["mixed"] == 1
        for letter in ("lora_A", "lora_B"):
            theirs = getattr(layer, letter)["mixed"].weight
            torch.testing.assert_close(found[f"{module}.{letter}.weight"], theirs, rtol=1e-6, atol=1e-7)
    assert (result.deviation > 0.3) == (combination == "linear")


@pytest.mark.parametrize("name", ["alphas", "rslora", "disjoint"])
def test_linear_is_its_definition_in_fp64_and_says_how_far_from_the_sum_it_is(
    name: str, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapters = make_pair("llama", name, tmp_path, model_dirs["llama"])
    result = combine_adapters(adapters, WEIGHTS, tmp_path / "out", "linear")
    found = deltas_by_peft("llama", str(tmp_path / "out"))
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    norms: dict[str, float] = {}
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for module, layer in PeftModel.from_pretrained(make_model("llama"), adapter).base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
                scale = weight * layer.scaling["default"]
                before = sums.get(module, (torch.zeros_like(b), torch.zeros_like(a)))
                root = math.sqrt(abs(scale))
                sums[module] = (before[0] + root * b, before[1] + math.copysign(root, scale) * a)
                norms[module] = norms.get(module, 0.0) + abs(scale) * float((b @ a).norm())
    exact, deviation = weighted_sum("llama", adapters, WEIGHTS), 0.0
    for module, (b, a) in sums.items():
        torch.testing.assert_close(found[module], (b @ a).detach(), rtol=1e-5, atol=1e-6)
        deviation = max(deviation, float((found[module] - exact[module]).norm()) / norms[module])
    assert result.deviation == pytest.approx(deviation, rel=1e-6, abs=1e-9)
    assert (deviation > 0.3) == (name != "disjoint")  # where no module has two adapters there are no cross terms


def test_three_adapters_of_several_precisions(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    adapters, weights = [], [1.0, 0.25, -2.0]
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        folder = save_peft_adapter(tmp_path / f"parent{number}", model_dirs["llama"], r=number + 1)
        model = PeftModel.from_pretrained(make_model("llama"), folder)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        adapters.append(folder)
    combine_adapters(adapters, weights, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {6}
    wanted = weighted_sum("llama", adapters, weights)
    for module, delta in deltas_by_peft("llama", str(tmp_path / "out")).items():
        assert float((delta - wanted[module]).norm() / wanted[module].norm()) < 1e-7


@pytest.mark.integration
def test_the_folder_names_its_parents_and_serves_as_any_other_adapter(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapters = make_pair("llama", "ranks", tmp_path, model_dirs["llama"], scale=0.1)
    for adapter in adapters:
        record(adapter, model_dirs["llama"])
    command = ["merge", "--adapter", *adapters, "--output", str(tmp_path / "out"), "--weights"]
    main([*command, "0.5", "-2.5e-1"])
    said = capfd.readouterr().out
    assert said.startswith("2 adapters combined by cat: rank 7 in 14 modules, read again; from the weighted sum")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["combination"] == "cat"
    assert run["adapters"] == [
        {"folder": adapter, "weight": weight, "sha256": sha256_of(Path(adapter) / "adapter_model.safetensors")}
        for adapter, weight in zip(adapters, (0.5, -0.25), strict=True)
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| weight of {adapters[0]} | 0.5 |\n| weight of {adapters[1]} | -0.25 |" in card
    assert find_damage(tmp_path / "out") is None
    assert find_base(tmp_path / "out").trained_on == describe_base(str(model_dirs["llama"]))
    assert run["quantization_config"] is None

    published = collect_publication(tmp_path / "out", "somebody/base").files["README.md"]
    assert b"base_model: somebody/base" in bytes(published)  # type: ignore[arg-type]
    assert str(tmp_path).encode() not in bytes(published)  # type: ignore[arg-type]

    result = merge_adapter(tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = PeftModel.from_pretrained(make_model("llama"), tmp_path / "out").eval()
    with torch.no_grad():
        both = [model(input_ids=random_ids()).logits for model in (merged, theirs)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5 * float(both[1].abs().max()))
    assert 0 < result.relative_diff < 1e-5

    with pytest.raises(SystemExit):  # not without being asked
        main([*command, "1", "1"])
    for adapter in adapters:
        record(adapter, model_dirs["llama"], NF4)
    main([*command, "1", "1", "--overwrite"])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["adapters"][1]["weight"] == 1
    assert run["quantization_config"] == NF4


def test_bad_input_is_one_line_and_leaves_nothing(plainlora: Run, tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    one, other = make_pair("llama", "ranks", tmp_path, model_dirs["llama"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")

    def refused(*rest: str | Path, adapters: tuple[str | Path, ...] = (one, other), output: str | Path = "out") -> str:
        return plainlora("merge", "--adapter", *adapters, "--output", tmp_path / output, *rest)

    weights = ("--weights", "0.5", "0.5")
    assert "--weights is needed with 2 adapters" in refused()
    assert "2 adapters need 2 weights, and there are 1" in refused("--weights", "1")
    assert "2 adapters need 2 weights, and there are 3" in refused("--weights", "1", "1", "1")
    assert "nan is not a finite number" in refused("--weights", "1", "nan")
    assert "inf is not a finite number" in refused("--weights", "inf", "1")
    assert "-inf is not a finite number" in refused("--weights", "-inf", "1")
    assert "invalid float value: 'half'" in refused("--weights", "half", "1")
    assert "invalid choice: 'svd'" in refused(*weights, "--combination", "svd")
    assert "gone does not exist" in refused(*weights, adapters=(one, tmp_path / "gone"))
    assert "full has no adapter_config.json" in refused(*weights, adapters=(one, tmp_path / "full"))
    assert "is a whole model, not an adapter" in refused(*weights, adapters=(one, model_dirs["llama"]))
    assert "full already exists; give another --output" in refused(*weights, output="full")
    assert "full already exists; give another --output (it holds no comb" in refused(
        *weights, "--overwrite", output="full"
    )
    for output in ("parent0", "parent1/inside", "."):
        assert "is, holds or lies in the adapter" in refused(*weights, "--overwrite", output=output)
    assert "given twice" in refused(*weights, adapters=(one, one))
    assert "linear needs equal ranks; cat does not" in refused(*weights, "--combination", "linear")
    assert "values that are not finite; nothing was saved" in refused("--weights", "1e39", "1e39")
    for flags in (("--dtype", "float32"), ("--base", "dequantized"), ("--text", "file.txt")):
        assert f"{flags[0]} is for merging into the base" in refused(*weights, *flags)
    for flags in (weights, ("--combination", "cat")):
        assert f"{flags[0]} is for several adapters, and there is one" in refused(*flags, adapters=(one,))

    biased = save_peft_adapter(tmp_path / "biased", model_dirs["gpt2"], "gpt2", target_modules=["c_attn"], bias="all")
    whole = save_peft_adapter(tmp_path / "whole", model_dirs["gpt2"], "gpt2", modules_to_save=["ln_f"])
    for adapter, held in ((biased, ".bias"), (whole, "transformer.ln_f.")):
        said = refused(*weights, adapters=(adapter, whole if adapter == biased else biased))
        assert f"{adapter} also holds" in said
        assert held in said
        assert "which is no product of A and B" in said
    assert "share no base" in refused(*weights, adapters=(one, whole))

    change_config(other, alora_invocation_tokens=[1])
    assert "alora_invocation_tokens=[1]" in refused(*weights)
    change_config(other, alora_invocation_tokens=None)
    path = Path(other) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    assert "parent1/adapter_model.safetensors is corrupt or cut short" in refused(*weights)
