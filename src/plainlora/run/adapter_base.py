"""Finds and loads the base of a saved adapter, and reads what its run recorded."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.backends import BACKENDS, Backend, choose_loader
from plainlora.base.classifier import build_skeleton, classifier_config, load_classifier
from plainlora.base.config import load_config
from plainlora.base.identity import describe_base, find_difference, is_description, name_base
from plainlora.base.loading import build_decoder, dequantized, load_causal_lm
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.errors import UserError, first_line
from plainlora.json_files import read_mapping
from plainlora.lora.interchange import read_config, saved_shapes

BaseKind = Literal["16bit", "dequantized"]

# Weights of classification heads, one row for each class.
CLASS_ROWS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")


@dataclass(frozen=True)
class Base:
    """The base of an adapter, as checked by `find_base`.

    Attributes:
        name: Hub id or local folder.
        revision: Branch, tag or commit on the Hub.
        trained_on: `describe_base` of the base of training; `None` if no recipe of this project wrote the adapter.
        warning: A difference from the base of training with which it may still be used, if there is one.
        backend: Loads the adapter: the hand-written form, or PEFT for what it alone implements.
    """

    name: str
    revision: str | None
    trained_on: dict[str, Any] | None = None
    warning: str | None = None
    backend: Backend = BACKENDS["reference"]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """`describe_base` of this base."""
        return describe_base(self.name, self.revision)


def find_base(adapter: str | Path, base_model: str | None = None, allow_other_base: bool = False) -> Base:
    """The base of an adapter, checked to be the one that it was trained on. No weights are loaded.

    Args:
        adapter: The adapter's folder.
        base_model: Hub id or folder to use instead of the base that `adapter_config.json` names.
        allow_other_base: Whether other weights of the same shapes are only a warning.

    Raises:
        UserError: The base cannot be loaded, or it is another one.
        LoRAError: The folder holds no adapter, or the adapter does not fit the base.
    """
    name, revision = base_of(adapter) if base_model is None else (base_model, None)
    read_config(adapter)
    trained = read_run(adapter).get("base")
    base = Base(name, revision, trained)
    if trained and (warning := _difference(adapter, base, allow_other_base)):
        base = replace(base, warning=warning)
    skeleton = skeleton_of(adapter, base)
    base = replace(base, backend=choose_loader(adapter, skeleton))
    if skeleton is not None:
        base.backend.load(skeleton, adapter)
    return base


def _difference(adapter: str | Path, base: Base, allow_other_base: bool) -> str | None:
    """A tolerated difference between a base and the base of training; `None` if there is none. Raises for others."""
    assert base.trained_on is not None
    difference = find_difference(base.trained_on, base.identity)
    if difference is None:
        return None
    both = f"{adapter} was trained on {name_base(base.trained_on)}, and {name_base(base.identity)}"
    other = {
        "architecture": "is another architecture",
        "tensors": "has other tensors or shapes",
        "weights": "holds other weights of the same shapes",
        "precision": "is the same in another precision, so that answers differ by rounding",
    }
    if difference == "precision" or (allow_other_base and difference != "architecture"):
        return f"{both} {other[difference]}"
    advice = "" if difference == "architecture" else ", or continue with --allow_other_base"
    raise UserError(f"{both} {other[difference]}; give the base it was trained on with --base_model{advice}")


def base_of(adapter: str | Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter was trained on.

    Raises:
        UserError: The adapter names no base, or a folder that does not exist.
        LoRAError: The folder holds no adapter.
    """
    config = read_config(adapter)
    if not config.base_model_name_or_path:
        raise UserError(
            f"{adapter}/adapter_config.json names no base model; set base_model_name_or_path in it, or give "
            "--base_model"
        )
    return _find_base(config.base_model_name_or_path, Path(adapter)), config.revision


def _find_base(name: str, adapter: Path) -> str:
    """The path of a base; a relative one, such as `recipes/quickstart/base`, may start at any parent of the adapter.

    A name without a slash is a Hub id, even if there is a folder called `gpt2`.
    """
    if os.path.exists(os.path.expanduser(name)) or "/" not in name:
        return name
    for parent in adapter.resolve().parents:
        if os.path.isfile(parent / name / "config.json"):
            return str(parent / name)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise UserError(
            f"{adapter}/adapter_config.json names the base {name}, which is not a folder here; run from where it was "
            "trained, or give --base_model"
        )
    return name


def load_tokenizer_of(adapter: str | Path, base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, with its chat template; the base's if none was saved."""
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter)) if own else load_tokenizer(base.name, base.revision)
    check_vocabulary(tokenizer, load_config(base.name, base.revision))
    return tokenizer


def read_run(folder: str | Path) -> dict[str, Any]:
    """Reads `run.json` of a run's folder, or of the run of a checkpoint; empty if there is none.

    Raises:
        UserError: The file is damaged.
    """
    folder = Path(folder)
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json"
    if not path.is_file():
        return {}
    try:
        content = read_mapping(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to continue without it") from error
    problem = _find_damage(content) or _find_quantization_damage(content)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); remove it to continue without it")
    return content


