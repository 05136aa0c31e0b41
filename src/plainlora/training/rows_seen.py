"""The training rows of the batches that a run has seen: which they were, in which order, and their text."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from plainlora.lora.errors import some

ROWS = "rows_on_host"  # the entry of a training batch that stays on the host
ROW_PARTS = ("input_ids", "attention_mask", "position_ids")  # from which a batch's rows are recovered


def rows_on_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies of the tensors from which a batch's rows are recovered; a transfer each if they are on a device.

    Not views: a loader's worker moves the tensors to shared memory, which frees their own.
    """
    return {name: batch[name].cpu().numpy().copy() for name in ROW_PARTS if name in batch}


@dataclass(frozen=True)
class KeepsRowsOnHost:
    """A collator that adds `rows_on_host` to its batches, as the entry `ROWS`.

    PyTorch's memory pinning and Accelerate leave arrays on the host. Otherwise the ids would be copied back from the
    device in every batch, and the host would wait until the device has finished all its work.

    Attributes:
        collator: The collator that makes the batch.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        """The collator's batch with the rows on the host."""
        batch = self.collator(examples)
        batch[ROWS] = rows_on_host(batch)
        return batch


def documents(batch: Mapping[str, Any]) -> list[list[int]]:
    """The rows of a batch as token ids, without padding and unpacked.

    Args:
        batch: A batch of tensors, or its `rows_on_host`.
    """
    found: list[list[int]] = []
    ids = batch["input_ids"]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for at, row in enumerate(ids.tolist()):
        if positions is not None:
            starts = [number for number, position in enumerate(positions[at].tolist()) if position == 0]
            found += [row[start:end] for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]
        elif mask is not None and mask.ndim == 2:
            found.append([token for token, kept in zip(row, mask[at].tolist(), strict=True) if kept])
        else:
            found.append(row)
    return found


def describe_rows(
    batches: Iterable[Mapping[str, Any]], rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The training rows of some batches, for a message: their numbers from 1, and the beginnings of the first ones.

    Args:
        batches: Collated batches, or their `rows_on_host`.
        rows: Token ids of the training rows, in order.
        tokenizer: Decodes the beginnings; `None` to leave them out.
    """
    number_of: dict[tuple[int, ...], int] = {}
    for number, row in enumerate(rows, 1):
        number_of.setdefault(tuple(row), number)
    texts = []
    for document in (each for batch in batches for each in documents(batch)):
        found = number_of.get(tuple(document))
        beginning = "" if tokenizer is None else " ".join(str(tokenizer.decode(document[:40])).split())[:60]
        texts.append(f"{found or '?'} {beginning!r}" if beginning else str(found or "?"))
    return f"row{'s' * (len(texts) != 1)} {some(texts)}"


class RowsSeen(TrainerCallback, ExportableState):
    """A digest of the batches in the order in which this process trained on them. It is saved in checkpoints.

    d <- SHA-256(d, token ids of the batch)
    """

    def __init__(self) -> None:
        self.digest = ""

    def add(self, ids: np.ndarray) -> None:
        """Adds a batch, `(rows, length)`."""
        self.digest = hashlib.sha256(self.digest.encode() + ids.tobytes()).hexdigest()

    def state(self) -> dict[str, Any]:
        """The content for a checkpoint, in Trainer's format."""
        return {"args": {}, "attributes": {"digest": self.digest}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the digest of the checkpoint that is resumed."""
        saved: Any = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__) or {}
        self.digest = saved.get("attributes", {}).get("digest", "")
