"""The worked examples of `docs/extend.md` run, and do what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from plainlora import fuse, inject, load_adapter, merge, save_adapter
from plainlora.lora.interchange import adapter_state_dict
from plainlora.lora.record import lora_layers
from tests.conftest import ROOT, make_model, random_ids

PAGE = (ROOT / "docs" / "extend.md").read_text()
DPO, VARIANT = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def run(script: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(script, names)
    return names


def test_preference_tuning_is_trls_own_script_and_one_line(
    tmp_path: Path, model_dirs: dict[str, Path], capsys: Any
) -> None:
    assert len(DPO.splitlines()) <= 40
    names = run(DPO)
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n + 2}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = names["train"](
        str(model_dirs["llama"]), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), max_steps=2, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    assert "fused: 14 LoRA layers, 2 SwiGLU" in capsys.readouterr().out
    assert trainer.state.global_step == 2
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "out"))
    trained = dict(trainer.model.named_parameters())
    weights = {name: value for name, value in loaded.named_parameters() if "lora_B" in name}
    assert len(weights) == 14
    for name, value in weights.items():
        assert value.abs().max() > 0
        assert value.equal(trained[name])


def moved(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in sorted(tensors.items()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_variant_is_what_its_equation_says(tmp_path: Path) -> None:
    layer_class = run(VARIANT)["LoRAWithStrength"]
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    model = inject(make_model("llama"), config, layer_class=layer_class)
    tensors = adapter_state_dict(model)
    assert sum("lora_strength" in name for name in tensors) == len(tensors) // 3
    model.train()(input_ids=random_ids(), labels=random_ids()).loss.backward()
    for name, layer in lora_layers(model):
        assert all(value.grad is not None for value in layer.adapter_tensors().values()), name
    moved(tensors)
    name, layer = next(iter(lora_layers(model)))
    w0, a, b = (each.detach().double() for each in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    expected = w0 + float(layer.lora_strength) * layer.scaling * b @ a
    logits = model.eval()(input_ids=random_ids()).logits.detach()
    save_adapter(model, tmp_path)
    loaded = load_adapter(make_model("llama"), tmp_path, layer_class=layer_class)
    assert torch.equal(loaded(input_ids=random_ids()).logits, logits)
    assert fuse(loaded).unchanged == [name for name, _ in lora_layers(loaded)]
    merged = merge(model)
    assert relative(merged(input_ids=random_ids()).logits, logits) < 1e-5
    assert torch.allclose(merged.get_submodule(name).weight.double(), expected, rtol=0, atol=1e-6)
