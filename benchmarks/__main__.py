"""Time and memory of this project, of PEFT with TRL, and of the floor: `make bench`, or `python -m benchmarks`."""

import plainlora.quiet  # noqa: F401, I001

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.case import Case
from benchmarks.interleave import Outcome, time_interleaved
from benchmarks.ratios import is_met
from benchmarks.suites import SUITES, list_cases
from plainlora.commands import Parser
from plainlora.errors import UserError, one_line_errors
from plainlora.settings.checks import check_writable


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all of them")
    parser.add_argument("--case", nargs="+", help="only the cases whose name or table holds one of these")
    parser.add_argument(
        "--model-folder", help="SmolLM2-135M's checkpoint, for its real weights in the suite smollm2; default: random"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=9, help="timed iterations of each variant (default: 9)")
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="tiny: to see that it runs; its figures mean nothing"
    )
    parser.add_argument(
        "--profile", action="store_true", help="one more iteration of each variant, its time by kind of operation"
    )
    parser.add_argument(
        "--json", default="outputs/bench/bench.json", help="the file to write; Markdown and pictures beside it"
    )
    return parser


def with_weights(case: Case, folder: str) -> Case:
    """A case of the suite smollm2 with a checkpoint's weights; any other as it is."""
    if case.suite != "smollm2":
        return case
    return replace(case, name=f"{case.name}, real weights", options=case.options | {"folder": folder})


def run(arguments: argparse.Namespace) -> None:
    """Times every case, shows it as it comes, writes what was measured.

    Raises:
        UserError: An option cannot be honoured, or a variant stopped.
    """
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {arguments.repeats}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave it out, or give cpu")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(arguments.json)
    if path.suffix != ".json":
        raise UserError(f"--json {path}: give a file whose name ends in .json")
    check_writable(str(path.parent), "--json")
    chosen = [each for suite in arguments.suite for each in list_cases(suite, arguments.size, device)]
    if (folder := arguments.model_folder) is not None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--model-folder {folder}: there is no config.json in it")
        chosen = [(module, with_weights(case, folder)) for module, case in chosen]
    if arguments.case:
        wanted = arguments.case
        chosen = [(m, case) for m, case in chosen if any(part in f"{case.name} {case.table}" for part in wanted)]
    if not chosen:
        raise UserError(f"--case {' '.join(wanted)}: no case of {', '.join(arguments.suite)} has that in its name")
    print(report.describe_machine(), flush=True)
    outcomes: list[Outcome] = []
    for module, case in (bar := tqdm(chosen, leave=False, disable=None)):  # only on a terminal
        if case.not_run:
            outcomes.append(Outcome(case))
        else:
            progress = bar.set_description_str
            outcomes.append(time_interleaved(module, case, device, arguments.repeats, arguments.profile, progress))
        with tqdm.external_write_mode():
            print(report.terminal(outcomes[-1]), flush=True)
        written = report.write(outcomes, path)  # after every case: what is measured is kept
    asked = [(outcome, target) for outcome in outcomes if not outcome.case.not_run for target in outcome.case.targets]
    met = sum(is_met(outcome, target) for outcome, target in asked)
    not_run = sum(bool(outcome.case.not_run) for outcome in outcomes)
    judged = "tiny: no target is judged" if arguments.size == "tiny" else f"{met} of {len(asked)} targets met"
    print(f"\n{judged}; {not_run} cases not run\n{', '.join(map(str, written))}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks`."""
    with one_line_errors():
        run(build_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
