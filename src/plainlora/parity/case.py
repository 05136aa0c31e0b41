"""One comparison with PEFT: a base, an adapter config, inputs, and rows to train on."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

Inputs = dict[str, torch.Tensor]
FORMS = ("fused", "reference")  # the hand-written back ends; the first is the default


@dataclass
class Case:
    """One comparison.

    Attributes:
        name: The name in the table.
        make_base: Makes a new base, with the same weights every time.
        config: The adapter's config.
        inputs: One batch for the model, labels included.
        adapter: A trained adapter's folder, loaded into both sides instead of initialising a new adapter.
        arguments: Training arguments; `SFTConfig` for a language model. `None` if nothing is trained.
        rows: Rows for SFTTrainer: in any layout of `plainlora.data`, or as `input_ids` and `labels`. Without rows, the
            rows of `inputs` are trained with Transformers' Trainer.
        tokenizer: The tokenizer of the rows.
        adapter_dtype: The dtype of the trained weights.
        prompts: Prompts for generation: token ids `(batch, length)`, without padding.
        lora_backend: The one of `FORMS` that is compared with PEFT.
        seed: Seed of all random streams.
    """

    name: str
    make_base: Callable[[], PreTrainedModel]
    config: LoraConfig
    inputs: Inputs
    adapter: str | None = None
    arguments: TrainingArguments | None = None
    rows: Dataset | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    adapter_dtype: str = "float32"
    prompts: torch.Tensor | None = None
    lora_backend: str = FORMS[0]
    seed: int = 0

    def fresh_config(self) -> LoraConfig:
        """A copy of the config, because PEFT writes into it."""
        return copy.deepcopy(self.config)


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global random streams."""
    random.seed(seed)
    np.random.seed(seed)  # the libraries use the global stream
    torch.manual_seed(seed)
