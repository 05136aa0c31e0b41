"""Folders of trained language models, adapters and whole ones: each checked to be what it is given as."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from plainlora.base.classifier import is_classifier
from plainlora.base.config import load_config
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.errors import UserError
from plainlora.run.adapter_base import class_labels
from plainlora.run.folder import holds_adapter

BASE, TUNED, MODEL = "base", "tuned", "model"  # who answers


def check_adapters(adapters: Sequence[str]) -> None:
    """Checks that folders are adapters of language models.

    Raises:
        UserError: One is a whole model, such as the merged model beside an adapter, or a classifier's.
        LoRAError: One holds no adapter.
    """
    for adapter in adapters:
        _refuse_whole_model(Path(adapter))
    for adapter in adapters:
        if class_labels(adapter) is not None:
            raise UserError(f"{adapter} is a classifier's; use plainlora predict --model {adapter}")


def _refuse_whole_model(folder: Path) -> None:
    config = folder / "config.json"
    whole = config.is_file() or (folder / "certificate.json").is_file()
    if whole and not holds_adapter(folder):
        if config.is_file() and "ForSequenceClassification" in config.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{folder} is a classifier; use plainlora predict --model {folder}")
        raise UserError(f"{folder} is a whole model, not an adapter; give it as --model {folder}")


def tokenizer_of_model(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a whole language model, which is checked; no weights are loaded.

    Raises:
        UserError: It is an adapter, a classifier, or no model.
    """
    if holds_adapter(name):
        raise UserError(f"{name} is an adapter; give it as --adapter {name}")
    config = load_config(name)
    if is_classifier(config):
        raise UserError(f"{name} is a classifier; use plainlora predict --model {name}")
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, config)
    return tokenizer


def answer_names(adapters: Sequence[str]) -> list[str]:
    """The names under which adapters answer beside `base`: `tuned` if there is one, else those of their folders."""
    if len(adapters) == 1:
        return [TUNED]
    return [f"./{adapter}" if adapter in (BASE, TUNED) else adapter for adapter in adapters]
