"""Merges an adapter directory into a model directory, and checks the result by reloading it.

An unchecked merge may be wrong (peft#2321, unsloth#2142). So the merged model is written, loaded again by plain
Transformers in another process, and its logits are compared with those of the adapter model.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainlora.base.config import check_mergeable, context_length, load_config
from plainlora.errors import UserError
from plainlora.folders import check_disk, staged
from plainlora.generation import generate
from plainlora.lora.errors import LoRAError
from plainlora.lora.interchange import read_config
from plainlora.merging.certificate import CERTIFICATE, Answers, agreement, hash_adapter, hash_files, perplexity
from plainlora.merging.eval_prompts import NEW_TOKENS, PROMPTS, EvalPrompts, classifier_prompts, language_prompts
from plainlora.merging.reload import ask
from plainlora.peft_model.config import changes_base
from plainlora.report import package_versions, write_json
from plainlora.resources.memory import free_memory
from plainlora.run.adapter_base import (
    Base,
    BaseKind,
    class_labels,
    find_base,
    load_base_of,
    load_tokenizer_of,
    read_run,
    skeleton_of,
    training_quantization,
)
from plainlora.run.folder import is_merged_model
from plainlora.settings.checks import check_writable

# Largest |difference| of a logit divided by the largest |logit|. In fp32 only the order of sums differs. In half
# precision each merged weight is rounded once, by 2^-11 (fp16) or 2^-8 (bf16) relative, which adds up over layers. So
# does the rounding of each product, where memory is too small to compute in float32. Where it is large enough, twice
# what half precision changes of the adapter model itself is allowed too: of SmolLM2 4 to 5 % of the largest logit.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

SPARE = 0.25  # of the model's size, for the logits and caches of its answers

# Options for sampling only. Published generation configs set some of them with do_sample=false, and then Transformers
# refuses to save them once they are changed.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class MergeResult:
    """The result of `merge_adapter`.

    Attributes:
        max_abs_diff: Largest difference between a logit of the adapter model and of the reloaded merged model.
        relative_diff: The same divided by the largest logit (dimensionless).
        tolerance: The bound of `relative_diff`.
        dtype: The dtype of the merged weights.
        auto_class: The Auto class that loads the merged model.
        certificate: The content of `certificate.json`.
        warnings: Warnings for the user.
    """

    max_abs_diff: float
    relative_diff: float
    tolerance: float
    dtype: torch.dtype
    auto_class: str
    certificate: dict[str, Any]
    warnings: list[str]


def merging_device(skeleton: PreTrainedModel | None, dtype: torch.dtype | str) -> torch.device:
    """The GPU, if the model and its activations fit into the free memory; else the CPU.

    Args:
        skeleton: The base on the meta device, in its config's dtype; `None` if it is unknown.
        dtype: The dtype of the merged weights; `"auto"` for the config's.
    """
    cpu = torch.device("cpu")
    if skeleton is None or not torch.cuda.is_available():
        return cpu
    gpu = torch.device("cuda", torch.cuda.current_device())
    return gpu if _fits(skeleton, None if isinstance(dtype, str) else dtype, gpu) else cpu


def _fits(skeleton: PreTrainedModel, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether the model fits into the free memory, with weights of a dtype or of their own."""
    size = sum(each.numel() * (dtype or each.dtype).itemsize for each in skeleton.parameters())
    return (1 + SPARE) * size <= (free_memory(device) or 0)


