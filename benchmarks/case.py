"""What is measured: the variants of one case, and what is asked of them."""

from dataclasses import dataclass, field
from typing import Any

# The keys of a variant's options are its suite's own. These four mean the same in every suite.
FUSED, PEFT, REFERENCE, FLOOR = "fused", "peft", "reference", "floor"
MATCHED, AS_SHIPPED = "matched", "as shipped"


@dataclass(frozen=True)
class Target:
    """What the fused variant is held to.

    Attributes:
        metric: `time`, `peak` (all that the process held), `peak above weights`, or a count such as `saved bytes`.
        against: The other variant.
        at_most: Largest ratio (dimensionless).
        variant: The variant in question.
    """

    metric: str
    against: str
    at_most: float
    variant: str = FUSED


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        suite: The suite it belongs to.
        name: As the table shows it.
        variants: Name of each variant and its options.
        options: What all variants share.
        table: `matched`, the same recipe on both sides; `as shipped`, each side with its own defaults; else empty.
        targets: What is asked.
        not_run: Why it cannot run here; empty if it can.
        rounds: The most rounds that are timed, however many are asked for; as many as are asked for if `None`.
    """

    suite: str
    name: str
    variants: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    targets: tuple[Target, ...] = ()
    not_run: str = ""
    rounds: int | None = None
