"""How probable the model held each token of its answer, and what it might have said instead."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

ALTERNATIVES = 5
WINDOW = 8  # tokens that are decoded before a token, for its spaces
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
    pairs = [(own, scores) for own, scores in zip(ids, logits, strict=False) if own not in special]
    said = [own for own, _ in pairs]
    tokens: list[Token] = []
    start, probability = 0, 1.0  # of the character that is not complete yet
    alternatives: list[tuple[str, float]] = []
    for at, (own, scores) in enumerate(pairs):
        shares = scores.float().softmax(-1)
        before = said[max(0, start - WINDOW) : start]
        if at == start:
            best = shares.topk(min(ALTERNATIVES, len(shares)))
            others = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            probability, alternatives = 1.0, [(_added(before, [other], tokenizer), share) for other, share in others]
        probability *= float(shares[own])
        text = _added(before, said[start : at + 1], tokenizer)
        if not text.endswith(BROKEN) or at + 1 == len(said):
            tokens.append(Token(text, probability, alternatives))
            start = at + 1
    return tokens


def _added(before: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What tokens add to the text of those before them, which ends with a whole character."""
    return str(tokenizer.decode([*before, *tokens]))[len(str(tokenizer.decode(before))) :]
