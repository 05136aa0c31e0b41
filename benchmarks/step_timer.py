"""Times the real trainers: a callback that makes an iteration of every optimizer step, or of every epoch."""

from typing import Any, Literal

from transformers import TrainerCallback

from benchmarks.timer import Timer


class StepTimer(TrainerCallback):
    """Waits before each step or epoch until it is asked for, and times it.

    Args:
        timer: Of this variant.
        unit: What an iteration is.
    """

    def __init__(self, timer: Timer, unit: Literal["step", "epoch"]) -> None:
        self.timer, self.unit = timer, unit

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The model is where it trains."""
        self.timer.ready()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first batch is drawn within the epoch."""
        if self.unit == "epoch":
            self.timer.begin()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The batch is there."""
        if self.unit == "step":
            self.timer.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        if self.unit == "step":
            self.timer.end()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """The last step is done."""
        if self.unit == "epoch":
            self.timer.end()
