"""How a verdict is reached: nothing that differs, is missing, or is not a number may pass."""

import math

import pytest
import torch

from plainlora.parity.compare import TOLERANCES, judge, tolerance_for
from plainlora.parity.observe import Observation

ALLOWED = (1e-6, "why")
NAN, INF = math.nan, math.inf


def verdict(ours: Observation, theirs: Observation) -> tuple[str, bool]:
    found = judge("case", "forward", ours, theirs, ALLOWED)
    return found.status, found.identical


def seen(*values: float, dtype: torch.dtype = torch.float64, **facts: object) -> Observation:
    return Observation({"x": torch.tensor(values, dtype=dtype)}, dict(facts))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (seen(1, 2), seen(1, 2), ("pass", True)),
        (seen(1, 2 + 1e-7), seen(1, 2), ("pass", False)),
        (seen(1, 2 + 1e-5), seen(1, 2), ("fail", False)),
        (seen(1, 2), seen(1, NAN), ("fail", False)),
        (seen(1, NAN), seen(1, 2), ("fail", False)),
        (seen(1, NAN), seen(1, NAN), ("fail", False)),
        (seen(9, NAN), seen(2, NAN), ("fail", False)),
        (seen(1, 2), seen(1, INF), ("fail", False)),
        (seen(1, 2), seen(1, 2, 3), ("fail", False)),
        (seen(1, 2), seen(1, 2, dtype=torch.float32), ("fail", False)),
        (seen(1, 2, trained=["a"]), seen(1, 2, trained=["b"]), ("fail", False)),
        (seen(1, 2, trained=["a"]), seen(1, 2), ("fail", False)),
        (Observation(), seen(1, 2), ("fail", False)),
        (Observation(not_run="broken"), seen(1, 2), ("fail", False)),
        (seen(1, 2), Observation(not_run="PEFT refuses"), ("not run", False)),
        (Observation(not_run="no kernel"), Observation(not_run="no kernel"), ("not run", False)),
        (Observation(not_run="one reason"), Observation(not_run="another"), ("not run", False)),
    ],
)
def test_a_verdict(ours: Observation, theirs: Observation, expected: tuple[str, bool]) -> None:
    assert verdict(ours, theirs) == expected


def test_the_reason_names_what_differs_most() -> None:
    ours = Observation({"a": torch.tensor([1.0]), "b": torch.tensor([3.0])})
    theirs = Observation({"a": torch.tensor([1.1]), "b": torch.tensor([1.0])})
    assert judge("case", "forward", ours, theirs, ALLOWED).reason.startswith("b differs by 2.0e+00")


@pytest.mark.parametrize(
    ("device", "dtype", "quantised", "row"),
    [
        ("cpu", "float32", False, "cpu"),
        ("cpu", "bfloat16", False, "cpu"),
        ("cpu", "float32", True, "cpu"),
        ("cpu", "bfloat16", True, "half"),
        ("cuda", "float32", False, "float32"),
        ("cuda", "float64", False, "float64"),
        ("cuda", "float16", True, "half"),
    ],
)
def test_the_tolerance_follows_device_and_precision(device: str, dtype: str, quantised: bool, row: str) -> None:
    assert tolerance_for(device, dtype, quantised) == TOLERANCES[row]
