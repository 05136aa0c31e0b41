"""Rows of random tokens whose lengths are those of the real data sets."""

import random
from typing import Any

from datasets import Dataset

# Lengths in tokens at 0, 5, 10, ..., 100 % of the rows, measured with each base's tokenizer: IMDb reviews (6,000,
# cut to 512), SMS spam with as many ham as spam, Alpaca-GPT4 rows in Alpaca's template (779), and the rows of
# mlabonne/guanaco-llama2-1k in Llama-2's template and tokens, without those above 1,024 (750 of 800).
LENGTHS = {
    "imdb": [18, 84, 117, 145, 157, 166, 176, 188, 200, 215, 232, 251, 272, 299, 337, 383, 435, 509, 512, 512, 512],
    "sms": [2, 7, 9, 11, 12, 15, 17, 20, 24, 29, 33, 36, 38, 40, 42, 44, 47, 49, 51, 56, 97],
    "alpaca": [45, 54, 61, 65, 71, 77, 85, 104, 121, 140, 161, 181, 208, 234, 268, 307, 336, 365, 406, 445, 840],
    "guanaco": [
        *(22, 74, 112, 139, 173, 204, 231, 261, 290, 325),
        *(355, 388, 409, 442, 476, 507, 550, 603, 675, 777, 1018),
    ],
}


def draw_lengths(data: str, count: int, longest: int, seed: int = 0) -> list[int]:
    """`count` lengths, evenly spread over the data set's distribution, in random order."""
    points = LENGTHS[data]
    lengths = []
    for number in range(count):
        place = (number + 0.5) / count * (len(points) - 1)
        low = int(place)
        lengths.append(min(round(points[low] + (place - low) * (points[low + 1] - points[low])), longest))
    random.Random(seed).shuffle(lengths)
    return lengths


def make_rows(
    lengths: list[int], vocabulary: int, labels: int | None = None, seed: int = 0, answers: float | None = None
) -> Dataset:
    """Rows of `input_ids`, and of a class in turn where `labels` says how many there are.

    Args:
        lengths: Tokens of each row.
        vocabulary: How many tokens there are.
        labels: How many classes.
        seed: Of the tokens.
        answers: The share of each row's tokens, at its end, that have a label. Given, the first never has one: nothing
            predicts it, but Transformers counts it where it divides GPT-2's loss (transformers#46204).
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = [
        {"input_ids": [draw.randrange(2, vocabulary) for _ in range(length)]} for length in lengths
    ]
    if labels is not None:
        rows = [row | {"labels": number % labels} for number, row in enumerate(rows)]
    elif answers is not None:
        asked = [max(1, length - round(answers * length)) for length in lengths]
        rows = [row | {"labels": [-100] * n + row["input_ids"][n:]} for n, row in zip(asked, rows, strict=True)]
    return Dataset.from_list(rows)
