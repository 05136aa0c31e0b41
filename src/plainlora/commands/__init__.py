"""The `plainlora` command. Each verb has a thin module, which imports heavy libraries only when it runs."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import plainlora
from plainlora.errors import UserError, one_line_errors

VERBS = {
    "compare": "show how far the hand-written LoRA is from PEFT",
    "doctor": "find what would go wrong in training, before a weight is loaded",
    "generate": "answer a prompt with the base and with an adapter, side by side",
    "predict": "classify texts with a trained classifier",
    "merge": "merge an adapter into its base and check the result by reloading it",
    "push": "publish an adapter or a model on the Hub",
    "reproduce": "train a finished run again and compare the bytes",
    "sweep": "search for better hyperparameters of a classifier on validation rows",
    "table": "train a classifier by every method under several seeds, and compare them",
}


class Parser(argparse.ArgumentParser):
    """Reports a bad flag as a `UserError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Each verb's module has `add_arguments(parser)` and `run(arguments)`."""
    parser = Parser(prog="plainlora", description=(plainlora.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"plainlora {plainlora.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, description in VERBS.items():
        sentence = description[0].upper() + description[1:] + "."  # not capitalize(), which lowers "Hub"
        verb = verbs.add_parser(name, help=description, description=sentence, allow_abbrev=False)
        import_module(f"plainlora.commands.{name}").add_arguments(verb)
    return parser


def _check_texts(parsed: argparse.Namespace) -> None:
    """Checks that texts are valid UTF-8: a terminal passes any bytes on, as halves of surrogate pairs."""
    for name in ("prompt", "input", "text"):
        given = getattr(parsed, name, None) or []
        for text in [given] if isinstance(given, str) else given:
            if text.encode("utf-8", "ignore").decode() != text:
                raise UserError(f"--{name} {text!r:.60} is not UTF-8 text")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `plainlora` command."""
    with one_line_errors():
        parsed = build_parser().parse_args(arguments)
        _check_texts(parsed)
        import_module(f"plainlora.commands.{parsed.verb}").run(parsed)
