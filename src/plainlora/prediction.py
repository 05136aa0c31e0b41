"""Classes of texts, by a classifier as training left it: an adapter on its base, or a whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from plainlora.adapter_base import base_of, class_labels, load_base_of, load_tokenizer_of, read_run
from plainlora.backends import Backend
from plainlora.checkpoints import holds_adapter
from plainlora.data.classification import tokenize_texts
from plainlora.errors import UserError
from plainlora.models import (
    context_length,
    is_classifier,
    load_config,
    load_pretrained,
    load_tokenizer,
    to_accelerator,
)


@dataclass(frozen=True)
class Classifier:
    """A model with what is needed to ask it.

    Attributes:
        model: Gives logits of shape `(batch, classes)`.
        tokenizer: Its tokenizer.
        labels: Name of each class, by number.
        max_length: Texts are cut to this many tokens, as in training.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    max_length: int | None


def load_trained_classifier(folder: str | Path, backend: Backend) -> Classifier:
    """What `recipes/classify.py` wrote, or a sequence classifier of elsewhere.

    Args:
        folder: An adapter's or a whole model's.
        backend: Loads the adapter, if it is one.

    Raises:
        UserError: It is neither, or not a classifier's, or its base cannot be had.
        LoRAError: The adapter does not fit its base.
    """
    max_length = (read_run(folder).get("arguments") or {}).get("max_length")
    if holds_adapter(folder):
        labels = class_labels(folder)
        if labels is None:
            raise UserError(f"{folder} is no classifier's adapter; use plainlora generate --adapter {folder}")
        model = backend.load(to_accelerator(load_base_of(folder)), folder)
        tokenizer, config = load_tokenizer_of(folder), load_config(*base_of(folder))
    else:
        config = load_config(str(folder))
        if not is_classifier(config):
            raise UserError(f"{folder} is no sequence classifier (its config names {config.architectures})")
        whole, _ = load_pretrained(AutoModelForSequenceClassification, str(folder))
        model, tokenizer = to_accelerator(whole), load_tokenizer(str(folder))
        labels = list((config.id2label or {}).values())
    return Classifier(model.eval(), tokenizer, labels, max_length or context_length(config))


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
