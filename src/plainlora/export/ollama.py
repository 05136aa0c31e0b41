"""The Modelfile for Ollama, whose templates are Go's.

https://docs.ollama.com/modelfile. A chat template that writes the same text around every message of a role can be told
in Go; which text that is, is read off what Transformers renders, and conversations put together from it are compared
with Transformers' again. Any other template has no Modelfile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import Message, apply_template, without_bos
from plainlora.errors import UserError
from plainlora.export.chat_template import CHATS

_MARKS = ("first-mark", "second-mark", "third-mark", "fourth-mark")
Around = tuple[str, str]


@dataclass(frozen=True)
class Pieces:
    """What a template writes.

    Attributes:
        head: Before the first message, if there is no system message.
        around: Before and after a message, by its role.
        prompt: After the last message, for the model to answer.
    """

    head: str
    around: dict[str, Around]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation, for the model to answer."""
        head = "" if messages[0]["role"] == "system" else self.head
        inner = (str(message["content"]).join(self.around[message["role"]]) for message in messages)
        return head + "".join(inner) + self.prompt

    def as_go(self) -> str | None:
        """The template in Go's language; `None` if a piece holds what begins an action in it."""
        if any("{{" in piece or '"""' in piece for piece in (self.head, self.prompt, *sum(self.around.values(), ()))):
            return None
        head = f"{{{{ if not .System }}}}{self.head}{{{{ end }}}}" if self.head else ""
        cases = "".join(
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        )
        return f"{head}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """The text that the chat template writes around messages; `None` if it depends on more than their roles."""
    first, second = _MARKS[:2]
    turns = [
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant", "user", "assistant"), _MARKS, strict=True)
    ]
    try:
        one, asked = (_render(turns[:1], tokenizer, prompt) for prompt in (False, True))
        before, to_answer, to_question, _, end = _cut(_render(turns, tokenizer, False), _MARKS)
        (opening, after_user) = _cut(one, (first,))
    except (UserError, ValueError):
        return None
    around = {
        "user": (to_question.removeprefix(end), after_user),
        "assistant": (to_answer.removeprefix(after_user), end),
    }
    head = opening.removesuffix(around["user"][0])
    try:
        system = {"role": "system", "content": second}
        before_system, to_user, _ = _cut(_render([system, *turns[:1]], tokenizer, False), (second, first))
        around = {"system": (before_system, to_user.removesuffix(around["user"][0]))} | around
    except (UserError, ValueError):
        pass  # the template takes no system message
    pieces = Pieces(head, around, asked.removeprefix(one))
    return pieces if before == opening and _renders_the_same(pieces, tokenizer) else None


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    """A rendering without the BOS that Ollama adds."""
    return without_bos(str(apply_template(list(messages), tokenizer, add_generation_prompt=prompt)), tokenizer)


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """The pieces of a text between marks; raises `ValueError` if one is not there."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        pieces.append(piece)
    return [*pieces, text]


def _renders_the_same(pieces: Pieces, tokenizer: PreTrainedTokenizerBase) -> bool:
    for chat in CHATS:
        if all(message["role"] in pieces.around for message in chat):
            try:
                if pieces.render(chat) != _render(chat, tokenizer, True):
                    return False
            except UserError:
                return False
    return True


def modelfile(base: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase, comment: str) -> str | None:
    """A Modelfile; `None` if the chat template cannot be told in Go's language.

    Args:
        base: The file of a whole model.
        adapter: The file of an adapter on it; `None` if it is merged.
        tokenizer: The tokenizer, with its chat template.
        comment: The first line.
    """
    if tokenizer.chat_template is None:
        template: str | None = "{{ .Prompt }}"
    else:
        pieces = find_pieces(tokenizer)
        template = None if pieces is None else pieces.as_go()
    if template is None:
        return None
    lines = [f"# {comment}", f"FROM {base}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{tokenizer.eos_token}"']
    return "\n".join(lines) + "\n"
