"""What a run is told, as far as memory, disk and time depend on it."""

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
    """A run before it starts.

    Attributes:
        config: Of the base; a classifier's with its classes, from `classifier_config`.
        lora: The adapter; `None` where the model's own weights are trained.
        training: Batches, optimizer, precision, epochs, saves.
        model_args: Dtype, quantisation and attention of the base.
        longest: Tokens of the longest row; of a packed sequence, `max_length`.
        rows: Training rows as they were tokenised, before packing.
        tokens: Theirs, in one epoch.
        trained_tokens: How many of them have a label; all if left out.
        backend: What attaches the adapter.
        adapter_dtype: Precision of the adapter.
        base_dropout: Every dropout of the base; its own if left out.
        labels: Names of the classes; `None` for a causal language model.
        trained_modules: Full names of the modules that are trained without an adapter; all if left out.
        merge: Whether the merged model is written too.
        tokenizer: Its files lie in every checkpoint.
        evaluated: Rows of the largest split that is evaluated; the training rows if left out.
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

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.training.device

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that the checkpoint says it has."""
        return stored_dtype(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights that are not quantised."""
        asked = dtype_of(self.model_args.dtype)
        return self.stored_dtype if isinstance(asked, str) else asked

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """As the run asks for it, or as the checkpoint is stored."""
        asked = get_quantization_config(self.model_args)
        return stored_quantization(self.config) if asked is None else asked

    @property
    def steps(self) -> int:
        """Of the optimizer, as Trainer counts them."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        return math.ceil(self.training.num_train_epochs * self._steps_an_epoch)

    @property
    def all_tokens(self) -> int:
        """That are trained on, all epochs."""
        return math.ceil(self.tokens * self.steps / self._steps_an_epoch)

    def tokens_per_step(self, processes: int) -> int:
        """Tokens of one optimizer step of so many processes, on average."""
        training = self.training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        return round(self.tokens * min(1.0, rows / self._sequences))

    @property
    def _sequences(self) -> int:
        """Rows as they are trained on: packed or not."""
        return math.ceil(self.tokens / self.longest) if getattr(self.training, "packing", False) else self.rows

    @property
    def _steps_an_epoch(self) -> int:
        training = self.training
        batches = math.ceil(self._sequences / (training.per_device_train_batch_size * training.world_size))
        return max(1, math.ceil(batches / training.gradient_accumulation_steps))

    def build(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The base, and what is trained of it, on the `meta` device: names, shapes and types without values."""
        step = self.step()
        return replace(step, prepare=lambda base: None).build(), step.build()

    def step(self, evaluates: bool = False) -> Step:
        """The step over the largest batch, which holds no more rows than there are.

        Args:
            evaluates: Whether it is a step of an evaluation.
        """
        rows, there = self.training.per_device_train_batch_size, self._sequences
        if evaluates:
            rows, there = self.training.per_device_eval_batch_size, self.evaluated or self.rows
        return Step(
            config=self._trained_config(),
            prepare=self._prepare,
            batch=largest_batch(self.training, self.longest, min(rows, there)),
            device=self.device,
            dtype=self.dtype,
            autocast=precision(self.training),
            one_pass_head=self.backend is not None and self.backend.fast,
            classifies=self.labels is not None,
            trust_remote_code=bool(getattr(self.training, "trust_remote_code", False)),
        )

    def _trained_config(self) -> PretrainedConfig:
        """The config that training sees, with the attention that it takes."""
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
                config.pad_token_id = 0  # any: the head looks for where a text ends
        if self.model_args.attn_implementation is not None:
            config._attn_implementation = self.model_args.attn_implementation
        return config

    def _prepare(self, base: PreTrainedModel) -> None:
        """Makes a bare base what the run trains."""
        if self.lora is not None and self.backend is not None:
            attach_adapter(base, copy.deepcopy(self.lora), self.backend, self.adapter_dtype)
            return
        base.requires_grad_(self.trained_modules is None)
        for name in self.trained_modules or ():
            base.get_submodule(name).requires_grad_(True)
