"""`plainlora export`: writes an adapter, or the model merged with it, as a GGUF file for llama.cpp."""

import argparse
import sys
from typing import Any

from plainlora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--adapter", required=True, help="folder that training wrote")
    parser.add_argument("--format", required=True, choices=["gguf"], help="the format of the file")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="write the whole model with tokenizer and chat template, not the adapter alone (llama.cpp's --lora)",
    )
    parser.add_argument(
        "--quantize",
        choices=["q8_0", "q4_0", "q4_1"],
        help="with --merged: 8 or 4 bits a weight instead of f16; the certificate says what each costs",
    )
    parser.add_argument("--output", help="new folder (default: the adapter's name with -gguf or -merged-gguf)")
    parser.add_argument(
        "--base_model", metavar="PATH_OR_ID", help="this copy of the base, not the one the adapter names"
    )
    parser.add_argument("--allow_other_base", action="store_true", help="accept other weights of the same shapes")


def run(arguments: argparse.Namespace) -> None:
    """Exports, and prints what llama.cpp made of the file beside Transformers."""
    if arguments.quantize and not arguments.merged:
        raise UserError(
            "--quantize is for a whole model: give --merged too, or leave it out (an adapter's file is small, in f32)"
        )
    given = arguments.adapter.rstrip("/")
    output = arguments.output or f"{given}{'-merged' if arguments.merged else ''}-gguf"

    import plainlora.quiet  # noqa: F401
    from plainlora.export.export import CERTIFICATE, export_gguf

    result = export_gguf(
        arguments.adapter,
        output,
        arguments.merged,
        arguments.quantize or "f16",
        base_model=arguments.base_model,
        allow_other_base=arguments.allow_other_base,
    )
    proof = result.certificate["proof"]
    if proof is not None:
        print(_table(proof) + "\n")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{result.file}, {result.certificate['file']['bytes']:,} bytes; beside it {', '.join(result.files[1:])}")
    if proof is None:
        from plainlora.export.proof import HOW_TO_PROVE

        print(f"llama.cpp has not read it: llama-cpp-python is not installed ({HOW_TO_PROVE}); {CERTIFICATE} says so")


def _table(proof: dict[str, Any]) -> str:
    """The figures for the terminal."""
    lines = [
        f"llama.cpp (llama-cpp-python {proof['llama_cpp_python']}) beside Transformers in fp32",
        f"equal tokens of texts           {proof['equal_texts']} of {proof['texts']}",
        f"equal prompts of the chat call  {proof['equal_chat_prompts']} of {proof['chats']}",
        f"equal answers of the chat call  {proof['equal_chat_answers_in_f16']} of {proof['chats']}, "
        f"greedy, in f16, of at most {proof['new_tokens']} tokens",
        "",
        f"{'':<6}{'equal answers':>15}{'equal tokens':>15}{'KL, nats':>11}  logits differ by at most",
    ]
    for kind, cost in proof["costs"].items():
        answers = f"{cost['equal_answers']} of {cost['answers']}"
        tokens = f"{cost['equal_positions']} of {cost['positions']}"
        logits = f"{cost['max_abs_diff']:.1e}, {cost['relative_diff']:.1e} of the largest"
        lines.append(f"{kind:<6}{answers:>15}{tokens:>15}{cost['mean_kl']:>11.1e}  {logits}")
    return "\n".join(lines)
