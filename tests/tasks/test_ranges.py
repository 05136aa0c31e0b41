"""Tokens and layers that the base lacks are told before its weights are loaded; those that PEFT takes are taken."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from plainlora.base.loading import build_decoder
from plainlora.errors import UserError
from plainlora.settings.programs import SFT
from plainlora.tasks import sft
from plainlora.tasks.ranges import check_ranges
from tests.conftest import VOCABULARY, make_model

LAST = VOCABULARY - 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"trainable_token_indices": [5, 99999]},
            f"trainable_token_indices: model.embed_tokens has no token 99999; give numbers from 0 to {LAST}",
        ),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: model.embed_tokens has no token -1; give"),
        ({"trainable_token_indices": {"lm_head": [VOCABULARY]}}, f"lm_head has no token {VOCABULARY}; give numbers"),
        (
            {"trainable_token_indices": {"embed_token": [5]}},
            "trainable_token_indices: the base has no embedding or head 'embed_token'; correct the name",
        ),
        ({"trainable_token_indices": {"norm": [5]}}, "the base has no embedding or head 'norm'"),
        ({"trainable_token_indices": []}, "there is no token for model.embed_tokens; give one, or leave it out"),
        (
            {"layer_replication": [[0, 2], [0, 9]]},
            "layer_replication: [0, 9] is no range of the base's 2 layers; give pairs [start, end] with 0 <= start < ",
        ),
        ({"layer_replication": [[0, 0]]}, "layer_replication: [0, 0] is no range"),
        ({"layer_replication": [[-1, 1]]}, "layer_replication: [-1, 1] is no range"),
    ],
)
def test_what_the_base_lacks_is_one_line_in_the_plan(
    fields: dict[str, Any], said: str, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = SFT.parse([
        *("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--use_cpu", "true"),
        *("--lora_config", json.dumps(fields), "--lora_target_modules", "q_proj", "--output_dir", str(tmp_path)),
    ])  # fmt: skip
    with pytest.raises(UserError) as raised:
        sft.plan_adapter(settings, sft.read_config(settings))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [0, LAST]},
        {"trainable_token_indices": {"tokens": [LAST], "lm_head": [LAST]}},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
)
def test_what_peft_takes_is_taken(fields: dict[str, Any]) -> None:
    model = make_model("llama")
    lora = LoraConfig(target_modules=["q_proj"], **fields)
    check_ranges(lora, partial(build_decoder, model.config))
    get_peft_model(model, lora)
