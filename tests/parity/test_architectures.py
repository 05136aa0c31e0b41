"""Architectures of Transformers, made tiny and taken through every level by the command."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from plainlora.commands import main
from plainlora.lora.layer import LoRALinear
from plainlora.parity.architectures import AUTO, COMPARED, LEVELS, WITHIN, list_architectures
from plainlora.parity.shrink import LARGEST, NOT_BUILT, tiny_config
from tests.conftest import ROOT

ALLOWED = {"=", "close", "refused"}
# One or two of a kind, and at which levels it is refused.
SAMPLE: dict[str, set[str]] = {
    "llama": set(),
    "qwen2": set(),  # tied
    "gpt2": set(),  # Conv1D, tied
    "falcon": {"packing"},  # a fused qkv of a class of its own
    "mixtral": set(),  # experts
    "phimoe": set(),  # a router that is a subclass of nn.Linear
    "mamba": {"packing"},  # a state
    "modernbert-decoder": set(),  # layers between the last hidden state and the logits
    "bart": {"loss", "packing"},  # the decoder alone, with attention to an encoder that is not there
    "distilbert": set(),  # an encoder
}


def sweep(folder: Path, *names: str) -> tuple[list[dict], str]:
    main(["compare", "--architectures", *names, "--output", str(folder)])
    found = json.loads((folder / "architectures.json").read_text())
    return found["architectures"], (folder / "architectures.md").read_text()


def test_a_sample_of_every_kind_holds_or_is_refused_at_every_level(tmp_path: Path) -> None:
    rows, table = sweep(tmp_path, *SAMPLE)
    assert {row["architecture"]["model_type"] for row in rows} == set(SAMPLE)
    assert len(rows) > len(SAMPLE)  # most are classifiers too
    for row in rows:
        architecture, outcomes = row["architecture"], row["outcomes"]
        assert not row["not_built"]
        causal = architecture["task"] == "causal"
        assert set(outcomes) == set(LEVELS if causal else COMPARED)
        refused = {level for level, outcome in outcomes.items() if outcome["kind"] == "refused"}
        assert refused == (SAMPLE[architecture["model_type"]] if causal else set()), architecture
        for level, outcome in outcomes.items():
            assert outcome["kind"] in ALLOWED, (architecture, level, outcome)
            assert outcome["kind"] != "close" or 0 < outcome["relative"] <= WITHIN
            assert outcome["kind"] != "refused" or outcome["reason"]
        assert (row["targets"] == "all-linear") == (architecture["model_type"] not in ("mixtral", "phimoe", "mamba"))
        assert f"| {architecture['model_type']} | {architecture['class_name']} | {row['targets']} | = |" in table
    assert "MixtralForCausalLM (mixtral), all-linear: target_modules: in this MixtralForCausalLM PEFT adapts" in table
    assert "BartForCausalLM (bart), loss: 8 of 20 adapters got no gradient" in table
    assert "## What differs\n\n- Nothing.\n" in table


def test_what_differs_is_told_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * 1.001)
    monkeypatch.setattr("plainlora.fast.fuse._forward_plainlora", LoRALinear.forward)
    with pytest.raises(SystemExit) as ended:
        sweep(tmp_path, "llama")
    assert ended.value.code == 1
    assert "LlamaForCausalLM (llama), forward: logits differs by" in (tmp_path / "architectures.md").read_text()


def test_every_name_is_made_or_has_a_reason_in_the_docs() -> None:
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    architectures = list_architectures()
    assert [architecture.model_type for architecture in architectures] == [
        name for names in mappings for name in names
    ]
    page = (ROOT / "docs" / "architectures.md").read_text()
    tables, _, reasons = page.partition("## What was not compared")
    assert f"transformers {transformers.__version__}," in page
    made = 0
    for architecture in architectures:
        try:
            with torch.device("meta"):
                config = tiny_config(architecture.model_type, architecture.task)
                model = AUTO[architecture.task].from_config(config)
        except Exception:
            possible = False
        else:
            small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
            possible = small and architecture.model_type not in NOT_BUILT
        made += possible
        in_table = f"| {architecture.model_type} | {architecture.class_name} |" in tables
        assert in_table or f"- {architecture.class_name} ({architecture.model_type}): " in reasons, architecture
        assert possible or not in_table
    assert made > 280


def test_a_name_that_is_none_is_an_error_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, said in (("lama", "did you mean llama"), ("zzz", "the model_type of a config.json")):
        with pytest.raises(SystemExit) as ended:
            main(["compare", "--architectures", typed])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--architectures", "llama", "--steps", "3"])
    assert "--steps is not for --architectures" in capsys.readouterr().err


@pytest.mark.slow
def test_every_architecture_holds_or_is_refused_at_every_level(tmp_path: Path) -> None:
    rows, _ = sweep(tmp_path)
    built = [row for row in rows if not row["not_built"]]
    assert len({row["architecture"]["model_type"] for row in built}) >= 150
    assert {outcome["kind"] for row in built for outcome in row["outcomes"].values()} <= ALLOWED
    assert all(row["not_built"] or row["outcomes"] for row in rows)
