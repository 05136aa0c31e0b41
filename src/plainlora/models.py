"""Base model and tokenizer, from the Hub or from this disk, whole or quantised."""

import copy
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from trl import ModelConfig, get_quantization_config

from plainlora.errors import UserError, first_line
from plainlora.lora.containment import find_escape
from plainlora.settings.arguments import dtype_of
from plainlora.weight_files import find_fault

MOST_LAYERS = 1_000  # a few hundred are the deepest that there are
NO_EXPLANATION = (TypeError, ArithmeticError, AttributeError, LookupError)  # of a config: what code trips over
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}', use_safetensors=False)"
    ".save_pretrained('{0}')\""
)


def _explain(name: str, what: Literal["model", "tokenizer"], error: Exception) -> UserError:
    """One line for the many ways in which `from_pretrained` can fail."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) and (fault := find_fault(path, what)):
        return UserError(fault)
    if what == "model" and (pickle := _only_pickle(path)):
        return UserError(
            f"{path} holds {pickle} and no model.safetensors; a pickle can run code when it is loaded, so weights are "
            f"read from safetensors only: if you trust it, convert it once with {CONVERT.format(path)}"
        )
    if os.path.isfile(path / "config.json"):
        advice = "; read it, then --trust_remote_code true runs it" if "custom code" in str(error) else ""
        damaged = what == "model" and isinstance(error, NO_EXPLANATION)
        subject = f"{path}/config.json is damaged: the model" if damaged else f"the {what} in {path}"
        return UserError(f"{subject} cannot be loaded ({first_line(error)}){advice}")
    if os.path.isdir(path):
        files = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        return UserError(f"{path} holds no usable {what} ({first_line(error)}); it holds {files}")
    if os.path.exists(path) or name.startswith(("/", ".", "~")):
        return UserError(
            f"there is no folder {name}; give a Hub id or a folder with config.json and model.safetensors"
        )
    return UserError(
        f"the {what} {name!r} cannot be had from the Hub ({first_line(error)}); give the path of a "
        "local folder instead, or run `make quickstart`, which needs no Hub"
    )


def _only_pickle(folder: Path) -> str | None:
    """The name of a file of pickled weights in a folder without any in safetensors."""
    if not os.path.isdir(folder):
        return None
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return None
    return next((name for name in names if name.endswith(PICKLES) and name != "training_args.bin"), None)


def _check_folder(name: str) -> None:
    """Nothing may lead out of a local base's folder, and it may hold no adapter.

    Transformers would load the adapter silently, and LoRA would be trained on top of LoRA.
    """
    if os.path.isfile(os.path.join(os.path.expanduser(name), "adapter_config.json")):
        raise UserError(f"{name} is or holds an adapter, not a base model alone: merge it first (plainlora merge)")
    _check_contained(name)


def _check_contained(name: str) -> None:
    if escape := find_escape(name):
        raise UserError(f"{name} is not loaded: {escape}; put the files themselves into the folder")


def describe_remote_code(name: str, revision: str | None) -> str:
    """Which code of a model `trust_remote_code` runs, in one line to be shown before it does.

    Raises:
        UserError: The model cannot be had, or takes code from another repository, which no revision pins
            (`code_revision` of Transformers stays `main`).
    """
    try:
        found = [PretrainedConfig.get_config_dict(name, revision=revision)[0].get("auto_map")]
        found.append(get_tokenizer_config(name, revision=revision).get("auto_map"))
    except Exception as error:
        raise _explain(name, "model", error) from error
    modules = set()
    for auto_map in found:
        references = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        for reference in (one for each in references for one in (each if isinstance(each, list) else [each])):
            if isinstance(reference, str) and "--" in reference:
                raise UserError(
                    f"{name} runs code from another repository ({reference}), which model_revision does not pin; "
                    "copy that code into a local folder with the model, and give the folder"
                )
            modules |= {f"{str(reference).rpartition('.')[0]}.py"} if reference else set()
    where = name if os.path.isdir(os.path.expanduser(name)) else f"{name} at {revision}"
    if not modules:
        return f"trust_remote_code: {where} has no code of its own"
    return f"WARNING trust_remote_code: code of {where} runs here with your rights: {', '.join(sorted(modules))}"


def code_options(config: PretrainedConfig, auto: type[_BaseAutoModelClass], trust: bool) -> dict[str, Any]:
    """Options of `from_config` for a model's own code, pinned to the commit of the config: it would take `main`.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/auto_factory.py
    """
    commit = getattr(config, "_commit_hash", None)
    own = trust and commit is not None and auto.__name__ in (getattr(config, "auto_map", None) or {})
    return {"trust_remote_code": trust} | ({"code_revision": commit} if own else {})


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base model's config.

    Raises:
        UserError: It cannot be had, or it is an adapter.
    """
    _check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        method, kernel = _quantization_method(config), _find_kernel(config)
    except Exception as error:  # of any kind: a file from elsewhere is read by code that trusts it
        raise _explain(name, "model", error) from error
    if not isinstance(config.architectures, list | None):
        raise UserError(f"{name}/config.json: architectures is no list of names, but {config.architectures!r:.60}")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # building them would take for ever
        raise UserError(f"{name}/config.json names {layers:,} layers, more than any model has; it is damaged")
    if method not in (None, "bitsandbytes"):
        raise UserError(
            f"{name}/config.json says that the weights are stored by {method!r:.60}, which is not read here; give the "
            "base in 16 or 32 bits"
        )
    if kernel and not trust_remote_code:
        raise UserError(
            f"{name}/config.json names the attention {kernel!r:.60}, which is code from the Hub; take "
            "attn_implementation out of it, or read that code, then --trust_remote_code true runs it"
        )
    return config


