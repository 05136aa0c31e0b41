"""How a step of GPT-2 grows with the length of a row, rank, batch and share of answer tokens."""

from collections.abc import Sequence
from typing import Any

from benchmarks.case import FUSED, MATCHED, PEFT, Case
from benchmarks.interleave import Outcome

SCALING = "scaling"
# Axis: how the picture names it, and its values; the first is that of all other axes' points.
AXES: dict[str, tuple[str, tuple[float, ...]]] = {
    "length": ("tokens of one row", (256, 1024, 4096)),
    "r": ("rank", (2, 16, 64, 256)),
    "batch": ("rows of 256 tokens", (1, 4, 16)),
    "answers": ("share of answer tokens", (1.0, 0.4, 0.1)),
}
SHAPE = "GPT-2 124M, matched; if not varied 1 row of 256 tokens, rank 2, every token has a label"
LARGE, ROUNDS, ROUNDS_OF_LARGE = 4096, 3, 2  # tokens of a step from which on there are fewer rounds


def cases(size: str, device: str) -> list[Case]:
    """One step a point, matched: each axis in turn, the other three at their first value."""
    base = {axis: values[0] for axis, (_, values) in AXES.items()}
    points = [base] + [base | {axis: value} for axis, (_, values) in AXES.items() for value in values[1:]]
    training = {"gradient_checkpointing": False, "bf16": device == "cuda"}
    variants = {form: {"backend": form, "training": training, "base_dropout": 0.0} for form in (FUSED, PEFT)}
    shape = SHAPE if size == "full" else f"tiny, in place of {SHAPE}"
    found = []
    for point in points:
        options: dict[str, Any] = {"model": "gpt2", "size": size, "point": point, "shape": shape} | point
        if size == "tiny":
            options["length"] = int(point["length"]) // 16
        tokens = point["length"] * point["batch"]
        name = f"GPT-2 124M, {point['batch']} x {point['length']}, r={point['r']}, answers {point['answers']:g}"
        rounds = ROUNDS if tokens < LARGE else ROUNDS_OF_LARGE
        found.append(Case(SCALING, name, variants, options, MATCHED, rounds=rounds))
    return found


def on_axis(outcomes: Sequence[Outcome], axis: str) -> list[Outcome]:
    """Those whose point is at the first value of every other axis."""
    others = {name: values[0] for name, (_, values) in AXES.items() if name != axis}
    return [each for each in outcomes if others.items() <= each.case.options["point"].items()]
