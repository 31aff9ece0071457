"""Figures. Each function takes ``ax=None`` and returns the ``Axes`` that it drew on.

They need matplotlib, an optional dependency: ``pip install "manifold-merge[plot]"``. The first
five draw what :func:`~manifold_merge.report.inspect_adapters` found; the others take points of any
manifold, or plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import geoopt
import numpy as np
import torch
from torch import Tensor

from manifold_merge.accurate import accurate
from manifold_merge.plots_style import (
    COLOURS,
    PLOT_HINT,
    _axes,
    _heat_map,
    _layer_axis,
    _layers,
    _legend,
    _line,
    _need,
    _profile,
    _share,
)
from manifold_merge.toolbox import geodesic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from manifold_merge.report_data import Inspection

__all__ = [
    "PLOT_HINT",
    "plot_barrier",
    "plot_convergence",
    "plot_distance_matrix",
    "plot_distances",
    "plot_map",
    "plot_merge_error",
    "plot_norms",
    "plot_principal_angles",
    "plot_spectra",
    "plot_spectrum_change",
]


def plot_distances(inspection: Inspection, ax: Axes | None = None) -> Axes:
    """Draw the relative distance between each two adapters as a heat map.

    Args:
        inspection: Of adapters that can be compared.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: There are no pairs: one adapter, or shapes that do not fit each other.
        ImportError: matplotlib is not installed.
    """
    _need(inspection.pairs, "distances need two adapters of one base model")
    ax = _axes(ax, 0.7 * len(inspection.adapters) + 2.5)
    names = [adapter.name for adapter in inspection.adapters]
    table = np.zeros((len(names), len(names)))
    for pair in inspection.pairs:
        table[pair.first, pair.second] = table[pair.second, pair.first] = pair.distance
    # The range is that of the measure itself, so that figures of different adapters compare.
    bar = _heat_map(ax, table, names, limit=2)
    bar.set_ticks([0, 2**0.5, 2], labels=["0 same", "1.41 orthogonal", "2 opposite"])
    bar.set_label("relative distance (no unit)", labelpad=12)
    ax.set_title("Relative distance between adapters")
    return ax


def plot_norms(inspection: Inspection, ax: Axes | None = None) -> Axes:
    """Draw the Frobenius norm of each adapter's update, layer by layer.

    Args:
        inspection: Of one or more adapters.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    layers = _layers([m.name for m in inspection.modules])
    for i, adapter in enumerate(inspection.adapters):
        squares = [
            sum(inspection.modules[j].norms[i] ** 2 for j in indices) for indices in layers.values()
        ]
        ax.plot(np.sqrt(squares), label=adapter.name, **_line(i))
    _layer_axis(ax, layers)
    ax.set_ylabel(r"norm of the update $|\Delta W|_F$ (units of the weights)")
    ax.set_ylim(bottom=0)
    ax.set_title("Size of each update by layer")
    _legend(ax)
    return ax


