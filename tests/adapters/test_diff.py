"""What an adapter changes, layer by layer: as a dense SVD in fp64 has it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from plainlora.commands import main
from tests.adapters.test_combine import make_pair
from tests.conftest import make_model
from tests.lora.oracle import deltas_by_peft, save_peft_adapter
from tests.lora.test_delta import change_config
from tests.refusals import Run


@pytest.mark.parametrize("name", ["ranks", "rslora", "patterns", "overlapping"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_figure_is_that_of_the_dense_deltas(
    kind: str, name: str, tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapters = make_pair(kind, name, tmp_path, model_dirs[kind])
    main(["diff", *adapters, "--relative", "--output", str(tmp_path / "out")])
    shown = capfd.readouterr().out
    written = json.loads((tmp_path / "out" / "diff.json").read_text())
    dense = [deltas_by_peft(kind, adapter) for adapter in adapters]
    model = make_model(kind)
    assert written["modules"].keys() == dense[0].keys() | dense[1].keys()
    for module, found in written["modules"].items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{module} "))
        base = float(model.get_submodule(module).weight.double().norm())
        assert found["base_norm"] == pytest.approx(base, rel=1e-12)
        for deltas, size in zip(dense, found["adapters"], strict=True):
            if module not in deltas:
                assert size is None
                continue
            values = torch.linalg.svdvals(deltas[module])
            held = (values.square().cumsum(0) / values.square().sum()).tolist()
            assert size["used_rank"] == sum(share < 0.99 for share in held) + 1
            assert size["norm"] == pytest.approx(float(deltas[module].norm()), rel=1e-12)
            assert size["relative_norm"] == pytest.approx(size["norm"] / base, rel=1e-12)
            assert f"{size['used_rank']} of {size['r']}" in line
            assert f"{size['norm']:.4g}" in line
        both = [deltas[module] for deltas in dense if module in deltas]
        cosine = float((both[0] * both[1]).sum() / both[0].norm() / both[1].norm()) if len(both) > 1 else None
        assert found["cosine"] == (None if cosine is None else pytest.approx(cosine, abs=1e-12))
        assert line.endswith("-" if cosine is None else f"{cosine:.3f}")
    flat = [
        torch.cat(
            [deltas.get(name, torch.zeros_like((dense[0] | dense[1])[name])).flatten() for name in written["modules"]]
        )
        for deltas in dense
    ]
    assert [each["norm"] for each in written["adapters"]] == pytest.approx([float(each.norm()) for each in flat])
    assert written["cosine"] == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()), abs=1e-12)
    assert (tmp_path / "out" / "diff.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_alone_and_what_is_not_compared_is_named(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = save_peft_adapter(tmp_path / "one", model_dirs["gpt2"], "gpt2", modules_to_save=["ln_f"])
    main(["diff", adapter, "--output", str(tmp_path / "out")])
    shown = capfd.readouterr().out
    assert "cosine" not in shown
    assert f"{adapter} also holds transformer.ln_f.bias, transformer.ln_f.weight, which is not compared" in shown
    written = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert written["cosine"] is None
    assert len(written["adapters"][0]["not_compared"]) == 2
    norms = [found["adapters"][0]["norm"] for found in written["modules"].values()]
    assert written["adapters"][0]["norm"] == pytest.approx(math.hypot(*norms))
    assert (tmp_path / "out" / "diff.png").stat().st_size > 10_000


def test_an_adapter_that_adds_nothing(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    one = save_peft_adapter(tmp_path / "one", model_dirs["llama"])
    zero = save_peft_adapter(tmp_path / "zero", model_dirs["llama"], scale=0)
    main(["diff", one, zero, "--output", str(tmp_path / "out")])
    shown = capfd.readouterr().out.splitlines()
    assert shown[4].split()[-5:] == ["0", "of", "4", "0", "-"]
    assert json.loads((tmp_path / "out" / "diff.json").read_text())["cosine"] is None


def test_a_base_in_several_files_and_of_fewer_prefixes(
    tmp_path: Path, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = save_peft_adapter(tmp_path / "one", model_dirs["gpt2"], "gpt2")
    AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"]).save_pretrained(
        tmp_path / "sharded", max_shard_size="50KB"
    )
    AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"]).transformer.save_pretrained(tmp_path / "bare")
    printed = []
    for base in ("sharded", "bare"):
        main(["diff", adapter, "--relative", "--base_model", str(tmp_path / base)])
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1]
    assert "%" in printed[0]


def test_bad_input_is_one_line_and_leaves_nothing(plainlora: Run, tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    one, other = make_pair("llama", "disjoint", tmp_path, model_dirs["llama"])
    third = save_peft_adapter(tmp_path / "third", model_dirs["gpt2"], "gpt2")
    output = ("--output", tmp_path / "out")
    assert "change no module in common" in plainlora("diff", one, other, *output)
    assert "third was trained on" in plainlora("diff", one, third, *output)
    assert "parent0 is given twice" in plainlora("diff", one, one, *output)
    assert "diff compares two adapters, and there are 3" in plainlora("diff", one, other, third, *output)
    assert "--base_model is for --relative" in plainlora("diff", one, *output, "--base_model", model_dirs["llama"])
    assert "gone does not exist" in plainlora("diff", tmp_path / "gone", *output)
    assert "is a whole model, not an adapter" in plainlora("diff", model_dirs["llama"], *output)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "full already exists" in plainlora("diff", one, "--output", tmp_path / "full")
    assert "is a file; give a folder" in plainlora("diff", one, "--output", tmp_path / "full" / "notes.txt")
    for inside in (one, f"{one}/inside", tmp_path):
        assert "is, holds or lies in the adapter" in plainlora("diff", one, "--output", inside)
    assert "required: ADAPTER" in plainlora("diff")
    change_config(one, base_model_name_or_path=str(tmp_path / "moved"))
    assert "moved" in plainlora("diff", one, "--relative", *output)
    cut = shutil.copytree(model_dirs["llama"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"cut")
    said = plainlora("diff", one, "--relative", "--base_model", cut, *output)
    assert "cut/model.safetensors: its weights have no norm" in said
    change_config(one, lora_bias=True)
    assert "lora_bias=True" in plainlora("diff", one, *output)
    path = Path(other) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    assert "is corrupt or cut short" in plainlora("diff", other, *output)
