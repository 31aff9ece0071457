"""Experts that data-dependent control flow hides from a trace, found by structure and proved.

A loop over experts picks them one by one, which freezes the axes that count them. If a module
holds ``count`` alike submodules, or tensors stacked over ``count``, and frozen axes of the same
size (the router's rows), the hypothesis is that they may be reordered together. It is kept if a
transposition and a cycle, which generate all permutations, leave the outputs as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from manifold_merge.symmetry import NetworkSymmetry, SymmetryElement
from manifold_merge.symmetry_proof import Prover
from manifold_merge.symmetry_rules_linear import SPATIAL
from manifold_merge.symmetry_sets import GaugeGroup, PermutedSet, Placement
from manifold_merge.symmetry_trace import CONSTANT, INPUT, OUTPUT, UNUSED, Trace

__all__ = ["with_experts"]

# Axes that are frozen for these reasons count no experts.
_FIXED = {CONSTANT, INPUT, OUTPUT, SPATIAL, UNUSED}


def with_experts(
    prover: Prover, found: Trace, symmetry: NetworkSymmetry, tolerance: float
) -> tuple[NetworkSymmetry, set[str]]:
    """Add the experts whose exchange is confirmed; also returns the tensors they account for."""
    completed: set[str] = set()
    claimed: set[str] = set()
    for scope, count, lists in _scopes(prover.model):
        candidates = _frozen_places(found, symmetry, scope, count, lists, claimed)
        stacked = [p for p in candidates if p.axis == 0 and len(found.shapes[p.tensor]) > 2]
        if not lists and (not stacked or len(candidates) < 2):
            continue
        prefix = f"{scope}." if scope else ""
        name = f"{prefix}{lists[0]}" if lists else f"{prefix}experts"
        if any(each.name == name for each in symmetry.sets):
            continue
        experts = PermutedSet(name, count, tuple(candidates), _roles(prover, prefix, lists))
        if not experts.tensors and not experts.placements:
            continue
        if any(all(name in found.unused for name in names) for names in experts.tensors):
            continue
        changed = _completed(symmetry, experts, prefix, lists)
        if changed is None or not _confirmed(prover, changed, experts, tolerance):
            continue
        symmetry = changed
        claimed |= {place.tensor for place in candidates}
        completed |= {n for names in experts.tensors for n in names}
    return symmetry, completed


def _scopes(model: nn.Module) -> Iterator[tuple[str, int, list[str]]]:
    """Modules, inner ones first, with the number of alike submodules and the lists of them."""
    for scope, module in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):
        lists: dict[int, list[str]] = {}
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) > 1:
                shapes = [
                    {key: tuple(value.shape) for key, value in each.state_dict().items()}
                    for each in child
                ]
                if shapes[0] and all(each == shapes[0] for each in shapes):
                    lists.setdefault(len(child), []).append(name)
        for count, names in lists.items():
            yield scope, count, names
        own = {p.shape[0] for p in module.parameters() if p.ndim > 2 and p.shape[0] > 1}
        for count in sorted(own - set(lists)):
            yield scope, count, []


def _roles(prover: Prover, prefix: str, lists: list[str]) -> tuple[tuple[str, ...], ...]:
    """The names of each tensor of an expert, over all experts."""
    roles = []
    for each in lists:
        first = f"{prefix}{each}.0."
        for name, tensor in prover.state.items():
            if name.startswith(first) and tensor.is_floating_point():
                rest = name[len(first) :]
                count = len(prover.model.get_submodule(f"{prefix}{each}"))  # type: ignore[arg-type]
                roles.append(tuple(f"{prefix}{each}.{e}.{rest}" for e in range(count)))
    return tuple(roles)


def _frozen_places(
    found: Trace,
    symmetry: NetworkSymmetry,
    scope: str,
    count: int,
    lists: list[str],
    claimed: set[str],
) -> list[Placement]:
    """Frozen axes of the right size inside a module, outside its lists."""
    prefix = f"{scope}." if scope else ""
    inside = tuple(f"{prefix}{each}." for each in lists)
    places = []
    for key, reason in symmetry.frozen.items():
        if reason in _FIXED:
            continue
        tensor, axis = key[:-1].rsplit("[", 1)
        shape = found.shapes[tensor]
        if tensor.startswith(inside) if inside else False:
            continue
        if tensor.startswith(prefix) and tensor not in claimed and shape[int(axis)] == count:
            places.append(Placement(tensor, int(axis)))
    return places


def _completed(
    symmetry: NetworkSymmetry, experts: PermutedSet, prefix: str, lists: list[str]
) -> NetworkSymmetry | None:
    """Nest what lies inside single experts, and give all experts what some were seen to have."""
    heads = [f"{prefix}{each}." for each in lists]
    stacks = {place.tensor: place.axis for place in experts.placements}

    def home(place: Placement) -> int | None:
        for head in heads:
            if place.tensor.startswith(head):
                return int(place.tensor[len(head) :].partition(".")[0])
        axis = stacks.get(place.tensor)
        return dict(place.within).get(axis) if axis is not None else None

    def moved(place: Placement, index: int) -> Placement:
        for head in heads:
            if place.tensor.startswith(head):
                rest = place.tensor[len(head) :].partition(".")[2]
                return replace(place, tensor=f"{head}{index}.{rest}")
        axis = stacks[place.tensor]
        within = tuple((a, index if a == axis else p) for a, p in place.within)
        return replace(place, within=within)

    def everywhere(places: tuple[Placement, ...]) -> tuple[Placement, ...]:
        result = list(places)
        for place in places:
            if home(place) is not None:
                result += [moved(place, index) for index in range(experts.count)]
        return tuple(dict.fromkeys(result))

    def shape(each: PermutedSet | GaugeGroup) -> frozenset[Placement]:
        return frozenset(moved(place, 0) for place in each.placements)

    outside: list[PermutedSet | GaugeGroup] = []
    nested: dict[tuple[type, frozenset[Placement]], list[PermutedSet | GaugeGroup]] = {}
    names: dict[str, str] = {}
    for each in symmetry.members:
        homes = {home(place) for place in each.placements}
        if each.parent is not None or None in homes or len(homes) != 1:
            if each.parent is None and homes != {None}:
                each = replace(each, placements=everywhere(each.placements))
            outside.append(each)
        else:
            nested.setdefault((type(each), shape(each)), []).append(each)
    inner: list[PermutedSet | GaugeGroup] = []
    for number, alike in enumerate(nested.values()):
        first = alike[0]
        tail = first.placements[0].tensor.rpartition(".")[0].rpartition(".")[2]
        if isinstance(first, GaugeGroup):
            tail += "." + first.name.rpartition(".")[2]
        role = f"{tail}#{number}" if any(e.role == tail for e in inner) else tail
        for index in range(experts.count):
            name = f"{experts.name}[{index}].{role}"
            for each in alike:
                if home(each.placements[0]) == index:
                    names[each.name] = name
            places = tuple(moved(place, index) for place in first.placements)
            inner.append(
                replace(
                    first, name=name, placements=places, parent=(experts.name, index), role=role
                )
            )
    renamed: list[PermutedSet | GaugeGroup] = []
    for each in (*inner, *outside):
        if isinstance(each, GaugeGroup) and each.along in names:
            along = names[each.along]
            if each.parent is not None and each.parent[0] == experts.name:
                base = along.partition("].")[2] if "]." in along else along
                along = f"{experts.name}[{each.parent[1]}].{base}"
            each = replace(each, along=along)
        if each.parent is not None and each.parent[0] in names:
            return None
        renamed.append(each)
    gone = {f"{place.tensor}[{place.axis}]" for place in experts.placements}
    seen = {f"{p.tensor}[{p.axis}]" for each in renamed for p in each.placements}
    frozen = {
        key: reason
        for key, reason in symmetry.frozen.items()
        if key not in gone and not (reason == UNUSED and key in seen)
    }
    sets = [each for each in renamed if isinstance(each, PermutedSet)]
    return replace(
        symmetry,
        sets=(*sets, experts),
        gauges=tuple(each for each in renamed if isinstance(each, GaugeGroup)),
        frozen=frozen,
    )


def _confirmed(
    prover: Prover, symmetry: NetworkSymmetry, experts: PermutedSet, tolerance: float
) -> bool:
    swap = torch.arange(experts.count)
    swap[:2] = torch.tensor([1, 0])
    cycle = torch.roll(torch.arange(experts.count), 1)
    return all(
        prover.change(symmetry, SymmetryElement({experts.name: order})) <= tolerance
        for order in (swap, cycle)
    )
