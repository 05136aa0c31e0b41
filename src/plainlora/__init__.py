"""PlainLoRA: LoRA you can read in five minutes, proved equal to PEFT, and faster than PEFT.

    model = inject(model, LoraConfig(...))      # as peft.get_peft_model(model, LoraConfig(...))
    save_adapter(model, directory)              # PEFT's files
    model = load_adapter(model, directory)      # PEFT's files
    with disabled(model): ...                   # the base without the adapter
    model = merge(model)                        # the base architecture with the deltas added to its weights
    model = unwrap(model)                       # the base again
    fuse(model)                                 # an injected model or a PeftModel: less time and memory; see unfuse
    fuse(trainer)                               # the same for a trainer's model, and for the loss of an SFTTrainer

Names are imported on first use, so that `plainlora --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plainlora.fast.fuse import fuse, unfuse
    from plainlora.fast.loss_head import use_one_pass_head
    from plainlora.lora.inject import disabled, inject, unwrap
    from plainlora.lora.interchange import save_adapter
    from plainlora.lora.load import load_adapter
    from plainlora.lora.merge import merge

__version__ = "0.1.0"
__all__ = [
    "disabled",
    "fuse",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "unfuse",
    "unwrap",
    "use_one_pass_head",
]

_HOME = {
    "disabled": "plainlora.lora.inject",
    "inject": "plainlora.lora.inject",
    "unwrap": "plainlora.lora.inject",
    "load_adapter": "plainlora.lora.load",
    "save_adapter": "plainlora.lora.interchange",
    "merge": "plainlora.lora.merge",
    "fuse": "plainlora.fast.fuse",
    "unfuse": "plainlora.fast.fuse",
    "use_one_pass_head": "plainlora.fast.loss_head",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
