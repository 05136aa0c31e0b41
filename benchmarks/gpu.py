"""What a GPU shows, in one command of at most ten minutes: `make bench-gpu`, or `python -m benchmarks.gpu`.

It needs this checkout and the libraries, no network and no file besides; without an installation `PYTHONPATH=src`.
In this order: the tests that are marked `gpu`; the Llama-2-7b recipe's step, in fp16 as on the T4 of its source and in
bf16; Qwen2-0.5B and GPT-2 on packed rows. Each has its own time, and what was measured is written as soon as it is
there, into one JSON file and a Markdown file beside it.

The two variants, this project's form and PEFT with TRL, are processes of their own, so that the allocator's peaks are
each variant's own; they share the card, and their steps are timed interleaved. Both have the same random weights, at
full size, the same rows in the same order, and what they train in fp32. The peak that the doctor predicts comes last.
"""

import plainlora.quiet  # noqa: F401, I001

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.case import FUSED, MATCHED, PEFT, Case
from benchmarks.language import plan_run
from benchmarks.interleave import Outcome, time_interleaved
from benchmarks.ratios import loss_differences, ratio
from benchmarks.report import amount, describe_machine, duration, machine, to_json
from plainlora.errors import one_line_errors
from plainlora.report import package_versions, write_json
from plainlora.resources.footprint import estimate

ROOT = Path(__file__).parent.parent
STEPS = {"full": 20, "tiny": 3}  # measured; one more comes first
SECONDS = {"tests": 120, "llama2": 120, "qwen2": 70, "gpt2": 70}  # llama2 twice: 500 of 600; tiny takes what it needs
COLUMNS = (
    *("case", "variant", "trained in", "steps", "median", "min", "max", "time / peft", "tokens/s"),
    *("peak", "reserved", "predicted", "first loss", "last loss"),
)
NAMES = {
    "llama2": "Llama-2-7b NF4, r=8 on q_proj and v_proj, 4 rows of Guanaco",
    "qwen2": "Qwen2-0.5B, r=2 on every linear layer, packed 4 x 1024",
    "gpt2": "GPT-2 124M, r=2 on every linear layer, packed 4 x 1024",
}


def cases(size: str) -> list[Case]:
    """The steps that are timed. A tiny case says so in its name: its figures mean nothing."""
    llama2 = {"nf4": True, "r": 8, "p": 0.1, "rows": "guanaco", "count": 4 * (STEPS[size] + 1)}
    packed = {"packed": True, "r": 2, "base_dropout": 0.0, "rows": "alpaca"}
    shared = {"size": size, "batch": 4, "length": 1024 if size == "full" else 64}
    found = []
    for model, dtype in (("llama2", "float16"), ("llama2", "bfloat16"), ("qwen2", "bfloat16"), ("gpt2", "bfloat16")):
        name = f"{NAMES[model]}, {dtype}"
        options = shared | (llama2 if model == "llama2" else packed) | {"model": model, "dtype": dtype}
        training = {"learning_rate": 2e-4, "gradient_checkpointing": model == "llama2"}
        training |= {"fp16": dtype == "float16", "bf16": dtype == "bfloat16"}
        variants = {variant: {"backend": variant, "training": training} for variant in (FUSED, PEFT)}
        found.append(Case("gpu", name if size == "full" else f"tiny, in place of {name}", variants, options, MATCHED))
    return found


def run_tests(seconds: float | None) -> dict[str, Any]:
    """The tests marked `gpu`: by outcome, as far as they came; if not all is well, the end of what was printed."""
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-vv", "--color=no", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen([*command, "tests"], cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = run.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(run.pid, signal.SIGKILL)  # with what the tests have started
            run.wait()
        output.seek(0)
        printed = output.read()
    ended = re.findall(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)", printed, flags=re.MULTILINE)
    words = {"passed": ("PASSED",), "failed": ("FAILED", "ERROR"), "not run": ("SKIPPED",)}
    found: dict[str, Any] = {name: [test for test, word in ended if word in those] for name, those in words.items()}
    found["ended"] = f"with exit code {code}" if code is not None else f"cut off after {seconds} s"
    return found if code == 0 else found | {"printed": printed[-10_000:]}


