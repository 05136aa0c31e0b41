"""PEFT adapter directory <-> injected model.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's files. The modules here have PEFT's attribute names,
so a tensor's name in the file is its name in the model plus a prefix.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import nn

from plainlora.lora.config import check_types
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.numerics import is_finite
from plainlora.lora.record import adapter_state, lora_layers, saved_modules
from plainlora.lora.targets import head_parameters

PREFIX = "base_model.model."
LORA_WEIGHTS = (".lora_A.weight", ".lora_B.weight")
LORA_MARK = ".lora_"  # in the name of every tensor that a LoRA layer of PEFT trains, variants included
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TEXTS = ("base_model_name_or_path", "revision", "task_type")  # fields of a config that are names


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their names in PEFT's file. They are the model's own, not copies.

    Raises:
        LoRAError: The model carries no adapter of this package.
    """
    record = adapter_state(model)
    bias = record.config.bias
    state: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model):
        state |= {f"{name}.{key}": value for key, value in layer.adapter_tensors().items()}
        if bias == "lora_only" and layer.bias is not None:
            state[f"{name}.base_layer.bias"] = layer.bias
    if bias == "all":
        state |= {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.endswith(".bias") and ".original_module." not in name and ".trained_module." not in name
        }
    for name, module in saved_modules(model):
        state |= {f"{name}.{key}": value for key, value in module.trained_module.state_dict(keep_vars=True).items()}
    if record.new_weights:
        state |= {name: parameter for name, parameter in model.named_parameters() if parameter in record.new_weights}
    return {PREFIX + name: tensor.detach() for name, tensor in state.items()}


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Runs `write(temporary path)` and renames, so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        write(temporary)
        temporary.chmod(mode)  # safetensors makes a file private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_tensors(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes contiguous CPU tensors without a copy; `save_file` would first look for shared storage."""
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in state.items()
    }
    _write_atomically(directory / SAFETENSORS_WEIGHTS_NAME, lambda path: serialize_file(specs, path, {"format": "pt"}))


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads.

    Args:
        model: A model from `inject` or `load_adapter`.
        directory: Created if it is missing; other files in it are left alone.

    Raises:
        LoRAError: There is no adapter, or one of its values is not finite. Nothing is then written.
    """
    config = copy.copy(adapter_state(model).config)
    if config.task_type is None:  # AutoPeftModel then reads the base's class from `auto_mapping`
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    write_adapter(adapter_state_dict(model), config, directory)


def write_adapter(tensors: dict[str, torch.Tensor], config: LoraConfig, directory: str | os.PathLike[str]) -> None:
    """Writes an adapter's two files.

    Args:
        tensors: By their names in PEFT's file.
        config: Its `inference_mode` is set, as PEFT does.
        directory: Created if it is missing; other files in it are left alone.

    Raises:
        LoRAError: A value is not finite. Nothing is then written.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise LoRAError(f"{name} holds values that are not finite; nothing was saved")
    config.inference_mode = True
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _write_tensors(target, state)
    _write_atomically(target / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def read_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """Reads `adapter_config.json`.

    Raises:
        LoRAError: The directory or file is missing, is not JSON, or describes something other than LoRA.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        if (path.parent / "config.json").is_file():
            raise LoRAError(f"{directory} is a whole model, not an adapter: it has no {CONFIG_NAME}")
        where = "has no" if path.parent.is_dir() else "does not exist, so it has no"
        raise LoRAError(f"{directory} {where} {CONFIG_NAME}; give the folder that training wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about the fields it drops: an error below
            config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # of any class: PEFT passes the file's values on unchecked
        raise LoRAError(f"{path} is not a PEFT adapter config ({error}); save the adapter again") from error
    if not isinstance(content, dict) or type(config) is not LoraConfig:  # AdaLoraConfig is a subclass
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise LoRAError(
            f"{path} is not a LoRA config but of PEFT's type {kind}; this package reads LoRA adapters only; "
            "load it with PEFT"
        )
    for name in TEXTS:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, str) or "\0" in value):
            raise LoRAError(f"{path}: {name} must be a text, not {value!r:.60}; save the adapter again")
    try:
        check_types(config)
    except LoRAError as error:
        raise LoRAError(f"{path}: {error}; save the adapter again") from error
    mapping = config.auto_mapping
    if not isinstance(mapping, dict | None) or not isinstance((mapping or {}).get("base_model_class", ""), str):
        raise LoRAError(f"{path}: auto_mapping must be a mapping that names a class, not {mapping!r:.60}")
    if dropped := _dropped(content):
        raise LoRAError(
            f"{path}: PEFT {peft.__version__} would ignore {some(dropped)}; update PEFT, or take it out of the file"
        )
    return config


def _dropped(content: dict[str, Any]) -> list[str]:
    """The fields that the file sets and that PEFT drops with a warning, such as those of a newer PEFT."""
    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    unset: tuple[object, ...] = (None, False, "", [], {}, {"ephemeral_gpu_offload": False})
    return [f"{name}={value!r:.60}" for name, value in content.items() if name not in known and value not in unset]


@contextmanager
def _opened(directory: str | os.PathLike[str]) -> Iterator[safe_open]:
    """Opens the safetensors file. It is read, not memory-mapped, so a later change of the file changes no tensor."""
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickle = Path(directory) / WEIGHTS_NAME
        if pickle.is_file():
            raise LoRAError(
                f"{pickle} is a pickle, which can run code when it is loaded; "
                f"convert it with PEFT (load it, then save_pretrained) and give the folder with {path.name}"
            )
        raise LoRAError(f"{directory} has no {path.name}; give the folder that training wrote")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoRAError(f"{path} is corrupt or cut short ({error}); copy or save the adapter again") from error


def read_tensors(directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The saved tensors by their names in the file.

    Raises:
        LoRAError: `adapter_model.safetensors` is missing or unreadable.
    """
    with _opened(directory) as file:
        return file.get_tensors()


def add_tensors(directory: str | os.PathLike[str], tensors: dict[str, torch.Tensor]) -> None:
    """Adds tensors to a saved adapter's file.

    Raises:
        LoRAError: The directory has no `adapter_model.safetensors`, or an unreadable one.
    """
    added = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    _write_tensors(Path(directory), read_tensors(directory) | added)


def saved_head_weights(model: nn.Module, directory: str | os.PathLike[str]) -> list[str]:
    """Names of the parameters outside the backbone that a saved adapter holds.

    Raises:
        LoRAError: `adapter_model.safetensors` is missing or unreadable.
    """
    with _opened(directory) as file:
        names = [name.removeprefix(PREFIX) for name in file.keys() if LORA_MARK not in name]  # noqa: SIM118
    saved = {name.replace(".base_layer.", ".") for name in names}
    return [name for name in head_parameters(model) if name in saved] if saved else []


def saved_shapes(directory: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every saved tensor, by its name in the file.

    Raises:
        LoRAError: `adapter_model.safetensors` is missing or unreadable.
    """
    with _opened(directory) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _drop_repeats(model: nn.Module, read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drops what PEFT repeats under `bias="all"`: the biases of a trained module's copy and of its frozen original."""
    copies = ("modules_to_save", "original_module")
    repeats = tuple(f"{PREFIX}{name}.{copied}." for name, _ in saved_modules(model) for copied in copies)
    return {name: tensor for name, tensor in read.items() if not name.startswith(repeats)}


def _refuse_other_vocabulary(
    model: nn.Module, name: str, saved: torch.Tensor, needed: torch.Tensor, path: Path
) -> None:
    """Raises `LoRAError` if a saved embedding or output head has another number of tokens than the base's.

    PEFT saves them where tokens were added (`save_embedding_layers`), or where they are in `modules_to_save`.
    """
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    embeddings = {key for key, module in model.named_modules(remove_duplicate=False) if module in ends}
    owner = name.removeprefix(PREFIX).rpartition(".")[0]
    if owner in embeddings and saved.shape[0] != needed.shape[0]:
        raise LoRAError(
            f"{path} holds {name}, the embeddings of {saved.shape[0]:,} tokens, and the base has {needed.shape[0]:,}: "
            f"tokens were added for this adapter; load it with PEFT after model.resize_token_embeddings"
            f"({saved.shape[0]}), and use the merged model (merge_and_unload)"
        )


def _drop_copies(
    model: nn.Module, read: dict[str, torch.Tensor], own: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Drops copies of the base's own weights, which PEFT writes under `save_embedding_layers`.

    Raises:
        LoRAError: Such a copy differs from the base's weight.
    """
    frozen = {PREFIX + name: value for name, value in model.named_parameters(remove_duplicate=False)}
    copies = sorted(read.keys() & frozen.keys() - own.keys())
    for name in copies:
        saved, own_weight = read[name], frozen[name]
        _refuse_other_vocabulary(model, name, saved, own_weight, path)
        if saved.shape != own_weight.shape or not (
            own_weight.is_meta or torch.equal(saved.to(own_weight), own_weight)
        ):
            raise LoRAError(
                f"{path} holds {name}, a weight of the base with other values than this base's, and modules_to_save "
                "does not name it; load it with PEFT, and use the merged model (merge_and_unload)"
            )
    return {name: tensor for name, tensor in read.items() if name not in copies}


@torch.no_grad()
def load_adapter_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Loads a saved adapter into a model that already carries one of the same shape.

    Values are copied into the model's own parameters. A and B on the meta device are replaced by the tensors read.

    Raises:
        LoRAError: A file is missing or unreadable, or a key is missing, unexpected, wrongly shaped or not finite. The
            model is then unchanged.
    """
    own, read = adapter_state_dict(model), _drop_repeats(model, read_tensors(directory))
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    read = _drop_copies(model, read, own, path)
    if missing := own.keys() - read.keys():
        raise LoRAError(
            f"{path} lacks {some(sorted(missing))}; it belongs to another base model or another target_modules"
        )
    if unexpected := read.keys() - own.keys():
        raise LoRAError(
            f"{path} holds {some(sorted(unexpected))}, which this model has no place for; is the base the right one?"
        )
    for name, tensor in read.items():
        if tensor.shape != own[name].shape:
            _refuse_other_vocabulary(model, name, tensor, own[name], path)
            raise LoRAError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}; "
                "the adapter was trained on another base model or rank"
            )
        if tensor.dtype not in FLOATS:
            raise LoRAError(f"{path}: {name} is of type {tensor.dtype}, not a float; save the adapter again")
        if not is_finite(tensor):
            raise LoRAError(f"{path}: {name} holds values that are not finite: the training diverged; train it again")
    for name, layer in lora_layers(model):
        for key, parameter in layer.adapter_tensors().items():
            if parameter.is_meta:
                tensor = read.pop(f"{PREFIX}{name}.{key}").to(layer.weight.device, parameter.dtype)
                owner, _, leaf = key.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, nn.Parameter(tensor))
    for name, tensor in read.items():
        own[name].copy_(tensor)
