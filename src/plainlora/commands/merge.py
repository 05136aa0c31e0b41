"""`plainlora merge`: merges an adapter's folder into a model's folder, or several adapters into one adapter."""

import argparse
import sys

from plainlora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--adapter",
        required=True,
        nargs="+",
        action="extend",
        help="folder that training wrote; of several with --weights one adapter is made, which merges as any other",
    )
    parser.add_argument(
        "--output", required=True, help="folder for the merged model, or for the one adapter of several"
    )
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each of several adapters")
    parser.add_argument(
        "--combination",
        choices=["cat", "linear"],
        help="of several adapters: cat (the default) adds W times each delta exactly, and the ranks add up; linear is "
        "PEFT's, of the same rank, which adds A and B apart, so that products of one's B and another's A come in: not "
        "the weighted sum",
    )
    parser.add_argument(
        "--base",
        default="16bit",
        metavar="{16bit,dequantized}",
        help="for an adapter trained on 4 or 8 bits: merge into the original checkpoint (16bit, the default), "
        "or into the dequantised weights of training (dequantized)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="precision of the merged weights; auto is the base checkpoint's",
    )
    parser.add_argument(
        "--text", metavar="FILE.txt", help="text to measure perplexity on (default: the run's test rows)"
    )
    parser.add_argument(
        "--base_model", metavar="PATH_OR_ID", help="this copy of the base, not the one the adapter names"
    )
    parser.add_argument("--allow_other_base", action="store_true", help="accept other weights of the same shapes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")


def _combine(arguments: argparse.Namespace) -> None:
    """Writes one adapter for several."""
    for flag, given in (
        ("--base", arguments.base != "16bit"),
        ("--dtype", arguments.dtype != "auto"),
        ("--text", arguments.text),
    ):
        if given:
            raise UserError(
                f"{flag} is for merging into the base; several adapters become one first, which is merged with "
                f"plainlora merge --adapter {arguments.output}"
            )
    if arguments.weights is None:
        raise UserError(f"--weights is needed with {len(arguments.adapter)} adapters: one number for each")

    import plainlora.quiet  # noqa: F401
    from plainlora.adapters.combine import Combination, combine_adapters

    combination: Combination = arguments.combination or "cat"
    result = combine_adapters(
        arguments.adapter,
        arguments.weights,
        arguments.output,
        combination,
        arguments.overwrite,
        base_model=arguments.base_model,
        allow_other_base=arguments.allow_other_base,
    )
    print(
        f"{len(arguments.adapter)} adapters combined by {combination}: rank {result.r} in {result.modules} modules, "
        f"read again; from the weighted sum of the deltas it differs by at most {result.deviation:.1e} of their norms"
    )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"{arguments.output} loads with PeftModel.from_pretrained, and merges into its base with plainlora merge "
        f"--adapter {arguments.output}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Merges, and prints how much the reloaded model differs from the adapter model; or combines several adapters."""
    if arguments.base in ("4bit", "8bit", "nf4"):
        raise UserError(
            f"--base {arguments.base}: merging into quantised weights is refused, because rounding the sum back to a "
            "few bits can erase the adapter (peft#2321); use --base 16bit or --base dequantized"
        )
    if arguments.base not in ("16bit", "dequantized"):
        raise UserError(f"--base is 16bit or dequantized, not {arguments.base}")
    if len(arguments.adapter) > 1:
        _combine(arguments)
        return
    for flag in ("weights", "combination"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag} is for several adapters, and there is one: {arguments.adapter[0]}")

    import plainlora.quiet  # noqa: F401
    from plainlora.merging.certificate import CERTIFICATE, table
    from plainlora.merging.merge import merge_adapter
    from plainlora.settings.arguments import dtype_of

    result = merge_adapter(
        arguments.adapter[0],
        arguments.output,
        arguments.base,
        dtype_of(arguments.dtype),
        arguments.overwrite,
        text=arguments.text,
        base_model=arguments.base_model,
        allow_other_base=arguments.allow_other_base,
    )
    print(
        f"merged in {str(result.dtype).removeprefix('torch.')} and reloaded: logits differ from the adapter model's "
        f"by at most {result.max_abs_diff:.1e}, {result.relative_diff:.1e} of the largest "
        f"(allowed: {result.tolerance:.0e})\n\n{table(result.certificate)}\n"
    )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"{arguments.output} loads with {result.auto_class}.from_pretrained; the figures and the SHA-256 of every "
        f"file are in its {CERTIFICATE}"
    )
