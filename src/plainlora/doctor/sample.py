"""One training row as text, with the trained parts marked."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from plainlora.data.encoding import IGNORED

TRAINED, ASIDE, PLAIN = "\033[1;32m", "\033[2m", "\033[0m"
OPENING, CLOSING = "⟦", "⟧"
LONGEST = 600  # characters of a segment that are shown


@dataclass(frozen=True)
class Segment:
    """The text of consecutive tokens that are all trained, or all not."""

    text: str
    trained: bool


def split_sample(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Splits a row's text into trained and untrained segments.

    A segment is the text that its tokens add to the text before, because some tokenizers decode them alone
    differently.
    """
    flags = [label != IGNORED for label in labels]
    ends = [at for at in range(1, len(flags)) if flags[at] != flags[at - 1]] + [len(flags)]
    segments, text = [], ""
    for end in ends:
        longer = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        segments.append(Segment(longer[len(text) :], flags[end - 1]))
        text = longer
    return segments


def show_sample(segments: Sequence[Segment], colour: bool) -> str:
    """The text with its trained segments in colour, or between ⟦ and ⟧."""
    shown = []
    for segment in segments:
        text = _middle_left_out(segment.text)
        if colour:
            shown.append(f"{TRAINED if segment.trained else ASIDE}{text}{PLAIN}")
        else:
            shown.append(f"{OPENING}{text}{CLOSING}" if segment.trained else text)
    return "".join(shown)


def _middle_left_out(text: str) -> str:
    left_out = len(text) - LONGEST
    half = LONGEST // 2
    return text if left_out <= 0 else f"{text[:half]} ... {left_out:,} characters ... {text[-half:]}"
