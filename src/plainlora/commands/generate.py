"""`plainlora generate`: answers prompts with a base and with each adapter on it, or with a whole model."""

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plainlora.commands.model_flags import (
    add_adapter_or_model,
    add_base_flags,
    count,
    refuse_flags_of_adapters,
)
from plainlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plainlora.run.adapter_base import Base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add_adapter_or_model(parser)
    parser.add_argument("--prompt", required=True, action="append", help="rendered as in training; repeatable")
    parser.add_argument("--input", default="", help="Alpaca's optional input, for every prompt")
    parser.add_argument("--max_new_tokens", type=count, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--with_peft", action="store_true", help="also answer with PEFT's, on a base of its own")
    add_base_flags(parser)


def _answer_by_model(arguments: argparse.Namespace) -> None:
    """Prints every prompt with the answer of a whole model."""
    import plainlora.quiet  # noqa: F401
    from plainlora.adapters.language_model import tokenizer_of_model
    from plainlora.base.loading import load_causal_lm, to_accelerator
    from plainlora.generation import generate
    from plainlora.settings.arguments import dtype_of

    refuse_flags_of_adapters(arguments)
    tokenizer = tokenizer_of_model(arguments.model)
    prompts = _rendered(arguments, tokenizer)
    model = to_accelerator(load_causal_lm(arguments.model, dtype=dtype_of(arguments.dtype)))
    answers = generate(model, tokenizer, prompts, arguments.max_new_tokens)
    for prompt, answer in zip(arguments.prompt, answers, strict=True):
        print(f"\n{prompt}\n\n[model]\n{answer}")


def _rendered(arguments: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The prompts as the model is asked them."""
    from plainlora.data.prompts import render_prompt

    prompts = [render_prompt(prompt, tokenizer, arguments.input) for prompt in arguments.prompt]
    if not all(prompts):
        raise UserError("--prompt is empty, and there is no chat template; give some text")
    return prompts


@dataclass(frozen=True)
class _Answers:
    """What one adapter answers.

    Attributes:
        texts: An answer for each prompt.
        questions: The prompts with these answers, as `plainlora.merging.reload.ask` takes them.
        loss: The mean loss of the answers, in nats a token.
        changes: Whether the adapter changes any logit of them.
    """

    texts: list[str]
    questions: dict[str, Any]
    loss: float
    changes: bool


def _answer(
    model: "PreTrainedModel",
    adapter: str,
    base: "Base",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    longest: int,
) -> _Answers:
    """Loads an adapter onto a base, lets it answer, and takes it out again."""
    from plainlora.backends import loaded
    from plainlora.generation import generate
    from plainlora.merging.certificate import drift, mean_loss
    from plainlora.merging.eval_prompts import answered
    from plainlora.merging.reload import ask

    with loaded(base.backend, model, adapter) as adapted:
        texts = generate(adapted, tokenizer, prompts, longest)
        questions = answered(tokenizer, prompts, texts)
        tuned = ask(adapted, questions)
        with base.backend.disabled(adapted):
            changes = drift(ask(adapted, questions), tuned)[0] != 0
    return _Answers(texts, questions, mean_loss(tuned), changes)


def _losses_in_training(bases: "list[Base]", answers: "dict[str, _Answers]") -> list[float]:
    """The loss of each adapter's answers on the quantised base of training."""
    from plainlora.backends import loaded
    from plainlora.base.loading import to_accelerator
    from plainlora.merging.certificate import mean_loss
    from plainlora.merging.reload import ask
    from plainlora.run.adapter_base import load_quantized_base_of

    model, losses = to_accelerator(load_quantized_base_of(next(iter(answers)), bases[0])), []
    for base, (adapter, each) in zip(bases, answers.items(), strict=True):
        with loaded(base.backend, model, adapter) as adapted:
            losses.append(mean_loss(ask(adapted, each.questions)))
    return losses


def _print_side_by_side(prompts: list[str], answers: dict[str, list[str]]) -> None:
    for number, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for label, texts in answers.items():
            print(f"\n[{label}]\n{texts[number]}")


def run(arguments: argparse.Namespace) -> None:
    """Prints every prompt with its answers, and how the base differs from that of training."""
    if arguments.model is not None:
        _answer_by_model(arguments)
        return
    import plainlora.quiet  # noqa: F401
    from plainlora.adapters.language_model import BASE, answer_names, check_adapters
    from plainlora.adapters.shared_base import find_shared_base
    from plainlora.backends import BACKENDS
    from plainlora.base.loading import to_accelerator
    from plainlora.generation import generate
    from plainlora.run.adapter_base import describe_original, load_base_of, load_tokenizer_of
    from plainlora.settings.arguments import dtype_of

    adapters, longest = arguments.adapter, arguments.max_new_tokens
    check_adapters(adapters)
    bases = find_shared_base(adapters, arguments.base_model, arguments.allow_other_base)
    tokenizers = [load_tokenizer_of(adapter, base) for adapter, base in zip(adapters, bases, strict=True)]
    prompts = [_rendered(arguments, tokenizer) for tokenizer in tokenizers]
    on_original = list(describe_original(adapters[0], arguments.base))
    print(*on_original, sep="\n", end="\n" if on_original else "")
    warnings = [base.warning for base in bases if base.warning]
    warnings += [
        f"{adapter} renders prompts otherwise than {adapters[0]}; the base answers those of {adapters[0]}"
        for adapter, rendered in zip(adapters, prompts, strict=True)
        if rendered != prompts[0]
    ]

    def load_base() -> "PreTrainedModel":
        base, dtype = bases[0], dtype_of(arguments.dtype)
        return to_accelerator(load_base_of(adapters[0], base, arguments.base, dtype))

    model = load_base()
    shown = {BASE: generate(model, tokenizers[0], prompts[0], longest)}
    names = dict(zip(adapters, answer_names(adapters), strict=True))
    answers = {}
    for adapter, base, tokenizer, rendered in zip(adapters, bases, tokenizers, prompts, strict=True):
        answers[adapter] = _answer(model, adapter, base, tokenizer, rendered, longest)
        shown[names[adapter]] = answers[adapter].texts
        if not answers[adapter].changes:
            warnings.append(f"the adapter in {adapter} changes no logit of these prompts")
    del model  # before another base is loaded
    for adapter, tokenizer, rendered in zip(adapters, tokenizers, prompts, strict=True):
        if arguments.with_peft:
            by_peft = BACKENDS["peft"].load(load_base(), adapter)
            shown[f"{names[adapter]}, by PEFT"] = generate(by_peft, tokenizer, rendered, longest)
            del by_peft
    _print_side_by_side(arguments.prompt, shown)
    if on_original:
        for (adapter, each), there in zip(answers.items(), _losses_in_training(bases, answers), strict=True):
            print(
                f"\nloss of the {names[adapter]} answers, in nats a token: {each.loss:.3f} here, {there:.3f} on the "
                "quantised weights that training saw"
            )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
