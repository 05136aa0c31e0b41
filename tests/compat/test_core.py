"""What `import plainlora` exports, with torch, transformers, peft, accelerate and safetensors alone, of any version.

`make compat` runs this file in environments of older and newer versions, so it imports nothing else of the tests.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from plainlora import disabled, fuse, inject, load_adapter, merge, save_adapter, unfuse, unwrap

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 258}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, **SPECIAL
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_head=2, n_layer=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL
    ),
}
NOT_EVERYWHERE = ("fcntl", "resource", "termios", "pwd", "grp")  # modules that Windows lacks
kinds = pytest.mark.parametrize("kind", CONFIGS)


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def config(**options: Any) -> LoraConfig:
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    return LoraConfig(**(given | options))


def ids() -> torch.Tensor:
    return torch.randint(3, 258, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """By our names; PEFT's have something before and in between."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name.replace("base_model.model.", "").replace(".default", ""): value for name, value in found.items()}


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Ours and PEFT's under one seed, then moved away from their start by the same values."""
    models = []
    for attach in (inject, get_peft_model):
        torch.manual_seed(1)
        models.append(attach(base(kind), config(**options)))
    for model in models:
        generator = torch.Generator().manual_seed(2)
        for _, value in sorted(trained(model).items()):
            value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    return models[0], models[1]


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss in training mode, and the gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model.train()(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in trained(model).items() if value.grad is not None}


@kinds
def test_start_losses_and_gradients_are_pefts_to_the_last_bit(kind: str) -> None:
    torch.manual_seed(1)
    start = trained(inject(base(kind), config()))
    torch.manual_seed(1)
    expected = trained(get_peft_model(base(kind), config()))
    assert start.keys() == expected.keys()
    assert all(torch.equal(start[name], expected[name]) for name in start)

    ours, theirs = pair(kind, lora_dropout=0.1)
    (loss, gradients), (their_loss, their_gradients) = step(ours), step(theirs)
    assert loss == their_loss
    assert gradients.keys() == their_gradients.keys() == start.keys()
    assert all(torch.equal(gradients[name], their_gradients[name]) for name in gradients)


@kinds
def test_fuse_changes_rounding_alone_in_ours_and_in_pefts(kind: str) -> None:
    for model in pair(kind, lora_dropout=0.1):
        loss, gradients = step(model)
        report = fuse(model)
        assert report.fused["LoRA layers"] == len(gradients) // 2
        assert not report.unchanged
        fused_loss, fused_gradients = step(model)
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            assert (fused_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name
        unfuse(model)
        assert step(model)[0] == loss


@kinds
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind)
    expected = logits(ours)
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(base(kind), str(tmp_path / "ours"))), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(logits(load_adapter(base(kind), tmp_path / "theirs")), expected)


@kinds
def test_merged_disabled_and_unwrapped(kind: str) -> None:
    ours, theirs = pair(kind)
    before, expected = logits(base(kind)), logits(ours)
    with disabled(ours):
        assert torch.equal(logits(ours), before)
    merged, by_peft = merge(ours), theirs.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, by_peft.state_dict()[name], rtol=0, atol=1e-6), name
    assert torch.equal(logits(unwrap(pair(kind)[0])), before)


def test_the_core_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    """In a process in which they cannot be imported, and in which Torch has been imported before."""
    script = f"""
import sys
import torch, transformers, peft
from transformers import AutoModelForCausalLM, LlamaConfig

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_EVERYWHERE!r}:
            raise ModuleNotFoundError(f"no {{name}} here", name=name)

sys.meta_path.insert(0, Refused())
for name in {NOT_EVERYWHERE!r}:
    sys.modules.pop(name, None)
import plainlora, plainlora.folders, plainlora.interruption, plainlora.resources.memory

model = AutoModelForCausalLM.from_config(LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99))
model = plainlora.inject(model, peft.LoraConfig(target_modules="all-linear"))
print(plainlora.fuse(model))
model(input_ids=torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
plainlora.save_adapter(model, "adapter")
plainlora.merge(plainlora.load_adapter(plainlora.unwrap(model), "adapter"))
plainlora.folders.write_durably("file", "text")
assert plainlora.resources.memory.resident_memory() > 2**20
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["fused: 7 LoRA layers, 1 SwiGLU", "done"], done.stderr
