"""The tokens and layers that an adapter's config gives by number: whether the base has them."""

from collections.abc import Callable, Iterator, Sequence

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from plainlora.errors import UserError


def check_ranges(lora: LoraConfig, build: Callable[[], PreTrainedModel | None]) -> None:
    """Checks the tokens and layers that a config gives by number: PEFT fails on them, and only in the loaded base.

    Args:
        lora: The config, whose values have the right types.
        build: Builds the base on the meta device; returns `None` if its code fails there.

    Raises:
        UserError: The base has no such token, embedding or layer.
    """
    tokens, pairs = lora.trainable_token_indices, lora.layer_replication
    skeleton = None if tokens is None and pairs is None else build()
    if skeleton is None:
        return
    if tokens is not None:
        _check_tokens(skeleton, tokens)
    layers = getattr(skeleton.config.get_text_config(), "num_hidden_layers", None)
    for start, end in pairs or []:
        if layers is not None and not 0 <= start < end <= layers:
            raise UserError(
                f"layer_replication: [{start}, {end}] is no range of the base's {layers} layers; give pairs "
                f"[start, end] with 0 <= start < end <= {layers}"
            )


def _check_tokens(skeleton: PreTrainedModel, tokens: Sequence[int] | dict[str, list[int]]) -> None:
    named = tokens if isinstance(tokens, dict) else {_name_of_embedding(skeleton): tokens}
    for name, numbers in named.items():
        rows = [module.weight.shape[0] for module in _find_embeddings(skeleton, name)]
        if not rows:
            raise UserError(f"trainable_token_indices: the base has no embedding or head {name!r}; correct the name")
        if not numbers:
            raise UserError(f"trainable_token_indices: there is no token for {name}; give one, or leave it out")
        if wrong := [number for number in numbers if not 0 <= number < min(rows)]:
            raise UserError(
                f"trainable_token_indices: {name} has no token {wrong[0]}; give numbers from 0 to {min(rows) - 1}"
            )


def _name_of_embedding(skeleton: PreTrainedModel) -> str:
    embedding = skeleton.get_input_embeddings()
    return next(name for name, module in skeleton.named_modules() if module is embedding)


def _find_embeddings(skeleton: PreTrainedModel, name: str) -> Iterator[nn.Embedding | nn.Linear]:
    """Yields the modules whose full name ends with a name, as PEFT selects them, a tied one under each of its names.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py (`_set_trainable`)
    """
    for key, module in skeleton.named_modules(remove_duplicate=False):
        if key.endswith(name) and isinstance(module, (nn.Embedding, nn.Linear)):
            yield module
