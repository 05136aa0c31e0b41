"""The evaluation loss as the mean over all tokens.

Trainer computes the mean of batch means, which depends on the batch size and the number of processes: ten rows gave
3.4489 in one batch and 3.4655 in batches of four.
"""

import math
from typing import Any, cast

from accelerate.utils import gather_object
from torch import nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from plainlora.training.last_batch import with_unlabelled


class TokenEvaluation(SFTTrainer):
    """SFTTrainer whose evaluation loss is the mean cross entropy over tokens, however they are batched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses: list[tuple[float, int]] = []  # of each batch: the sum over its tokens, and their number
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's, with rows without labels that fill the last batch; else it gets repeated rows, or is dropped.

        https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/data_loader.py (`even_batches`)
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = cast(Any, self.eval_dataset)[rows] if isinstance(rows, str) else rows
        whole = self.args.eval_batch_size * self.accelerator.num_processes
        uneven = self.accelerator.num_processes > 1 or self.args.dataloader_drop_last
        return super().get_eval_dataloader(with_unlabelled(rows, -len(rows) % whole if uneven else 0))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer's; the loss is the cross entropy alone: not smoothed, reweighted, or with a router's loss."""
        config = cast(SFTConfig, self.args)
        before = self.aux_loss_enabled, self.label_smoother, config.loss_type
        self.aux_loss_enabled, self.label_smoother, config.loss_type = False, None, "nll"
        try:
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.aux_loss_enabled, self.label_smoother, config.loss_type = before
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        self._losses.append((float(cast(Any, loss)) * tokens, tokens))
        return loss, *rest

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's, with the mean loss over tokens.

        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`evaluation_loop`)
        """
        self._losses = []
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = (math.fsum(column) for column in zip(*gather_object(self._losses), strict=True))
        metrics = cast(dict[str, float], output.metrics)
        metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / max(tokens, 1)
        return output
