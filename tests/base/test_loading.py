"""Weights are loaded as they are stored, and a setting is given once."""

from pathlib import Path

import pytest
from trl import ModelConfig

from plainlora.base.loading import load_base, load_causal_lm
from plainlora.errors import UserError


def test_a_base_in_four_bits_is_loaded_as_one_or_not_at_all(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["llama"]), dtype="float32", load_in_4bit=True)
    load_base(args).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is stored in 4 or 8 bits: load it so"):
        load_causal_lm(str(tmp_path))
    args.model_name_or_path = str(tmp_path)
    assert load_base(args).is_loaded_in_4bit


def test_a_setting_that_has_a_flag_is_not_given_twice(model_dirs: dict[str, Path]) -> None:
    args = ModelConfig(model_name_or_path=str(model_dirs["llama"]))
    for name in ("revision", "dtype", "trust_remote_code"):
        with pytest.raises(UserError, match=f"model_init_kwargs: {name} has a flag of its own"):
            load_base(args, options={name: "x"})
    with pytest.raises(UserError, match="use_safetensors"):
        load_base(args, options={"use_safetensors": False})
