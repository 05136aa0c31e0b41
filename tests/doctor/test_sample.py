"""A row is shown as it is trained."""

import copy

from transformers import PreTrainedTokenizerFast

from plainlora.data.encoding import Encoder
from plainlora.data.prompts import install_template
from plainlora.doctor.sample import Segment, show_sample, split_sample
from tests.conftest import ROWS


def test_the_trained_part_of_a_conversation_is_marked(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    install_template(own, "alpaca")
    messages = [
        {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Réd."},
        {"role": "user", "content": "Another."}, {"role": "assistant", "content": "Blue."},
    ]  # fmt: skip
    row = Encoder(own, "messages", "text", answers_only=True)({"messages": messages})
    segments = split_sample(row["input_ids"], row["labels"], own)
    assert [segment.trained for segment in segments] == [False, True, False, True]
    assert [segment.text for segment in segments if segment.trained] == ["Réd.<|endoftext|>", "Blue.<|endoftext|>"]
    assert "".join(segment.text for segment in segments) == own.decode(row["input_ids"])
    plain = show_sample(segments, colour=False)
    assert "### Response:\n⟦Réd.<|endoftext|>⟧" in plain
    assert "\033[1;32mBlue.<|endoftext|>\033[0m" in show_sample(segments, colour=True)


def test_a_row_that_is_trained_whole_is_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(ROWS[1]["output"]).input_ids
    assert split_sample(ids, ids, tokenizer) == [Segment(ROWS[1]["output"], True)]


def test_the_middle_of_a_long_piece_is_left_out() -> None:
    shown = show_sample([Segment("a" * 400 + "b" * 400, False)], colour=False)
    assert shown == "a" * 300 + " ... 200 characters ... " + "b" * 300
