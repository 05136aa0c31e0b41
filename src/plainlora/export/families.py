"""How llama.cpp names and lays out the weights of each family of models, and what it must know of the config.

Its graphs and the keys they read: https://github.com/ggml-org/llama.cpp/tree/master/src/models (llama, qwen2, gpt2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import torch
from transformers import PretrainedConfig

from plainlora.errors import UserError

SCALED_ROTARY = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        arch: The name of its graph in llama.cpp.
        interleaved: Whether the graph rotates neighbouring rows of q and k, where Transformers rotates row i with row
            i + head_dim / 2.
        transposed: Whether Transformers stores `(d_in, d_out)`, as GPT-2's Conv1D does.
        activation: The activation that the graph computes, by Transformers' name.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool
    transposed: bool
    activation: str


FAMILIES = {  # by config.model_type
    "llama": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True, transposed=False, activation="silu"),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True, transposed=False, activation="silu"),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, interleaved=False, transposed=False, activation="silu"),
    "gpt2": Family(gguf.MODEL_ARCH.GPT2, interleaved=False, transposed=True, activation="gelu_new"),
}


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head in ggml's order: row `2 i + j` of a head is Transformers' row `j d / 2 + i`.

    Args:
        rows: `(heads d, ...)`, of a weight of q or k, its bias, or its lora_B.
        heads: Number of heads.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, d / 2, ...)
    return halves.transpose(1, 2).reshape(rows.shape)


class Layout:
    """The layout of one model's weights in a GGUF file.

    Args:
        name: The model's name, for a message.
        config: Its config.

    Raises:
        UserError: llama.cpp would compute something else than Transformers from this config.
    """

    def __init__(self, name: str, config: PretrainedConfig) -> None:
        if config.model_type not in FAMILIES:
            raise UserError(
                f"{name} is of the family {config.model_type!r:.40}, and those that can be exported as GGUF are "
                f"{', '.join(FAMILIES)}; `plainlora merge` writes a model for Transformers and vLLM"
            )
        self.family = FAMILIES[config.model_type]
        self.config = config
        faults = list(self._faults())
        if faults:
            raise UserError(f"{name}/config.json: llama.cpp does not compute {'; nor '.join(faults)}")
        self._names = gguf.get_tensor_name_map(self.family.arch, int(config.num_hidden_layers))

    def _faults(self) -> Iterator[str]:
        config, gpt2 = self.config, self.config.model_type == "gpt2"
        activation = config.activation_function if gpt2 else config.hidden_act
        if activation != self.family.activation:
            yield f"the activation {activation!r:.40} of this family, but {self.family.activation}"
        if gpt2:
            for field, usual in (
                ("scale_attn_weights", True),
                ("scale_attn_by_inverse_layer_idx", False),
                ("add_cross_attention", False),
            ):
                if getattr(config, field, usual) != usual:
                    yield f"{field}={getattr(config, field)}"
            return
        rotary = config.rope_parameters or {}
        kind = rotary.get("rope_type", "default")
        if kind not in SCALED_ROTARY:
            yield f"rotary embeddings of the type {kind!r:.40} as exported here ({', '.join(SCALED_ROTARY)})"
        if rotary.get("partial_rotary_factor", 1.0) != 1.0:
            yield "partial_rotary_factor"

    @property
    def arch(self) -> str:
        """`general.architecture`."""
        return str(gguf.MODEL_ARCH_NAMES[self.family.arch])

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def context(self) -> int:
        """The context length in tokens, no longer than a sliding window: llama.cpp has none for these families."""
        longest, window = int(self.config.max_position_embeddings), self._window()
        return longest if window is None else min(longest, window)

    def _window(self) -> int | None:
        config = self.config
        used = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or config.model_type == "mistral"
        window = getattr(config, "sliding_window", None)
        return int(window) if used and window else None

    def find(self, module: str) -> str | None:
        """The name that a module of Transformers has in the file; `None` if llama.cpp has none for it."""
        found = self._names.get_name(module)
        return None if found is None else str(found)

    def ordered(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(d_out, ...)` of a module in the order of the file; see `interleave`."""
        if not self.family.interleaved or not module.endswith((".q_proj", ".k_proj")):
            return rows
        key = module.endswith(".k_proj")
        return interleave(rows, self.config.num_key_value_heads if key else self.config.num_attention_heads)

    def laid_out(self, parameter: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Name and tensor of a parameter as they stand in the file.

        Raises:
            UserError: llama.cpp has no such parameter.
        """
        module, _, kind = parameter.rpartition(".")
        name = self.find(module)
        if name is None or kind not in ("weight", "bias"):
            raise UserError(
                f"llama.cpp has no tensor for {parameter} in a model of {self.arch}; it cannot be exported"
            )
        if self.family.transposed and tensor.dim() == 2 and ".h." in f".{parameter}":
            tensor = tensor.T
        return f"{name}.{kind}", self.ordered(module, tensor)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """What llama.cpp reads as a tensor and Transformers computes: Llama 3's factors of the rotary frequencies.

        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_rope_utils.py
        (`_compute_llama3_parameters`)
        """
        rotary = getattr(self.config, "rope_parameters", None) or {}
        if rotary.get("rope_type") != "llama3":
            return {}
        d, base = self._head_dim(), float(rotary["rope_theta"])
        length = 2 * math.pi * base ** (torch.arange(0, d, 2, dtype=torch.float64) / d)  # of a wave, (d / 2,)
        low, high = float(rotary["low_freq_factor"]), float(rotary["high_freq_factor"])
        smooth = (float(rotary["original_max_position_embeddings"]) / length - low) / (high - low)
        smooth = smooth.clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / float(rotary["factor"]) + smooth)).float()}

    def _head_dim(self) -> int:
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Writes the keys that the family's graph reads."""
        config = self.config
        writer.add_context_length(self.context)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        if config.model_type == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            return
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self._head_dim())
        writer.add_value_length(self._head_dim())
        writer.add_rope_dimension_count(self._head_dim())
        rotary = config.rope_parameters or {}
        writer.add_rope_freq_base(float(rotary.get("rope_theta", 10_000.0)))
        if rotary.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rotary["factor"]))
