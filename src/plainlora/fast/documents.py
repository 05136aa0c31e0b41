"""Gives an SFTTrainer attention over documents, and batches without padding, if its model keeps documents apart.

The rows of a batch are then concatenated, as packed rows are: `(1, n_1 + n_2 + ...)` in place of `(rows, longest)`.
Memory and time depend on the number of tokens, not on the longest row. The loss is the same: it is a sum over tokens.
"""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from plainlora.fast.attention import DocumentAttention, is_covered
from plainlora.fast.isolation import Isolation, isolation_of
from plainlora.fast.loss_head import base_of, evaluating


class Documents:
    """Attention over documents, and a padding-free collator, of one trainer; `undo` restores its own.

    Attributes:
        attention: The attention over documents.
        collator: The collator that no longer pads; `None` if rows are packed, or stand alone in their batch.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer
        self.attention = DocumentAttention(base_of(cast(nn.Module, trainer.model)))
        self.collator: DataCollatorForLanguageModeling | None = None

    def stop_padding(self) -> None:
        """Makes the trainer's collator concatenate the rows of a batch."""
        collator = cast(DataCollatorForLanguageModeling, self._trainer.data_collator)
        self.collator, collator.padding_free, self._trainer.padding_free = collator, True, True
        own = self._trainer.predict

        def predict(*args: Any, **kwargs: Any) -> Any:
            """Trainer's, with padding: it returns the logits of each row."""
            self._pad(True)
            try:
                return own(*args, **kwargs)
            finally:
                self._pad(False)

        vars(self._trainer)["predict"] = predict

    def _pad(self, padded: bool) -> None:
        if self.collator is not None:
            self.collator.padding_free = self._trainer.padding_free = not padded

    def undo(self) -> None:
        """Restores the model's own attention, and padding."""
        self.attention.undo()
        if self.collator is not None:
            self._pad(True)
            del vars(self._trainer)["predict"]


def _pads(trainer: SFTTrainer) -> bool:
    """Whether the trainer pads rows and would train the same without padding.

    `compute_metrics` needs the logits of padded rows, and with `pad_to_multiple_of` the user asks for padding. GPT-2's
    padded rows count one label too many, see `plainlora.training.trainers.PredictedTokensCounted`.
    """
    counts_alike = getattr(trainer, "_loss_shifts_labels", True)
    args, collator = trainer.args, trainer.data_collator
    several = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1
    plain = type(collator) is DataCollatorForLanguageModeling and collator.pad_to_multiple_of is None
    return several and plain and counts_alike and not trainer.padding_free and trainer.compute_metrics is None


def _attends_within_windows(model: PreTrainedModel) -> bool:
    """Whether a layer attends to all earlier tokens of its document, or within the window that it passes on.

    Llama 4 attends in chunks, and PhiMoE does not pass its window on. Measured on short documents, both look causal.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama4/modeling_llama4.py
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/phimoe/modeling_phimoe.py
    """
    config = model.config.get_text_config()
    return getattr(config, "attention_chunk_size", None) is None and config.model_type != "phimoe"


def use_documents(trainer: SFTTrainer, isolation: Isolation) -> Documents | None:
    """Gives a trainer attention over documents, if its model keeps documents apart with and without it.

    Each document of a packed batch must get the outputs that it gets alone, whatever its neighbours are.

    Args:
        trainer: An SFTTrainer of a causal language model, with or without an adapter.
        isolation: The measurements of its model.

    Returns:
        What the trainer was given; `None` if it is unchanged.
    """
    pads, model = _pads(trainer), base_of(cast(nn.Module, trainer.model))
    covered = is_covered(model) and _attends_within_windows(model)
    if not (pads or trainer.padding_free) or not covered or not _is_apart(isolation):
        return None
    found = Documents(trainer)
    if not _is_apart(isolation):
        found.undo()
        return None
    if pads:
        found.stop_padding()
    return found


def _is_apart(isolation: Isolation) -> bool:
    try:
        return isolation.is_negligible(isolation.packed())
    except Exception:  # whatever a model's code raises for packed rows, or for a mask of this kind
        return False


def choose_documents(trainer: SFTTrainer) -> Documents | None:
    """`use_documents` on the measurements of a trainer's model; `None` for a sharded one, which cannot compute yet."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model = cast(nn.Module, trainer.model)
    with evaluating(model), trainer.compute_loss_context_manager():
        return use_documents(trainer, isolation_of(trainer, model))
