"""A config that cannot be right is refused before anything is made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, Gemma3Config, LlamaConfig, XLNetConfig

from plainlora.base.config import class_names, context_length, load_config
from plainlora.base.loading import load_causal_lm
from plainlora.errors import UserError


@pytest.mark.parametrize("ends", ["two", [0, "one"], 1.5, True, [[0]], 2**63, {}])
def test_an_eos_that_is_no_token_is_refused(edited: Callable[..., str], ends: object) -> None:
    with pytest.raises(UserError, match=r"eos_token_id of its generation_config.json is not a token|cannot be loaded"):
        load_causal_lm(edited("generation_config.json", eos_token_id=ends))


def test_a_config_that_would_take_for_ever_to_build_is_refused(edited: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"names 1,000,000,000 layers, more than any model has; it is damaged"):
        load_causal_lm(edited("config.json", num_hidden_layers=10**9))

    with pytest.raises(UserError, match=r"names 1,001 layers, more than any model has"):
        load_config(edited("config.json", num_hidden_layers=1001))


@pytest.mark.parametrize("method", ["evil", "gptq", "awq", ["x"]])
def test_weights_that_are_stored_otherwise_are_not_read_as_plain_numbers(
    edited: Callable[..., str], method: object
) -> None:
    with pytest.raises(UserError, match=r"says that the weights are quantised by .*; give the base in 16 or 32 bits"):
        load_config(edited("config.json", quantization_config={"quant_method": method, "bits": 4}))


def test_u23_an_attention_from_the_hub_is_code_from_elsewhere(edited: Callable[..., str], tmp_path: Path) -> None:
    for name in ("evil/kernel", {"": "evil/kernel"}):
        base = edited("config.json", attn_implementation=name)
        with pytest.raises(UserError, match="names the attention 'evil/kernel', which is code from the Hub; take"):
            load_config(base)
    assert load_config(base, trust_remote_code=True)._attn_implementation == "evil/kernel"
    inside = Gemma3Config().to_dict() | {"attn_implementation": {"text_config": "evil/kernel"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(inside))
    with pytest.raises(UserError, match="names the attention 'evil/kernel'"):
        load_config(base)


@pytest.mark.parametrize(
    "changes", [{"model_type": ["llama"]}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}]
)
def test_a_config_that_code_trips_over_is_said_to_be_damaged(
    edited: Callable[..., str], changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"base/config.json is damaged: the model cannot be loaded \("):
        load_causal_lm(edited("config.json", **changes))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "ibert", "data2vec-text"])
def test_a_text_as_long_as_the_context_has_a_position_for_every_token_and_a_longer_one_has_not(kind: str) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = AutoConfig.for_model(kind, vocab_size=50, max_position_embeddings=20, pad_token_id=1, **sizes)
    context, model = context_length(config), AutoModel.from_config(config)
    assert context == (20 if kind == "bert" else 18)
    model(input_ids=torch.full((1, context), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, context + 1), 7))


def test_a_model_without_a_limit_has_no_context_length() -> None:
    assert context_length(XLNetConfig()) is None


def test_classes_are_named_by_number_whatever_the_order_in_the_file() -> None:
    names = {"0": "a", "1": "b", "10": "k", "2": "c"} | {str(number): f"{number}" for number in range(3, 10)}
    assert class_names(LlamaConfig(id2label=names)) == ["a", "b", "c", *map(str, range(3, 10)), "k"]