def _find_damage(run: dict[str, Any]) -> str | None:
    """What is wrong with the content of a `run.json`, in one clause; `None` if nothing is."""
    if "quantization_config" not in run:
        return "it has no quantization_config"
    for name in ("quantization_config", "arguments"):
        if not isinstance(run.get(name), dict | None):
            return f"its {name} is not a mapping"
    if run.get("base") is not None and not is_description(run["base"]):
        return "its base is not a description of one"
    labels = run.get("labels")
    if not isinstance(labels, list | None) or not all(isinstance(label, str) for label in labels or ()):
        return "its labels are not a list of names"
    if not isinstance((run.get("arguments") or {}).get("max_length"), int | None):
        return "its max_length is not a whole number"
    return None


def _find_quantization_damage(run: dict[str, Any]) -> str | None:
    try:
        BitsAndBytesConfig(**(run["quantization_config"] or {}))
    except Exception as error:  # of any class: it looks up names in torch
        return f"its quantization_config is not valid: {first_line(error)}"
    return None


def training_quantization(adapter: str | Path) -> dict[str, Any] | None:
    """How the base was quantised in training, from `run.json`; `None` if it was not, or if that is unknown."""
    return read_run(adapter).get("quantization_config")


def describe_original(adapter: str | Path, kind: BaseKind) -> Iterator[str]:
    """What is to be said if an adapter answers on the original checkpoint, and was trained on a quantised one."""
    if kind == "16bit" and training_quantization(adapter) is not None:
        yield (
            "trained on quantised weights; here the base is the original checkpoint; "
            "for what training saw of it: --base dequantized"
        )


def class_labels(adapter: str | Path) -> list[str] | None:
    """Names of a classifier's classes; `None` for a causal language model.

    They are read from `run.json`. Without one, their number is that of the rows of the saved head.
    """
    if labels := read_run(adapter).get("labels"):
        return list(labels)
    config = read_config(adapter)
    base_class = (config.auto_mapping or {}).get("base_model_class", "")  # also tells the task
    if config.task_type != "SEQ_CLS" and not base_class.endswith("ForSequenceClassification"):
        return None
    for name, shape in saved_shapes(adapter).items():
        if name.replace(".base_layer.", ".").endswith(CLASS_ROWS):
            return [f"LABEL_{number}" for number in range(shape[0])]
    raise UserError(f"{adapter} is a classifier's adapter without its head: its predictions are lost, train it again")


def load_base_of(
    adapter: str | Path,
    base: Base,
    kind: BaseKind = "16bit",
    dtype: torch.dtype | str = "auto",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Loads the base of an adapter: the original checkpoint, or the dequantised weights of its quantised base.

    Args:
        adapter: The adapter's folder.
        base: From `find_base`.
        kind: `16bit` for the checkpoint, `dequantized` for the weights of training.
        dtype: The dtype of the weights; `"auto"` for the checkpoint's.
        device: Where to put them; left to the libraries if left out.

    Raises:
        UserError: `dequantized` is asked for, but the adapter was not trained on a quantised base.
    """
    if kind == "16bit":
        return _load(adapter, base, dtype, None, device)
    quantization = training_quantization(adapter)
    if quantization is None:
        raise UserError(
            f"{adapter} was not trained on a quantised base, by its run.json, or has no run.json; use --base 16bit"
        )
    return dequantized(_load(adapter, base, dtype, BitsAndBytesConfig(**quantization), device))


def load_quantized_base_of(adapter: str | Path, base: Base) -> PreTrainedModel:
    """Loads the base as it was stored in training, quantised or not."""
    quantization = training_quantization(adapter)
    return _load(adapter, base, "auto", None if quantization is None else BitsAndBytesConfig(**quantization))


def _load(
    adapter: str | Path,
    base: Base,
    dtype: torch.dtype | str,
    quantization: BitsAndBytesConfig | None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": base.revision, "dtype": dtype, "quantization": quantization}
    options["device"] = device
    config = _classifier_config(adapter, base)
    return load_causal_lm(base.name, **options) if config is None else load_classifier(config, base.name, **options)[0]


def _classifier_config(adapter: str | Path, base: Base) -> PretrainedConfig | None:
    """The config of a classifier's base; `None` for a causal language model."""
    labels = class_labels(adapter)
    if labels is None:
        return None
    pad = load_tokenizer_of(adapter, base).pad_token_id
    return classifier_config(base.name, labels, pad, base.revision)


def skeleton_of(adapter: str | Path, base: Base) -> PreTrainedModel | None:
    """The base on the meta device; `None` if it cannot be built there."""
    config = _classifier_config(adapter, base)
    return build_decoder(load_config(base.name, base.revision)) if config is None else build_skeleton(config)
