"""Base model and tokenizer, from the Hub or from this disk, whole or quantised."""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config

from plainlora.arguments import dtype_of
from plainlora.errors import UserError


def _explain(name: str, what: str, error: Exception) -> UserError:
    """One line for the many ways in which `from_pretrained` can fail."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return UserError(f"the {what} in {path} cannot be loaded ({_first_line(error)})")
    if path.is_dir():
        files = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        return UserError(f"{path} holds no usable {what} ({_first_line(error)}); it holds {files}")
    if path.exists() or name.startswith(("/", ".", "~")):
        return UserError(
            f"there is no folder {name}; give a Hub id or a folder with config.json and model.safetensors"
        )
    return UserError(
        f"the {what} {name!r} cannot be had from the Hub ({_first_line(error)}); give the path of a "
        "local folder instead, or run `make quickstart`, which needs no Hub"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _refuse_adapter(name: str) -> None:
    """Transformers would load the adapter silently, and LoRA would be trained on top of LoRA."""
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        raise UserError(f"{name} is or holds an adapter, not a base model alone: merge it first (plainlora merge)")


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base model's config.

    Raises:
        UserError: It cannot be had, or it is an adapter.
    """
    _refuse_adapter(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise _explain(name, "model", error) from error


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence the model has positions for, in tokens; `None` if its config does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(length) if length else None


def check_length(max_length: int | None, config: PretrainedConfig) -> None:
    """Raises `UserError` if rows may be longer than the model's context."""
    longest = context_length(config)
    if max_length is not None and longest is not None and max_length > longest:
        raise UserError(f"max_length {max_length} is longer than the model's context of {longest} tokens; lower it")


def load_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token that differs from EOS wherever the vocabulary has one to spare.

    Raises:
        UserError: It cannot be had, or a named token is not in its vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise _explain(name, "tokenizer", error) from error
    for role, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"{role} {token!r} is not in the vocabulary of {name}")
            setattr(tokenizer, role, token)
    if tokenizer.pad_token is None or (pad_token is None and tokenizer.pad_token == tokenizer.eos_token):
        # Labels come from lengths, so even EOS would do here; a distinct pad is kinder to whoever loads this later.
        unknown = tokenizer.unk_token
        tokenizer.pad_token = unknown if unknown not in (None, tokenizer.eos_token) else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def keep_4bit_weights_unpacked(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    Its `Linear4bit.forward` then rounds the block scales to bf16 for good, so evaluating would change the model being
    trained: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def load_causal_lm(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    quantization: BitsAndBytesConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model; weights from safetensors only.

    Args:
        name: Hub id or local folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights that are not quantised; `"auto"` for the checkpoint's own.
        quantization: How to quantise while loading.
        **options: For `from_pretrained`.

    Raises:
        UserError: It cannot be had, or it is an adapter.
    """
    _refuse_adapter(name)
    attention = options.get("attn_implementation")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:
        if attention is not None and re.search("attn|attention", str(error), re.IGNORECASE):
            raise UserError(
                f"attn_implementation {attention!r} cannot be used here ({_first_line(error)}); leave it out, or "
                "give eager or sdpa"
            ) from error
        raise _explain(name, "model", error) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # from the Hub, where no folder could be looked into
        raise UserError(f"{name} holds an adapter beside the base model; give the base model alone")
    keep_4bit_weights_unpacked(model)
    return model


def load_base(
    args: ModelConfig, trust_remote_code: bool = False, options: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The base model as TRL's `ModelConfig` describes it, with `model_init_kwargs` on top."""
    return load_causal_lm(
        str(args.model_name_or_path),
        revision=args.model_revision,
        dtype=dtype_of(args.dtype),
        quantization=get_quantization_config(args),
        attn_implementation=args.attn_implementation,
        trust_remote_code=trust_remote_code,
        **(options or {}),
    )


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Moves the model to the GPU, if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        cast(nn.Module, model).to(device)
    return model


def describe_quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """The base's quantisation, for `run.json` and back into `BitsAndBytesConfig`; `None` if it has none."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    return config if isinstance(config, dict) else dict(config.to_dict())
