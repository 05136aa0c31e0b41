"""Whether a row's outputs depend on the rows it shares a batch with, measured on the model itself.

Rows are packed one behind the other or padded to one length. Both work only if the model lets no row see another, and
if a row gets the outputs that it gets alone. What an architecture does with positions, masks and states is up to its
code, so a few tokens are run through it, as a batch of the run would be. Then one neighbour is replaced by another of
the same length: an isolated row is computed by the same operations on the same numbers, so that nothing may change,
not even by rounding.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from plainlora.errors import UserError, first_line

# Tokens of three documents: several, and longer than the convolutions of state space models, which reach 4 back.
LENGTHS = (13, 9, 10)

# Differences that count, in parts of what the text before a document changes in it, in fp32 and in less. A leak is
# about 1; in freshly drawn state space models, whose states hardly reach the output, it was 0.015. Of isolated rows
# replacing one changes nothing, or about 1e-7 where experts take the tokens of all rows as one batch. Alone is
# another order of sums: below 1e-4 in fp32, 0.06 in bf16.
NEIGHBOURS = (0.001, 0.02)
COMPANY = (0.01, 0.25)

Outputs = Callable[[dict[str, Any]], torch.Tensor]


def collate(rows: Sequence[Sequence[int]], packed: bool, pad: int) -> dict[str, Any]:
    """A batch as SFTTrainer collates it, every token a label: packed into one row, or padded to one length."""
    collator = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=packed)
    return collator([{"input_ids": list(row), "labels": list(row)} for row in rows]) | {"use_cache": False}


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """`(length, k)`: the root mean square over k, of the token where it is largest."""
    return float((found.float() - expected.float()).square().mean(-1).sqrt().max())


@dataclass(frozen=True)
class Dependence:
    """How far outputs depend on what they should not depend on, in parts of what the text before them changes.

    Attributes:
        neighbours: On the rows beside it, by replacing one of them.
        company: On whether there are any, by computing the row alone; by rounding, too.
    """

    neighbours: float
    company: float


class Isolation:
    """A few short documents, and what a model computes for them.

    Args:
        outputs: From a batch, labels included, to `(rows, length, k)` or, without that of the last token,
            `(rows, length - 1, k)`, on one device.
        tokens: Token ids to make the documents of.
        pad: The id that rows are padded with.
        device: Where the batch is to be.
        unit: Of the arithmetic, see `plainlora.fast.loss_head.rounding_unit`.
    """

    def __init__(self, outputs: Outputs, tokens: Sequence[int], pad: int, device: torch.device, unit: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self._outputs, self._pad, self._device, self._coarse = outputs, pad, device, unit > 1e-6
        drawn = torch.randint(len(tokens), (2, sum(LENGTHS)), generator=generator)
        first, second = (self._cut([tokens[at] for at in row]) for row in drawn.tolist())
        self.documents, self.swapped = first, [first[0], second[1], first[2]]
        before, _, behind = self._text(self.documents)
        before_swapped, _, behind_swapped = self._text(self.swapped)
        self._effect, self._ahead = _difference(behind_swapped, behind), _difference(before_swapped, before)
        # Text hardly matters to fresh weights, and in bf16 less than rounding does.
        rounding = (2 if self._coarse else 64) * unit * float(behind.float().square().mean().sqrt())
        self._rounded = max(self._effect, rounding / COMPANY[self._coarse])

    @staticmethod
    def _cut(values: Any) -> list[Any]:
        ends = [sum(LENGTHS[: at + 1]) for at in range(len(LENGTHS))]
        return [values[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]

    def _run(self, rows: Sequence[Sequence[int]], packed: bool) -> torch.Tensor:
        batch = collate(rows, packed, self._pad)
        moved = {name: value.to(self._device) if hasattr(value, "to") else value for name, value in batch.items()}
        return self._outputs(moved)

    def _each(self, row: torch.Tensor) -> list[torch.Tensor]:
        """What belongs to each document, but for its last token, which predicts nothing of it."""
        return [row[sum(LENGTHS[:at]) :][: length - 1] for at, length in enumerate(LENGTHS)]

    def _text(self, documents: list[list[int]]) -> list[torch.Tensor]:
        """As one text, in which the later tokens are to see the earlier ones."""
        return self._each(self._run([list(chain(*documents))], packed=False)[0])

    def _relative(self, neighbours: float, company: float) -> Dependence:
        tiny = torch.finfo(torch.float32).tiny
        return Dependence(neighbours / max(self._effect, tiny), company / max(self._rounded, tiny))

    def is_none(self, found: Dependence) -> bool:
        """Whether a dependence is none."""
        return found.neighbours < NEIGHBOURS[self._coarse] and found.company < COMPANY[self._coarse]

    def later(self) -> Dependence:
        """On the tokens that come after, which are to be predicted."""
        return self._relative(self._ahead, 0.0)

    def packed(self) -> Dependence:
        """On documents that are packed into the same row."""
        found, swapped = (self._each(self._run(rows, packed=True)[0]) for rows in (self.documents, self.swapped))
        alone = [self._run([document], packed=False)[0][: len(document) - 1] for document in self.documents[1:]]
        return self._relative(
            max(_difference(swapped[at], found[at]) for at in (0, 2)), max(map(_difference, found[1:], alone))
        )

    def padded(self) -> Dependence:
        """On longer rows of the same batch, and on the padding that they bring."""
        longer, row, _ = self.documents
        found, swapped, alone = (
            self._run(rows, packed=False)[0][: len(row) - 1] for rows in ([row, longer], [row, longer[::-1]], [row])
        )
        return self._relative(_difference(swapped, found), _difference(found, alone))


def check_isolation(isolation: Isolation, name: str, packing: str | None, batches: Sequence[str]) -> None:
    """Refuses what a model would be trained wrong by.

    Args:
        isolation: Of the model.
        name: What to call it.
        packing: The setting by which rows are packed, if they are.
        batches: The settings by which several rows make a batch, if they do.

    Raises:
        UserError: Saying what depends on what, and what to set.
    """
    if not isolation.is_none(found := isolation.later()):
        raise UserError(
            f"{name} reads the tokens that it is to predict (they change {found.neighbours:.0%} of what those before "
            "them do): it is no causal language model; give another base"
        )
    if packing:
        question, setting, advice = isolation.packed, packing, f"set {packing} to false"
    elif batches:
        question, setting, advice = isolation.padded, " and ".join(batches), f"set {' and '.join(batches)} to 1"
    else:
        return
    try:
        found = question()
    except Exception as error:  # a missing argument, kernel or mask: whatever the model's code raises
        raise UserError(f"{setting}: {name} cannot keep rows apart ({first_line(error)}); {advice}") from error
    if not isolation.is_none(found):
        raise UserError(
            f"{setting}: in {name} a row depends on those beside it (by {max(found.neighbours, found.company):.0%} of "
            f"what text before it would change); {advice}"
        )


def text_tokens(model: PreTrainedModel, special: Collection[int] = ()) -> list[int]:
    """Ids of a model's vocabulary, without special ones and those that its config gives a meaning."""
    config = model.config.get_text_config()
    settings = vars(model.config) | vars(config)
    named = {value for name, value in settings.items() if name.endswith(("_id", "_index")) and isinstance(value, int)}
    return [token for token in range(int(config.vocab_size)) if token not in named and token not in special]
