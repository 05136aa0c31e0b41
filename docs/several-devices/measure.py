"""Counted and measured memory and traffic of real runs under each engine, for `measured.json` and `measured.md`.

    python -m docs.several-devices.measure

Bases of a few ten million weights are made from their configs. Every case is asked of the doctor, which loads no
weight, and then trained for five optimizer steps by `recipes/sft.py` in two or four processes on the CPU, see
`probe.py`. Compared are the bytes that a process holds at most in its steps beyond what it held before the base was
loaded, of all processes the one that held most, with the doctor's total; and the bytes that it sent in its last step,
with the doctor's. What DeepSpeed sets aside for gradients is left out of the total: a CPU gives memory only for what
is written, and little is.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import plainlora.quiet  # noqa: F401
from docs.measuring import ROOT
from plainlora.doctor.examine import examine
from plainlora.report import package_versions
from plainlora.resources.devices import Devices

HERE = Path(__file__).parent
RECIPE = "recipes/quickstart/lora.yaml"
ROWS, STEPS = 100, 5
CONFIGS = {"DDP": "ddp", "ZeRO-2": "deepspeed_zero2", "FSDP2": "fsdp2", "ZeRO-3": "deepspeed_zero3"}
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 2048}
BASES = {
    "27 M": WIDE,
    "53 M": WIDE | {"num_hidden_layers": 16},
    "59 M, words": WIDE | {"vocab_size": 32768},  # untied, 33.6 M of them embedding and head
}
PACKED = ("--packing", "true", "--max_length", "512", "--per_device_train_batch_size", "1")
AGAIN = ("--gradient_checkpointing", "true")
CASES: list[tuple[int, str, str, tuple[str, ...]]] = [
    (2, "27 M", "1 x 512", PACKED),
    (2, "53 M", "1 x 512, checkpointing", (*PACKED, *AGAIN)),
    (2, "59 M, words", "1 x 512, checkpointing", (*PACKED, *AGAIN)),
    (2, "27 M", "1 x 512, r=64, two accumulated", (*PACKED, "--lora_r", "64", "--gradient_accumulation_steps", "2")),
    (4, "53 M", "1 x 512, checkpointing", (*PACKED, *AGAIN)),
    (4, "27 M", "8 rows of up to 66", ("--per_device_train_batch_size", "8")),
]


def make_base(folder: Path, sizes: dict[str, int]) -> None:
    """A Llama of random weights, with the quickstart's tokenizer."""
    config = LlamaConfig(**sizes, num_attention_heads=8, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base").save_pretrained(folder)


def launch(folder: Path, engine: str, processes: int, cases: list[tuple[list[str], str]]) -> None:
    """Runs cases of one engine and number of processes.

    Raises:
        RuntimeError: One failed; the error has the end of its output.
    """
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases), encoding="utf-8")
    command = ["-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", f"accelerate_configs/{CONFIGS[engine]}.yaml"]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(HERE / "probe.py"), str(listed)]
    # glibc raises this limit, its own default, when large blocks are freed; they would then stay in its heap.
    heap = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | heap | threads | no_gpu | paths,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stdout[-3000:]}{done.stderr[-9000:]}")


def count(flags: list[str], processes: int, engine: str) -> dict[str, Any]:
    """What the doctor says of one device under an engine."""
    found = examine(RECIPE, flags, lambda _: None, Devices(processes, 10**12)).footprint
    assert found is not None
    assert found.devices is not None
    return next(vars(need) for need in found.devices.engines if need.engine == engine)


def read(file: str, processes: int) -> dict[str, int]:
    """The process that held most."""
    found = [json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8")) for rank in range(processes)]
    return {
        "held": max(each["peak"] - each["before"] for each in found),
        "held_until_the_second_step": max(each["first"] - each["before"] for each in found),
        "sent": max(each["sent"][-1] for each in found),
        "received": max(each["received"][-1] for each in found),
    }


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| engine | processes | base | run | counted | held | error | sent, counted | sent | error |"]
    lines.append("|---|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for case in results["cases"]:
        figures = [case["counted"], case["held"], case["counted_sent"], case["sent"]]
        counted, held, counted_sent, sent = (f"{figure / 1e6:.1f} MB" for figure in figures)
        errors = [case["counted"] / case["held"] - 1, case["counted_sent"] / case["sent"] - 1]
        memory, bytes_sent = (f"{error:+.1%}" for error in errors)
        lines.append(
            f"| {case['engine']} | {case['processes']} | {case['base']} | {case['run']} "
            f"| {counted} | {held} | {memory} | {counted_sent} | {sent} | {bytes_sent} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"{results['machine']}. {versions}.", ""])


def main() -> None:
    """Measures every case and writes both files after each launch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", default=list(CONFIGS), choices=CONFIGS, help="measure these anew")
    asked = parser.parse_args()
    target, began = HERE / "measured.json", time.monotonic()
    found = json.loads(target.read_text(encoding="utf-8"))["cases"] if target.is_file() else []
    known = {(case["engine"], case["processes"], case["base"], case["run"]): case for case in found}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (ROOT / "recipes/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(rows[:ROWS]), encoding="utf-8")
        for base, sizes in BASES.items():
            make_base(folder / base, sizes)
        for engine in asked.engines:
            for processes in sorted({case[0] for case in CASES}):
                here = [case[1:] for case in CASES if case[0] == processes]
                cases = []
                for number, (base, _, flags) in enumerate(here):
                    words = ["--model_name_or_path", str(folder / base), "--dataset_name", str(folder / "rows.jsonl")]
                    words += ["--max_steps", str(STEPS), "--save_strategy", "no", "--eval_strategy", "no"]
                    words += [
                        "--merge",
                        "false",
                        "--exact_match_rows",
                        "0",
                        "--per_device_eval_batch_size",
                        "1",
                        *flags,
                    ]
                    words += ["--output_dir", str(folder / f"{engine}-{processes}-{number}")]
                    cases.append((words, str(folder / f"{engine}-{processes}-{number}.json")))
                launch(folder, engine, processes, [(["--config", RECIPE, *words], file) for words, file in cases])
                for (words, file), (base, run, _) in zip(cases, here, strict=True):
                    parts = count(words, processes, engine)
                    counted = {"counted": parts["total"] - parts["buckets"], "counted_sent": parts["sent"]}
                    case = {"engine": engine, "processes": processes, "base": base, "run": run}
                    known[engine, processes, base, run] = case | counted | read(file, processes) | {"parts": parts}
                results = {
                    "cases": list(known.values()),
                    "machine": f"{os.cpu_count()} CPU cores, {' '.join(platform.libc_ver())}",
                    "versions": package_versions(),
                }
                target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
                (HERE / "measured.md").write_text(table(results), encoding="utf-8")
                print(f"{engine}, {processes} processes: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
