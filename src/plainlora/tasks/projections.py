"""The names of query, key, value, output projection, MLP and head in each architecture."""

import re
from collections.abc import Collection

from torch import nn

from plainlora.errors import UserError
from plainlora.lora.targets import condense
from plainlora.settings.arguments import PROJECTIONS

# Regular expressions for the end of a module's name. BERT's `output.dense` is both after attention and in the MLP.
_BERT = {
    "query": r"attention\.self\.query",
    "key": r"attention\.self\.key",
    "value": r"attention\.self\.value",
    "projection": r"attention\.output\.dense",
    "mlp": r"intermediate\.dense|(?<!attention\.)output\.dense",
    "head": r"pooler\.dense|classifier",
}
_LLAMA = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "projection": "o_proj",
    "mlp": "gate_proj|up_proj|down_proj",
    "head": "score",
}
ARCHITECTURES = {
    "distilbert": {
        "query": "q_lin",
        "key": "k_lin",
        "value": "v_lin",
        "projection": "out_lin",
        "mlp": "lin1|lin2",
        "head": "pre_classifier|classifier",
    },
    "gpt2": {
        "query": r"attn\.c_attn",  # one weight for all three
        "key": r"attn\.c_attn",
        "value": r"attn\.c_attn",
        "projection": r"attn\.c_proj",
        "mlp": r"mlp\.c_fc|mlp\.c_proj",
        "head": "score",
    },
    "bert": _BERT,
    "roberta": _BERT | {"head": r"classifier\.dense|classifier\.out_proj"},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}


def _table_of(model: nn.Module, instead: str) -> dict[str, str]:
    architecture = str(getattr(getattr(model, "config", None), "model_type", None))
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"the names of projections are known for {known}, not for {architecture}; {instead}")
    return ARCHITECTURES[architecture]


def _matching(model: nn.Module, pattern: str) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(rf"(.*\.)?({pattern})", name)]


def find_projections(
    model: nn.Module, projection_names: Collection[str], layers: Collection[int] | None = None
) -> list[str]:
    """The modules of some projections, as the shortest list of names for `target_modules` that selects exactly these.

    Args:
        model: A classifier, with or without weights.
        projection_names: Some of `PROJECTIONS`.
        layers: Numbers of the layers to take them from, all if left out. The head, which is in no layer, is always
            taken.

    Raises:
        UserError: The architecture is unknown, a layer number does not exist, or only some of the projections that
            share a weight are given.
    """
    table = _table_of(model, "give the names of the modules with --lora_target_modules")
    _check_shared(table, projection_names)
    found = [name for part in PROJECTIONS if part in projection_names for name in _matching(model, table[part])]
    return condense(_in_layers(found, layers) if layers else found, model)


def _check_shared(table: dict[str, str], projection_names: Collection[str]) -> None:
    """Raises `UserError` if only some of the projections that share a weight are given."""
    for name in projection_names:
        shared = [other for other in PROJECTIONS if table[other] == table[name]]
        if left_out := [other for other in shared if other not in projection_names]:
            flags = ", ".join(f"lora_{other}" for other in shared)
            raise UserError(
                f"lora_{name}: {table[name].rpartition('.')[2]} holds {', '.join(shared)} in one weight, and "
                f"{', '.join(left_out)} is switched off; switch {flags} all on or all off"
            )


def _in_layers(modules: list[str], layers: Collection[int]) -> list[str]:
    """The modules that lie in some layers, or in no layer; raises `UserError` for a layer without any."""
    numbers = {name: _layer_of(name) for name in modules}
    present = sorted({number for number in numbers.values() if number is not None})
    if unknown := [layer for layer in layers if layer not in present]:
        has = f"{present[0]} to {present[-1]}" if present else "none of these projections"
        raise UserError(f"lora_layers_to_transform: there is no layer {unknown[0]}; the model has {has}")
    return [name for name in modules if numbers[name] is None or numbers[name] in layers]


def _layer_of(name: str) -> int | None:
    """The first number in a module's name; `None` for a head, which lies in no layer."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def find_head(model: nn.Module) -> list[str]:
    """The linear layers of the classification head, such as DistilBERT's last two layers.

    Raises:
        UserError: The architecture is unknown.
    """
    return _matching(model, _table_of(model, "give the names of the modules with --last_layers")["head"])
