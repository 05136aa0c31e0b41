"""Training rows from which PEFT computes the initial values of EVA, CorDA and LoRA-GA adapters."""

from collections.abc import Iterator
from typing import cast

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from plainlora.data.datasets import evenly_spaced

ROWS = 256  # as many as CorDA's paper samples (Yang et al. 2024, arXiv:2406.05223, section 4)


def calibration_batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields evenly spaced training rows, padded, in batches of the size of training.

    Args:
        rows: Encoded rows: `input_ids`, and `labels` for each token or for the row.
        tokenizer: Pads them.
        training: The batch size.
    """
    chosen = evenly_spaced(rows, ROWS).select_columns(["input_ids", "labels"]).to_list()
    of_tokens = isinstance(chosen[0]["labels"], list)
    collate = DataCollatorForSeq2Seq(tokenizer) if of_tokens else DataCollatorWithPadding(tokenizer)
    size = training.per_device_train_batch_size
    for start in range(0, len(chosen), size):
        yield cast(dict[str, torch.Tensor], dict(collate(chosen[start : start + size])))
