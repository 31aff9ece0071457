"""The places of a network's symmetries in its state dict, and how tensors are moved there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["GaugeGroup", "PermutedSet", "Placement"]


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
        step: From one element to the next; ``None`` means ``block * stride``.
        stride: From one position of an element to its next one.
        within: ``(axis, position)`` pairs that restrict to a slice of other axes: the neurons of
            expert 3 of a stacked ``(experts, width, inputs)`` tensor have ``((0, 3),)``.
        inverse: For gauge groups only: the axis transforms with the inverse transpose.

    Example:
        >>> Placement("c_attn.weight", 1, block=2, start=6).index(3).tolist()
        [[6, 7], [8, 9], [10, 11]]
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

    def region(self, tensor: Tensor) -> Tensor:
        """The view of ``tensor`` that ``within`` restricts to; it keeps all axes."""
        for axis, position in self.within:
            tensor = tensor.narrow(axis, position, 1)
        return tensor


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
        role: What the set is within its parent's element; the sets that change places when the
            parent's elements do have the same role.
    """

    name: str
    count: int
    placements: tuple[Placement, ...] = ()
    tensors: tuple[tuple[str, ...], ...] = ()
    parent: tuple[str, int] | None = None
    role: str = ""


@dataclass(frozen=True)
class GaugeGroup:
    """A space inside a network whose basis may be changed without changing the function.

    Args:
        name: Unique within the network.
        kind: ``"general_linear"`` for GL(d) (the width of a head), ``"positive"`` for positive
            factors of single units (ReLU), ``"orthogonal"`` for O(d), ``"rotation"`` for scaled
            rotations of pairs of coordinates, which commute with rotary position embeddings.
        dimension: d.
        placements: Axes that transform by G, or by its inverse transpose where ``inverse``. The d
            elements of a placement are the coordinates; all positions of one element (the pixels
            of a channel after a Flatten) transform alike.
        parent: The set and the index of the element inside which this space lies: a head.
        along: The permuted set whose elements are the coordinates: the units that are rescaled.
        role: What the space is within its parent's element, as for :class:`PermutedSet`.
        pairing: For rotations: coordinate j turns with ``"halves"`` j + d / 2, or with its
            ``"neighbours"`` 2 j with 2 j + 1.
    """

    name: str
    kind: Literal["general_linear", "positive", "orthogonal", "rotation"]
    dimension: int
    placements: tuple[Placement, ...]
    parent: tuple[str, int] | None = None
    along: str | None = None
    role: str = ""
    pairing: Literal["halves", "neighbours"] = "halves"


class Workspace:
    """A state dict that is being changed: each tensor is copied once, when it is first written."""

    def __init__(self, state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self.result = dict(state)
        self._aliases = aliases
        self._names = {alias: name for name, alias in self._stored().items()}
        self._own: set[str] = set()

    def _stored(self) -> dict[str, str]:
        """For a shared tensor that is stored under another name only: that name."""
        return {
            alias: first
            for alias, first in self._aliases.items()
            if alias in self.result and first not in self.result
        }

    def writable(self, name: str) -> Tensor:
        """A tensor that may be changed in place."""
        name = self._names.get(name, name)
        if name not in self._own:
            self.result[name] = self.result[name].detach().clone()
            self._own.add(name)
        return self.result[name]

    def move(self, names: tuple[str, ...], order: Tensor) -> None:
        """Let each name hold the tensor of another one."""
        names = tuple(self._names.get(name, name) for name in names)
        moved = [self.result[names[int(e)]] for e in order]
        owned = [names[int(e)] in self._own for e in order]
        for name, tensor, own in zip(names, moved, owned, strict=True):
            self.result[name] = tensor
            self._own.discard(name)
            if own:
                self._own.add(name)

    def finished(self) -> dict[str, Tensor]:
        """The new state dict; shared tensors are shared again."""
        for alias, first in self._aliases.items():
            if alias in self.result and first in self.result:
                self.result[alias] = self.result[first]
        return self.result


def permute_placement(tensor: Tensor, place: Placement, order: Tensor) -> None:
    """Reorder the elements along one axis, in place."""
    region = place.region(tensor)
    index = place.index(len(order))
    source = torch.arange(region.shape[place.axis])
    source[index.reshape(-1)] = index[order.cpu()].reshape(-1)
    region.copy_(region.index_select(place.axis, source.to(tensor.device)))


def transform_placement(tensor: Tensor, place: Placement, matrix: Tensor) -> None:
    """Change the basis along one axis, in place, by a matrix (d, d) or by d factors."""
    region = place.region(tensor).movedim(place.axis, 0)
    index = place.index(len(matrix)).to(tensor.device)
    exact = torch.promote_types(torch.promote_types(tensor.dtype, matrix.dtype), torch.float32)
    values = region[index].to(exact)
    matrix = matrix.to(tensor.device, exact)
    if matrix.ndim == 1:
        factors = 1 / matrix if place.inverse else matrix
        moved = values * factors.reshape(-1, *[1] * (values.ndim - 1))
    else:
        if place.inverse:
            matrix = torch.linalg.inv(matrix).mT
        moved = (matrix @ values.reshape(len(matrix), -1)).reshape(values.shape)
    region[index] = moved.to(tensor.dtype)
