"""PEFT's files: written here and read there, written there and read here, and whatever else a folder may hold."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from plainlora import disabled, load_adapter, save_adapter, unwrap
from plainlora.lora.errors import LoRAError
from plainlora.lora.inject import inject
from plainlora.lora.interchange import adapter_state_dict, load_adapter_weights, read_config
from plainlora.lora.layer import LoRALinear
from plainlora.lora.module_to_save import ModuleToSave
from plainlora.lora.record import lora_layers
from plainlora.lora.targets import find_targets
from tests.conftest import VOCABULARY
from tests.lora.oracle import (
    Q_LIN,
    assert_equal_tensors,
    by_us,
    config,
    logits,
    make,
    move,
    pair,
    requires_grad,
    snapshot,
    trainable,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's loading reads it
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LM = {"task_type": "CAUSAL_LM"}
CASES = {
    "llama": ("llama", LM | {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}),
    "gpt2": ("gpt2", LM | {"use_rslora": True}),
    "all-linear": ("qwen2", LM | {"target_modules": "all-linear"}),
    "regex": ("llama", LM | {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "excluded": ("llama", LM | {"target_modules": "all-linear", "exclude_modules": ["o_proj", "up_proj"]}),
    "layers": ("llama", LM | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": ("llama", LM | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "bias all": ("qwen2", LM | {"bias": "all"}),
    "bias all Conv1D": ("gpt2", LM | {"bias": "all"}),
    "bias lora_only": ("gpt2", LM | {"bias": "lora_only"}),
    "head": ("llama", LM | {"modules_to_save": ["lm_head"]}),
    "tied head": ("qwen2", LM | {"modules_to_save": ["lm_head"]}),
    "norm": ("llama", LM | {"modules_to_save": ["norm"]}),
    "gaussian": ("llama", LM | {"init_lora_weights": "gaussian"}),
    "classifier": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN}),
    "classifier, all biases": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": Q_LIN, "bias": "all"}),
    "score": ("gpt2-score", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "no task": ("llama", {}),
}
cases = pytest.mark.parametrize("case", CASES)


def load_with_peft(kind: str, directory: Path, **options: object) -> PeftModel:
    """PEFT's loading. A missing key, of which it warns, is an error here; so is an unexpected one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(make(kind), directory, **options)
        result = model.load_adapter(directory, "default", **options)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model.eval()


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What PEFT wrote, but for the biases that it writes over again, frozen ones included, under bias="all"."""
    tensors = load_file(directory / WEIGHTS)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith((".modules_to_save.bias", ".original_module.bias"))
    }


def saved_pair(case: str, tmp_path: Path) -> tuple[str, Path, Path]:
    """The same adapter saved by each side: the model, our folder, PEFT's folder."""
    kind, options = CASES[case]
    ours, theirs = pair(kind, **options)
    move(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "peft")
    return kind, tmp_path / "ours", tmp_path / "peft"


@cases
def test_the_files_are_peft_s(case: str, tmp_path: Path) -> None:
    kind, ours, theirs = saved_pair(case, tmp_path)
    assert_equal_tensors(load_file(ours / WEIGHTS), read_tensors(theirs))
    content, expected = (json.loads((directory / CONFIG).read_text()) for directory in (ours, theirs))
    assert content.keys() == expected.keys()
    for field in content.keys() - {"target_modules", "exclude_modules", "modules_to_save"}:
        assert content[field] == expected[field], field
    # Lists that PEFT writes in the order of a set, and twice over where it names the heads itself.
    for field in ("exclude_modules", "modules_to_save"):
        assert set(content[field] or ()) == set(expected[field] or ()), field
    base = make(kind)
    assert find_targets(base, read_config(ours)) == find_targets(base, read_config(theirs))
    assert (content["auto_mapping"] is not None) == (case == "no task")


@cases
def test_peft_loads_what_is_saved_here(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    ours, _ = pair(kind, **options)
    move(ours)
    save_adapter(ours, tmp_path)
    assert torch.equal(logits(load_with_peft(kind, tmp_path)), logits(ours))
    assert not torch.equal(logits(make(kind)), logits(ours))


@cases
def test_what_peft_saves_is_loaded_here(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    _, theirs = pair(kind, **options)
    move(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make(kind), tmp_path)), logits(theirs))


