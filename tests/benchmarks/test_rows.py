"""Rows whose lengths are those of the real data sets, and batches of them."""

import pytest

from benchmarks.classify import choose_rows
from benchmarks.rows import LENGTHS, draw_lengths, make_rows


@pytest.mark.parametrize("data", LENGTHS)
def test_lengths_have_the_measured_quantiles(data: str) -> None:
    lengths = sorted(draw_lengths(data, 2000, 10_000))
    for place, expected in enumerate(LENGTHS[data][1:-1], 1):
        assert abs(lengths[place * 100] - expected) <= 2
    assert draw_lengths(data, 50, 10_000) == draw_lengths(data, 50, 10_000)
    assert max(draw_lengths(data, 2000, 40)) == 40


def test_both_orders_hold_the_same_rows_and_grouping_pads_less() -> None:
    lengths = draw_lengths("imdb", 600, 512)

    def padded(order: list[int]) -> int:
        return sum(12 * max(lengths[row] for row in order[start : start + 12]) for start in range(0, 48, 12))

    grouped, drawn = (choose_rows(lengths, 12, 4, grouped) for grouped in (True, False))
    assert len(set(grouped)) == 48
    assert sorted(grouped) == sorted(drawn)
    useful = sum(lengths[row] for row in grouped)
    assert useful <= padded(grouped) < 1.1 * useful < padded(drawn)


def test_rows_have_the_asked_lengths_and_classes() -> None:
    rows = make_rows([3, 1, 2], 100, labels=2)
    assert [len(row) for row in rows["input_ids"]] == [3, 1, 2]
    assert rows["labels"] == [0, 1, 0]
    assert all(2 <= token < 100 for row in rows["input_ids"] for token in row)
    assert make_rows([3], 100).column_names == ["input_ids"]


def test_the_asked_share_at_the_end_of_each_row_has_a_label_and_the_first_token_never_has() -> None:
    for share, expected in ((1.0, 9), (0.4, 4), (0.1, 1)):
        (row,) = make_rows([10], 100, answers=share)
        assert row["labels"] == [-100] * (10 - expected) + row["input_ids"][10 - expected :]
