"""Symmetries of a whole network: which parameters move together, and how.

A :class:`NetworkSymmetry` is data: a list of :class:`PermutedSet` (neurons, channels, heads,
experts that may be reordered) and of :class:`GaugeGroup` (spaces whose basis may be changed). Each
names the places in the state dict where its elements lie. It is derived from a model by
:func:`manifold_merge.symmetry_of`, can be printed and edited by hand, and travels as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["GaugeGroup", "NetworkSymmetry", "PermutedSet", "Placement"]


@dataclass(frozen=True)
class Placement:
    """Where the elements of a set lie along one axis of one tensor of the state dict.

    Element ``e`` of a set of ``count`` owns the positions ``start + e * step + b * stride`` for
    ``b`` in ``range(block)``. The defaults describe one row (or column) per element.

    Args:
        tensor: Name in the state dict.
        axis: The axis of that tensor, counted from 0.
        block: Positions per element: a head's width, or the pixels of a channel after a Flatten.
        start: First position of element 0 (the place of a part of a fused tensor).
        step: From one element to the next; ``None`` means ``block * stride`` if ``stride`` is 1.
        stride: From one position of an element to its next one.
        within: ``(axis, position)`` pairs that restrict to a slice of other axes: the neurons of
            expert 3 of a stacked ``(experts, width, inputs)`` tensor have ``((0, 3),)``.
        inverse: For gauge groups only: the axis transforms with the inverse transpose.
    """

    tensor: str
    axis: int
    block: int = 1
    start: int = 0
    step: int | None = None
    stride: int = 1
    within: tuple[tuple[int, int], ...] = ()
    inverse: bool = False

    def index(self, count: int) -> Tensor:
        """Positions of each element along the axis, ``(count, block)``."""
        step = self.block * self.stride if self.step is None else self.step
        elements = torch.arange(count)[:, None] * step
        return self.start + elements + torch.arange(self.block) * self.stride


@dataclass(frozen=True)
class PermutedSet:
    """Elements of a network that may be reordered: neurons, channels, heads or experts.

    Args:
        name: Unique within the network; a readable path such as ``"layers.0.mlp"``.
        count: Number of elements.
        placements: Where the elements lie. A permutation moves all of them together.
        tensors: For sets whose elements are whole tensors (a ``ModuleList`` of experts): one tuple
            of ``count`` state dict names for each role, such as ``("experts.0.w", "experts.1.w")``.
        parent: The set whose elements contain this one, with the index of the element, if sets
            are nested: the neurons inside one expert, the query heads of one key-value head.
    """

    name: str
    count: int
    placements: tuple[Placement, ...] = ()
    tensors: tuple[tuple[str, ...], ...] = ()
    parent: tuple[str, int] | None = None


@dataclass(frozen=True)
class GaugeGroup:
    """A space inside a network whose basis may be changed without changing the function.

    Args:
        name: Unique within the network.
        kind: ``"general_linear"`` for GL(d) (the width of a head), ``"positive"`` for positive
            factors of single units (ReLU), ``"orthogonal"`` for O(d), ``"rotation"`` for scaled
            rotations of pairs of coordinates, which commute with rotary position embeddings.
        dimension: d.
        placements: Axes that transform by G, or by its inverse transpose where ``inverse``; each
            has ``block=1`` and one position for each of the d coordinates.
        parent: The set and the index of the element inside which this space lies: a head.
    """

    name: str
    kind: Literal["general_linear", "positive", "orthogonal", "rotation"]
    dimension: int
    placements: tuple[Placement, ...]
    parent: tuple[str, int] | None = None


@dataclass(frozen=True)
class NetworkSymmetry:
    """The symmetry group of one network, as data.

    Args:
        sets: Permuted sets; one that is nested comes before its parent.
        gauges: Continuous groups; they act before the permutations.
        shapes: Shape of each tensor of the state dict that a symmetry touches.
    """

    sets: tuple[PermutedSet, ...]
    gauges: tuple[GaugeGroup, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def permute(
        self, state: Mapping[str, Tensor], permutations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Reorder the elements of each set; element e of the result is element p[e] of ``state``.

        Args:
            state: A state dict of the network. Leading batch dimensions are not supported.
            permutations: For each set to reorder, by name, a permutation ``(count,)``. Sets that
                are left out stay as they are.

        Returns:
            A new state dict; tensors that no set touches are shared with ``state``.
        """
        result = dict(state)
        for each in self.sets:
            if each.name not in permutations:
                continue
            order = permutations[each.name]
            for place in each.placements:
                tensor = result[place.tensor]
                index = place.index(each.count)
                source = torch.arange(tensor.shape[place.axis])
                source[index.reshape(-1)] = index[order.cpu()].reshape(-1)
                source = source.to(tensor.device)
                if place.within:
                    where = [slice(None)] * tensor.ndim
                    for axis, position in place.within:
                        where[axis] = slice(position, position + 1)
                    tensor = tensor.clone()
                    tensor[tuple(where)] = tensor[tuple(where)].index_select(place.axis, source)
                else:
                    tensor = tensor.index_select(place.axis, source)
                result[place.tensor] = tensor
            for names in each.tensors:
                moved = [result[names[int(e)]] for e in order]
                result.update(zip(names, moved, strict=True))
        return result
