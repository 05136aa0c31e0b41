"""`plainlora chat`: a conversation in the terminal with an adapter and its base, or with a whole model."""

import argparse
from typing import TYPE_CHECKING

from plainlora.commands.model_flags import add_adapter_or_model, add_base_flags, count, refuse_flags_of_adapters

if TYPE_CHECKING:
    from plainlora.chat.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add_adapter_or_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    sampling = parser.add_argument_group("sampling, as Transformers names it")
    sampling.add_argument("--do_sample", action="store_true", help="draw tokens at random; greedy if left out")
    sampling.add_argument("--temperature", type=float, help="divides the logits (default: 1)")
    sampling.add_argument("--top_p", type=float, help="draw from the likeliest of this probability (default: 1)")
    sampling.add_argument("--top_k", type=int, help="draw from so many of the likeliest tokens (default: 50)")
    sampling.add_argument("--repetition_penalty", type=float, help="above 1 repeats less (default: 1)")
    sampling.add_argument("--max_new_tokens", type=count, default=256, help="longest answer, in tokens (default: 256)")
    sampling.add_argument("--seed", type=int, help="with which every answer begins; another one each time if left out")
    add_base_flags(parser)


def open_session(arguments: argparse.Namespace) -> "Session":
    """A session with what was given as `--adapter` or `--model`, checked; no weights are loaded yet."""
    from plainlora.chat.session import open_adapters, open_model
    from plainlora.settings.arguments import dtype_of

    dtype = dtype_of(arguments.dtype)
    if not arguments.adapter:
        refuse_flags_of_adapters(arguments)
        return open_model(arguments.model, dtype)
    return open_adapters(arguments.adapter, arguments.base_model, arguments.allow_other_base, arguments.base, dtype)


def run(arguments: argparse.Namespace) -> None:
    """Talks until standard input ends."""
    import plainlora.quiet  # noqa: F401
    from plainlora.chat.sampling import Sampling
    from plainlora.chat.terminal import Terminal

    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    Terminal(open_session(arguments), sampling, arguments.system).run()
