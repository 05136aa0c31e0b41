"""An adapter's GGUF holds the adapter's own delta, and what llama.cpp cannot add is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from plainlora.export.export import export_gguf
from plainlora.export.gguf_file import read_fields, read_tensors
from tests.export.made import make_adapter
from tests.refusals import Run

NAMES = {  # of llama.cpp, by Transformers'
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip

PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"v_proj": 2, "c_attn": 3},
        "alpha_pattern": {"down_proj": 3},
    },
    "rslora of several ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 2, "c_fc": 3}},
}


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed; tests/export/test_llama_cpp.py has it."""
    monkeypatch.setattr("plainlora.export.export.find_llama_cpp", lambda: None)


def row_of_transformers(row: int, heads: int, d: int) -> int:
    """Where ggml's row of a rotated projection stands in Transformers: neighbours there are halves of a head here."""
    head, inside = divmod(row, d)
    return head * d + (inside % 2) * (d // 2) + inside // 2


def restored(name: str, delta: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    if config.model_type not in ("llama", "mistral") or not name.endswith(("attn_q", "attn_k")):
        return delta
    heads = config.num_attention_heads if name.endswith("attn_q") else config.num_key_value_heads
    rows = [row_of_transformers(row, heads, config.head_dim) for row in range(len(delta))]
    back = torch.empty_like(delta)
    back[rows] = delta
    return back


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_the_file_s_alpha_over_rank_b_a_is_peft_s_delta(
    kind: str, options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = make_adapter(tmp_path, kind, tokenizer, **options)
    result = export_gguf(adapter, tmp_path / "out")
    fields = read_fields(result.file)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == {"mistral": "llama"}.get(kind, kind)
    tensors = {name: values.double() for name, _, values in read_tensors(result.file)}

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = base.config
    theirs = PeftModel.from_pretrained(base, adapter).double()
    checked = 0
    for path, layer in theirs.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        parts = path.removeprefix("base_model.model.").split(".")
        short = next(NAMES[end] for end in (".".join(parts[-2:]), parts[-1]) if end in NAMES)
        name = f"blk.{next(part for part in parts if part.isdecimal())}.{short}"
        a, b = tensors.pop(f"{name}.weight.lora_a"), tensors.pop(f"{name}.weight.lora_b")
        mine = restored(name, float(fields["adapter.lora.alpha"]) / b.shape[1] * b @ a, config)
        expected = layer.get_delta_weight("default")
        expected = expected.T if kind == "gpt2" else expected  # Conv1D holds (d_in, d_out)
        exact = options.get("use_rslora") or "rank_pattern" in options
        torch.testing.assert_close(mine, expected, rtol=1e-6 if exact else 1e-14, atol=1e-8 if exact else 1e-16)
        checked += 1
    assert checked == {"gpt2": 8}.get(kind, 14)
    assert not tensors


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("llama", {"use_dora": True}, "is a DoRA adapter"),
        ("llama", {"modules_to_save": ["lm_head"]}, "also holds lm_head.weight"),
        ("qwen2", {"bias": "lora_only"}, "trained head, embedding or bias"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "also holds model.embed_tokens"),
        ("gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}, "lm_head, which is tied"),
        ("llama", {"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused_by_name_with_the_way_out(
    kind: str,
    options: dict[str, Any],
    says: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    plainlora: Run,
) -> None:
    adapter = make_adapter(tmp_path, kind, tokenizer, **options)
    line = plainlora("export", "--adapter", adapter, "--format", "gguf", "--output", tmp_path / "out")
    assert says in line
    assert "--merged" in line


def test_a_head_that_is_not_tied_can_be_adapted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"target_modules": ["q_proj", "lm_head"]}
    adapter = make_adapter(tmp_path, "llama", tokenizer, base={"tie_word_embeddings": False}, **options)
    result = export_gguf(adapter, tmp_path / "out")
    assert "output.weight.lora_b" in {name for name, _, _ in read_tensors(result.file)}
