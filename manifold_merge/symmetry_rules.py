"""How the operations of PyTorch act on labels: views, concatenations and pointwise operations.

Each rule is registered under the name of an ATen operation, without overload and without the
trailing underscore of in-place variants. It receives the operation's arguments by name, with
tensors replaced by their labels, and the shapes of the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manifold_merge.symmetry_axes import Families, Incompatible, Segments
from manifold_merge.symmetry_combine import align, combine, multiply
from manifold_merge.symmetry_labels import Factor, Label

__all__ = ["INDEXED", "RULES", "Call", "Rule", "pointwise", "rule"]

INDEXED = "the model picks single positions along the axis"
CUT = "segments of a concatenation"


@dataclass(frozen=True)
class Call:
    """One operation of a trace.

    Args:
        name: Its name in ATen.
        arguments: Arguments by name, with defaults; tensors are labels.
        shapes: Shapes of the results.
        families: The store of nodes.
    """

    name: str
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    families: Families

    def __getitem__(self, key: str) -> Any:
        return self.arguments.get(key)

    @property
    def label(self) -> Label:
        """The first tensor."""
        return self.labels[0]

    @property
    def labels(self) -> list[Label]:
        """All tensors among the arguments."""
        found: list[Label] = []
        for value in self.arguments.values():
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Label):
                    found.append(each)
        return found


Rule = Callable[[Call], "Label | list[Label]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@rule("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy")
@rule("dropout", "_conj", "resolve_conj", "resolve_neg", "to", "lift")
def _identity(call: Call) -> Label:
    return call.label


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy")
@rule("squeeze", "unsqueeze", "_reshape_copy")
def _reshape(call: Call) -> Label:
    return call.label.reshaped(call.shapes[0])


@rule("permute")
def _permute(call: Call) -> Label:
    label = call.label
    return label.permuted([axis % len(label.axes) for axis in call["dims"]])


@rule("t", "numpy_T", "adjoint")
def _matrix_transpose(call: Call) -> Label:
    return call.label.permuted(range(len(call.label.axes))[::-1])


@rule("transpose", "swapaxes")
def _transpose(call: Call) -> Label:
    rank = len(call.label.axes)
    order = list(range(rank))
    a, b = call["dim0"] % rank, call["dim1"] % rank
    order[a], order[b] = order[b], order[a]
    return call.label.permuted(order)


@rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Label:
    return call.label.expanded(call.shapes[0])


@rule("repeat")
def _repeat(call: Call) -> Label:
    label = call.label.resolved()
    repeats = list(call["repeats"])
    lead = len(repeats) - len(label.axes)
    label = replace(label, axes=[[] for _ in range(lead)] + label.axes)
    for axis, times in enumerate(repeats):
        if times > 1:
            label = label.with_new_factor(axis, times)
    return label


@rule("flip", "roll")
def _move_positions(call: Call) -> Label:
    dims = list(call["dims"]) or list(range(len(call.label.axes)))
    return call.label.mixed_axes(dims).freeze(dims, "positions along the axis are moved")


@rule("tril", "triu")
def _triangle(call: Call) -> Label:
    return call.label.mixed_axes([-1, -2]).freeze([-1, -2], "positions along the axis are masked")


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def _cumulative(call: Call) -> Label | list[Label]:
    label = call.label.mixed_axes([call["dim"]])
    label = label.freeze([call["dim"]], "the order along the axis matters").fix_frames()
    return [label] * len(call.shapes)


@rule("select")
def _select(call: Call) -> Label:
    return _selected(call.label, call["dim"], call["index"])


def _selected(label: Label, axis: int, index: int) -> Label:
    axis %= len(label.axes)
    label = label.resolved()
    label = replace(label, picked=(*label.picked, *label.axis_nodes(axis)))
    size = label.shape[axis]
    return label.selected(axis, index % size)


@rule("unbind")
def _unbind(call: Call) -> list[Label]:
    return [_selected(call.label, call["dim"] or 0, i) for i in range(len(call.shapes))]


@rule("slice")
def _slice(call: Call) -> Label:
    label = call.label
    axis = (call["dim"] or 0) % len(label.axes)
    size = label.shape[axis]
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(size)
    return _sliced(label, axis, start, stop, step)


def _sliced(label: Label, axis: int, start: int, stop: int, step: int = 1) -> Label:
    size = label.shape[axis]
    if (start, stop, step) == (0, size, 1):
        return label
    if step > 1:
        if start < step and size % step == 0 and stop > size - step:
            # Every step-th position: the axis is (size / step) × step, one of the inner ones.
            shape = list(label.shape)
            shape[axis : axis + 1] = [size // step, step]
            return _selected(label.reshaped(shape), axis + 1, start)
        out = list(label.shape)
        out[axis] = len(range(start, stop, step))
        label.settle(INDEXED)
        label.freeze(None, "positions along the axis are picked with a step")
        return Label.fresh(label.families, out, "positions along the axis are picked with a step")
    length = max(stop - start, 0)
    if length == 0:
        shape = [length if number == axis else n for number, n in enumerate(label.shape)]
        return Label.fresh(label.families, shape)
    label = label.resolved().joined(axis)
    position = label.positions(axis)[0]
    factor = label.factors[position]
    parts: dict[int, int] = {}
    for node in {int(n) for n in factor.nodes.flat}:
        try:
            pieces = label.families.segment(node, [start, length, size - stop])
            parts[node] = pieces[1] if start else pieces[0]
        except Incompatible:
            label.families.freeze(node, INDEXED)
            label.families.fix_frame(node)
            parts[node] = label.families.new(length, INDEXED)
    nodes = np.vectorize(parts.__getitem__, otypes=[np.int64])(factor.nodes)
    factors = []
    for number, each in enumerate(label.factors):
        if number == position:
            factors.append(Factor(length, nodes))
        elif each.nodes.shape[position] > 1:
            kept = np.take(each.nodes, range(start, stop), axis=position)
            factors.append(Factor(each.size, kept))
        else:
            factors.append(each)
    label = label.with_factors(factors)
    if length == 1:
        return label.selected(axis, 0).reshaped(
            [1 if number == axis else n for number, n in enumerate(label.shape)]
        )
    return label


@rule("view_as_complex")
def _view_as_complex(call: Call) -> Label:
    return call.label.freeze([-1], INDEXED).without_axes([-1])


@rule("view_as_real")
def _view_as_real(call: Call) -> Label:
    return call.label.with_new_axes([2], CUT)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
@rule("unsafe_split_with_sizes")
def _split(call: Call) -> list[Label]:
    label = call.label
    axis = (call["dim"] or 0) % len(label.axes)
    pieces, start = [], 0
    for shape in call.shapes:
        pieces.append(_sliced(label, axis, start, start + shape[axis]))
        start += shape[axis]
    return pieces


@rule("stack")
def _stack(call: Call) -> Label:
    axis = (call["dim"] or 0) % len(call.shapes[0])
    shape = list(call.shapes[0])
    shape[axis] = 1
    return _concatenated([label.reshaped(shape) for label in call.labels], axis)


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Label:
    rank = len(call.shapes[0])
    # Old caches start from an empty vector, which concatenates with anything.
    labels = [each for each in call.labels if len(each.axes) == rank and 0 not in each.shape]
    if not labels:
        return Label.fresh(call.families, call.shapes[0])
    return _concatenated(labels, (call["dim"] or 0) % rank)


def _concatenated(labels: list[Label], axis: int) -> Label:
    if len(labels) == 1:
        return labels[0]
    if all(not label.axes[axis] for label in labels) and not any(x.ghosts for x in labels):
        return _stacked(labels, axis)
    rank = len(labels[0].axes)
    names = [[(k if n == axis else -1, n) for n in range(rank)] for k in range(len(labels))]
    result = labels[0]
    current = names[0]
    for label, own in zip(labels[1:], names[1:], strict=True):
        out = [*current, own[axis]]
        result = combine(result, current, label, own, out)
        current = out
    # The pieces of the axis stand side by side as axes of their own: make one of them.
    pieces = [axis, *range(rank, len(current))]
    sizes = [label.shape[axis] for label in labels]
    result = result.mixed_axes(pieces)
    for number in pieces:
        result = result.joined(number)
    nodes = [
        result.axes[number][0].nodes
        if size > 1
        else np.full((1,) * len(result.factors), result.families.new(1, CUT))
        for number, size in zip(pieces, sizes, strict=True)
    ]
    made: dict[tuple[int, ...], int] = {}
    common = np.broadcast_arrays(*nodes)
    joint = np.zeros(common[0].shape, dtype=np.int64)
    for where in np.ndindex(joint.shape):
        key = tuple(int(each[where]) for each in common)
        if key not in made:
            made[key] = result.families.composite(Segments(key))
        joint[where] = made[key]
    keep_axis = next(n for n, size in zip(pieces, sizes, strict=True) if size > 1)
    place = result.positions(keep_axis)[0]
    factors = result.factors
    factors[place] = Factor(sum(sizes), joint)
    result = result.with_factors(factors)
    order = [keep_axis if n == axis else n for n in range(rank)]
    dropped = [n for n in pieces if n != keep_axis]
    result = result.permuted([*order, *dropped])
    return result.without_axes(range(rank, rank + len(dropped)))


def _stacked(labels: list[Label], axis: int) -> Label:
    """Concatenate along an axis of ones: the families may differ from one element to the next."""
    labels = [label.resolved() for label in labels]
    for _ in range(2):
        for k in range(1, len(labels)):
            for n in range(len(labels[0].axes)):
                if labels[0].axes[n] and labels[k].axes[n]:
                    labels[0], labels[k] = align(labels[0], n, labels[k], n)
    counts = [len(each) for each in labels[0].axes]
    position = sum(counts[:axis])
    families = labels[0].families
    factors = []
    for together in zip(*(label.factors for label in labels), strict=True):
        arrays = np.broadcast_arrays(*(factor.nodes for factor in together))
        array = np.stack(arrays, axis=position)
        if (array == array.take([0], axis=position)).all():
            array = array.take([0], axis=position)
        factors.append(Factor(together[0].size, array))
    node = families.new(len(labels), CUT)
    rank = len(factors) + 1
    factors.insert(position, Factor(len(labels), np.full((1,) * rank, node)))
    counts[axis] = 1
    return Label(families, []).with_factors(factors, counts)


# Along an axis on which they are linear, the basis may still be changed.
_LINEAR = {"neg", "clone", "copy", "zero", "_to_copy", "real", "positive"}
_POSITIVE = {"relu", "leaky_relu", "abs", "threshold"}
_ADDITIVE = {"add", "sub", "rsub", "copy", "lerp"}


def _names(label: Label, rank: int) -> list[int]:
    return list(range(rank - len(label.axes), rank))


@rule("copy", "fill", "zero", "masked_fill")
def pointwise(call: Call) -> Label:
    """Tie the axes of tensors that are combined entry by entry."""
    rank = len(call.shapes[0])
    labels = [
        label.freeze_codomain(f"its positions are used as numbers ({call.name})")
        for label in call.labels
    ]
    first = labels[0]
    if len(labels) == 1:
        return _unary(call, first)
    if call.name in _ADDITIVE and len(labels) == 2:
        return _sum(first, labels[1], rank)
    if call.name in ("mul", "div") and len(labels) == 2:
        if call.name == "div" or call["rounding_mode"]:
            labels[1].fix_frames()
        return _product(first, labels[1], rank)
    if call.name == "where" and len(labels) == 3:
        mask, x, y = labels
        mask.fix_frames()
        return _product(mask, _sum(x, y, rank), rank)
    for label in labels:
        label.fix_frames()
    result = labels[0]
    for label in labels[1:]:
        result = combine(result, _names(result, rank), label, _names(label, rank), range(rank))
    return result.reshaped(call.shapes[0]) if len(result.axes) != rank else result


def _unary(call: Call, label: Label) -> Label:
    numbers = [v for k, v in call.arguments.items() if k == "other" and v is not None]
    if call.name in _LINEAR or (call.name in ("mul", "div") and not call["rounding_mode"]):
        return label
    if call.name in _ADDITIVE and all(value == 0 for value in numbers):
        return label
    if call.name in _POSITIVE and not call["value"]:
        return label.fix_frames(positive=False)
    return label.fix_frames()


def _sum(x: Label, y: Label, rank: int) -> Label:
    for label, other in ((x, y), (y, x)):
        other_names = _names(other, rank)
        for axis, name in enumerate(_names(label, rank)):
            missing = name not in other_names or not other.axes[other_names.index(name)]
            if label.axes[axis] and missing:
                # A constant is added to every coordinate: only a fixed basis allows that.
                label.fix_frames([axis])
    return combine(x, _names(x, rank), y, _names(y, rank), range(rank))


def _product(x: Label, y: Label, rank: int) -> Label:
    return multiply(x, _names(x, rank), y, _names(y, rank), range(rank))
