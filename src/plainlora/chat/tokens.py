"""How probable the model held each token of its answer, and what it might have said instead."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

ALTERNATIVES = 5
WINDOW = 8  # tokens that are decoded before a token, for its spaces and characters of several tokens
BROKEN = "�"  # what a decoder gives for a part of a character


@dataclass(frozen=True)
class Token:
    """A token of an answer, or several that make up one character.

    Attributes:
        text: What it adds to the answer.
        probability: The model's own, before any penalty, temperature or choice; of several tokens the product.
        alternatives: The most probable tokens in its place, with their probabilities, the most probable first.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float]]


def read_tokens(ids: Sequence[int], logits: Iterable[torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """The tokens of an answer with `p = softmax(logits)`; special tokens are left out.

    Args:
        ids: The answer's tokens.
        logits: For each of them the model's logits, `(vocabulary,)`.
        tokenizer: Theirs.
    """
    special = set(tokenizer.all_special_ids)
    tokens: list[Token] = []
    begun: Token | None = None  # a character of which tokens are missing
    for at, (own, scores) in enumerate(zip(ids, logits, strict=False)):
        if own in special:
            continue
        before = [number for number in ids[max(0, at - WINDOW) : at] if number not in special]
        shares = scores.float().softmax(-1)
        best = shares.topk(min(ALTERNATIVES, len(shares)))
        text = _added(before, own, tokenizer)
        probability = float(shares[own])
        if begun is None:
            others = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            alternatives = [(_added(before, other, tokenizer), share) for other, share in others]
        else:
            probability, alternatives = begun.probability * probability, begun.alternatives
        token = Token(text, probability, alternatives)
        begun = token if text.endswith(BROKEN) and at + 1 < len(ids) else None
        if begun is None:
            tokens.append(token)
    return tokens


def _added(before: list[int], token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a token adds to the text of those before it; the whole character if it ends one."""
    start = str(tokenizer.decode(before)).rstrip(BROKEN)
    whole = str(tokenizer.decode([*before, token]))
    return whole[len(start) :]
