"""Whether the learning rate is LoRA's."""

from dataclasses import fields

from transformers import TrainingArguments

from plainlora.doctor.finding import Examination

USUAL = 2e-4  # of LoRA


def examine_learning_rate(training: TrainingArguments, examination: Examination) -> None:
    """Warns where an adapter would be trained with the libraries' default, which is one of full fine-tuning.

    LoRA's best rate is about ten times that of full fine-tuning, whatever the rank: Schulman and Thinking Machines,
    "LoRA Without Regret", 2025, https://thinkingmachines.ai/blog/lora/

    Args:
        training: Of a run that trains an adapter.
        examination: Told what was found.
    """
    (default,) = [field.default for field in fields(training) if field.name == "learning_rate"]
    rate = training.learning_rate
    if rate == default:
        said = (
            f"learning_rate {rate:g} is the default, made for full fine-tuning; LoRA learns little with it and takes "
            f"about ten times as much: set learning_rate, {USUAL:g} is usual"
        )
        examination.add("warning", "adapter", "learning rate", said)
    else:
        examination.add("ok", "adapter", "learning rate", f"learning_rate {rate:g} is the recipe's own")
