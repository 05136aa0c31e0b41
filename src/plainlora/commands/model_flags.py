"""The flags that choose which model a command loads: an adapter on its base, or a whole model."""

import argparse

from plainlora.errors import UserError

# The flags that mean nothing for a whole model, and their defaults.
ADAPTER_FLAGS = {"with_peft": False, "base": "16bit", "base_model": None, "allow_other_base": False}


def count(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def add_adapter_or_model(parser: argparse.ArgumentParser) -> None:
    """Declares `--adapter` and `--model`, one of which is to be given."""
    trained = parser.add_mutually_exclusive_group(required=True)
    trained.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        help="folder of an adapter that training wrote, or several",
    )
    trained.add_argument("--model", help="folder of a whole model, such as `--method full` or a merge writes")


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """Declares which base an adapter is loaded onto, and how."""
    parser.add_argument(
        "--base",
        default="16bit",
        choices=["16bit", "dequantized"],
        help="for an adapter trained on 4 or 8 bits: answer on the original checkpoint (16bit, the default), or on "
        "the dequantised weights of training (dequantized)",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"], help="precision of the base"
    )
    parser.add_argument(
        "--base_model", metavar="PATH_OR_ID", help="this copy of the base, not the one the adapter names"
    )
    parser.add_argument("--allow_other_base", action="store_true", help="accept other weights of the same shapes")


def refuse_flags_of_adapters(arguments: argparse.Namespace) -> None:
    """Refuses flags that mean nothing for a whole model."""
    for flag, default in ADAPTER_FLAGS.items():
        if getattr(arguments, flag, default) != default:
            raise UserError(
                f"--{flag} is for an adapter, and --model {arguments.model} is a whole model; leave it out"
            )
