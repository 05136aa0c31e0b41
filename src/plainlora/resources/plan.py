"""The settings and figures of a run on which its memory, disk space and time depend."""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, get_quantization_config

from plainlora.backends import Backend, attach_adapter
from plainlora.base.dropout import set_dropouts
from plainlora.resources.activations import Step, largest_batch, precision
from plainlora.resources.weights import stored_dtype, stored_quantization
from plainlora.settings.arguments import dtype_of


@dataclass(frozen=True)
class Plan:
    """A run that has not started.

    Attributes:
        config: The base's config; for a classifier from `classifier_config`, with its classes.
        lora: The adapter; `None` if the model's own weights are trained.
        training: Batches, optimizer, precision, epochs, saves.
        model_args: Dtype, quantisation and attention of the base.
        longest: Length of the longest row in tokens; with packing, `max_length`.
        rows: Number of training rows, before packing.
        tokens: Number of their tokens, in one epoch.
        trained_tokens: Number of tokens with a label; all if left out.
        backend: The back end that attaches the adapter.
        adapter_dtype: The dtype of the adapter.
        base_dropout: Every dropout of the base; its own if left out.
        labels: Names of the classes; `None` for a causal language model.
        trained_modules: Full names of the modules that are trained without an adapter; all if left out.
        merge: Whether the merged model is written too.
        tokenizer: The tokenizer, which every checkpoint contains.
        evaluated: Number of rows of the largest split that is evaluated; the training rows if left out.
        longest_evaluated: Length of the longest of these rows in tokens; `longest` if left out.
    """

    config: PretrainedConfig
    lora: LoraConfig | None
    training: TrainingArguments
    model_args: ModelConfig
    longest: int
    rows: int
    tokens: int
    trained_tokens: int | None = None
    backend: Backend | None = None
    adapter_dtype: str = "float32"
    base_dropout: float | None = None
    labels: Sequence[str] | None = None
    trained_modules: Collection[str] | None = None
    merge: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    evaluated: int | None = None
    longest_evaluated: int | None = None

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        return self.training.device

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, by its config."""
        return stored_dtype(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights that are not quantised."""
        asked = dtype_of(self.model_args.dtype)
        return self.stored_dtype if isinstance(asked, str) else asked

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """The quantisation that the run asks for, or else the checkpoint's own."""
        asked = get_quantization_config(self.model_args)
        return stored_quantization(self.config) if asked is None else asked

    @property
    def steps(self) -> int:
        """Number of optimizer steps, as Trainer counts them."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        return math.ceil(self.training.num_train_epochs * self.steps_an_epoch)

    @property
    def all_tokens(self) -> int:
        """Number of tokens that are trained on, over all epochs."""
        return math.ceil(self.tokens * self.steps / self.steps_an_epoch)

    def tokens_per_step(self, processes: int) -> int:
        """Number of tokens of one optimizer step on this many processes, on average."""
        training = self.training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        return round(self.tokens * min(1.0, rows / self._sequences))

    @property
    def _sequences(self) -> int:
        """Number of sequences of an epoch: packed sequences, or rows without packing."""
        return math.ceil(self.tokens / self.longest) if getattr(self.training, "packing", False) else self.rows

    @property
    def steps_an_epoch(self) -> int:
        """Number of optimizer steps of one epoch, at least 1."""
        training = self.training
        whole = math.floor if training.dataloader_drop_last else math.ceil
        batches = whole(self._sequences / (training.per_device_train_batch_size * training.world_size))
        return max(1, math.ceil(batches / training.gradient_accumulation_steps))

    def build(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The base, and the base as it is trained, on the `meta` device: names, shapes and dtypes without values."""
        step = self.step()
        return replace(step, prepare=lambda base: None).build(), step.build()

    def step(self, evaluates: bool = False) -> Step:
        """The step over the largest batch, which has no more rows than the run.

        Args:
            evaluates: Whether it is a step of an evaluation.
        """
        rows, present = self.training.per_device_train_batch_size, self._sequences
        longest = self.longest
        if evaluates:
            rows, longest = self.training.per_device_eval_batch_size, self.longest_evaluated or self.longest
            present = self.rows if self.evaluated is None else self.evaluated
        return Step(
            config=self._trained_config(),
            prepare=self._prepare,
            batch=largest_batch(self.training, longest, min(rows, present)),
            device=self.device,
            dtype=self.dtype,
            autocast=precision(self.training),
            one_pass_head=self.backend is not None and self.backend.fast,
            classifies=self.labels is not None,
            trust_remote_code=bool(getattr(self.training, "trust_remote_code", False)),
        )

    def _trained_config(self) -> PretrainedConfig:
        """The base's config as training uses it, with its attention implementation."""
        config = copy.deepcopy(self.config)
        for name, value in (getattr(self.training, "model_init_kwargs", None) or {}).items():
            if hasattr(config, name):
                setattr(config, name, value)
        if self.base_dropout is not None:
            set_dropouts(config, self.base_dropout)
        if self.labels is not None:
            config.id2label = dict(enumerate(self.labels))
            config.use_cache = False
            if config.pad_token_id is None:
                config.pad_token_id = 0  # any token will do: the head only looks for the end of a text
        if self.model_args.attn_implementation is not None:
            config._attn_implementation = self.model_args.attn_implementation
        return config

    def _prepare(self, base: PreTrainedModel) -> None:
        """Prepares a bare base for training, as `Step.prepare`."""
        if self.lora is not None and self.backend is not None:
            attach_adapter(base, copy.deepcopy(self.lora), self.backend, self.adapter_dtype)
            return
        base.requires_grad_(self.trained_modules is None)
        for name in self.trained_modules or ():
            base.get_submodule(name).requires_grad_(True)
