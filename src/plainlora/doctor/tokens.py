"""Checks that tokenizer and chat template do the same in training and at inference."""

import tempfile
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from plainlora.data.encoding import IGNORED
from plainlora.data.prompts import apply_template, assistant_message, render, user_message
from plainlora.doctor.finding import Examination
from plainlora.errors import UserError
from plainlora.tasks.rows import PreparedRows

ASKED = [user_message("Name a colour.", "It is warm."), assistant_message("Red.")]
TEXT = "Name a colour: red."
SHOWN = 24  # characters of what a template renders


def examine_saving(tokenizer: PreTrainedTokenizerBase, rendered: bool, examination: Examination) -> None:
    """Checks that the tokenizer renders and tokenises the same after it is saved and loaded again.

    Otherwise, for example without the chat template, a model would answer badly on a server.

    Args:
        tokenizer: A tokenizer with the chat template installed.
        rendered: Whether the training rows are rendered by the template.
        examination: Gets the findings.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask on standard input
        except Exception as error:  # whatever a tokenizer's own code raises
            examination.add(
                "warning",
                "tokenizer",
                "saved",
                f"the saved tokenizer cannot be loaded again ({error}); at inference use the base's",
            )
            return
    differs = [
        what
        for what, left, right in (
            ("special tokens", tokenizer.special_tokens_map, again.special_tokens_map),
            ("tokens", tokenizer(TEXT).input_ids, again(TEXT).input_ids),
            *([("template", _rendered(tokenizer), _rendered(again))] if rendered else []),
        )
        if left != right
    ]
    if differs:
        message = f"saved with the adapter and loaded again, it differs in its {' and '.join(differs)}; fix the base's"
        examination.add("error", "tokenizer", "saved", message)
    else:
        what = "renders and tokenises" if rendered else "tokenises"
        examination.add("ok", "tokenizer", "saved", f"saved and loaded again, it {what} the same")


def examine_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, own: str | dict[str, str] | None, examination: Examination
) -> None:
    """Checks that the installed template renders the same as the base's own, which it replaces.

    An instruct model knows only the format of its own template.

    Args:
        tokenizer: A tokenizer with the chat template installed.
        name: The installed template, `alpaca` or a file; `None` if none was installed.
        own: The tokenizer's own chat template, if any.
        examination: Gets the findings.
    """
    if name is None or own is None:
        return
    if isinstance(own, dict):  # several, by purpose
        own = own.get("default", "")
    rendered, replaced = (_attempt(tokenizer, chat_template=source) for source in (None, own))
    if rendered == replaced:
        message = f"prompt_template {name} renders as the chat template of {tokenizer.name_or_path} does"
        examination.add("ok", "tokenizer", "own template", message)
        return
    message = (
        f"prompt_template {name} ({rendered[:SHOWN]!r}...) replaces the chat template of {tokenizer.name_or_path} "
        f"({replaced[:SHOWN]!r}...); an instruct model knows only its own; leave prompt_template out"
    )
    examination.add("warning", "tokenizer", "own template", message)


def _attempt(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The conversation as a template renders it; the empty text if the template refuses it."""
    try:
        return str(apply_template(ASKED, tokenizer, **options))
    except UserError:
        return ""


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [render(ASKED, tokenizer), render(ASKED[:1], tokenizer, for_generation=True)]


def examine_padding(rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, examination: Examination) -> None:
    """Checks that SFTTrainer's padding leaves all labels unchanged, so that EOS is trained even if pad == eos."""
    first = rows.train.select(range(min(100, len(rows.train))))
    examples: list[Any] = sorted(first, key=lambda row: len(row["input_ids"]))
    examples = [examples[0], examples[-1]]  # one is padded, unless all are of one length
    batch = DataCollatorForLanguageModeling(pad_token_id=int(tokenizer.pad_token_id or 0))(examples)
    kept = all(
        padded[: len(row["labels"])] == row["labels"] and set(padded[len(row["labels"]) :]) <= {IGNORED}
        for padded, row in zip(batch["labels"].tolist(), examples, strict=True)
    )
    pad, eos = f"{tokenizer.pad_token} ({tokenizer.pad_token_id})", f"{tokenizer.eos_token} ({tokenizer.eos_token_id})"
    if not kept:
        message = f"padding with {pad} changes the labels of a batch; set pad_token to another token than EOS {eos}"
        examination.add("error", "tokenizer", "pad", message)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        message = f"EOS {eos} is also the pad token; labels come from lengths, so EOS is trained and padding is not"
        examination.add("note", "tokenizer", "pad", message)
    else:
        examination.add("ok", "tokenizer", "pad", f"EOS {eos} is trained, the pad token {pad} is not")


def examine_ids(largest: int, subject: str, config: PretrainedConfig | None, examination: Examination) -> None:
    """Checks that the base has an embedding for every token.

    Args:
        largest: The largest token id in the rows.
        subject: The name of the rows.
        config: The base's config; `None` if it could not be loaded.
        examination: Gets the findings.
    """
    if config is None:
        return
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and largest >= size:
        message = f"token id {largest} has no embedding among the base's {size:,}; use the base's own tokenizer"
        examination.add("error", subject, "token ids", message, largest_id=largest, vocabulary=size)
    else:
        known = f"all below the base's {size:,}" if size is not None else "the base's config names no vocabulary"
        examination.add("ok", subject, "token ids", f"up to {largest:,}, {known}", largest_id=largest, vocabulary=size)
