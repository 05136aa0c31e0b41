"""What a `LoraConfig` means to PEFT: what it changes, needs, ignores, loses or computes wrongly."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from peft import LoraConfig
from torch import nn

from plainlora.lora.config import find_unsupported
from plainlora.lora.errors import LoRAError, some
from plainlora.lora.storage import is_supported
from plainlora.lora.targets import modules_to_save

CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # beginnings of init_lora_weights
NEEDS_ROWS = ("eva", "corda", "lora_ga")
MADE_AGAIN = ("pissa", "olora")  # PEFT repeats these on loading, with the same result
FROM_WEIGHTS = (*CONVERTED, "loftq", "mica", "orthogonal")  # need weights, or their dtype, in 16 or 32 bits
IGNORED_IN_BITS = ("kasa_config", "megatron_config", "monteclora_config", "use_bdlora")  # plain LoRA, without a word


def init_of(config: LoraConfig) -> str:
    """`init_lora_weights` in lower case, as PEFT compares it."""
    return str(config.init_lora_weights).lower()


def changes_base(config: LoraConfig) -> bool:
    """Whether PEFT changes the base's weights or layers when it attaches or loads an adapter of this config."""
    own = config.kasa_config is not None or bool(config.layer_replication)
    return own or init_of(config).startswith((*CONVERTED, "loftq"))


def is_converted(config: LoraConfig) -> bool:
    """Whether the final adapter is converted to one for the unchanged base."""
    return init_of(config).startswith(CONVERTED)


def needs_rows(config: LoraConfig) -> bool:
    """Whether the adapter's initial values are computed from training rows."""
    return init_of(config) in NEEDS_ROWS


def check_bits(config: LoraConfig, bits: int | None, on_cpu: bool) -> None:
    """Raises `LoRAError` for what PEFT ignores, computes wrongly or cannot compute on bitsandbytes' layers.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py (`resolve_lora_variant`)

    Args:
        config: The adapter's config.
        bits: 4 or 8, in which the base is stored; `None` for a dense one.
        on_cpu: Whether it is trained on a CPU.
    """
    if bits is None:
        return
    init = f"init_lora_weights={config.init_lora_weights!r}"
    if ignored := [name for name in IGNORED_IN_BITS if getattr(config, name)]:
        fault = f"{some(ignored)}: PEFT ignores it on a base in {bits} bits, and would train plain LoRA"
    elif init_of(config) == "olora":
        off = {4: "1.7 %", 8: "0.5 %"}[bits]
        fault = f"{init}: PEFT rounds the base that it changes to {bits} bits again, and the adapter, saved for the "
        fault += f"unchanged base, is another model than was trained: the logits of a tiny Llama were off by {off}"
    elif init_of(config).startswith(FROM_WEIGHTS):
        fault = f"{init}: PEFT starts this adapter from the base's weights in 16 or 32 bits, and these are in {bits}"
    elif bits == 8 and config.layer_replication:
        fault = "layer_replication: in 8 bits the copies of a layer compute without the scales of its weights, which "
        fault += "bitsandbytes takes out of the weight that they share"
    elif bits == 8 and config.use_dora and on_cpu:
        fault = "use_dora: on a CPU in 8 bits PEFT loses the scales of the weights, and fails"
    else:
        return
    raise LoRAError(f"{fault}; leave it out, or load the base without load_in_{bits}bit")


def check_conversion(config: LoraConfig, modules: Mapping[str, nn.Module] | None = None) -> None:
    """Raises `LoRAError` for what PEFT would lose, or fail on, when it converts an adapter to the unchanged base.

    It keeps A and B of plain LoRA alone, and adds a second adapter, which it does not do beside a trained bias.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py (`subtract_mutated_init`)

    Args:
        config: The adapter's config.
        modules: The modules to adapt, if they are known: an embedding or a convolution has no plain A and B.
    """
    if not is_converted(config):
        return
    trained = {
        "bias": config.bias != "none",
        "use_dora": config.use_dora,
        "modules_to_save": bool(modules_to_save(config)),
        "rank_pattern and alpha_pattern with use_rslora": config.use_rslora
        and bool(config.rank_pattern or config.alpha_pattern),
    }
    lost = [name for name in find_unsupported(config) if name != "init_lora_weights"]
    lost += [name for name, is_set in trained.items() if is_set]
    lost += [f"{name} in target_modules" for name, module in (modules or {}).items() if not is_supported(module)]
    if lost:
        raise LoRAError(
            f"{some(lost)}: PEFT saves init_lora_weights={config.init_lora_weights!r} for the unchanged base, and can "
            "convert A and B of linear layers alone; leave it out, or choose another init_lora_weights"
        )


def check_base_is_known(config: LoraConfig, directory: str | Path) -> None:
    """Raises `LoRAError` for an adapter of a changed base that PEFT cannot make again."""
    if is_converted(config) and init_of(config) not in MADE_AGAIN:
        raise LoRAError(
            f"{directory} was saved with init_lora_weights={config.init_lora_weights!r}, for a changed base that PEFT "
            "cannot make again: use the final adapter of its run, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


def for_shapes(config: LoraConfig) -> LoraConfig:
    """A config for a base without values: what is computed from values is left out."""
    config = deepcopy(config)
    if needs_rows(config):
        config.init_lora_weights = True
        config.eva_config = config.corda_config = config.lora_ga_config = None
    config.kasa_config = None  # a diagonal of r values beside A and B, and a truncated base
    return config
