"""What was asked and answered so far, and the prompt that comes of it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from plainlora.data.prompts import Message, assistant_message, render, render_prompt, user_message
from plainlora.errors import UserError


@dataclass
class Conversation:
    """The messages of a conversation; the whole of it is rendered as in training.

    Attributes:
        system: The system prompt, or an empty text.
        turns: Messages of the user and of the assistant, by turns.
    """

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All messages, the system prompt first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def prompt(self, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text that the model goes on from. Without a chat template it is the question alone.

        Raises:
            UserError: The question is empty, the template refuses the messages, or see `check_system`.
        """
        if not question.strip():
            raise UserError("the question is empty; type some text")
        check_system(self.system, tokenizer)
        if tokenizer.chat_template is None:
            return render_prompt(question, tokenizer)
        return render([*self.messages, user_message(question)], tokenizer, for_generation=True)

    def add(self, question: str, answer: str) -> None:
        """Appends a turn."""
        self.turns += [user_message(question), assistant_message(answer)]

    def row(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The conversation as a row that training takes.

        Without a chat template training takes plain text, and it is the last turn.

        Raises:
            UserError: There is no turn yet.
        """
        if not self.turns:
            raise UserError("there is nothing to save yet; ask something first")
        if tokenizer.chat_template is None:
            question, answer = self.turns[-2:]
            return {"prompt": question["content"], "completion": answer["content"]}
        return {"messages": self.messages}


def check_system(system: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a system prompt reaches the model.

    Raises:
        UserError: There is no chat template, or it refuses a system prompt or leaves it out.
    """
    if not system:
        return
    if tokenizer.chat_template is None:
        raise UserError("a system prompt needs a chat template, and the tokenizer has none; leave it out")
    if system.strip() not in render([{"role": "system", "content": system}, user_message("a")], tokenizer):
        raise UserError("the chat template leaves a system prompt out; put it into the question")
