"""Sets all dropout probabilities of a base for training, and saves the base with its own ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from plainlora.errors import UserError, first_line


def find_dropouts(config: PretrainedConfig) -> list[tuple[PretrainedConfig, str]]:
    """The fields of a config, and of configs inside it, that are dropout probabilities: `(config, field)`.

    They are found by name, such as `attn_pdrop`, `hidden_dropout_prob`, `seq_classif_dropout`. A `classifier_dropout`
    of `None` falls back to another one. LayerDrop and stochastic depth are not dropout: they skip whole layers.
    """
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    own = [
        (config, name)
        for name, value in vars(config).items()
        if ("dropout" in name or "pdrop" in name) and not isinstance(value, bool) and isinstance(value, int | float)
    ]
    return own + [found for each in inner for found in find_dropouts(each)]


def check_dropout(p: float | None, config: PretrainedConfig) -> None:
    """Raises `UserError` if `p` is above 0 and the base has no dropout to set."""
    if p and not find_dropouts(config):
        raise UserError(f"base_dropout {p}: {config.model_type} models have no dropout to set; leave it out")


def set_dropouts(config: PretrainedConfig, p: float) -> None:
    """Gives every dropout of a config the probability `p`.

    Raises:
        UserError: A config refuses the value, as MPT does, whose `attn_pdrop` is a whole number.
    """
    for inner, name in find_dropouts(config):
        try:
            setattr(inner, name, int(p) if isinstance(getattr(inner, name), int) and p in (0, 1) else p)
        except Exception as error:  # of any class: the config's own validation
            raise UserError(
                f"base_dropout {p}: {inner.model_type} models refuse it as {name} ({first_line(error)}); leave it out"
            ) from error


@contextmanager
def _dropouts(config: PretrainedConfig, values: Sequence[float]) -> Iterator[None]:
    """Within the block the config's dropouts have these values, in the order of `find_dropouts`."""
    places = find_dropouts(config)
    before = [getattr(*place) for place in places]
    try:
        for place, value in zip(places, values, strict=True):
            setattr(*place, value)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)


def save_with_own_dropouts(model: PreTrainedModel, *args: Any, own_dropouts: Sequence[float], **kwargs: Any) -> None:
    """`save_pretrained` with the base's own dropouts in the config.

    They cannot be restored before, because some architectures read them from the config in every forward pass.
    """
    with _dropouts(model.config, own_dropouts):
        type(model).save_pretrained(model, *args, **kwargs)
