"""Compares the observations of both sides: one verdict for each level, by one table of tolerances."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from plainlora.parity.case import Case
from plainlora.parity.observe import LEVELS, Observation, observe, observe_last_bits
from plainlora.parity.sides import HandWritten, Peft, Side
from plainlora.parity.tolerances import (
    BLURRED,
    BY_LAST_BITS,
    LAST_BITS,
    NEAR_TIES,
    TOLERANCES,
    Tolerance,
    tolerance_for,
)


def last_bits_of(case: Case, theirs: dict[str, Observation]) -> dict[str, float]:
    """How much PEFT's own results change, level by level, when the last bit of every weight is changed.

    This is the effect of rounding in fp32, amplified by the model, so two computations cannot be expected to agree
    better. Files and the merged model are judged by their logits.

    Args:
        case: The comparison.
        theirs: PEFT's observations.

    Returns:
        The largest difference divided by the largest value of a tensor, by level.
    """
    moved = {
        level: max(_difference(tensor, theirs[level].tensors[name])[1] for name, tensor in seen.tensors.items())
        for level, seen in observe_last_bits(Peft(), case).items()
        if not (seen.not_run or theirs[level].not_run)
    }
    return moved | {
        "files": max(moved.get("forward", 0.0), moved.get("dropout", 0.0)),
        "merge": moved.get("forward", 0.0),
    }


@dataclass
class Verdict:
    """One level of one case.

    Attributes:
        case: The case's name.
        level: The level's name.
        max_abs: Largest absolute difference.
        max_rel: Largest difference divided by the largest value of its tensor (dimensionless).
        tolerance: The bound of `max_rel`.
        reason: The reason of the tolerance; or why the level did not run; or what differs.
        identical: Whether every bit is the same.
        status: `pass`, `fail` or `not run`.
    """

    case: str
    level: str
    max_abs: float | None
    max_rel: float | None
    tolerance: float | None
    reason: str
    identical: bool
    status: str


@dataclass
class CaseResult:
    """The result of one case.

    Attributes:
        case: The comparison.
        verdicts: One for each level.
        losses: The losses of the trajectory, by side; empty if it did not run.
        environment: Device, base dtype and, for the fused form, the number of fused layers.
    """

    case: Case
    verdicts: list[Verdict]
    losses: dict[str, list[float]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """`(max |a - b|, max |a - b| / max |b|)`; infinite if a value of either side is not finite."""
    if ours.numel() == 0:
        return 0.0, 0.0
    left, right = ours.double(), theirs.double()
    if not (left.isfinite().all() and right.isfinite().all()):
        return math.inf, math.inf
    gap = float((left - right).abs().max())
    return gap, gap / max(float(right.abs().max()), 1e-300)


def judge(name: str, level: str, ours: Observation, theirs: Observation, allowed: Tolerance) -> Verdict:
    """Compares two observations: facts and names first, then numbers.

    Args:
        name: The case's name.
        level: One of `LEVELS`.
        ours: The observation of this package.
        theirs: The observation of PEFT.
        allowed: The tolerance.
    """
    if theirs.not_run:  # nothing to compare with
        why = theirs.not_run if ours.not_run == theirs.not_run else f"PEFT: {theirs.not_run}"
        return Verdict(name, level, None, None, None, why, False, "not run")
    tolerance, follows = allowed.relative, allowed.follows if allowed.relative else None
    facts = [side.facts | {"not run": side.not_run} for side in (ours, theirs)]
    problems = [
        f"{fact}: {_short(facts[0].get(fact))} instead of {_short(facts[1].get(fact))}"
        for fact in sorted(facts[0].keys() | facts[1].keys())
        if facts[0].get(fact) != facts[1].get(fact)
    ]
    if odd := ours.tensors.keys() ^ theirs.tensors.keys():
        problems.insert(0, f"{len(odd)} tensors on one side only, such as {min(odd)}")
    max_abs = max_rel = 0.0
    identical = True
    for tensor in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        left, right = ours.tensors[tensor], theirs.tensors[tensor]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            problems.append(f"{tensor} is {_dtype_and_shape(left)} instead of {_dtype_and_shape(right)}")
            continue
        identical = identical and torch.equal(left, right)
        if follows and tensor.startswith(follows):
            continue
        gap, relative = _difference(left, right)
        if relative > tolerance and relative >= max_rel:
            problems.insert(0, f"{tensor} differs by {relative:.1e}")
        max_abs, max_rel = max(max_abs, gap), max(max_rel, relative)
    status = "fail" if problems else "pass"
    reason = "; ".join(problems[:3]) or allowed.reason
    return Verdict(name, level, max_abs, max_rel, tolerance, reason, identical and not problems, status)


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _weights_after(path: Sequence[Side], case: Case, directory: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The weights after each side in turn has loaded and saved them."""
    for number, side in enumerate(path):
        model = side.load(case.make_base(), directory)
        directory = scratch / f"{number}-{side.name}"
        side.save(model, directory)
        del model
    return load_file(directory / "adapter_model.safetensors")


