"""Live llama.cpp beside Transformers: what it reads is what was written, and what it reads otherwise is not kept.

Slow, and not run where `make llama-cpp` was not.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from plainlora.commands import main
from plainlora.errors import UserError
from plainlora.export.adapter_tensors import describe_adapter
from plainlora.export.export import export_gguf
from plainlora.export.families import Layout
from plainlora.export.proof import BOUND
from tests.conftest import ROOT
from tests.export.made import make_adapter, needs_llama_cpp
from tests.export.test_vocabulary import SPLITTINGS, sentencepiece, splitting_by

pytestmark = [pytest.mark.slow, needs_llama_cpp]

CHATML = (  # one of the templates that llama-cpp-python replaces by a function of its own
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", {"head_dim": 32}),
        ("mistral", {"sliding_window": 512}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}),
    ],
    ids=["llama", "linear", "llama3", "head_dim", "mistral", "qwen2", "gpt2", "gpt2-untied"],
)  # fmt: skip
def test_llama_cpp_answers_as_transformers(
    kind: str, base: dict[str, Any], merged: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lora = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3, "c_fc": 3}, "use_rslora": True}
    proof = export_gguf(make_adapter(tmp_path, kind, tokenizer, base=base, **lora), tmp_path / "out", merged)
    figures = proof.certificate["proof"]
    assert figures["equal_texts"] == figures["texts"] == 15
    assert figures["equal_chat_prompts"] == figures["chats"] == 50
    costs = figures["costs"]
    assert costs["f16"]["relative_diff"] < BOUND / 2
    assert costs["f16"]["mean_kl"] < costs["q8_0"]["mean_kl"] < costs["q4_0"]["mean_kl"]
    assert costs["f16"]["equal_positions"] >= 0.995 * costs["f16"]["positions"]  # random logits lie close together


@pytest.mark.parametrize("name", SPLITTINGS)
def test_llama_cpp_splits_text_as_each_pre_tokenizer(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    changed = splitting_by(tokenizer, *SPLITTINGS[name])
    adapter = make_adapter(tmp_path, "llama", changed)
    figures = export_gguf(adapter, tmp_path / "out", merged=True).certificate["proof"]
    assert figures["equal_texts"] == figures["texts"]


@pytest.mark.parametrize("prefix", ["every", "never"])
def test_llama_cpp_splits_text_as_sentencepiece(prefix: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix)
    roles = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    adapter = make_adapter(tmp_path, "llama", tokenizer, base=roles)
    figures = export_gguf(adapter, tmp_path / "out", merged=True).certificate["proof"]
    assert (figures["equal_texts"], figures["equal_chat_prompts"]) == (15, 50)


def test_chat_with_the_quickstart_s_own_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base's weights are real, so that its greedy answers are its own words: all equal in f16."""
    monkeypatch.chdir(ROOT)
    program = [sys.executable, "recipes/sft.py", "--config", "recipes/quickstart/lora.yaml"]
    options = ["--output_dir", str(tmp_path / "run"), "--merge", "false", "--eval_strategy", "no", "--max_steps", "60"]
    subprocess.run([*program, *options, "--exact_match_rows", "0"], check=True, capture_output=True)
    main(["export", "--adapter", str(tmp_path / "run"), "--format", "gguf", "--output", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "export.json").read_text())["proof"]
    assert figures["equal_chat_answers_in_f16"] == figures["costs"]["f16"]["equal_answers"] == 50


def test_rows_in_another_order_fail_the_proof_and_leave_no_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path, "llama", tokenizer)
    monkeypatch.setattr(Layout, "ordered", lambda self, module, rows: rows)
    with pytest.raises(UserError, match=f"more than the {BOUND:.0e} allowed in f16; nothing was written"):
        export_gguf(adapter, tmp_path / "out", merged=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def chatml(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def test_a_published_template_is_rendered_as_it_is_and_not_by_a_function_of_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python knows ChatML by its whole text, and renders an empty system message where Jinja has none."""
    tokenizer = chatml(tokenizer)
    roles = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    adapter = make_adapter(tmp_path, "llama", tokenizer, base=roles)
    figures = export_gguf(adapter, tmp_path / "out", merged=True).certificate["proof"]
    assert figures["equal_chat_prompts"] == 50
    monkeypatch.setattr("plainlora.export.chat_template.RENDERED_AS_JINJA", "")
    with pytest.raises(UserError, match="the chat call of llama-cpp-python gives the model another prompt"):
        export_gguf(adapter, tmp_path / "other", merged=True)
    assert not (tmp_path / "other").exists()


def test_an_alpha_twice_as_large_fails_the_proof(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path, "qwen2", tokenizer, lora_alpha=32)
    monkeypatch.setattr(
        "plainlora.export.export.describe_adapter", lambda writer, alpha: describe_adapter(writer, 2 * alpha)
    )
    with pytest.raises(UserError, match="logits differ from Transformers'"):
        export_gguf(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
