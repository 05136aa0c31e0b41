"""The playground: a local page on which a base and its adapters answer side by side."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is used, in this process alone

import gradio as gr

from plainlora.chat import markup
from plainlora.chat.conversation import Conversation
from plainlora.chat.sampling import Sampling
from plainlora.chat.session import Session
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.lora.interchange import read_config
from plainlora.run.folder import PICTURES

FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the reader's own, so that none is fetched
STRONGEST = 2.0  # times the scaling of training
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
SETTINGS = ("system", "max_new_tokens", "do_sample", "temperature", "top_p", "seed")


def _sampling(settings: dict[str, Any]) -> Sampling:
    drawn = {name: settings[name] for name in ("temperature", "top_p")} if settings["do_sample"] else {}
    seed = None if settings["seed"] is None else int(settings["seed"])
    longest = int(settings["max_new_tokens"])
    return Sampling(do_sample=settings["do_sample"], max_new_tokens=longest, seed=seed, **drawn)


def _answer(session: Session, name: str, question: str, settings: dict[str, Any], strength: float) -> Iterator[str]:
    """One column's content, again and again while the answer grows."""
    try:
        prompt = Conversation(settings["system"].strip()).prompt(question, session.tokenizers[name])
        yield markup.text("...")
        with session.answer(name, prompt, _sampling(settings), strength, with_tokens=True) as answer:
            for _ in answer:
                yield markup.text(answer.text)
        cut = markup.note("Cut at max_new_tokens, or at the end of the model's context.") if answer.is_cut else ""
        yield markup.answer(answer.tokens) + cut
    except (UserError, LoRAError) as error:
        sentence = str(error)
        yield markup.error(sentence[0].upper() + sentence[1:] + ".")


def _answer_all(session: Session, question: str, *values: Any) -> Iterator[list[str]]:
    """All columns' content, one after the other."""
    settings = dict(zip(SETTINGS, values, strict=False))
    strengths = dict(zip(session.adapters, values[len(SETTINGS) :], strict=True))
    columns = dict.fromkeys(session.names, "")
    for name in session.names:
        for content in _answer(session, name, question, settings, strengths.get(name, 1.0)):
            columns[name] = content
            yield list(columns.values())


def _answer_one(session: Session, name: str, question: str, *values: Any) -> Iterator[str]:
    """One adapter's column with its new strength; nothing if nothing was asked yet."""
    settings = dict(zip(SETTINGS, values, strict=False))
    if question.strip():
        yield from _answer(session, name, question, settings, values[-1])


def _pictures(folder: str) -> list[Path]:
    """The training pictures of a run's folder, or of the run that a checkpoint belongs to."""
    run = Path(folder).parent if Path(folder).name.startswith("checkpoint-") else Path(folder)
    return [run / name for name in PICTURES if (run / name).is_file()]


def _add_column(session: Session, number: int, base: str) -> tuple[gr.HTML, gr.Slider | None]:
    """The answer's place, and the slider if an adapter answers there."""
    name = session.names[number]
    with gr.Column(min_width=320):
        if name not in session.adapters:
            gr.HTML(markup.who(name, base))
            return gr.HTML(elem_id=f"answer-{number}", apply_default_css=False), None
        folder, _ = session.adapters[name]
        gr.HTML(markup.who(name, folder if name != folder else ""))
        config = read_config(folder)
        whole = bool(config.modules_to_save) or config.bias != "none"
        info = "of A and B; what is trained whole stays as trained" if whole else "0: the base, 1: as trained"
        slider = gr.Slider(0, STRONGEST, 1, step=0.05, label=f"strength of {name}", info=info)
        answer = gr.HTML(elem_id=f"answer-{number}", apply_default_css=False)
        for path in _pictures(folder):
            with gr.Accordion(f"training: {path.stem}", open=False):
                gr.HTML(markup.picture(path, f"{path.stem} of the training run {folder}"))
        return answer, slider


def build(session: Session, base: str) -> gr.Blocks:
    """The page.

    Args:
        session: Who answers.
        base: The base's name.
    """
    with gr.Blocks(title="PlainLoRA playground", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# PlainLoRA playground")
        for sentence in session.notes:
            gr.HTML(markup.note(sentence))
        question = gr.Textbox("", label="question", lines=3, autofocus=True, elem_id="question")
        with gr.Row():
            ask = gr.Button("Answer", variant="primary", elem_id="ask", min_width=120)
            stop = gr.Button("Stop", elem_id="stop", min_width=120)
        with gr.Accordion("settings", open=False):
            system = gr.Textbox("", label="system prompt", lines=2, elem_id="system")
            longest = gr.Slider(1, 1024, 128, step=1, label="max_new_tokens")
            with gr.Row():
                sampled = gr.Checkbox(False, label="do_sample", info="otherwise the most probable token is taken")
                temperature = gr.Slider(0.05, 2, 1, step=0.05, label="temperature", info="with do_sample")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p", info="with do_sample")
                seed = gr.Number(0, label="seed", precision=0, info="with do_sample; empty: another each time")
        settings = [system, longest, sampled, temperature, top_p, seed]
        with gr.Row():
            columns = {name: _add_column(session, number, base) for number, name in enumerate(session.names)}
        sliders = {name: slider for name, (_, slider) in columns.items() if slider is not None}
        answers = [answer for answer, _ in columns.values()]
        inputs = [question, *settings, *sliders.values()]
        every: Callable[..., Any] = partial(_answer_all, session)
        begun: list[dict[str, Any]] = [ask.click(every, inputs, answers, **ONE_AT_A_TIME)]
        begun.append(question.submit(every, inputs, answers, **ONE_AT_A_TIME))
        for name, slider in sliders.items():
            one: Callable[..., Any] = partial(_answer_one, session, name)
            inputs_of_one, column = [question, *settings, slider], columns[name][0]
            begun.append(slider.release(one, inputs_of_one, column, trigger_mode="always_last", **ONE_AT_A_TIME))
        stop.click(None, cancels=begun)
    return page


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Starts the server in threads of its own, and returns the page's address.

    Args:
        page: From `build`.
        host: The address that it listens on.
        port: Its port.
    """
    sans, mono = FONTS
    _, address, _ = page.queue(api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="orange", font=sans, font_mono=mono),
        css=markup.STYLE,
    )
    return address
