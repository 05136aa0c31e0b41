"""Checks that the learning rate suits LoRA."""

from dataclasses import fields

from transformers import TrainingArguments

from plainlora.doctor.finding import Examination

USUAL = 2e-4  # of LoRA


def examine_learning_rate(training: TrainingArguments, examination: Examination) -> None:
    """Warns if an adapter is trained with the libraries' default learning rate, which is for full fine-tuning.

    LoRA's best learning rate is about ten times that of full fine-tuning, for any rank: Schulman and Thinking
    Machines, "LoRA Without Regret", 2025, https://thinkingmachines.ai/blog/lora/

    Args:
        training: The arguments of a run that trains an adapter.
        examination: Gets the findings.
    """
    (default,) = [field.default for field in fields(training) if field.name == "learning_rate"]
    rate = training.learning_rate
    if rate == default:
        message = (
            f"learning_rate {rate:g} is the default, made for full fine-tuning; LoRA learns little with it and takes "
            f"about ten times as much: set learning_rate, {USUAL:g} is usual"
        )
        examination.add("warning", "adapter", "learning rate", message)
    else:
        examination.add("ok", "adapter", "learning rate", f"learning_rate {rate:g} is the recipe's own")
