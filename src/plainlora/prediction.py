"""Classifies texts with a trained classifier: an adapter on its base, or a whole model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from plainlora.backends import Backend
from plainlora.base.classifier import is_classifier
from plainlora.base.config import class_names, context_length, load_config
from plainlora.base.loading import load_pretrained, to_accelerator
from plainlora.base.tokenizer import check_vocabulary, load_tokenizer
from plainlora.data.classification import tokenize_texts
from plainlora.errors import UserError
from plainlora.run.adapter_base import (
    class_labels,
    find_base,
    load_base_of,
    load_quantized_base_of,
    load_tokenizer_of,
    read_run,
    training_quantization,
)
from plainlora.run.folder import holds_adapter


@dataclass(frozen=True)
class Classifier:
    """A classifier that is ready to use.

    Attributes:
        model: Returns logits of shape `(batch, classes)`.
        tokenizer: Its tokenizer.
        labels: Name of each class, by number.
        max_length: Texts are cut to this many tokens, as in training.
        warnings: How its base differs from that of training.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    max_length: int | None
    warnings: tuple[str, ...] = ()


def load_trained_classifier(
    folder: str | Path,
    backend: Backend | None = None,
    base_model: str | None = None,
    allow_other_base: bool = False,
    as_trained: bool = False,
) -> Classifier:
    """Loads the output of `recipes/classify.py`, or another sequence classifier.

    Args:
        folder: Folder of an adapter or of a whole model.
        backend: Loads the adapter, if it is one; left out for the one that implements it.
        base_model: See `plainlora.run.adapter_base.find_base`.
        allow_other_base: See `plainlora.run.adapter_base.find_base`.
        as_trained: Whether an adapter's base is quantised if it was in training.

    Raises:
        UserError: The folder holds no classifier, or the adapter's base cannot be loaded.
        LoRAError: The adapter does not fit its base.
    """
    max_length = (read_run(folder).get("arguments") or {}).get("max_length")
    if holds_adapter(folder):
        labels = class_labels(folder)
        if labels is None:
            raise UserError(f"{folder} is not a classifier's adapter; use plainlora generate --adapter {folder}")
        base = find_base(folder, base_model, allow_other_base)
        stored = load_quantized_base_of(folder, base) if as_trained else load_base_of(folder, base)
        model = (backend or base.backend).load(to_accelerator(stored), folder)
        tokenizer, config = load_tokenizer_of(folder, base), load_config(base.name, base.revision)
        warnings = (base.warning,) if base.warning else ()
    else:
        if base_model is not None:
            raise UserError(f"--base_model: {folder} is a whole model, which needs no base; leave it out")
        config, warnings = load_config(str(folder)), ()
        if not is_classifier(config):
            raise UserError(f"{folder} is not a sequence classifier (its config names {config.architectures})")
        labels = class_names(config)
        if not labels or not all(isinstance(label, str) for label in labels):
            raise UserError(f"{folder}/config.json: id2label names no classes, but {labels!r:.60}")
        whole, missing = load_pretrained(AutoModelForSequenceClassification, str(folder))
        if missing:  # these would be random
            raise UserError(f"{folder} is not a whole classifier: it lacks {missing[0]}")
        model, tokenizer = to_accelerator(whole), load_tokenizer(str(folder))
        check_vocabulary(tokenizer, config)
    return Classifier(model.eval(), tokenizer, labels, max_length or context_length(config), warnings)


@torch.no_grad()
def classify(classifier: Classifier, texts: Sequence[str], batch_size: int = 32) -> list[list[float]]:
    """The probability of each class for each text, softmax of the logits."""
    rows, _ = tokenize_texts(texts, classifier.tokenizer, classifier.max_length)
    device = next(classifier.model.parameters()).device
    found: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        batch = classifier.tokenizer.pad(
            {"input_ids": rows[start : start + batch_size]}, padding_side="right", return_tensors="pt"
        )
        logits = classifier.model(**batch.to(device)).logits
        found += torch.softmax(logits.float(), -1).tolist()
    return found


def compare_with_training_base(
    folder: str | Path, texts: Sequence[str], here: list[list[float]], **options: Any
) -> str | None:
    """Compares an adapter's predictions on the original checkpoint with those on the quantised base of its training.

    Args:
        folder: The adapter's folder.
        texts: The texts that were classified.
        here: The probabilities from `classify` on the original checkpoint.
        **options: For `load_trained_classifier`.

    Returns:
        One line with the loss of the chosen classes on both bases; `None` if the adapter's base was not quantised.
    """
    if not holds_adapter(folder) or training_quantization(folder) is None:
        return None
    there = classify(load_trained_classifier(folder, as_trained=True, **options), texts)
    chosen = [max(range(len(shares)), key=shares.__getitem__) for shares in here]
    equal = sum(shares[best] == max(shares) for shares, best in zip(there, chosen, strict=True))
    losses = [
        -sum(math.log(max(shares[best], 1e-300)) for shares, best in zip(found, chosen, strict=True)) / len(chosen)
        for found in (here, there)
    ]
    return (
        f"trained on quantised weights, loaded on the original checkpoint: {equal} of {len(chosen)} texts get the "
        f"same class on both; the loss of these classes is {losses[0]:.4f} on the checkpoint and {losses[1]:.4f} on "
        "the quantised weights"
    )
