"""How reductions, sorting and indexing act on labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manifold_merge.symmetry_combine import combine
from manifold_merge.symmetry_labels import Codomain, Factor, Label
from manifold_merge.symmetry_rules import INDEXED, Call, rule

__all__: list[str] = []

RANKED = "sorted by value"


def _axes(call: Call) -> list[int]:
    rank = len(call.label.axes)
    given = call["dim"]
    if given is None or given == []:
        return list(range(rank))
    return [a % rank for a in (given if isinstance(given, list | tuple) else [given])]


@rule("sum", "mean", "nansum")
def _sum(call: Call) -> Label:
    axes = _axes(call)
    call.label.fix_frames(axes)
    return call.label.without_axes(axes, keepdim=bool(call["keepdim"]))


@rule("amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "any", "all")
@rule("logsumexp", "var_mean", "std_mean", "count_nonzero", "aminmax")
def _reduce(call: Call) -> list[Label]:
    call.label.fix_frames()
    out = call.label.without_axes(_axes(call), keepdim=bool(call["keepdim"]))
    return [out] * len(call.shapes)


@rule("argmax", "argmin")
def _argument(call: Call) -> Label:
    return _extremes(call)[-1]


@rule("max", "min", "median", "mode", "kthvalue")
def _extreme(call: Call) -> list[Label]:
    return _extremes(call)


def _extremes(call: Call) -> list[Label]:
    call.label.fix_frames()
    out = call.label.without_axes(_axes(call), keepdim=bool(call["keepdim"]))
    if len(call.shapes) == 1 and not call.name.startswith("arg"):
        return [out]
    return [out, _pointing(call, call.label, out)]


@rule("topk", "sort", "argsort")
def _ranked(call: Call) -> list[Label]:
    label = call.label.fix_frames()
    axis = (-1 if call["dim"] is None else call["dim"]) % len(label.axes)
    out = label.without_axes([axis], keepdim=True)
    size = call.shapes[-1][axis]
    if size > 1:
        out = out.with_new_factor(axis, size, RANKED)
    pointing = _pointing(call, label, out, axis)
    return [pointing] if len(call.shapes) == 1 else [out, pointing]


def _pointing(call: Call, label: Label, out: Label, axis: int | None = None) -> Label:
    """Indices into the axis that an operation picked from: they move with its family."""
    axes = _axes(call) if axis is None else [axis]
    nodes = label.axis_nodes(axes[0]) if len(axes) == 1 else []
    if len(nodes) == 1:
        return replace(out, codomain=Codomain(nodes[0], object()))
    label.freeze(axes, INDEXED)
    return out


@rule("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")
def _softmax(call: Call) -> Label:
    return call.label.mixed_axes([call["dim"]]).fix_frames()


@rule("embedding")
def _embedding(call: Call) -> Label:
    return _indexed(call["weight"], 0, [call["indices"]])


@rule("index_select")
def _index_select(call: Call) -> Label:
    return _indexed(call["self"], call["dim"], [call["index"]])


@rule("index", "_unsafe_index")
def _index(call: Call) -> Label:
    label, indices = call["self"], list(call["indices"])
    used = [axis for axis, each in enumerate(indices) if each is not None]
    if used != list(range(used[0], used[-1] + 1)):
        for each in call.labels:
            each.freeze(None, INDEXED).freeze_codomain(INDEXED)
        return Label.fresh(call.families, call.shapes[0], INDEXED)
    return _indexed(label, used[0], [indices[axis] for axis in used])


def _indexed(label: Label, axis: int, indices: Sequence[Label]) -> Label:
    """Replace consecutive axes by the axes of the indices that pick from them."""
    label = label.freeze_codomain(INDEXED).resolved()
    axis %= len(label.axes)
    index = indices[0]
    index_names: list[object] = []
    rank = 0
    for each in indices:
        rank = max(rank, len(each.axes))
    names: list[object] = [("index", n) for n in range(rank)]
    for number, each in enumerate(indices):
        label, each = _picked(label, axis + number, each)
        own = names[rank - len(each.axes) :]
        index = each if number == 0 else combine(index, index_names, each, own, names)
        index_names = own if number == 0 else names
    kept_before = [("kept", n) for n in range(axis)]
    kept_after = [("kept", n) for n in range(axis + len(indices), len(label.axes))]
    picked = [("picked", n) for n in range(len(indices))]
    bare = replace(label, codomain=None)
    plain = replace(index, codomain=None)
    out = [*kept_before, *names, *kept_after]
    result = combine(
        bare, [*kept_before, *picked, *kept_after], plain, index_names, [*out, *picked]
    )
    return result.without_axes(range(len(out), len(out) + len(picked)))


def _picked(label: Label, axis: int, index: Label) -> tuple[Label, Label]:
    """Remove the factors of an axis that is indexed, or turn them into a ghost."""
    codomain = index.codomain
    nodes, sizes = label.axis_nodes(axis), label.families.sizes
    if codomain is None or not nodes or sizes[nodes[0]] != sizes[codomain.node]:
        index = index.freeze_codomain(INDEXED)
        label.freeze([axis], INDEXED)
        return label.without_axes([axis], keepdim=True), index
    for node in nodes:
        label.families.tie(node, codomain.node, "none")
    label.fix_frames([axis])
    label = label.resolved()
    if len(label.axes[axis]) != 1 or len(nodes) > 1 or codomain.source in label.ghosts:
        return label.without_axes([axis], keepdim=True), index
    position = label.positions(axis)[0]
    order = [p for p in range(len(label.factors)) if p != position] + [position]
    factors = label.factors
    moved = [Factor(factors[p].size, factors[p].nodes.transpose(order)) for p in order]
    counts = [len(each) - (number == axis) for number, each in enumerate(label.axes)]
    ghosts = {**label.ghosts, codomain.source: factors[position]}
    return replace(label, ghosts=ghosts).with_factors(moved, counts), index


@rule("gather")
def _gather(call: Call) -> Label:
    return _along(call["self"], call["dim"], call["index"])


def _along(label: Label, axis: int, index: Label) -> Label:
    """Pick along one axis with an index that has the other axes too."""
    axis %= len(label.axes)
    label, index = _picked(label.freeze_codomain(INDEXED).fix_frames(), axis, index)
    names = list(range(len(label.axes)))
    for other in names:
        if other != axis and label.shape[other] != index.shape[other]:
            label = label.freeze([other], INDEXED).without_axes([other], keepdim=True)
    plain = replace(index, codomain=None)
    return combine(label, names, plain, names, names)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(call: Call) -> Label:
    label, index = call["self"].fix_frames(), call["index"]
    axis = call["dim"] % len(label.axes)
    names = list(range(len(label.axes)))
    _, plain = _picked(label, axis, index)
    for other in [call["src"]] if isinstance(call["src"], Label) else []:
        other.fix_frames()
        if other.shape == index.shape:
            plain = combine(plain, names, other, names, names)
        else:
            other.freeze(None, INDEXED)
    for other_axis in names:
        if other_axis != axis and label.shape[other_axis] != index.shape[other_axis]:
            label.freeze([other_axis], INDEXED)
            plain = plain.freeze([other_axis], INDEXED).without_axes([other_axis], keepdim=True)
    plain = replace(plain.without_axes([axis], keepdim=True), codomain=None)
    return combine(label, names, plain, names, names)


@rule("index_add", "index_copy")
def _index_add(call: Call) -> Label:
    label, index, source = call["self"], call["index"], call["source"]
    axis = call["dim"] % len(label.axes)
    names = list(range(len(label.axes)))
    _picked(label, axis, index)
    source = source.freeze([axis], INDEXED).without_axes([axis], keepdim=True)
    return combine(label, names, source, names, names)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(call: Call) -> Label:
    label, values = call["self"], call["values"]
    indices = list(call["indices"])
    for axis, each in enumerate(indices):
        if each is not None:
            each.freeze_codomain(INDEXED)
            label.freeze([axis], INDEXED)
    kept = [
        axis for axis in range(len(label.axes)) if axis >= len(indices) or indices[axis] is None
    ]
    if kept != list(range(len(label.axes) - len(kept), len(label.axes))):
        values.freeze(None, INDEXED)
        return label.freeze(None, INDEXED)
    # The last axes are whole: those of the values are the same ones.
    extra = len(values.axes) - len(kept)
    if extra > 0:
        values = values.freeze(range(extra), INDEXED).without_axes(range(extra))
    names = list(range(len(label.axes)))
    return combine(label, names, values, names[len(names) - len(values.axes) :], names)
