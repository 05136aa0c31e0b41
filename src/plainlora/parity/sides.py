"""The two implementations, PlainLoRA and PEFT, behind one interface."""

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from plainlora import backends
from plainlora.data.encoding import encode_rows
from plainlora.fast.documents import choose_documents
from plainlora.fast.fuse import fuse
from plainlora.fast.loss_head import use_own_loss
from plainlora.lora import interchange, load, merge
from plainlora.lora.record import lora_layers
from plainlora.parity.case import Case
from plainlora.training.trainers import (
    AdapterTrainer,
    PredictedTokensCounted,
    RowsInOrder,
    adapter_precision_kept,
    args_for_sft,
)


class Side(ABC):
    """One implementation of LoRA."""

    name: str

    @abstractmethod
    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """Puts a new adapter into a base."""

    @abstractmethod
    def load(self, base: PreTrainedModel, directory: str | Path, trainable: bool = True) -> nn.Module:
        """Puts a saved adapter into a base, to resume training or for inference."""

    @abstractmethod
    def save(self, model: nn.Module, directory: str | Path) -> None:
        """Writes the adapter's files."""

    @abstractmethod
    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The adapter's tensors under their names in the file. They are the model's own, and may be written into."""

    @abstractmethod
    def merge(self, model: nn.Module) -> PreTrainedModel:
        """Merges the adapter into the base."""

    @abstractmethod
    def trainer(self, model: nn.Module, case: Case, output_dir: str) -> Trainer:
        """A trainer of the case's rows, which this side prepares itself."""

    def notes(self, model: nn.Module) -> dict[str, str]:
        """Notes about this side for the report."""
        return {}


def _arguments(case: Case, output_dir: str) -> TrainingArguments:
    arguments = copy.copy(case.arguments)
    assert arguments is not None
    arguments.output_dir = output_dir
    return arguments


def _row_by_row_trainer(model: nn.Module, case: Case, output_dir: str) -> Trainer:
    """Transformers' Trainer on the rows of the case's batch, for a classifier."""
    count = len(next(iter(case.inputs.values())))
    examples = [{name: value[row] for name, value in case.inputs.items()} for row in range(count)]
    return Trainer(model=model, args=_arguments(case, output_dir), train_dataset=examples)


def _is_tokenised(rows: Dataset) -> bool:
    return "input_ids" in rows.column_names


class HandWritten(Side):
    """This package: its LoRA and its preparation of rows.

    Args:
        lora_backend: `fused` or `reference`.
    """

    name = "plainlora"

    def __init__(self, lora_backend: str) -> None:
        self.is_fused = lora_backend == "fused"
        self.backend = backends.BACKENDS[lora_backend]

    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """See `plainlora.backends.Backend`."""
        return self.backend.attach(base, config)

    def load(self, base: PreTrainedModel, directory: str | Path, trainable: bool = True) -> nn.Module:
        """See `plainlora.backends.Backend`; for training, `plainlora.load_adapter` and `plainlora.fuse`."""
        if not trainable:
            return self.backend.load(base, directory)
        model = load.load_adapter(base, directory, trainable=True)
        if self.is_fused:
            fuse(model)
        return model

    def save(self, model: nn.Module, directory: str | Path) -> None:
        """See `plainlora.save_adapter`."""
        interchange.save_adapter(model, directory)

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """See `plainlora.lora.interchange.adapter_state_dict`."""
        return interchange.adapter_state_dict(model)

    def merge(self, model: nn.Module) -> PreTrainedModel:
        """See `plainlora.merge`."""
        return merge.merge(model)  # type: ignore[return-value]

    def trainer(self, model: nn.Module, case: Case, output_dir: str) -> Trainer:
        """Rows encoded by `plainlora.data.encoding`, trained by `AdapterTrainer`."""
        if case.rows is None or case.tokenizer is None:
            return _row_by_row_trainer(model, case, output_dir)
        settings = cast(SFTConfig, _arguments(case, output_dir))
        rows = case.rows
        if not _is_tokenised(rows):
            rows, report = encode_rows(
                rows,
                case.tokenizer,
                where="rows",
                text_column=settings.dataset_text_field,
                answers_only=bool(settings.completion_only_loss),
                max_length=settings.max_length,
                on_overflow="drop",
                max_truncated=0.0,
            )
            report.check()
        return AdapterTrainer(
            model,
            self.backend,
            args=args_for_sft(settings),
            train_dataset=rows,
            processing_class=case.tokenizer,
        )

    def notes(self, model: nn.Module) -> dict[str, str]:
        """The number of fused layers: a layer that is not fused proves nothing about the fused form."""
        if not self.is_fused:
            return {}
        fused = ["forward" in vars(layer) for _, layer in lora_layers(model)]  # set by `fuse`
        return {"fused layers": f"{sum(fused)} of {len(fused)}"}


