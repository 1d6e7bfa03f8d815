"""What the pictures show: the figures' own data, and files that are pictures."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sparsecore import figures
from sparsecore.connectivity import LinearPath

PATH = LinearPath((0.0, 0.5, 1.0), (10.0, 40.0, 12.0), (0.3, 2.0, 0.4))
NAN = float("nan")

DRAWINGS: dict[str, Callable[[Path], Path]] = {
    "paths": lambda f: figures.draw_paths(f, {"a": PATH, "b": PATH}),
    "instabilities": lambda f: figures.draw_instabilities(f, {"dense": {1: 3.0, 0: 30.0, 0.5: 9}}),
    "angles": lambda f: figures.draw_angles(f, torch.tensor([[0, NAN], [0.5, 0]]), [0, 0.2]),
    "barriers": lambda f: figures.draw_barriers(f, {"SGD": {0.9: 4.0, 0.2: 1.0}}),
    "search": lambda f: figures.draw_search(f, [{"epoch": 1, "sparsity": 0.5, "accuracy": 80.0}]),
    "layers": lambda f: figures.draw_layers(f, {"cts": {"fc": 0.9}, "ltr": {"fc": 0.8}}),
    "gates": lambda f: figures.draw_gates(f, {str(i): torch.tensor([0, 1.0]) for i in range(6)}),
    "widths": lambda f: figures.draw_widths(f, {"strong": {1: [80.0, 82.0], 0.5: [70.0]}}),
}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, none of which is written."""
    figures_drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, file: figures_drawn.append(figure) or file)
    return figures_drawn


@pytest.fixture
def drawn(kept: list[Figure]) -> Callable[[str], Figure]:
    """The figure behind one of the drawings."""

    def draw(name: str) -> Figure:
        DRAWINGS[name](Path("unused"))
        return kept[-1]

    return draw


def points(line) -> list[tuple[float, float]]:
    xy = zip(line.get_xdata(), line.get_ydata(), strict=True)
    return [(round(float(x), 9), round(float(y), 9)) for x, y in xy]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_drawing_is_a_picture(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.png"
    assert DRAWINGS[name](file) == file
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 400
        assert len(set(image.convert("L").tobytes())) > 10  # not blank


def test_paths(drawn: Callable[[str], Figure]) -> None:
    figure = drawn("paths")
    for line in figure.axes[0].get_lines():
        assert points(line) == [(0, 10), (0.5, 40), (1, 12)]
    assert labels(figure) == ["a", "b"]


def test_instabilities_go_by_epoch_under_a_line(drawn: Callable[[str], Figure]) -> None:
    threshold, line = drawn("instabilities").axes[0].get_lines()
    assert set(threshold.get_ydata()) == {2.0}
    assert points(line) == [(0, 30), (0.5, 9), (1, 3)]


def test_angles_are_a_map_of_rounds(drawn: Callable[[str], Figure]) -> None:
    axes = drawn("angles").axes[0]
    values = axes.get_images()[0].get_array()
    assert values.mask.tolist() == [[False, True], [False, False]]
    assert values.filled(-1).tolist() == [[0, -1], [0.5, 0]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "20"]
    with pytest.raises(ValueError, match=r"expected shape \(3, 3\).*got \(2, 2\)"):
        figures.draw_angles(Path("unused"), torch.zeros(2, 2), [0, 0.2, 0.36])


def test_barriers_go_by_sparsity(drawn: Callable[[str], Figure]) -> None:
    axes = drawn("barriers").axes[0]
    assert points(axes.get_lines()[1]) == [(80, 1), (10, 4)]
    assert axes.get_xscale() == "log" and axes.xaxis_inverted()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["20", "90"]


def test_a_search_shows_what_its_records_have(kept: list[Figure]) -> None:
    records = [
        {"epoch": 1, "sparsity": 0.5, "accuracy": 80.0},
        {"epoch": 2, "sparsity": 0.9, "accuracy": 85.0, "hard_accuracy": 70.0},
        {"epoch": 3, "sparsity": 0.95, "accuracy": None},
    ]
    figures.draw_search(Path("unused"), records)
    left, right = kept[0].axes
    assert [points(line) for line in left.get_lines()] == [[(1, 80), (2, 85)], [(2, 70)]]
    assert points(right.get_lines()[0]) == [(1, 50), (2, 90), (3, 95)]
    assert labels(kept[0]) == ["accuracy, soft gates", "accuracy, hardened", "sparsity"]


def test_layers_stand_side_by_side(drawn: Callable[[str], Figure]) -> None:
    figure = drawn("layers")
    first, second = figure.axes[0].patches
    assert (first.get_height(), second.get_height()) == pytest.approx((90, 80))
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x())
    assert first.get_x() == pytest.approx(-0.4)  # centred on the layer
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["fc"]


def test_gates_are_counted(kept: list[Figure]) -> None:
    gates = {str(i): torch.tensor([0, 0.1, 0.6, 1.0]) for i in range(5)}
    figures.draw_gates(Path("unused"), gates, bins=2)
    assert [axes.get_visible() for axes in kept[0].axes] == [True] * 5 + [False] * 3
    for axes in kept[0].axes[:5]:
        assert axes.patches[0].get_data().values.tolist() == [2, 2]
        assert axes.get_yscale() == "log" and axes.get_ylim()[0] == 0.5 < 2 <= axes.get_ylim()[1]
    for bad in (1.1, -0.1, NAN):
        with pytest.raises(ValueError, match=r"gates of fc: expected values in \[0, 1\]"):
            figures.draw_gates(Path("unused"), {"fc": torch.tensor([0.5, bad])})


def test_widths_have_spreads(drawn: Callable[[str], Figure]) -> None:
    (bars,) = drawn("widths").axes[0].containers
    line, _, (spread,) = bars.lines
    assert points(line) == [(0.5, 70), (1, 81)]
    heights = [float(s[1, 1] - s[0, 1]) for s in spread.get_segments()]
    assert heights == pytest.approx([0, 2 * 2**0.5])  # ± the standard deviation


def test_nothing_to_draw_is_told() -> None:
    for draw in (
        figures.draw_paths, figures.draw_instabilities, figures.draw_barriers, figures.draw_layers,
        figures.draw_gates, figures.draw_widths,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected at least one, got none"):
            draw(Path("unused"), {})
    with pytest.raises(ValueError, match="records: expected at least one"):
        figures.draw_search(Path("unused"), [])


def test_csv_has_all_fields_of_all_rows(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "a": 0.1}, {"epoch": 2, "b": None, "c": "x,y"}]
    file = figures.write_csv(tmp_path / "rows.csv", iter(rows))
    assert file.read_text() == 'epoch,a,b,c\n1,0.1,,\n2,,,"x,y"\n'
    figures.write_csv(file, PATH.rows)
    back = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file.open())]
    assert back == PATH.rows
    with pytest.raises(ValueError, match="rows: expected at least one"):
        figures.write_csv(file, [])
    assert file.read_text()  # the old one is still there
