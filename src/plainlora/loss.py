"""A one-pass loss head for a frozen output embedding.

    z = W h + b             log p = z[y] - logsumexp(z)             d log p / dh = W[y] - softmax(z) W

The head W is frozen, so the way back needs no logits: the gradient of each token's log-probability with respect to its
own hidden state, `(N, d)`, is computed in the forward pass, chunk by chunk, and the way back is one product by the
gradient of each log-probability. That is 4 N d V operations where recomputing the logits takes 6 N d V, and the
logits of one chunk are all that is ever there. Tokens without a label are left out.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# Tokens whose logits are there at a time. Fewer make the products slower, more do not make them faster: on two cores
# and vocabularies of 32,000 to 151,936 words, 128 took 1.05 to 1.20 of two bare products, 64 took 1.36 to 1.50.
CHUNK = 128


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """`out = left @ right` in the precision of `right`."""
    if left.dtype == right.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left.to(right.dtype) @ right)


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
            ctx: Keeps the gradients, `(N, d)`.
            hidden: `(N, d)`.
            labels: `(N,)`, none of them -100.
            weight: `(V, d)`, frozen.
            bias: `(V,)`, frozen, or `None`.
            statistics: `(2, N)` to be filled with entropy (nats) and whether the label is the likeliest token; `None`
                to leave both out.
        """
        if torch.is_autocast_enabled(hidden.device.type):  # which would cast the weight anew for every chunk
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
        precision = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(len(labels), dtype=precision)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        all_logits = hidden.new_empty((min(CHUNK, len(labels)), len(weight)), dtype=precision)  # one buffer for all
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            chosen = labels[part, None]  # (n, 1)
            logits = all_logits[: len(chosen)]  # (n, V)
            _multiply(hidden[part], weight.T, logits)
            if bias is not None:
                logits += bias
            if statistics is not None:
                statistics[1, part] = (logits.argmax(-1) == labels[part]).to(statistics.dtype)
            torch.log_softmax(logits, -1, out=logits)
            log_probs[part] = logits.gather(1, chosen)[:, 0]
            if statistics is not None:
                statistics[0, part] = -torch.linalg.vecdot(logits.exp(), logits)
            if gradient is not None:
                probabilities = logits.exp_()  # (n, V)
                probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
                _multiply(probabilities, weight, gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each token's gradient, times that of its log-probability."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype).neg()[:, None], None, None, None, None


def is_covered(model: PreTrainedModel) -> bool:
    """Whether a model has a frozen W, and b, to read. Whether its logits are `W h + b`, see `plainlora.loss_head`."""
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and not head.weight.requires_grad and head.weight.is_floating_point()


def one_pass_output(
    model: PreTrainedModel,
    *args: Any,
    labels: torch.Tensor,
    num_items_in_batch: Any = None,
    with_statistics: bool = True,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """What TRL's fused head gives (`trl.trainer.utils.add_fused_lm_head`), in one pass.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py

    Args:
        model: A causal language model whose logits are `W h + b`.
        *args: For its decoder.
        labels: `(batch, length)`, -100 where there is none.
        num_items_in_batch: What the sum over tokens is divided by; their number if left out.
        with_statistics: Whether to compute token accuracy and entropy.
        **kwargs: For its decoder.
    """
    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (batch, length, d)
    labels = labels[:, 1:]
    mask = labels != -100
    head = cast(nn.Linear, model.get_output_embeddings())
    chosen = labels[mask]  # (N,)
    statistics = hidden.new_zeros(2, len(chosen), dtype=torch.float32) if with_statistics else None
    found = TokenLogProbs.apply(hidden[mask], chosen, head.weight, head.bias, statistics)
    entropy, is_top1 = statistics if statistics is not None else (torch.zeros_like(found),) * 2
    return fused_output(found, entropy, is_top1, mask, num_items_in_batch)


def fused_output(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    is_top1: torch.Tensor,
    mask: torch.Tensor,
    num_items_in_batch: Any = None,
) -> FusedCausalLMOutput:
    """Figures of the tokens that have a label, `(N,)`, in the shape in which SFTTrainer reads them.

    Args:
        log_probs: Of each label.
        entropy: Of each distribution, in nats.
        is_top1: Whether the label is the likeliest token.
        mask: Which tokens have a label, `(batch, length)`.
        num_items_in_batch: What the sum over tokens is divided by; their number if left out.
    """

    def spread(values: torch.Tensor) -> torch.Tensor:
        """`(N,)` back to `(batch, length)`; connected to the model even where no token has a label."""
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    every = spread(log_probs)
    return FusedCausalLMOutput(
        loss=-every.sum() / tokens,
        log_probs=every,
        entropy=spread(entropy),
        is_top1=spread(is_top1).bool(),
        label_mask=mask,
    )
