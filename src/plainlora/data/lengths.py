"""Statistics of the lengths of rows."""

import math
from collections.abc import Sequence


def percentile_95(lengths: Sequence[int]) -> int:
    """The smallest length, in tokens, that 95 % of the rows do not exceed."""
    return sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]
