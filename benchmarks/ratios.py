"""What the rounds of a case come to: ratios of time and memory, differences of losses, targets met."""

from statistics import median

from benchmarks.case import PEFT, Case, Target
from benchmarks.interleave import Outcome


def ratio(outcome: Outcome, metric: str, variant: str, against: str) -> tuple[float, float, float]:
    """Median, lowest and highest of `variant / against` (dimensionless); of one number where the metric does not vary.

    Times are divided round by round: whatever slowed the machine for a while slowed both.
    """
    if metric == "time":
        each = [a / b for a, b in zip(outcome.seconds[variant], outcome.seconds[against], strict=True)]
        return median(each), min(each), max(each)
    one = outcome.facts[variant][metric] / (outcome.facts[against][metric] if against else 1)
    return one, one, one


def loss_differences(outcome: Outcome, variant: str) -> list[float]:
    """The relative difference of each step's loss from PEFT's, the step before the first round included."""
    pairs = zip(outcome.facts[variant]["losses"], outcome.facts[PEFT]["losses"], strict=True)
    return [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]


def is_met(outcome: Outcome, target: Target) -> bool:
    """Whether the median ratio, or the number, is within the target."""
    return ratio(outcome, target.metric, target.variant, target.against)[0] <= target.at_most


def title(case: Case) -> str:
    """A case in a line."""
    return f"{case.suite}: {case.name}" + (f" ({case.table})" if case.table else "")