def plot_spectra(inspection: Inspection, ax: Axes | None = None) -> Axes:
    """Draw the singular values of the updates relative to the largest, per adapter.

    The line is the median over modules, the band holds 80 % of them.

    Args:
        inspection: Of one or more adapters.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    for i, adapter in enumerate(inspection.adapters):
        rows = [
            np.array(m.spectra[i][: m.numerical_ranks[i]]) / m.spectra[i][0]
            for m in inspection.modules
            if m.norms[i]
        ]
        _profile(ax, rows, i, adapter.name)
    ax.set_yscale("log")
    ax.set_xlabel("index of the singular value (1 is the largest)")
    ax.set_ylabel(r"singular value $\sigma_j / \sigma_1$ (no unit)")
    ax.set_title("Spectra of the updates: median over modules, band of 80 %")
    _legend(ax)
    return ax


def plot_principal_angles(
    inspection: Inspection, ax: Axes | None = None, *, pair: tuple[int, int] | None = None
) -> Axes:
    """Draw the principal angles between the column spaces (of B) and the row spaces (of A).

    The line is the median over modules and pairs, the band holds 80 % of them.

    Args:
        inspection: Of adapters that can be compared.
        ax: Where to draw; a new figure if ``None``.
        pair: Indices of two adapters; all pairs if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: There are no pairs, or not this one.
        ImportError: matplotlib is not installed.
    """
    _need(inspection.pairs, "principal angles need two adapters of one base model")
    chosen = [p for p in inspection.pairs if pair is None or {p.first, p.second} == set(pair)]
    _need(chosen, f"pair {pair} is not one of 0 to {len(inspection.adapters) - 1}, two different")
    ax = _axes(ax)
    for i, (attribute, label) in enumerate(
        (("column_cosines", "column spaces (B)"), ("row_cosines", "row spaces (A)"))
    ):
        rows = [np.degrees(np.arccos(getattr(m, attribute))) for p in chosen for m in p.modules]
        # Pairs have different numbers of angles: each is spread over the same width.
        width = max(map(len, rows), default=0)
        share = _share(width)
        rows = [np.interp(share, _share(len(row)), row) for row in rows if len(row)]
        _profile(ax, rows, i, label, 100 * share)
        chance = [getattr(p, attribute.replace("cosines", "chance")) for p in chosen]
        angle = np.degrees(np.arccos(np.nanmean(chance))) if width else np.nan
        # Two lines at one height show both: the dots of one lie in the gaps of the other.
        dots = (3 * i, (2, 4))
        ax.axhline(angle, color=COLOURS[i], linestyle=dots, linewidth=1.5, label=f"{label}, random")
    ax.set_xlabel("share of the angles, smallest first (%)")
    ax.set_ylabel("principal angle (degrees)")
    ax.set_ylim(0, 92)
    ax.set_yticks(range(0, 91, 15))
    over = "modules and pairs" if pair is None else "modules"
    ax.set_title(f"Principal angles: median over {over}, band of 80 %")
    _legend(ax)
    return ax


def plot_merge_error(inspection: Inspection, ax: Axes | None = None) -> Axes:
    """Draw how far the default merge is from each adapter, layer by layer, in the weights.

    Args:
        inspection: Of adapters that can be merged.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: There is no merge; the message gives the reason.
        ImportError: matplotlib is not installed.
    """
    _need(inspection.merge, inspection.refusal or "a merge needs two adapters")
    assert inspection.merge is not None
    ax = _axes(ax)
    layers = _layers([m.name for m in inspection.modules])
    previews = inspection.merge.modules
    for i, adapter in enumerate(inspection.adapters):
        values = []
        for indices in layers.values():
            own = sum(inspection.modules[j].norms[i] ** 2 for j in indices)
            far = sum(previews[j].distances[i] ** 2 for j in indices)
            values.append((far / own) ** 0.5 if own else float("nan"))
        ax.plot(values, label=adapter.name, **_line(i))
    ax.axhline(1, color="0.5", linestyle=":", label="no adapter at all")
    _layer_axis(ax, layers)
    ax.set_ylabel(r"relative distance $|M - W_i|_F\,/\,|W_i|_F$ (no unit)")
    ax.set_ylim(bottom=0)
    ax.set_title("Distance of the merge M from each adapter by layer")
    _legend(ax)
    return ax


# --- points of any manifold, and plain numbers ---------------------------------------------------


def plot_distance_matrix(
    manifold: geoopt.Manifold,
    points: Tensor | Sequence[Tensor],
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the distance between each two points of a manifold as a heat map.

    Args:
        manifold: Any geoopt manifold with ``dist``.
        points: k points, ``(k, *point)`` or a sequence of ``(*point)``, of one shape.
        names: What to call them; numbers if ``None``.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: There are fewer than two points, or not as many names.
        ImportError: matplotlib is not installed.
    """
    stacked, names = _named_points(manifold, points, names)
    table = _distances(accurate(manifold), stacked, stacked).numpy()
    ax = _axes(ax, 0.7 * len(names) + 2.5)
    _heat_map(ax, table, names).set_label(f"distance on {manifold.name}")
    ax.set_title("Distance between each two models")
    return ax


