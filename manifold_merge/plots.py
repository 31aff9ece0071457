"""Figures of an inspection. Each takes ``ax=None`` and returns the ``Axes`` that it drew on.

They need matplotlib, an optional dependency: ``pip install "manifold-merge[plot]"``. Colours are
those of Okabe and Ito (2008), told apart with any colour vision, and lines differ in marker too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from manifold_merge.report_data import Inspection

__all__ = [
    "PLOT_HINT",
    "plot_distances",
    "plot_merge_error",
    "plot_norms",
    "plot_principal_angles",
    "plot_spectra",
]

PLOT_HINT = 'figures need matplotlib: pip install "manifold-merge[plot]"'

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX*"
_NUMBERED = 12  # up to so many adapters, each cell of a heat map shows its number
_TICKS = 24
_WIDE = 4  # longer labels of layers are turned
_LEGEND_INSIDE = 5
_BAND = (10, 90)  # percentiles


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
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=2)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    if len(names) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(table):
            ink = "black" if value > 1 else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_ticks([0, 2**0.5, 2], labels=["0 same", "1.41 orthogonal", "2 opposite"])
    bar.set_label("relative distance (no unit)")
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
        ax.axhline(angle, color=_COLOURS[i], linestyle=":", linewidth=1, label=f"{label}, random")
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


# --- shared --------------------------------------------------------------------------------------


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
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": ("-", "--", "-.")[i // len(_COLOURS) % 3],
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
    ax.fill_between(x, low, high, color=_COLOURS[i % len(_COLOURS)], alpha=0.15, linewidth=0)
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