def _quantization_method(config: PretrainedConfig) -> str | None:
    """How a checkpoint says that its weights are stored; `None` if as plain numbers."""
    stored = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not stored:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    old = fields.get("load_in_4bit") or fields.get("load_in_8bit")  # without a name
    return "bitsandbytes" if old else str(fields.get("quant_method"))


def _find_kernel(config: PretrainedConfig) -> str | None:
    """The first attention in a config, or in one inside it, that is a repository's name."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    own = str(config._attn_implementation)
    return own if "/" in own else next(filter(None, map(_find_kernel, inner)), None)


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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises `UserError` if the tokenizer has words for which the model has no embedding.

    Special tokens without a role are left out: some tokenizers name more of them than are ever used.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    unused = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - set(roles)
    words = ((word, number) for word, number in tokenizer.get_vocab().items() if word not in unused)
    word, number = max(words, key=lambda pair: pair[1])
    if isinstance(rows, int) and number >= rows:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer numbers {word!r:.40} {number}, but the model has embeddings for "
            f"{rows} tokens; use the tokenizer that belongs to the model"
        )


def find_dropouts(config: PretrainedConfig) -> list[tuple[PretrainedConfig, str]]:
    """Where a config, or one inside it, sets a dropout probability: `(config, field)`.

    Found by name: `attn_pdrop`, `hidden_dropout_prob`, `seq_classif_dropout`. A `classifier_dropout` that is `None`
    falls back to another of them. LayerDrop and stochastic depth leave out whole layers, which is something else.
    """
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    own = [
        (config, name)
        for name, value in vars(config).items()
        if ("dropout" in name or "pdrop" in name) and not isinstance(value, bool) and isinstance(value, int | float)
    ]
    return own + [found for each in inner for found in find_dropouts(each)]


def check_dropout(p: float | None, config: PretrainedConfig) -> None:
    """Raises `UserError` if a base has no dropout that could be set, unless 0 or nothing is asked for."""
    if p and not find_dropouts(config):
        raise UserError(f"base_dropout {p}: {config.model_type} models have no dropout to set; leave it out")


def set_dropouts(config: PretrainedConfig, p: float) -> None:
    """Gives every dropout of a config the probability `p`."""
    for place in find_dropouts(config):
        setattr(*place, p)


@contextmanager
def _dropouts(config: PretrainedConfig, values: Sequence[float]) -> Iterator[None]:
    """Within, the config's dropouts have these values, in the order in which they are found."""
    places = find_dropouts(config)
    before = [getattr(*place) for place in places]
    try:
        for place, value in zip(places, values, strict=True):
            setattr(*place, value)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)


