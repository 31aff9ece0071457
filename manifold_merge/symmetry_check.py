"""Whether a symmetry specification is sound, and whether a state dict fits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_merge.symmetry_group import SymmetryError
from manifold_merge.symmetry_sets import GaugeGroup, PermutedSet, Placement

if TYPE_CHECKING:
    from manifold_merge.symmetry import NetworkSymmetry

__all__ = ["check_state", "check_structure"]


def _size(each: PermutedSet | GaugeGroup) -> int:
    return each.dimension if isinstance(each, GaugeGroup) else each.count


def check_structure(symmetry: NetworkSymmetry) -> None:
    """Names, nesting and overlaps.

    Raises:
        SymmetryError: If the specification contradicts itself; the message names the set.
    """
    everything = symmetry.members
    for name, times in Counter(each.name for each in everything).items():
        if times > 1:
            raise SymmetryError(f"{times} sets or gauges are called {name!r}: names are unique")
    _check_nesting(symmetry)
    for member in everything:
        for place in member.placements:
            _check_place(symmetry, member.name, _size(member), place)
    for each in symmetry.sets:
        for names in each.tensors:
            if len(names) != each.count:
                raise SymmetryError(
                    f"{each.name!r} has {each.count} elements, but a role lists {len(names)} "
                    f"tensors: {', '.join(names)}"
                )
    _check_overlaps(symmetry)


def _check_nesting(symmetry: NetworkSymmetry) -> None:
    sets = {each.name: each for each in symmetry.sets}
    order = {each.name: number for number, each in enumerate(symmetry.sets)}
    kinship = symmetry.kinship()
    for each in symmetry.members:
        if each.parent is None:
            continue
        parent, index = each.parent
        if parent not in sets:
            raise SymmetryError(f"{each.name!r} lies inside {parent!r}, which is no permuted set")
        if not 0 <= index < sets[parent].count:
            raise SymmetryError(
                f"{each.name!r} lies inside element {index} of {parent!r}, which has "
                f"{sets[parent].count}"
            )
        if isinstance(each, PermutedSet) and order[each.name] > order[parent]:
            raise SymmetryError(f"{each.name!r} must be listed before {parent!r}, which holds it")
        for other in range(sets[parent].count):
            found = kinship.members[kinship.sibling(each.name, parent, other)]
            if _size(found) != _size(each):
                raise SymmetryError(
                    f"{each.name!r} and {found.name!r} change places with the elements of "
                    f"{parent!r}, but have {_size(each)} and {_size(found)} elements"
                )


def _check_place(symmetry: NetworkSymmetry, name: str, count: int, place: Placement) -> None:
    shape = symmetry.shapes.get(place.tensor)
    if shape is None:
        raise SymmetryError(
            f"{name!r} is placed in {place.tensor!r}, whose shape is not listed in shapes"
        )
    for axis, position in ((place.axis, 0), *place.within):
        if not 0 <= axis < len(shape) or not 0 <= position < shape[axis]:
            raise SymmetryError(
                f"{name!r} is placed at axis {axis}, position {position} of {place.tensor!r}, "
                f"whose shape is {tuple(shape)}"
            )
    index = place.index(count)
    if index.min() < 0 or index.max() >= shape[place.axis]:
        raise SymmetryError(
            f"{name!r} covers positions {int(index.min())} to {int(index.max())} of axis "
            f"{place.axis} of {place.tensor!r}, which has {shape[place.axis]}"
        )
    if len(index.unique()) != index.numel():
        raise SymmetryError(
            f"elements of {name!r} overlap along axis {place.axis} of {place.tensor!r}"
        )


def _check_overlaps(symmetry: NetworkSymmetry) -> None:
    parents = {each.name: each.parent for each in symmetry.sets}

    def ancestors(name: str) -> Iterator[tuple[str, int]]:
        while (parent := parents.get(name)) is not None:
            yield parent
            name = parent[0]

    Where = tuple[str, int, tuple[tuple[int, int], ...]]
    by_axis: dict[Where, dict[str, Tensor]] = {}
    for each in symmetry.sets:
        for place in each.placements:
            found = by_axis.setdefault((place.tensor, place.axis, place.within), {})
            index = place.index(each.count)
            # All places of one set along an axis belong together: its elements have more positions.
            index = torch.cat([found[each.name], index], dim=1) if each.name in found else index
            found[each.name] = index
            if len(index.unique()) != index.numel():
                raise SymmetryError(
                    f"{each.name!r} is placed twice at axis {place.axis} of {place.tensor!r}"
                )
    for (tensor, axis, _), found in by_axis.items():
        size = symmetry.shapes[tensor][axis]
        names = list(found)
        owner = torch.full((size,), -1)
        for number, name in enumerate(names):
            index = found[name]
            clash = owner[index.reshape(-1)]
            for other in clash[clash >= 0].unique().tolist():
                there = found[names[other]]
                nested = dict(ancestors(names[other])).get(name)
                inside = nested is not None and bool(torch.isin(there, index[nested]).all())
                if not inside and not _are_factors(there, index, size):
                    raise SymmetryError(
                        f"{names[other]!r} and {name!r} overlap at axis {axis} of {tensor!r}; "
                        f"overlapping sets must be nested (parent) or the two factors of a grid"
                    )
            owner[index.reshape(-1)] = number


def _are_factors(first: Tensor, second: Tensor, size: int) -> bool:
    """Whether two sets permute the rows and the columns of one grid of positions."""

    def alike(index: Tensor, other: Tensor) -> bool:
        owner = torch.full((size,), -1)
        owner[other] = torch.arange(len(other))[:, None].expand_as(other)
        return bool((owner[index] == owner[index][:1]).all())

    return alike(first, second) and alike(second, first)


def check_state(symmetry: NetworkSymmetry, state: Mapping[str, Tensor]) -> None:
    """Compare the shapes of a state dict with those of the specification.

    Raises:
        SymmetryError: If a tensor is missing or has another shape.
    """
    stored = {first: alias for alias, first in symmetry.aliases.items() if alias in state}
    for name, shape in symmetry.shapes.items():
        found = state.get(name, state.get(stored.get(name, name)))
        if found is None:
            raise SymmetryError(
                f"the state dict has no tensor {name!r}: is it of another model than the symmetry?"
            )
        if tuple(found.shape) != tuple(shape):
            raise SymmetryError(
                f"{name!r} has shape {tuple(found.shape)}, the symmetry was made for "
                f"{tuple(shape)}: derive it again with symmetry_of"
            )
