"""The conversation in a terminal: questions and commands, a line each, and answers as they come."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from plainlora.adapters.language_model import BASE, MODEL, TUNED
from plainlora.chat.conversation import Conversation, check_system
from plainlora.chat.sampling import Sampling
from plainlora.chat.session import Session
from plainlora.errors import UserError, first_line
from plainlora.folders import write_durably
from plainlora.generation import PromptTooLong
from plainlora.lora.errors import LoRAError

with suppress(ModuleNotFoundError):  # Windows has none
    import readline  # noqa: F401  gives `input` arrow keys and a history


class Terminal:
    """Reads lines from standard input and prints answers until it ends.

    Args:
        session: Who can answer. At first it is the first adapter, or the whole model.
        sampling: How tokens are chosen.
        system: The first system prompt, or an empty text.

    Raises:
        UserError: The chat template takes no system prompt.
    """

    def __init__(self, session: Session, sampling: Sampling, system: str = "") -> None:
        self.session, self.sampling, self.conversation = session, sampling, Conversation(system)
        self.name = next(name for name in session.names if name != BASE)
        check_system(system, self.tokenizer)
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/base": (self._base, "", "the base answers from now on"),
            "/tuned": (self._tuned, "[NAME]", "the adapter answers; of several, the one of this folder"),
            "/system": (self._system, "[TEXT]", "the system prompt from now on; without TEXT, none"),
            "/clear": (self._clear, "", "begins a new conversation"),
            "/save": (self._save, "FILE.jsonl", "writes the conversation as a row that training takes"),
            "/help": (self._help, "", "shows this list"),
            "/exit": (self._exit, "", "ends; so do Ctrl-D, and Ctrl-C at the prompt"),
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of who answers."""
        return self.session.tokenizers[self.name]

    def run(self) -> None:
        """Loads the model, and answers until the input ends, or a command or Ctrl-C ends it."""
        assert self.session.model is not None
        for note in self.session.notes:
            print(f"note: {note}")
        if self.tokenizer.chat_template is None:
            print("note: the tokenizer has no chat template, so each question stands alone, as plain text")
        print(f"{self._who()} answers. /help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation.")
        prompt = "\n> " if sys.stdin.isatty() else ""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte is refused with its line, see `read`
        try:
            while True:
                self.read(input(prompt))
        except (EOFError, KeyboardInterrupt):
            print()

    def read(self, line: str) -> None:
        """Does what a line asks for; what cannot be done is said in a sentence."""
        try:
            line.encode("utf-8")
            word, _, rest = line.rstrip().partition(" ")
            if word in self.commands:
                self.commands[word][0](rest.strip())
            elif word.startswith("/"):
                raise UserError(f"{word} is not a command; /help lists them, and a space before the / asks it")
            elif line.strip():
                self._ask(line.strip())
        except UnicodeEncodeError:
            print("that line is not UTF-8 text; type it again")
        except PromptTooLong as error:
            more = "; /save keeps the conversation, /clear begins a new one" if self.conversation.turns else ""
            print(f"{error}{more}")
        except (UserError, LoRAError, OSError) as error:
            print(first_line(error))

    def _ask(self, question: str) -> None:
        prompt = self.conversation.prompt(question, self.tokenizer)
        stopped = False
        with self.session.answer(self.name, prompt, self.sampling) as answer:
            while True:
                try:
                    for piece in answer:
                        print(piece, end="", flush=True)
                    break
                except KeyboardInterrupt:  # the rest that there is of it is read
                    stopped = True
                    answer.stop()
        print()
        if answer.text.strip():
            self.conversation.add(question, answer.text)
        if stopped:
            kept = "what there is of the answer is kept" if answer.text.strip() else "ask again"
            print(f"[stopped; {kept}]")
        elif answer.is_cut:
            print("[cut at max_new_tokens, or at the end of the model's context]")

    def _who(self) -> str:
        if self.name == TUNED:
            return f"The adapter {self.session.adapters[TUNED][0]}"
        return {BASE: "The base", MODEL: "The model"}.get(self.name, f"The adapter {self.name}")

    def _base(self, rest: str) -> None:
        if BASE not in self.session.names:
            raise UserError("there is no base beside a whole model; give an adapter with --adapter")
        self._switch(BASE)

    def _tuned(self, rest: str) -> None:
        adapters = list(self.session.adapters)
        named = [name for name in adapters if rest in (name, Path(name).name, self.session.adapters[name][0])]
        if not adapters:
            raise UserError("there is no adapter beside a whole model; give one with --adapter")
        chosen = named if rest else adapters
        if len(chosen) != 1:
            known = ", ".join(adapters)
            raise UserError(f"{rest or 'that'} names no single adapter; /tuned NAME takes one of {known}")
        self._switch(chosen[0])

    def _switch(self, name: str) -> None:
        check_system(self.conversation.system, self.session.tokenizers[name])
        self.name = name
        print(f"{self._who()} answers from now on.")

    def _system(self, text: str) -> None:
        check_system(text, self.tokenizer)
        self.conversation.system = text
        print("The system prompt is set." if text else "There is no system prompt now.")

    def _clear(self, rest: str) -> None:
        self.conversation.turns.clear()
        print("A new conversation begins" + ("; the system prompt stays." if self.conversation.system else "."))

    def _save(self, name: str) -> None:
        row = json.dumps(self.conversation.row(self.tokenizer), ensure_ascii=False)
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            raise UserError("/save needs the name of a file that ends in .jsonl, such as /save chat.jsonl")
        if path.exists():
            raise UserError(f"{path} already exists; give another name")
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}; make it, or give another name")
        write_durably(path, row + "\n")
        print(f"Saved as {path}.")

    def _help(self, rest: str) -> None:
        for name, (_, argument, does) in self.commands.items():
            print(f"{name + ' ' + argument:<20}{does}")

    def _exit(self, rest: str) -> None:
        raise EOFError
