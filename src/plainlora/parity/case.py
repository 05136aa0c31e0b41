"""What is compared: a base, an adapter config, inputs, and rows to train on."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Inputs = dict[str, torch.Tensor]


@dataclass
class Case:
    """One comparison.

    Attributes:
        name: As the table shows it.
        make_base: Makes the base anew, the same weights every time.
        config: The adapter.
        inputs: One batch for the model, labels included.
        adapter: A trained adapter's folder, loaded into both sides instead of a fresh start.
        rows: Rows to train on, in any layout of `plainlora.data`; `None` where nothing is trained.
        tokenizer: Turns the rows into tokens.
        training: Settings of `SFTConfig` (or `TrainingArguments`, for a classifier) away from the defaults here.
        text_column: The column of plain-text rows.
        prompts: What generation continues; token ids `(batch, length)`, without padding.
        seed: Of every random stream.
        exact: Whether the two sides perform the same operations in the same order, so that no bit may differ.
        not_run: Why the whole case cannot run here; empty if it can.
    """

    name: str
    make_base: Callable[[], PreTrainedModel]
    config: LoraConfig
    inputs: Inputs
    adapter: str | None = None
    rows: Dataset | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    training: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    prompts: torch.Tensor | None = None
    seed: int = 0
    exact: bool = True
    not_run: str = ""

    def fresh_config(self) -> LoraConfig:
        """A copy for one side: PEFT writes into the config it is given."""
        return copy.deepcopy(self.config)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's global streams."""
    random.seed(seed)
    np.random.seed(seed)  # the global stream is what the libraries draw from
    torch.manual_seed(seed)
