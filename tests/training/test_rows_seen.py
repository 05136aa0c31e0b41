"""Batches are taken apart into their rows, and their order is kept in a digest."""

import numpy as np
import torch

from plainlora.training.rows_seen import RowsSeen, documents


def test_u17_the_digest_of_the_rows_depends_on_their_order() -> None:
    batches = [np.array([[1, 2]]), np.array([[3, 4]])]
    digests = set()
    for order in ((0, 1), (1, 0), (0,), (0, 1, 1)):
        seen = RowsSeen()
        for number in order:
            seen.add(batches[number])
        digests.add(seen.digest)
    assert len(digests) == 4


def test_a_batch_is_taken_apart_into_the_rows_it_was_made_of() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 1]])
    assert documents({"input_ids": ids}) == [[5, 6, 7, 8, 9, 1]]
    assert documents({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}) == [[5, 6, 7, 8, 9]]
    assert documents({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}) == [[6, 7, 8, 9, 1]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert documents({"input_ids": ids, "position_ids": positions}) == [[5, 6, 7], [8, 9], [1]]
