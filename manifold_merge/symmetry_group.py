"""Elements of a network's symmetry group: composition and inverse, with nested sets.

An element first changes bases (gauges), then reorders nested sets, then their parents. When the
elements of a parent change places, what they contain moves along, so composition is that of a
wreath product: the second element acts on a nested set where the first one has put it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_merge.symmetry_sets import GaugeGroup, PermutedSet

__all__ = ["SymmetryElement", "SymmetryError", "composed", "inverted", "random_element"]


class SymmetryError(ValueError):
    """A specification does not fit a network, or would change the network's function."""


@dataclass(frozen=True)
class SymmetryElement:
    """One element of the symmetry group of a network; what is left out stays as it is.

    Args:
        permutations: For each permuted set, by name, ``(count,)``: element e of the result is
            element p[e] of what is acted on.
        gauges: For each gauge group, by name, a matrix ``(d, d)``, or factors ``(d,)`` for the kind
            ``"positive"``.
    """

    permutations: Mapping[str, Tensor] = field(default_factory=dict)
    gauges: Mapping[str, Tensor] = field(default_factory=dict)


class Kinship:
    """Which nested sets and gauges change places when an element acts."""

    def __init__(self, sets: Sequence[PermutedSet], gauges: Sequence[GaugeGroup]) -> None:
        self.sets = {each.name: each for each in sets}
        self.members: dict[str, PermutedSet | GaugeGroup] = {each.name: each for each in sets}
        self.members.update((each.name, each) for each in gauges)
        self._siblings = {
            (each.role, isinstance(each, GaugeGroup), *each.parent): each.name
            for each in self.members.values()
            if each.parent is not None
        }

    def sibling(self, name: str, parent: str, index: int) -> str:
        """The set or gauge of the same role inside another element."""
        each = self.members[name]
        key = (each.role, isinstance(each, GaugeGroup), parent, index)
        if key not in self._siblings:
            raise SymmetryError(
                f"{name!r} lies inside an element of {parent!r}, but element {index} of that set "
                f"has no counterpart with the role {each.role!r}: give every element one, or "
                f"remove {name!r} with without({name!r})"
            )
        return self._siblings[key]

    def image(self, name: str, permutations: Mapping[str, Tensor]) -> str:
        """Where the permutations put a nested set or gauge."""
        parent = self.members[name].parent
        if parent is None or parent[0] not in self.sets:
            return name
        order = permutations.get(parent[0])
        index = parent[1] if order is None else int((order.cpu() == parent[1]).nonzero())
        return self.sibling(name, self.image(parent[0], permutations), index)


def _conjugated(gauge: GaugeGroup, value: Tensor, order: Tensor | None, inverse: bool) -> Tensor:
    """A gauge in coordinates that a permutation has reordered."""
    if order is None:
        return value
    order = torch.argsort(order) if inverse else order
    return value[order] if value.ndim == 1 else value[order][:, order]


def composed(
    sets: Sequence[PermutedSet],
    gauges: Sequence[GaugeGroup],
    first: SymmetryElement,
    second: SymmetryElement,
) -> SymmetryElement:
    """The element that acts as ``first`` and then ``second``."""
    kinship = Kinship(sets, gauges)
    permutations = {}
    for each in sets:
        here = first.permutations.get(each.name)
        there = second.permutations.get(kinship.image(each.name, first.permutations))
        if here is None and there is None:
            continue
        here = torch.arange(each.count) if here is None else here
        permutations[each.name] = here if there is None else here[there]
    values = {}
    for gauge in gauges:
        before = first.gauges.get(gauge.name)
        after = second.gauges.get(kinship.image(gauge.name, first.permutations))
        if after is not None:
            order = first.permutations.get(gauge.along) if gauge.along else None
            after = _conjugated(gauge, after, order, inverse=True)
        if before is None or after is None:
            value = after if before is None else before
        else:
            value = after * before if before.ndim == 1 else after @ before
        if value is not None:
            values[gauge.name] = value
    return SymmetryElement(permutations, values)


def inverted(
    sets: Sequence[PermutedSet], gauges: Sequence[GaugeGroup], element: SymmetryElement
) -> SymmetryElement:
    """The element that undoes another one."""
    kinship = Kinship(sets, gauges)
    permutations = {
        kinship.image(name, element.permutations): torch.argsort(order)
        for name, order in element.permutations.items()
    }
    values = {}
    for gauge in gauges:
        value = element.gauges.get(gauge.name)
        if value is None:
            continue
        order = element.permutations.get(gauge.along) if gauge.along else None
        undone = 1 / value if value.ndim == 1 else torch.linalg.inv(value)
        moved = _conjugated(gauge, undone, order, inverse=False)
        values[kinship.image(gauge.name, element.permutations)] = moved
    return SymmetryElement(permutations, values)


def random_element(
    sets: Sequence[PermutedSet],
    gauges: Sequence[GaugeGroup],
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> SymmetryElement:
    """Uniform permutations and well-conditioned changes of basis."""
    permutations = {each.name: torch.randperm(each.count, generator=generator) for each in sets}
    return SymmetryElement(permutations, {g.name: _random(g, generator, dtype) for g in gauges})


def _random(gauge: GaugeGroup, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    d = gauge.dimension
    if gauge.kind == "positive":
        return torch.exp(0.5 * torch.randn(d, generator=generator, dtype=dtype))
    if gauge.kind == "rotation":
        a, b = torch.randn(2, d // 2, generator=generator, dtype=dtype)
        size = torch.exp(0.3 * torch.randn(d // 2, generator=generator, dtype=dtype))
        a, b = size * a / torch.hypot(a, b), size * b / torch.hypot(a, b)
        matrix = torch.zeros(d, d, dtype=dtype)
        i = torch.arange(d // 2)
        i, j = (i, i + d // 2) if gauge.pairing == "halves" else (2 * i, 2 * i + 1)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = a, -b, b, a
        return matrix
    left, right = torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=dtype))[0]
    if gauge.kind == "orthogonal":
        return left
    scales = torch.exp(0.5 * torch.randn(d, generator=generator, dtype=dtype))
    return left @ (scales[:, None] * right)