def _save_pretrained(model: PreTrainedModel, *args: Any, own_dropouts: Sequence[float], **kwargs: Any) -> None:
    """Writes the base's own dropouts: those of one training are no part of the model.

    They cannot be put back before, because some architectures read them from the config in every forward pass.
    """
    with _dropouts(model.config, own_dropouts):
        type(model).save_pretrained(model, *args, **kwargs)


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
        UserError: It cannot be had or has no vocabulary, or a named token is not in it.
    """
    _check_contained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind, as in `load_config`; the tokenizers library raises `Exception` itself
        raise _explain(name, "tokenizer", error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # what a folder without one is loaded as
        raise UserError(
            f"{name} holds no tokenizer, or one without a vocabulary; copy the base's tokenizer files there"
        )
    try:  # a half of a surrogate pair can be read from a file but not be written to one, at the end of training
        json.dumps([tokenizer.init_kwargs, tokenizer.chat_template], default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the tokenizer of {name} holds text that is not UTF-8 ({error}); copy it again") from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(
            f"{name}/tokenizer_config.json: model_max_length is no number: {tokenizer.model_max_length!r:.60}"
        )
    for role, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"{role} {token!r} is not in the vocabulary of {name}")
            setattr(tokenizer, role, token)
    if tokenizer.pad_token is None or (pad_token is None and tokenizer.pad_token == tokenizer.eos_token):
        # Labels come from lengths, so even EOS would do here; a distinct pad is kinder to whoever loads this later.
        unknown = tokenizer.unk_token
        tokenizer.pad_token = unknown if unknown not in (None, tokenizer.eos_token) else tokenizer.eos_token
    if tokenizer.pad_token is None:
        lost = os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json"))
        advice = (
            "copy the base's tokenizer_config.json, which is missing" if lost else "mend its tokenizer_config.json"
        )
        raise UserError(f"the tokenizer of {name} has no EOS token, and none to pad with; set eos_token, or {advice}")
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


def load_pretrained(
    auto: type[_BaseAutoModelClass],
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    quantization: BitsAndBytesConfig | None = None,
    dropout: float | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model with weights from safetensors only, and the names of the weights that the checkpoint lacks.

    Args:
        auto: The Auto class that knows the model's task.
        name: Hub id or local folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights that are not quantised; `"auto"` for the checkpoint's own.
        quantization: How to quantise while loading.
        dropout: Probability of all its dropouts while it is in memory; it is saved with its own. `None` to leave them.
        **options: For `from_pretrained`.

    Raises:
        UserError: It cannot be had, or it is an adapter.
    """
    # Unless told, Transformers asks on the terminal whether to run a model's own code, and waits.
    options.setdefault("trust_remote_code", False)
    config = load_config(name, revision, options["trust_remote_code"])
    if _quantization_method(config) and quantization is None:
        raise UserError(
            f"{name} is stored in 4 or 8 bits: load it so, with load_in_4bit or load_in_8bit, or give the base in 16 "
            "or 32 bits"
        )
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
                ignore_mismatched_sizes=True,  # they are named below, which the error would not do
                **options,
            )
    except Exception as error:  # of any kind, as in `load_config`
        if isinstance(error, TypeError) and (unknown := re.search("unexpected keyword argument (.*)", str(error))):
            raise UserError(f"model_init_kwargs: {unknown[1]} is nothing that {name} takes; leave it out") from error
        if attention is not None and re.search("attn|attention", str(error), re.IGNORECASE):
            raise UserError(
                f"attn_implementation {attention!r} cannot be used here ({first_line(error)}); leave it out, or "
                "give eager or sdpa"
            ) from error
        raise _explain(name, "model", error) from error
    for weight, stored, needed in sorted(report["mismatched_keys"])[:1]:
        raise UserError(
            f"{name}: {weight} is stored as {tuple(stored)}, and config.json makes it {tuple(needed)}; the config or "
            "the weights belong to another model"
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # from the Hub, where no folder could be looked into
        raise UserError(f"{name} holds an adapter beside the base model; give the base model alone")
    keep_4bit_weights_unpacked(model)
    if own is not None:
        save = MethodType(partial(_save_pretrained, own_dropouts=own), model)
        model.save_pretrained = save
    return model, sorted(report["missing_keys"])


def _split_config(name: str, revision: str | None, options: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A model's config of its own, and the options that are none of the config's, as `from_pretrained` splits them."""
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
def _quiet_about_new_weights() -> Iterator[None]:
    """Silences Transformers' report on weights that the checkpoint lacks: a classifier's new head is no surprise.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/loading_report.py
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def load_causal_lm(name: str, **options: Any) -> PreTrainedModel:
    """A causal language model. Arguments and errors are those of `load_pretrained`."""
    model, missing = load_pretrained(AutoModelForCausalLM, name, **options)
    if missing:
        raise UserError(f"{name} is no causal language model: it lacks {missing[0]}")
    ends = getattr(model.generation_config, "eos_token_id", None)
    numbers = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(number) is int and -1 <= number < 2**31 for number in numbers):
        raise UserError(f"{name}: eos_token_id of its generation_config.json is no token's number, but {ends!r:.60}")
    return model


def classifier_config(
    name: str, labels: Sequence[str], pad_token_id: int | None, revision: str | None = None
) -> PretrainedConfig:
    """The base's config with the classes, and with the tokenizer's pad token.

    A decoder's head reads the last token that is not padding, so it must know which token that is (trl#422).

    Raises:
        UserError: It cannot be had, or the base is a classifier of other classes already.
    """
    config = load_config(name, revision)
    if is_classifier(config) and config.num_labels != len(labels):
        raise UserError(
            f"{name} is a classifier of {config.num_labels} classes already, the data has {len(labels)} "
            f"({', '.join(labels)}); give a base with as many, or one without a head"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.pad_token_id = pad_token_id
    config.use_cache = False  # nothing is generated
    return config


def check_ending(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises `UserError` if an encoder-decoder, whose head reads the EOS at a text's end, would find none there."""
    if config.is_encoder_decoder and tokenizer("text").input_ids[-1:] != [config.eos_token_id]:
        raise UserError(
            f"the head of {config.model_type} models reads the token {config.eos_token_id} at the end of a text, and "
            f"{tokenizer.name_or_path}'s tokenizer adds none; give a base with its own tokenizer"
        )


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint was saved as a sequence classifier, with a head of its own."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def load_classifier(
    config: PretrainedConfig, name: str, quantization: BitsAndBytesConfig | None = None, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier, and the names of the weights that the checkpoint lacks: its new head.

    Args:
        config: From `classifier_config`.
        name: Hub id or local folder.
        quantization: How to quantise while loading. The head is left as it is: a new one has no values to quantise.
        **options: As for `load_pretrained`.

    Raises:
        UserError: See `load_pretrained`; also a checkpoint that lacks more than a head.
    """
    if quantization is not None:
        skeleton = build_skeleton(config)
        heads = [child for child, _ in skeleton.named_children() if child != skeleton.base_model_prefix]
        quantization.llm_int8_skip_modules = heads  # of 4 bits too, despite its name
    model, missing = load_pretrained(
        AutoModelForSequenceClassification, name, config=config, quantization=quantization, **options
    )
    # A pooler may be new too: pretraining on masked tokens alone has none.
    backbone = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if backbone:
        more = " and more" if len(backbone) > 1 else ""
        raise UserError(f"{name} lacks {backbone[0]}{more}; it is no checkpoint of this kind")
    return model, missing


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The classifier that a config describes, without weights (`meta` device): for names and shapes.

    Raises:
        UserError: The architecture has no sequence classifier.
    """
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"{config.model_type} models have no sequence classifier in Transformers") from error


def load_base(
    args: ModelConfig,
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """The base model as TRL's `ModelConfig` describes it, with `model_init_kwargs` on top and `base_dropout`."""
    settings = loading_options(args, trust_remote_code) | {"dropout": dropout}
    if twice := settings.keys() & (options or {}).keys():
        raise UserError(f"model_init_kwargs: {min(twice)} has a flag of its own; set that")
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
    """The base's quantisation, for `run.json` and back into `BitsAndBytesConfig`; `None` if it has none."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    return config if isinstance(config, dict) else dict(config.to_dict())