def _ask_reloaded(
    directory: Path, eval_prompts: EvalPrompts, device: torch.device, quantization: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The answers of a saved model, which plain Transformers loads in another process, quantised if asked."""
    with tempfile.TemporaryDirectory() as scratch:
        questions, answers = Path(scratch) / "questions.json", Path(scratch) / "answers.safetensors"
        asked = eval_prompts.questions | {"device": str(device), "quantization_config": quantization}
        questions.write_text(json.dumps(asked), encoding="utf-8")
        program = Path(__file__).with_name("reload.py")
        command = [sys.executable, str(program), str(directory), str(questions), str(answers)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise UserError(f"the merged model cannot be loaded by plain Transformers: {run.stderr.strip()[-400:]}")
        return load_file(answers)


def _write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    # The pad token is the tokenizer's in all three files, as after training with TRL.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends, own = generation.eos_token_id, tokenizer.eos_token_id
        # A list has several tokens that end an answer, as in Llama 3 and Qwen; all are kept.
        generation.eos_token_id = list(dict.fromkeys([*ends, own])) if isinstance(ends, list) else own
        generation.pad_token_id = tokenizer.pad_token_id
        if not generation.do_sample:
            for name in SAMPLING:
                setattr(generation, name, None)
        generation.save_pretrained(directory)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _check_output(output: Path, sources: dict[str, Path], overwrite: bool) -> None:
    """Checks that the output replaces nothing but an earlier merged model, and that only with `overwrite`."""
    for what, source in sources.items():
        if source.exists() and source.resolve().is_relative_to(output):
            raise UserError(f"--output {output} holds the {what}; give a folder of its own")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} already exists; give another --output, or replace it with --overwrite")
    if not is_merged_model(output):
        raise UserError(
            f"{output} was not written by `plainlora merge` (it has no {CERTIFICATE}); give another --output"
        )


@dataclass(frozen=True)
class _Outputs:
    """The answers of a base with and without the adapter.

    Attributes:
        base: The answers of the base.
        adapter: The answers of the adapter model.
        rounding: What computing in half precision changes of the adapter model's logits, over the largest one; 0 if
            it was not computed with in float32, or is held in it.
    """

    base: Answers
    adapter: Answers
    rounding: float

    def figures(self) -> dict[str, Any]:
        """Both perplexities, and the difference that the adapter makes."""
        effect = agreement(self.base, self.adapter)
        return {
            "base": perplexity(self.base),
            "adapter": perplexity(self.adapter) | {"against_base": effect},
        }


def _ask_both_models(
    model: nn.Module, load_bare: Callable[[], nn.Module], adapter: Path, base: Base, eval_prompts: EvalPrompts
) -> _Outputs:
    """The answers with the adapter and without, for which a base that PEFT has changed is loaded again."""
    answers, rounding = ask(model, eval_prompts.questions), 0.0
    if eval_prompts.questions["float32"] and next(model.parameters()).dtype != torch.float32:
        rounding = agreement(answers, ask(model, eval_prompts.asked_in(False).questions))["relative_diff"]
    if changes_base(read_config(adapter)):
        return _Outputs(ask(load_bare(), eval_prompts.questions), answers, rounding)
    with base.backend.disabled(model):
        return _Outputs(ask(model, eval_prompts.questions), answers, rounding)


def _beside(answers: Answers, asked: dict[BaseKind, _Outputs]) -> dict[str, Any]:
    """The figures of a merged model: its perplexity, and its difference from the adapter model on every base."""
    against = {kind: agreement(each.adapter, answers) for kind, each in asked.items()}
    return perplexity(answers) | {"against": against}


def _merge_into(
    directory: Path,
    adapter: Path,
    base: Base,
    kind: BaseKind,
    dtype: torch.dtype | str,
    device: torch.device,
    eval_prompts: EvalPrompts,
    output: Path,
) -> tuple[torch.dtype, EvalPrompts, _Outputs]:
    """Loads base and adapter, evaluates both, merges and writes. When it returns, this process holds no model.

    Returns:
        The model's dtype, the prompts with the adapter model's answers, and the outputs of base and adapter.
    """
    load_bare = partial(load_base_of, adapter, base, kind, dtype, device)
    model = base.backend.load(load_bare(), adapter)
    check_disk(output.parent, sum(parameter.nbytes for parameter in model.parameters()), f"the merged model {output}")
    merged_dtype, tokenizer = next(model.parameters()).dtype, load_tokenizer_of(adapter, base)
    if eval_prompts.prompts:
        eval_prompts = eval_prompts.with_answers(
            tokenizer, generate(model, tokenizer, eval_prompts.prompts, NEW_TOKENS)
        )
    asked = _ask_both_models(model, load_bare, adapter, base, eval_prompts)
    _write_merged(base.backend.merge(model), tokenizer, directory)
    del model
    release_memory()  # before the other process loads the merged model
    return merged_dtype, eval_prompts, asked


def _check_drift(relative_diff: float, dtype: torch.dtype, rounding: float, adapter: Path, output: Path) -> float:
    """The tolerance of the difference between the reloaded and the adapter model.

    Raises:
        UserError: The difference exceeds it.
    """
    tolerance = max(TOLERANCES.get(dtype, 1e-5), 2 * rounding)
    if not relative_diff <= tolerance:
        command = f"; plainlora merge --adapter {adapter} --output {output} --dtype float32"
        raise UserError(
            f"the merged model differs from the adapter model by {relative_diff:.1e} of the largest logit, more than "
            f"the {tolerance:.0e} allowed for {dtype}; {output} was not written"
            f"{'' if dtype == torch.float32 else command}"
        )
    return tolerance


def _ask_quantized_run(
    adapter: Path,
    base: Base,
    other: BaseKind,
    dtype: torch.dtype | str,
    device: torch.device,
    eval_prompts: EvalPrompts,
    directory: Path,
) -> tuple[_Outputs, Answers]:
    """Further comparisons for an adapter that was trained on a quantised base.

    Returns:
        The outputs on the other base (original or dequantised), and the answers of the merged weights quantised as in
        training, which is what merging into quantised weights would give.
    """
    load_bare = partial(load_base_of, adapter, base, other, dtype, device)
    model = base.backend.load(load_bare(), adapter)
    asked = _ask_both_models(model, load_bare, adapter, base, eval_prompts)
    del model
    release_memory()
    return asked, _ask_reloaded(directory, eval_prompts, device, training_quantization(adapter))


def _without_values(identity: dict[str, Any]) -> dict[str, Any]:
    """A base's description without the numbers that only `find_difference` needs."""
    return {name: value for name, value in identity.items() if name != "values"}


def _certificate(
    adapter: Path,
    found: Base,
    base: BaseKind,
    merged: dict[str, Any],
    figures: dict[str, Any],
    tolerance: float,
    eval_prompts: EvalPrompts,
) -> dict[str, Any]:
    """The content of `certificate.json`; `merged` describes the merged model's files."""
    return {
        "adapter": {"folder": str(adapter), "sha256": hash_adapter(adapter)},
        "base": {
            "kind": base,
            "identity": _without_values(found.identity),
            "trained_on": found.trained_on and _without_values(found.trained_on),
            "warning": found.warning,
            "quantization_config": training_quantization(adapter),
        },
        "merged": merged,
        "figures": figures,
        "tolerance": tolerance,
        "measured_on": {
            "prompts": list(PROMPTS) if eval_prompts.prompts else [],
            "text": eval_prompts.source,
            "rows": eval_prompts.rows,
            "tokens": eval_prompts.tokens,
            "in_float32": eval_prompts.questions["float32"],
        },
        "versions": package_versions(),
    }


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: BaseKind = "16bit",
    dtype: torch.dtype | str = "auto",
    overwrite: bool = False,
    *,
    text: str | Path | None = None,
    base_model: str | None = None,
    allow_other_base: bool = False,
) -> MergeResult:
    """Merges an adapter into its base, saves the model, and compares the reloaded model with the adapter model.

    The output is written only if the two agree. At most one model is in memory at a time.

    Args:
        adapter: Folder of the adapter, with its tokenizer.
        output: Folder for the merged model; it must be missing or empty, unless `overwrite`.
        base: The base to merge into.
        dtype: The dtype of the merged weights; `"auto"` for the base checkpoint's.
        overwrite: Whether an earlier merged model there is replaced. Nothing else is ever replaced.
        text: A text file on which to measure perplexity; see `plainlora.merging.eval_prompts`.
        base_model: See `plainlora.run.adapter_base.find_base`.
        allow_other_base: See `plainlora.run.adapter_base.find_base`.

    Raises:
        UserError: The base cannot be loaded or is another one, the output cannot be written, the disk is too small, or
            the merged model differs too much.
        LoRAError: The adapter cannot be read or does not fit the base.
    """
    check_writable(str(output), "--output")
    adapter, output = Path(adapter), Path(output).resolve()  # `.` cannot be renamed
    check_writable(str(output.parent), "--output")
    found = find_base(adapter, base_model, allow_other_base)
    _check_output(output, {"adapter": adapter, "base model": Path(found.name).expanduser()}, overwrite)
    config = load_config(found.name, found.revision)
    check_mergeable(found.name, config)
    tokenizer = load_tokenizer_of(adapter, found)
    is_classifier = class_labels(adapter) is not None
    make_prompts = classifier_prompts if is_classifier else language_prompts
    eval_prompts = make_prompts(tokenizer, context_length(config), text, read_run(adapter))
    skeleton = skeleton_of(adapter, found)
    device = merging_device(skeleton, dtype)
    in_float32 = skeleton is not None and _fits(skeleton, torch.float32, device)
    eval_prompts = eval_prompts.asked_in(in_float32)
    with staged(output) as scratch:
        merged_dtype, eval_prompts, chosen = _merge_into(
            scratch, adapter, found, base, dtype, device, eval_prompts, output
        )
        merged = _ask_reloaded(scratch, eval_prompts, device)
        drift = agreement(chosen.adapter, merged)
        tolerance = _check_drift(drift["relative_diff"], merged_dtype, chosen.rounding, adapter, output)
        asked = {base: chosen}
        figures: dict[str, Any] = {}
        if training_quantization(adapter) is not None:
            other: BaseKind = "dequantized" if base == "16bit" else "16bit"
            try:
                asked[other], rounded = _ask_quantized_run(adapter, found, other, dtype, device, eval_prompts, scratch)
                figures["requantized"] = _beside(rounded, asked)
            except (UserError, LoRAError, RuntimeError) as error:  # such as a missing bitsandbytes
                figures["not_measured"] = " ".join(str(error).split())
        figures["bases"] = {kind: each.figures() for kind, each in asked.items()}
        figures["merged"] = _beside(merged, asked)
        auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
        files = {
            "dtype": str(merged_dtype).removeprefix("torch."),
            "auto_class": auto_class,
            "sha256": hash_files(scratch),
        }
        certificate = _certificate(adapter, found, base, files, figures, tolerance, eval_prompts)
        write_json(scratch / CERTIFICATE, certificate)
    warnings = [found.warning] if found.warning else []
    if figures["bases"][base]["adapter"]["against_base"]["max_abs_diff"] == 0:
        warnings.append("the adapter changes no logit: the merged model answers as its base does")
    if "not_measured" in figures:
        warnings.append(f"the base as it was trained on could not be measured: {figures['not_measured']}")
    return MergeResult(
        drift["max_abs_diff"], drift["relative_diff"], tolerance, merged_dtype, auto_class, certificate, warnings
    )
