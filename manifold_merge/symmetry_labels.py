"""Labels: which families the axes of one tensor carry, while a network is traced.

A :class:`Label` describes a tensor as an array over *factors*. An axis of size 1 has none, a plain
axis one, and an axis that flattens heads × width two. The node of a factor may depend on the
indices of the other factors (each head has its own width family), so it is an integer array that
broadcasts over the factors, of size 1 along those it does not depend on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from manifold_merge.symmetry_axes import Families, FrameTie, Incompatible, Product

__all__ = ["MOST_DEPENDENT", "Codomain", "Factor", "Label", "take_nodes", "tie_arrays"]

# Families may depend on the index along another axis (each expert, each head has its own) of at
# most this size; along longer axes they are the same everywhere.
MOST_DEPENDENT = 512


@dataclass(frozen=True)
class Factor:
    """One factor of an axis: its size and its nodes, an array over all factors of the tensor."""

    size: int
    nodes: np.ndarray


@dataclass(frozen=True)
class Codomain:
    """The values of an integer tensor are positions in this node: the result of a ``topk``."""

    node: int
    source: Hashable


@dataclass
class Label:
    """Families of the axes of a tensor.

    Args:
        families: The store of nodes.
        axes: Factors of each axis, outer to inner.
        ghosts: Factors that are no axis of the tensor, but whose index (chosen by data, as an
            expert for a token) decides which family an axis carries; by the source of the index.
        codomain: For integer tensors whose values are positions in a family.
        picked: Nodes from which single positions were picked; they are frozen when the numbers
            are used, since some models pick a position for the sake of the shape only.
    """

    families: Families
    axes: list[list[Factor]]
    ghosts: dict[Hashable, Factor] = field(default_factory=dict)
    codomain: Codomain | None = None
    picked: tuple[int, ...] = ()

    @classmethod
    def fresh(cls, families: Families, shape: Sequence[int], frozen: str | None = None) -> Label:
        """A label with new nodes, one per axis."""
        rank = sum(size != 1 for size in shape)
        axes = []
        for size in shape:
            node = np.full((1,) * rank, families.new(size, frozen)) if size != 1 else None
            axes.append([] if node is None else [Factor(size, node)])
        return cls(families, axes)

    @property
    def factors(self) -> list[Factor]:
        """All factors: those of the axes in order, then the ghosts."""
        return [factor for axis in self.axes for factor in axis] + list(self.ghosts.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(prod(factor.size for factor in axis) for axis in self.axes)

    def positions(self, axis: int) -> range:
        """Numbers of the factors of one axis among all factors."""
        start = sum(len(each) for each in self.axes[:axis])
        return range(start, start + len(self.axes[axis]))

    def nodes(self) -> list[int]:
        """Every node that occurs."""
        return sorted({int(n) for factor in self.factors for n in factor.nodes.flat})

    def axis_nodes(self, axis: int) -> list[int]:
        """Every node that occurs on one axis."""
        return sorted({int(n) for factor in self.axes[axis] for n in factor.nodes.flat})

    def with_factors(self, factors: Sequence[Factor], counts: Sequence[int] | None = None) -> Label:
        """The same tensor with other factors, ``counts`` of them on each axis."""
        counts = [len(axis) for axis in self.axes] if counts is None else counts
        remaining = list(factors)
        axes = []
        for count in counts:
            axes.append(remaining[:count])
            remaining = remaining[count:]
        return replace(self, axes=axes, ghosts=dict(zip(self.ghosts, remaining, strict=True)))

    def resolved(self) -> Label:
        """Refine the factors whose nodes have been refined into products since."""
        label, position = self, 0
        while position < len(label.factors):
            factor = label.factors[position]
            counts = {
                label.families.sizes[structure.outer]
                for node in factor.nodes.flat
                if isinstance(structure := label.families.structures[int(node)], Product)
            }
            if counts:
                label = label.split_factor(position, max(counts))
            else:
                position += 1
        return label

    def split_factor(self, position: int, count: int) -> Label:
        """Refine one factor into ``count`` blocks; freezes it where that is impossible."""
        families, factor = self.families, self.factors[position]
        width = factor.size // count
        outer = np.zeros(factor.nodes.shape, dtype=np.int64)
        inner = np.zeros((count, *factor.nodes.shape), dtype=np.int64)
        done: dict[int, Product] = {}
        for where, node in np.ndenumerate(factor.nodes):
            node = int(node)
            if node not in done:
                try:
                    done[node] = families.split(node, count)
                except Incompatible:
                    reason = "an axis that is cut in two ways which do not fit"
                    families.freeze(node, reason)
                    families.fix_frame(node)
                    inners = tuple(families.new(width, reason) for _ in range(count))
                    done[node] = Product(families.new(count, reason), inners)
            outer[where] = done[node].outer
            inner[(slice(None), *where)] = done[node].inners
        factors = []
        for number, each in enumerate(self.factors):
            if number == position:
                moved = np.moveaxis(inner, 0, position)
                # The old axis of size 1 is gone: its place now counts the blocks.
                moved = np.squeeze(moved, axis=position + 1)
                factors.append(Factor(count, np.expand_dims(outer, position + 1)))
                factors.append(Factor(width, np.expand_dims(moved, position + 1)))
                continue
            shape = list(each.nodes.shape)
            both = [count, width] if shape[position] > 1 else [1, 1]
            shape[position : position + 1] = both
            factors.append(Factor(each.size, each.nodes.reshape(shape)))
        counts = [len(axis) for axis in self.axes]
        start = 0
        for axis, length in enumerate(counts):
            if start <= position < start + length:
                counts[axis] += 1
                return self.with_factors(factors, counts)
            start += length
        # A ghost was refined: its outer factor becomes a ghost of its own.
        key = list(self.ghosts)[position - start]
        ghosts: dict[Hashable, Factor] = {}
        for each_key in self.ghosts:
            if each_key == key:
                ghosts[(key, "outer")] = factors[position]
            ghosts[each_key] = factors[position]
        label = replace(self, ghosts=ghosts)
        return label.with_factors(factors, counts)

    def mixed(self, positions: Sequence[int]) -> Label:
        """Tie what depends on the index of these factors: an operation mixes along them."""
        factors = self.factors
        for number, factor in enumerate(factors):
            nodes = factor.nodes
            for position in positions:
                # Heads × width mixed as a whole: each head keeps its own width family.
                if number not in positions and nodes.shape[position] > 1:
                    nodes = self._tied_along(nodes, position)
            factors[number] = Factor(factor.size, nodes)
        return self.with_factors(factors)

    def _tied_along(self, nodes: np.ndarray, position: int) -> np.ndarray:
        first = np.take(nodes, [0], axis=position)
        tie_arrays(self.families, first, nodes, "same")
        return first

    def mixed_axes(self, axes: Sequence[int]) -> Label:
        """Like :meth:`mixed`, for whole axes; returns a resolved label."""
        label = self.resolved()
        return label.mixed([p for axis in axes for p in label.positions(axis % len(label.axes))])

    def without_axes(self, axes: Sequence[int], *, keepdim: bool = False) -> Label:
        """The label after a reduction over some axes."""
        label = self.mixed_axes(axes)
        gone = {axis % len(label.axes) for axis in axes}
        drop = [p for axis in gone for p in label.positions(axis)]
        kept = [
            [take_nodes(factor, drop) for factor in axis] if number not in gone else []
            for number, axis in enumerate(label.axes)
            if keepdim or number not in gone
        ]
        ghosts = {key: take_nodes(factor, drop) for key, factor in label.ghosts.items()}
        return replace(label, axes=kept, ghosts=ghosts, codomain=None)

    def selected(self, axis: int, index: int) -> Label:
        """The label of ``tensor.select(axis, index)``; the caller freezes the axis."""
        label = self.resolved()
        positions = label.positions(axis)
        sizes = [factor.size for factor in label.axes[axis]]
        indices = [int(i) for i in np.unravel_index(index, sizes)] if sizes else []
        where = dict(zip(positions, indices, strict=True))
        kept = [
            [take_nodes(factor, list(positions), where) for factor in each]
            for number, each in enumerate(label.axes)
            if number != axis
        ]
        ghosts = {
            k: take_nodes(factor, list(positions), where) for k, factor in label.ghosts.items()
        }
        return replace(label, axes=kept, ghosts=ghosts)

    def freeze(self, axes: Sequence[int] | None, reason: str) -> Label:
        """Freeze axes (all if ``None``) and the frames along them."""
        numbers = range(len(self.axes)) if axes is None else [a % len(self.axes) for a in axes]
        for axis in numbers:
            for node in self.axis_nodes(axis):
                self.families.freeze(node, reason)
                self.families.fix_frame(node)
        return self

    def settle(self, reason: str) -> None:
        """Freeze what single positions were picked from."""
        for node in self.picked:
            self.families.freeze(node, reason)
            self.families.fix_frame(node)

    def fix_frames(self, axes: Sequence[int] | None = None, *, positive: bool = True) -> Label:
        """Fix the frames along axes (all if ``None``)."""
        numbers = range(len(self.axes)) if axes is None else [a % len(self.axes) for a in axes]
        for axis in numbers:
            for node in self.axis_nodes(axis):
                self.families.fix_frame(node, positive=positive)
        return self

    def freeze_codomain(self, reason: str) -> Label:
        """Freeze the family that the values of this tensor point into, and forget it."""
        if self.codomain is not None:
            self.families.freeze(self.codomain.node, reason)
            self.families.fix_frame(self.codomain.node)
        return replace(self, codomain=None)

    def expanded(self, shape: Sequence[int]) -> Label:
        """The label after ``tensor.expand(shape)``; a repeated axis is a new, free family."""
        lead = len(shape) - len(self.axes)
        label = replace(self, axes=[[] for _ in range(lead)] + self.axes)
        for axis, size in enumerate(shape):
            if size > 1 and not label.axes[axis]:
                label = label.with_new_factor(axis, size)
        return label

    def with_new_factor(self, axis: int, size: int, frozen: str | None = None) -> Label:
        """Add an outermost factor to an axis along which the tensor is constant.

        The new family may be another one for each index of the free factors before it: the query
        heads that share a key-value head.
        """
        position = sum(len(each) for each in self.axes[:axis])
        shape = [1] * (len(self.factors) + 1)
        if frozen is None:
            for number, factor in enumerate(self.factors[:position]):
                nodes = [leaf for n in factor.nodes.flat for leaf in self.families.leaves(int(n))]
                free = any(self.families.reason(node) is None for node in nodes)
                if free and prod(shape) * factor.size <= MOST_DEPENDENT:
                    shape[number] = factor.size
        made = [self.families.new(size, frozen) for _ in range(prod(shape))]
        for node in made:
            self.families.fix_frame(node)
        factors = [
            Factor(factor.size, np.expand_dims(factor.nodes, position)) for factor in self.factors
        ]
        factors.insert(position, Factor(size, np.array(made).reshape(shape)))
        counts = [len(each) + (number == axis) for number, each in enumerate(self.axes)]
        return self.with_factors(factors, counts)

    def with_new_axes(self, sizes: Sequence[int], frozen: str) -> Label:
        """Append axes that may not move: the pixels of a convolution's result."""
        label = self
        for size in sizes:
            label = replace(label, axes=[*label.axes, []])
            if size > 1:
                label = label.with_new_factor(len(label.axes) - 1, size, frozen)
        return label

    def permuted(self, order: Sequence[int]) -> Label:
        """The label after ``tensor.permute(order)``."""
        old = [p for axis in order for p in self.positions(axis)]
        old += range(len(old), len(self.factors))
        factors = self.factors
        moved = [Factor(factors[p].size, factors[p].nodes.transpose(old)) for p in old]
        return self.with_factors(moved, [len(self.axes[axis]) for axis in order])

    def joined(self, axis: int) -> Label:
        """The same (resolved) label with a single factor on an axis that has several."""
        label = self
        while len(label.axes[axis]) > 1:
            first = label.positions(axis)[-2]
            label = label._joined_pair(first, axis)
        return label

    def _joined_pair(self, position: int, axis: int) -> Label:
        """Replace two adjacent factors by one composite."""
        factors, families = self.factors, self.families
        outer, inner = factors[position], factors[position + 1]
        outer_nodes = outer.nodes
        if outer_nodes.shape[position + 1] > 1:
            outer_nodes = self._tied_along(outer_nodes, position + 1)
        nodes = np.broadcast_to(
            inner.nodes,
            [
                outer.size if p == position else max(a, b)
                for p, (a, b) in enumerate(zip(outer_nodes.shape, inner.nodes.shape, strict=True))
            ],
        )
        outer_full = np.broadcast_to(
            outer_nodes, [1 if p == position else s for p, s in enumerate(nodes.shape)]
        )
        joint = np.zeros(outer_full.shape, dtype=np.int64)
        made: dict[tuple[int, ...], int] = {}
        for where, node in np.ndenumerate(outer_full):
            row = list(where)
            inners = []
            for i in range(outer.size):
                row[position] = i
                inners.append(int(nodes[tuple(row)]))
            key = (int(node), *inners)
            if key not in made:
                made[key] = families.composite(Product(int(node), tuple(inners)))
            joint[where] = made[key]
        result = []
        for number, each in enumerate(factors):
            if number == position + 1:
                continue
            array = joint if number == position else each.nodes
            size = outer.size * inner.size if number == position else each.size
            shape = list(array.shape)
            if shape[position] > 1 or shape[position + 1] > 1:
                full = list(shape)
                full[position : position + 2] = [outer.size, inner.size]
                array = np.broadcast_to(array, full)
                shape = full
            shape[position : position + 2] = [shape[position] * shape[position + 1]]
            result.append(Factor(size, array.reshape(shape)))
        counts = [len(each) - (number == axis) for number, each in enumerate(self.axes)]
        return self.with_factors(result, counts)

    def reshaped(self, shape: Sequence[int]) -> Label:
        """The label after a reshape; freezes the axes where it does not respect the factors."""
        label = self.resolved()
        counts: list[int] = []
        position = 0
        for size in shape:
            filled, count = 1, 0
            while filled < size:
                number = sum(counts) + count
                have = label.factors[number].size
                need = size // filled
                if have <= need and need % have == 0:
                    filled *= have
                    count += 1
                elif have > need and have % need == 0:
                    label = label.split_factor(number, need)
                else:
                    reason = "a reshape that mixes axes"
                    label.settle(reason)
                    label.freeze(None, reason)
                    return Label.fresh(label.families, shape, reason)
            counts.append(count)
            position += count
        return label.with_factors(label.factors, counts)


def take_nodes(
    factor: Factor, drop: Sequence[int], where: Mapping[int, int] | None = None
) -> Factor:
    """Remove dimensions of a factor's nodes, at the index ``where`` or the first."""
    nodes = factor.nodes
    index: list[int | slice] = [slice(None)] * nodes.ndim
    for position in drop:
        chosen = int(where[position]) if where else 0
        index[position] = chosen if nodes.shape[position] > 1 else 0
    return Factor(factor.size, nodes[tuple(index)])


def tie_arrays(families: Families, first: np.ndarray, second: np.ndarray, frame: FrameTie) -> None:
    """Tie two arrays of nodes entry by entry, after broadcasting."""
    a, b = np.broadcast_arrays(first, second)
    pairs = np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1)
    for x, y in pairs.T:
        families.tie(int(x), int(y), frame)
