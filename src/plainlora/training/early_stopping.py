"""Stops training after some evaluations without a better metric, at the same step if the run was resumed."""

from typing import Any, cast

from tqdm import tqdm
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

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Passes over an evaluation with another prefix, such as the base's, of which Transformers' warns.

        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_callback.py (`on_evaluate`)
        """
        if "eval_runtime" in metrics:  # SFTTrainer's own figures are called `eval_...` with any prefix
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says that the run was stopped early, if it was."""
        stopped = self.early_stopping_patience_counter >= self.early_stopping_patience
        if stopped and state.global_step < state.max_steps and state.is_world_process_zero:
            tqdm.write(  # on a line of its own, whatever progress bar there is
                f"stopped early after step {state.global_step} of {state.max_steps}: no better evaluation in the last "
                f"{self.early_stopping_patience}; step {state.best_global_step} is kept"
            )


def early_stopping(patience: int | None) -> list[EarlyStopping]:
    """The callback with this patience; an empty list for `None`."""
    return [] if patience is None else [EarlyStopping(patience)]
