"""A classifier's loss as the mean over rows, in training and in evaluation, however they are batched.

The model's own loss is the mean over a batch. The mean of such means depends on the batch size and the number of
processes.
"""

from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


def mean_over_rows(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """A batch's share of the mean cross-entropy over the rows of a step, in nats, for Trainer's `compute_loss_func`.

        -sum_i log softmax(logits_i)[label_i] / N

    Args:
        outputs: The model's, with logits, `(batch, classes)`.
        labels: Class numbers, `(batch,)`; a row of -100 counts for nothing.
        num_items_in_batch: N, the labelled rows of the step in all processes; `None` for those of this batch.
        smoothing: As in `torch.nn.CrossEntropyLoss`.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    total = functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    rows = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / rows.clamp(min=1)


class RowEvaluation(Trainer):
    """Trainer with `plainlora.training.metrics.judge_rows`, whose evaluation loss is the mean over rows.

    Trainer's own is a mean over batches, of which the last one may hold rows a second time.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's, with the mean of the losses that `judge_rows` gives."""
        output = super().evaluation_loop(*args, **kwargs)
        judged, metrics = output.predictions, cast(dict[str, float], output.metrics)
        if self.preprocess_logits_for_metrics is not None:
            metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = float(np.asarray(judged)[:, 1].mean())
        return output
