"""The two implementations behind one set of verbs, so that one observation serves both."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from plainlora import backends
from plainlora.data.encoding import encode_rows, find_schema, split_row
from plainlora.data.prompts import without_bos
from plainlora.lora import inject, interchange, load, merge
from plainlora.parity.case import Case
from plainlora.training import AdapterTrainer, adapter_precision_kept, hand_over


class Side(ABC):
    """One implementation of LoRA."""

    name: str

    @abstractmethod
    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """Puts a fresh adapter into a base."""

    @abstractmethod
    def load(self, base: PreTrainedModel, directory: str | Path) -> nn.Module:
        """Puts a saved adapter into a base, to go on training."""

    @abstractmethod
    def save(self, model: nn.Module, directory: str | Path) -> None:
        """Writes the adapter's files."""

    @abstractmethod
    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The adapter's tensors under their names on disk; the model's own, to be written into."""

    @abstractmethod
    def merge(self, model: nn.Module) -> PreTrainedModel:
        """Folds the adapter into the base."""

    @abstractmethod
    def trainer(self, model: nn.Module, case: Case, output_dir: str) -> Trainer:
        """A trainer of the case's rows, prepared in this side's own way."""


def _sft_config(case: Case, output_dir: str) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": case.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "dataset_text_field": case.text_column,
    }
    return SFTConfig(**(settings | case.training))


def _classifier_trainer(model: nn.Module, case: Case, output_dir: str) -> Trainer:
    """Transformers' Trainer over the case's own batch, row by row: a classifier has no SFTTrainer."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=case.seed,
        use_cpu=not torch.accelerator.is_available(),
        max_steps=int(case.training["max_steps"]),
    )
    count = len(next(iter(case.inputs.values())))
    examples = [{name: value[row] for name, value in case.inputs.items()} for row in range(count)]
    return Trainer(model=model, args=arguments, train_dataset=examples)


class HandWritten(Side):
    """This package: its LoRA, and its own preparation of the rows."""

    name = "plainlora"

    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """See `plainlora.inject`."""
        return inject.inject(base, config)

    def load(self, base: PreTrainedModel, directory: str | Path) -> nn.Module:
        """See `plainlora.load_adapter`."""
        return load.load_adapter(base, directory, trainable=True)

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
            return _classifier_trainer(model, case, output_dir)
        settings = _sft_config(case, output_dir)
        encoded, _ = encode_rows(
            case.rows,
            case.tokenizer,
            where="rows",
            text_column=case.text_column,
            answers_only=bool(settings.completion_only_loss),
            max_length=settings.max_length,
            on_overflow="drop",
            max_overflow=0.0,
        )
        return AdapterTrainer(
            model,
            backends.BACKENDS["reference"],
            args=hand_over(settings),
            train_dataset=encoded,
            processing_class=case.tokenizer,
        )


class Peft(Side):
    """PEFT and TRL, as a user without this package would call them."""

    name = "PEFT"

    def attach(self, base: PreTrainedModel, config: LoraConfig) -> nn.Module:
        """See `peft.get_peft_model`."""
        return get_peft_model(base, config)

    def load(self, base: PreTrainedModel, directory: str | Path) -> nn.Module:
        """See `peft.PeftModel.from_pretrained`."""
        return PeftModel.from_pretrained(base, str(directory), is_trainable=True)

    def save(self, model: nn.Module, directory: str | Path) -> None:
        """See `PeftModel.save_pretrained`."""
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(directory), save_embedding_layers=False)

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """See `peft.get_peft_model_state_dict`."""
        return {name: value.detach() for name, value in get_peft_model_state_dict(model).items()}

    def merge(self, model: nn.Module) -> PreTrainedModel:
        """See `PeftModel.merge_and_unload`."""
        assert isinstance(model, PeftModel)
        return model.merge_and_unload()

    def trainer(self, model: nn.Module, case: Case, output_dir: str) -> Trainer:
        """Rows as they are, prepared and trained by SFTTrainer itself."""
        if case.rows is None or case.tokenizer is None:
            return _classifier_trainer(model, case, output_dir)
        assert isinstance(model, PeftModel)
        schema, tokenizer = find_schema(case.rows, case.text_column, "rows"), case.tokenizer
        if schema == "text":
            column = case.text_column
            rows = case.rows.map(lambda row: {column: without_bos(row[column], tokenizer)}).select_columns([column])
        else:
            pairs = [split_row(row, schema) for row in case.rows]
            rows = case.rows.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
        settings = _sft_config(case, output_dir)
        settings.completion_only_loss = bool(settings.completion_only_loss)
        with adapter_precision_kept(model):
            return SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