@cases
def test_there_and_back_changes_no_bit(case: str, tmp_path: Path) -> None:
    kind, ours, theirs = saved_pair(case, tmp_path)
    original = load_file(ours / WEIGHTS)
    load_with_peft(kind, ours).save_pretrained(tmp_path / "peft 2")
    save_adapter(load_adapter(make(kind), tmp_path / "peft 2"), tmp_path / "ours 2")
    assert_equal_tensors(load_file(tmp_path / "ours 2" / WEIGHTS), original)

    save_adapter(load_adapter(make(kind), theirs), tmp_path / "ours 3")
    load_with_peft(kind, tmp_path / "ours 3").save_pretrained(tmp_path / "peft 3")
    assert_equal_tensors(load_file(tmp_path / "peft 3" / WEIGHTS), load_file(theirs / WEIGHTS))
    assert_equal_tensors(read_tensors(tmp_path / "peft 3"), original)


@cases
def test_u09_going_on_trains_what_peft_trains(case: str, tmp_path: Path) -> None:
    kind, ours, _ = saved_pair(case, tmp_path)
    model = load_adapter(make(kind), ours, trainable=True)
    expected = load_with_peft(kind, ours, is_trainable=True)
    assert_equal_tensors(trainable(model), trainable(expected))
    assert trainable(model)


@cases
def test_u09_loading_draws_nothing_at_random(case: str, tmp_path: Path) -> None:
    kind, ours, _ = saved_pair(case, tmp_path)
    first = snapshot(load_adapter(make(kind), ours))
    model = make(kind)
    torch.manual_seed(12345)
    assert_equal_tensors(snapshot(load_adapter(model, ours)), first)


