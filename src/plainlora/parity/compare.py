"""Two observations -> one verdict a level, against one table of tolerances."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from plainlora.parity.case import Case
from plainlora.parity.observe import LEVELS, Observation, observe
from plainlora.parity.sides import HandWritten, Peft, Side

# The only tolerances: largest difference over the largest value of a tensor, and why it is not zero.
TOLERANCES = {
    "exact": (0.0, "the same operations in the same order"),
    "fp32": (1e-6, "the same sum in another order, in fp32"),
    "fp64": (1e-12, "the same sum in another order, in fp64"),
    "bf16": (1e-2, "the same sum in another order, each term rounded to bf16 (2^-8)"),
}


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


def tolerance_for(case: Case) -> tuple[float, str]:
    """The row of `TOLERANCES` that a case is held to."""
    return TOLERANCES["exact"] if case.exact else TOLERANCES["fp32"]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """`(max |a - b|, max |a - b| / max |b|)`; infinite where a value is not a number on one side only."""
    if torch.equal(ours, theirs) or ours.numel() == 0:
        return 0.0, 0.0
    left, right = ours.double(), theirs.double()
    gap = float((left - right).abs().nan_to_num(nan=float("inf")).max())
    return gap, gap / max(float(right.abs().max()), 1e-300)


def judge(case: Case, level: str, ours: Observation, theirs: Observation) -> Verdict:
    """Compares names and facts first, then the numbers."""
    if ours.not_run or theirs.not_run:
        return Verdict(case.name, level, None, None, None, ours.not_run or theirs.not_run, False, "not run")
    tolerance, reason = tolerance_for(case)
    problems = [
        f"{name}: {_short(ours.facts.get(name))} instead of {_short(theirs.facts.get(name))}"
        for name in sorted(ours.facts.keys() | theirs.facts.keys())
        if ours.facts.get(name) != theirs.facts.get(name)
    ]
    if odd := ours.tensors.keys() ^ theirs.tensors.keys():
        problems.insert(0, f"{len(odd)} tensors on one side only, such as {sorted(odd)[0]}")
    max_abs = max_rel = 0.0
    identical = not problems
    for name in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        left, right = ours.tensors[name], theirs.tensors[name]
        if left.shape != right.shape:
            problems.append(f"{name} has shape {tuple(left.shape)} instead of {tuple(right.shape)}")
            continue
        gap, relative = _difference(left, right)
        identical = identical and left.dtype == right.dtype and torch.equal(left, right)
        if relative > tolerance and relative >= max_rel:
            problems.insert(0, f"{name} differs by {relative:.1e}")
        max_abs, max_rel = max(max_abs, gap), max(max_rel, relative)
    if problems:
        return Verdict(case.name, level, max_abs, max_rel, tolerance, "; ".join(problems[:3]), False, "fail")
    return Verdict(case.name, level, max_abs, max_rel, tolerance, reason, identical, "pass")


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
    if case.not_run:
        missing = [Verdict(case.name, level, None, None, None, case.not_run, False, "not run") for level in LEVELS]
        return CaseResult(case, missing)
    with tempfile.TemporaryDirectory() as scratch:
        observed, folders = {}, {}
        for side in (HandWritten(), Peft()):
            folders[side.name] = Path(scratch) / side.name
            observed[side.name] = observe(
                side, case, folders[side.name], lambda what: progress(f"{case.name}, {what}")
            )
        ours, theirs = observed.values()
        verdicts = [judge(case, level, ours[level], theirs[level]) for level in LEVELS]
        files = verdicts[LEVELS.index("files")]
        progress(f"{case.name}: round trips")
        if problems := round_trips(case, folders, Path(scratch)):
            files.status, files.identical = "fail", False
            files.reason = "; ".join(problems if files.reason == tolerance_for(case)[1] else [files.reason, *problems])
    losses = {
        name: levels["trajectory"].tensors["loss"].tolist()
        for name, levels in observed.items()
        if "loss" in levels["trajectory"].tensors
    }
    environment = {name: str(ours["init"].facts[name]) for name in ("device", "base dtype")}
    return CaseResult(case, verdicts, losses, environment)
