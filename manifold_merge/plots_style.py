"""How figures look: axes, colours, markers, legends, and the axis of layers, once for all figures.

Colours are those of Okabe and Ito (2008), told apart with any colour vision, and lines differ in
marker too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "PLOT_HINT"]

PLOT_HINT = 'figures need matplotlib: pip install "manifold-merge[plot]"'
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")

_MARKERS = "osD^vPX*"
_NUMBERED = 12  # up to so many rows, each cell of a heat map shows its number
_TICKS = 24
_WIDE = 4  # longer labels of layers are turned
_LEGEND_INSIDE = 5
_BAND = (10, 90)  # percentiles


def _need(value: object, otherwise: str) -> None:
    if not value:
        raise ValueError(otherwise)


def _axes(ax: Axes | None, height: float = 4.2) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(PLOT_HINT) from error
    return pyplot.subplots(figsize=(7.5, height), layout="constrained")[1]


def _line(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": ("-", "--", "-.")[i // len(COLOURS) % 3],
        "markersize": 4,
        "linewidth": 1.5,
    }


def _share(count: int) -> Any:
    """Middles of ``count`` equal parts of the interval from 0 to 1."""
    return (np.arange(count) + 0.5) / max(count, 1)


def _profile(ax: Axes, rows: Sequence[Any], i: int, label: str, x: Any = None) -> None:
    """Median and band of sequences of different lengths, at each index over those that have it."""
    length = max(map(len, rows), default=0)
    x = np.arange(1, length + 1) if x is None else x
    columns = [[row[j] for row in rows if len(row) > j] for j in range(length)]
    low, middle, high = (
        [np.percentile(column, q) for column in columns] for q in (_BAND[0], 50, _BAND[1])
    )
    ax.plot(x, middle, label=label, **_line(i))
    ax.fill_between(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)
    ax.grid(axis="y", alpha=0.3)


def _legend(ax: Axes) -> None:
    count = len(ax.get_legend_handles_labels()[0])
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    ax.legend(fontsize="small", **(beside if count > _LEGEND_INSIDE else {}))


def _layers(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of modules by layer: the name up to its first number, else the whole name."""
    layers: dict[str, list[int]] = {}
    for j, name in enumerate(names):
        parts = name.split(".")
        number = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts))
        layers.setdefault(".".join(parts[: number + 1]), []).append(j)
    return layers


def _layer_axis(ax: Axes, layers: dict[str, list[int]]) -> None:
    parts = [label.split(".") for label in layers]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    prefix = ".".join(parts[0][:common]) if parts else ""
    labels = [".".join(p[common:]) for p in parts]
    step = max(1, -(-len(labels) // _TICKS))
    ax.set_xticks(range(0, len(labels), step), labels[::step])
    if max(map(len, labels), default=0) > _WIDE:
        ax.tick_params("x", labelrotation=30)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.set_xlabel(f"layer (N of {prefix}.N)" if prefix else "layer")
    ax.grid(axis="y", alpha=0.3)


def _heat_map(ax: Axes, table: Any, names: Sequence[str], limit: float | None = None) -> Any:
    """Draw a square table, numbers in its cells if they fit; returns the colour bar."""
    top = float(limit if limit is not None else np.nanmax(table, initial=0)) or 1.0
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=top)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    if len(names) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(table):
            ink = "black" if value > top / 2 else "white"
            text = f"{value:.2f}" if 0.1 <= top < 1000 else f"{value:.1e}"
            ax.text(column, row, text, ha="center", va="center", color=ink)
    return ax.figure.colorbar(image, ax=ax, shrink=0.85)
