"""Measures on the model whether a row's outputs depend on the other rows of its batch.

Rows are packed one after the other or padded to one length. Both are correct only if no row sees another, and if a row
gets the same outputs as alone. That depends on how the architecture's code handles positions, masks and states. So a
small batch is run through the model, and again with one row replaced by another of the same length. The other rows are
then computed by the same operations on the same numbers: if they are isolated, their outputs do not change at all.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from plainlora.fast.loss_head import base_of, rounding_unit

# Tokens of three documents, longer than the convolutions of state space models, which reach 4 tokens back.
LENGTHS = (13, 9, 10)

# Thresholds in fp32 and in half precision, relative to the effect that preceding text has on a document. A leak is
# about 1; in randomly initialised state space models, whose states hardly reach the output, it was 0.015. Replacing a
# row changes isolated rows by nothing, or by about 1e-7 if experts process the tokens of all rows as one batch.
# Computing a row alone changes the order of sums: below 1e-4 in fp32, 0.06 in bf16.
REPLACED = (0.001, 0.02)
ALONE = (0.01, 0.25)

Outputs = Callable[[dict[str, Any]], torch.Tensor]


def collate(rows: Sequence[Sequence[int]], packed: bool, pad: int) -> dict[str, Any]:
    """A batch as SFTTrainer collates it, every token a label: packed into one row, or padded to one length."""
    collator = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=packed)
    return collator([{"input_ids": list(row), "labels": list(row)} for row in rows]) | {"use_cache": False}


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a token, as the root mean square over k. Both are `(length, k)`."""
    return float((found.float() - expected.float()).square().mean(-1).sqrt().max())


@dataclass(frozen=True)
class Dependence:
    """How much a row's outputs depend on other rows, relative to the effect of preceding text (dimensionless).

    Attributes:
        replaced: The change when another row of the batch is replaced.
        alone: The change when the row is computed alone; includes rounding.
    """

    replaced: float
    alone: float


class Isolation:
    """Measures dependences on a few short documents.

    Args:
        outputs: Maps a batch with labels to `(rows, length, k)` or, without the last token, `(rows, length - 1, k)`.
        tokens: Token ids of which the documents are made.
        pad: The id of the pad token.
        device: The device of the batch.
        unit: From `plainlora.fast.loss_head.rounding_unit`.
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
        # In an untrained model text has little effect, in bf16 less than rounding has.
        rounding = (2 if self._coarse else 64) * unit * float(behind.float().square().mean().sqrt())
        self._rounded = max(self._effect, rounding / ALONE[self._coarse])

    @staticmethod
    def _cut(values: Any) -> list[Any]:
        ends = [sum(LENGTHS[: at + 1]) for at in range(len(LENGTHS))]
        return [values[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]

    def _run(self, rows: Sequence[Sequence[int]], packed: bool) -> torch.Tensor:
        batch = collate(rows, packed, self._pad)
        moved = {name: value.to(self._device) if hasattr(value, "to") else value for name, value in batch.items()}
        return self._outputs(moved)

    def _each(self, row: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of each document, without its last token, which predicts no token of the document."""
        return [row[sum(LENGTHS[:at]) :][: length - 1] for at, length in enumerate(LENGTHS)]

    def _text(self, documents: list[list[int]]) -> list[torch.Tensor]:
        """The outputs of the documents as one text, in which later tokens see earlier ones."""
        return self._each(self._run([list(chain(*documents))], packed=False)[0])

    def _relative(self, replaced: float, alone: float) -> Dependence:
        tiny = torch.finfo(torch.float32).tiny
        return Dependence(replaced / max(self._effect, tiny), alone / max(self._rounded, tiny))

    def is_negligible(self, found: Dependence) -> bool:
        """Whether a dependence is below the thresholds."""
        return found.replaced < REPLACED[self._coarse] and found.alone < ALONE[self._coarse]

    def later(self) -> Dependence:
        """The dependence on later tokens, which the model is to predict."""
        return self._relative(self._ahead, 0.0)

    def packed(self) -> Dependence:
        """The dependence on documents packed into the same row."""
        found, swapped = (self._each(self._run(rows, packed=True)[0]) for rows in (self.documents, self.swapped))
        alone = [self._run([document], packed=False)[0][: len(document) - 1] for document in self.documents[1:]]
        return self._relative(
            max(_difference(swapped[at], found[at]) for at in (0, 2)), max(map(_difference, found[1:], alone))
        )

    def padded(self) -> Dependence:
        """The dependence on longer rows of the same batch, and on the padding."""
        longer, row, _ = self.documents
        found, swapped, alone = (
            self._run(rows, packed=False)[0][: len(row) - 1] for rows in ([row, longer], [row, longer[::-1]], [row])
        )
        return self._relative(_difference(swapped, found), _difference(found, alone))


def text_tokens(model: PreTrainedModel, special: Collection[int] = ()) -> list[int]:
    """Ids of a model's vocabulary, without special ones and those named in its config."""
    config = model.config.get_text_config()
    settings = vars(model.config) | vars(config)
    named = {value for name, value in settings.items() if name.endswith(("_id", "_index")) and isinstance(value, int)}
    return [token for token in range(int(config.vocab_size)) if token not in named and token not in special]


def isolation_of(trainer: SFTTrainer, model: nn.Module) -> Isolation:
    """Measures on a trainer's model, as the trainer computes its loss. To be called within `evaluating`.

    Args:
        trainer: Of a causal language model.
        model: The model as the trainer calls it, possibly wrapped.
    """
    base, tokenizer = base_of(cast(nn.Module, trainer.model)), trainer._tokenizer
    options = {"output_router_logits": True} if trainer.aux_loss_enabled else {}

    def log_probs(batch: dict[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, model(**batch, fused_lm_head=True, **options).log_probs[..., None])

    tokens = text_tokens(base, {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    return Isolation(log_probs, tokens, cast(int, tokenizer.pad_token_id), trainer.args.device, rounding_unit(model))
