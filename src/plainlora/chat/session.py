"""A base and the adapters on it, one of which answers at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from threading import Event, Lock, Thread
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from plainlora.adapters.language_model import BASE, MODEL, answer_names, check_adapters, tokenizer_of_model
from plainlora.adapters.shared_base import find_shared_base
from plainlora.backends import Backend, loaded
from plainlora.base.loading import load_causal_lm, to_accelerator
from plainlora.base.tokenizer import check_known
from plainlora.chat.sampling import Sampling
from plainlora.chat.tokens import Token, read_tokens
from plainlora.errors import UserError
from plainlora.generation import default_generation_config, room_after, stop_ids
from plainlora.lora.interchange import read_config
from plainlora.peft_model.config import changes_base
from plainlora.run.adapter_base import BaseKind, describe_original, load_base_of, load_tokenizer_of


class _Stop(StoppingCriteria):
    """Ends an answer after the token at which one of some events is set."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    @property
    def is_met(self) -> bool:
        return any(event.is_set() for event in self.events)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_met, device=input_ids.device)


class Answer:
    """An answer that is being generated in a thread of its own. Its pieces are read by iterating over it.

    Attributes:
        text: What has been read of it.
        tokens: Its tokens with their probabilities, when it has been read to its end and they were asked for.
        is_cut: Whether it ended before the model ended it.
    """

    def __init__(self, streamer: TextIteratorStreamer, stopped: Event) -> None:
        self.text, self.tokens, self.is_cut = "", list[Token](), False
        self.error: Exception | None = None
        self._streamer, self._stopped, self._is_read = streamer, stopped, False

    def stop(self) -> None:
        """Ends it after the token that is being computed. What there is of it can still be read."""
        self._stopped.set()

    def __iter__(self) -> Iterator[str]:
        for piece in () if self._is_read else self._streamer:
            shown = piece if self.text else piece.lstrip()
            self.text += shown
            if shown:
                yield shown
        self._is_read = True
        if self.error is not None:
            raise self.error


