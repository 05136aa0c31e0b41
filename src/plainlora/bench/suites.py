"""The suites by name."""

from collections.abc import Callable
from functools import partial

from plainlora.bench import classify, head, language, layer, lifecycle
from plainlora.bench.case import Case

# suite: (module that takes part, its cases for a size and a device)
SUITES: dict[str, tuple[str, Callable[[str, str], list[Case]]]] = {
    "layer": ("layer", layer.cases),
    "head": ("head", head.cases),
    "gpt2": ("language", partial(language.cases, "gpt2")),
    "qwen2": ("language", partial(language.cases, "qwen2")),
    "llama2": ("language", partial(language.cases, "llama2")),
    "classify": ("classify", classify.cases),
    "lifecycle": ("lifecycle", lifecycle.cases),
}
