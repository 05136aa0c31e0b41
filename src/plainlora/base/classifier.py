"""A base as a sequence classifier: its config with classes, its model on the meta device, its weights and new head."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from plainlora.base.config import class_names, load_config
from plainlora.base.loading import load_pretrained
from plainlora.errors import UserError


def classifier_config(
    name: str, labels: Sequence[str], pad_token_id: int | None, revision: str | None = None
) -> PretrainedConfig:
    """The base's config with the classes and the tokenizer's pad token.

    A decoder's head reads the last token that is not padding, so it must know the pad token (trl#422).

    Raises:
        UserError: It cannot be loaded, or the base is a classifier with another number of classes.
    """
    config = load_config(name, revision)
    if is_classifier(config) and config.num_labels != len(labels):
        raise UserError(
            f"{name} is a classifier of {config.num_labels} classes already, the data has {len(labels)} "
            f"({', '.join(labels)}); give a base with as many, or one without a head"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.pad_token_id = pad_token_id
    config.use_cache = False  # nothing is generated
    return config


def check_order(name: str, labels: Sequence[str], revision: str | None = None) -> None:
    """Checks a base that is a classifier of these classes already: its head gives their logits in its own order.

    Raises:
        UserError: It has the same classes in another order.
    """
    config = load_config(name, revision)
    own = [each.casefold() for each in class_names(config)] if is_classifier(config) else []
    asked = {label.casefold(): label for label in labels}
    if own != list(asked) and sorted(own) == sorted(asked):
        raise UserError(
            f"{name} is a classifier of these classes in another order; set labels to "
            f"{', '.join(asked[each] for each in own)}"
        )


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint was saved as a sequence classifier, with a head of its own."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def load_classifier(
    config: PretrainedConfig, name: str, quantization: BitsAndBytesConfig | None = None, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier, and the names of the weights that the checkpoint lacks: its new head.

    Args:
        config: From `classifier_config`.
        name: Hub id or local folder.
        quantization: How to quantise while loading. The head is not quantised.
        **options: As for `load_pretrained`.

    Raises:
        UserError: See `load_pretrained`; or the checkpoint lacks more than a head.
    """
    if quantization is not None:
        skeleton = build_skeleton(config)
        heads = [child for child, _ in skeleton.named_children() if child != skeleton.base_model_prefix]
        quantization.llm_int8_skip_modules = heads  # also for 4 bits, despite its name
    model, missing = load_pretrained(
        AutoModelForSequenceClassification, name, config=config, quantization=quantization, **options
    )
    # A pooler may be new too: pretraining on masked tokens alone has none.
    backbone = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if backbone:
        more = " and more" if len(backbone) > 1 else ""
        raise UserError(f"{name} lacks {backbone[0]}{more}; it is not a checkpoint of a {config.model_type} model")
    return model, missing


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The classifier that a config describes, on the meta device: names and shapes without weights.

    Raises:
        UserError: The architecture has no sequence classifier.
    """
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"{config.model_type} models have no sequence classifier in Transformers") from error
