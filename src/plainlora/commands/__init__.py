"""The `plainlora` command. Each verb has a thin module, which imports heavy libraries only when it runs."""

import argparse
import difflib
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import plainlora
from plainlora.errors import UserError, one_line_errors

GROUPS: dict[str, dict[str, tuple[str, str]]] = {  # by what one wants: each verb, what it does, and an example
    "train with confidence": {
        "doctor": (
            "find what would go wrong in training, before a weight is loaded",
            "plainlora doctor --config recipes/instruct/lora.yaml -- --dataset_name rows.jsonl",
        ),
        "table": (
            "train by every method under several seeds, and compare the results",
            "plainlora table --config recipes/gpt2-sms-spam/lora.yaml --seeds 0 1 2",
        ),
        "sweep": (
            "search for better hyperparameters, judged by a classifier's validation rows or by test loss",
            "plainlora sweep --config recipes/distilbert-imdb/lora.yaml --trials 20",
        ),
    },
    "use what was trained": {
        "generate": (
            "answer a prompt with the base and one adapter or several side by side, or with a whole model",
            'plainlora generate --adapter outputs/quickstart --prompt "Write the opposite of hot."',
        ),
        "chat": (
            "talk with an adapter and its base, or with a whole model, in the terminal",
            "plainlora chat --adapter outputs/instruct",
        ),
        "playground": (
            "compare the answers of a base and its adapters on a local page, with each token's probability",
            "plainlora playground --adapter outputs/instruct",
        ),
        "predict": (
            "classify texts with a trained classifier",
            'plainlora predict --model outputs/gpt2-sms-spam --text "You have won a prize"',
        ),
        "merge": (
            "merge an adapter into its base and check the result by reloading it, or several into one adapter",
            "plainlora merge --adapter outputs/quickstart --output outputs/quickstart-merged",
        ),
        "export": (
            "write an adapter, or the model merged with it, as a GGUF file that llama.cpp is shown to read right",
            "plainlora export --adapter outputs/instruct --format gguf --merged --quantize q8_0",
        ),
        "diff": (
            "measure what an adapter changes in each layer, and how far it is from another's",
            "plainlora diff outputs/quickstart outputs/rank4",
        ),
        "push": (
            "publish an adapter or a model on the Hub",
            "plainlora push --adapter outputs/gpt2-alpaca-gpt4 --repo USER/NAME --private",
        ),
    },
    "check it": {
        "compare": (
            "show how far the hand-written LoRA is from PEFT",
            "plainlora compare --config recipes/gpt2-alpaca-gpt4/lora.yaml --steps 50",
        ),
        "reproduce": (
            "train a finished run again and compare the bytes",
            "plainlora reproduce outputs/quickstart",
        ),
    },
}
VERBS = [verb for group in GROUPS.values() for verb in group]

# Before Python 3.14 argparse takes -1e-3 for a flag: https://github.com/python/cpython/issues/105712
NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Reports a bad flag as a `UserError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


class VerbParser(Parser):
    """The parser of one verb. It names an unknown flag, where argparse would name what else is missing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = NEGATIVE_NUMBER

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after a look at the flags before a `--`."""
        own = itertools.takewhile(lambda word: word != "--", args or ())
        for name in (word.partition("=")[0] for word in own):
            if name.startswith("--") and name not in self._option_string_actions:
                self._refuse_unknown(name)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, name: str) -> NoReturn:
        near = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.75)
        if near:
            raise UserError(f"{name} is not an option; did you mean {near[0]}?")
        if any(action.dest == "flags" for action in self._actions):
            raise UserError(
                f"{name} is not an option of {self.prog}; a recipe's flags stand after a --: -- {name} ..."
            )
        self.error(f"{name} is not an option")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Each verb's module has `add_arguments(parser)` and `run(arguments)`."""
    raw = argparse.RawDescriptionHelpFormatter
    description = (plainlora.__doc__ or "").splitlines()[0]
    parser = Parser(prog="plainlora", description=description, epilog=_overview(), formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"plainlora {plainlora.__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, help="one of those below", parser_class=VerbParser
    )
    for group in GROUPS.values():
        for name, (does, example) in group.items():
            sentence = does[0].upper() + does[1:] + "."  # not capitalize(), which lowers "Hub"
            verb = verbs.add_parser(
                name,
                description=sentence,
                epilog=f"example:\n  {example}",
                formatter_class=raw,
                allow_abbrev=False,
            )
            import_module(f"plainlora.commands.{name}").add_arguments(verb)
    return parser


def _overview() -> str:
    """The verbs by what one wants, for `plainlora --help`."""
    lines = []
    for want, group in GROUPS.items():
        lines += [f"{want}:", *(f"  {name:<11}{does}" for name, (does, _) in group.items()), ""]
    return "\n".join([*lines, "training: python recipes/sft.py or recipes/classify.py in a checkout, see the README"])


def _check_texts(parsed: argparse.Namespace) -> None:
    """Checks that texts are valid UTF-8: a terminal passes any bytes on, as halves of surrogate pairs."""
    for name in ("prompt", "input", "text", "system"):
        given = getattr(parsed, name, None) or []
        for text in [given] if isinstance(given, str) else given:
            if text.encode("utf-8", "ignore").decode() != text:
                raise UserError(f"--{name} {text!r:.60} is not UTF-8 text")


@contextmanager
def ended_with_its_reader() -> Iterator[None]:
    """Ends the command without a word if the program that it is piped to has ended, as `head` does.

    Python would report it where a line is written, and once more when it flushes standard output at its own end:
    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from error  # a shell's exit code for it


@contextmanager
def cleared_up_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit`, so that what is half-written is removed; by default Python ends at once."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)  # a shell's exit code for it

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `plainlora` command. Without a verb it prints the help."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with cleared_up_on_sigterm(), ended_with_its_reader(), one_line_errors():
        if not arguments:
            build_parser().print_help(sys.stderr)
            raise SystemExit(2)
        parsed = build_parser().parse_args(arguments)
        _check_texts(parsed)
        import_module(f"plainlora.commands.{parsed.verb}").run(parsed)
