"""How long rows are."""

import pytest

from plainlora.data.lengths import percentile_95


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (19, 19), (20, 19), (100, 95), (101, 96)])
def test_95_percent_of_the_rows_are_no_longer_and_fewer_of_any_shorter_length(count: int, expected: int) -> None:
    lengths = list(range(count, 0, -1))
    found = percentile_95(lengths)
    assert found == expected
    assert sum(length <= found for length in lengths) >= 0.95 * count
    assert sum(length <= found - 1 for length in lengths) < 0.95 * count
