"""Names of settings in older recipes and in other projects -> their names here."""

from collections.abc import Callable
from dataclasses import dataclass


def _unchanged(value: object) -> object:
    return value


def _if_set(choice: str) -> Callable[[object], object]:
    """For an old switch that is now one choice of a setting: that choice if it is on, nothing if it is off."""
    return lambda value: choice if str(value).lower() in ("true", "yes", "1") else None


def _dtype_name(value: object) -> object:
    """`torch.float16` -> `float16`."""
    return str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Rename:
    """The current name of a setting of an older recipe or another project.

    Attributes:
        today: Its name here; `None` if there is none.
        why: The reason, or what to do instead, in one clause.
        translate: Maps the old value to the new one; if it returns `None` the setting is left out. `None` instead of a
            function means that the new value cannot be derived.
    """

    today: str | None
    why: str = ""
    translate: Callable[[object], object] | None = _unchanged

    def hint(self) -> str:
        """What to do, in one clause."""
        if self.today is None:
            return f"leave it out: {self.why}"
        return f"did you mean {self.today}?" + (f" ({self.why})" if self.why else "")


_MIXED_PRECISION = Rename(None, "mixed precision is PyTorch's own, by bf16 or fp16")
_OWN_TOKENIZER = Rename(None, "the tokenizer is the one in the base's own folder")
_BATCHING = Rename("accelerator_config", "one of its entries", None)
_FSDP = Rename("fsdp_config", "one of its entries", None)

RENAMES = {
    # the base
    "base_model": Rename("model_name_or_path"),
    "model_id": Rename("model_name_or_path"),
    "model_name": Rename("model_name_or_path"),
    "torch_dtype": Rename("dtype", translate=_dtype_name),
    "use_4bit": Rename("load_in_4bit"),
    "bnb_4bit_compute_dtype": Rename("dtype", "weights and 4-bit compute share it", _dtype_name),
    "use_nested_quant": Rename("use_bnb_nested_quant"),
    "bnb_4bit_use_double_quant": Rename("use_bnb_nested_quant"),
    "use_flash_attention_2": Rename("attn_implementation", translate=_if_set("flash_attention_2")),
    "tokenizer": _OWN_TOKENIZER,
    "tokenizer_name": _OWN_TOKENIZER,
    "tokenizer_name_or_path": _OWN_TOKENIZER,
    "use_fast_tokenizer": _OWN_TOKENIZER,
    "padding_side": Rename(None, "rows are padded on the right in training"),
    # the adapter
    "r": Rename("lora_r"),
    "rank": Rename("lora_r"),
    "lora_rank": Rename("lora_r"),
    "alpha": Rename(
        "lora_alpha", "divided by lora_r here: for code that does not divide, lora_alpha = alpha * r", None
    ),
    "lora_target": Rename("lora_target_modules"),
    "target_modules": Rename("lora_target_modules"),
    "modules_to_save": Rename("lora_modules_to_save"),
    # the rows
    "max_seq_length": Rename("max_length"),
    "model_max_length": Rename("max_length"),
    "block_size": Rename("max_length"),
    "cutoff_len": Rename("max_length"),
    "sequence_len": Rename("max_length"),
    "max_overflow": Rename("max_truncated"),
    "preprocessing_num_workers": Rename("dataset_num_proc"),
    "dataset_batch_size": Rename(None, "rows are tokenised one by one"),
    "num_of_sequences": Rename(None, "all rows are packed at once"),
    "chars_per_token": Rename(None, "tokens are counted, not estimated"),
    "group_by_length": Rename("train_sampling_strategy", translate=_if_set("group_by_length")),
    # training
    "batch_size": Rename("per_device_train_batch_size"),
    "per_gpu_train_batch_size": Rename("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Rename("per_device_eval_batch_size"),
    "per_device_batch": Rename("per_device_train_batch_size"),
    "per_device_batch_size": Rename("per_device_train_batch_size"),
    "micro_batch_size": Rename("per_device_train_batch_size"),
    "lr": Rename("learning_rate"),
    "epochs": Rename("num_train_epochs"),
    "num_epochs": Rename("num_train_epochs"),
    "lr_scheduler": Rename("lr_scheduler_type"),
    "warmup_ratio": Rename("warmup_steps"),  # a number below 1 is a share
    "evaluation_strategy": Rename("eval_strategy"),
    "evaluate_during_training": Rename("eval_strategy", translate=_if_set("steps")),
    "no_cuda": Rename("use_cpu"),
    "use_mps_device": Rename(None, "the device is detected"),
    "fp16_backend": _MIXED_PRECISION,
    "fp16_opt_level": _MIXED_PRECISION,
    "half_precision_backend": _MIXED_PRECISION,
    "dispatch_batches": _BATCHING,
    "split_batches": _BATCHING,
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "torchdynamo": Rename("torch_compile_backend"),
    "include_tokens_per_second": Rename("include_num_input_tokens_seen", "it has other values", None),
    "do_train": Rename(None, "these programs always train"),
    "do_eval": Rename("eval_strategy", translate=_if_set("steps")),
    "do_predict": Rename(None, "test rows are measured in any case; plainlora predict takes other texts"),
    "use_peft": Rename("method", "lora trains an adapter", _if_set("lora")),
    # output
    "overwrite_output_dir": Rename("overwrite"),
    "save_safetensors": Rename(None, "weights are always saved as safetensors"),
    "logging_dir": Rename(None, "TensorBoard's files go to output_dir/runs"),
    "push_to_hub_model_id": Rename("hub_model_id"),
    "push_to_hub_token": Rename("hub_token"),
    "use_auth_token": Rename(None, "log in with `hf auth login`, or set HF_TOKEN"),
}
