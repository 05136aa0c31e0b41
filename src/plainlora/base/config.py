"""A base's config, and checks of its context length and of its weights' storage."""

from transformers import AutoConfig, PretrainedConfig

from plainlora.base.failures import check_folder, explain
from plainlora.errors import UserError

MOST_LAYERS = 1_000  # the deepest models have a few hundred


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base model's config.

    Raises:
        UserError: It cannot be loaded, or it is an adapter.
    """
    check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        method, kernel = quantization_method(config), _find_kernel(config)
    except Exception as error:  # of any class: the file's values are not checked
        raise explain(name, "model", error) from error
    if not isinstance(config.architectures, list | None):
        raise UserError(f"{name}/config.json: architectures is not a list of names, but {config.architectures!r:.60}")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # building them would take forever
        raise UserError(f"{name}/config.json names {layers:,} layers, more than any model has; it is damaged")
    if method not in (None, "bitsandbytes"):
        raise UserError(
            f"{name}/config.json says that the weights are quantised by {method!r:.60}, which is not supported; give "
            "the base in 16 or 32 bits"
        )
    if kernel and not trust_remote_code:
        raise UserError(
            f"{name}/config.json names the attention {kernel!r:.60}, which is code from the Hub; take "
            "attn_implementation out of it, or read that code, then --trust_remote_code true runs it"
        )
    return config


def quantization_method(config: PretrainedConfig) -> str | None:
    """The quantisation method that a checkpoint's config names; `None` if its weights are not quantised."""
    stored = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not stored:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    old = fields.get("load_in_4bit") or fields.get("load_in_8bit")  # without a name
    return "bitsandbytes" if old else str(fields.get("quant_method"))


def check_storage(name: str, config: PretrainedConfig, quantized: bool) -> None:
    """Raises `UserError` if a quantised checkpoint would be loaded as a dense one.

    Args:
        name: Hub id or local folder.
        config: The base's config.
        quantized: Whether it is loaded quantised.
    """
    if quantization_method(config) and not quantized:
        raise UserError(
            f"{name} is stored in 4 or 8 bits: load it in them (load_in_4bit or load_in_8bit in training, --base "
            "dequantized in generate), or give the base in 16 or 32 bits"
        )


def check_mergeable(name: str, config: PretrainedConfig) -> None:
    """Raises `UserError` for a quantised checkpoint: Transformers cannot save a dense model from it."""
    if quantization_method(config):
        raise UserError(f"{name} is stored in 4 or 8 bits; merge into the base in 16 bits, with --base_model")


def _find_kernel(config: PretrainedConfig) -> str | None:
    """The first attention implementation in a config, or in one inside it, that is a Hub repository."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    own = str(config._attn_implementation)
    return own if "/" in own else next(filter(None, map(_find_kernel, inner)), None)


# Encoders that number positions from `pad_token_id + 1` on, so that many of their position embeddings are not used:
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/roberta/modeling_roberta.py
PADDED_POSITIONS = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def context_length(config: PretrainedConfig) -> int | None:
    """The model's context length in tokens; `None` if its config does not give one."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not length or length < 0:  # as XLNet's
        return None
    return int(length) - (((text.pad_token_id or 0) + 1) if text.model_type in PADDED_POSITIONS else 0)


def class_names(config: PretrainedConfig) -> list[str]:
    """A classifier's classes by number. Its file may name them in another order."""
    return [name for _, name in sorted((config.id2label or {}).items())]


def check_length(max_length: int | None, config: PretrainedConfig) -> None:
    """Raises `UserError` if rows may be longer than the model's context."""
    longest = context_length(config)
    if max_length is not None and longest is not None and max_length > longest:
        raise UserError(f"max_length {max_length} is longer than the model's context of {longest} tokens; lower it")
