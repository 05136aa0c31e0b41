"""The real trainers take turns: a callback that waits before each step or epoch and reports after it."""

from typing import Any, Literal

from transformers import TrainerCallback

from plainlora.bench.turns import Turns


class Baton(TrainerCallback):
    """Makes a turn of every optimizer step, or of every epoch.

    Args:
        turns: Whose.
        unit: What a turn is.
    """

    def __init__(self, turns: Turns, unit: Literal["step", "epoch"]) -> None:
        self.turns, self.unit = turns, unit

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The model is where it trains."""
        self.turns.ready()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first batch is drawn within the epoch."""
        if self.unit == "epoch":
            self.turns.begin()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The batch is there."""
        if self.unit == "step":
            self.turns.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        if self.unit == "step":
            self.turns.end()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """The last step is done."""
        if self.unit == "epoch":
            self.turns.end()
