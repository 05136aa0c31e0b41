"""Adapter directory -> merged model directory, checked by reloading it.

A merge that nobody looked at is a guess (peft#2321, unsloth#2142): the model is written, loaded again by a process
that knows nothing of adapters, and its logits are compared with those of the adapter model.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainlora.base.config import check_mergeable, context_length, load_config
from plainlora.errors import UserError
from plainlora.folders import check_disk, staged
from plainlora.generation import generate
from plainlora.lora.errors import LoRAError
from plainlora.lora.inject import disabled
from plainlora.lora.load import load_adapter
from plainlora.lora.merge import merge
from plainlora.merging.certificate import CERTIFICATE, Answers, agreement, hash_adapter, hash_files, perplexity
from plainlora.merging.probes import NEW_TOKENS, PROMPTS, Probes, classifier_probes, language_probes
from plainlora.merging.reload import ask
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

# Largest |difference| of a logit over the largest |logit|. fp32: the sum of products is merely reordered. Half
# precision rounds each merged weight once, a relative error of 2^-11 (fp16) or 2^-8 (bf16) that adds up over layers.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

SPARE = 0.25  # of the model's size, for the logits and caches of its answers

# What only sampling reads. Published configs set some of it beside do_sample=false, and cannot be saved once changed.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class MergeResult:
    """What `merge_adapter` found.

    Attributes:
        max_abs_diff: Largest difference between a logit of the adapter model and of the reloaded merged model.
        relative_diff: The same over the largest logit (dimensionless).
        tolerance: What `relative_diff` was held to.
        dtype: Precision of the merged weights.
        auto_class: What loads the merged model.
        certificate: The content of `certificate.json`.
        warnings: What the person who merges should know.
    """

    max_abs_diff: float
    relative_diff: float
    tolerance: float
    dtype: torch.dtype
    auto_class: str
    certificate: dict[str, Any]
    warnings: list[str]


def merging_device(skeleton: PreTrainedModel | None, dtype: torch.dtype | str) -> torch.device:
    """The GPU, if the model and what it computes fit into its free memory; else the CPU.

    Args:
        skeleton: The base on the `meta` device, in the type that its config says; `None` if it is unknown.
        dtype: Of the merged weights; `"auto"` for the config's.
    """
    cpu = torch.device("cpu")
    if skeleton is None or not torch.cuda.is_available():
        return cpu
    size = sum(
        each.numel() * (each.dtype if isinstance(dtype, str) else dtype).itemsize for each in skeleton.parameters()
    )
    gpu = torch.device("cuda", torch.cuda.current_device())
    return gpu if (1 + SPARE) * size <= (free_memory(gpu) or 0) else cpu


def _ask_reloaded(
    directory: Path, probes: Probes, device: torch.device, quantization: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The answers of a saved model, from a process in which plain Transformers loads it, quantised if so asked."""
    with tempfile.TemporaryDirectory() as scratch:
        questions, answers = Path(scratch) / "questions.json", Path(scratch) / "answers.safetensors"
        asked = probes.questions | {"device": str(device), "quantization_config": quantization}
        questions.write_text(json.dumps(asked), encoding="utf-8")
        program = Path(__file__).with_name("reload.py")
        command = [sys.executable, str(program), str(directory), str(questions), str(answers)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise UserError(f"the merged model cannot be loaded by plain Transformers: {run.stderr.strip()[-400:]}")
        return load_file(answers)


def _write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    # The pad token is the tokenizer's in all three files; in training TRL sees to that.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends, own = generation.eos_token_id, tokenizer.eos_token_id
        # A list names several tokens that end an answer, as Llama 3 and Qwen have them: none may be lost.
        generation.eos_token_id = list(dict.fromkeys([*ends, own])) if isinstance(ends, list) else own
        generation.pad_token_id = tokenizer.pad_token_id
        if not generation.do_sample:
            for name in SAMPLING:
                setattr(generation, name, None)
        generation.save_pretrained(directory)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _check_output(output: Path, sources: dict[str, Path], overwrite: bool) -> None:
    """The output may not replace what it is made of, nor, unasked, a merged model, nor ever anything else."""
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
class _Asked:
    """The answers on one base.

    Attributes:
        base: The base's.
        adapter: The adapter model's.
    """

    base: Answers
    adapter: Answers

    def figures(self) -> dict[str, Any]:
        """Perplexities, and how far the adapter moves the base."""
        effect = agreement(self.base, self.adapter)
        return {
            "base": perplexity(self.base),
            "adapter": perplexity(self.adapter) | {"against_base": effect},
        }


def _ask_both(model: PreTrainedModel, probes: Probes) -> _Asked:
    with disabled(model):
        base = ask(model, probes.questions)
    return _Asked(base, ask(model, probes.questions))


def _beside(answers: Answers, asked: dict[BaseKind, _Asked]) -> dict[str, Any]:
    """A whole model's figures: its perplexity, and how far it is from the adapter model on every base."""
    against = {kind: agreement(each.adapter, answers) for kind, each in asked.items()}
    return perplexity(answers) | {"against": against}


def _merge_into(
    directory: Path,
    adapter: Path,
    base: Base,
    kind: BaseKind,
    dtype: torch.dtype | str,
    device: torch.device,
    probes: Probes,
    output: Path,
) -> tuple[torch.dtype, Probes, _Asked]:
    """Loads, asks, merges and writes. When it returns, this process holds no model.

    Returns:
        The model's precision, the probes with the adapter model's answers, and what base and adapter made of them.
    """
    model = load_adapter(load_base_of(adapter, base, kind, dtype, device), adapter)
    check_disk(output.parent, sum(parameter.nbytes for parameter in model.parameters()), f"the merged model {output}")
    merged_dtype, tokenizer = next(model.parameters()).dtype, load_tokenizer_of(adapter, base)
    if probes.prompts:
        probes = probes.with_answers(tokenizer, generate(model, tokenizer, probes.prompts, NEW_TOKENS))
    asked = _ask_both(model, probes)
    _write_merged(merge(model), tokenizer, directory)
    del model
    release_memory()  # the base is gone before the merged model is loaded elsewhere
    return merged_dtype, probes, asked


def _check_drift(relative_diff: float, dtype: torch.dtype) -> float:
    """The tolerance, which the difference between reloaded and adapter model is within.

    Raises:
        UserError: It is not.
    """
    tolerance = TOLERANCES.get(dtype, 1e-5)
    if not relative_diff <= tolerance:
        advice = "" if dtype == torch.float32 else "; try --dtype float32"
        raise UserError(
            f"the merged model differs from the adapter model by {relative_diff:.1e} of the largest "
            f"logit, more than the {tolerance:.0e} allowed for {dtype}; nothing was written{advice}"
        )
    return tolerance


def _ask_quantized_run(
    adapter: Path,
    base: Base,
    other: BaseKind,
    dtype: torch.dtype | str,
    device: torch.device,
    probes: Probes,
    directory: Path,
) -> tuple[_Asked, Answers]:
    """For an adapter trained through 4 or 8 bits: what else there is to compare with.

    Returns:
        The answers on the base that was not merged into, and those of the merged weights rounded to training's own
        few bits, which is what merging into quantised weights would give.
    """
    model = load_adapter(load_base_of(adapter, base, other, dtype, device), adapter)
    asked = _ask_both(model, probes)
    del model
    release_memory()
    return asked, _ask_reloaded(directory, probes, device, training_quantization(adapter))


def _without_values(identity: dict[str, Any]) -> dict[str, Any]:
    """A base's description, as far as it says more to a reader than to `find_difference`."""
    return {name: value for name, value in identity.items() if name != "values"}


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
    """Merges, saves, reloads, compares, certifies. The output appears only if the comparison holds.

    At most one model is in memory at a time.

    Args:
        adapter: Folder of the adapter, with its tokenizer.
        output: Folder for the merged model; it must not exist yet or be empty, unless `overwrite`.
        base: Which base to merge into.
        dtype: Precision of the merged weights; `"auto"` for the base checkpoint's.
        overwrite: Whether an earlier merged model there is replaced. Anything else there is left alone.
        text: A text file to take perplexity on; see `plainlora.merging.probes`.
        base_model: See `plainlora.run.adapter_base.find_base`.
        allow_other_base: Likewise.

    Raises:
        UserError: The base cannot be had or is another one, the output is in the way, the disk is too small, or the
            merged model differs too much.
        LoRAError: The adapter cannot be read or does not fit.
    """
    check_writable(str(output), "--output")
    adapter, output = Path(adapter), Path(output).resolve()  # `.` has no name to rename to
    check_writable(str(output.parent), "--output")
    found = find_base(adapter, base_model, allow_other_base)
    _check_output(output, {"adapter": adapter, "base model": Path(found.name).expanduser()}, overwrite)
    config = load_config(found.name, found.revision)
    check_mergeable(found.name, config)
    tokenizer = load_tokenizer_of(adapter, found)
    is_classifier = class_labels(adapter) is not None
    make_probes = classifier_probes if is_classifier else language_probes
    probes = make_probes(tokenizer, context_length(config), text, read_run(adapter))
    device = merging_device(skeleton_of(adapter, found), dtype)
    with staged(output) as scratch:
        merged_dtype, probes, chosen = _merge_into(scratch, adapter, found, base, dtype, device, probes, output)
        merged = _ask_reloaded(scratch, probes, device)
        drift = agreement(chosen.adapter, merged)
        tolerance = _check_drift(drift["relative_diff"], merged_dtype)
        asked = {base: chosen}
        figures: dict[str, Any] = {}
        quantization = training_quantization(adapter)
        if quantization is not None:
            other: BaseKind = "dequantized" if base == "16bit" else "16bit"
            try:
                asked[other], rounded = _ask_quantized_run(adapter, found, other, dtype, device, probes, scratch)
                figures["requantized"] = _beside(rounded, asked)
            except (UserError, LoRAError, RuntimeError) as error:  # this machine may lack what quantising needs
                figures["not_measured"] = " ".join(str(error).split())
        figures["bases"] = {kind: each.figures() for kind, each in asked.items()}
        figures["merged"] = _beside(merged, asked)
        auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
        certificate = {
            "adapter": {"folder": str(adapter), "sha256": hash_adapter(adapter)},
            "base": {
                "kind": base,
                "identity": _without_values(found.identity),
                "trained_on": found.trained_on and _without_values(found.trained_on),
                "warning": found.warning,
                "quantization_config": quantization,
            },
            "merged": {
                "dtype": str(merged_dtype).removeprefix("torch."),
                "auto_class": auto_class,
                "sha256": hash_files(scratch),
            },
            "figures": figures,
            "tolerance": tolerance,
            "measured_on": {
                "prompts": [] if is_classifier else list(PROMPTS),
                "text": probes.source,
                "rows": probes.rows,
                "tokens": probes.tokens,
            },
            "versions": package_versions(),
        }
        write_json(scratch / CERTIFICATE, certificate)
    warnings = [found.warning] if found.warning else []
    if figures["bases"][base]["adapter"]["against_base"]["max_abs_diff"] == 0:
        warnings.append("the adapter changes no logit: the merged model answers as its base does")
    if "not_measured" in figures:
        warnings.append(f"what training saw could not be measured: {figures['not_measured']}")
    return MergeResult(
        drift["max_abs_diff"], drift["relative_diff"], tolerance, merged_dtype, auto_class, certificate, warnings
    )