class Session:
    """Answers by a base and by each adapter on it, or by a whole model, one at a time.

    Args:
        load: Loads the base, or the whole model; called once, when the first answer or `model` is asked for.
        tokenizers: The tokenizer of each of those that answer, by name.
        adapters: Folder and back end of each adapter, by name.
        notes: What is to be known of the base.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizers: dict[str, PreTrainedTokenizerBase],
        adapters: dict[str, tuple[str, Backend]],
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizers, self.adapters, self.notes, self._load = tokenizers, adapters, list(notes), load
        self._lock, self._closed = Lock(), Event()
        self._on_base = ExitStack()  # the adapter that is loaded
        self._loaded: tuple[str, nn.Module] | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, or the whole model."""
        return to_accelerator(self._load())

    @property
    def names(self) -> list[str]:
        """Those that answer: the base first."""
        return list(self.tokenizers)

    def _adapted(self, name: str) -> nn.Module:
        """The model with one adapter loaded, or with none; the adapter stays until another one is asked for."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            self._on_base.close()
            if name in self.adapters:
                folder, backend = self.adapters[name]
                self._loaded = name, self._on_base.enter_context(loaded(backend, self.model, folder))
        return self.model if self._loaded is None else self._loaded[1]

    def close(self) -> None:
        """Ends the answer that is being generated and those that wait, and takes the adapter out."""
        self._closed.set()
        with self._lock:
            self._loaded = None
            self._on_base.close()

    @contextmanager
    def model_of(self, name: str, strength: float = 1.0) -> Iterator[nn.Module]:
        """The model that answers under a name, within the block. Nobody else's question changes it meanwhile.

        Args:
            name: One of `names`.
            strength: Of an adapter, dimensionless; see `plainlora.lora.strength`.
        """
        with self._lock:
            model = self._adapted(name)
            with ExitStack() as scaling:
                if name in self.adapters:
                    scaling.enter_context(self.adapters[name][1].scaled(model, strength))
                yield model

    @contextmanager
    def answer(
        self, name: str, prompt: str, sampling: Sampling, strength: float = 1.0, with_tokens: bool = False
    ) -> Iterator[Answer]:
        """An answer, which is generated while it is read. Leaving the block ends it.

        Args:
            name: Who answers, one of `names`.
            prompt: The rendered prompt.
            sampling: How tokens are chosen.
            strength: Of an adapter, dimensionless.
            with_tokens: Whether to keep the probabilities of its tokens.

        Raises:
            PromptTooLong: The prompt fills the model's context.
            UserError: It holds a token that the model does not know.
        """
        tokenizer = self.tokenizers[name]
        batch = tokenizer([prompt], add_special_tokens=False, return_tensors="pt").to(self.model.device)
        check_known(batch["input_ids"].flatten().tolist(), tokenizer, self.model.config)
        room = room_after(batch["input_ids"].shape[1], self.model.config)
        streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        stopped = Event()
        answer, criterion = Answer(streamer, stopped), _Stop(stopped, self._closed)

        def generate() -> None:
            try:
                with self.model_of(name, strength) as model:
                    if not criterion.is_met:
                        _generate(model, tokenizer, batch, sampling, room, streamer, criterion, answer, with_tokens)
            except Exception as error:  # of any class: raised where the answer is read
                answer.error = error
            finally:
                streamer.on_finalized_text("", stream_end=True)

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield answer
        finally:
            answer.stop()
            while thread.is_alive():
                with suppress(KeyboardInterrupt):  # a second Ctrl-C: the thread ends after its token
                    thread.join()


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: Any,
    sampling: Sampling,
    room: int | None,
    streamer: TextIteratorStreamer,
    criterion: _Stop,
    answer: Answer,
    with_tokens: bool,
) -> None:
    """Runs `model.generate` into a streamer, and completes the answer."""
    ends = stop_ids(model, tokenizer)
    settings = sampling.config(room, ends, cast(int | None, tokenizer.pad_token_id))
    settings.output_logits = with_tokens
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    elif sampling.do_sample:
        torch.seed()
    with default_generation_config(model):
        output = cast(Callable[..., Any], model.generate)(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([criterion]),
            streamer=streamer,
        )
    ids = output.sequences[0, batch["input_ids"].shape[1] :].tolist()
    answer.is_cut = ids[-1] not in (ends or ())
    if with_tokens:
        answer.tokens = read_tokens(ids, (scores[0] for scores in output.logits), tokenizer)


def open_model(name: str, dtype: torch.dtype | str = "auto") -> Session:
    """A session with a whole model, which is checked before a weight is loaded.

    Args:
        name: Its folder.
        dtype: Of its weights; `"auto"` for the checkpoint's.

    Raises:
        UserError: It is no language model that can be loaded.
    """
    tokenizer = tokenizer_of_model(name)
    return Session(lambda: load_causal_lm(name, dtype=dtype), {MODEL: tokenizer}, {})


def open_adapters(
    adapters: Sequence[str],
    base_model: str | None = None,
    allow_other_base: bool = False,
    kind: BaseKind = "16bit",
    dtype: torch.dtype | str = "auto",
) -> Session:
    """A session with adapters and their base, all of them checked before a weight is loaded.

    Args:
        adapters: Their folders.
        base_model: Hub id or folder to use instead of the base that the adapters name.
        allow_other_base: See `plainlora.run.adapter_base.find_base`.
        kind: See `plainlora.run.adapter_base.load_base_of`.
        dtype: Of the base's weights; `"auto"` for the checkpoint's.

    Raises:
        UserError: They share no base, or one changes its base.
        LoRAError: A folder holds no adapter.
    """
    check_adapters(adapters)
    for adapter in adapters:
        if changes_base(read_config(adapter)):
            raise UserError(
                f"PEFT changes the base's own weights or layers when it loads {adapter}, so base and adapter cannot "
                f"take turns on it; use plainlora generate --adapter {adapter}, or the final adapter of its run"
            )
    bases = find_shared_base(adapters, base_model, allow_other_base)
    names = answer_names(adapters)
    own = {name: load_tokenizer_of(*each) for name, each in zip(names, zip(adapters, bases, strict=True), strict=True)}
    return Session(
        lambda: load_base_of(adapters[0], bases[0], kind, dtype),
        {BASE: own[names[0]], **own},
        {name: (adapter, base.backend) for name, adapter, base in zip(names, adapters, bases, strict=True)},
        [*describe_original(adapters[0], kind), *(base.warning for base in bases if base.warning)],
    )
