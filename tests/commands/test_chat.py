"""`plainlora chat` as typed: through a pipe, in a terminal, and refused."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from plainlora.commands import main
from plainlora.data.prompts import assistant_message, render, user_message
from plainlora.generation import generate
from tests.commands.test_generate import with_template
from tests.conftest import ROOT, make_model
from tests.lora.oracle import save_peft_adapter
from tests.merging.test_merge import quantized_run, trained_adapter
from tests.refusals import Run

Chat = Callable[..., list[str]]
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chatty(adapter: Path | str) -> Path:
    """The same adapter with a chat template that takes a system prompt."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    return Path(adapter)


@pytest.fixture
def adapter(tmp_path: Path, model_dirs: dict[str, Path]) -> Path:
    return chatty(trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.5))


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Chat:
    """Says some lines to the command, and returns the lines that it prints after its greeting."""

    def say(lines: list[str], *arguments: str | Path) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        main(["chat", "--max_new_tokens", "12", *map(str, arguments)])
        printed = capfd.readouterr().out.splitlines()
        greeting = next(number for number, line in enumerate(printed) if "/help lists the commands" in line)
        return printed[greeting + 1 :]

    return say


def answers(folder: Path) -> list[str]:
    """The assistant's messages of a saved conversation."""
    messages = json.loads(folder.read_text(encoding="utf-8"))["messages"]
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_a_conversation_of_several_turns_with_a_system_prompt_and_both_who_answer(
    chat: Chat, adapter: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.jsonl"
    printed = chat(["Name it.", "/base", "And?", "/tuned", "Why?", f"/save {saved}"], "--adapter", adapter,
                   "--system", "Be brief.")  # fmt: skip
    assert printed[-2:] == [f"Saved as {saved}.", ""]
    tokenizer, base = AutoTokenizer.from_pretrained(adapter), make_model("llama")
    from plainlora import load_adapter

    tuned = load_adapter(make_model("llama"), adapter)
    messages, expected = [{"role": "system", "content": "Be brief."}], []
    for question, model in (("Name it.", tuned), ("And?", base), ("Why?", tuned)):
        messages.append(user_message(question))
        prompt = render(messages, tokenizer, for_generation=True)
        expected += generate(model, tokenizer, [prompt], 12)
        messages.append(assistant_message(expected[-1]))
    assert answers(saved) == expected
    assert len(set(expected)) == 3
    assert json.loads(saved.read_text())["messages"] == messages


def test_commands_say_what_they_did_and_what_they_cannot(chat: Chat, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    said = chat(
        [
            *("/foo", "/save x.jsonl", "/tuned nope", "/system Be brief.", "/system", "/clear", "Name it."),
            *(
                f"/save {tmp_path}/there.jsonl",
                "/save",
                f"/save {tmp_path}/gone/x.jsonl",
                "/help",
                "",
                "/exit",
                "never",
            ),
        ],
        *("--adapter", adapter),
    )
    assert said[0] == "/foo is not a command; /help lists them, and a space before the / asks it"
    assert said[1] == "there is nothing to save yet; ask something first"
    assert said[2] == "nope names no single adapter; /tuned NAME takes one of tuned"
    assert said[3:6] == ["The system prompt is set.", "There is no system prompt now.", "A new conversation begins."]
    rest = [line for line in said if line.startswith(("/save", str(tmp_path), "there is no folder"))]
    assert rest[0] == f"{tmp_path}/there.jsonl already exists; give another name"
    assert rest[1].startswith("/save needs the name of a file that ends in .jsonl")
    assert rest[2] == f"there is no folder {tmp_path}/gone; make it, or give another name"
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert "/exit               ends; so do Ctrl-D, and Ctrl-C at the prompt" in said


def test_a_question_may_begin_with_a_slash_after_a_space(chat: Chat, adapter: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    said = chat([" /etc/hosts: what is it?", f"/save {saved}"], "--adapter", adapter)
    assert not any("is not a command" in line for line in said)
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert messages[0] == {"role": "user", "content": "/etc/hosts: what is it?"}


def test_several_adapters_and_a_whole_model(
    chat: Chat, adapter: Path, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    other = chatty(save_peft_adapter(tmp_path / "other", model_dirs["llama"]))
    asked = ["Name it.", "/clear", "/tuned other", "Name it.", f"/save {tmp_path}/other.jsonl", "/tuned"]
    said = chat(asked, "--adapter", adapter, other)
    assert f"The adapter {other} answers from now on." in said
    assert f"that names no single adapter; /tuned NAME takes one of {adapter}, {other}" in said
    chat(["Name it.", f"/save {tmp_path}/alone.jsonl"], "--adapter", other)
    assert answers(tmp_path / "other.jsonl") == answers(tmp_path / "alone.jsonl")
    said = chat(["/base", "/tuned", "Name it."], "--model", model_dirs["llama"])
    assert said[0].startswith("there is no base beside a whole model")
    assert said[1].startswith("there is no adapter beside a whole model")


def test_a_seed_makes_the_same_conversation(chat: Chat, adapter: Path) -> None:
    def drawn(*more: str) -> list[str]:
        sampled = ("--do_sample", "--temperature", "3", "--top_k", "0", "--adapter", adapter, *more)
        return chat(["Name it.", "And?"], *sampled)

    assert drawn("--seed", "4") == drawn("--seed", "4") != drawn("--seed", "5")
    assert drawn() != drawn()


def test_a_conversation_that_fills_the_context_says_so_and_is_not_lost(
    chat: Chat, adapter: Path, tmp_path: Path
) -> None:
    said = chat(["Name it.", "word " * 300, f"/save {tmp_path}/chat.jsonl"], "--adapter", adapter)
    (full,) = [line for line in said if "context" in line and "tokens" in line and not line.startswith("[cut")]
    assert full.endswith("shorten it; /save keeps the conversation, /clear begins a new one")
    assert len(answers(tmp_path / "chat.jsonl")) == 1


def test_without_a_template_it_is_said_once_and_each_question_stands_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = trained_adapter("llama", model_dirs, tmp_path / "adapter", scale=0.5)
    saved = [tmp_path / f"{number}.jsonl" for number in range(2)]
    lines = [f"Name it.\n/save {path}\n" for path in saved]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    main(["chat", "--adapter", str(adapter), "--max_new_tokens", "8"])
    assert capfd.readouterr().out.count("no chat template") == 1
    assert json.loads(saved[0].read_text()) == json.loads(saved[1].read_text())
    assert json.loads(saved[0].read_text())["prompt"] == "Name it."


def test_an_adapter_of_a_quantised_run_says_on_what_it_answers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    adapter = with_template(quantized_run(model_dirs, tmp_path / "adapter"))
    for base, said in (("16bit", 1), ("dequantized", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Name it.\n"))
        main(["chat", "--adapter", str(adapter), "--max_new_tokens", "4", "--base", base])
        assert capfd.readouterr().out.count("note: trained on quantised weights; here the base is") == said


def test_what_cannot_be_used_is_one_line(
    plainlora: Run, adapter: Path, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    other = save_peft_adapter(tmp_path / "other", model_dirs["gpt2"], "gpt2")
    assert "other was trained on" in plainlora("chat", "--adapter", adapter, other)
    assert "target_modules: none of" in plainlora("chat", "--adapter", adapter, "--base_model", model_dirs["gpt2"])
    assert "is a whole model, not an adapter" in plainlora("chat", "--adapter", model_dirs["llama"])
    assert "is an adapter; give it as --adapter" in plainlora("chat", "--model", adapter)
    assert "--base_model is for an adapter" in plainlora(
        "chat", "--model", model_dirs["llama"], "--base_model", model_dirs["llama"]
    )
    assert "temperature is for sampling" in plainlora("chat", "--adapter", adapter, "--temperature", "0.5")
    with_template(adapter)
    assert "knows the roles user and assistant" in plainlora("chat", "--adapter", adapter, "--system", "Be brief.")


def test_a_line_that_is_not_utf_8_costs_that_line_alone(adapter: Path) -> None:
    command = [sys.executable, "-c", "from plainlora.commands import main; main()", "chat", "--max_new_tokens", "4"]
    done = subprocess.run(
        [*command, "--adapter", str(adapter)], input=b"bad \xff byte\nName it.\n/clear\n", cwd=ROOT, timeout=300,
        capture_output=True, check=True,
    )  # fmt: skip
    printed = done.stdout.decode().splitlines()
    assert printed[1] == "that line is not UTF-8 text; type it again"
    assert printed[-2:] == ["A new conversation begins.", ""]


class InTerminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.printed = ""
        pid, self.terminal = pty.fork()
        if pid == 0:
            code = "from plainlora.commands import main; main()"
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-c", code, "chat", *map(str, arguments)])
        self.pid = pid

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Reads until a text is printed; what comes before it is done with."""
        end = time.monotonic() + seconds
        while text not in self.printed:
            assert time.monotonic() < end, self.printed
            if select.select([self.terminal], [], [], 1)[0]:
                self.printed += os.read(self.terminal, 4096).decode(errors="replace")
        self.printed = self.printed.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def exit_code(self) -> int:
        while True:  # a terminal that is not read holds its process back
            try:
                if not os.read(self.terminal, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def endless(tmp_path: Path, model_dirs: dict[str, Path]) -> Path:
    """An adapter whose answers end by the context of its base alone, which is very long."""
    base = tmp_path / "base"
    shutil.copytree(model_dirs["llama"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return chatty(save_peft_adapter(tmp_path / "adapter", base))


@pytest.mark.parametrize("last", ["\x04", "\x03", "/exit\r"])
def test_ctrl_c_ends_an_answer_and_then_the_program(endless: Path, tmp_path: Path, last: str) -> None:
    terminal = InTerminal("--adapter", endless, "--max_new_tokens", "90000")
    terminal.wait_for("> ")
    terminal.type("Name it.\r")
    time.sleep(3)
    terminal.type("\x03")
    terminal.wait_for("[stopped; what there is of the answer is kept]")
    terminal.wait_for("> ")
    terminal.type(f"/save {tmp_path}/chat.jsonl\r")
    terminal.wait_for("Saved as")
    terminal.wait_for("> ")
    terminal.type(last)
    assert terminal.exit_code() == 0
    assert len(answers(tmp_path / "chat.jsonl")[0]) > 20