class Peft(Side):
    """PEFT and TRL, by their public functions."""

    name = "PEFT"

    def __init__(self) -> None:
        self.heads: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()

    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """See `peft.get_peft_model`."""
        return get_peft_model(base, config)

    def load(self, base: PreTrainedModel, directory: str | Path, trainable: bool = True) -> nn.Module:
        """See `peft.PeftModel.from_pretrained`."""
        heads = {base.get_parameter(name) for name in interchange.saved_head_weights(base, directory)}
        model = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
        names = [name for name, parameter in model.named_parameters() if parameter in heads]
        self.heads[model] = [name for name in names if ".original_module." not in name]
        return model

    def save(self, model: nn.Module, directory: str | Path) -> None:
        """See `PeftModel.save_pretrained`."""
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(directory), save_embedding_layers=False)
        if heads := self._heads_of(model):
            interchange.add_tensors(directory, heads)

    def _heads_of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """A frozen head that was saved with the adapter. PEFT loads it, but does not save it again (peft#876)."""
        return {name: model.get_parameter(name).detach() for name in self.heads.get(model, ())}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """See `peft.get_peft_model_state_dict`."""
        own = {name: value.detach() for name, value in get_peft_model_state_dict(model).items()}
        return own | self._heads_of(model)

    def merge(self, model: nn.Module) -> PreTrainedModel:
        """See `PeftModel.merge_and_unload`."""
        assert isinstance(model, PeftModel)
        return model.merge_and_unload()

    def trainer(self, model: nn.Module, case: Case, output_dir: str) -> Trainer:
        """Rows tokenised, masked, packed and trained by SFTTrainer itself, with its own loss head.

        If that head does not give the model's own loss, the model's own forward computes it, as on the other side.
        TRL's cast of a quantised model's adapter to bf16 is undone, as on the other side: fp32 adapters are compared.
        """
        if case.rows is None or case.tokenizer is None:
            return _row_by_row_trainer(model, case, output_dir)
        settings = cast(SFTConfig, _arguments(case, output_dir))
        settings.completion_only_loss = bool(settings.completion_only_loss)
        settings.chat_template_path = settings.pad_token = settings.model_init_kwargs = None
        rows = case.rows if _is_tokenised(case.rows) else _as_trl_expects(case.rows, case.tokenizer, settings)
        with adapter_precision_kept(model):
            trainer = _SFTTrainer(
                cast(PeftModel, model), args=settings, train_dataset=rows, processing_class=case.tokenizer
            )
        use_own_loss(trainer, one_pass=False)
        # The same batches, so that dropout draws the same numbers; with the base's own attention and mask.
        if backends.BACKENDS[case.lora_backend].fast and (documents := choose_documents(trainer)):
            documents.attention.undo()
        return trainer


class _SFTTrainer(RowsInOrder, PredictedTokensCounted, SFTTrainer):
    """SFTTrainer with the other side's order of rows by length and count of tokens, which are not part of LoRA."""


def _as_trl_expects(rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: SFTConfig) -> Dataset:
    """The rows in TRL's own layouts, converted here without code of the other side."""
    columns = rows.column_names
    if "messages" in columns or "prompt" in columns:
        return rows
    if "instruction" not in columns:  # a BOS written in the text would be doubled
        bos, column = tokenizer.bos_token, settings.dataset_text_field
        adds_one = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        return Dataset.from_dict({column: [text.removeprefix(bos) if adds_one else text for text in rows[column]]})
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": _instruction(row)}],
                "completion": [{"role": "assistant", "content": row["output"].strip()}],
            }
            for row in rows
        ]
    )


def _instruction(row: dict[str, str]) -> str:
    """Alpaca's instruction and optional input as the one message that the Alpaca template expects."""
    instruction, context = row["instruction"].strip(), (row.get("input") or "").strip()
    return f"{instruction}\n\n### Input:\n{context}" if context else instruction
