"""`plainlora predict`: classifies texts with a trained classifier."""

import argparse
import sys
from pathlib import Path

from plainlora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--model", required=True, help="folder that recipes/classify.py wrote: adapter or whole model")
    parser.add_argument("--text", action="append", help="repeatable; lines of standard input if left out")
    parser.add_argument(
        "--base_model", metavar="PATH_OR_ID", help="use this copy of the base, not the one that the adapter names"
    )
    parser.add_argument("--allow_other_base", action="store_true", help="accept other weights of the same shapes")
    parser.add_argument("--with_peft", action="store_true", help="also classify with PEFT's implementation")


def run(arguments: argparse.Namespace) -> None:
    """Prints one line for each text: class, probability, text."""
    try:
        texts = arguments.text or [line.rstrip("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error.reason})") from error
    if not texts or not all(text.strip() for text in texts):
        raise UserError("there is an empty text, or none: give --text, or one text a line on standard input")

    import plainlora.quiet  # noqa: F401
    from plainlora.backends import BACKENDS
    from plainlora.prediction import classify, compare_with_training_base, load_trained_classifier
    from plainlora.run.folder import holds_adapter

    if arguments.with_peft and Path(arguments.model).is_dir() and not holds_adapter(arguments.model):
        raise UserError(f"with_peft: {arguments.model} holds no adapter, so there is nothing for PEFT to load")
    choice = {"base_model": arguments.base_model, "allow_other_base": arguments.allow_other_base}
    for backend in (None, BACKENDS["peft"]) if arguments.with_peft else (None,):
        classifier = load_trained_classifier(arguments.model, backend, **choice)
        if backend is not None:
            print("\nby PEFT:")
        found = classify(classifier, texts)
        width = max(map(len, classifier.labels))
        for text, shares in zip(texts, found, strict=True):
            best = max(range(len(shares)), key=shares.__getitem__)
            print(f"{classifier.labels[best]:<{width}}  {shares[best]:6.1%}  {' '.join(text.split())[:100]}")
        if backend is None:
            beside = compare_with_training_base(arguments.model, texts, found, **choice)
            warnings = [*classifier.warnings, *([beside] if beside else [])]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
