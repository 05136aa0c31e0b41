"""What is compared: a base, an adapter config, inputs, and rows to train on."""

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
FORMS = ("fused", "reference")  # the hand-written back ends; the first is compared unless another is asked for


@dataclass
class Case:
    """One comparison.

    Attributes:
        name: As the table shows it.
        make_base: Makes the base anew, the same weights every time.
        config: The adapter.
        inputs: One batch for the model, labels included.
        adapter: A trained adapter's folder, loaded into both sides instead of a fresh start.
        arguments: How to train; `SFTConfig` for a language model. `None` where nothing is trained.
        rows: Rows for SFTTrainer: in any layout of `plainlora.data`, or as `input_ids` and `labels`. Without rows, the
            batch above is trained row by row with Transformers' Trainer.
        tokenizer: Turns the rows into tokens.
        adapter_dtype: Precision of the trained weights.
        prompts: What generation continues; token ids `(batch, length)`, without padding.
        lora_backend: Which of `FORMS` is compared with PEFT.
        seed: Of every random stream.
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
        """A copy for one side: PEFT writes into the config it is given."""
        return copy.deepcopy(self.config)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's global streams."""
    random.seed(seed)
    np.random.seed(seed)  # the global stream is what the libraries draw from
    torch.manual_seed(seed)
