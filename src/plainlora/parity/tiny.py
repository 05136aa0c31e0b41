"""Tiny random models, a tokenizer and random tokens, so that nothing is downloaded."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from plainlora.base.loading import keep_4bit_weights_unpacked
from plainlora.data.prompts import install_template
from plainlora.parity.case import seed_everything

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(BYTES) + 2
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each byte, EOS 0 and pad 1."""
    vocabulary = {"<|endoftext|>": 0, "<|pad|>": 1} | {byte: number for number, byte in enumerate(BYTES, 2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    install_template(fast, "alpaca")
    return fast


def llama_config(**options: Any) -> LlamaConfig:
    """Two layers of hidden size 64, so that bitsandbytes' block size divides every weight."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(**(sizes | SPECIAL | {"num_key_value_heads": 1, "vocab_size": VOCABULARY} | options))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": llama_config,
    # Without the model's own dropout, which would hide the adapter's.
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_head=2, n_layer=2, n_positions=512, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL,
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, tie_word_embeddings=True, **SPECIAL,
    ),
    "distilbert": lambda: DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=2, n_heads=2, vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, pad_token_id=1,
    ),
}  # fmt: skip


def random_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of its config's class with the same random weights every time."""
    seed_everything(0)
    return model_class(config).from_config(config, dtype=dtype).eval()


def model_class(config: PretrainedConfig) -> Any:
    """The Auto class for a config: a decoder's language model, else a classifier."""
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    is_encoder = type(config) in mapping and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM


def quantized_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """`random_model` in bitsandbytes' 4 or 8 bits, computing in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
        )
    keep_4bit_weights_unpacked(model)
    model.name_or_path = ""  # a temporary folder
    return model.eval()


def random_batch(vocabulary: int, classes: int | None = None, rows: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens `(rows, 24)`, with themselves or class numbers as labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (rows, 24), generator=generator)
    labels = ids.clone() if classes is None else torch.arange(rows) % classes
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def quiet_models() -> Iterator[None]:
    """Silences progress bars and warnings of the libraries within the block, and the warning of `fuse`.

    The report lists layers that are not fused.
    """
    fusing = logging.getLogger("plainlora.fast.fuse")
    verbosity, level = transformers.utils.logging.get_verbosity(), fusing.level
    fusing.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        fusing.setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()
