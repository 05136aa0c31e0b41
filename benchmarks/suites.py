"""The suites by name, and their cases."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks import classify, head, language, layer, lifecycle, scaling
from benchmarks.case import Case

# suite: (module whose `run_variant` is called, its cases for a size and a device)
SUITES: dict[str, tuple[str, Callable[[str, str], list[Case]]]] = {
    "layer": ("layer", layer.cases),
    "head": ("head", head.cases),
    "gpt2": ("language", partial(language.cases, "gpt2")),
    "qwen2": ("language", partial(language.cases, "qwen2")),
    "smollm2": ("language", partial(language.cases, "smollm2")),
    "llama2": ("language", partial(language.cases, "llama2")),
    "classify": ("classify", classify.cases),
    "lifecycle": ("lifecycle", lifecycle.cases),
    "scaling": ("language", scaling.cases),
}


def list_cases(suite: str, size: str, device: str) -> list[tuple[str, Case]]:
    """A suite's cases, each with the module whose `run_variant` is called.

    At size `tiny` a case says so wherever it is named, and is held to no target: its figures mean nothing.
    """
    module, cases = SUITES[suite]
    found = cases(size, device)
    if size == "tiny":
        found = [replace(case, name=f"tiny, in place of {case.name}", targets=()) for case in found]
    return [(module, case) for case in found]
