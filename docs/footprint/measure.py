"""Predicted and measured peak memory of real runs, side by side, for `footprint.json` and `footprint.md`.

    python -m docs.footprint.measure --gpt2 PATH --qwen2 PATH --dataset FILE

Every case is asked of `plainlora doctor --json`, which loads no weight, and then trained for two optimizer steps and
evaluated by `recipes/sft.py`, each in a process of its own; `all_results.json` holds what the process has held. Bases
and rows are the recipes' own from the Hub where no path is given. Memory does not depend on the weights' values.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from docs.measuring import run
from plainlora.report import package_versions

HERE = Path(__file__).parent
START = "from plainlora.commands import main; main()"
RECIPES = {
    "GPT-2 124M": "recipes/gpt2-alpaca-gpt4/lora.yaml",
    "Qwen2-0.5B": "recipes/qwen2-0.5b-alpaca-gpt4/lora.yaml",
}
KEPT = ("--gradient_checkpointing", "false")
AGAIN = ("--gradient_checkpointing", "true")
ONE = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1")
FOUR = ("--gradient_accumulation_steps", "2")

# What distinguishes each case from its recipe: packed to 1024 tokens, r=2 on every linear layer, fp32, fused.
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("GPT-2 124M", "1 x 1024", (*ONE, *KEPT)),
    ("GPT-2 124M", "1 x 1024, checkpointing", (*ONE, *AGAIN)),
    ("GPT-2 124M", "4 x 1024, accumulated, as its recipe", (*FOUR, *KEPT)),
    ("GPT-2 124M", "1 x 1024, base dropouts kept", (*ONE, *KEPT, "--base_dropout", "0.1")),
    ("GPT-2 124M", "1 x 1024, bf16 mixed precision", (*ONE, *KEPT, "--precision", "bf16", "--dtype", "float32")),
    ("GPT-2 124M", "1 x 1024, base in bf16", (*ONE, *KEPT, "--dtype", "bfloat16")),
    ("GPT-2 124M", "1 x 1024, base in NF4", (*ONE, *KEPT, "--load_in_4bit", "true")),
    ("GPT-2 124M", "1 x 1024, reference", (*ONE, *KEPT, "--lora_backend", "reference")),
    ("GPT-2 124M", "1 x 1024, PEFT", (*ONE, *KEPT, "--lora_backend", "peft")),
    ("Qwen2-0.5B", "1 x 1024", (*ONE, *KEPT)),
    ("Qwen2-0.5B", "1 x 1024, checkpointing", (*ONE, *AGAIN)),
    ("Qwen2-0.5B", "1 x 1024, bf16 mixed precision", (*ONE, *KEPT, "--precision", "bf16", "--dtype", "float32")),
    ("Qwen2-0.5B", "1 x 1024, base in NF4", (*ONE, *KEPT, "--load_in_4bit", "true")),
]


def measure(recipe: str, flags: list[str]) -> dict[str, Any]:
    """One case: the peak as predicted and as measured, in bytes, and the error relative to the latter."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *("--precision", "fp32", *flags),  # of a flag that is given twice, the last counts
            *("--output_dir", folder, "--max_steps", "2", "--save_strategy", "no"),
            *("--eval_strategy", "steps", "--eval_steps", "2"),  # after training it would not be measured
            *("--exact_match_rows", "0", "--max_new_tokens", "1", "--report_to", "none", "--test_split_size", "20"),
        ]
        doctor = run("-c", START, "doctor", "--config", recipe, "--json", "--", *flags)
        predicted = json.loads(doctor)["footprint"]["memory"]
        run("recipes/sft.py", "--config", recipe, *flags)
        measured = json.loads((Path(folder) / "all_results.json").read_text())["peak_memory_bytes"]
    names = ("peak", "libraries", "weights", "adapters", "optimizer", "margin", "mapped", "checkpointing")
    names += ("activations", "activations_checkpointed", "evaluation", "loss_head")
    return {
        "predicted": predicted["peak"],
        "measured": measured,
        "error": predicted["peak"] / measured - 1,
        "parts": {name: predicted[name] for name in names[1:]},
    }


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| base | run | predicted | measured | error |", "|---|---|---:|---:|---:|"]
    for case in results["cases"]:
        predicted, measured = (f"{case[name] / 1e9:.2f} GB" for name in ("predicted", "measured"))
        error = f"{case['error']:+.1%}"
        bold = f"**{error}**" if abs(case["error"]) > 0.15 else error
        lines.append(f"| {case['base']} | {case['run']} | {predicted} | {measured} | {bold} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"{results['machine']}. {versions}.", ""])


def main() -> None:
    """Measures every case and writes both files after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", help="folder of a GPT-2 small")
    parser.add_argument("--qwen2", help="folder of a Qwen2-0.5B")
    parser.add_argument("--dataset", help="file of the rows")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to measure anew, from 0")
    asked = parser.parse_args()
    paths = {"GPT-2 124M": asked.gpt2, "Qwen2-0.5B": asked.qwen2}
    target = HERE / "footprint.json"
    found = json.loads(target.read_text())["cases"] if target.is_file() and asked.only else []
    known = {(case["base"], case["run"]): case for case in found}
    for number, (base, name, flags) in enumerate(CASES):
        if asked.only and number not in asked.only:
            continue
        given = [*flags]
        given += ["--model_name_or_path", paths[base]] if paths[base] else []
        given += ["--dataset_name", asked.dataset] if asked.dataset else []
        known[base, name] = {"base": base, "run": name} | measure(RECIPES[base], given)
        print(table({"cases": [known[base, name]], "machine": "", "versions": {}}).splitlines()[2], flush=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
        results = {
            "cases": [known[case[:2]] for case in CASES if case[:2] in known],
            "machine": f"{device}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
            "versions": package_versions(),
        }
        target.write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "footprint.md").write_text(table(results))


if __name__ == "__main__":
    main()
