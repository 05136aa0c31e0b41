"""`plainlora generate`: answers prompts with the base and with the adapter."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plainlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plainlora.run.adapter_base import Base


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--adapter", required=True, help="folder that training wrote")
    parser.add_argument("--prompt", required=True, action="append", help="rendered as in training; repeatable")
    parser.add_argument("--input", default="", help="Alpaca's optional input, for every prompt")
    parser.add_argument("--max_new_tokens", type=_count, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--with_peft", action="store_true", help="also answer with PEFT's implementation")
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


def _refuse_whole_model(folder: Path) -> None:
    """Refuses a whole model's folder, such as the merged model beside the adapter."""
    config = folder / "config.json"
    whole = config.is_file() or (folder / "certificate.json").is_file()
    if whole and not (folder / "adapter_config.json").is_file():
        if config.is_file() and "ForSequenceClassification" in config.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{folder} is a classifier; use plainlora predict --model {folder}")
        raise UserError(
            f"{folder} is a whole model, not an adapter; give --adapter the folder that training wrote, or load the "
            "model with AutoModelForCausalLM.from_pretrained"
        )


def _loss_in_training(adapter: str, base: "Base", questions: dict[str, Any]) -> float:
    """The loss of the tuned answers on the quantised base of training."""
    from plainlora.base.loading import to_accelerator
    from plainlora.merging.certificate import mean_loss
    from plainlora.merging.reload import ask
    from plainlora.run.adapter_base import load_quantized_base_of

    model = base.backend.load(to_accelerator(load_quantized_base_of(adapter, base)), adapter)
    return mean_loss(ask(model, questions))


def run(arguments: argparse.Namespace) -> None:
    """Prints every prompt with its answers, and how the base differs from that of training."""
    _refuse_whole_model(Path(arguments.adapter))

    import plainlora.quiet  # noqa: F401
    from plainlora.backends import BACKENDS
    from plainlora.base.loading import to_accelerator
    from plainlora.data.prompts import render_prompt
    from plainlora.generation import generate
    from plainlora.merging.certificate import drift, mean_loss
    from plainlora.merging.eval_prompts import answered
    from plainlora.merging.reload import ask
    from plainlora.run.adapter_base import (
        class_labels,
        find_base,
        load_base_of,
        load_tokenizer_of,
        training_quantization,
    )
    from plainlora.settings.arguments import dtype_of

    adapter = arguments.adapter
    if class_labels(adapter) is not None:
        raise UserError(f"{adapter} is a classifier's; use plainlora predict --model {adapter}")
    base = find_base(adapter, arguments.base_model, arguments.allow_other_base)
    tokenizer = load_tokenizer_of(adapter, base)
    prompts = [render_prompt(prompt, tokenizer, arguments.input) for prompt in arguments.prompt]
    if not all(prompts):
        raise UserError("--prompt is empty, and there is no chat template; give some text")
    on_original = arguments.base == "16bit" and training_quantization(adapter) is not None
    if on_original:
        print(
            "trained on quantised weights; here the base is the original checkpoint; "
            "for what training saw of it: --base dequantized"
        )
    warnings = [base.warning] if base.warning else []
    answers: dict[str, list[str]] = {}

    def load_weights() -> "PreTrainedModel":
        return to_accelerator(load_base_of(adapter, base, arguments.base, dtype_of(arguments.dtype)))

    bare = load_weights()
    answers["base"] = generate(bare, tokenizer, prompts, arguments.max_new_tokens)
    model = base.backend.load(bare, adapter)
    answers["tuned"] = generate(model, tokenizer, prompts, arguments.max_new_tokens)
    questions = answered(tokenizer, prompts, answers["tuned"])
    tuned = ask(model, questions)
    with base.backend.disabled(model):
        if drift(ask(model, questions), tuned)[0] == 0:
            warnings.append(f"the adapter in {adapter} changes no logit of these prompts")
    if arguments.with_peft and base.backend is not BACKENDS["peft"]:
        by_peft = BACKENDS["peft"].load(load_weights(), adapter)
        answers["tuned, by PEFT"] = generate(by_peft, tokenizer, prompts, arguments.max_new_tokens)
    for number, prompt in enumerate(arguments.prompt):
        print(f"\n{prompt}")
        for label, texts in answers.items():
            print(f"\n[{label}]\n{texts[number]}")
    if on_original:
        del model, bare  # before the other base is loaded
        there = _loss_in_training(adapter, base, questions)
        print(
            f"\nloss of the tuned answers, in nats a token: {mean_loss(tuned):.3f} here, {there:.3f} on the quantised "
            "weights that training saw"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