def measure(case: Case, device: str, size: str, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Times the variants of a case: what was measured of each, and how far their losses are apart."""
    try:
        seconds = SECONDS[case.options["model"]] if size == "full" else math.inf
        outcome = time_interleaved("language", case, device, STEPS[size], progress=progress, seconds=seconds)
        found = {"figures": {variant: figures(outcome, variant) for variant in case.variants}}
        return to_json(outcome) | found | differences(outcome)
    except Exception as error:  # whatever a library raises: the next case is measured all the same
        return {"name": case.name, "failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}


def figures(outcome: Outcome, variant: str) -> dict[str, Any]:
    """What one variant's times come to: over PEFT's, round by round, and tokens with a label a second."""
    seconds, tokens = outcome.seconds[variant], outcome.facts[variant]["tokens"]
    middle, low, high = ratio(outcome, "time", variant, PEFT)
    return {
        "time / peft": {"median": middle, "min": low, "max": high},
        "tokens a second": sum(tokens[1 : len(seconds) + 1]) / sum(seconds),  # the first is not measured
    }


def differences(outcome: Outcome) -> dict[str, float]:
    """The relative difference of both losses: at the first step, where B = 0, and the largest of all steps."""
    found = loss_differences(outcome, FUSED)
    return {"first difference": found[0], "largest difference": max(found)}


def predict(case: Case, variant: str, device: str) -> int | None:
    """The peak that the doctor predicts for a variant, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        return estimate(plan_run(case.options | case.variants[variant], device, folder)).memory.peak


def card() -> str | None:
    """Name, driver and memory of each GPU, as `nvidia-smi` says."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def markdown(found: dict[str, Any]) -> str:
    """The tests, a table of every variant, and the losses."""
    tests, done = found["tests"], [case for case in found["cases"] if "figures" in case]
    counts = ", ".join(f"{len(tests[name])} {name}" for name in ("passed", "failed", "not run"))
    lines = [f"Card: {found['card']}; CUDA {found['cuda']}; {found['described']}", ""]
    lines += [f"Tests marked `gpu`: {counts}; ended {tests['ended']}."]
    lines += [f"- failed: {test}" for test in tests["failed"]]
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(cells(case, variant))} |" for case in done for variant in case["figures"]]
    lines += ["", "Relative difference of the two variants' losses, at the first step and at most:", ""]
    lines += [f"- {case['name']}: {case['first difference']:.1e}, {case['largest difference']:.1e}" for case in done]
    lines += [f"- not measured: {case['name']}: {case['failed']}" for case in found["cases"] if "failed" in case]
    return "\n".join([*lines, ""])


def cells(case: dict[str, Any], variant: str) -> list[str]:
    """One variant's row of the table."""
    facts, figure, times = case["facts"][variant], case["figures"][variant], case["summary"][variant]
    sizes = [facts["peak"], facts.get("peak reserved"), figure.get("predicted")]
    return [
        *(case["name"], variant, ", ".join(facts["trained in"]), str(len(case["seconds"][variant]))),
        *(duration(times[name]) for name in ("median", "min", "max")),
        "{median:.2f} ({min:.2f} to {max:.2f})".format(**figure["time / peft"]),
        f"{figure['tokens a second']:,.0f}",
        *("" if size is None else amount(size) for size in sizes),
        *(f"{facts['losses'][place]:.5f}" for place in (0, -1)),
    ]


def main() -> int:
    """Runs all of it; 1 if a test or a case failed or was cut off, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: to see that it runs")
    parser.add_argument("--json", type=Path, default="outputs/gpu/gpu.json", help="Markdown is written beside it")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.size == "full":
        print("error: there is no GPU here; --size tiny shows that it runs", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"card": card(), "cuda": torch.version.cuda, "described": describe_machine()}
    found |= {"machine": machine(), "versions": package_versions(), "cases": []}
    started = time.monotonic()

    def write() -> None:
        found["seconds"] = time.monotonic() - started
        write_json(arguments.json, found)
        arguments.json.with_suffix(".md").write_text(markdown(found), encoding="utf-8")

    bar = tqdm(bar_format="{desc}", leave=False, disable=None)  # only on a terminal
    progress = bar.set_description_str
    progress("tests marked gpu")
    found["tests"] = run_tests(SECONDS["tests"] if arguments.size == "full" else None)
    write()
    for case in (chosen := cases(arguments.size)):
        found["cases"].append(measure(case, device, arguments.size, progress))
        write()
    for case, measured in zip(chosen, found["cases"], strict=True):
        for variant, figure in measured.get("figures", {}).items():
            progress(f"predicted memory: {case.name}, {variant}")
            figure["predicted"] = predict(case, variant, device)
            write()
    bar.close()
    print(markdown(found))
    return int("printed" in found["tests"] or any("failed" in case for case in found["cases"]))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
