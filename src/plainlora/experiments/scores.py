"""The figures by which runs are compared: a classifier's accuracy and F1, a language model's loss and exact match."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plainlora.settings.programs import CLASSIFY, SFT, Program


@dataclass(frozen=True)
class Score:
    """A figure of quality.

    Attributes:
        name: Its name in `all_results.json`, without the suffix `_adapter`.
        title: Its name in words.
        is_share: Whether it is a share, shown in per cent; else a loss.
    """

    name: str
    title: str
    is_share: bool = True

    @property
    def heading(self) -> str:
        """The title with the unit, if it has one."""
        return f"{self.title}, %" if self.is_share else self.title

    def show(self, value: float, half_width: float | None = None) -> str:
        """The value, with half of its confidence interval if there is one, in the unit of the heading."""
        scale, places, most = (100, 1, 2) if self.is_share else (1, 3, 4)
        return with_interval(scale * value, None if half_width is None else scale * half_width, places, most)


@dataclass(frozen=True)
class Judging:
    """The figures by which the runs of a program are compared and searched.

    Attributes:
        scores: The figures of test rows, the most important one first. The others may not have been measured.
        metric: The figure that a sweep optimises by default.
        metrics: The figures that a sweep can optimise.
        advice: How to give a recipe the rows that these figures need.
        caution: A sentence about the rows that chose the settings; may be empty.
    """

    scores: tuple[Score, ...]
    metric: str
    metrics: tuple[str, ...]
    advice: str
    caution: str = ""


JUDGING = {
    CLASSIFY.name: Judging(
        (Score("test_accuracy", "test accuracy"), Score("test_f1", "test F1")),
        "validation_accuracy",
        ("validation_accuracy", "validation_f1", "validation_loss"),
        "give the recipe validation rows with -- --validation_split_size 0.1 or --validation_dataset_name",
    ),
    SFT.name: Judging(
        (Score("eval_loss", "test loss", is_share=False), Score("exact_match", "exact match")),
        "eval_loss",
        ("eval_loss", "eval_perplexity", "exact_match"),
        "give the recipe test rows with -- --test_split_size 0.1 or --eval_dataset_name, and exact_match_rows for "
        "exact_match",
        " The test rows chose these settings: judge them on rows that the sweep has not seen.",
    ),
}


def judging_of(program: Program[Any]) -> Judging:
    """The figures by which the runs of a program are compared and searched."""
    return JUDGING[program.name]


def read_figure(results: Mapping[str, Any], name: str) -> Any:
    """A figure after training: `eval_loss_adapter` of an adapter, `eval_loss` of a whole model; `None` without one."""
    return results.get(f"{name}_adapter", results.get(name))


def with_interval(value: float, half_width: float | None, places: int, most: int) -> str:
    """`93.1 ± 0.4`, with one significant digit of the interval, or two if the first is a 1.

    Args:
        value: The value.
        half_width: Half of its confidence interval, if it is known.
        places: Decimal places without an interval.
        most: Decimal places at most.
    """
    if half_width is None:
        return f"{value:.{places}f}"
    if half_width == 0:
        return f"{value:.{places}f} ± 0"
    exponent = math.floor(math.log10(half_width))
    leads_with_one = half_width < 2 * 10**exponent
    decimals = min(max(-exponent + leads_with_one, 0), most)
    return f"{value:.{decimals}f} ± {half_width:.{decimals}f}"
