"""Operations of two tensors on labels: axes that they share are aligned and tied."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from manifold_merge.symmetry_axes import FrameTie
from manifold_merge.symmetry_labels import Factor, Label, take_nodes, tie_arrays

__all__ = ["align", "combine", "multiply"]


def align(x: Label, x_axis: int, y: Label, y_axis: int) -> tuple[Label, Label]:
    """Refine two axes of the same size until their factors have the same sizes."""
    x, y = x.resolved(), y.resolved()
    step = 0
    while step < max(len(x.axes[x_axis]), len(y.axes[y_axis])):
        a, b = x.axes[x_axis][step].size, y.axes[y_axis][step].size
        if a == b:
            step += 1
        elif a > b and a % b == 0:
            x = x.split_factor(x.positions(x_axis)[step], b)
        elif b > a and b % a == 0:
            y = y.split_factor(y.positions(y_axis)[step], a)
        else:
            reason = "an axis that is cut in two ways which do not fit"
            return _frozen_axis(x, x_axis, reason), _frozen_axis(y, y_axis, reason)
    return x, y


def _frozen_axis(label: Label, axis: int, reason: str) -> Label:
    label = label.mixed_axes([axis]).freeze([axis], reason)
    label = label.joined(axis)
    nodes = label.axes[axis][0].nodes
    fresh = np.full((1,) * nodes.ndim, label.families.new(label.shape[axis], reason))
    factors = label.factors
    factors[label.positions(axis)[0]] = Factor(label.shape[axis], fresh)
    return label.with_factors(factors)


def combine(
    x: Label,
    x_names: Sequence[Hashable],
    y: Label,
    y_names: Sequence[Hashable],
    out: Sequence[Hashable],
    frames: Mapping[Hashable, FrameTie] | None = None,
    keep: Mapping[Hashable, int] | None = None,
) -> Label:
    """Tie the axes that two tensors share by name, and label the result.

    Axes that are not in ``out`` are contracted: they tie with dual frames, and what depends on
    them is tied along them. ``frames`` overrides how the frames of an axis are tied, and ``keep``
    says whose nodes (0 for ``x``, 1 for ``y``) the result then carries.
    """
    families = x.families
    x, y = x.resolved(), y.resolved()
    for name in x_names:
        if name in y_names:
            i, j = list(x_names).index(name), list(y_names).index(name)
            if x.axes[i] and y.axes[j]:
                x, y = align(x, i, y, j)
    contracted = [n for n in dict.fromkeys([*x_names, *y_names]) if n not in out]
    # One numbering of factors for both: by name and rank within the axis, then the ghosts.
    order: list[Hashable] = []
    sizes: dict[Hashable, int] = {}
    for name in [*out, *contracted]:
        for label, names in ((x, x_names), (y, y_names)):
            if name in names and label.axes[list(names).index(name)]:
                for rank, factor in enumerate(label.axes[list(names).index(name)]):
                    if (name, rank) not in sizes:
                        order.append((name, rank))
                        sizes[name, rank] = factor.size
                break
    for label in (x, y):
        for key, factor in label.ghosts.items():
            if ("ghost", key) not in sizes:
                order.append(("ghost", key))
                sizes["ghost", key] = factor.size
    number = {key: i for i, key in enumerate(order)}
    shared: dict[Hashable, list[np.ndarray]] = {key: [] for key in order}
    for label, names in ((x, x_names), (y, y_names)):
        keys: list[Hashable] = [
            (n, r) for n, axis in zip(names, label.axes, strict=True) for r in range(len(axis))
        ]
        keys += [("ghost", key) for key in label.ghosts]
        target = [number[key] for key in keys]
        for key, factor in zip(keys, label.factors, strict=True):
            shape = [1] * len(order)
            for place, size in zip(target, factor.nodes.shape, strict=True):
                shape[place] = size
            moved = factor.nodes.transpose(np.argsort(target)) if target else factor.nodes
            shared[key].append(moved.reshape(shape))
    arrays: list[np.ndarray] = []
    for key in order:
        both = shared[key]
        if len(both) == 2:
            name = key[0]  # type: ignore[index]
            default: FrameTie = "dual" if name in contracted else "same"
            tie = (frames or {}).get(name, default)
            tie_arrays(families, both[0], both[1], tie)
            chosen = (keep or {}).get(name)
            smaller = min(both, key=lambda array: array.size)
            arrays.append(smaller if chosen is None else both[chosen])
        else:
            arrays.append(both[0])
    axes = [
        [Factor(sizes[key], arrays[number[key]]) for key in order if key[0] == name]  # type: ignore[index]
        for name in [*out, *contracted]
    ]
    ghosts = {
        key[1]: Factor(sizes[key], arrays[number[key]])  # type: ignore[index]
        for key in order
        if key[0] == "ghost"  # type: ignore[index]
    }
    result = Label(families, axes, ghosts)
    if contracted:
        result = result.without_axes(range(len(out), len(axes)))
    return _without_idle_ghosts(result)


def _without_idle_ghosts(label: Label) -> Label:
    """Forget the ghosts on which nothing depends."""
    for position in reversed(range(len(label.factors) - len(label.ghosts), len(label.factors))):
        others = [f for number, f in enumerate(label.factors) if number != position]
        if all(factor.nodes.shape[position] == 1 for factor in others):
            key = list(label.ghosts)[position - (len(label.factors) - len(label.ghosts))]
            axes = [[take_nodes(factor, [position]) for factor in axis] for axis in label.axes]
            ghosts = {
                k: take_nodes(factor, [position]) for k, factor in label.ghosts.items() if k != key
            }
            label = replace(label, axes=axes, ghosts=ghosts)
    return label


def multiply(
    x: Label,
    x_names: Sequence[Hashable],
    y: Label,
    y_names: Sequence[Hashable],
    out: Sequence[Hashable],
) -> Label:
    """Combine by a bilinear operation: products along shared axes that are kept.

    There the frame of the result is the product of both. It is followed only if one of the two is
    fixed; otherwise both are.
    """
    frames: dict[Hashable, FrameTie] = {}
    keep: dict[Hashable, int] = {}
    for i, name in enumerate(x_names):
        if name not in y_names or name not in out:
            continue
        j = list(y_names).index(name)
        if not (x.axes[i] and y.axes[j]):
            continue
        if _is_fixed(x, i):
            frames[name], keep[name] = "none", 1
            y.fix_frames([j], positive=False)
        elif _is_fixed(y, j):
            frames[name], keep[name] = "none", 0
            x.fix_frames([i], positive=False)
        else:
            x.fix_frames([i])
            y.fix_frames([j])
    return combine(x, x_names, y, y_names, out, frames, keep)


def _is_fixed(label: Label, axis: int) -> bool:
    families = label.families
    return not any(
        families.is_positive(leaf)
        for node in label.axis_nodes(axis)
        for leaf in families.leaves(node)
    )
