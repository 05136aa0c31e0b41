"""A one-pass loss head for a frozen output embedding.

    z = W h + b             log p = z[y] - logsumexp(z)             d log p / dh = W[y] - softmax(z) W

The head W is frozen, so the backward pass needs no logits: the gradient of each token's log-probability with respect
to its own hidden state, `(N, d)`, is computed in the forward pass, chunk by chunk. The backward pass multiplies it by
the gradient of each log-probability. That takes 4 N d V operations, where recomputing the logits takes 6 N d V, and
only the logits of one chunk are in memory at a time. Tokens without a label are left out.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# Tokens on a CPU. Fewer make the products slower, more do not make them faster: on two cores and vocabularies of
# 32,000 to 151,936 tokens, 128 took 1.05 to 1.20 times the time of the two products alone, 64 took 1.36 to 1.50.
CHUNK = 128
# Tokens on CUDA, estimated and not measured. A chunk of n tokens takes 4 n d V operations and reads W twice, which is
# n operations for each byte of W in half precision. An H100 computes 295 operations (989 TFLOPS) while it reads a byte
# (3.35 TB/s), a T4 about 200: 128 tokens wait for memory, 1,024 do not. A larger chunk helps if d is small: the (n, d)
# product of 1,024 tokens and d = 768 is 48 tiles of 128 by 128, fewer than an H100's 132 multiprocessors. The fp32
# logits take as many bytes as TRL's own tile in half precision, unless 1,024 tokens take more. Whether TRL's Triton
# head is faster is not known.
LEAST_ON_CUDA, MOST_ON_CUDA = 1024, 4096
LOGITS_ON_CUDA = 4096 * 32768 * 2  # bytes


def chunk_size(device: str, vocabulary: int) -> int:
    """How many tokens' logits are computed at a time.

    Args:
        device: The device's type.
        vocabulary: Size of the vocabulary.
    """
    if device != "cuda":
        return CHUNK
    fitting = LOGITS_ON_CUDA // (vocabulary * torch.float32.itemsize) // CHUNK * CHUNK
    return min(max(fitting, LEAST_ON_CUDA), MOST_ON_CUDA)


def gradient_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradients of hidden states are kept until the backward pass.

    On a CPU it is that of the hidden states. On CUDA it is at least fp32, in which products of half precision are
    summed, so that the product with the loss's gradient is rounded only once. In fp16 the loss's gradient (the loss
    scale divided by the number of tokens) may exceed 65,504, the largest number, even if the product does not.

    Args:
        device: The device's type.
        dtype: The dtype of the hidden states.
    """
    return torch.promote_types(dtype, torch.float32) if device == "cuda" else dtype


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, rounded: torch.Tensor | None = None) -> None:
    """`out = left @ right`, both in the dtype of `right`; on CUDA an fp32 `out` gets the sums without rounding.

    Args:
        left: `(n, k)`.
        right: `(k, m)`.
        out: `(n, m)`.
        rounded: `(n, m)` in the dtype of `right`, for the product if `out` is in another; a new tensor by default.
    """
    left = left.to(right.dtype)
    if right.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif out.device.type == "cuda" and (right.dtype.itemsize, out.dtype) == (2, torch.float32):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(left, right, out=rounded))


def entropy_of(log_probs: torch.Tensor) -> torch.Tensor:
    """`-sum p log p` in nats, `(n, V) -> (n,)`. A few rows at a time, because it allocates twice their size."""
    return -torch.cat([torch.linalg.vecdot(rows.exp(), rows) for rows in log_probs.split(CHUNK)])


