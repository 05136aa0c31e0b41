"""Answers as HTML: each token with how probable it was. All text of a model or of a person is escaped."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from plainlora.chat.tokens import Token

UNSURE, UNLIKELY = 0.5, 0.1  # probabilities below which a token is underlined, once and twice
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", " ": "␣"})
HINT = "Point at a word, or tap it, for its probability and what else might have stood there."

STYLE = """
.pl-who { overflow-wrap: anywhere; margin: 0; }
.pl-who b { font-size: 1.1em; }
.pl-answer { position: relative; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px; }
.pl-answer:has(.pl-token) { padding-bottom: 6em; }
.pl-text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 3em; line-height: 1.7; }
.pl-token { background: rgb(234 88 12 / calc(0.6 * var(--doubt))); border-radius: 3px; outline: none; }
.pl-unsure { text-decoration: underline dotted; text-underline-offset: 3px; }
.pl-unlikely { text-decoration: underline double; text-underline-offset: 3px; }
.pl-hint, .pl-token:hover::after, .pl-token:focus::after {
  position: absolute; left: 0; right: 0; bottom: 0; height: 5.8em; padding: 6px 12px; overflow: hidden;
  box-sizing: border-box; border-top: 1px solid var(--border-color-primary); border-radius: 0 0 8px 8px;
  font-size: 0.9em; line-height: 1.6; background: var(--background-fill-secondary); color: var(--body-text-color);
  white-space: normal; text-decoration: none;
}
.pl-token:hover::after, .pl-token:focus::after { content: attr(data-tip); z-index: 1; }
.pl-token:hover::after { z-index: 2; }
.pl-note { font-size: 0.9em; color: var(--body-text-color-subdued); margin: 6px 0 0; }
.pl-error { border-left: 4px solid #dc2626; padding: 4px 10px; margin: 0; overflow-wrap: anywhere; }
.pl-table { display: block; overflow-x: auto; font-size: 0.9em; }
.pl-table td, .pl-table th { padding: 2px 10px 2px 0; text-align: left; white-space: pre; }
.pl-picture { width: 100%; max-width: 640px; height: auto; border-radius: 8px; }
"""


def who(name: str, folder: str) -> str:
    """The heading of a column: who answers, and where it lies."""
    return f'<p class="pl-who"><b>{escape(name)}</b><br>{escape(folder)}</p>'


def text(answer: str) -> str:
    """An answer without probabilities, while it is generated."""
    return f'<div class="pl-answer"><div class="pl-text" aria-live="polite">{escape(answer)}</div></div>'


def error(sentence: str) -> str:
    """What is wrong, as a sentence."""
    return f'<p class="pl-error" role="alert">{escape(sentence)}</p>'


def note(sentence: str) -> str:
    """What is to be known of an answer."""
    return f'<p class="pl-note">{escape(sentence)}</p>'


def answer(tokens: Sequence[Token]) -> str:
    """An answer with each token's probability, on hover and as a table.

    The less probable a token, the stronger its colour; below one half it is underlined too.
    """
    spans = "".join(map(_span, tokens))
    rows = "".join(
        f"<tr><td>{_shown(token.text)}</td><td>{_percent(token.probability)}</td><td>{_alternatives(token)}</td></tr>"
        for token in tokens
    )
    return (
        f'<div class="pl-answer"><div class="pl-text">{spans}</div><div class="pl-hint">{HINT}</div></div>'
        "<details><summary>The probabilities as a table</summary>"
        f'<table class="pl-table"><tr><th>token</th><th>probability</th><th>most probable</th></tr>{rows}</table>'
        "</details>"
    )


def _span(token: Token) -> str:
    kind = (" pl-unlikely" if token.probability < UNLIKELY else " pl-unsure") if token.probability < UNSURE else ""
    tip = f"{_shown(token.text)} {_percent(token.probability)}; most probable: {_alternatives(token)}"
    return (
        f'<span class="pl-token{kind}" tabindex="-1" style="--doubt:{1 - token.probability:.2f}" data-tip="{tip}">'
        f"{escape(token.text)}</span>"
    )


def _alternatives(token: Token) -> str:
    return " · ".join(f"{_shown(text)} {_percent(share)}" for text, share in token.alternatives)


def _shown(text: str) -> str:
    """A token's text with its white space made visible, escaped."""
    return escape(text.translate(VISIBLE))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "&lt; 0.1%"


def picture(path: Path, description: str) -> str:
    """A PNG inside the page, so that no file is served."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="pl-picture" alt="{escape(description)}" src="data:image/png;base64,{content}">'
