"""The built-in suite in short, and models of a user's own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    RobertaConfig,
)

from plainlora.parity.case import FORMS
from plainlora.parity.compare import compare
from plainlora.parity.observe import LEVELS
from plainlora.parity.sources import model_case
from plainlora.parity.suite import built_in_cases
from plainlora.parity.tiny import quiet_models

NOT_RUN = {"DistilBERT, classifier": "generation"}
IDENTICAL = {"fused": {"init", "generation"}, "reference": set(LEVELS) - {"merge"}}


@pytest.mark.parametrize("form", FORMS)
def test_every_level_of_every_built_in_case_holds(form: str) -> None:
    not_run = NOT_RUN | ({"Llama, bf16": "generation"} if form == "fused" else {})
    names = []
    with quiet_models():
        for case in built_in_cases(steps=2):
            names.append(case.name)
            result = compare(replace(case, lora_backend=form))
            for verdict in result.verdicts:
                expected = "not run" if verdict.level == not_run.get(case.name) else "pass"
                assert verdict.status == expected, (case.name, verdict)
                if expected == "pass" and verdict.level in IDENTICAL[form]:
                    assert verdict.identical, (case.name, verdict)
                assert verdict.reason
            covered, _, layers = result.environment.get("fused layers", "0 of 0").partition(" of ")
            unfused = "8-bit" in case.name or "DoRA" in case.name
            assert covered == ("0" if unfused else layers), "what is not fused proves nothing of it"
            assert (int(layers) > 0) == (form == "fused")
    assert len(names) == len(set(names)) == 16


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90}
OWN: dict[str, Callable[[], PretrainedConfig]] = {
    "GPT-NeoX": lambda: GPTNeoXConfig(**SIZES, intermediate_size=64),
    "OPT": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0),
    "Mistral": lambda: MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=1, head_dim=16),
    "Phi": lambda: PhiConfig(**SIZES, intermediate_size=64),
    "Gemma": lambda: GemmaConfig(**SIZES, intermediate_size=64, num_key_value_heads=1, head_dim=16),
    # Its layers between the hidden states and the output embedding are none that a fused head knows.
    "ModernBERT decoder": lambda: ModernBertDecoderConfig(
        **SIZES, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1
    ),
    "BERT": lambda: BertConfig(**SIZES, intermediate_size=64),
    "RoBERTa": lambda: RobertaConfig(**SIZES, intermediate_size=64, pad_token_id=1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ones_own_is_compared(name: str, form: str, tmp_path: Path) -> None:
    config = OWN[name]()
    is_encoder = name in ("BERT", "RoBERTa")
    auto = AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
    with quiet_models():
        auto.from_config(config).save_pretrained(tmp_path)
        result = compare(replace(model_case(str(tmp_path), ["all-linear"], steps=3), lora_backend=form))
    for verdict in result.verdicts:
        assert verdict.status == ("not run" if is_encoder and verdict.level == "generation" else "pass"), verdict
    assert [verdict.level for verdict in result.verdicts] == list(LEVELS)
    assert all(len(losses) == 3 for losses in result.losses.values())
