"""The tensors of an adapter's GGUF, in which llama.cpp finds the adapter's own deltas.

llama.cpp adds `(alpha / r) B A x` with one alpha for the file and r from the shape of each lora_b:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h (`get_scale`). An adapter whose modules do not
share `s r`, by rsLoRA with several ranks or by alpha_pattern, gets the rest of its scaling into lora_b.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from plainlora.errors import UserError
from plainlora.export.families import Layout
from plainlora.lora.config import as_loaded, find_unsupported
from plainlora.lora.delta import Delta, read_deltas
from plainlora.lora.errors import some
from plainlora.lora.interchange import read_config
from plainlora.peft_model.config import changes_base

COPY = ".base_layer.weight"  # of an adapted head, frozen, which PEFT saves beside A and B
MERGE_IT = "export the merged model with --merged"


def read_exportable(adapter: str | Path, layout: Layout) -> dict[str, Delta]:
    """The deltas of an adapter, by the modules' names.

    Raises:
        UserError: llama.cpp cannot add what this adapter adds.
        LoRAError: The adapter cannot be read.
    """
    config = as_loaded(read_config(adapter))
    if config.use_dora:
        raise UserError(f"{adapter} is a DoRA adapter, and llama.cpp adds (alpha / r) B A alone; {MERGE_IT}")
    if changes_base(config) or find_unsupported(config):
        found = [*find_unsupported(config).values()]
        raise UserError(f"{adapter} was trained with {some(found)}, which llama.cpp does not compute; {MERGE_IT}")
    deltas, others = read_deltas(adapter)
    others = [name for name in others if not name.endswith(COPY)]
    if others:
        raise UserError(
            f"{adapter} also holds {some(others)}: llama.cpp takes only lora_A and lora_B of linear layers, no "
            f"trained head, embedding or bias; {MERGE_IT}"
        )
    for module in deltas:
        if layout.find(module) is None or (layout.is_tied and module == "lm_head"):
            tied = ", which is tied to the embedding" if module == "lm_head" else ""
            raise UserError(
                f"{adapter} adapts {module}{tied}, and llama.cpp has no tensor of its own for it; {MERGE_IT}"
            )
    return deltas


def shared_alpha(deltas: Mapping[str, Delta]) -> float:
    """`s r` of the first module whose scaling is not 0, as the f32 that the file holds; 1 if there is none."""
    return next((float(np.float32(each.scaling * each.r)) for each in deltas.values() if each.scaling), 1.0)


def adapter_tensors(deltas: Mapping[str, Delta], layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    """The file's alpha and its tensors: `lora_a` `(r, d_in)` and `lora_b` `(d_out, r)` for each module.

    `(alpha / r) lora_b lora_a` is `s B A`, with the rows in the order of the file.
    """
    alpha, tensors = shared_alpha(deltas), {}
    for module, delta in deltas.items():
        name = f"{layout.find(module)}.weight"
        factor = delta.scaling * delta.r / alpha
        tensors[f"{name}.lora_a"] = delta.lora_A
        tensors[f"{name}.lora_b"] = layout.ordered(module, (delta.lora_B.double() * factor).float())
    return alpha, tensors


def describe_adapter(writer: gguf.GGUFWriter, alpha: float) -> None:
    """Writes the keys by which llama.cpp knows a LoRA."""
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