class TokenLogProbs(torch.autograd.Function):
    """`(N, d), (N,) -> (N,)`: the log-probability of each token's label, in at least fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        statistics: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes both the log-probabilities and their gradients.

        Args:
            ctx: Saves the gradients, `(N, d)`.
            hidden: `(N, d)`.
            labels: `(N,)`, none of them -100.
            weight: `(V, d)`, frozen.
            bias: `(V,)`, frozen, or `None`.
            statistics: `(2, N)`, filled with entropy (nats) and whether the label is the likeliest token; `None` to
                compute neither.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # cast the weight once, not for every chunk
            weight = weight.to(torch.get_autocast_dtype(device))
        precision = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(len(labels), dtype=precision)
        kept = gradient_dtype(device, hidden.dtype)
        gradient = torch.empty_like(hidden, dtype=kept) if ctx.needs_input_grad[0] else None
        size = chunk_size(device, len(weight))
        all_logits = hidden.new_empty((min(size, len(labels)), len(weight)), dtype=precision)  # reused
        # Also reused: Linux gives a new tensor above 32 MiB new pages, which took 8 % of the time for 151,936 tokens.
        all_rounded = None if weight.dtype == precision else torch.empty_like(all_logits, dtype=weight.dtype)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            chosen = labels[part, None]  # (n, 1)
            logits = all_logits[: len(chosen)]  # (n, V)
            rounded = None if all_rounded is None else all_rounded[: len(chosen)]
            _multiply(hidden[part], weight.T, logits, rounded)
            if bias is not None:
                logits += bias
            if statistics is not None:
                statistics[1, part] = (logits.argmax(-1) == labels[part]).to(statistics.dtype)
            torch.log_softmax(logits, -1, out=logits)
            log_probs[part] = logits.gather(1, chosen)[:, 0]
            if statistics is not None:
                statistics[0, part] = entropy_of(logits)
            if gradient is not None:
                probabilities = logits.exp_()  # (n, V)
                probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
                factor = probabilities if rounded is None else rounded.copy_(probabilities)
                _multiply(factor, weight, gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each token's saved gradient times the gradient of its log-probability."""
        (gradient,) = ctx.saved_tensors
        product = gradient * gradients[0].to(gradient.dtype).neg()[:, None]
        return product.to(ctx.dtype), None, None, None, None


@dataclass(frozen=True)
class LabelledTokens:
    """The tokens whose next token has a label. Found once a batch, because finding them makes the host wait for a GPU.

    Attributes:
        mask: Whether a token is one of them, `(batch, length - 1)`: the last of each row is left out.
        labels: The label of the token after each, `(N,)`.
        index: The position of each among all tokens of the batch, `(N,)`.
    """

    mask: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    @classmethod
    def find(cls, labels: torch.Tensor) -> "LabelledTokens":
        """Finds them.

        Args:
            labels: `(batch, length)`, -100 where there is none.
        """
        mask = labels[:, 1:] != -100
        index = functional.pad(mask, (0, 1), value=False).flatten().nonzero()[:, 0]
        return cls(mask, labels.flatten().index_select(0, index + 1), index)

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, length, d)` to `(N, d)`."""
        return states.flatten(0, 1).index_select(0, self.index)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """`(N,)` to `(batch, length - 1)`, 0 elsewhere. The result has a graph even if no token has a label."""
        rows = self.index // (self.mask.shape[1] + 1)  # each row of the mask is one token shorter
        return values.new_zeros(self.mask.numel()).index_copy(0, self.index - rows, values).view(self.mask.shape)


def is_covered(model: PreTrainedModel) -> bool:
    """Whether the output embedding is a frozen `nn.Linear`. `fast.loss_head` checks that it gives the logits."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    return head.weight.is_floating_point()


def one_pass_output(
    model: PreTrainedModel,
    *args: Any,
    labels: torch.Tensor,
    num_items_in_batch: Any = None,
    with_statistics: bool = True,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """The output of TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), computed in one pass.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py

    Args:
        model: A causal language model whose logits are `W h + b`.
        *args: For its decoder.
        labels: `(batch, length)`, -100 where there is none.
        num_items_in_batch: The divisor of the sum over tokens; the number of tokens with a label if left out.
        with_statistics: Whether to compute token accuracy and entropy.
        **kwargs: For its decoder.
    """
    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state  # (batch, length, d)
    tokens = LabelledTokens.find(labels)
    head = cast(nn.Linear, model.get_output_embeddings())
    statistics = hidden.new_zeros(2, len(tokens.labels), dtype=torch.float32) if with_statistics else None
    found = TokenLogProbs.apply(tokens.select(hidden), tokens.labels, head.weight, head.bias, statistics)
    entropy, is_top1 = statistics if statistics is not None else (torch.zeros_like(found),) * 2
    return fused_output(tokens, found, entropy, is_top1, num_items_in_batch)


def fused_output(
    tokens: LabelledTokens,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    is_top1: torch.Tensor,
    num_items_in_batch: Any = None,
) -> FusedCausalLMOutput:
    """Puts the figures of the tokens with a label, each `(N,)`, into the shape that SFTTrainer reads.

    Args:
        tokens: The tokens with a label.
        log_probs: Log-probability of each label.
        entropy: Entropy of each distribution, in nats.
        is_top1: Whether the label is the likeliest token.
        num_items_in_batch: The divisor of the sum over tokens; the number of tokens with a label if left out.
    """
    items = tokens.mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    every = tokens.spread(log_probs)
    return FusedCausalLMOutput(
        loss=-every.sum() / items,
        log_probs=every,
        entropy=tokens.spread(entropy),
        is_top1=tokens.spread(is_top1).bool(),
        label_mask=tokens.mask,
    )
