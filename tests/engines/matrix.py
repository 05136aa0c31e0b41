"""The equality matrix: what two processes compute on each engine beside what one process computes.

    python -m tests.engines.matrix

Every cell launches `recipes/sft.py` by `accelerate launch` with a config that ships, in two processes, and compares it
with one process of twice the per-device batch: the same rows in the same order, fp32, the quickstart's base. It prints
the table and writes `docs/engines/matrix.json` and `docs/engines/matrix.md`.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.report import describe_machine
from plainlora.backends import BACKENDS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "engines"
AT_ONCE = 2  # launches
LONGEST = 600.0  # seconds of a launch
NOT_RUN = "not run"

# The largest difference with which a cell holds. `relative` says how those of tensors are measured.
LIMITS = {"losses": 1e-5, "evaluation": 1e-6, "adapter": 1e-4, "merged": 1e-4, "answers": 0.0}

STEPS = (*("--max_steps", "6"), *("--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9"))
# Adam divides a gradient by its own size: with the usual epsilon, 1e-8, the rounding of a gradient near zero becomes a
# part of a whole step of that weight, for two or three weights of thousands.
PLAIN = (
    *("--config", "recipes/quickstart/lora.yaml", "--precision", "fp32", "--warmup_steps", "0"),
    *("--adam_epsilon", "1e-5"),
    *("--eval_strategy", "no", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
    *("--merge", "false", "--exact_match_rows", "6", "--max_new_tokens", "8"),
)
WHOLE = ("--eval_strategy", "steps", "--eval_steps", "3", "--merge", "true")
NF4 = ("--load_in_4bit", "true")


@dataclass(frozen=True)
class Engine:
    """A column of the table.

    Attributes:
        name: Its head.
        config: A file of `accelerate_configs`, without its suffix.
        base: Flags of the base, of the run in one process too.
        own: Flags of the runs in two processes alone.
    """

    name: str
    config: str
    base: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


ONE = Engine("one process", "cpu")
ENGINES = (
    Engine("DDP", "ddp"),
    Engine("ZeRO-2", "deepspeed_zero2"),
    Engine("ZeRO-3", "deepspeed_zero3"),
    Engine("FSDP2", "fsdp2"),
    Engine("FSDP2, 4 bits sharded", "fsdp2_qlora", NF4, ("--bnb_4bit_quant_storage", "bfloat16")),
)


@dataclass(frozen=True)
class Launch:
    """One `accelerate launch`.

    Attributes:
        name: Of its folder.
        config: As `Engine.config`.
        processes: Number of processes.
        rows: Number of training rows.
        flags: Of the program.
        resumes: The launch whose checkpoint after three steps it goes on from.
    """

    name: str
    config: str
    processes: int
    rows: int
    flags: tuple[str, ...]
    resumes: "Launch | None" = None


@dataclass(frozen=True)
class Cell:
    """One cell: a launch, the one that it must equal, and what is compared, by names of `LIMITS`."""

    case: str
    engine: str
    compared: tuple[str, ...]
    found: Launch
    expected: Launch


# Cases of the default back end that are more flags: these, and the number of training rows.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "packed": ((*STEPS, "--packing", "true", "--max_length", "128"), 400),
    "gradient accumulation": ((*STEPS, "--gradient_accumulation_steps", "2"), 400),
    "gradient checkpointing": ((*STEPS, "--gradient_checkpointing", "true"), 400),
    "a module trained whole": ((*STEPS, "--lora_modules_to_save", "norm"), 400),
    "last batch uneven: 45 rows": (("--num_train_epochs", "2", "--save_strategy", "no"), 45),
}


def whole(engine: Engine, processes: int, backend: str, base: tuple[str, ...]) -> Launch:
    """Training with evaluations and checkpoints, a merge and answers."""
    name = f"{engine.config}, {backend}{', NF4' if base else ''}"
    own = engine.own if processes > 1 else ()
    return Launch(name, engine.config, processes, 400, (*STEPS, *WHOLE, *base, *own, "--lora_backend", backend))


def case_of(engine: Engine, processes: int, case: str, base: tuple[str, ...]) -> Launch:
    """One of `CASES`."""
    flags, rows = CASES[case]
    own = engine.own if processes > 1 else ()
    return Launch(
        f"{engine.config}, {case}{', NF4' if base else ''}", engine.config, processes, rows, (*flags, *base, *own)
    )


def resumed(name: str, onto: Engine, processes: int, earlier: Launch, base: tuple[str, ...]) -> Launch:
    """Three steps from a checkpoint after three."""
    own = onto.own if processes > 1 else ()
    return Launch(f"{onto.config}, {name}", onto.config, processes, 400, (*STEPS, *base, *own), earlier)


def cells() -> Iterator[Cell]:
    """Every cell of the matrix."""
    trained = ("losses", "adapter", "answers")
    for at, engine in enumerate(ENGINES):
        for backend in BACKENDS:
            found = whole(engine, 2, backend, engine.base)
            expected = whole(ONE, 1, backend, engine.base)
            yield Cell(f"plain, {backend}", engine.name, ("losses", "adapter"), found, expected)
            yield Cell(f"evaluation, {backend}", engine.name, ("evaluation",), found, expected)
            yield Cell(f"merge at the end, {backend}", engine.name, ("merged",), found, expected)
            yield Cell(f"answers at the end, {backend}", engine.name, ("answers",), found, expected)
        for case in CASES:
            found, expected = (case_of(on, n, case, engine.base) for on, n in ((engine, 2), (ONE, 1)))
            yield Cell(case, engine.name, trained, found, expected)
        if not engine.base:
            found, expected = (whole(on, n, "fused", NF4) for on, n in ((engine, 2), (ONE, 1)))
            yield Cell("NF4", engine.name, ("losses", "evaluation", "adapter", "merged", "answers"), found, expected)
        two, one = (whole(on, n, "fused", engine.base) for on, n in ((engine, 2), (ONE, 1)))
        # Of one engine on the next, round and round; that of 4 bits from the first in 4 bits.
        other = whole(ENGINES[0] if engine.base else ENGINES[(at + 3) % 4], 2, "fused", engine.base)
        bits = ", NF4" if engine.base else ""
        for case, launch in (
            ("resume, two processes -> two", resumed(f"two to two{bits}", engine, 2, two, engine.base)),
            ("resume, two processes -> one", resumed(f"{engine.config} to one", ONE, 1, two, engine.base)),
            ("resume, one process -> two", resumed(f"one to two{bits}", engine, 2, one, engine.base)),
            ("resume, from another engine", resumed(f"from {other.config}{bits}", engine, 2, other, engine.base)),
        ):
            yield Cell(case, engine.name, trained, launch, one)


def write_rows(folder: Path, count: int) -> Path:
    """The first training rows of the quickstart, and thirteen test rows: an odd number, for two processes."""
    rows = folder / f"{count} rows"
    rows.mkdir(parents=True, exist_ok=True)
    for name, number in (("train", count), ("test", 13)):
        lines = (ROOT / "recipes" / "quickstart" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (rows / f"{name}.jsonl").write_text("".join(lines[:number]))
    return rows


def environment() -> dict[str, str]:
    """Of every launch: no GPU, one thread for each process, and ninja, with which DeepSpeed compiles, found."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **{"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"},
    }


