"""Adapter directory -> merged model directory, checked by reloading it.

A merge that nobody looked at is a guess (peft#2321, unsloth#2142): the model is written, loaded again by a process
that knows nothing of adapters, and its logits are compared with those of the adapter model.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainlora.adapter_base import BaseKind, base_of, class_labels, load_base_of, load_tokenizer_of
from plainlora.checkpoints import is_merged_model
from plainlora.checks import check_writable
from plainlora.data.prompts import render_prompt
from plainlora.errors import UserError
from plainlora.lora.load import load_adapter
from plainlora.lora.merge import merge
from plainlora.report import package_versions, write_json

# Largest |difference| of a logit over the largest |logit|. fp32: the sum of products is merely reordered. Half
# precision rounds each merged weight once, a relative error of 2^-11 (fp16) or 2^-8 (bf16) that adds up over layers.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# What only sampling reads. Published configs set some of it beside do_sample=false, and cannot be saved once changed.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

PROBES = (
    "Name three primary colours.",
    "Why should someone be writing blogs about their field?",
    "Write one sentence about the sea.",
    "2 + 2 =",
)


@dataclass
class MergeResult:
    """What `merge_adapter` found.

    Attributes:
        max_abs_diff: Largest difference between a logit of the adapter model and of the reloaded merged model.
        relative_diff: The same over the largest logit (dimensionless).
        tolerance: What `relative_diff` was held to.
        dtype: Precision of the merged weights.
        auto_class: What loads the merged model.
    """

    max_abs_diff: float
    relative_diff: float
    tolerance: float
    dtype: torch.dtype
    auto_class: str


def _probes(tokenizer: PreTrainedTokenizerBase, classifier: bool) -> dict[str, torch.Tensor]:
    """Token ids of the texts to compare on: rendered by training's template, or as a classifier reads them."""
    if classifier:
        return {str(at): tokenizer(probe, return_tensors="pt").input_ids for at, probe in enumerate(PROBES)}
    texts = [render_prompt(probe, tokenizer) for probe in PROBES]
    return {
        str(at): tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for at, text in enumerate(texts)
    }


@torch.no_grad()
def _probe_logits(model: PreTrainedModel, probes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.eval()
    device = next(model.parameters()).device
    return {name: model(input_ids=ids.to(device)).logits.float().cpu() for name, ids in probes.items()}


def _reloaded_logits(directory: Path, probes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the saved model, from a process in which plain Transformers loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        questions, answers = Path(scratch) / "probes.safetensors", Path(scratch) / "logits.safetensors"
        save_file(probes, questions)
        program = Path(__file__).with_name("reload.py")
        command = [sys.executable, str(program), str(directory), str(questions), str(answers)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise UserError(f"the merged model cannot be loaded by plain Transformers: {run.stderr.strip()[-400:]}")
        return load_file(answers)


def _write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
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
        raise UserError(f"{output} was not written by `plainlora merge` (it has no merge.json); give another --output")


def _put_in_place(scratch: Path, output: Path) -> None:
    """Renames `scratch` to `output`; what was there is deleted only once the new folder has taken its place."""
    scratch.chmod(0o755)  # mkdtemp makes it private
    if not output.exists():
        scratch.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        output.rename(aside / output.name)
        try:
            scratch.rename(output)
        except OSError:
            (aside / output.name).rename(output)
            raise
    except OSError as error:  # a mount point, for one
        aside.rmdir()
        raise UserError(f"{output} cannot be replaced ({error}); give another --output") from error
    shutil.rmtree(aside)


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: BaseKind = "16bit",
    dtype: torch.dtype | str = "auto",
    overwrite: bool = False,
) -> MergeResult:
    """Merges, saves, reloads and compares. The output appears only if the comparison holds.

    Args:
        adapter: Folder of the adapter, with its tokenizer.
        output: Folder for the merged model; it must not exist yet or be empty, unless `overwrite`.
        base: Which base to merge into.
        dtype: Precision of the merged weights; `"auto"` for the base checkpoint's.
        overwrite: Whether an earlier merged model there is replaced. Anything else there is left alone.

    Raises:
        UserError: The base cannot be had, the output is in the way, or the merged model differs too much.
        LoRAError: The adapter cannot be read or does not fit.
    """
    check_writable(str(output), "--output")
    adapter, output = Path(adapter), Path(output).resolve()  # `.` has no name to rename to
    check_writable(str(output.parent), "--output")
    name, _ = base_of(adapter)
    _check_output(output, {"adapter": adapter, "base model": Path(name)}, overwrite)
    tokenizer = load_tokenizer_of(adapter)
    model = load_adapter(load_base_of(adapter, base, dtype), adapter)
    merged_dtype = next(model.parameters()).dtype

    classifier = class_labels(adapter) is not None
    auto_class = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    probes = _probes(tokenizer, classifier)
    before = _probe_logits(model, probes)
    merged = merge(model)

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write_merged(merged, tokenizer, scratch)
        after = _reloaded_logits(scratch, probes)
        difference = max(float((before[key] - after[key]).abs().max()) for key in before)
        scale = max(float(logits.abs().max()) for logits in before.values())
        tolerance = TOLERANCES.get(merged_dtype, 1e-5)
        result = MergeResult(difference, difference / scale, tolerance, merged_dtype, auto_class)
        if not result.relative_diff <= result.tolerance:
            advice = "" if merged_dtype == torch.float32 else "; try --dtype float32"
            raise UserError(
                f"the merged model differs from the adapter model by {result.relative_diff:.1e} of the largest "
                f"logit, more than the {result.tolerance:.0e} allowed for {merged_dtype}; nothing was written{advice}"
            )
        write_json(
            scratch / "merge.json",
            {
                "adapter": str(adapter),
                "base": base,
                "base_model": name,
                "dtype": str(merged_dtype).removeprefix("torch."),
                "max_abs_diff": result.max_abs_diff,
                "relative_diff": result.relative_diff,
                "tolerance": result.tolerance,
                "prompts": list(PROBES),
                "versions": package_versions(),
            },
        )
        _put_in_place(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result
