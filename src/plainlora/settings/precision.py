"""Lists the number formats in which a run stores and computes."""

from transformers import PretrainedConfig, TrainingArguments
from trl import ModelConfig

from plainlora.settings.arguments import optim_name
from plainlora.settings.device import this_device


def list_precisions(
    training: TrainingArguments, model: ModelConfig, config: PretrainedConfig | None, adapter_dtype: str | None
) -> dict[str, str]:
    """The formats of base, computation, trained weights and optimizer state, in words.

    Args:
        training: Mixed precision and the optimizer.
        model: How the base is stored.
        config: The base's config, which resolves `dtype: auto`; `None` if it could not be read.
        adapter_dtype: The adapter's dtype; `None` if the base's own weights are trained.
    """
    stored = model.dtype
    if stored in (None, "auto"):
        own = getattr(config, "dtype", None)
        stored = str(own).removeprefix("torch.") if own is not None else "float32"
    base = str(stored)
    if model.load_in_4bit:
        nested = ", its scales quantised too" if model.use_bnb_nested_quant else ""
        base = f"4-bit {model.bnb_4bit_quant_type.upper()}{nested}; other weights in {stored}"
    elif model.load_in_8bit:
        base = f"8-bit; other weights in {stored}"
    compute = str(stored)
    if training.bf16:
        compute = "bfloat16, by autocast"
    elif training.fp16:
        no_bf16 = "" if this_device(bool(training.use_cpu)).bf16 else " (this GPU has no bfloat16)"
        compute = f"float16, by autocast with loss scaling{no_bf16}"
    elif training.tf32:
        compute += ", its products in TF32"
    if model.load_in_4bit and not compute.startswith(str(stored)):
        compute += f"; 4-bit layers in {stored}"
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage < 3 and (training.bf16 or training.fp16):
        # DeepSpeed casts the model, adapter included; under ZeRO-3 only the base, which it has in parts already.
        base = compute = "bfloat16" if training.bf16 else "float16"
        return {
            "base": base,
            "compute": f"{compute}, by DeepSpeed",
            "adapter" if adapter_dtype else "trained weights": f"{compute}, with a float32 copy in the optimizer",
            "optimizer state": f"float32 ({optim_name(training)})",
        }
    trained = adapter_dtype or ("float32" if training.fp16 else str(stored))
    name = optim_name(training)
    state = "8-bit" if "8bit" in name else "float32" if "32bit" in name else f"{trained}, as what is trained"
    return {
        "base": base,
        "compute": compute,
        "adapter" if adapter_dtype else "trained weights": trained,
        "optimizer state": f"{state} ({name})",
    }


def precision_line(precisions: dict[str, str]) -> str:
    """The formats in one line."""
    return "number formats: " + ", ".join(f"{what} {stored}" for what, stored in precisions.items())
