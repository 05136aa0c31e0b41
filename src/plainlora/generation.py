"""Greedy generation, with prompts rendered as in training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from plainlora.base.config import context_length
from plainlora.base.tokenizer import check_known
from plainlora.data.layouts import Schema, find_schema, split_row, template_options, text_of, text_pair
from plainlora.data.prompts import plain_prompt, render
from plainlora.errors import UserError


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """All ids that end an answer: chat models often have other end tokens beside the tokenizer's EOS."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({token for token in ids if token is not None}) or None


@contextmanager
def default_generation_config(model: nn.Module) -> Iterator[None]:
    """Replaces the model's own generation config by the library's default within the block.

    Otherwise Transformers takes unset options from it, such as a repetition penalty or beam search, and the answer is
    not greedy.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/utils.py
    (`_prepare_generation_config`)
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [vars(module)["generation_config"] for module in owners]
    try:
        for module in owners:
            vars(module)["generation_config"] = GenerationConfig()
        yield
    finally:
        for module, config in zip(owners, before, strict=True):
            vars(module)["generation_config"] = config


class PromptTooLong(UserError):
    """A prompt fills the model's context."""


def room_after(tokens: int, config: PretrainedConfig) -> int | None:
    """How many tokens the model's context has left after a prompt; `None` if its config names no context.

    Raises:
        PromptTooLong: None are left.
    """
    context = context_length(config)
    if context is not None and tokens >= context:
        raise PromptTooLong(f"a prompt has {tokens} tokens, and the model's context is {context}; shorten it")
    return None if context is None else context - tokens


def check_prompts(
    setting: str, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Raises `UserError` for a rendered prompt that `generate` would refuse.

    Args:
        setting: The setting that the prompts come from, for the message.
        prompts: Rendered prompts.
        tokenizer: The model's tokenizer.
        config: The model's config.
    """
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise UserError(f"{setting}: prompt {number} is empty, and there is no chat template; give some text")
        try:
            room_after(len(ids), config)
        except PromptTooLong as error:
            raise UserError(f"{setting}: {error} (prompt {number})") from error


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    description: str | None = None,
) -> list[str]:
    """Continues each prompt greedily until an EOS of the model or of the tokenizer, or the end of the context.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: The model's tokenizer.
        prompts: Rendered prompts; no special token is added.
        max_new_tokens: Longest continuation.
        batch_size: Number of prompts at a time.
        description: The label of a progress bar; no bar if left out.

    Returns:
        The continuations without special tokens, stripped, in the order of the prompts.

    Raises:
        UserError: A prompt fills the model's context, or holds a token that the model does not know.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    config = cast(PreTrainedModel, model).config
    try:
        rows = [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
        rooms = [min(max_new_tokens, room_after(len(row), config) or max_new_tokens) for row in rows]
        batches = _batches(list(map(len, rows)), [room == max_new_tokens for room in rooms], batch_size)
        for chosen in tqdm(batches, desc=description, disable=None if description else True, leave=False):
            padded = tokenizer.pad({"input_ids": [rows[number] for number in chosen]}, return_tensors="pt")
            batch = padded.to(device)
            check_known(batch["input_ids"].flatten().tolist(), tokenizer, config)
            longest = batch["input_ids"].shape[1]
            settings.max_new_tokens = min(rooms[number] for number in chosen)
            with default_generation_config(model):
                output = model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
                )
            continuations = output[:, longest:]
            texts = tokenizer.batch_decode(continuations, skip_special_tokens=True)
            for number, text in zip(chosen, texts, strict=True):
                answers[number] = text.strip()
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return answers


def _batches(lengths: Sequence[int], have_room: Sequence[bool], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar lengths.

    A prompt whose answer ends with the model's context is alone, or the others' answers would end as early.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    together = [number for number in order if have_room[number]]
    batches = [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    return batches + [[number] for number in order if not have_room[number]]


class ExactMatch:
    """Test rows whose answers are compared exactly.

    Args:
        rows: Test rows with separate answers (not plain text).
        count: How many of the first rows to use.
        tokenizer: A tokenizer with a chat template.
        text_column: The column of rows of plain text.

    Attributes:
        questions: The questions as text.
        prompts: The questions rendered.
        expected: The expected answers.
    """

    def __init__(
        self, rows: Dataset, count: int, tokenizer: PreTrainedTokenizerBase, text_column: str = "text"
    ) -> None:
        schema = find_schema(rows, text_column, "exact_match_rows")
        if schema == "text":
            raise UserError("exact_match_rows needs rows with an answer of their own, not plain text")
        self.tokenizer = tokenizer
        parts = [self._split(row, schema) for row in rows.select(range(min(count, len(rows))))]
        self.questions, self.prompts, self.expected = map(list, zip(*parts, strict=True))

    def _split(self, row: dict[str, Any], schema: Schema) -> tuple[str, str, str]:
        """The row's question, its prompt as rendered in training, and its answer."""
        texts = text_pair(row, schema)
        if texts is not None:
            prompt, completion = texts
            answer = completion.removesuffix(str(self.tokenizer.eos_token))
            return prompt, plain_prompt(prompt, self.tokenizer), answer.strip()
        messages, answers = split_row(row, schema)
        if not messages:
            raise UserError(
                "exact_match_rows needs rows with a question before the answer; one begins with its answer"
            )
        options = template_options(row)
        prompt = render(messages, self.tokenizer, for_generation=True, options=options)
        answered = self._ids(render([*messages, *answers], self.tokenizer, options=options))
        ids = answered[common_prefix_length(self._ids(prompt), answered) :]
        if self.tokenizer.eos_token_id in ids:  # the template may write more after it
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        expected = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text_of(messages[-1].get("content")), prompt, expected

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def score(self, answers: Sequence[str]) -> float:
        """The share of answers that match exactly."""
        return sum(answer == expected for answer, expected in zip(answers, self.expected, strict=True)) / len(answers)
