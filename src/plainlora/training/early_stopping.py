"""Stops training after some evaluations without a better metric, at the same step if the run was resumed."""

from typing import Any, cast

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback, which goes on counting in a resumed run.

    Trainer restores callbacks only with `restore_callback_states_from_checkpoint`, which replaces each by a copy:
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_load_callback_state`)
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the count of the checkpoint that is resumed; a run that had stopped takes no further step."""
        super().on_train_begin(args, state, control, **kwargs)
        saved: Any = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__) or {}
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def early_stopping(patience: int | None) -> list[EarlyStopping]:
    """The callback with this patience; an empty list for `None`."""
    return [] if patience is None else [EarlyStopping(patience)]
