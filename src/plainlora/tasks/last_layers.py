"""The modules that `--method last_layers` trains: those named, or the last blocks with the final norm and the head."""

from collections.abc import Callable, Collection

from torch import nn
from transformers import PreTrainedModel

from plainlora.errors import UserError

ADVICE = "give the names of the modules with --last_layers"


def find_last_layers(
    skeleton: PreTrainedModel, asked: Collection[str] | None, find_head: Callable[[PreTrainedModel], list[str]]
) -> list[str]:
    """Full names of the modules that the mode `last_layers` trains.

    Args:
        skeleton: The model, with or without weights.
        asked: Names of modules, or one number N: the last N blocks, the final norm and the head; the head alone if
            left out.
        find_head: Returns the names of the head's modules.

    Raises:
        UserError: There is no module of a name, or the architecture's blocks, norm or head cannot be found.
    """
    if not asked:
        return find_head(skeleton)
    names = list(asked)
    if len(names) == 1 and names[0].isdecimal():
        return [*_last_blocks(skeleton, int(names[0])), *find_head(skeleton)]
    modules = [name for name, _ in skeleton.named_modules() if name]
    for name in names:
        if name not in modules:
            ends = sorted(module for module in modules if module.endswith(f".{name}"))
            hint = f"did you mean {ends[-1]}?" if ends else f"the last are {', '.join(modules[-3:])}"
            raise UserError(f"last_layers: there is no module {name!r}; {hint}")
    if (head := tied_head(skeleton)) in names:
        embedding = _name_of(skeleton, skeleton.get_input_embeddings())
        raise UserError(
            f"last_layers: {head} has the weight of the input embedding (tie_word_embeddings); name {embedding} to "
            "train both, or leave it out to freeze both"
        )
    return names


def language_head(skeleton: PreTrainedModel) -> list[str]:
    """The output embedding of a language model; empty if it is also the input embedding, which is not a last layer.

    Raises:
        UserError: The model does not say which module it is.
    """
    head = skeleton.get_output_embeddings()
    if head is None:
        raise UserError(f"last_layers: {type(skeleton).__name__} does not say which module is its head; {ADVICE}")
    return [] if tied_head(skeleton) else [_name_of(skeleton, head)]


def tied_head(skeleton: PreTrainedModel) -> str | None:
    """The name of an output embedding that shares its weight with the input embedding."""
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return _name_of(skeleton, head) if tied else None


def _name_of(skeleton: PreTrainedModel, module: nn.Module | None) -> str:
    return next(name for name, each in skeleton.named_modules() if each is module)


def _last_blocks(skeleton: PreTrainedModel, count: int) -> list[str]:
    """The last blocks, and the norm after them, if there is one."""
    layers = int(getattr(skeleton.config.get_text_config(), "num_hidden_layers", 0))
    lists = [
        name for name, each in skeleton.named_modules() if isinstance(each, nn.ModuleList) and len(each) == layers
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UserError(f"last_layers {count}: the blocks of {type(skeleton).__name__} cannot be found; {ADVICE}")
    if not 1 <= count <= layers:
        raise UserError(f"last_layers {count}: {type(skeleton).__name__} has {layers} blocks; give 1 to {layers}")
    parent, _, own = outer[0].rpartition(".")
    siblings = list(skeleton.get_submodule(parent).named_children())
    norms = [name for name, each in siblings if "norm" in type(each).__name__.lower()]
    if len(norms) > 1:  # such as BLOOM's, of which the first is of the embedding
        after = [name for name, _ in siblings]
        norms = [name for name in norms if after.index(name) > after.index(own)]
    if len(norms) > 1:
        found = ", ".join(norms)
        raise UserError(f"last_layers {count}: it is not clear which of {found} is the final norm; {ADVICE}")
    prefix = f"{parent}." if parent else ""
    return [
        *(f"{outer[0]}.{number}" for number in range(layers - count, layers)),
        *(f"{prefix}{each}" for each in norms),
    ]
