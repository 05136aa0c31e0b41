"""Whether rows of plain text begin as the prompts do that the saved chat template makes for inference."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import render_prompt, without_bos
from plainlora.errors import UserError

BOS = "{{- bos_token -}}"  # how a built-in template spells the tokenizer's
QUESTION = "QxxQ"
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<s>|<bos>")  # how tokenizers write what begins a text


@dataclass(frozen=True)
class Beginnings:
    """How rows of plain text begin. Rows are counted from 1.

    Attributes:
        prompt: What prompts of the chat template begin with; empty if there is no template, or nothing before the
            question.
        others: Rows that do not begin with it.
        first_other: The first of them.
        foreign: A special token of another tokenizer that rows begin with, if any: here it is plain characters.
        foreign_rows: Rows that begin with it.
        first_foreign: The first of them.
    """

    prompt: str
    others: int
    first_other: int | None
    foreign: str | None
    foreign_rows: int
    first_foreign: int | None


def compare_beginnings(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Beginnings:
    """Compares the rows with the template's prompts, and makes the template begin as all rows do where it can.

    Rows that were written for another tokenizer begin with its BOS, `<s>` for one. Training keeps it as characters, so
    whatever all rows have before the template's own beginning is put before the template's prompts too.

    Args:
        texts: What the rows begin with, as they are.
        tokenizer: Its chat template is changed as said.
    """
    texts = [without_bos(text, tokenizer) for text in texts]
    prompt = _beginning(tokenizer)
    lead = texts[0][: max(texts[0].find(prompt), 0)]
    if lead and all(text.startswith(lead + prompt) for text in texts):
        source, spelled = str(tokenizer.chat_template), ""
        if source.startswith(BOS):
            source, spelled = source.removeprefix(BOS), BOS
        tokenizer.chat_template = f"{spelled}{{{{- {json.dumps(lead)} -}}}}{source}"
        prompt = _beginning(tokenizer)
    others = [number for number, text in enumerate(texts, 1) if not text.startswith(prompt)]
    found = [SPECIAL.match(text) for text in texts]
    foreign = next((match[0] for match in found if match and match[0] not in tokenizer.get_vocab()), None)
    begun = [number for number, match in enumerate(found, 1) if match and match[0] == foreign]
    return Beginnings(prompt, len(others), _first(others), foreign, len(begun), _first(begun))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template's prompts begin with, without the BOS that the tokenizer puts before texts too."""
    if tokenizer.chat_template is None:
        return ""
    try:
        rendered = render_prompt(QUESTION, tokenizer)
    except UserError:  # a template that needs more than a question
        return ""
    return without_bos(rendered, tokenizer).partition(QUESTION)[0]


def _first(numbers: Sequence[int]) -> int | None:
    return numbers[0] if numbers else None
