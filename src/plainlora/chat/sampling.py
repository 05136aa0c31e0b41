"""How the next token is chosen, by the names that Transformers gives it."""

import math
from dataclasses import dataclass

from transformers import GenerationConfig

from plainlora.errors import UserError

OF_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Sampling:
    """The settings of an answer; what is `None` is left to Transformers' default.

    https://huggingface.co/docs/transformers/v5.23.0/en/main_classes/text_generation#transformers.GenerationConfig

    Attributes:
        do_sample: Whether tokens are drawn at random; otherwise the most probable one is taken.
        temperature: By which the logits are divided (dimensionless), above 0.
        top_p: Only the most probable tokens that together have this probability are drawn from, in (0, 1].
        top_k: Only this many of the most probable tokens are drawn from; 0 for all.
        repetition_penalty: By which the logits of tokens that have occurred are made smaller (dimensionless).
        max_new_tokens: Longest answer, in tokens.
        seed: Every answer begins with it; `None` for other answers each time.

    Raises:
        UserError: A value is outside of its range, or one is given that greedy answers would ignore.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in OF_SAMPLING if not self.do_sample else ():
            if getattr(self, name) is not None:
                raise UserError(f"{name} is for sampling, and answers are greedy; add do_sample, or leave it out")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a number above 0, not {value:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p:g}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k must be at least 0, not {self.top_k}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be at least 0 and below 2^63, not {self.seed}")

    def config(self, room: int | None, stop_ids: list[int] | None, pad: int | None) -> GenerationConfig:
        """The same for `model.generate`.

        Args:
            room: Tokens that the context has left; `None` for no end.
            stop_ids: The tokens that end an answer.
            pad: The pad token.
        """
        chosen = {name: getattr(self, name) for name in (*OF_SAMPLING, "repetition_penalty")}
        return GenerationConfig(
            do_sample=self.do_sample,
            max_new_tokens=self.max_new_tokens if room is None else min(self.max_new_tokens, room),
            eos_token_id=stop_ids,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **{name: value for name, value in chosen.items() if value is not None},
        )
