"""Attention over packed documents, one document at a time.

    o[i] = sum over j of softmax(scale q[i] k[j]) v[j]          j of the same document as i, and j <= i

For a row of L tokens Transformers builds an L x L mask, and the kernel computes all L^2 scores. Documents of n_1, n_2,
... tokens need only n_1^2 / 2 + n_2^2 / 2 + ... of them. So each document is handed to the kernel alone, with
`is_causal` instead of a mask. With dropout on a CPU, `plainlora.fast.dropout_attention` takes the kernel's place.

The documents' boundaries reach the layers as the attention mask, because Transformers leaves a mask unchanged that
already has 4 dimensions. A batch without boundaries, such as a padded one or a step of generation, is left to
Transformers' SDPA function and its own mask.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/masking_utils.py
(`_preprocess_mask_arguments`)
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plainlora.fast.dropout_attention import dropout_attention

NAME = "plainlora"  # in `config._attn_implementation`

# In half precision a CPU kernel of PyTorch 2.13 converts and repacks every block. Forward and backward of 12 heads of
# width 64 over 1,024 tokens took, converted to fp32 before and back after, 0.49 to 0.62 of the time for documents of
# 16 to 128 tokens, 0.90 for 256, 1.04 for 512, 1.20 for 1,024 (two cores with AVX512-BF16).
FLOAT32_BELOW = 512

# Scores from which on attention with dropout goes block by block on a CPU. With 12 heads of width 64 and 12 rows that
# took 12 times as long as PyTorch's own for 24 tokens, twice for 128, 0.9 times for 256, 0.8 for 512 (two cores). With
# fewer scores there is little memory to save.
LEAST = 9 << 20


def _is_boundaries(mask: torch.Tensor) -> bool:
    """Whether a mask is the cumulative lengths of documents, `(1, 1, 1, documents + 1)`."""
    return mask.dtype == torch.int32


def _mask_of(boundaries: torch.Tensor, window: int | None, device: torch.device) -> torch.Tensor:
    """The mask that the boundaries stand for, `(1, 1, L, L)`; True where attention is allowed."""
    lengths = boundaries.flatten().diff().to(device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # (L,)
    position = torch.arange(len(document), device=device)
    distance = position[:, None] - position  # (L, L)
    allowed = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return allowed[None, None]


def _by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, **options: Any
) -> torch.Tensor:
    """`(1, heads, L, d) -> (1, L, heads, d)` by one call of SDPA for each document."""
    lengths, dtype = boundaries.flatten().diff().tolist(), query.dtype
    if query.device.type == "cpu" and dtype.itemsize == 2 and max(lengths) < FLOAT32_BELOW:
        query, key, value = query.float(), key.float(), value.float()
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    attended = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(attended, 1).to(dtype)


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The same by CUDA's FlashAttention for documents of any length, in half precision only."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  since PyTorch 2.10, and not needed on a CPU

    bounds, longest = boundaries.flatten().to(query.device, non_blocking=True), int(boundaries.flatten().diff().max())
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # (L, heads, d)
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0), "scale": scale, "enable_gqa": grouped}
    attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(attended, torch.Tensor)  # only with `return_aux` a tuple
    return attended[None]


def _with_dropout(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA function with dropout on a CPU: the same numbers in less time and memory."""
    given = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(given and attention_mask is None and query.shape[2] > 1)
    attended = dropout_attention(query, key, value, attention_mask, dropout, scaling, causal)
    return attended.transpose(1, 2).contiguous(), None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for `transformers.AttentionInterface`, the same as Transformers' SDPA function.

    With dropout, or if a document is longer than the sliding window, the mask of the documents is built: dropout then
    draws the same random numbers as Transformers' function.

    Args:
        module: The attention layer.
        query: `(batch, heads, L, d)`.
        key: `(batch, key and value heads, L, d)`.
        value: As `key`.
        attention_mask: From Transformers, or the cumulative lengths of documents as int32, `(1, 1, 1, documents + 1)`.
        dropout: Probability of dropping a weight.
        scaling: Of the scores; `None` for `d ** -0.5`.
        sliding_window: Number of tokens that a token attends to at most, itself included.
        **kwargs: Other arguments of the architecture, handed to Transformers' SDPA function.

    Returns:
        `(batch, L, heads, d)`, and no weights.
    """
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    is_plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))
    if attention_mask is not None and _is_boundaries(attention_mask):
        is_windowed = sliding_window is not None and int(attention_mask.flatten().diff().max()) > sliding_window
        if is_plain and not dropout and not is_windowed:
            if query.device.type == "cuda" and query.dtype.itemsize == 2:
                return _by_kernel(query, key, value, attention_mask, scaling), None
            return _by_document(query, key, value, attention_mask, scale=scaling), None
        attention_mask = _mask_of(attention_mask, sliding_window, query.device)
    is_for_all_heads = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    is_large = query.shape[:3].numel() * key.shape[2] >= LEAST
    if dropout and is_plain and is_for_all_heads and is_large and query.device.type == "cpu":
        return _with_dropout(module, query, key, value, attention_mask, **options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, sliding_window=sliding_window, **options)


def _boundaries_as_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: cumulative lengths, as TRL's collator and FlashAttention name them, become the mask."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None or kwargs.get("attention_mask") is not None:
        return args, kwargs
    # On the CPU, because the layers read them as numbers: the host waits for the device once, not once a layer.
    return args, kwargs | {"attention_mask": bounds.to("cpu", torch.int32)[None, None, None]}


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def is_covered(model: PreTrainedModel) -> bool:
    """Whether a model calls Transformers' SDPA function, or already `attention`, through `AttentionInterface`."""
    return model.config._attn_implementation in ("sdpa", NAME) and model._can_set_attn_implementation()


def has_attention_dropout(model: PreTrainedModel) -> bool:
    """Whether a model's config sets dropout on attention probabilities."""
    fields = vars(model.config.get_text_config()).items()
    names = ("attn_pdrop", "attn_dropout", "attention_dropout", "attention_probs_dropout_prob")
    return any(name in names and bool(value) for name, value in fields)


class DocumentAttention:
    """Gives a model attention over packed documents. The caller must measure whether the model then keeps them apart.

    Args:
        model: A causal language model that `is_covered`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self._own = model, model.config._attn_implementation
        model.set_attn_implementation(NAME)
        self._hook = model.base_model.register_forward_pre_hook(_boundaries_as_mask, with_kwargs=True)

    def undo(self) -> None:
        """Restores the attention that the model had, with Transformers' own mask."""
        self._hook.remove()
        self.model.set_attn_implementation(self._own)
