"""What is recorded of a run: enough to tell it from another, and nothing that is secret."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from plainlora import inject
from plainlora.base.identity import describe_base
from plainlora.run.record import complete_run, digest_of_rows, digest_of_trained, write_run
from tests.conftest import make_model
from tests.test_report import arguments

ROWS = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])


def record(folder: Path, base: Path, **options: Any) -> dict[str, Any]:
    write_run(
        folder / "run.json",
        arguments(folder, **options),
        quantization={"load_in_4bit": True},
        base=describe_base(str(base)),
        rows={"train": ROWS, "test": None},
        model=nn.Linear(2, 2),
    )
    return json.loads((folder / "run.json").read_text())


def test_no_token_is_written_from_wherever_it_came(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [f"secret{number}" for number in range(7)]
    yaml = tmp_path / "recipe.yaml"
    yaml.write_text(f"seed: 7\nhub_token: {secrets[5]}\nenv:\n  WANDB_API_KEY: {secrets[6]}\n  AN_OWN: 1\n")
    command = [
        *("recipes/sft.py", "--config", str(yaml)),
        *("--hub_token", secrets[0], f"--hub_token={secrets[1]}", "--hub-token", secrets[2]),
        *(f"--push-to-hub-token={secrets[3]}", "--hub_model_id", "me/it", "--seed=7"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    written = record(tmp_path, model_dirs["llama"], hub_token=secrets[4], seed=7)
    text = (tmp_path / "run.json").read_text()
    assert not [secret for secret in secrets if secret in text]
    assert written["command"][3:] == [
        *("--hub_token", "...", "--hub_token=...", "--hub-token", "...", "--push-to-hub-token=..."),
        *("--hub_model_id", "me/it", "--seed=7"),
    ]
    assert written["config"] == {"seed": 7, "env": ["AN_OWN", "WANDB_API_KEY"]}
    assert written["arguments"]["seed"] == 7
    assert written["arguments"]["model_name_or_path"] == "openai-community/gpt2"
    assert "hub_token" not in written["arguments"]
    assert written["quantization_config"] == {"load_in_4bit": True}


def test_it_says_what_the_run_was_made_of(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py"])
    written = record(tmp_path, model_dirs["llama"])
    assert written["base"] == describe_base(str(model_dirs["llama"]))
    assert written["rows"] == {"train": {"rows": 2, "sha256": digest_of_rows(ROWS)}}
    assert written["config"] is None
    assert written["processes"] == 1
    assert {"torch", "peft", "trl", "transformers"} <= written["versions"].keys()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    (tmp_path / "run.json").unlink()
    complete_run(tmp_path / "run.json", written, "f00", 3)
    completed = json.loads((tmp_path / "run.json").read_text())
    assert completed.items() >= written.items()
    assert (completed["order_sha256"], completed["steps"]) == ("f00", 3)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's own example
    assert completed["weights"] == {"file": "adapter_model.safetensors", "sha256": abc}


@pytest.mark.parametrize("change", ["order", "label", "boundary"])
def test_rows_that_differ_have_another_digest(change: str) -> None:
    rows = ROWS.to_list()
    if change == "order":
        rows.reverse()
    elif change == "label":
        rows[0]["labels"][0] = -100
    else:
        rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    assert digest_of_rows(Dataset.from_list(rows)) != digest_of_rows(ROWS)
    assert digest_of_rows(Dataset.from_list(ROWS.to_list())) == digest_of_rows(ROWS)


def test_u17_the_digest_of_an_adapter_is_that_of_its_values_alone() -> None:
    def adapter(r: int = 2) -> nn.Module:
        return inject(make_model("llama"), LoraConfig(r=r, target_modules=["q_proj"]))

    model = adapter()
    before = digest_of_trained(model)
    model.model.embed_tokens.weight.data[0] += 1  # frozen
    assert digest_of_trained(model) == before == digest_of_trained(adapter())
    assert digest_of_trained(adapter(r=3)) != before
    model.model.layers[1].self_attn.q_proj.lora_B.weight.data[0, 0] = 1e-30
    assert digest_of_trained(model) != before
