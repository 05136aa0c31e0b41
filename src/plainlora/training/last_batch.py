"""Fills the last batch of several processes with rows without labels, which train nothing.

Accelerate fills it with the first rows again: of 45 rows on two processes some were trained twice, and the adapter
differed by 2.6e-3 from that of one process.
https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/data_loader.py (`even_batches`)
"""

from collections.abc import Iterator
from typing import Any, cast

from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer


def with_unlabelled(rows: Dataset, count: int) -> Dataset:
    """Appends `count` copies of a short row without labels, which do not change a sum of losses.

    Args:
        rows: Rows whose `labels` are one for each token, or one for the row.
        count: Number of copies.
    """
    if not count:
        return rows
    row = min(rows.select(range(min(64, len(rows)))), key=lambda row: len(row["input_ids"]))
    labels = [-100] * len(row["labels"]) if isinstance(row["labels"], list) else -100
    more = [row | {"labels": labels}] * count
    return concatenate_datasets([rows, Dataset.from_list(more, features=rows.features)])


class SamplerWithExtraRows(Sampler[int]):
    """The indices of another sampler of `rows` rows, followed by `rows`, `rows + 1`, ..., `end - 1`."""

    def __init__(self, sampler: Any, rows: int, end: int) -> None:
        self.sampler, self.rows, self.end = sampler, rows, end

    def __len__(self) -> int:
        return self.end

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(self.rows, self.end)

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch, on which the order depends, to the other sampler."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class TrainsRowsOnce(Trainer):
    """Trainer that trains every row once an epoch, in the same order on any number of processes."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As Trainer's, with rows without labels at the end of an epoch."""
        rows = cast(Dataset, self.train_dataset)
        batch = self._train_batch_size * self.accelerator.num_processes
        missing = 0 if self.accelerator.num_processes == 1 or self.args.dataloader_drop_last else -len(rows) % batch
        if not missing:
            return super().get_train_dataloader()
        self._own_rows: Dataset | None = rows
        self.train_dataset = with_unlabelled(rows, missing)
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.train_dataset, self._own_rows = rows, None
        # Only now, because Accelerate replaces a random sampler, which it must recognise, by one that depends on the
        # epoch. It leaves any other sampler, such as that of `group_by_length`, in the batch sampler that it shards.
        sampler = loader.get_sampler()
        sampler = loader.batch_sampler.batch_sampler.sampler if sampler is None else sampler
        loader.set_sampler(SamplerWithExtraRows(sampler, len(rows), len(rows) + missing))
        return cast(DataLoader[Any], loader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """As Trainer's, for the rows that have labels."""
        own = getattr(self, "_own_rows", None)
        return super()._get_train_sampler(train_dataset if own is None else own)
