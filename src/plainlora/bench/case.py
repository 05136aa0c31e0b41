"""What is measured: the arms of one case, and what is asked of them."""

from dataclasses import dataclass, field
from typing import Any

# The keys of an arm's options are its suite's own. The four names below stand in every suite that has such an arm.
FUSED, PEFT, REFERENCE, FLOOR = "fused", "peft", "reference", "floor"
MATCHED, AS_SHIPPED = "matched", "as shipped"


@dataclass(frozen=True)
class Target:
    """What the fused arm is held to.

    Attributes:
        metric: `time`, `peak` (all that the process held), `peak above weights`, or a count such as `saved bytes`.
        against: The other arm.
        at_most: Largest ratio (dimensionless).
        arm: The arm in question.
    """

    metric: str
    against: str
    at_most: float
    arm: str = FUSED


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        suite: The suite it belongs to.
        name: As the table shows it.
        arms: Name of each arm and its options.
        options: What all arms share.
        table: `matched`, the same recipe on both sides; `as shipped`, each side with its own defaults; else empty.
        targets: What is asked.
        not_run: Why it cannot run here; empty if it can.
    """

    suite: str
    name: str
    arms: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    targets: tuple[Target, ...] = ()
    not_run: str = ""
