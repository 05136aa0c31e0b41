"""The worked examples of `docs/extend.md` run, and do what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from plainlora import fuse, inject, load_adapter, merge, save_adapter
from plainlora.lora.interchange import adapter_state_dict
from plainlora.lora.record import lora_layers
from tests.conftest import ROOT, make_model, random_ids

PAGE = (ROOT / "docs" / "extend.md").read_text()
DPO, DORA = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


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


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_variant_is_pefts_dora(kind: str, dropout: float, tmp_path: Path) -> None:
    layer_class = run(DORA)["DoRALinear"]
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": dropout,
    }  # fmt: skip
    torch.manual_seed(0)
    ours = inject(make_model(kind), LoraConfig(**options), layer_class=layer_class)
    torch.manual_seed(0)
    theirs = get_peft_model(make_model(kind), LoraConfig(**options, use_dora=True))
    own, expected = adapter_state_dict(ours), get_peft_model_state_dict(theirs)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    assert sum("lora_magnitude_vector" in name for name in own) == len(own) // 3

    moved(own)
    moved(expected)  # the model's own tensors
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        output = model.train()(input_ids=random_ids(), labels=random_ids())
        output.loss.backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        added = r"base_model\.model\.|\.default|\.weight"  # by PEFT
        gradients.append({re.sub(added, "", name): gradient for name, gradient in found.items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == len(own)
    for name, grad in gradients[0].items():
        assert relative(grad, gradients[1][name]) < 1e-5, name

    ours.eval()
    theirs.eval()
    logits = ours(input_ids=random_ids()).logits.detach()
    assert relative(logits, theirs(input_ids=random_ids()).logits) < 1e-5
    assert relative(logits, make_model(kind)(input_ids=random_ids()).logits) > 1e-2
    save_adapter(ours, tmp_path)
    loaded = load_adapter(make_model(kind), tmp_path, layer_class=layer_class)
    assert torch.equal(loaded(input_ids=random_ids()).logits, logits)
    assert fuse(loaded).unchanged == [name for name, _ in lora_layers(loaded)]
    merged, by_peft = merge(ours), theirs.merge_and_unload()
    assert relative(merged(input_ids=random_ids()).logits, logits) < 1e-5
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, by_peft.state_dict()[name], rtol=0, atol=1e-6), name
