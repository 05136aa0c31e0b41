"""Checks that a run takes enough optimizer steps to learn from its rows."""

from transformers import TrainingArguments

from plainlora.doctor.finding import Examination

FEW = 20  # a warm-up and a schedule need some, and an adapter starts without effect


def examine_steps(steps: int, training: TrainingArguments, examination: Examination) -> None:
    """Warns if an adapter is trained for only a few steps, such as one epoch of a small file.

    Args:
        steps: Optimizer steps of the run.
        training: Its arguments. A number of steps that was asked for is not questioned.
        examination: Gets the finding.
    """
    if steps >= FEW or training.max_steps > 0:
        return
    advice = f"set num_train_epochs to {int(training.num_train_epochs * FEW / steps) + 1} or more"
    if getattr(training, "packing", False):
        advice += ", or packing to false, because it makes a few long rows out of many"
    message = f"{steps} optimizer step{'s' * (steps > 1)} in all: the adapter will learn little; {advice}"
    examination.add("warning", "train rows", "steps", message, steps=steps)
