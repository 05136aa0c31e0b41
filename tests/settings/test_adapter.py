"""The fields of `LoraConfig` that a recipe gives in `lora_config`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from plainlora import inject
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.lora.record import lora_layers
from plainlora.settings.programs import SFT
from plainlora.settings.sub_configs import check_sub_configs, find_sub_configs
from plainlora.tasks import sft
from tests.conftest import make_model


@pytest.mark.parametrize("pattern", ["layers", "blocks"])
def test_the_layers_pattern_of_lora_config_selects_what_peft_selects_or_is_refused(
    pattern: str, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = SFT.parse([
        *("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--use_cpu", "true"),
        *("--output_dir", str(tmp_path / "out"), "--lora_target_modules", "q_proj", "v_proj"),
        *("--lora_layers_to_transform", "1", "--lora_config", f'{{"layers_pattern": "{pattern}"}}'),
    ])  # fmt: skip
    lora = sft.plan_adapter(settings, sft.read_config(settings)).lora
    assert isinstance(lora, LoraConfig)
    assert lora.layers_pattern == pattern
    if pattern == "blocks":
        with pytest.raises(LoRAError, match=r"in layer 1; they lie in no layer"):
            inject(make_model("llama"), lora)
        return
    expected = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern=pattern)
    theirs = get_peft_model(make_model("llama"), expected).targeted_module_names
    ours = [name for name, _ in lora_layers(inject(make_model("llama"), lora))]
    assert sorted(ours) == sorted(theirs) == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]


BASE = ("--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "out", "--use_cpu", "true")


def faults(*flags: str) -> list[str]:
    """What a run with these flags tells instead of beginning."""
    with pytest.raises(UserError) as raised:
        SFT.parse([*BASE, *flags])
    return list(map(str, raised.value.args))


def of_lora_config(given: dict[str, Any]) -> str:
    (fault,) = faults("--lora_config", json.dumps(given))
    assert fault.startswith("lora_config: ")
    return fault.removeprefix("lora_config: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init_lora_weights": "eva", "eva_config": {"rhoo": 1.5}}, "eva_config has no 'rhoo'; did you mean rho?"),
        ({"velora_config": {"num_groupz": 3}}, "velora_config has no 'num_groupz'; did you mean num_groups?"),
        ({"monteclora_config": {"samples": 3}}, "monteclora_config has no 'samples'; did you mean num_samples?"),
        ({"kasa_config": {"x": 3}}, "kasa_config has no 'x'; there are beta, gamma"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bit": 4}},
            "loftq_config has no 'loftq_bit'; did you mean loftq_bits?",
        ),
        ({"eva_config": {"tau": "high"}}, "eva_config.tau must be a finite number, not 'high'"),
        ({"eva_config": {"tau": float("nan")}}, "eva_config.tau must be a finite number, not nan"),
        ({"eva_config": {"whiten": 1}}, "eva_config.whiten must be true or false, not 1"),
        ({"velora_config": {"num_groups": True}}, "velora_config.num_groups must be a whole number, not True"),
        (
            {"use_bdlora": {"target_modules_bd_a": [1]}},
            "use_bdlora.target_modules_bd_a must be a list, each entry a text or null, not [1]",
        ),
        ({"corda_config": {"corda_method": "x"}}, "corda_config.corda_method must be ipm or kpm, not 'x'"),
        ({"use_bdlora": True}, "use_bdlora must be a mapping of settings to values, not True"),
        ({"lora_bias": "yes"}, "lora_bias must be true or false, not 'yes'"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying must be true or false, not 1"),
        (
            {"trainable_token_indices": "all"},
            "trainable_token_indices must be a list of whole numbers, or a mapping of names to such lists, not 'all'",
        ),
        ({"layer_replication": "x"}, "layer_replication must be a list of pairs of whole numbers, not 'x'"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication must be a list of pairs of whole numbers, not [[0,"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens must be a list of whole numbers, not ['a']"),
    ],
)
def test_what_peft_would_drop_or_fail_on_is_told_by_name(given: dict[str, Any], said: str) -> None:
    assert of_lora_config(given).startswith(said)


def test_no_config_within_the_config_takes_an_unknown_name() -> None:
    assert {"eva_config", "loftq_config", "velora_config", "use_bdlora"} < find_sub_configs().keys()
    for name in find_sub_configs().keys() - {"runtime_config"}:
        assert of_lora_config({name: {"zzz": 1}}).startswith(f"{name} has no 'zzz'; there are ")


def test_every_default_within_the_config_has_its_own_type() -> None:
    for name, kind in find_sub_configs().items():
        check_sub_configs({name: {field.name: getattr(kind(), field.name) for field in fields(kind) if field.init}})


@pytest.mark.parametrize("where", ["command line", "recipe.yaml"])
@pytest.mark.parametrize(
    ("flag", "default", "field", "value"),
    [
        ("lora_r", 16, "r", 4),
        ("use_dora", False, "use_dora", True),
        ("lora_bias", "none", "bias", "all"),
        ("lora_init", True, "init_lora_weights", "gaussian"),
    ],
)
def test_a_flag_with_its_default_value_is_not_overruled_without_a_word(
    where: str, flag: str, default: Any, field: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps({flag: default} if where == "recipe.yaml" else {}))
    given = () if where == "recipe.yaml" else (f"--{flag}", str(default).lower())
    fields = ("--config", "recipe.yaml", *given, "--lora_config")
    (fault,) = faults(*fields, json.dumps({field: value}))
    assert fault == f"lora_config: {field} is {value!r}, but {flag} is {default!r} ({where}); give only one"
    SFT.parse([*BASE, *fields, json.dumps({field: default})])  # both say the same
    SFT.parse([*BASE, "--lora_config", json.dumps({field: value})])
