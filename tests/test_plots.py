"""Pictures show every value that they are given, where it belongs."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from plainlora.plots import plot_diff


def drawn(modules: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], str]:
    """The text of each cell of the first panel by row and layer; the n-th module has the norm n."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    sizes = [{"r": 2, "norm": float(number), "used_rank": 1} for number in range(1, len(modules) + 1)]
    given: dict[str, dict[str, Any]] = {
        name: {"adapters": [size], "cosine": None} for name, size in zip(modules, sizes, strict=True)
    }
    plot_diff(["one"], given, folder / "diff.png")
    axes = figures[0].axes[0]
    rows, columns = ([label.get_text() for label in each] for each in (axes.get_yticklabels(), axes.get_xticklabels()))
    return {(rows[int(y)], columns[int(x)]): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def test_a_module_of_each_layer_has_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["model.layers.0.attn.q", "model.layers.0.attn.v", "model.layers.11.attn.q", "lm_head"]
    assert drawn(names, tmp_path, monkeypatch) == {
        ("attn.q", "0"): "1", ("attn.v", "0"): "2", ("attn.q", "11"): "3", ("lm_head", "0"): "4",
    }  # fmt: skip


def test_an_encoder_and_a_decoder_do_not_share_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["model.encoder.layers.0.attn.q", "model.decoder.layers.0.attn.q"]
    assert drawn(names, tmp_path, monkeypatch) == {
        ("model.encoder.layers.attn.q", "0"): "1", ("model.decoder.layers.attn.q", "0"): "2",
    }  # fmt: skip