def plot_map(
    manifold: geoopt.Manifold,
    points: Tensor | Sequence[Tensor],
    mean: Tensor | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    *,
    steps: int = 12,
) -> Axes:
    """Draw models as a map in the plane, with the geodesics from their mean to each of them.

    Positions are those of classical multidimensional scaling of the distances between models and
    mean; points of geodesics are placed by their distances to these. The axis says how much of the
    squared distances the plane shows: three models and their mean need not fit into a plane.

    Args:
        manifold: Any geoopt manifold with ``dist`` and ``logmap``.
        points: k points, ``(k, *point)`` or a sequence of ``(*point)``, of one shape.
        mean: The point at which geodesics meet, ``(*point)``; neither it nor any geodesic is drawn
            if ``None``.
        names: What to call the points; numbers if ``None``.
        ax: Where to draw; a new figure if ``None``.
        steps: Points of each geodesic.

    Returns:
        The axes.

    Raises:
        ValueError: There are fewer than two points, or not as many names.
        ImportError: matplotlib is not installed.

    Source: Gower (1966) for the map; Gower (1968) for points added to it.
    """
    stacked, names = _named_points(manifold, points, names)
    space = accurate(manifold)
    landmarks = stacked if mean is None else torch.cat((stacked, mean.detach()[None]))
    squared = _distances(space, landmarks, landmarks).square()
    place, shares = _scaling(squared)
    where = place(squared)
    ax = _axes(ax, 5.0)
    if mean is not None:
        times = torch.linspace(0, 1, steps, dtype=landmarks.dtype)
        for i, point in enumerate(stacked):
            curve = geodesic(space, mean.detach(), point, times)
            path = place(_distances(space, curve, landmarks).square())
            ax.plot(path[:, 0], path[:, 1], "-", color="0.6", linewidth=1, zorder=1)
            ax.plot(*where[i], linestyle="none", label=names[i], **_mark(i))
        ax.plot(*where[-1], "*", color="black", markersize=14, label="mean", zorder=3)
    else:
        for i, name in enumerate(names):
            ax.plot(*where[i], linestyle="none", label=name, **_mark(i))
    ax.set_aspect("equal", "datalim")
    ax.set_xlabel(f"first coordinate ({100 * shares[0]:.0f} % of the squared distances)")
    ax.set_ylabel(f"second coordinate ({100 * shares[1]:.0f} %)")
    ax.set_title(f"Map of the models by distances on {manifold.name}")
    ax.grid(alpha=0.3)
    _legend(ax)
    return ax


def plot_barrier(
    curves: Mapping[str, Sequence[float]],
    t: Sequence[float] | None = None,
    ax: Axes | None = None,
    *,
    ylabel: str = "loss",
) -> Axes:
    """Draw a value along paths from one model to another, and how high each barrier is.

    The barrier is the greatest excess of a curve over the straight line between its ends, after
    Frankle, Dziugaite, Roy and Carbin (2020).

    Args:
        curves: For each path, what it is called and the values along it, n of them.
        t: Where on the path, n numbers from 0 to 1; evenly spread if ``None``.
        ax: Where to draw; a new figure if ``None``.
        ylabel: What the values are.

    Returns:
        The axes.

    Raises:
        ValueError: There is no curve, or the numbers of values differ.
        ImportError: matplotlib is not installed.
    """
    _need(curves, "a barrier needs the values along at least one path")
    first = next(iter(curves.values()))
    times = np.linspace(0, 1, len(first)) if t is None else np.asarray(t, dtype=float)
    for name, curve in curves.items():
        if len(curve) != len(times):
            raise ValueError(f"curves[{name!r}]: expected {len(times)} values, got {len(curve)}")
    ax = _axes(ax)
    for i, (name, curve) in enumerate(curves.items()):
        values = np.asarray(curve, dtype=float)
        straight = np.interp(times, times[[0, -1]], values[[0, -1]])
        height = max(float((values - straight).max()), 0.0)
        ax.plot(times, values, label=f"{name} (barrier {height:.3g})", **_line(i))
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(times[[0, -1]], values[[0, -1]], ":", color=colour, linewidth=1)
    ax.set_xlabel("position t on the path from the first model (0) to the second (1)")
    ax.set_ylabel(ylabel)
    ax.set_title("Values along the paths")
    ax.grid(axis="y", alpha=0.3)
    _legend(ax)
    return ax


