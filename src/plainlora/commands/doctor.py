"""`plainlora doctor`: finds what would go wrong in training, before a weight is loaded."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--config", required=True, metavar="YAML", help="a recipe; more of its flags after --")
    planned = "plan the run for these devices, such as 8x24GB, from the config alone: which engine, what each holds"
    parser.add_argument("--devices", metavar="NxGB", help=planned)
    parser.add_argument("--json", action="store_true", help="write JSON, for a program to read")
    parser.add_argument("--color", action="store_true", help="colours even if the output is not a terminal")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="as for the recipe's program")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switches off the progress bars of `datasets` within the block."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def run(arguments: argparse.Namespace) -> None:
    """Examines a recipe and prints the findings; exit code 1 if there is an error."""
    import plainlora.quiet  # noqa: F401, I001
    import json

    from tqdm import tqdm

    from plainlora.doctor.examine import STAGES, examine
    from plainlora.doctor.report import to_dict, to_text
    from plainlora.resources.devices import Devices

    devices = None if arguments.devices is None else Devices.parse(arguments.devices)
    if arguments.json or not sys.stderr.isatty():
        with _without_bars():
            diagnosis = examine(arguments.config, arguments.flags, lambda _: None, devices)
    else:
        with tqdm(total=len(STAGES), leave=False) as bar:

            def begin(stage: str) -> None:
                bar.n += 1
                bar.set_description_str(stage)

            diagnosis = examine(arguments.config, arguments.flags, begin, devices)
    if arguments.json:
        print(json.dumps(to_dict(diagnosis), indent=2, default=str, ensure_ascii=False))
    else:
        print(to_text(diagnosis, arguments.color or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)))
    if diagnosis.examination.at("error"):
        raise SystemExit(1)
