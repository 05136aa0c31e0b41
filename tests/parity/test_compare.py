"""How a verdict is reached: nothing that differs, is missing, or is not a number may pass."""

import math
from dataclasses import replace

import pytest
import torch

from plainlora.parity.case import FORMS
from plainlora.parity.compare import judge
from plainlora.parity.observe import Observation, move_last_bits
from plainlora.parity.suite import built_in_cases
from plainlora.parity.tolerances import TOLERANCES, Tolerance, tolerance_for

ALLOWED = Tolerance(1e-6, "why")
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


def test_values_that_follow_are_compared_only_where_every_bit_is() -> None:
    ours = Observation({"final a": torch.tensor([1.0]), "loss": torch.tensor([1.0])})
    theirs = Observation({"final a": torch.tensor([2.0]), "loss": torch.tensor([1.0])})
    found = judge("case", "trajectory", ours, theirs, Tolerance(1e-6, "why", "final "))
    assert (found.status, found.identical, found.max_rel) == ("pass", False, 0)
    assert judge("case", "trajectory", ours, theirs, Tolerance(0.0, "why", "final ")).status == "fail"
    other = Observation({"final a": torch.tensor([2.0]).half(), "loss": torch.tensor([1.0])})
    assert judge("case", "trajectory", other, theirs, Tolerance(1e-6, "why", "final ")).status == "fail"


# level, device, base dtype, quantised, adapter dtype -> the row for the fused form, and for the reference form
ROWS = [
    ("forward", "cpu", "float32", False, "float32", "float32", "same order"),
    ("forward", "cpu", "float64", False, "float32", "float64", "same order"),
    ("forward", "cpu", "bfloat16", False, "float32", "fused half", "same order"),
    ("gradients", "cpu", "float32", True, "float32", "float32", "same order"),
    ("gradients", "cpu", "float32", False, "bfloat16", "fused half", "same order"),
    ("dropout", "cpu", "bfloat16", True, "float32", "fused half", "half"),
    ("files", "cuda", "float32", False, "float32", "float32", "float32"),
    ("files", "cuda", "float64", False, "float32", "float64", "float64"),
    ("files", "cuda", "float16", True, "float32", "fused half", "half"),
    ("trajectory", "cpu", "float32", False, "float32", "trajectory", "same order"),
    ("trajectory", "cpu", "float64", False, "float32", "trajectory", "same order"),
    ("trajectory", "cpu", "bfloat16", False, "float32", "half trajectory", "same order"),
    ("trajectory", "cuda", "float32", False, "float32", "trajectory", "trajectory"),
    ("trajectory", "cuda", "bfloat16", True, "float32", "half trajectory", "half trajectory"),
    ("init", "cuda", "bfloat16", True, "float32", "drawn", "drawn"),
    ("generation", "cuda", "bfloat16", True, "float32", "chosen", "chosen"),
    *(
        ("merge", "cpu", dtype, False, "float32", f"merge {dtype}", f"merge {dtype}")
        for dtype in ("float64", "float32", "bfloat16", "float16")
    ),
]


@pytest.mark.parametrize(("level", "device", "dtype", "quantised", "adapter_dtype", "fused", "reference"), ROWS)
def test_the_tolerance_follows_form_device_and_precision(
    level: str, device: str, dtype: str, quantised: bool, adapter_dtype: str, fused: str, reference: str
) -> None:
    case = replace(next(built_in_cases(steps=1)), adapter_dtype=adapter_dtype)
    environment = {"device": device, "base dtype": dtype}
    for form, row in zip(FORMS, (fused, reference), strict=True):
        found = tolerance_for(level, replace(case, lora_backend=form), environment, quantised)
        assert found == TOLERANCES[row], form


def test_every_row_of_the_table_is_used() -> None:
    assert {name for row in ROWS for name in row[-2:]} == TOLERANCES.keys()


def test_every_last_bit_is_moved_to_a_neighbour() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 30, dtype=torch.float64))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    move_last_bits(model, seed=0)
    for old, new in zip(before, model.parameters(), strict=True):
        up = new > old
        assert (new != old).all()
        assert 0.2 < up.double().mean() < 0.8
        assert torch.equal(torch.nextafter(old, torch.where(up, math.inf, -math.inf).to(old.dtype)), new)
