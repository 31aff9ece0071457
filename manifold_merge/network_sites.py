"""Where the elements of a set lie in a tensor, and what else has to be moved to see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifold_merge.assignment import inverse_permutation

__all__ = ["Block", "Order", "Route", "Site", "acted", "any_meet", "route_to"]

# What a set does to the network: nothing, a permutation (count,), or a soft one (count, count).
# What a change of basis does: nothing, or a matrix (d, d), orthogonal, or a contraction if soft.
Order = Tensor | None


@dataclass(frozen=True)
class Block:
    """Consecutive entries of the vector: one tensor, or several of one shape stacked.

    Attributes:
        names: Names in the state dict; more than one for a stack of whole tensors.
        shape: Shape of the block, with a first dimension for the stack if it is one.
        offset: Where it begins in the vector.
        stacked: Whether it is a stack.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int
    stacked: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Site:
    """One axis of one block along which the elements of a set lie.

    Attributes:
        owner: Index of the set.
        block: Index of the block.
        axis: The axis of the block, counted from its end (negative): dimensions in front are batch.
        count: Number of elements.
        index: Positions of each element along the axis, ``(count, width)``; ``None`` if they fill
            it in order.
        within: ``(axis, position)`` pairs, axes counted from the end, that restrict the action.
    """

    owner: int
    block: int
    axis: int
    count: int
    index: Tensor | None
    within: tuple[tuple[int, int], ...]

    def restrict(self, array: Tensor) -> Tensor:
        """The part of a block that the site covers, as a view of the same number of dimensions."""
        for axis, position in self.within:
            array = array.narrow(axis, position, 1)
        return array

    def rows(self, array: Tensor) -> Tensor:
        """The entries of each element, ``(count, entries)``, of a block ``(..., *shape)``."""
        part = self.restrict(array)
        if self.index is not None:
            part = part.index_select(self.axis, self.index.reshape(-1).to(part.device))
        return part.movedim(self.axis, 0).reshape(self.count, -1)

    def act(
        self, array: Tensor, order: Order, *, transpose: bool = False, owned: bool = False
    ) -> Tensor:
        """Reorder the elements of a block ``(..., *shape)``: element e becomes element order[e].

        A soft order mixes them. ``transpose`` applies the inverse, or the transpose if soft. An
        array that is ``owned`` may be overwritten.
        """
        if order is None:
            return array
        if order.ndim == 1:
            order = inverse_permutation(order) if transpose else order
            if self.index is None and not self.within and array.shape[self.axis] == self.count:
                return array.index_select(self.axis, order)
        elif transpose:
            order = order.mT
        part = self.restrict(array)
        picked = part
        if self.index is not None:
            flat = self.index.reshape(-1).to(part.device)
            picked = part.index_select(self.axis, flat)
        moved = picked.movedim(self.axis, 0)
        rows = moved.reshape(self.count, -1)
        rows = rows[order] if order.ndim == 1 else order @ rows
        new = rows.reshape(moved.shape).movedim(0, self.axis)
        if self.index is None and not self.within:
            return new
        result = array if owned else array.clone()
        target = self.restrict(result)
        if self.index is None:
            target.copy_(new)
        else:
            target.index_copy_(self.axis, flat, new)
        return result


@dataclass(frozen=True)
class Route:
    """How the rows of a site are found after others have acted, with no more work than needed.

    Attributes:
        near: Positions that matter along the axis of the site; ``None`` for all.
        first: Sites on that axis that reach them, within those positions.
        pick: The positions of the site among them, in the order of its elements; ``None`` for all.
        last: Sites on other axes, which act on those rows alone.
    """

    near: Tensor | None
    first: tuple[Site, ...]
    pick: Tensor | None
    last: tuple[Site, ...]


def acted(
    sites: Sequence[Site],
    array: Tensor,
    orders: Sequence[Order],
    *,
    transpose: bool = False,
    owned: bool = False,
) -> Tensor:
    """A block after several sites have acted on it, copied once."""
    for site in sites:
        order = orders[site.owner]
        if order is not None:
            array = site.act(array, order, transpose=transpose, owned=owned)
            owned = True
    return array


def route_to(site: Site, acting: Sequence[Site], shape: Sequence[int]) -> Route:
    """What of a block the rows of a site depend on, once some sites have acted in turn."""
    own = None if site.index is None else site.index.reshape(-1)
    if site.within or any(other.within for other in acting):
        return Route(None, tuple(acting), own, ())
    # Sites on different axes commute; on one axis only those matter that reach what is asked for.
    length = shape[site.axis]
    wanted = torch.zeros(length, dtype=torch.bool)
    wanted[torch.arange(length) if own is None else own] = True
    first: list[Site] = []
    for other in reversed([each for each in acting if each.axis == site.axis]):
        reach = torch.arange(length) if other.index is None else other.index.reshape(-1)
        if bool(wanted[reach].any()):
            first.insert(0, other)
            wanted[reach] = True
    last = tuple(each for each in acting if each.axis != site.axis)
    if bool(wanted.all()):
        return Route(None, tuple(first), own, last)
    place = wanted.cumsum(0) - 1  # where a position is among those that are kept
    assert own is not None
    inside = [replace(s, index=place[s.index]) for s in first if s.index is not None]
    return Route(wanted.nonzero()[:, 0], tuple(inside), place[own], last)


def any_meet(sites: Sequence[Site]) -> bool:
    """Whether two of some sites share an entry."""
    return any(_meet(a, b) for i, a in enumerate(sites) for b in sites[:i])


def _meet(a: Site, b: Site) -> bool:
    if a.block != b.block:
        return False
    first, second = _reach(a), _reach(b)
    return all(
        first[axis] is None or second[axis] is None or bool(first[axis] & second[axis])  # type: ignore[operator]
        for axis in {*first} & {*second}
    )


def _reach(site: Site) -> dict[int, set[int] | None]:
    """Positions of a site along the axes that it names; ``None`` for all of them."""
    along = None if site.index is None else set(site.index.reshape(-1).tolist())
    return {site.axis: along, **{axis: {position} for axis, position in site.within}}
