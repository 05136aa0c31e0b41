"""`plainlora playground` as typed, and its page in Chromium."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from plainlora.commands.playground import is_loopback
from plainlora.data.prompts import render_prompt
from plainlora.generation import generate
from plainlora.plots import plot_loss
from tests.commands.test_chat import chatty
from tests.conftest import CONFIGS, ROOT, make_model
from tests.lora.oracle import save_peft_adapter
from tests.lora.test_strength import with_alpha_times
from tests.refusals import Run

EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>${1+1}{{value}}</span>'"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def playground(log: Path, *arguments: str | Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command in a process of its own, and the address of its page."""
    command = [sys.executable, "-c", "from plainlora.commands import main; main()", "playground"]
    with log.open("wb") as stream:
        port = free_port()
        process = subprocess.Popen(
            [*command, "--port", str(port), *map(str, arguments)], cwd=ROOT, stdout=stream, stderr=stream
        )
    try:
        end = time.monotonic() + 240
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> list[Path]:
    """Two adapters of one base; the first has a picture of its training."""
    folder = tmp_path_factory.mktemp("playground")
    both = [chatty(save_peft_adapter(folder / name, model_dirs["llama"])) for name in ("one", "two")]
    plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], None, both[0] / "loss.png")
    return both


@pytest.fixture(scope="module")
def page(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with both."""
    log = tmp_path_factory.mktemp("log") / "log"
    with playground(log, "--adapter", *adapters) as (address, _):
        yield address
    assert "Traceback" not in log.read_text()


def wait_for(window: Any, condition: Callable[[], Any], seconds: float = 90) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(window, seconds, 0.2, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def find(window: Any, selector: str) -> list[Any]:
    from selenium.webdriver.common.by import By

    return window.find_elements(By.CSS_SELECTOR, selector)


def open_page(window: Any, address: str) -> None:
    window.get(address)
    wait_for(window, lambda: find(window, "#question textarea"))


def ask(window: Any, question: str) -> None:
    from selenium.webdriver.common.keys import Keys

    (box,) = find(window, "#question textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, question)
    find(window, "button#ask")[0].click()


def answers(window: Any, columns: int = 3) -> list[str]:
    """What stands in each column when all of them are complete."""
    wait_for(window, lambda: len(find(window, ".pl-hint")) == columns)
    script = "return [...document.querySelectorAll('.pl-text')].map(each => each.textContent.trim())"
    return list(window.execute_script(script))


def expected(question: str, *adapters: Path | str | None) -> list[str]:
    """The answers of the base, where it says `None`, and of PEFT's adapters."""
    found = []
    for adapter in adapters:
        model = make_model("llama")
        adapted = model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()
        tokenizer = AutoTokenizer.from_pretrained(next(each for each in adapters if each is not None))
        found += generate(adapted, tokenizer, [render_prompt(question, tokenizer)], 128)
    return found


def set_strength(window: Any, number: int, strength: str) -> None:
    """Types a strength into the box of a slider."""
    from selenium.webdriver.common.keys import Keys

    box = find(window, "input[data-testid=number-input][aria-label*=strength]")[number]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(strength, Keys.TAB)


@pytest.mark.browser
def test_base_and_adapters_answer_side_by_side_and_the_slider_changes_one(
    page: str, adapters: list[Path], tmp_path: Path
) -> None:
    from tests.browser import browser, hosts_asked

    with browser() as window:
        open_page(window, page)
        ask(window, "Name it.")
        base, one, two = expected("Name it.", None, *adapters)
        assert answers(window) == [base, one, two]
        doubled = expected("Name it.", with_alpha_times(str(adapters[0]), 2.0, tmp_path / "doubled"))[0]
        assert len({base, one, two, doubled}) == 4
        for strength, changed in (("2", doubled), ("0", base), ("1", one)):
            set_strength(window, 0, strength)
            wait_for(window, lambda changed=changed: answers(window) == [base, changed, two])
        assert hosts_asked(window) == {"127.0.0.1"}


@pytest.mark.browser
def test_a_token_tells_its_probability_on_hover_and_the_picture_is_shown(page: str) -> None:
    from selenium.webdriver import ActionChains

    from tests.browser import browser

    with browser() as window:
        open_page(window, page)
        ask(window, "Name it.")
        answers(window)
        token = find(window, ".pl-token")[2]
        ActionChains(window).move_to_element(token).perform()
        shown = window.execute_script("return getComputedStyle(arguments[0], '::after').content", token)
        assert "%; most probable: " in shown
        assert token.get_attribute("data-tip") in shown.replace('\\"', '"')
        next(each for each in find(window, "button") if "training: loss" in each.text).click()
        (picture,) = wait_for(window, lambda: find(window, "img.pl-picture"))
        wait_for(window, lambda: picture.get_property("naturalWidth") > 100)


@pytest.mark.browser
def test_what_is_wrong_is_a_sentence_on_the_page(page: str) -> None:
    from tests.browser import browser

    with browser() as window:
        open_page(window, page)

        def said() -> list[str]:
            return [each.text for each in find(window, ".pl-error")]

        ask(window, "  ")
        wait_for(window, lambda: said() == ["The question is empty; type some text."] * 3)
        ask(window, "word " * 400)
        wait_for(window, lambda: all("the model's context is 256; shorten it." in each for each in said()))
        ask(window, "Name it.")
        assert len(answers(window)) == 3
        assert said() == []


@pytest.mark.browser
def test_two_people_at_once_get_their_own_answers(page: str, adapters: list[Path]) -> None:
    from tests.browser import browser

    with browser() as first, browser() as second:
        open_page(first, page)
        open_page(second, page)
        ask(first, "Name it.")
        ask(second, "Repeat word4.")
        assert answers(second) == expected("Repeat word4.", None, *adapters)
        assert answers(first) == expected("Name it.", None, *adapters)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_the_window(page: str, width: int, dark: bool) -> None:
    from tests.browser import browser

    with browser(width, dark) as window:
        open_page(window, page)
        ask(window, "Name it.")
        answers(window)
        find(window, "details")[0].click()
        wide, seen = window.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen == width


@pytest.mark.browser
def test_what_a_model_says_is_not_run_and_ctrl_c_ends_the_page(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A GPT-2 whose every state is the same, so that it says one word for ever; and that word is markup."""
    from tests.browser import browser

    own = AutoTokenizer.from_pretrained(save_tokenizer(tokenizer, tmp_path / "base"))
    own.add_tokens([EVIL])
    model = GPT2LMHeadModel(GPT2Config(**CONFIGS["gpt2"]().to_dict() | {"vocab_size": len(own)}))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[-1] = 1
    model.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    own.save_pretrained(tmp_path / "adapter")
    adapter = chatty(tmp_path / "adapter")
    with playground(tmp_path / "log", "--adapter", adapter, "--host", "0.0.0.0") as (address, process):
        warned = "warning: everybody who reaches 0.0.0.0 can use this page; there is no password"
        assert warned in (tmp_path / "log").read_text().splitlines()
        with browser() as window:
            open_page(window, address)
            ask(window, EVIL)
            assert answers(window, 2) == [EVIL * 128] * 2
            assert EVIL.replace(" ", "␣") in find(window, ".pl-token")[0].get_attribute("data-tip")
            assert window.title == "PlainLoRA playground"
            assert not find(window, ".pl-text img, .pl-text script")
            ask(window, "again")
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_what_cannot_be_served_is_one_line(
    plainlora: Run, tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_peft_adapter(tmp_path / "adapter", model_dirs["llama"])
    other = save_peft_adapter(tmp_path / "other", model_dirs["gpt2"], "gpt2")
    port = str(free_port())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(port)))
        taken.listen()
        said = plainlora("playground", "--adapter", adapter, "--port", port)
    assert said.startswith(f"error: nothing can listen on 127.0.0.1 port {port} (")
    assert said.endswith("give another --port or --host")
    assert "nothing can listen" in plainlora("playground", "--adapter", adapter, "--host", "192.0.2.1", "--port", port)
    assert "must be a port from 1 to 65535" in plainlora("playground", "--adapter", adapter, "--port", "0")
    assert "other was trained on" in plainlora("playground", "--adapter", adapter, other, "--port", port)
    assert "is a whole model" in plainlora("playground", "--adapter", model_dirs["llama"], "--port", port)
    monkeypatch.delitem(sys.modules, "plainlora.chat.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = plainlora("playground", "--adapter", adapter)
    assert said == 'error: this needs gradio: pip install "plainlora[playground]"'


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.org", False)]
)
def test_which_addresses_are_this_machines_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


def test_the_page_sends_nothing_home() -> None:
    import plainlora.chat.page  # noqa: F401

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    from gradio import analytics

    assert not analytics.analytics_enabled()
