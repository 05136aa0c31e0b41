"""The assistant's tokens, derived where a template does not mark them, are those that TRL's markers mark."""

import copy
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import has_generation_markers

from plainlora.data.encoding import IGNORED, Encoder
from plainlora.data.layouts import split_row, template_options
from plainlora.data.prompts import apply_template, render
from plainlora.data.spans import derive_mask
from plainlora.errors import UserError
from tests.data.test_as_trl import LAYOUTS, SMOLLM2, templates

CHATS = {layout: row for layout, row in LAYOUTS.items() if "messages" in row and layout != "an own template"}
MARKED = {"return_dict": True, "return_assistant_tokens_mask": True}
# DiffusionGemma's markers leave out the <|tool_response> that ends a call, and a byte of a letter that ends an answer;
# LLaVA's leave out the blank after EOS.
OTHERS = {
    *(("diffusion_gemma_training", layout) for layout in CHATS if layout.startswith("tool") and layout != "tools"),
    *(("diffusion_gemma_training", "unicode"), ("llava_next_training", "content in parts")),
} - {("diffusion_gemma_training", f"tool call with {what}") for what in ("content", "arguments as JSON")}
TURNS = [
    {"role": "user", "content": "A?"}, {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "B?"}, {"role": "assistant", "content": "Blue."},
]  # fmt: skip


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer to change, with every token that a template may name."""
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"bos_token": "<s>", "unk_token": "<unk>"})
    return copied


def test_derived_tokens_are_those_that_markers_mark(own: PreTrainedTokenizerFast) -> None:
    """Or fewer: some markers begin before the answer, at what inference's prompt writes (`<think>`, a newline)."""
    counts, others = Counter[str](), set[tuple[str, str]]()
    for name, template in templates().items():
        if not has_generation_markers(template):
            continue
        own.chat_template = template
        for layout, row in CHATS.items():
            messages, options = [*chain(*split_row(row, "messages"))], template_options(row)
            try:
                marked = apply_template(messages, own, True, **MARKED, **options)
            except UserError:  # no such row in this template
                continue
            mask = marked["assistant_masks"]
            if not any(mask):
                continue
            try:
                derived = derive_mask(messages, marked["input_ids"], own, options)
            except UserError:
                counts["refused"] += 1
                continue
            if derived == mask:
                counts["equal"] += 1
            elif all(theirs for ours, theirs in zip(derived, mask, strict=True) if ours):
                counts["fewer"] += 1
            else:
                others.add((name, layout))
    print(dict(counts), others)
    assert counts == {"equal": 348, "fewer": 135, "refused": 153}
    assert others == OTHERS


def test_a_template_without_markers_trains_each_answer_and_its_end(own: PreTrainedTokenizerFast) -> None:
    own.chat_template = SMOLLM2
    row = Encoder(own, "messages", "text", answers_only=False, assistant_only=True)({"messages": TURNS})
    assert own.decode([label for label in row["labels"] if label != IGNORED]) == "Red.<|im_end|>\nBlue.<|im_end|>\n"
    assert own.decode(row["input_ids"]) == render(TURNS, own)


@pytest.mark.parametrize(
    ("messages", "template"),
    [
        (TURNS[1:], SMOLLM2),  # nothing asks for the first answer
        (TURNS, "{{ messages | length }}" + SMOLLM2),  # the prompt alone begins otherwise
        (TURNS, SMOLLM2.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")),
    ],
)
def test_answers_that_cannot_be_derived_are_refused_by_name(
    own: PreTrainedTokenizerFast, messages: list[Any], template: str
) -> None:
    own.chat_template = template
    with pytest.raises(UserError, match=r"of message \d cannot be derived: .*: --prompt_template FILE\.jinja$"):
        Encoder(own, "messages", "text", answers_only=True)({"messages": messages})


def test_a_conversation_without_the_assistant_names_its_roles(own: PreTrainedTokenizerFast) -> None:
    own.chat_template = SMOLLM2
    rows = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "Red."}]
    with pytest.raises(UserError, match=r"the roles are human, gpt\), .*; name the roles user and assistant"):
        Encoder(own, "messages", "text", answers_only=True)({"conversations": rows})
