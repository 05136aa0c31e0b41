"""Which adapters can share a base, known from their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plainlora.adapters.shared_base import check_one_base, find_shared_base
from plainlora.base.identity import describe_base
from plainlora.errors import UserError
from plainlora.report import write_json
from tests.base.test_identity import flip
from tests.lora.oracle import save_peft_adapter
from tests.lora.test_delta import change_config

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


def record(adapter: str, base: Path, quantization: dict[str, Any] | None = None) -> None:
    """What a run of this project leaves beside its adapter."""
    write_json(Path(adapter) / "run.json", {"quantization_config": quantization, "base": describe_base(str(base))})


@pytest.fixture
def pair(tmp_path: Path, model_dirs: dict[str, Path]) -> list[str]:
    """Two adapters of one base, of different ranks and targets."""
    settings: list[dict[str, Any]] = [{}, {"r": 7, "target_modules": ["q_proj"], "use_rslora": True}]
    return [
        save_peft_adapter(tmp_path / f"adapter{number}", model_dirs["llama"], **each)
        for number, each in enumerate(settings)
    ]


def test_adapters_of_one_base_share_it_under_whatever_name(
    pair: list[str], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    bases = find_shared_base(pair)
    assert [base.name for base in bases] == [str(model_dirs["llama"])] * 2
    copy = shutil.copytree(model_dirs["llama"], tmp_path / "copy")
    change_config(pair[1], base_model_name_or_path=str(copy))
    check_one_base(pair)  # the same weights in another place
    record(pair[0], model_dirs["llama"])
    record(pair[1], copy)
    check_one_base(pair)
    assert [base.name for base in find_shared_base(pair, str(copy))] == [str(copy)] * 2


@pytest.mark.parametrize("recorded", [[], [0], [0, 1]])
def test_another_base_is_refused(
    recorded: list[int], pair: list[str], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    changed = shutil.copytree(model_dirs["llama"], tmp_path / "changed")
    flip(changed / "model.safetensors", -1)
    change_config(pair[1], base_model_name_or_path=str(changed))
    for number in recorded:
        record(pair[number], [model_dirs["llama"], changed][number])
    with pytest.raises(
        UserError, match=r"adapter1 was trained on .*changed.*, and .*adapter0 on .*they share no base"
    ):
        find_shared_base(pair)
    if recorded == [0, 1]:  # then it is known that adapter1 is not of the base given
        with pytest.raises(UserError, match=r"adapter1 was trained on .* holds other weights of the same shapes"):
            find_shared_base(pair, str(model_dirs["llama"]))
        warnings = [base.warning for base in find_shared_base(pair, str(model_dirs["llama"]), allow_other_base=True)]
        assert warnings[0] is None
        assert "holds other weights" in str(warnings[1])


def test_another_storage_is_refused_if_both_are_known(pair: list[str], model_dirs: dict[str, Path]) -> None:
    record(pair[0], model_dirs["llama"], NF4)
    check_one_base(pair)  # of the other one nothing is known
    record(pair[1], model_dirs["llama"], NF4 | {"bnb_4bit_compute_dtype": "bfloat16"})
    check_one_base(pair)  # the same weights
    for other in (None, NF4 | {"bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}):
        record(pair[1], model_dirs["llama"], other)
        with pytest.raises(
            UserError, match=r"adapter1 was trained on .*, and .*adapter0 on load_in_4bit=True, bnb_4bit"
        ):
            check_one_base(pair, same_weights=False)


def test_an_adapter_given_twice_or_one_that_changes_its_base_is_refused(pair: list[str]) -> None:
    with pytest.raises(UserError, match=r"adapter0/\.\./adapter0 is given twice"):
        check_one_base([pair[0], f"{pair[0]}/../adapter0"])
    for start in ("pissa_niter_4", "olora"):
        change_config(pair[1], init_lora_weights=start)
        with pytest.raises(UserError, match=f"adapter1 has .*'{start}', for which PEFT changes"):
            check_one_base(pair)


def test_added_tokens_are_refused(pair: list[str]) -> None:
    path = f"{pair[1]}/adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.weight": torch.zeros(400, 64)}, path)
    with pytest.raises(Exception, match=r"adapter1/adapter_model.safetensors holds .* tokens were added"):
        find_shared_base(pair)


def test_damage_is_one_line(pair: list[str]) -> None:
    (Path(pair[1]) / "run.json").write_text(json.dumps({"base": 1}))
    with pytest.raises(UserError, match=r"adapter1/run.json is damaged"):
        check_one_base(pair)
