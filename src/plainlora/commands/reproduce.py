"""`plainlora reproduce`: repeats a finished run and compares the two byte for byte."""

import argparse
import tempfile
from pathlib import Path

from plainlora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "folder", help="output_dir of the run; call this from the root of the checkout in which that run was started"
    )
    parser.add_argument("--output", help="folder to keep the second run in; by default it is deleted at the end")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's own code, as the run did")


def run(arguments: argparse.Namespace) -> None:
    """Trains again, and prints what is equal; exit code 1 if anything is not."""
    import plainlora.quiet  # noqa: F401

    if arguments.output and Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} already exists; give another folder")

    from plainlora.run.reproduction import reproduce

    with tempfile.TemporaryDirectory() as scratch:
        stages = reproduce(
            arguments.folder, arguments.output or Path(scratch) / "again", print, arguments.trust_remote_code
        )
    print()
    for stage in stages:
        print(f"{'equal' if stage.equal else 'OTHER'}  {stage.name}{f' ({stage.detail})' if stage.detail else ''}")
    if all(stage.equal for stage in stages):
        print(f"{arguments.folder} can be reproduced: the second run trained the same bytes")
        return
    first = next(stage.name for stage in stages if not stage.equal)
    print(f"{arguments.folder} was not reproduced; the first thing that differs: {first}")
    raise SystemExit(1)
