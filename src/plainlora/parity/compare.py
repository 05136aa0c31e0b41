"""Two observations -> one verdict a level, against one table of tolerances."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from plainlora.parity.case import Case
from plainlora.parity.observe import LEVELS, Observation, observe
from plainlora.parity.sides import HandWritten, Peft, Side

# The only tolerances: largest difference over the largest value of a tensor, and why it is what it is.
TOLERANCES = {
    "cpu": (0.0, "the same operations in the same order"),
    "float64": (1e-12, "the same sum in another order, in fp64"),
    "float32": (1e-6, "the same sum in another order, in fp32"),
    "half": (1e-2, "each term rounded to half precision, in another order"),
}


def tolerance_for(device: str, dtype: str, quantised: bool) -> tuple[float, str]:
    """The row of `TOLERANCES` that a case is held to.

    On a CPU the two sides do the same in the same order, except that PEFT rounds the adapter's output to the precision
    of a quantised base before it adds it. A GPU promises no order.
    """
    is_half = dtype in ("float16", "bfloat16")
    if device == "cpu" and not (quantised and is_half):
        return TOLERANCES["cpu"]
    return TOLERANCES["half" if is_half else dtype or "float32"]  # none is known where nothing could be loaded


@dataclass
class Verdict:
    """One level of one case.

    Attributes:
        case: The case's name.
        level: The level's name.
        max_abs: Largest absolute difference.
        max_rel: Largest difference over the largest value of its tensor (dimensionless).
        tolerance: What `max_rel` was held to.
        reason: Why the tolerance is what it is; or why the level did not run; or what differs.
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
    """One case, compared.

    Attributes:
        case: What was compared.
        verdicts: One for each level.
        losses: The trajectory's losses, by side; empty if none ran.
        environment: Device and base dtype.
    """

    case: Case
    verdicts: list[Verdict]
    losses: dict[str, list[float]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """`(max |a - b|, max |a - b| / max |b|)`; infinite where either side holds a value that is not finite."""
    if ours.numel() == 0:
        return 0.0, 0.0
    left, right = ours.double(), theirs.double()
    if not (left.isfinite().all() and right.isfinite().all()):
        return math.inf, math.inf
    gap = float((left - right).abs().max())
    return gap, gap / max(float(right.abs().max()), 1e-300)


def judge(name: str, level: str, ours: Observation, theirs: Observation, allowed: tuple[float, str]) -> Verdict:
    """Compares names and facts first, then the numbers.

    Args:
        name: The case's name.
        level: One of `LEVELS`.
        ours: What this package did.
        theirs: What PEFT did.
        allowed: The tolerance, relative to the largest value of a tensor, and its reason.
    """
    if theirs.not_run:  # without the oracle there is nothing to hold to
        why = theirs.not_run if ours.not_run == theirs.not_run else f"PEFT: {theirs.not_run}"
        return Verdict(name, level, None, None, None, why, False, "not run")
    tolerance, reason = allowed
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
            problems.append(f"{tensor} is {_kind(left)} instead of {_kind(right)}")
            continue
        gap, relative = _difference(left, right)
        identical = identical and torch.equal(left, right)
        if relative > tolerance and relative >= max_rel:
            problems.insert(0, f"{tensor} differs by {relative:.1e}")
        max_abs, max_rel = max(max_abs, gap), max(max_rel, relative)
    status = "fail" if problems else "pass"
    return Verdict(
        name, level, max_abs, max_rel, tolerance, "; ".join(problems[:3]) or reason, identical and not problems, status
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _weights_after(path: Sequence[Side], case: Case, directory: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Loads and saves a folder through each side in turn."""
    for number, side in enumerate(path):
        model = side.load(case.make_base(), directory)
        directory = scratch / f"{number}-{side.name}"
        side.save(model, directory)
        del model
    return load_file(directory / "adapter_model.safetensors")


def round_trips(case: Case, folders: dict[str, Path], scratch: Path) -> list[str]:
    """Custom -> PEFT -> custom and PEFT -> custom -> PEFT must come back bit for bit; what does not is named."""
    ours, theirs = HandWritten(), Peft()
    problems = []
    for first, second in ((ours, theirs), (theirs, ours)):
        start = load_file(folders[first.name] / "adapter_model.safetensors")
        way = scratch / f"from-{first.name}"
        try:
            end = _weights_after((second, first), case, folders[first.name], way)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            problems.append(f"{first.name} -> {second.name} -> {first.name} cannot be loaded: {_short(error)}")
            continue
        if start.keys() != end.keys() or not all(
            start[name].dtype == end[name].dtype and torch.equal(start[name], end[name]) for name in start
        ):
            problems.append(f"{first.name} -> {second.name} -> {first.name} does not come back bit for bit")
    return problems


def compare(case: Case, progress: Callable[[str], None] = lambda _: None) -> CaseResult:
    """Observes both sides and judges every level.

    Args:
        case: What to compare.
        progress: Told the side and the level as each begins.

    Returns:
        A verdict for each of `LEVELS`, in their order.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folders = {side.name: Path(scratch) / side.name for side in (HandWritten(), Peft())}
        ours, theirs = (
            observe(side, case, folders[side.name], lambda what: progress(f"{case.name}, {what}"))
            for side in (HandWritten(), Peft())
        )
        progress(f"{case.name}: round trips")
        if not (ours["files"].not_run or theirs["files"].not_run):
            ours["files"].facts["round trips"] = round_trips(case, folders, Path(scratch))
            theirs["files"].facts["round trips"] = []  # nothing may be lost on the way
    facts = ours["init"].facts
    environment = {name: str(facts.get(name, "")) for name in ("device", "base dtype")}
    environment["device"] = str(ours["trajectory"].facts.get("device", environment["device"]))
    allowed = tolerance_for(environment["device"], environment["base dtype"], bool(facts.get("quantised")))
    verdicts = [judge(case.name, level, ours[level], theirs[level], allowed) for level in LEVELS]
    losses = {
        side.name: levels["trajectory"].tensors["loss"].tolist()
        for side, levels in ((HandWritten, ours), (Peft, theirs))
        if "loss" in levels["trajectory"].tensors
    }
    return CaseResult(case, verdicts, losses, environment)
