"""Answers to the sample prompts during training: kept by step, written to a file, sent to the tracker.

Training is not changed: modes and random streams are restored.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import pandas  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import ExportableState

from plainlora.fast.loss_head import evaluating
from plainlora.folders import write_durably
from plainlora.report import describe_steps
from plainlora.training.evaluation import Evaluator

BASE = "base"  # before the steps


class SamplesByStep(TrainerCallback, ExportableState):
    """Answers the sample prompts with the base, and then every `every` optimizer steps. Checkpoints hold the answers.

    Args:
        evaluate: Answers the prompts.
        model: The model that is trained, without the trainer's wrappers.
        disabled: A context in which the model computes as before training.
        every: Optimizer steps between two samplings.
        path: The Markdown file.

    Attributes:
        answers: `base`, and each step's number, to an answer for each prompt.
    """

    def __init__(
        self,
        evaluate: Evaluator,
        model: nn.Module,
        disabled: Callable[[], AbstractContextManager[object]],
        every: int,
        path: Path,
    ) -> None:
        self.evaluate, self.model, self.disabled, self.every, self.path = evaluate, model, disabled, every, path
        self.answers: dict[str, list[str]] = {}

    def state(self) -> dict[str, Any]:
        """The content for a checkpoint, in Trainer's format."""
        return {"args": {}, "attributes": {"prompts": self.evaluate.prompts, "answers": self.answers}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the answers of the checkpoint that is resumed, if it has any to these prompts; else asks the base."""
        kept: Any = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__) or {}
        found = kept.get("attributes", {})
        answers = found["answers"] if found.get("prompts") == self.evaluate.prompts else {}
        steps = sorted((name for name in answers if name != BASE), key=int)  # Trainer's file sorts them as text
        self.answers = {name: answers[name] for name in [BASE, *steps] if name in answers}
        trackers = [name for name in args.report_to or [] if name not in ("tensorboard", "trackio", "wandb")]
        if trackers and state.is_world_process_zero:
            print(f"samples: in {self.path}, and not sent to {', '.join(trackers)}")
        if BASE not in self.answers:
            with self.disabled():
                self._sample(BASE, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samples, unless a signal was received."""
        if state.global_step % self.every == 0 and not self.evaluate.trainer.stopping:
            self._sample(str(state.global_step), state.global_step)

    def _sample(self, name: str, step: int) -> None:
        trainer = self.evaluate.trainer
        with undisturbed(self.model, trainer.args.device):
            self.answers[name] = self.evaluate.answer_samples(self.model)
        trainer.engine.reshard(self.model)
        if trainer.is_world_process_zero():
            write_durably(self.path, describe_steps(self.evaluate.prompts, self.answers))
            self._send(step)

    def _send(self, step: int) -> None:
        """Sends TensorBoard the newest answers, and wandb and trackio a table of all, if the run reports to them."""
        prompts, newest = self.evaluate.prompts, list(self.answers.values())[-1]
        table = pandas.DataFrame(
            [(at, *pair) for at, answers in self.answers.items() for pair in zip(prompts, answers, strict=True)],
            columns=["step", "prompt", "answer"],
        )
        for callback in self.evaluate.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for number, (prompt, answer) in enumerate(zip(prompts, newest, strict=True), 1):
                    callback.tb_writer.add_text(f"samples/{number}", f"{prompt}\n\n---\n\n{answer}", step)
            elif isinstance(callback, WandbCallback):
                import wandb  # noqa: PLC0415

                wandb.log({"samples": wandb.Table(dataframe=table), "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                import trackio  # noqa: PLC0415

                trackio.log({"samples": trackio.Table(dataframe=table), "train/global_step": step})


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random streams are restored afterwards."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind), evaluating(model):
        yield