def plot_spectrum_change(
    before: Mapping[str, Any], after: Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Draw singular values before a merge, of each model, and after it, of each merge.

    With several modules the line is the median over modules and the band holds 80 % of them.

    Args:
        before: For each model its name and singular values, ``(r,)`` or ``(modules, r)``.
        after: The same for each merge; drawn with broken lines.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: Nothing is given.
        ImportError: matplotlib is not installed.
    """
    _need({**before, **after}, "spectra of at least one model or merge are needed")
    ax = _axes(ax)
    for i, (name, values) in enumerate([*before.items(), *after.items()]):
        rows = np.atleast_2d(np.asarray(values, dtype=float))
        _profile(ax, [row[row > 0] for row in rows], i, name)
        ax.lines[-1].set_linestyle("-" if i < len(before) else "--")
    ax.set_yscale("log")
    ax.set_xlabel("index of the singular value (1 is the largest)")
    ax.set_ylabel(r"singular value $\sigma_j$ (units of the weights)")
    ax.set_title("Spectra before and after the merge")
    _legend(ax)
    return ax


def plot_convergence(
    histories: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    xlabel: str = "iteration",
    ylabel: str = "gradient norm",
    floor: float = 1e-17,
) -> Axes:
    """Draw how a number falls during iterations, on a logarithmic scale.

    Args:
        histories: For each method its name and one value for each iteration, from the start.
        ax: Where to draw; a new figure if ``None``.
        xlabel: What is counted.
        ylabel: What falls.
        floor: Smaller values, zero included, are drawn here: a logarithm has no zero.

    Returns:
        The axes.

    Raises:
        ValueError: There is no history.
        ImportError: matplotlib is not installed.
    """
    _need(histories, "convergence needs the history of at least one method")
    ax = _axes(ax)
    for i, (name, history) in enumerate(histories.items()):
        values = np.maximum(np.asarray(history, dtype=float), floor)
        style = _line(i) | {"markevery": max(1, len(values) // 15)}
        ax.plot(range(len(values)), values, label=name, **style)
    ax.set_yscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title("Convergence")
    ax.grid(axis="y", alpha=0.3)
    _legend(ax)
    return ax


# --- shared --------------------------------------------------------------------------------------


def _mark(i: int) -> dict[str, Any]:
    style = _line(i)
    return {"color": style["color"], "marker": style["marker"], "markersize": 8, "zorder": 2}


def _named_points(
    manifold: geoopt.Manifold, points: Tensor | Sequence[Tensor], names: Sequence[str] | None
) -> tuple[Tensor, list[str]]:
    stacked = torch.stack(list(points)).detach()
    count = len(stacked)
    if count < 2 or stacked.ndim != manifold.ndim + 1:
        raise ValueError(
            f"points: expected two or more single points of {manifold}, (k, *point) with "
            f"{manifold.ndim} dimensions each; got {tuple(stacked.shape)}"
        )
    if names is not None and len(names) != count:
        raise ValueError(f"names: expected {count}, one for each point; got {len(names)}")
    return stacked, [str(i) for i in range(count)] if names is None else list(names)


@torch.no_grad()
def _distances(space: Any, rows: Tensor, columns: Tensor) -> Tensor:
    """Table of distances, ``(rows, columns)``."""
    size = len(rows), len(columns), *rows.shape[1:]
    return space.dist(rows[:, None].expand(size), columns[None].expand(size)).cpu().double()


def _scaling(squared: Tensor) -> tuple[Any, list[float]]:
    """The plane of classical scaling: where squared distances ``(..., k)`` put a point, and shares.

    Double centring makes inner products of squared distances. Shares count negative eigenvalues
    too, so that what no Euclidean space can show lowers them.
    """
    means = squared.mean(0)
    inner = -0.5 * (squared - means - means[:, None] + means.mean())
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values[:2].clamp(min=0)
    scale = torch.where(kept > 1e-12 * values.abs().max(), kept.rsqrt(), torch.zeros(()))

    def place(to_landmarks: Tensor) -> Any:
        return (-0.5 * (to_landmarks - means) @ vectors[:, :2] * scale).numpy()

    total = float(values.abs().sum()) or 1.0
    return place, [float(v) / total for v in kept]
