"""Greedy answers, rendered by the template that training used."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from plainlora.data.encoding import find_schema, split_row
from plainlora.data.prompts import render
from plainlora.errors import UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    description: str | None = None,
) -> list[str]:
    """Continues each prompt greedily until EOS.

    Args:
        model: Any causal language model, with an adapter or without.
        tokenizer: Of that model.
        prompts: Rendered already: no special token is added.
        max_new_tokens: Longest continuation.
        batch_size: Prompts at a time.
        description: Shown beside a progress bar; no bar if left out.

    Returns:
        The continuations without special tokens, stripped, in the order of the prompts.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # similar lengths together
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    try:
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc=description, disable=description is None, leave=False):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[number] for number in chosen], add_special_tokens=False, padding=True, return_tensors="pt"
            ).to(device)
            output = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
            )
            continuations = output[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(continuations, skip_special_tokens=True)
            for number, text in zip(chosen, texts, strict=True):
                answers[number] = text.strip()
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return answers


class ExactMatch:
    """Test rows whose answer must be given to the letter.

    Args:
        rows: Test rows with an answer of their own (not plain text).
        count: How many of the first rows to ask.
        tokenizer: Carries the template.
        max_new_tokens: Longest answer.
    """

    def __init__(self, rows: Dataset, count: int, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        schema = find_schema(rows, "text", "exact_match_rows")
        if schema == "text":
            raise UserError("exact_match_rows needs rows with an answer of their own, not plain text")
        pairs = [split_row(row, schema) for row in rows.select(range(min(count, len(rows))))]
        self.questions = [messages[-1]["content"] for messages, _ in pairs]
        self.expected = [answer[0]["content"].strip() for _, answer in pairs]
        self.prompts = [render(messages, tokenizer, for_generation=True) for messages, _ in pairs]
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens

    def __call__(self, model: nn.Module, description: str) -> tuple[float, list[str]]:
        """The share of answers that are right to the letter, and the answers."""
        answers = generate(model, self.tokenizer, self.prompts, self.max_new_tokens, description=description)
        right = sum(answer == expected for answer, expected in zip(answers, self.expected, strict=True))
        return right / len(answers), answers