def round_trips(case: Case, folders: dict[str, Path], scratch: Path) -> list[str]:
    """The problems of the round trips plainlora -> PEFT -> plainlora and PEFT -> plainlora -> PEFT, bit for bit."""
    ours, theirs = HandWritten(case.lora_backend), Peft()
    problems = []
    for first, second in ((ours, theirs), (theirs, ours)):
        start = load_file(folders[first.name] / "adapter_model.safetensors")
        folder = scratch / f"from-{first.name}"
        try:
            end = _weights_after((second, first), case, folders[first.name], folder)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            problems.append(f"{first.name} -> {second.name} -> {first.name} cannot be loaded: {_short(error)}")
            continue
        if start.keys() != end.keys() or not all(
            start[name].dtype == end[name].dtype and torch.equal(start[name], end[name]) for name in start
        ):
            problems.append(f"{first.name} -> {second.name} -> {first.name} does not come back bit for bit")
    return problems


def compare(
    case: Case, progress: Callable[[str], None] = lambda _: None, tolerance: Tolerance | None = None
) -> CaseResult:
    """Observes both sides and compares them at every level.

    Args:
        case: The comparison.
        progress: Called with the side and the level as each begins.
        tolerance: A tolerance for all levels, instead of the table's.

    Returns:
        A verdict for each of `LEVELS`, in their order.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sides: tuple[Side, Side] = (HandWritten(case.lora_backend), Peft())
        folders = {side.name: Path(scratch) / side.name for side in sides}
        ours, theirs = (
            observe(side, case, folders[side.name], lambda what: progress(f"{case.name}, {what}")) for side in sides
        )
        progress(f"{case.name}: round trips")
        if not (ours["files"].not_run or theirs["files"].not_run):
            ours["files"].facts["round trips"] = round_trips(case, folders, Path(scratch))
            theirs["files"].facts["round trips"] = []  # no problem is allowed
    facts = ours["init"].facts
    environment = {name: str(facts.get(name, "")) for name in ("device", "base dtype")}
    environment["device"] = str(ours["trajectory"].facts.get("device", environment["device"]))
    quantised = bool(facts.get("quantised"))
    if tolerance_for("forward", case, environment, quantised) is TOLERANCES["fused half"]:
        ours["generation"] = theirs["generation"] = Observation(not_run=NEAR_TIES)
    last_bits = cache(lambda: last_bits_of(case, theirs))
    verdicts = []
    for level in LEVELS:
        allowed = tolerance or tolerance_for(level, case, environment, quantised)
        verdict = judge(case.name, level, ours[level], theirs[level], allowed)
        if allowed in BLURRED and allowed.relative < (verdict.max_rel or 0.0) < math.inf:
            progress(f"{case.name}, PEFT with last bits changed")
            blur = LAST_BITS * last_bits().get(level, 0.0)
            allowed = replace(allowed, relative=max(blur, allowed.relative), reason=BY_LAST_BITS)
            verdict = judge(case.name, level, ours[level], theirs[level], allowed)
        verdicts.append(verdict)
    environment |= ours["init"].notes
    losses = {
        side.name: levels["trajectory"].tensors["loss"].tolist()
        for side, levels in ((HandWritten, ours), (Peft, theirs))
        if "loss" in levels["trajectory"].tensors
    }
    return CaseResult(case, verdicts, losses, environment)
