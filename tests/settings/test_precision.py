"""The number formats that are told are those that a run has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.base.config import load_config
from plainlora.base.loading import load_base
from plainlora.lora.record import lora_layers
from plainlora.settings.parsing import StrictParser
from plainlora.settings.precision import list_precisions, precision_line
from plainlora.settings.programs import CLASSIFY, SFT

NF4 = "4-bit NF4; other weights in float32"
NESTED = "4-bit NF4, its scales quantised too; other weights in bfloat16"


def told(folder: Path, *flags: str) -> tuple[dict[str, str], Any, Any]:
    """What is told of a recipe with these flags, and its settings of the adapter and the base."""
    recipe, _, training, model = StrictParser(SFT.dataclass_types).parse(
        ["--model_name_or_path", str(folder), "--output_dir", "out", "--use_cpu", *flags]
    )
    return list_precisions(training, model, load_config(str(folder)), recipe.adapter_dtype), recipe, model


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"base": "float32", "adapter": "float32", "optimizer state": "float32, as what is trained"}),
        (["--dtype=auto"], {"base": "float32"}),
        (
            ["--dtype=bfloat16", "--adapter_dtype=bfloat16"],
            {"base": "bfloat16", "adapter": "bfloat16", "optimizer state": "bfloat16, as what is trained"},
        ),
        (["--load_in_4bit=true"], {"base": NF4, "adapter": "float32"}),
        (
            ["--load_in_4bit=true", "--use_bnb_nested_quant=true", "--dtype=bfloat16"],
            {"base": NESTED, "adapter": "float32"},
        ),
        (["--load_in_8bit=true"], {"base": "8-bit; other weights in float32"}),
    ],
)
def test_u16_what_is_told_is_what_is_there(
    model_dirs: dict[str, Path], flags: list[str], expected: dict[str, str]
) -> None:
    formats, recipe, model = told(model_dirs["llama"], *flags)
    for what, stored in expected.items():
        assert formats[what].removesuffix(" (adamw_torch_fused)") == stored
    base = load_base(model)
    assert str(base.get_input_embeddings().weight.dtype).removeprefix("torch.") in formats["base"]
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight
    state = getattr(weight, "quant_state", None)
    assert (state is not None) == ("4-bit" in formats["base"])
    assert (weight.dtype == torch.int8) == ("8-bit" in formats["base"])
    assert bool(state is not None and state.nested) == ("scales" in formats["base"])
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = attach_adapter(base, lora, BACKENDS["reference"], recipe.adapter_dtype)
    ((_, layer),) = list(lora_layers(adapted))[:1]
    assert str(layer.lora_A.weight.dtype) == f"torch.{formats['adapter']}"
    optimizer = torch.optim.AdamW([layer.lora_A.weight])
    layer.lora_A.weight.grad = torch.ones_like(layer.lora_A.weight)
    optimizer.step()
    kept = optimizer.state[layer.lora_A.weight]["exp_avg"].dtype
    assert formats["optimizer state"].startswith(str(kept).removeprefix("torch."))


def test_u16_mixed_precision_and_other_optimizers(model_dirs: dict[str, Path]) -> None:
    formats, *_ = told(model_dirs["llama"], "--bf16=true", "--optim=adamw_8bit")
    assert (formats["compute"], formats["optimizer state"]) == ("bfloat16, by autocast", "8-bit (adamw_8bit)")
    formats, *_ = told(model_dirs["llama"], "--dtype=bfloat16", "--optim=paged_adamw_32bit")
    assert (formats["compute"], formats["optimizer state"]) == ("bfloat16", "float32 (paged_adamw_32bit)")
    assert precision_line(formats) == (
        "number formats: base bfloat16, compute bfloat16, adapter float32, optimizer state float32 (paged_adamw_32bit)"
    )


def test_u16_a_classifiers_own_weights(backbone_dirs: dict[str, Path]) -> None:
    flags = ["--model_name_or_path", str(backbone_dirs["bert"]), "--output_dir", "out", "--method", "full"]
    _, _, training, model = StrictParser(CLASSIFY.dataclass_types).parse(flags)
    formats = list_precisions(training, model, load_config(str(backbone_dirs["bert"])), None)
    assert formats["trained weights"] == "float32"
    assert "adapter" not in formats
