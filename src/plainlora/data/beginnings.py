"""Checks that rows of plain text begin like the prompts that the chat template renders for inference."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import render_prompt, without_bos
from plainlora.errors import UserError

BOS = "{{- bos_token -}}"  # how a built-in template writes the tokenizer's BOS
QUESTION = "QxxQ"
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<s>|<bos>")  # special tokens with which texts begin


@dataclass(frozen=True)
class Beginnings:
    """How rows of plain text begin. Rows are counted from 1.

    Attributes:
        prompt: The beginning of the chat template's prompts; empty if there is no template, or nothing before the
            question.
        others: Number of rows that do not begin with it.
        first_other: The first such row.
        foreign: A special token of another tokenizer with which rows begin, if any; here it is plain characters.
        foreign_rows: Number of rows that begin with it.
        first_foreign: The first such row.
    """

    prompt: str
    others: int
    first_other: int | None
    foreign: str | None
    foreign_rows: int
    first_foreign: int | None


def compare_beginnings(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Beginnings:
    """Compares the rows with the template's prompts. If all rows have the same extra prefix, the template gets it too.

    Rows that were written for another tokenizer begin with its BOS, such as `<s>`. Here it is trained as plain
    characters, so prompts must begin with it as well.

    Args:
        texts: The rows' texts.
        tokenizer: Its chat template may be changed.
    """
    texts = [without_bos(text, tokenizer) for text in texts]
    prompt = _beginning(tokenizer)
    lead = texts[0][: max(texts[0].find(prompt), 0)]
    if lead and all(text.startswith(lead + prompt) for text in texts):
        source, spelled = tokenizer.get_chat_template(), ""
        if source.startswith(BOS):
            source, spelled = source.removeprefix(BOS), BOS
        tokenizer.chat_template = f"{spelled}{{{{- {json.dumps(lead, ensure_ascii=False)} -}}}}{source}"
        prompt = _beginning(tokenizer)
    others = [number for number, text in enumerate(texts, 1) if not text.startswith(prompt)]
    found = [SPECIAL.match(text) for text in texts]
    foreign = next((match[0] for match in found if match and match[0] not in tokenizer.get_vocab()), None)
    begun = [number for number, match in enumerate(found, 1) if match and match[0] == foreign]
    return Beginnings(prompt, len(others), _first(others), foreign, len(begun), _first(begun))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of the template's prompts, without a BOS that the tokenizer adds itself."""
    if tokenizer.chat_template is None:
        return ""
    try:
        rendered = render_prompt(QUESTION, tokenizer)
    except UserError:  # a template that needs more than a question
        return ""
    return without_bos(rendered, tokenizer).partition(QUESTION)[0]


def _first(numbers: Sequence[int]) -> int | None:
    return numbers[0] if numbers else None
