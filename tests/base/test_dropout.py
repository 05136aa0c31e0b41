"""Dropouts are found, set for training, and saved as they were."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
)
from trl import ModelConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.base.classifier import classifier_config, load_classifier
from plainlora.base.dropout import check_dropout, find_dropouts, set_dropouts
from plainlora.base.loading import load_base
from plainlora.errors import UserError
from plainlora.lora.inject import inject, unwrap
from plainlora.lora.merge import merge
from tests.conftest import BACKBONES

LABELS = ["ham", "spam"]


def dropouts_of(model: nn.Module) -> set[float]:
    """Of every module but the adapter's: `nn.Dropout` and what attention is given when it computes."""
    found = {
        module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and "lora" not in name
    }
    attributes = ("attention_dropout", "attn_dropout", "dropout_prob")
    values = (getattr(module, name, None) for module in model.modules() for name in attributes)
    return found | {value for value in values if isinstance(value, float)}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2Config(), {"attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout"}),
        (DistilBertConfig(), {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"}),
        (BertConfig(), {"hidden_dropout_prob", "attention_probs_dropout_prob"}),  # classifier_dropout is None
        (
            BertConfig(classifier_dropout=0.2),
            {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"},
        ),
        (LlamaConfig(), {"attention_dropout"}),
        (MambaConfig(), set()),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_dropouts_are_found_by_name(config: PretrainedConfig, names: set[str]) -> None:
    assert {name for _, name in find_dropouts(config)} == names


def test_dropouts_are_found_in_configs_inside() -> None:
    config = Gemma3Config()
    owners = {owner.model_type for owner, _ in find_dropouts(config)}
    assert config.text_config.model_type in owners


def test_a_base_without_dropout_has_none_to_set() -> None:
    check_dropout(None, MambaConfig())
    check_dropout(0.0, MambaConfig())
    check_dropout(0.3, GPT2Config())
    with pytest.raises(UserError, match=r"^base_dropout 0.3: mamba models have no dropout to set; leave it out$"):
        check_dropout(0.3, MambaConfig())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_every_dropout_of_a_language_model_is_set_and_not_the_adapters(
    model_dirs: dict[str, Path], p: float, backend: str, quantized: bool
) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["gpt2"]), dtype="float32", load_in_4bit=quantized)
    base = load_base(args, dropout=p)
    assert dropouts_of(base) == {p}
    assert getattr(base, "is_loaded_in_4bit", False) == quantized
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.2, target_modules="all-linear")
    model = attach_adapter(base, lora, BACKENDS[backend])
    assert {m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in n} == {0.2}
    assert dropouts_of(load_base(args)) == {0.1}


def test_other_settings_of_the_base_stay(model_dirs: dict[str, Path]) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["llama"]), dtype="bfloat16", attn_implementation="eager")
    base = load_base(args, options={"rms_norm_eps": 0.5}, dropout=0.25)  # as from model_init_kwargs
    assert base.dtype == torch.bfloat16
    assert base.config._attn_implementation == "eager"
    assert base.config.rms_norm_eps == 0.5
    assert {layer.self_attn.attention_dropout for layer in base.model.layers} == {0.25}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_classifier_is_saved_with_its_own_dropouts_and_goes_on_with_the_others(
    backbone_dirs: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    name = str(backbone_dirs[kind])
    config = classifier_config(name, LABELS, 0)
    own = {name: getattr(owner, name) for owner, name in find_dropouts(config)}
    model, _ = load_classifier(config, name, dropout=0.25)
    assert own == {name: getattr(owner, name) for owner, name in find_dropouts(config)}
    assert 0.25 not in own.values()
    assert dropouts_of(model) == {0.25}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in own} == own
    assert {getattr(owner, name) for owner, name in find_dropouts(model.config)} == {0.25}
    assert dropouts_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)) <= set(own.values())


def test_an_architecture_that_reads_its_config_in_every_step_trains_with_what_is_set(tmp_path: Path) -> None:
    config: Any = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], vocab_size=64,
        attention_dropout=0.5, embed_dropout=0.5, resid_dropout=0.5, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model, _ = load_classifier(classifier_config(str(tmp_path), LABELS, 0), str(tmp_path), dropout=0.0)
    ids = torch.arange(1, 9)[None]
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_merged_and_an_unwrapped_model_and_a_copy_are_saved_with_their_own_dropouts(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["gpt2"]), dtype="float32")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    for number, leave in enumerate((merge, unwrap)):
        model = copy.deepcopy(leave(inject(load_base(args, dropout=0.0), lora)))
        model.save_pretrained(tmp_path / str(number))
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["attn_pdrop"] == 0.1
        assert dropouts_of(model) == {0.0}


def test_a_config_that_takes_whole_numbers_only_takes_none_and_all_and_says_what_it_does_not_take() -> None:
    config = MptConfig()
    set_dropouts(config, 0.0)
    assert {getattr(*place) for place in find_dropouts(config)} == {0}
    with pytest.raises(UserError, match=r"base_dropout 0\.1: .* models refuse it as attn_pdrop .*leave it out"):
        set_dropouts(config, 0.1)
