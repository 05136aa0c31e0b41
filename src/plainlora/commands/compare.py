"""`plainlora compare`: compares the hand-written LoRA with PEFT, on built-in cases or on the user's own."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plainlora.parity.case import Case
    from plainlora.parity.compare import CaseResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", help="a recipe's YAML: its model, adapter and rows; more of its flags after --")
    source.add_argument("--adapter", help="a trained adapter's folder, loaded into both")
    source.add_argument("--model", help="any decoder or encoder: a Hub id or a local folder")
    source.add_argument(
        "--architectures",
        nargs="*",
        metavar="MODEL_TYPE",
        help="every causal language model and sequence classifier of Transformers, or these, tiny; about an hour",
    )
    parser.add_argument("--target_modules", nargs="+", help="with --model: what LoRA adapts (default: all-linear)")
    parser.add_argument(
        "--lora_backend",
        choices=["fused", "reference"],
        help="which form of the hand-written LoRA (default: the recipe's, else fused)",
    )
    parser.add_argument("--prompt", help="with --adapter: what both answer")
    parser.add_argument("--steps", type=int, help="optimizer steps of the trajectory (default: 10)")
    parser.add_argument(
        "--output",
        default="outputs/parity",
        help="folder for parity.json, parity.md and parity.png, or architectures.json and architectures.md",
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="with --config: flags of the recipe's program")


def _cases(arguments: argparse.Namespace, steps: int) -> "Iterator[Case]":
    from plainlora.parity import sources
    from plainlora.parity.case import FORMS
    from plainlora.parity.suite import built_in_cases
    from plainlora.settings.programs import SFT, find_program

    if arguments.config:
        make = sources.recipe_case if find_program(arguments.config) is SFT else sources.classifier_case
        yield make(arguments.config, arguments.flags, steps, arguments.lora_backend)
        return
    if arguments.adapter:
        cases = iter([sources.adapter_case(arguments.adapter, arguments.prompt)])
    elif arguments.model:
        cases = iter([sources.model_case(arguments.model, arguments.target_modules or ["all-linear"], steps)])
    else:
        cases = built_in_cases(steps)
    for case in cases:
        yield replace(case, lora_backend=arguments.lora_backend or FORMS[0])


def _refuse_idle_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags that do not apply to the chosen source."""
    from plainlora.errors import UserError

    needs = {
        "--prompt": (arguments.prompt, arguments.adapter, "--adapter"),
        "--target_modules": (arguments.target_modules, arguments.model, "--model"),
        (arguments.flags or [""])[0]: (arguments.flags, arguments.config, "--config"),
    }
    for flag, (given, source, name) in needs.items():
        if given and not source:
            raise UserError(f"{flag} is for {name} only; see plainlora compare --help")
    if arguments.steps is not None and arguments.adapter:
        raise UserError("--steps is not for --adapter, which trains nothing; see plainlora compare --help")
    if arguments.architectures is not None:
        for flag in ("steps", "lora_backend"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag} is not for --architectures; see plainlora compare --help")
    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps must be at least 1, not {arguments.steps}")


def _sweep(model_types: list[str], output: Path) -> None:
    """Compares all architectures, or those named; exit code 1 if a level differs and is not refused."""
    from tqdm import tqdm

    from plainlora.parity.architecture_table import list_reasons, terminal_line, write
    from plainlora.parity.architectures import examine, select
    from plainlora.parity.tiny import quiet_models

    rows = []
    with quiet_models():
        for architecture in (bar := tqdm(select(model_types), leave=False, disable=None)):  # only on a terminal
            bar.set_description_str(f"{architecture.class_name} ({architecture.model_type})")
            rows.append(examine(architecture))
            with tqdm.external_write_mode():
                print(terminal_line(rows[-1]), flush=True)
    write(rows, output)
    different = list_reasons(rows, "differs")
    built = sum(not row.not_built for row in rows)
    print("\n".join(["", *different, f"{built} of {len(rows)} were compared; {len(different)} levels differ"]))
    print(f"architectures.json, architectures.md: {output}")
    if different:
        raise SystemExit(1)


def run(arguments: argparse.Namespace) -> None:
    """Compares, and prints and writes the results; exit code 1 if a level fails."""
    import plainlora.quiet  # noqa: F401, I001

    from tqdm import tqdm

    from plainlora.errors import UserError
    from plainlora.parity.compare import compare
    from plainlora.parity.report import terminal_header, terminal_rows, write
    from plainlora.parity.tiny import quiet_models
    from plainlora.settings.checks import check_writable

    _refuse_idle_flags(arguments)
    check_writable(arguments.output, "--output")
    if arguments.architectures is not None:
        _sweep(arguments.architectures, Path(arguments.output))
        return
    results: list[CaseResult] = []
    with quiet_models():
        cases = list(_cases(arguments, arguments.steps or 10))
        for case in (bar := tqdm(cases, leave=False, disable=None)):  # only on a terminal
            header = [] if results else [terminal_header(case.lora_backend)]
            results.append(compare(case, bar.set_description_str))
            with tqdm.external_write_mode():
                print("\n".join([*header, *terminal_rows(results[-1].verdicts)]), flush=True)
    verdicts = [verdict for result in results for verdict in result.verdicts]
    if all(verdict.status == "not run" for verdict in verdicts):
        raise UserError(f"nothing could be compared: {verdicts[0].reason}")
    write(results, Path(arguments.output))

    counts = {status: sum(v.status == status for v in verdicts) for status in ("pass", "fail", "not run")}
    identical = sum(verdict.identical for verdict in verdicts)
    print(
        f"\n{counts['pass']} levels hold, {identical} of them to the last bit; {counts['fail']} fail; "
        f"{counts['not run']} did not run\nparity.json, parity.md, parity.png: {arguments.output}"
    )
    if counts["fail"]:
        raise SystemExit(1)
