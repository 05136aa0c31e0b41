"""Two bases are told apart by their files, and the same base is known again however it was saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from plainlora.base import identity
from plainlora.base.identity import (
    describe_base,
    find_difference,
    find_weight_files,
    is_description,
    name_base,
)
from plainlora.errors import UserError
from tests.conftest import CONFIGS, make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save(model: PreTrainedModel, folder: Path, **options: str) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def flip(path: Path, at: int) -> None:
    """Turns over the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", CONFIGS)
def test_u03_the_same_weights_are_known_again_however_they_are_saved(
    kind: str, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    known = describe_base(str(model_dirs[kind]))
    shards = save(make_model(kind), tmp_path / "shards", max_shard_size="100KB")
    assert len(find_weight_files(str(shards))) > 1
    copies = [save(AutoModelForCausalLM.from_pretrained(model_dirs[kind]), tmp_path / "copy"), shards]
    if make_model(kind).config.tie_word_embeddings:  # nothing is in the head alone
        copies.append(save(AutoModel.from_pretrained(model_dirs[kind]), tmp_path / "without_prefix"))
    for copy in copies:
        assert find_difference(known, describe_base(str(copy))) is None
    assert is_description(json.loads(json.dumps(known)))
    assert known["parameters"] == make_model(kind).num_parameters()


def test_the_causal_mask_in_published_files_is_no_weight(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    published = shutil.copytree(model_dirs["gpt2"], tmp_path / "published")
    file = published / "model.safetensors"
    mask = torch.ones(1, 1, 256, 256).tril()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}, file, {"format": "pt"})
    known = describe_base(str(model_dirs["gpt2"]))
    assert find_difference(known, describe_base(str(published))) is None
    name = "h.0.attn.c_attn.bias"  # almost called so, and a weight
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
    assert find_difference(known, describe_base(str(published))) == "weights"


def test_u03_what_another_base_differs_in(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    trained = describe_base(str(model_dirs["llama"]))

    def difference(name: str, model: PreTrainedModel) -> str | None:
        return find_difference(trained, describe_base(str(save(model, tmp_path / name))))

    wide = CONFIGS["llama"]()
    wide.intermediate_size = 192
    torch.manual_seed(1)
    another = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    assert find_difference(trained, describe_base(str(model_dirs["qwen2"]))) == "architecture"
    assert difference("wide", AutoModelForCausalLM.from_config(wide)) == "tensors"
    assert difference("another", another) == "weights"
    assert difference("another_bf16", another.to(torch.bfloat16)) == "weights"  # so not merely rounded
    for dtype in (torch.bfloat16, torch.float16):
        assert difference(str(dtype), make_model("llama").to(dtype)) == "precision"


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_u03_a_single_bit_is_seen(where: str, tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    trained = describe_base(str(folder))
    path = folder / "model.safetensors"
    start, end = 8 + int.from_bytes(path.read_bytes()[:8], "little"), path.stat().st_size
    flip(path, {"first": start, "middle": (start + end) // 2, "last": end - 1}[where])
    found = describe_base(str(folder))
    assert find_difference(trained, found) == "weights"
    assert name_base(trained) != name_base(found)


def test_of_a_large_checkpoint_rows_are_read_from_first_to_last(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE", 0)
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    trained = describe_base(str(folder))
    assert not trained["whole"]
    name, path = "model.layers.1.mlp.down_proj.weight", folder / "model.safetensors"
    tensors = load_file(path)
    for row, seen in ((0, True), (1, False), (63, True)):
        changed = tensors[name].clone()
        changed[row] += 1
        save_file(tensors | {name: changed}, path, {"format": "pt"})
        assert find_difference(trained, describe_base(str(folder))) == ("weights" if seen else None)


def test_a_base_in_the_hub_s_cache_has_its_commit(
    tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    save(make_model("llama"), repository / "snapshots" / COMMIT, max_shard_size="100KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = describe_base("someone/tiny")
    assert found["commit"] == COMMIT
    assert f"someone/tiny (llama, F32, commit {COMMIT[:8]}, weights {found['weights'][:8]})" == name_base(found)
    assert find_difference(describe_base(str(model_dirs["llama"])), found) is None


def _name_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(content))


def _cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_name_outside, "which is outside of its folder"),
        (_cut, "are corrupt or cut short"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "which is not there"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "index.json is damaged"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
    ],
)
def test_u23_a_damaged_or_wicked_checkpoint_is_refused(
    harm: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                         num_attention_heads=2, vocab_size=64))  # fmt: skip
    folder = save(model, tmp_path / "base", max_shard_size="10KB")
    harm(folder)
    with pytest.raises(UserError, match=said):
        describe_base(str(folder))


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "a\\b", "C:a", "", 4])
def test_u23_no_index_of_the_hub_leads_out_of_its_snapshot(
    name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(COMMIT)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="which is outside of its folder"):
        find_weight_files("someone/tiny")
