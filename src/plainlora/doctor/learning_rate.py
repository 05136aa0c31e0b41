"""Checks that the learning rate suits what is trained."""

from dataclasses import fields

from transformers import TrainingArguments

from plainlora.doctor.finding import Examination

USUAL = 2e-4  # of LoRA


def examine_learning_rate(training: TrainingArguments, examination: Examination, method: str = "lora") -> None:
    """Warns if an adapter is trained with the libraries' default learning rate, or every weight with LoRA's usual one.

    LoRA's best learning rate is about ten times that of full fine-tuning, for any rank: Schulman and Thinking
    Machines, "LoRA Without Regret", 2025, https://thinkingmachines.ai/blog/lora/

    Args:
        training: The arguments of the run.
        examination: Gets the findings.
        method: The finetuning mode. For `last_layers` no rate is usual.
    """
    (default,) = [field.default for field in fields(training) if field.name == "learning_rate"]
    rate = training.learning_rate
    if method != "lora":
        if method == "full" and rate >= USUAL:
            message = (
                f"learning_rate {rate:g} suits LoRA; full fine-tuning needs about a tenth of it: set "
                f"learning_rate, {USUAL / 10:g} is usual"
            )
            examination.add("warning", "method", "learning rate", message)
        return
    if rate == default:
        message = (
            f"learning_rate {rate:g} is the default, made for full fine-tuning; LoRA learns little with it and needs "
            f"about ten times as much: set learning_rate, {USUAL:g} is usual"
        )
        examination.add("warning", "adapter", "learning rate", message)
    else:
        examination.add("ok", "adapter", "learning rate", f"learning_rate {rate:g} is the recipe's own")
