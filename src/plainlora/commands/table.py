"""`plainlora table`: compares LoRA, the last layers alone and the whole model over several seeds."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        metavar="YAML",
        help="one recipe: all YAMLs of its folder and every method are compared; or several: only these are",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output_dir", help="default: outputs/<folder of the YAML>-table")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="as for the recipe's program, for every run")


def run(arguments: argparse.Namespace) -> None:
    """Runs what is not finished, then prints and writes the table."""
    import plainlora.quiet  # noqa: F401
    from plainlora.experiments.table import make_table

    make_table(arguments.config, arguments.seeds, arguments.output_dir, arguments.flags)
