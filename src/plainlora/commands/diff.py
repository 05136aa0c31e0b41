"""`plainlora diff`: measures what adapters change in each layer."""

import argparse

from plainlora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("adapter", nargs="+", metavar="ADAPTER", help="folder that training wrote: one or two")
    parser.add_argument("--relative", action="store_true", help="also the size over that of the base's weight")
    parser.add_argument("--base_model", metavar="PATH_OR_ID", help="with --relative: this copy of the base")
    parser.add_argument("--output", metavar="DIR", help="new folder for diff.json and diff.png")


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each module, and writes the same as JSON and as a picture."""
    adapters = arguments.adapter
    if len(adapters) > 2:
        raise UserError(f"diff compares two adapters, and there are {len(adapters)}: {', '.join(adapters)}")
    if arguments.base_model and not arguments.relative:
        raise UserError("--base_model is for --relative, and without it the base is not read; leave it out")

    import plainlora.quiet  # noqa: F401
    from plainlora.adapters.diff import compare_adapters, table, write
    from plainlora.adapters.output import check_output
    from plainlora.lora.errors import some

    if arguments.output is not None:
        check_output(arguments.output, adapters)
    difference = compare_adapters(adapters, arguments.relative, arguments.base_model)
    if arguments.output is not None:  # before anything is printed, to a program that may end early
        write(difference, arguments.output)
    if len(adapters) > 1:
        print("".join(f"{number}: {adapter}\n" for number, adapter in enumerate(adapters, 1)))
    print(table(difference))
    print(
        "\nnorm: Frobenius, of (alpha / r) B A; rank: how many singular values hold 99 % of the squared norm, of r"
        + ("; cosine: between the two" if len(adapters) > 1 else "")
    )
    for adapter, others in zip(adapters, difference.others, strict=True):
        if others:
            print(f"{adapter} also holds {some(others)}, which is not compared")
    if arguments.output is not None:
        print(f"diff.json, diff.png: {arguments.output}")
