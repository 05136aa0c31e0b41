"""The summary of a run, printed at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plainlora.backends import BACKENDS, choose_loader
from plainlora.base.config import check_mergeable, load_config
from plainlora.data.prompts import INPUT_MARK
from plainlora.errors import UserError
from plainlora.hub.model_card import describe_merge
from plainlora.lora.errors import LoRAError
from plainlora.merging.merge import MergeResult
from plainlora.report import Sample
from plainlora.run.adapter_base import Base, base_of, read_run, skeleton_of


def summary(results: dict[str, Any], output_dir: str, samples: Sequence[Sample]) -> str:
    """The summary of a run of `sft.py`: figures, some answers before and after training, next commands."""
    lines = ["", _trained_share(results)]
    for title, key, form in (
        ("test loss", "eval_loss", "{:.3f}"),
        ("test perplexity", "eval_perplexity", "{:.1f}"),
        ("exact match", "exact_match", "{:.1%}"),
    ):
        if f"{key}_base" in results:
            before, after = results[f"{key}_base"], results.get(f"{key}_adapter", results.get(key))
            lines.append(f"{title:<22}{form.format(before)} -> {form.format(after)}")
    for prompt, before, after in samples:
        lines += [
            "",
            f"  {_one_line(prompt.replace(INPUT_MARK, ' '))}",
            f"    base   {_one_line(before)}",
            f"    tuned  {_one_line(after)}",
        ]
    answers = " samples.md," if samples else ""
    whole = results["method"] != "lora"
    kept = "model" if whole else "adapter"
    lines += ["", f"{kept}, model card,{answers} loss.png, all_results.json: {output_dir}", *_curves(output_dir)]
    lines.append(f'next: plainlora generate --{kept} {output_dir} --prompt "..."')
    return "\n".join(lines + ([] if whole else _merge_hint(output_dir)))


def classifier_summary(results: dict[str, Any], output_dir: str) -> str:
    """The summary of a run of `classify.py`: accuracy before and after training, cost, next commands."""
    lines = ["", _trained_share(results)]
    for split in ("training", "validation", "test"):
        if f"{split}_accuracy" in results:
            before, after = results[f"{split}_accuracy_base"], results[f"{split}_accuracy"]
            lines.append(f"{split + ' accuracy':<22}{before:.1%} -> {after:.1%}  of {results[f'{split}_rows']:,} rows")
    lines.append(f"training took         {results['train_runtime']:.0f} s, at most {_peak_memory(results)}")
    whole = results["method"] != "lora"
    lines += [
        "",
        f"{'model' if whole else 'adapter'}, model card, confusion.png, loss.png, all_results.json: {output_dir}",
        *_curves(output_dir),
        f'next: plainlora predict --model {output_dir} --text "..."',
    ]
    return "\n".join(lines + ([] if whole else _merge_hint(output_dir)))


def merge_figures(result: MergeResult) -> dict[str, float]:
    """The figures of a merge in `all_results.json`."""
    return {
        "merge_max_abs_diff": result.max_abs_diff,
        "merge_relative_diff": result.relative_diff,
        "merge_tolerance": result.tolerance,
    }


def merge_summary(results: dict[str, Any], merged: Path) -> str:
    """A line about the merged model in this folder, from results with `merge_figures`."""
    return f"merged model: {merged}; reloaded, its logits differ by at most {describe_merge(results)}"


def _trained_share(results: dict[str, Any]) -> str:
    trainable, total = results["trainable_params"], results["total_params"]
    return f"trainable parameters  {trainable:,} of {total:,} ({trainable / total:.2%})"


def _peak_memory(results: dict[str, Any]) -> str:
    reserved = results.get("peak_memory_reserved_bytes")
    held = f"{results['peak_memory_bytes'] / 1e9:.1f} GB"
    return held if reserved is None else f"{held} ({reserved / 1e9:.1f} GB reserved)"


def _curves(output_dir: str) -> list[str]:
    events = Path(output_dir) / "runs"  # where Trainer's TensorBoard callback writes
    return [f"curves: tensorboard --logdir {events}"] if events.is_dir() else []


def _merge_hint(output_dir: str) -> list[str]:
    """The command that merges an adapter; none if its run merges it, or if it cannot be merged."""
    if read_run(output_dir).get("arguments", {}).get("merge") or not _can_be_merged(output_dir):
        return []
    return [f"      plainlora merge --adapter {output_dir} --output {output_dir}-merged"]


def _can_be_merged(adapter: str) -> bool:
    """Whether `plainlora merge` takes an adapter, as far as that can be told without weights."""
    try:
        base = Base(*base_of(adapter))
        check_mergeable(base.name, load_config(base.name, base.revision))
        skeleton = skeleton_of(adapter, base)
        backend = choose_loader(adapter, skeleton)
        if skeleton is not None and backend is BACKENDS["peft"]:  # the hand-written LoRA can always be merged
            backend.merge(backend.load(skeleton, adapter))
    except (UserError, LoRAError):
        return False
    return True


def _one_line(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
