"""The figures of a merge for `certificate.json`, and as a table for the terminal.

A certificate holds no date and nothing else that varies: the same inputs, versions and machine give the same bytes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from plainlora.folders import sha256_of
from plainlora.run.folder import ADAPTER

CERTIFICATE = "certificate.json"
Answers = Mapping[str, torch.Tensor]  # see plainlora.merging.reload.ask


def perplexity(answers: Answers) -> dict[str, Any]:
    """The perplexity: `exp` of the mean cross-entropy over all tokens of the texts.

    Returns:
        `perplexity`, which is `None` for a classifier, `perplexity_rows` and `perplexity_tokens`.
    """
    nats, tokens = answers["losses"].sum(0).tolist()
    value = math.exp(min(nats / tokens, 700.0)) if tokens else None
    return {"perplexity": value, "perplexity_rows": len(answers["losses"]), "perplexity_tokens": int(tokens)}


def mean_loss(answers: Answers) -> float:
    """The mean cross-entropy over all tokens of the texts, in nats."""
    nats, tokens = answers["losses"].sum(0).tolist()
    return float(nats / tokens)


def drift(expected: Answers, found: Answers) -> tuple[float, float]:
    """The largest difference of a logit, and the same divided by the largest expected logit (dimensionless).

    Both are NaN if a logit is. The second is 0 if the first is.
    """
    names = [name for name in expected if name.startswith("logits.")]
    difference, scale = torch.zeros(()), torch.zeros(())
    for name in names:  # torch's maximum, unlike Python's, keeps a NaN
        difference = torch.maximum(difference, (expected[name] - found[name]).abs().max())
        scale = torch.maximum(scale, expected[name].abs().max())
    return float(difference), float(difference / scale) if difference != 0 else 0.0


def agreement(expected: Answers, found: Answers) -> dict[str, Any]:
    """Compares the answers of two models.

    Returns:
        `max_abs_diff` and `relative_diff`: see `drift`. For a language model also the numbers of `prompts` and of
        `positions` with logits; `tokens`, `equal_tokens` and `equal_share` of the likeliest tokens along the answers;
        and `first_difference`, the prompt and the position in its answer, from 0, or `None`. For a classifier also
        `classes`, the number of texts, and `equal_classes`, how many of them get the same class.
    """
    difference, relative = drift(expected, found)
    figures: dict[str, Any] = {"max_abs_diff": difference, "relative_diff": relative}
    prompts = sorted((name for name in expected if name.startswith("tokens.")), key=_number)
    if prompts:
        equal = {name: (expected[name] == found[name]).tolist() for name in prompts}
        differing = [(_number(name), flags.index(False)) for name, flags in equal.items() if not all(flags)]
        tokens, same = sum(map(len, equal.values())), sum(map(sum, equal.values()))
        first = dict(zip(("prompt", "position"), differing[0], strict=True)) if differing else None
        positions = sum(logits.shape[1] for name, logits in expected.items() if name.startswith("logits."))
        figures |= {"prompts": len(prompts), "positions": positions}
        figures |= {"tokens": tokens, "equal_tokens": same, "equal_share": same / tokens, "first_difference": first}
    else:
        logits = [name for name in expected if name.startswith("logits.")]
        same = sum(int(expected[name].argmax(-1)) == int(found[name].argmax(-1)) for name in logits)
        figures |= {"classes": len(logits), "equal_classes": same}
    return figures


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its name in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def hash_adapter(adapter: Path) -> dict[str, str]:
    """SHA-256 of the two files that an adapter consists of."""
    return {name: sha256_of(adapter / name) for name in ADAPTER}


def table(certificate: dict[str, Any]) -> str:
    """The figures as a table: a line for each model, then what they were measured on."""
    figures, kind = certificate["figures"], certificate["base"]["kind"]
    both = len(figures["bases"]) > 1  # an adapter of a quantised run has two bases: the original, and what it saw
    names = {"16bit": "original base", "dequantized": "base as training saw it"} if both else {kind: "base"}
    rows = []
    for each, found in figures["bases"].items():
        rows += [_row(names[each], found["base"]), _row("  with the adapter", found["adapter"])]
    rows.append(_row("merged, reloaded", figures["merged"], figures["merged"]["against"][kind]))
    if both:
        (other,) = figures["bases"].keys() - {kind}
        beside = "what was trained" if other == "dequantized" else "the adapter on the original"
        rows.append(_row(f"  beside {beside}", {}, figures["merged"]["against"][other]))
        rounded = figures["requantized"]
        rows.append(_row("merged, then quantised again", rounded, rounded["against"]["dequantized"]))
    unit = "equal classes" if "classes" in figures["merged"]["against"][kind] else "equal tokens"
    lines = [f"{'':<34}{'perplexity':>10}  {unit:>13}  logits differ by at most"]
    lines += [f"{name:<34}{measured:>10}  {equal:>13}  {drift}".rstrip() for name, measured, equal, drift in rows]
    on, merged = certificate["measured_on"], figures["merged"]["against"][kind]
    what = f"{on['text']} ({on['rows']} rows, {on['tokens']:,} tokens)"
    if "prompts" in merged:
        asked = f"{merged['prompts']} prompts with their answers ({merged['positions']:,} tokens)"
        return "\n".join([*lines, f"perplexity on {what}; tokens and logits on {asked}"])
    return "\n".join([*lines, f"measured on {what}"])


def _row(name: str, figures: dict[str, Any], beside: dict[str, Any] | None = None) -> tuple[str, str, str, str]:
    measured = f"{figures['perplexity']:.3f}" if figures.get("perplexity") is not None else ""
    if beside is None:
        return name, measured, "", ""
    equal, of = ("equal_tokens", "tokens") if "tokens" in beside else ("equal_classes", "classes")
    drift = f"{beside['max_abs_diff']:.1e}, {beside['relative_diff']:.1e} of the largest"
    return name, measured, f"{beside[equal]} of {beside[of]}", drift
