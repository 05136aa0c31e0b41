"""Loads base models from the Hub or a local folder, dense or quantised, from safetensors only."""

import copy
import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from trl import ModelConfig, get_quantization_config

from plainlora.base.config import check_storage, load_config
from plainlora.base.dropout import find_dropouts, save_with_own_dropouts, set_dropouts
from plainlora.base.failures import explain
from plainlora.base.remote_code import code_options
from plainlora.errors import UserError
from plainlora.settings.arguments import dtype_of
from plainlora.settings.checks import unusable_attention
from plainlora.settings.launcher import sharding_engine


def keep_4bit_weights_unpacked(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacking in `Linear4bit.forward` rounds the block scales to bf16, so evaluation would change the model that is
    being trained: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def release_freed_memory() -> None:
    """Makes glibc return freed heap memory to the kernel; on other systems does nothing.

    A layer that is quantised on a CPU is dense first, and small blocks allocated between two such layers can keep the
    second from reusing the memory of the first. With Qwen2-0.5B in fp32, 0.2 to 1.5 GB of dense layers then stayed
    resident until the program ended, differently in each run: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def placement(device: torch.device | None, quantized: bool) -> dict[str, Any]:
    """The `device_map` argument of `from_pretrained`, if one is needed.

    Without it, bitsandbytes' quantiser uses the current GPU even if training runs elsewhere, and a dense base is first
    read into this process's memory. DeepSpeed ZeRO-3 and FSDP place weights themselves.

    Args:
        device: Where training runs; `None` to leave it to the libraries.
        quantized: Whether the base is quantised while it is loaded.
    """
    if device is None or sharding_engine() is not None:
        return {}
    return {"device_map": {"": str(device)}} if quantized or device.type != "cpu" else {}


def load_pretrained(
    auto: type[_BaseAutoModelClass],
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    quantization: BitsAndBytesConfig | None = None,
    dropout: float | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Loads a model from safetensors only; also returns the names of the weights that the checkpoint lacks.

    Args:
        auto: The Auto class of the model's task.
        name: Hub id or local folder.
        revision: Branch, tag or commit on the Hub.
        dtype: The dtype of weights that are not quantised; `"auto"` for the checkpoint's own.
        quantization: How to quantise while loading.
        dropout: The probability of all its dropouts; `None` for its own, with which it is saved in any case.
        device: Where training runs; `None` to leave placement to the libraries.
        **options: For `from_pretrained`.

    Raises:
        UserError: It cannot be loaded, or it is an adapter.
    """
    # If it is unset, Transformers asks on the terminal whether to run a model's own code, and waits.
    options.setdefault("trust_remote_code", False)
    options = placement(device, quantization is not None) | options
    config = load_config(name, revision, options["trust_remote_code"])
    check_storage(name, config, quantization is not None)
    attention = options.get("attn_implementation")
    own: list[float] | None = None
    try:
        if dropout is not None:
            config, options = _split_config(name, revision, options)
            own = [getattr(*place) for place in find_dropouts(config)]
            set_dropouts(config, dropout)
            options["config"] = config
        with _quiet_about_new_weights():
            model, report = auto.from_pretrained(
                name,
                revision=revision,
                dtype=dtype,
                quantization_config=quantization,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # raised below with their names, which Transformers' error lacks
                **options,
            )
    except Exception as error:  # of any class, as in `load_config`
        if isinstance(error, TypeError) and (unknown := re.search("unexpected keyword argument (.*)", str(error))):
            raise UserError(f"model_init_kwargs: there is no {unknown[1]} for {name}; leave it out") from error
        if attention is not None and re.search("attn|attention", str(error), re.IGNORECASE):
            raise unusable_attention(attention, error) from error
        raise explain(name, "model", error) from error
    for weight, stored, needed in sorted(report["mismatched_keys"])[:1]:
        raise UserError(
            f"{name}: {weight} is stored as {tuple(stored)}, and config.json makes it {tuple(needed)}; the config or "
            "the weights belong to another model"
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # on the Hub, where `check_folder` cannot look
        raise UserError(f"{name} holds an adapter beside the base model; give the base model alone")
    keep_4bit_weights_unpacked(model)
    if quantization is not None:
        release_freed_memory()
    if own is not None:
        save = MethodType(partial(save_with_own_dropouts, own_dropouts=own), model)
        model.save_pretrained = save
    return model, sorted(report["missing_keys"])


def _split_config(name: str, revision: str | None, options: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A copy of a model's config with the options that are its fields, and the rest, split as by `from_pretrained`."""
    rest = {key: options[key] for key in ("attn_implementation", "trust_remote_code") if key in options}
    given = {key: value for key, value in options.items() if key not in rest and key != "config"}
    if options.get("config") is not None:
        return copy.deepcopy(options["config"]), rest | given
    trust = rest.get("trust_remote_code", False)
    config, given = AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=trust, return_unused_kwargs=True, **given
    )
    return config, rest | given


@contextmanager
def _silenced(logger: logging.Logger, text: str) -> Iterator[None]:
    """Within the block, a logger says nothing with this text in it."""

    def is_other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _quiet_about_new_weights() -> AbstractContextManager[None]:
    """Silences Transformers' report on weights that the checkpoint lacks, such as a classifier's new head.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/loading_report.py
    """
    return _silenced(logging.getLogger("transformers.modeling_utils"), "LOAD REPORT")


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with dense weights of its own dtype for those of bitsandbytes; Transformers would warn of that dtype.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/bitsandbytes.py
    (`dequantize_and_replace`)
    """
    with _silenced(logging.getLogger("transformers.integrations.bitsandbytes"), "The modules are dequantized in"):
        return model.dequantize().to(model.dtype)


def load_causal_lm(name: str, **options: Any) -> PreTrainedModel:
    """A causal language model. Arguments and errors are those of `load_pretrained`."""
    model, missing = load_pretrained(AutoModelForCausalLM, name, **options)
    if missing:
        raise UserError(f"{name} is not a causal language model: it lacks {missing[0]}")
    ends = getattr(model.generation_config, "eos_token_id", None)
    numbers = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(number) is int and -1 <= number < 2**31 for number in numbers):
        raise UserError(
            f"{name}: eos_token_id of its generation_config.json is not a token's number, but {ends!r:.60}"
        )
    return model


def build_decoder(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """The language model that a config describes, on the meta device; `None` if it cannot be built there."""
    try:
        with torch.device("meta"):
            options = code_options(config, AutoModelForCausalLM, trust_remote_code)
            return AutoModelForCausalLM.from_config(config, **options)
    except Exception:  # a model's own code, or an unknown architecture; loading reports it
        return None


def load_base(
    args: ModelConfig,
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
    dropout: float | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The base model by TRL's `ModelConfig`, with `model_init_kwargs` (`options`) and `base_dropout`.

    See `load_pretrained` for the device.
    """
    settings = loading_options(args, trust_remote_code) | {"dropout": dropout, "device": device}
    return load_causal_lm(str(args.model_name_or_path), **settings, **(options or {}))


def loading_options(args: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """TRL's `ModelConfig` as arguments of `load_pretrained`."""
    return {
        "revision": args.model_revision,
        "dtype": dtype_of(args.dtype),
        "quantization": get_quantization_config(args),
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": trust_remote_code,
    }


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Moves the model to the GPU, if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        cast(nn.Module, model).to(device)
    return model


def describe_quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """The base's quantisation for `run.json`, from which `BitsAndBytesConfig` is read; `None` if it has none."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    return config if isinstance(config, dict) else dict(config.to_dict())
