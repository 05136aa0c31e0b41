"""Pictures show every value that they are given, where it belongs."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plainlora.plots import plot_against_size, plot_confusion, plot_diff, plot_loss, plot_trials


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would have been written."""
    found: list[Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


def cells(axes: Axes) -> dict[tuple[str, str], str]:
    """The text of each cell by row and column."""
    rows, columns = ([label.get_text() for label in each] for each in (axes.get_yticklabels(), axes.get_xticklabels()))
    return {(rows[int(y)], columns[int(x)]): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def drawn(modules: list[str], folder: Path, figures: list[Figure]) -> dict[tuple[str, str], str]:
    """The text of each cell of the first panel by row and layer; the n-th module has the norm n."""
    sizes = [{"r": 2, "norm": float(number), "used_rank": 1} for number in range(1, len(modules) + 1)]
    given: dict[str, dict[str, Any]] = {
        name: {"adapters": [size], "cosine": None} for name, size in zip(modules, sizes, strict=True)
    }
    plot_diff(["one"], given, folder / "diff.png")
    return cells(figures[0].axes[0])


def test_a_module_of_each_layer_has_a_cell(tmp_path: Path, figures: list[Figure]) -> None:
    names = ["model.layers.0.attn.q", "model.layers.0.attn.v", "model.layers.11.attn.q", "lm_head"]
    assert drawn(names, tmp_path, figures) == {
        ("attn.q", "0"): "1", ("attn.v", "0"): "2", ("attn.q", "11"): "3", ("lm_head", "0"): "4",
    }  # fmt: skip


def test_an_encoder_and_a_decoder_do_not_share_cells(tmp_path: Path, figures: list[Figure]) -> None:
    names = ["model.encoder.layers.0.attn.q", "model.decoder.layers.0.attn.q"]
    assert drawn(names, tmp_path, figures) == {
        ("model.encoder.layers.attn.q", "0"): "1", ("model.decoder.layers.attn.q", "0"): "2",
    }  # fmt: skip


def test_the_loss_plot_has_a_point_for_each_value_of_the_log(tmp_path: Path, figures: list[Figure]) -> None:
    history: list[dict[str, Any]] = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-4},
        {"step": 20, "eval_loss": 2.5},
        {"step": 20, "loss": 2.0},
        {"step": 40, "eval_loss": 1.75},
        {"step": 40, "train_loss": 2.25, "train_runtime": 9.0},
    ]
    plot_loss(history, 3.5, tmp_path / "loss.png", unit="text", rows="validation")
    (axes,) = figures[0].axes
    lines = {str(line.get_label()): line for line in axes.lines}
    points = {name: [tuple(map(float, point)) for point in line.get_xydata()] for name, line in lines.items()}
    assert points["training rows"] == [(10.0, 3.0), (20.0, 2.0)]
    assert points["validation rows"] == [(20.0, 2.5), (40.0, 1.75)]
    assert {y for _, y in points["validation rows, base model (3.50)"]} == {3.5}
    assert len(points) == 3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per text)")


def test_the_confusion_matrix_has_each_count_in_its_row_and_column(tmp_path: Path, figures: list[Figure]) -> None:
    tables = {"base": [[3, 4], [5, 1006]], "tuned": [[7, 0], [1, 1010]]}
    plot_confusion(["ham", "spam"], tables, tmp_path / "confusion.png")
    base, tuned = figures[0].axes
    assert cells(base) == {
        ("ham", "ham"): "3", ("ham", "spam"): "4", ("spam", "ham"): "5", ("spam", "spam"): "1,006",
    }  # fmt: skip
    assert cells(tuned)["spam", "ham"] == "1"
    assert base.get_title() == "base\n1,009 of 1,018 right"
    assert tuned.get_title() == "tuned\n1,017 of 1,018 right"
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in (base, tuned)] == [("predicted", "true")] * 2
    shares = base.images[0].get_array()
    assert shares is not None
    assert shares.tolist() == [[3 / 7, 4 / 7], [5 / 1011, 1006 / 1011]]


def test_the_sweep_plot_has_every_trial_and_the_best_so_far(tmp_path: Path, figures: list[Figure]) -> None:
    trials = [(0, 2.0), (2, 3.0), (3, 1.5), (5, 1.75)]
    plot_trials(trials, "eval_loss", maximize=False, path=tmp_path / "sweep.png")
    plot_trials(trials, "accuracy", maximize=True, path=tmp_path / "sweep.png")
    for figure, expected in zip(figures, ([2.0, 2.0, 1.5, 1.5], [2.0, 3.0, 3.0, 3.0]), strict=True):
        every, best = figure.axes[0].lines
        assert [(int(x), float(y)) for x, y in every.get_xydata()] == trials
        assert list(best.get_xdata()) == [0, 2, 3, 5]
        assert list(best.get_ydata()) == expected


def test_the_table_plot_has_each_variant_with_its_interval(tmp_path: Path, figures: list[Figure]) -> None:
    rows: list[dict[str, Any]] = [
        {"variant": "lora", "method": "lora", "trainable_params": 1000, "score": 0.5, "score_half_width": 0.25},
        {"variant": "full", "method": "full", "trainable_params": 90000, "score": 0.75, "score_half_width": None},
    ]
    plot_against_size(rows, "score", "test accuracy, %", tmp_path / "table.png", factor=100)
    (axes,) = figures[0].axes
    assert [[float(number) for number in line.get_xydata()[0]] for line in axes.lines if line.get_marker() == "o"] == [
        [1000.0, 50.0], [90000.0, 75.0],
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["lora", "full"]
    (bar,) = [each for each in axes.collections if each.get_paths()]
    assert bar.get_paths()[0].vertices.tolist() == [[1000.0, 25.0], [1000.0, 75.0]]
