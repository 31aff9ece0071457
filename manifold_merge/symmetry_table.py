"""A symmetry specification as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manifold_merge.symmetry_sets import GaugeGroup, PermutedSet, Placement

if TYPE_CHECKING:
    from manifold_merge.symmetry import NetworkSymmetry

__all__ = ["table"]

SHOWN = 4


def table(symmetry: NetworkSymmetry, *, frozen: bool) -> str:
    """Sets, gauges and the reasons of frozen axes, one a line."""
    lines: list[str] = []
    if symmetry.sets:
        lines += ["permuted sets", *_rows([_row(each) for each in reversed(symmetry.sets)])]
    if symmetry.gauges:
        lines += ["gauge groups", *_rows([_row(each) for each in symmetry.gauges])]
    if not lines:
        lines.append("no symmetry")
    if frozen and symmetry.frozen:
        reasons: dict[str, list[str]] = {}
        for axis, reason in symmetry.frozen.items():
            reasons.setdefault(reason, []).append(axis)
        lines.append("frozen axes")
        lines += _rows([[reason, _some(axes)] for reason, axes in reasons.items()])
    return "\n".join(lines)


def _row(each: PermutedSet | GaugeGroup) -> list[str]:
    inside = "" if each.parent is None else f" in {each.parent[0]}[{each.parent[1]}]"
    if isinstance(each, GaugeGroup):
        size = f"{_GROUPS[each.kind]}({each.dimension}){inside}"
    else:
        size = f"{each.count}{inside}"
    places = [_place(place) for place in each.placements]
    if isinstance(each, PermutedSet):
        places += [f"{names[0]} ... {names[-1]}" for names in each.tensors]
    return [each.name, size, _some(places)]


_GROUPS = {"general_linear": "GL", "positive": "R+", "orthogonal": "O", "rotation": "RoPE"}


def _place(place: Placement) -> str:
    index = [str(place.axis)]
    if place.block > 1:
        index.append(f"blocks of {place.block}")
    if place.start:
        index.append(f"from {place.start}")
    index += [f"{axis}={position}" for axis, position in place.within]
    return f"{place.tensor}[{', '.join(index)}]" + ("^-T" if place.inverse else "")


def _some(texts: list[str]) -> str:
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f", and {more} more" if more > 0 else "")


def _rows(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([c.ljust(w) for c, w in zip(row, widths, strict=False)] + [row[-1]])
        for row in rows
    ]
