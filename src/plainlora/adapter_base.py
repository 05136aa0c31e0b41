"""The base of a saved adapter: which one, how training stored it, and which classes a classifier has."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.errors import UserError
from plainlora.lora.interchange import read_config, saved_shapes
from plainlora.models import classifier_config, load_causal_lm, load_classifier, load_tokenizer

BaseKind = Literal["16bit", "dequantized"]

# Where an architecture keeps the rows of its classes.
CLASS_ROWS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")


def base_of(adapter: str | Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter was trained on.

    Raises:
        UserError: It names none, or a folder that is not there.
        LoRAError: It is no adapter.
    """
    config = read_config(adapter)
    if not config.base_model_name_or_path:
        raise UserError(f"{adapter}/adapter_config.json names no base model; set base_model_name_or_path in it")
    return _find_base(config.base_model_name_or_path, Path(adapter)), config.revision


def _find_base(name: str, adapter: Path) -> str:
    """A base named by a relative path, as in `recipes/quickstart/base`, is also looked for from the adapter upwards.

    A name without a slash is left to the Hub: a folder that happens to be called `gpt2` is not what it means.
    """
    if Path(name).expanduser().exists() or "/" not in name:
        return name
    for parent in adapter.resolve().parents:
        if (parent / name / "config.json").is_file():
            return str(parent / name)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise UserError(
            f"{adapter}/adapter_config.json names the base {name}, which is no folder here; run from where it was "
            "trained, or edit base_model_name_or_path"
        )
    return name


def load_tokenizer_of(adapter: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, with training's template; the base's if none was saved."""
    name, revision = base_of(adapter)
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    return load_tokenizer(str(adapter)) if own else load_tokenizer(name, revision)


def read_run(folder: str | Path) -> dict[str, Any]:
    """What the training that wrote a folder, or the run around a checkpoint, recorded; empty without a `run.json`.

    Raises:
        UserError: It is damaged.
    """
    folder = Path(folder)
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); take it away to go on without it") from error
    problem = _find_damage(content)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); take it away to go on without it")
    return cast(dict[str, Any], content)


def _find_damage(run: object) -> str | None:
    """What no `write_run` can have written."""
    if not isinstance(run, dict) or "quantization_config" not in run:
        return "it has no quantization_config"
    for name in ("quantization_config", "arguments"):
        if not isinstance(run.get(name), dict | None):
            return f"its {name} is no mapping"
    labels = run.get("labels")
    if not isinstance(labels, list | None) or not all(isinstance(label, str) for label in labels or ()):
        return "its labels are no list of names"
    if not isinstance((run.get("arguments") or {}).get("max_length"), int | None):
        return "its max_length is no whole number"
    return None


def training_quantization(adapter: str | Path) -> dict[str, Any] | None:
    """How the base was quantised in training, from `run.json`; `None` if it was not, or if that is unknown."""
    return read_run(adapter).get("quantization_config")


def class_labels(adapter: str | Path) -> list[str] | None:
    """Names of a classifier's classes; `None` for a causal language model.

    They stand in `run.json`. Without one, as for adapters of elsewhere, the head in the file says how many there are.
    """
    if labels := read_run(adapter).get("labels"):
        return list(labels)
    config = read_config(adapter)
    base_class = (config.auto_mapping or {}).get("base_model_class", "")  # beside it, PEFT's files name no task
    if config.task_type != "SEQ_CLS" and not base_class.endswith("ForSequenceClassification"):
        return None
    for name, shape in saved_shapes(adapter).items():
        if name.replace(".base_layer.", ".").endswith(CLASS_ROWS):
            return [f"LABEL_{number}" for number in range(shape[0])]
    raise UserError(f"{adapter} is a classifier's adapter without its head: its predictions are lost, train it again")


def load_base_of(adapter: str | Path, base: BaseKind = "16bit", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The base of an adapter: the checkpoint as it is, or what training saw of it through 4 or 8 bits.

    Raises:
        UserError: `dequantized` was asked for, but the adapter was not trained on a quantised base.
    """
    if base == "16bit":
        return _load(adapter, dtype, None)
    quantization = training_quantization(adapter)
    if quantization is None:
        raise UserError(
            f"{adapter} was not trained on a quantised base (says its run.json, or it has none): use --base 16bit"
        )
    model = _load(adapter, dtype, BitsAndBytesConfig(**quantization))
    return model.dequantize().to(model.dtype)


def load_quantized_base_of(adapter: str | Path) -> PreTrainedModel:
    """The base stored as it was in training, quantised or not."""
    quantization = training_quantization(adapter)
    return _load(adapter, "auto", None if quantization is None else BitsAndBytesConfig(**quantization))


def _load(adapter: str | Path, dtype: torch.dtype | str, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    name, revision = base_of(adapter)
    labels = class_labels(adapter)
    if labels is None:
        return load_causal_lm(name, revision=revision, dtype=dtype, quantization=quantization)
    config = classifier_config(name, labels, load_tokenizer_of(adapter).pad_token_id, revision)
    model, _ = load_classifier(config, name, revision=revision, dtype=dtype, quantization=quantization)
    return model
