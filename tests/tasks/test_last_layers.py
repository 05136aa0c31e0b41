"""Which modules the last blocks, the final norm and the head are, on architectures as Transformers has them."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
)

from plainlora.base.classifier import build_skeleton
from plainlora.errors import UserError
from plainlora.tasks.last_layers import find_last_layers, language_head, tied_head
from plainlora.tasks.projections import find_head


@pytest.mark.parametrize(
    ("config", "expected", "tied"),
    [
        (LlamaConfig(num_hidden_layers=3), ["model.layers.1", "model.layers.2", "model.norm", "lm_head"], None),
        (GPT2Config(n_layer=3), ["transformer.h.1", "transformer.h.2", "transformer.ln_f"], "lm_head"),
        (
            GPTNeoXConfig(num_hidden_layers=3),
            ["gpt_neox.layers.1", "gpt_neox.layers.2", "gpt_neox.final_layer_norm", "lm_head"],
            None,
        ),
        (
            OPTConfig(num_hidden_layers=3),  # whose norm is made before its blocks
            ["model.decoder.layers.1", "model.decoder.layers.2", "model.decoder.final_layer_norm"],
            "lm_head",
        ),
        (
            BloomConfig(n_layer=3),  # which has a norm of the embedding too
            ["transformer.h.1", "transformer.h.2", "transformer.ln_f"],
            "lm_head",
        ),
        (MambaConfig(num_hidden_layers=3), ["backbone.layers.1", "backbone.layers.2", "backbone.norm_f"], "lm_head"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_last_two_blocks(config: PretrainedConfig, expected: list[str], tied: str | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_last_layers(model, ["2"], language_head)
    assert found == expected
    assert tied_head(model) == tied
    parameters = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{each}." for each in found))}
    assert all(any(name.startswith(f"{each}.") for name in parameters) for each in found)


def test_a_classifiers_last_block_with_its_head() -> None:
    model = build_skeleton(DistilBertConfig(n_layers=3))
    assert find_last_layers(model, ["1"], find_head) == [
        "distilbert.transformer.layer.2",
        "pre_classifier",
        "classifier",
    ]
    assert find_last_layers(model, None, find_head) == ["pre_classifier", "classifier"]


def test_blocks_that_cannot_be_told_are_to_be_named() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3))
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError, match=r"the blocks of LlamaForCausalLM cannot be found; give the names"):
        find_last_layers(model, ["1"], language_head)