def command_of(launch: Launch, folder: Path) -> list[str]:
    """The command of a launch whose folders are in `folder`."""
    size = 8 // launch.processes  # rows of a step, in each process
    resume = []
    if launch.resumes is not None:
        resume = ["--resume_from_checkpoint", str(folder / launch.resumes.name / "checkpoint-3")]
    return [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"),
        *("--config_file", f"accelerate_configs/{launch.config}.yaml"),
        *("--num_processes", str(launch.processes), "--main_process_port", "0", "recipes/sft.py"),
        *(*PLAIN, "--dataset_name", str(folder / f"{launch.rows} rows"), "--output_dir", str(folder / launch.name)),
        *("--per_device_train_batch_size", str(size), "--per_device_eval_batch_size", str(size)),
        *(*launch.flags, *resume),
    ]


def carry_out(launch: Launch, folder: Path) -> str:
    """Launches it, unless its folder says that it has been.

    Returns:
        Nothing, or why it did not end well: `refused: ...` with the program's own line, or `FAILS: ...`.
    """
    noted = folder / f"{launch.name}.outcome"
    if noted.is_file():
        return noted.read_text()
    write_rows(folder, launch.rows)
    log = folder / f"{launch.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command_of(launch, folder), cwd=ROOT, env=environment(), stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    outcome = "" if code == 0 else why(code, log.read_text(errors="replace"), (folder / launch.name).exists())
    noted.write_text(outcome)
    return outcome


