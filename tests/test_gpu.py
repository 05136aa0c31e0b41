"""What only a GPU can show. Elsewhere each of these is reported as not run."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from plainlora import fuse, inject
from tests.conftest import load_quantized, make_model, random_ids, run_program

pytestmark = pytest.mark.gpu


FORMS = {"reference": inject, "fused": lambda model, config: fuse(inject(model, config))}


@pytest.mark.parametrize(
    ("form", "dtype"), [("reference", torch.float32), ("reference", torch.bfloat16), ("fused", torch.float32)]
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_and_gradients_on_a_gpu_are_pefts(kind: str, form: str, dtype: torch.dtype) -> None:
    sides = []
    for attach in (FORMS[form], get_peft_model):
        torch.manual_seed(1)
        model = attach(make_model(kind, dtype), LoraConfig(target_modules="all-linear", lora_dropout=0.1)).cuda()
        ids = random_ids().cuda()
        torch.manual_seed(2)
        output = model.train()(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        sides.append([output.logits, *gradients])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nf4_on_a_gpu_trains_what_peft_trains(tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path) -> None:
    for backend in ("reference", "fused", "peft"):
        done = run_program(
            *("recipes/sft.py", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml", "--lora_backend", backend),
            *("--model_name_or_path", model_dirs["llama"], "--dataset_name", rows_file, "--load_in_4bit", "true"),
            *("--dtype", "bfloat16", "--max_length", "256", "--test_split_size", "8", "--max_steps", "6"),
            *("--report_to", "none", "--max_new_tokens", "2", "--output_dir", tmp_path / backend),
        )
        assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for backend, tolerance in (("reference", 1e-4), ("fused", 1e-3)):  # the fused form computes A and B in bf16
        for name, tensor in load_file(tmp_path / backend / "adapter_model.safetensors").items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=tolerance)


def test_the_quantised_bytes_stay_as_they_are_on_a_gpu(model_dirs: dict[str, Path]) -> None:
    model = load_quantized(model_dirs["llama"], load_in_4bit=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("q_proj.weight")}
    inject(model, LoraConfig(target_modules=["q_proj"]))
    ids = random_ids().cuda()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name.replace(".weight", ".base_layer.weight")], value)
