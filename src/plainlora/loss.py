"""A one-pass loss head for a frozen output embedding.

    z = W h + b             log p = z[y] - logsumexp(z)             d log p / dh = W[y] - softmax(z) W

The head W is frozen, so the way back needs no logits: the gradient of each token's log-probability with respect to its
own hidden state, `(N, d)`, is computed in the forward pass, chunk by chunk, and the way back is one product by the
gradient of each log-probability. That is 4 N d V operations where recomputing the logits takes 6 N d V, and the
logits of one chunk are all that is ever there. Tokens without a label are left out.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

# Tokens whose logits are there at a time. Fewer make the products slower, more do not make them faster: on two cores
# and vocabularies of 32,000 to 151,936 words, 128 took 1.05 to 1.20 of two bare products, 64 took 1.36 to 1.50.
CHUNK = 128

# Config fields by which some architectures change the logits; TRL's own head knows them.
SCALINGS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


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
    """Whether a model's logits are `W h + b` with a frozen W that the one-pass head can read."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head.weight.dtype == torch.uint8:
        return False
    config = model.config.get_text_config()
    scaled = [getattr(config, name, None) not in (None, 1, 1.0) for name in SCALINGS]
    return not any(scaled) and not getattr(config, "output_router_logits", False)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PeftModel, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


class OnePassHead:
    """Takes the place of the head that SFTTrainer gives a model (`trl.trainer.utils.add_fused_lm_head`).

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py

    Args:
        model: A causal language model that already has TRL's head.

    Attributes:
        with_statistics: Whether to compute token accuracy and entropy.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.with_statistics = True
        self._theirs: Callable[..., Any] = model.forward
        model.forward = MethodType(self._forward, model)

    def _forward(
        self,
        model: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None or shift_labels is not None or not is_covered(model):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return self._theirs(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (batch, length, d)
        labels = labels[:, 1:]
        mask = labels != -100
        head = cast(nn.Linear, model.get_output_embeddings())
        chosen = labels[mask]  # (N,)
        statistics = hidden.new_zeros(2, len(chosen), dtype=torch.float32) if self.with_statistics else None
        found = TokenLogProbs.apply(hidden[mask], chosen, head.weight, head.bias, statistics)

        def spread(values: torch.Tensor) -> torch.Tensor:
            """`(N,)` back to `(batch, length)`; connected to the model even where no token has a label."""
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        log_probs = spread(found)
        tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        entropy, is_top1 = statistics if statistics is not None else (torch.zeros_like(found),) * 2
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / tokens,
            log_probs=log_probs,
            entropy=spread(entropy),
            is_top1=spread(is_top1).bool(),
            label_mask=mask,
        )


def use_one_pass_head(trainer: SFTTrainer) -> SFTTrainer:
    """Gives a trainer's model the one-pass head, and token accuracy and entropy at logging steps only.

    With an existing TRL + PEFT script this is one line after the trainer is made. A head that is trained or adapted,
    quantised, or whose logits are scaled goes through TRL's own, as before. SFTTrainer logs the means of lists to
    which it appends both statistics at every step; where they were not computed, the entries are taken out again.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py (`compute_loss`)

    Args:
        trainer: Of an injected model or a PeftModel, or of any causal language model with a frozen head.

    Returns:
        The same trainer.
    """
    model = base_of(cast(nn.Module, trainer.model))
    head, theirs = OnePassHead(model), cast(Callable[..., Any], trainer.compute_loss)

    def is_logged() -> bool:
        step, every = trainer.state.global_step + 1, int(trainer.state.logging_steps)
        return step % max(every, 1) == 0 or (step == 1 and trainer.args.logging_first_step)

    def compute_loss(wrapped: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer's; what was not computed is left out of the means that it logs."""
        head.with_statistics = not wrapped.training or is_logged() or not is_covered(model)
        try:
            loss = theirs(wrapped, *args, **kwargs)
            if not head.with_statistics:
                logged = trainer._metrics["train"]
                for name in ("entropy", "mean_token_accuracy"):
                    logged[name].pop()
                    if not logged[name]:  # SFTTrainer divides by their number, when training ends between two logs
                        del logged[name]
            return loss
        finally:
            head.with_statistics = True

    trainer.compute_loss = compute_loss  # type: ignore[assignment]
    return trainer