def why(code: int | None, said: str, begun: bool) -> str:
    """Why a launch did not end well, in a line. What has begun is no longer refused."""
    if code is None:
        return f"FAILS: it hung; it was killed after {LONGEST:.0f} s"
    if refusals := re.findall(r"^error: (.*)$", said, flags=re.MULTILINE):
        return f"{'FAILS' if begun else 'refused'}: {refusals[0]}"
    errors = re.findall(r"^(?:\[rank\d\]: )?(\w+(?:\.\w+)*Error: .*)$", said, flags=re.MULTILINE)
    return f"FAILS: {next(iter(errors), f'exit code {code}')}"


def relative(found: torch.Tensor, expected: torch.Tensor, beside: torch.Tensor | None = None) -> float:
    """The norm of a difference relative to that of what is expected, or of `beside`; dimensionless."""
    difference = float((found.double() - expected.double()).norm())
    size = float((expected if beside is None else beside).double().norm())
    if not difference:
        return 0.0
    return difference / size if size else float("inf")


def logged(folder: Path, name: str) -> dict[int, float]:
    """What a run logged under a name, by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def farthest(found: dict[Any, float], expected: dict[Any, float]) -> float:
    """The largest relative difference of two sets of figures; infinite if they are of different steps."""
    if found.keys() != expected.keys() or not expected:
        return float("inf")
    return max(abs(found[key] / expected[key] - 1) for key in expected)


def evaluations(folder: Path) -> dict[Any, float]:
    """Every evaluation loss of a run: those during training, and those of base and adapter at its end."""
    results = json.loads((folder / "all_results.json").read_text())
    return {**logged(folder, "eval_loss"), **{name: results[f"eval_loss_{name}"] for name in ("base", "adapter")}}


def answers(folder: Path) -> list[str]:
    """The answers of base and adapter, and the share of them that is right."""
    results = json.loads((folder / "all_results.json").read_text())
    matches = [str(results[f"exact_match_{name}"]) for name in ("base", "adapter")]
    return [*(folder / "samples.md").read_text().splitlines(), *matches]


def compare(what: str, found: Path, expected: Path) -> float:
    """How far one run's files are from another's, by a name of `LIMITS`."""
    if what == "losses":
        return farthest(logged(found, "loss"), logged(expected, "loss"))
    if what == "evaluation":
        return farthest(evaluations(found), evaluations(expected))
    if what == "answers":
        ours, theirs = answers(found), answers(expected)
        return float(len(ours) != len(theirs) or sum(a != b for a, b in zip(ours, theirs, strict=True)))
    file = "merged/model.safetensors" if what == "merged" else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / file) for folder in (found, expected))
    if ours.keys() != theirs.keys():
        return float("inf")
    if what == "adapter":
        return max(relative(ours[name], theirs[name]) for name in theirs)
    base = load_file(ROOT / "recipes" / "quickstart" / "base" / "model.safetensors")
    return max(relative(ours[name], theirs[name], theirs[name].double() - base[name].double()) for name in theirs)


@dataclass(frozen=True)
class Result:
    """What was found of a cell.

    Attributes:
        case: Its row.
        engine: Its column.
        measured: The differences, by names of `LIMITS`; empty if there are none.
        problem: Empty, or why there are none.
    """

    case: str
    engine: str
    measured: dict[str, float]
    problem: str

    @property
    def holds(self) -> bool:
        """Whether every difference is within its limit."""
        return not self.problem and all(value <= LIMITS[name] for name, value in self.measured.items())

    @property
    def text(self) -> str:
        """The cell as the table has it."""
        if self.problem:
            return self.problem
        figures = [
            ("equal" if not value else "different") if name == "answers" else f"{value:.0e}"
            for name, value in self.measured.items()
        ]
        return " / ".join(figures) if self.holds else f"**FAILS: {' / '.join(figures)}**"


def judge(cell: Cell, folder: Path) -> Result:
    """A cell whose launches have been carried out.

    Of a launch that failed at its end, in the merge, what was written before is compared.
    """
    found, expected = folder / cell.found.name, folder / cell.expected.name
    launches = [
        each for launch in (cell.expected, cell.found) for each in (launch.resumes, launch) if each is not None
    ]
    problems = [problem for launch in launches if (problem := carry_out(launch, folder))]
    try:
        measured = {name: compare(name, found, expected) for name in cell.compared}
    except FileNotFoundError as error:
        return Result(cell.case, cell.engine, {}, problems[0] if problems else f"FAILS: {error}")
    return Result(cell.case, cell.engine, measured, "")


def table(results: Sequence[Result]) -> str:
    """The matrix in Markdown: a row for each case, a column for each engine."""
    by_place = {(result.case, result.engine): result.text for result in results}
    compared = {cell.case: " / ".join(cell.compared) for cell in cells()}
    engines = [engine.name for engine in ENGINES]
    lines = ["| case | compared | " + " | ".join(engines) + " |", "|---|---|" + "---|" * len(engines)]
    for case, what in compared.items():
        row = [by_place.get((case, engine), "") for engine in engines]
        if any(row):
            lines.append(f"| {case} | {what} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def page(results: Sequence[Result]) -> str:
    """The page of the docs."""
    holding = sum(each.holds for each in results)
    refused, never = (sum(each.problem.startswith(word) for each in results) for word in ("refused", NOT_RUN))
    limits = f"losses {LIMITS['losses']:.0e}, evaluation {LIMITS['evaluation']:.0e}, adapter {LIMITS['adapter']:.0e}"
    return (
        f"# The equality matrix\n\nTwo processes beside one with twice the batch, in fp32: `make matrix`. "
        f"{len(results)} cells: {holding} hold, {refused} are refused by name, "
        f"{len(results) - holding - refused - never} fail, {never} have not been run.\n\n"
        "Losses and evaluation losses: the largest relative difference of all that were logged. Adapter: the norm of "
        "a tensor's difference relative to the tensor's, the largest of all tensors. Merged: the norm of a weight's "
        "difference relative to what the merge changed of the base. Answers: every one, letter for letter. "
        f"A cell holds within: {limits}, merged {LIMITS['merged']:.0e}.\n\n{table(results)}\n"
        f"{describe_machine().removesuffix('.')}, deepspeed {version('deepspeed')}; no GPU.\n"
    )


def known(docs: Path) -> list[Result]:
    """Every cell as the docs have it."""
    path = docs / "matrix.json"
    told = json.loads(path.read_text())["cells"] if path.is_file() else []
    names = ("case", "engine", "measured", "problem")
    found = {(cell["case"], cell["engine"]): Result(*(cell[name] for name in names)) for cell in told}
    never = (Result(cell.case, cell.engine, {}, NOT_RUN) for cell in cells())
    return [found.get((each.case, each.engine), each) for each in never]


def write(results: Sequence[Result], docs: Path) -> None:
    """Writes both files; cells that were not run now stay as they were."""
    docs.mkdir(parents=True, exist_ok=True)
    now = {(each.case, each.engine): each for each in results}
    results = [now.get((each.case, each.engine), each) for each in known(docs)]
    content = {"limits": LIMITS, "cells": [{**asdict(each), "holds": each.holds} for each in results]}
    content["machine"] = f"{describe_machine().removesuffix('.')}, deepspeed {version('deepspeed')}"
    (docs / "matrix.json").write_text(json.dumps(content, indent=2) + "\n")
    (docs / "matrix.md").write_text(page(results))


def run(wanted: Sequence[Cell], folder: Path) -> list[Result]:
    """Carries out the launches of cells, each once, and judges the cells."""
    folder.mkdir(parents=True, exist_ok=True)
    launches = {launch.name: launch for cell in wanted for launch in (cell.expected, cell.found)}
    launches |= {launch.resumes.name: launch.resumes for launch in launches.values() if launch.resumes}
    for later in (False, True):  # first those that others resume from
        with ThreadPoolExecutor(AT_ONCE) as pool:
            chosen = [launch for launch in launches.values() if (launch.resumes is not None) is later]
            for launch, outcome in zip(chosen, pool.map(lambda each: carry_out(each, folder), chosen), strict=True):
                print(f"{launch.name}: {outcome or 'done'}", flush=True)
    return [judge(cell, folder) for cell in wanted]


def main() -> None:
    """Runs the matrix, or the asked columns and rows of it, and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", help="columns, by their heads")
    parser.add_argument("--cases", default="", help="rows, by a regular expression")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; one that is there is not repeated")
    asked = parser.parse_args()
    wanted = [cell for cell in cells() if not asked.engines or cell.engine in asked.engines]
    wanted = [cell for cell in wanted if re.search(asked.cases, cell.case)]
    with tempfile.TemporaryDirectory() as temporary:
        results = run(wanted, asked.folder or Path(temporary))
    print(table(results))
    write(results, DOCS)
    raise SystemExit(sum(not each.holds and not each.problem.startswith("refused") for each in results) > 0)


if __name__ == "__main__":
    main()
