"""Figures of points and numbers: what they draw is what they were given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import geoopt
import matplotlib
import numpy as np
import pytest
import torch

from manifold_merge import LoRAQuotient, frechet_mean, plots

matplotlib.use("Agg")

PLANE = geoopt.Euclidean(1)
TRIANGLE = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
FIGURES: dict[str, Callable[..., Any]] = {
    "distance_matrix": lambda ax=None: plots.plot_distance_matrix(PLANE, TRIANGLE, ax=ax),
    "map": lambda ax=None: plots.plot_map(PLANE, TRIANGLE, TRIANGLE.mean(0), ax=ax),
    "barrier": lambda ax=None: plots.plot_barrier({"a": [1, 3, 2]}, ax=ax),
    "spectrum_change": lambda ax=None: plots.plot_spectrum_change(
        {"a": [2.0, 1.0]}, {"merge": [[2.0, 1.0], [4.0, 1.0]]}, ax=ax
    ),
    "convergence": lambda ax=None: plots.plot_convergence({"a": [1, 0.1, 0.0]}, ax=ax),
}


@pytest.fixture(autouse=True)
def closed_figures():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def drawn(name: str) -> Any:
    from matplotlib.figure import Figure

    return FIGURES[name](Figure().add_subplot())


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_on_the_given_axes_or_on_new_ones(name):
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert FIGURES[name](ax) is ax
    assert ax.get_title()
    fresh = FIGURES[name]()
    assert fresh is not ax
    if name != "distance_matrix":
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.get_legend() is not None


@pytest.mark.parametrize("name", [name for name in plots.__all__ if name.startswith("plot_")])
def test_each_figure_function_takes_axes_and_returns_them(name):
    signature = inspect.signature(getattr(plots, name))
    assert signature.parameters["ax"].default is None
    assert signature.return_annotation == "Axes"


def test_a_heat_map_shows_each_distance():
    ax = drawn("distance_matrix")
    expected = [[0, 4, 3], [4, 0, 5], [3, 5, 0]]
    assert np.allclose(ax.images[0].get_array(), expected)
    assert [text.get_text() for text in ax.texts][:3] == ["0.00", "4.00", "3.00"]


def test_a_map_of_the_plane_is_the_plane():
    ax = drawn("map")
    marks = [line.get_xydata()[0] for line in ax.lines if len(line.get_xydata()) == 1]
    assert [line.get_label() for line in ax.lines if len(line.get_xydata()) == 1] == [
        "0", "1", "2", "mean"
    ]  # fmt: skip
    where = torch.tensor(np.array(marks))
    points = torch.cat((TRIANGLE, TRIANGLE.mean(0)[None]))
    assert torch.allclose(torch.cdist(where, where), torch.cdist(points, points))
    paths = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) > 1]
    for path, end in zip(paths, marks, strict=False):  # straight, from the mean to the model
        assert np.allclose(path, np.linspace(marks[3], end, len(path)))
    shares = [float(label.split("(")[1].split()[0]) for label in (ax.get_xlabel(), ax.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_map_says_what_a_plane_cannot_show():
    corners = torch.eye(5, dtype=torch.float64)  # a simplex: four equal directions
    ax = plots.plot_map(PLANE, corners)
    assert "25 %" in ax.get_xlabel()
    assert "25 %" in ax.get_ylabel()


def test_a_map_of_adapters_does_not_depend_on_their_gauges():
    manifold = LoRAQuotient(5, 4, metric="invariant")
    x = manifold.random(9, 2, dtype=torch.float64)
    adapters = [manifold.retr(x, 0.1 * torch.randn_like(x)) for _ in range(3)]
    others = [manifold.random_representative(y) for y in adapters]
    mean = frechet_mean(manifold, adapters).point

    def lengths(points: Any) -> torch.Tensor:
        ax = plots.plot_map(manifold, points, mean, names=["a", "b", "c"])
        marks = [line.get_xydata()[0] for line in ax.lines if len(line.get_xydata()) == 1]
        where = torch.tensor(np.array(marks))
        return torch.cdist(where, where)

    assert torch.allclose(lengths(adapters), lengths(others), atol=1e-6)


def test_the_barrier_is_the_height_above_the_straight_line():
    ax = drawn("barrier")  # 3 in the middle, where the line is at 1.5
    assert ax.get_legend().get_texts()[0].get_text() == "a (barrier 1.5)"
    assert ax.lines[0].get_ydata().tolist() == [1, 3, 2]
    flat = plots.plot_barrier({"b": [2, 0, 2]}).get_legend().get_texts()[0].get_text()
    assert flat == "b (barrier 0)"


def test_spectra_are_medians_over_modules():
    ax = drawn("spectrum_change")
    assert ax.lines[0].get_ydata().tolist() == [2, 1]
    assert ax.lines[1].get_ydata().tolist() == [3, 1]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]


def test_convergence_draws_zero_at_the_floor():
    values = drawn("convergence").lines[0].get_ydata()
    assert values.tolist() == [1, 0.1, 1e-17]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.plot_distance_matrix(PLANE, TRIANGLE[:1]), "two or more single points"),
        (lambda: plots.plot_map(PLANE, TRIANGLE[None]), "two or more single points"),
        (lambda: plots.plot_map(PLANE, TRIANGLE, names=["a"]), "names: expected 3"),
        (lambda: plots.plot_barrier({}), "at least one path"),
        (lambda: plots.plot_barrier({"a": [1, 2], "b": [1]}), r"curves\['b'\]: expected 2"),
        (lambda: plots.plot_spectrum_change({}, {}), "at least one model"),
        (lambda: plots.plot_convergence({}), "at least one method"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equal_models_share_one_place():
    same = TRIANGLE[:1].expand(3, 2)
    ax = plots.plot_map(PLANE, same, same[0])
    for line in ax.lines:
        assert np.allclose(line.get_xydata(), 0)
    assert math.isfinite(ax.get_xlim()[0])
