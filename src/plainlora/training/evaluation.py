"""Measures a language model with and without its adapter: test loss, exact matches, sample answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.generation import ExactMatch, generate
from plainlora.training.trainers import AdapterTrainer


@dataclass
class Measurement:
    """The figures of the base, or of the adapter.

    Attributes:
        loss: Mean test cross-entropy in nats per token, if there are test rows.
        exact_match: Share of test answers that match exactly, if measured.
        answers: One answer for each prompt of `Evaluator.prompts`.
    """

    loss: float | None = None
    exact_match: float | None = None
    answers: list[str] = field(default_factory=list)


class Evaluator:
    """Measures the base and the adapter on the same rows and prompts.

    Args:
        trainer: Holds the test rows and computes the loss.
        tokenizer: A tokenizer with a chat template.
        exact_match: The rows for exact matches, if any.
        sample_prompts: Prompts to answer; if there are none, three of the exact-match rows are used.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(
        self,
        trainer: AdapterTrainer,
        tokenizer: PreTrainedTokenizerBase,
        exact_match: ExactMatch | None,
        sample_prompts: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self.trainer, self.tokenizer, self.exact_match = trainer, tokenizer, exact_match
        self.sample_prompts, self.max_new_tokens = list(sample_prompts), max_new_tokens
        count = len(exact_match.questions) if exact_match else 0
        self.sampled_rows = sorted({count // 4, count // 2, 3 * count // 4}) if count and not sample_prompts else []

    @property
    def prompts(self) -> list[str]:
        """The prompts of the sample answers."""
        if self.exact_match and self.sampled_rows:
            return [self.exact_match.questions[row] for row in self.sampled_rows]
        return self.sample_prompts

    def __call__(self, model: nn.Module, side: str) -> Measurement:
        """Measures the model as `base` or `adapter`. To be called in every process.

        Args:
            model: The model, with the adapter switched off for `base`.
            side: `base` or `adapter`.

        Raises:
            UserError: The test loss after training is not finite, as after a last step that diverged.
        """
        found = Measurement()
        if self.trainer.eval_dataset is not None:
            prefix = "eval" if side == "adapter" else side  # keeps the base's loss out of the training curve
            known = self.trainer.last_evaluation() if side == "adapter" else None
            metrics = known.metrics if known is not None else self.trainer.evaluate(metric_key_prefix=prefix)
            found.loss = float((metrics or {})[f"{prefix}_loss"])
            if side == "adapter" and not math.isfinite(found.loss):
                args = self.trainer.args
                raise UserError(
                    f"the test loss after training is {found.loss}, so what {args.output_dir} holds is of no use; "
                    f"lower learning_rate (now {args.learning_rate:g}) or train in float32"
                )
        if self.exact_match:
            answers = self._answer(model, self.exact_match.prompts, f"Answering test rows ({side})")
            found.exact_match = self.exact_match.score(answers)
            found.answers = [answers[row] for row in self.sampled_rows]
        if self.sample_prompts:
            found.answers = self.answer_samples(model)
        return found

    def answer_samples(self, model: nn.Module) -> list[str]:
        """The model's answers to `prompts`. To be called in every process."""
        if self.exact_match and self.sampled_rows:
            return self._answer(model, [self.exact_match.prompts[row] for row in self.sampled_rows])
        return self._answer(model, [render_prompt(each, self.tokenizer) for each in self.sample_prompts])

    def _answer(self, model: nn.Module, prompts: list[str], description: str | None = None) -> list[str]:
        """The answers. Each process generates a share; with a sharded base all generate every answer together."""
        accelerator = self.trainer.accelerator
        shown = description if accelerator.is_main_process else None
        if self.trainer.engine.shards_base:
            return generate(model, self.tokenizer, prompts, self.max_new_tokens, description=shown)
        with accelerator.split_between_processes(prompts) as mine:
            return list(gather_object(generate(model, self.tokenizer, mine, self.max_new_tokens, description=shown)))


def before_and_after(before: Measurement, after: Measurement, suffix: str = "_adapter") -> dict[str, Any]:
    """Both measurements as flat results: `eval_loss_base`, `eval_loss_adapter`, ...; unmeasured ones are left out.

    Args:
        before: The base's figures.
        after: The figures after training.
        suffix: The end of their names; empty where there is no adapter.
    """
    results: dict[str, Any] = {}
    for end, found in (("_base", before), (suffix, after)):
        if found.loss is not None:
            results[f"eval_loss{end}"] = found.loss
            results[f"eval_perplexity{end}"] = math.exp(min(found.loss, 700.0))
        if found.exact_match is not None:
            results[f"exact_match{end}"] = found.exact_match
    return results
