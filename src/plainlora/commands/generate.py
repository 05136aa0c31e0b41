"""`plainlora generate`: one prompt, the base's and the tuned model's answers."""

import argparse
from pathlib import Path

from plainlora.errors import UserError


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--adapter", required=True, help="folder that training wrote")
    parser.add_argument("--prompt", required=True, action="append", help="rendered by training's template; repeatable")
    parser.add_argument("--input", default="", help="Alpaca's optional input, for every prompt")
    parser.add_argument("--max_new_tokens", type=_count, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--with_peft", action="store_true", help="also answer with PEFT's implementation")
    parser.add_argument(
        "--base",
        default="16bit",
        choices=["16bit", "dequantized"],
        help="for an adapter trained on 4 or 8 bits: answer on the original checkpoint (16bit, the default), or on "
        "what training saw of it (dequantized)",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"], help="precision of the base"
    )


def _refuse_whole_model(folder: Path) -> None:
    """A merged model's folder is easily taken for the adapter's beside it."""
    config = folder / "config.json"
    whole = config.is_file() or (folder / "merge.json").is_file()
    if whole and not (folder / "adapter_config.json").is_file():
        if config.is_file() and "ForSequenceClassification" in config.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{folder} is a classifier; use plainlora predict --model {folder}")
        raise UserError(
            f"{folder} is a whole model, not an adapter; give --adapter the folder that training wrote, or load the "
            "model with AutoModelForCausalLM.from_pretrained"
        )


def run(arguments: argparse.Namespace) -> None:
    """Prints every prompt with its answers."""
    _refuse_whole_model(Path(arguments.adapter))

    import plainlora.quiet  # noqa: F401
    from plainlora.adapter_base import class_labels, load_base_of, load_tokenizer_of, training_quantization
    from plainlora.arguments import dtype_of
    from plainlora.backends import BACKENDS
    from plainlora.data.prompts import render_prompt
    from plainlora.generation import generate
    from plainlora.models import to_accelerator

    if class_labels(arguments.adapter) is not None:
        raise UserError(f"{arguments.adapter} is a classifier's; use plainlora predict --model {arguments.adapter}")
    tokenizer = load_tokenizer_of(arguments.adapter)
    prompts = [render_prompt(prompt, tokenizer, arguments.input) for prompt in arguments.prompt]
    if not all(prompts):
        raise UserError("--prompt is empty, and without a template there is nothing to go on from")
    if arguments.base == "16bit" and training_quantization(arguments.adapter) is not None:
        print(
            "trained on quantised weights; here the base is the original checkpoint; "
            "for what training saw of it: --base dequantized"
        )
    answers: dict[str, list[str]] = {}
    for name in ("reference", "peft") if arguments.with_peft else ("reference",):
        backend = BACKENDS[name]
        base = load_base_of(arguments.adapter, arguments.base, dtype_of(arguments.dtype))
        model = backend.load(to_accelerator(base), arguments.adapter)
        if "base" not in answers:
            with backend.disabled(model):
                answers["base"] = generate(model, tokenizer, prompts, arguments.max_new_tokens)
        label = "tuned" if name == "reference" else "tuned, by PEFT"
        answers[label] = generate(model, tokenizer, prompts, arguments.max_new_tokens)
    for number, prompt in enumerate(arguments.prompt):
        print(f"\n{prompt}")
        for label, texts in answers.items():
            print(f"\n[{label}]\n{texts[number]}")
