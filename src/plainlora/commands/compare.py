"""`plainlora compare`: the hand-written LoRA beside PEFT, on the built-in suite or on something of the user's own."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plainlora.parity.case import Case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", help="a recipe's YAML: its model, adapter and rows; more of its flags after --")
    source.add_argument("--adapter", help="a trained adapter's folder, loaded into both")
    source.add_argument("--model", help="any decoder or encoder: a Hub id or a local folder")
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"], help="with --model: what LoRA adapts")
    parser.add_argument("--prompt", help="with --adapter: what both answer")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of the trajectory (default: 10)")
    parser.add_argument("--output", default="outputs/parity", help="folder for parity.json, parity.md and parity.png")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="with --config: as for recipes/sft.py")


def _cases(arguments: argparse.Namespace) -> "Iterator[Case]":
    from plainlora.parity import cases

    if arguments.config:
        yield cases.recipe_case(arguments.config, arguments.flags, arguments.steps)
    elif arguments.adapter:
        yield cases.adapter_case(arguments.adapter, arguments.prompt, "auto")
    elif arguments.model:
        yield cases.model_case(arguments.model, arguments.target_modules, arguments.steps)
    else:
        yield from cases.built_in_cases(arguments.steps)


def _show_progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Compares, shows, writes; exit code 1 if a level that ran does not hold."""
    import plainlora.quiet  # noqa: F401
    from plainlora.checks import check_writable
    from plainlora.errors import UserError
    from plainlora.parity.cases import quiet_models
    from plainlora.parity.compare import compare
    from plainlora.parity.report import terminal_header, terminal_rows, write

    if arguments.steps < 1:
        raise UserError(f"--steps must be at least 1, not {arguments.steps}")
    if arguments.flags and not arguments.config:
        raise UserError(f"{arguments.flags[0]} is for --config only; see plainlora compare --help")
    check_writable(arguments.output, "--output")
    results = []
    print(terminal_header())
    with quiet_models():
        for case in _cases(arguments):
            results.append(compare(case, _show_progress))
            _show_progress("")
            print("\n".join(terminal_rows(results[-1].verdicts)), flush=True)
    write(results, Path(arguments.output))

    verdicts = [verdict for result in results for verdict in result.verdicts]
    counts = {status: sum(v.status == status for v in verdicts) for status in ("pass", "fail", "not run")}
    identical = sum(verdict.identical for verdict in verdicts)
    print(
        f"\n{counts['pass']} levels hold, {identical} of them to the last bit; {counts['fail']} fail; "
        f"{counts['not run']} did not run\nparity.json, parity.md, parity.png: {arguments.output}"
    )
    if counts["fail"]:
        raise SystemExit(1)