class Written(TorchDispatchMode):
    """The names of the operations that write real memory: copies and random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in ("copy_", "clone", "_to_copy", "uniform_", "normal_", "zeros_", "zero_") and not out.is_meta:
            self.names.append(name)
        return out


def test_loading_and_saving_copy_and_draw_nothing(tmp_path: Path) -> None:
    model = by_us(make("llama"), **LM)
    move(model)
    with Written() as saving:
        save_adapter(model, tmp_path)
    base = make("llama")
    before = torch.get_rng_state()
    with Written() as loading:
        loaded = load_adapter(base, tmp_path)
    assert saving.names == loading.names == []
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(loaded), logits(model))
    with Written() as again:  # an optimizer may hold these parameters: they are written to, not replaced
        load_adapter_weights(loaded, tmp_path)
    assert again.names == ["copy_"] * 8


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    model = by_us(make("llama"), **LM)
    move(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(make("llama"), tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_of_another_precision_fills_parameters_of_the_usual_one(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = by_us(make("llama", dtype), **LM)
    move(model)
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    loaded = adapter_state_dict(load_adapter(make("llama", dtype), tmp_path))
    for name, tensor in adapter_state_dict(model).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.to(stored).to(tensor.dtype))


def test_a_strided_tensor_and_a_shared_one_are_saved(tmp_path: Path) -> None:
    model = by_us(make("llama"), **LM)
    move(model)
    (_, one), (_, other), *_ = lora_layers(model)
    one.lora_A.weight = torch.nn.Parameter(one.lora_A.weight.detach().T.contiguous().T)
    other.lora_A.weight = one.lora_A.weight
    assert not one.lora_A.weight.is_contiguous()
    save_adapter(model, tmp_path)
    assert_equal_tensors(load_file(tmp_path / WEIGHTS), adapter_state_dict(model))


def test_u09_loading_to_use_freezes_and_evaluates(tmp_path: Path) -> None:
    _, ours, _ = saved_pair("llama", tmp_path)
    model = load_adapter(make("llama").train(), ours)
    assert not any(requires_grad(model).values())
    assert not any(module.training for module in model.modules())
    model = load_adapter(make("llama").train(), ours, trainable=True)
    assert all(layer.training and layer.lora_dropout.p == 0.1 for _, layer in lora_layers(model))


def test_u09_weights_go_back_into_a_model_that_carries_the_adapter(tmp_path: Path) -> None:
    model = by_us(make("llama"), **LM)
    move(model)
    save_adapter(model, tmp_path)
    saved, needed = snapshot(model), requires_grad(model)
    move(model)
    load_adapter_weights(model, tmp_path)
    assert_equal_tensors(snapshot(model), saved)
    assert requires_grad(model) == needed


def test_the_base_and_its_revision_are_written_down(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    save_adapter(by_us(base, revision="refs/pr/1"), tmp_path / "ours")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), config(), revision="refs/pr/1")
    theirs.save_pretrained(tmp_path / "peft")
    for directory in ("ours", "peft"):
        written = read_config(tmp_path / directory)
        assert written.base_model_name_or_path == str(model_dirs["llama"])
        assert written.revision == "refs/pr/1"
        assert written.inference_mode


def test_adapters_of_a_half_precision_base_are_saved_in_fp32(tmp_path: Path) -> None:
    ours, theirs = pair("llama", torch.bfloat16, **LM, modules_to_save=["lm_head"])
    move(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "peft")
    written = load_file(tmp_path / "ours" / WEIGHTS)
    assert_equal_tensors(written, load_file(tmp_path / "peft" / WEIGHTS))
    assert {tensor.dtype for name, tensor in written.items() if ".lora_" in name} == {torch.float32}
    assert torch.equal(logits(load_adapter(make("llama", torch.bfloat16), tmp_path / "ours")), logits(ours))


def test_saving_leaves_the_model_and_other_files_alone(tmp_path: Path) -> None:
    model = by_us(make("llama"), modules_to_save=["lm_head"])
    move(model)
    (tmp_path / "notes.txt").write_text("mine")
    before, needed = snapshot(model), requires_grad(model)
    save_adapter(model, tmp_path)
    save_adapter(model, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", WEIGHTS, CONFIG}
    assert_equal_tensors(snapshot(model), before)
    assert requires_grad(model) == needed
    with disabled(model):
        assert torch.equal(logits(model), logits(make("llama")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_saved(value: float, tmp_path: Path) -> None:
    model = by_us(make("llama"))
    save_adapter(model, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    name, matrix = list(trainable(model).items())[-1]
    matrix.data[0, 0] = value
    for directory in ("good", "new"):
        with pytest.raises(LoRAError, match=f"{name} holds values that are not finite; nothing was saved"):
            save_adapter(model, tmp_path / directory)
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_saving_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match="no PlainLoRA adapter"):
        save_adapter(make("llama"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edit_config(directory: Path, **changes: object) -> None:
    content = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(content | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def save_by_peft(peft_config: PeftConfig) -> Callable[[Path], None]:
    return lambda directory: get_peft_model(make("llama"), peft_config).save_pretrained(directory)


def with_embeddings(directory: Path, added: int, **options: object) -> None:
    """What PEFT itself saves once tokens were added, or with `save_embedding_layers`."""
    model = make("llama")
    model.resize_token_embeddings(model.config.vocab_size + added)
    model.get_input_embeddings().weight.data += 1
    get_peft_model(model, config(**LM, **options)).save_pretrained(directory, save_embedding_layers=True)


NORM = {"base_model.model.model.layers.0.input_layernorm.weight": torch.full((64,), 3.0)}


def only_a_pickle(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()


def cut(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def flip_a_bit_of_the_header(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[8] ^= 0x40
    (directory / WEIGHTS).write_bytes(content)


def of_a_wider_base(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({first(tensors): torch.zeros(8, 128)}))


def of_four_bits(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, f"does not exist, so it has no {CONFIG}"),
    "no config": (lambda path: (path / CONFIG).unlink(), f"has no {CONFIG}; give the folder that training wrote"),
    "not JSON": (lambda path: (path / CONFIG).write_text("{"), "is not a PEFT adapter config"),
    "not text": (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe{}"), "is not a PEFT adapter config"),
    "empty": (lambda path: (path / CONFIG).write_text(""), "is not a PEFT adapter config"),
    "a list": (lambda path: (path / CONFIG).write_text("[]"), "is not a"),
    "a number": (lambda path: (path / CONFIG).write_text("3"), "is not a"),
    "no PEFT type": (lambda path: (path / CONFIG).write_text("{}"), "is not a"),
    "no such PEFT type": (lambda path: edit_config(path, peft_type="LOTA"), "is not a PEFT adapter config"),
    "IA3": (
        save_by_peft(IA3Config(task_type="CAUSAL_LM")),
        "is not a LoRA config but of PEFT's type IA3; this package reads LoRA adapters only; load it with PEFT",
    ),
    "AdaLoRA": (
        save_by_peft(AdaLoraConfig(task_type="CAUSAL_LM", total_step=10)),
        "is not a LoRA config but of PEFT's type ADALORA; this package reads LoRA adapters only; load it with PEFT",
    ),
    "LoRA on embeddings": (
        save_by_peft(config(**LM | {"target_modules": ["q_proj", "embed_tokens"]})),
        r"'model.embed_tokens' is a Embedding; this LoRA adapts linear layers \(.*\); load it with PEFT",
    ),
    "DoRA": (lambda path: edit_config(path, use_dora=True), r"lacks .*lora_magnitude_vector"),
    "single tokens": (
        lambda path: edit_config(path, trainable_token_indices=[5]),
        r"trained with trainable_token_indices=\[5\], which this LoRA does not implement; load it with PEFT",
    ),
    "parameters": (
        lambda path: edit_config(path, target_parameters=["experts.down_proj"]),
        r"trained with target_parameters=\['experts.down_proj'\], which this LoRA does not implement; load it",
    ),
    "added tokens": (
        lambda path: with_embeddings(path, added=3),
        f"embed_tokens.weight, the embeddings of {VOCABULARY + 3:,} tokens, and the base has {VOCABULARY:,}: tokens",
    ),
    "added tokens, trained whole": (
        lambda path: with_embeddings(path, added=3, modules_to_save=["embed_tokens", "lm_head"]),
        f"the embeddings of {VOCABULARY + 3:,} tokens, and the base has {VOCABULARY:,}: tokens were added",
    ),
    "other embeddings": (
        lambda path: with_embeddings(path, added=0),
        "holds base_model.model.model.embed_tokens.weight, a weight of the base with other values than this base's",
    ),
    "a trained norm, unsaid": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update(NORM)),
        "layers.0.input_layernorm.weight, a weight of the base with other values",
    ),
    "bad rank": (lambda path: edit_config(path, r="eight"), "r must be a whole number"),
    "bad dropout": (lambda path: edit_config(path, lora_dropout="much"), "lora_dropout must"),
    "a huge rank": (lambda path: edit_config(path, r=10**30), "r is 1,000,000,.*, more than any layer is wide"),
    "a true rank": (lambda path: edit_config(path, r=True), "r must be a whole number"),
    "a huge alpha": (lambda path: edit_config(path, lora_alpha=10**400), "lora_alpha must be a finite number"),
    "numbered targets": (
        lambda path: edit_config(path, target_modules=[1, "q_proj"]),
        "target_modules must be a list",
    ),
    "nested modules": (
        lambda path: edit_config(path, modules_to_save=[["lm_head"]]),
        "modules_to_save must be a list",
    ),
    "a text of ranks": (lambda path: edit_config(path, rank_pattern="q_proj"), "rank_pattern must be a mapping"),
    "layers by name": (
        lambda path: edit_config(path, layers_to_transform=["a"]),
        "layers_to_transform must be a list",
    ),
    "a numbered base": (
        lambda path: edit_config(path, base_model_name_or_path=5),
        "base_model_name_or_path must be a",
    ),
    "a listed mapping": (lambda path: edit_config(path, auto_mapping=[]), "auto_mapping must be a mapping"),
    "nested too deep": (
        lambda path: (path / CONFIG).write_text("[" * 9999 + "]" * 9999),
        "is not a PEFT adapter config",
    ),
    "no targets": (lambda path: edit_config(path, target_modules=["query"]), "none of query names a module"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"has no {WEIGHTS}; give the folder"),
    "a pickle": (only_a_pickle, "adapter_model.bin is a pickle, which can run code"),
    "cut short": (cut, "is corrupt or cut short"),
    "a flipped bit": (flip_a_bit_of_the_header, "is corrupt or cut short"),
    "no bytes": (lambda path: (path / WEIGHTS).write_bytes(b""), "is corrupt or cut short"),
    "a missing key": (
        lambda path: edit_tensors(path, lambda tensors: tensors.pop(first(tensors))),
        "lacks base_model.model.model.layers.0.*; it belongs to another base model or another target_modules",
    ),
    "many missing keys": (lambda path: edit_config(path, target_modules="all-linear"), "lacks .* and 17 more; "),
    "an unexpected key": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update(more=torch.zeros(1))),
        "holds more, which this model has no place for",
    ),
    "a wider base": (of_a_wider_base, r"has shape \(8, 128\), the model needs \(8, 64\)"),
    "another rank": (lambda path: edit_config(path, r=4), r"has shape \(8, .*\), the model needs \(4, "),
    "four bits": (of_four_bits, "is corrupt or cut short"),
    "a class by number": (
        lambda path: edit_config(path, auto_mapping={"base_model_class": 5}),
        "auto_mapping must be a mapping that names a class, not {'base_model_class': 5}",
    ),
    "a misspelt field": (
        lambda path: edit_config(path, lora_alphb=3, newer_field=None),
        "would ignore lora_alphb=3; update PEFT, or take it out of the file",
    ),
    "LoftQ's settings": (
        lambda path: edit_config(path, newer={"a": 1}),
        "would ignore newer={'a': 1}; ",
    ),
    "settings of a run": (
        lambda path: edit_config(path, runtime_config={"ephemeral_gpu_offload": True}),
        "would ignore runtime_config={'ephemeral_gpu_offload': True}; ",
    ),
    "whole numbers": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update({first(tensors): torch.ones(8, 64).int()})),
        "is of type torch.int32, not a float; save the adapter again",
    ),
    "NaN": (
        lambda path: edit_tensors(path, lambda tensors: tensors[max(tensors)].fill_(float("nan"))),
        "holds values that are not finite: the training diverged; train it again",
    ),
}


# Said in the words of the config's fields, whether they come from a file or from a program.
OF_THE_CONFIG = (
    *("bad rank", "a huge rank", "a true rank", "a huge alpha", "bad dropout", "no targets"),
    *("numbered targets", "nested modules", "a text of ranks", "layers by name", "LoRA on embeddings"),
)


@pytest.mark.parametrize("fault", BAD)
def test_u09_a_bad_folder_is_one_clear_line_and_no_harm(fault: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    adapter = by_us(make("llama"), **LM)
    move(adapter)
    save_adapter(adapter, directory)
    spoil, match = BAD[fault]
    spoil(directory)

    model = make("llama").train()
    model.model.embed_tokens.requires_grad_(False)
    before, needed = snapshot(model), requires_grad(model)
    with pytest.raises(LoRAError, match=match) as caught:
        load_adapter(model, directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value) or fault in OF_THE_CONFIG
    assert_equal_tensors(snapshot(model), before)
    assert requires_grad(model) == needed
    assert all(module.training for module in model.modules())
    assert not any(isinstance(module, (LoRALinear, ModuleToSave)) for module in model.modules())
    assert not hasattr(model, "plainlora")
    inject(model, config())  # nor does it stand in the way of the next


def test_embeddings_that_are_the_base_s_own_do_not_stand_in_the_way(tmp_path: Path) -> None:
    theirs = get_peft_model(make("llama"), config(**LM))
    move(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path)), logits(theirs.eval()))


def test_u09_a_bad_folder_spares_an_adapter_that_is_in_use(tmp_path: Path) -> None:
    model = by_us(make("llama"), **LM, bias="all", modules_to_save=["lm_head"])
    move(model)
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[max(tensors)].fill_(float("nan")))
    before = snapshot(model)
    with pytest.raises(LoRAError, match="not finite"):
        load_adapter_weights(model, tmp_path)
    assert_equal_tensors(snapshot(model), before)


def test_the_state_dict_is_the_model_s_own_tensors() -> None:
    model = by_us(make("llama"), **LM)
    state = adapter_state_dict(model)
    assert len(state) == 8
    for name, parameter in trainable(model).items():
        assert state[f"base_model.model.{name}"].data_ptr() == parameter.data_ptr()
    with pytest.raises(LoRAError, match="no PlainLoRA adapter"):
        adapter_state_dict(unwrap(model))


def test_a_newer_peft_s_fields_that_are_not_set_are_passed_over_in_silence(tmp_path: Path) -> None:
    save_adapter(by_us(make("llama"), **LM), tmp_path)
    unset = {"newer": None, "use_newer": False, "newer_config": {}, "runtime_config": {"ephemeral_gpu_offload": False}}
    edit_config(tmp_path, **unset, fan_in_fan_out=None, loftq_config={"loftq_bits": 4})  # which LoftQ has begun with
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(tmp_path).r == 8


def test_the_tensors_are_as_readable_as_the_config(tmp_path: Path) -> None:
    save_adapter(by_us(make("llama"), **LM), tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


def test_a_config_of_an_older_peft_is_read(tmp_path: Path) -> None:
    """Fields that came later are left out there, and take their defaults."""
    model = by_us(make("llama"), **LM)
    move(model)
    save_adapter(model, tmp_path)
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type")
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({field: content[field] for field in kept}))
    assert isinstance(read_config(tmp_path), LoraConfig)
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path)), logits(model))
