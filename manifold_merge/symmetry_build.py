"""From the labels of a trace to permuted sets and gauge groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from math import prod
from typing import Literal

import numpy as np

from manifold_merge.symmetry_axes import Families, Product, Segments
from manifold_merge.symmetry_labels import Label
from manifold_merge.symmetry_sets import GaugeGroup, PermutedSet, Placement
from manifold_merge.symmetry_trace import CONSTANT, Trace

__all__ = ["build"]

Chain = tuple[tuple[int, int], ...]


@dataclass
class _Found:
    """Everything that one family (or frame) was found to own."""

    count: int
    node: int
    places: list[tuple[Placement, Chain]] = field(default_factory=list)
    pairing: Literal["halves", "neighbours"] = "halves"

    @property
    def tensors(self) -> set[str]:
        return {place.tensor for place, _ in self.places}

    def around(self) -> list[tuple[int, int]]:
        """Families and indices inside which all places lie, outer to inner."""
        common = set.intersection(*(set(chain) for _, chain in self.places))
        return [link for link in self.places[0][1] if link in common]


def build(
    found: Trace,
) -> tuple[tuple[PermutedSet, ...], tuple[GaugeGroup, ...], dict[str, str]]:
    """Sets (nested ones before their parents), gauge groups, and the reasons of frozen axes."""
    families = found.families
    groups = _collect(found, families.find)
    frames = _collect(found, lambda node: families.frame(node)[0])
    turning = _rotations(found)
    frozen = _frozen_axes(found)
    free = {root: each for root, each in groups.items() if families.reason(root) is None}
    outer = _outer_frames(found)
    linear: dict[int, _Found] = {}
    positive: dict[int, _Found] = {}
    for root, each in frames.items():
        if families.find(each.node) not in free:
            continue
        signs = {place.inverse for place, _ in each.places}
        whole = {(p.tensor, p.axis, p.start) for p, _ in free[families.find(each.node)].places}
        mine = {(p.tensor, p.axis, p.start) for p, _ in each.places}
        if signs != {False, True}:
            continue
        if families.is_linear(each.node) and mine == whole and root not in outer:
            linear[root] = each
        elif families.is_positive(each.node):
            positive[root] = each
    in_gauge = {families.find(each.node) for each in linear.values()}
    sets = {root: each for root, each in free.items() if root not in in_gauge}
    return *_named(
        found, sets, {"linear": linear, "positive": positive, "rotation": turning}
    ), frozen


def _rotations(found: Trace) -> dict[int, _Found]:
    """Pairs of coordinates that are multiplied by constants and then mixed with each other.

    Rotary positions do that, and leave scaled rotations of each pair; whether this is what the
    constants are, only a proof can tell.
    """
    families = found.families

    def wanted(node: int) -> bool:
        return families.reason(node) == CONSTANT and families.is_positive(node)

    result: dict[int, _Found] = {}
    for root, each in _collect(found, lambda node: families.frame(node)[0], wanted).items():
        if {place.inverse for place, _ in each.places} != {False, True}:
            continue
        by_axis: dict[tuple[Placement, Chain], list[int]] = {}
        for place, chain in each.places:
            by_axis.setdefault((replace(place, start=0), chain), []).append(place.start)
        joined = []
        for (place, chain), starts in by_axis.items():
            starts.sort()
            halves = place.block == 1 and len(starts) % 2 == 0
            if halves and all(
                b - a == each.count for a, b in zip(*[iter(starts)] * 2, strict=True)
            ):
                starts = starts[::2]
            elif place.block != 2:
                break
            joined += [(replace(place, block=1, start=start), chain) for start in starts]
        else:
            pairing: Literal["halves", "neighbours"]
            pairing = "halves" if each.places[0][0].block == 1 else "neighbours"
            result[root] = _Found(2 * each.count, each.node, joined, pairing)
    return result


def _outer_frames(found: Trace) -> set[int]:
    """Frames of axes on whose index the families of other axes depend: heads, experts."""
    families = found.families
    outer: set[int] = set()
    for label in found.labels.values():
        factors = label.factors
        for position, factor in enumerate(factors):
            for other in factors:
                if other.nodes.shape[position] > 1:
                    keys = _keys(families, other.nodes)
                    if (keys != keys.take([0], axis=position)).any():
                        outer.update(families.frame(int(n))[0] for n in factor.nodes.flat)
                        break
    return outer


def _keys(families: Families, nodes: np.ndarray) -> np.ndarray:
    """Nodes by frame, so that equal entries are interchangeable."""

    def key(node: int) -> int:
        leaves = families.leaves(node)
        frame, parity = families.frame(leaves[0])
        return 2 * frame + parity if leaves == [node] else -node - 1

    return np.vectorize(key, otypes=[np.int64])(nodes)


def _frozen_axes(found: Trace) -> dict[str, str]:
    frozen = {}
    for name, label in found.labels.items():
        for axis, factors in enumerate(label.axes):
            leaves = [
                leaf
                for factor in factors
                for node in {int(n) for n in factor.nodes.flat}
                for leaf in found.families.leaves(node)
            ]
            single = "cut into single positions"
            sizes = found.families.sizes
            reasons = [
                found.families.reason(leaf) or (single if sizes[leaf] == 1 else None)
                for leaf in leaves
            ]
            if leaves and all(reasons):
                frozen[f"{name}[{axis}]"] = str(reasons[0])
    return frozen


def _collect(
    found: Trace, key: Callable[[int], int], wanted: Callable[[int], bool] | None = None
) -> dict[int, _Found]:
    """Walk over all axes of all tensors and gather the places of each family or frame.

    Only free families are gathered, unless ``wanted`` says which.
    """
    if wanted is None:

        def wanted(node: int) -> bool:
            return found.families.reason(node) is None

    result: dict[int, _Found] = {}
    for name, label in found.labels.items():
        if 0 in found.shapes[name]:
            continue
        for axis in range(len(label.axes)):
            for context, chain, within in _contexts(found, label, axis, key):
                walk = _Walk(found, name, axis, label, context, within, key, wanted, result)
                walk.factors(0, 0, chain, {})
    return result


def _contexts(
    found: Trace, label: Label, axis: int, key: Callable[[int], int]
) -> Iterator[tuple[dict[int, int], Chain, tuple[tuple[int, int], ...]]]:
    """Indices along other axes on which the families of this axis depend."""
    families = found.families
    own = label.positions(axis)

    def signature(node: int) -> tuple[int, ...]:
        return tuple(key(leaf) for leaf in families.leaves(node))

    varying: list[int] = []
    for position, factor in enumerate(label.factors):
        if position in own:
            continue
        for mine in label.axes[axis]:
            if mine.nodes.shape[position] == 1:
                continue
            slices = np.moveaxis(mine.nodes, position, 0).reshape(factor.size, -1)
            columns = slices.T
            if any(len({signature(int(n)) for n in column}) > 1 for column in columns):
                varying.append(position)
                break
    if not varying:
        yield {}, (), ()
        return
    axis_of = {p: a for a in range(len(label.axes)) for p in label.positions(a)}
    outer = sorted({axis_of[position] for position in varying})
    positions = [p for a in outer for p in label.positions(a)]
    sizes = [label.factors[p].size for p in positions]
    for index in product(*(range(size) for size in sizes)):
        context = dict(zip(positions, index, strict=True))
        chain: list[tuple[int, int]] = []
        for position in positions:
            nodes = label.factors[position].nodes
            where = tuple(context.get(p, 0) if n > 1 else 0 for p, n in enumerate(nodes.shape))
            chain += _links(families, int(nodes[where]), context[position])
        within = tuple(
            (
                a,
                int(
                    np.ravel_multi_index(
                        [context[p] for p in label.positions(a)],
                        [label.factors[p].size for p in label.positions(a)],
                    )
                ),
            )
            for a in outer
        )
        yield context, tuple(chain), within


def _links(families: Families, node: int, index: int) -> Chain:
    """The families that a position of a (possibly cut) axis belongs to."""
    structure = families.structures[node]
    if isinstance(structure, Segments):
        for part in structure.parts:
            if index < families.sizes[part]:
                return _links(families, part, index)
            index -= families.sizes[part]
    if isinstance(structure, Product):
        width = families.sizes[structure.inners[0]]
        outer, inner = divmod(index, width)
        first = _links(families, structure.outer, outer)
        return first + _links(families, structure.inners[outer], inner)
    return ((families.find(node), index),)


@dataclass
class _Walk:
    """Gathers the places along one axis of one tensor."""

    found: Trace
    name: str
    axis: int
    label: Label
    context: dict[int, int]
    within: tuple[tuple[int, int], ...]
    key: Callable[[int], int]
    wanted: Callable[[int], bool]
    result: dict[int, _Found]

    def factors(self, number: int, start: int, chain: Chain, index: dict[int, int]) -> None:
        """Visit the factors of the axis from the given one inwards."""
        factors = self.label.axes[self.axis]
        if number == len(factors):
            return
        positions = self.label.positions(self.axis)
        chosen = {**self.context, **index}
        nodes = factors[number].nodes
        where = tuple(chosen.get(p, 0) if n > 1 else 0 for p, n in enumerate(nodes.shape))
        block = prod(factor.size for factor in factors[number + 1 :])

        def inside(element: int, begin: int, deeper: Chain) -> None:
            self.factors(number + 1, begin, deeper, {**index, positions[number]: element})

        deeper = number + 1 < len(factors) and self._any_wanted(number + 1)
        self._node(int(nodes[where]), start, block, chain, 0, inside if deeper else None)

    def _any_wanted(self, number: int) -> bool:
        families = self.found.families
        return any(
            self.wanted(leaf)
            for factor in self.label.axes[self.axis][number:]
            for node in {int(n) for n in factor.nodes.flat}
            for leaf in families.leaves(node)
        )

    def _node(
        self,
        node: int,
        start: int,
        block: int,
        chain: Chain,
        first: int,
        inside: Callable[[int, int, Chain], None] | None,
    ) -> None:
        families = self.found.families
        structure = families.structures[node]
        if isinstance(structure, Segments):
            for part in structure.parts:
                self._node(part, start, block, chain, first, inside)
                start += families.sizes[part] * block
                first += families.sizes[part]
            return
        if isinstance(structure, Product):
            width = families.sizes[structure.inners[0]]
            self._node(structure.outer, start, block * width, chain, first, None)
            for i, inner in enumerate(structure.inners):
                links = chain + _links(families, structure.outer, i)
                begin = start + i * width * block
                self._node(inner, begin, block, links, first + i * width, inside)
            return
        size = families.sizes[node]
        if self.wanted(node) and size > 1:
            group = self.result.setdefault(self.key(node), _Found(size, node))
            place = Placement(
                self.name,
                self.axis,
                block=block,
                start=start,
                within=self.within,
                inverse=bool(families.frame(node)[1]),
            )
            group.places.append((place, chain))
        if inside is not None:
            for i in range(size):
                inside(first + i, start + i * block, (*chain, (families.find(node), i)))


def _named(
    found: Trace, sets: dict[int, _Found], spaces: dict[str, dict[int, _Found]]
) -> tuple[tuple[PermutedSet, ...], tuple[GaugeGroup, ...]]:
    """Give names and parents to what was found."""
    families = found.families
    everything = [(root, each, "set") for root, each in sets.items()]
    parents: dict[tuple[str, int], tuple[int, int] | None] = {}
    for kind, groups in {"set": sets, **spaces}.items():
        for root, each in groups.items():
            links = [link for link in each.around() if link[0] in sets]
            parents[kind, root] = links[-1] if links else None
    holds_gauge = {p[0] for (kind, _), p in parents.items() if p and kind in ("linear", "rotation")}
    holds_sets = {p[0] for (kind, _), p in parents.items() if p and kind == "set"}
    names: dict[int, str] = {}
    roles: dict[int, str] = {}
    taken: dict[str, int] = {}

    def unique(name: str) -> str:
        taken[name] = taken.get(name, 0) + 1
        return name if taken[name] == 1 else f"{name}#{taken[name]}"

    def distinct(inside: tuple[str, int], role: str) -> str:
        key = f"{inside} {role}"
        taken[key] = taken.get(key, 0) + 1
        return role if taken[key] == 1 else f"{role}#{taken[key]}"

    def depth(root: int) -> int:
        parent = parents["set", root]
        return 0 if parent is None else 1 + depth(parent[0])

    for root, each, _ in sorted(everything, key=lambda item: depth(item[0])):
        parent = parents["set", root]
        if parent is not None:
            role = "heads" if root in holds_gauge else _module(each.places[0][0].tensor)
            inside = (names[parent[0]], parent[1])
            roles[root] = distinct(inside, role.rpartition(".")[2])
            names[root] = unique(f"{inside[0]}[{inside[1]}].{roles[root]}")
        elif root in holds_gauge:
            names[root] = unique(f"{_common(each)}.heads")
        elif root in holds_sets:
            stacked = any(
                p.block == 1 and p.axis == 0 and len(found.shapes[p.tensor]) > 2
                for p, _ in each.places
            )
            names[root] = unique(f"{_common(each)}.{'experts' if stacked else 'groups'}")
        else:
            names[root] = unique(_module(each.places[0][0].tensor))
    made = [
        PermutedSet(
            names[root],
            each.count,
            _tidy(each, covariant=True),
            parent=(names[p[0]], p[1]) if (p := parents["set", root]) else None,
            role=roles.get(root, ""),
        )
        for root, each in sets.items()
    ]
    made.sort(key=lambda s: -depth(next(r for r, n in names.items() if n == s.name)))
    gauges = []
    for kind, groups in spaces.items():
        for root, each in groups.items():
            parent = parents[kind, root]
            along = families.find(each.node)
            if kind == "positive" and _is_implied(each, along, spaces, parents):
                continue
            tidy = _tidy(each) if kind != "rotation" else tuple(p for p, _ in each.places)
            places = _oriented(tidy, found.shapes)
            suffix = _SUFFIXES[kind]
            role = ""
            within: tuple[str, int] | None = None
            name = f"{_module(places[0].tensor)}.{suffix}"
            if parent is not None:
                within = (names[parent[0]], parent[1])
                ends = [_module(place.tensor).rpartition(".")[2] for place in places]
                dual = next(e for e, place in zip(ends, places, strict=True) if place.inverse)
                role = distinct(within, f"{ends[0]}-{dual}.{suffix}")
                name = f"{within[0]}[{within[1]}].{role}"
            gauges.append(
                GaugeGroup(
                    unique(name),
                    _KINDS[kind],
                    each.count,
                    places,
                    parent=within,
                    along=names.get(along),
                    role=role,
                    pairing=each.pairing,
                )
            )
    return tuple(made), tuple(gauges)


_SUFFIXES = {"linear": "basis", "positive": "scale", "rotation": "rotation"}
_KINDS: dict[str, Literal["general_linear", "positive", "rotation"]] = {
    "linear": "general_linear",
    "positive": "positive",
    "rotation": "rotation",
}


def _is_implied(
    each: _Found,
    along: int,
    spaces: dict[str, dict[int, _Found]],
    parents: dict[tuple[str, int], tuple[int, int] | None],
) -> bool:
    """Whether a factor for a whole element (a head) is a change of basis inside of it."""

    def axes(found: _Found) -> set[tuple[str, int]]:
        return {(place.tensor, place.axis) for place, _ in found.places}

    return any(
        parent is not None and parent[0] == along and axes(spaces[kind][root]) >= axes(each)
        for (kind, root), parent in parents.items()
        if kind in ("linear", "positive")
    )


def _oriented(
    places: tuple[Placement, ...], shapes: dict[str, tuple[int, ...]]
) -> tuple[Placement, ...]:
    """Call the side with the biases the basis and the other one dual, and list it first."""
    vectors = [place for place in places if len(shapes[place.tensor]) == 1] or list(places)
    if vectors[0].inverse:
        places = tuple(replace(place, inverse=not place.inverse) for place in places)
    return tuple(sorted(places, key=lambda place: place.inverse))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _common(each: _Found) -> str:
    parts = [_module(place.tensor).split(".") for place, _ in each.places]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in shared) or _module(each.places[0][0].tensor)


def _tidy(each: _Found, *, covariant: bool = False) -> tuple[Placement, ...]:
    """Join placements that differ only by their start into one with a stride."""
    places: dict[Placement, list[int]] = {}
    for place, _ in each.places:
        place = replace(place, inverse=False) if covariant else place
        places.setdefault(replace(place, start=0), []).append(place.start)
    result = []
    for place, starts in places.items():
        starts = sorted(set(starts))
        span = each.count * place.block
        regular = starts == list(range(starts[0], starts[0] + span * len(starts), span))
        if place.block == 1 and len(starts) > 1 and regular:
            result.append(
                replace(place, start=starts[0], block=len(starts), step=1, stride=each.count)
            )
        else:
            result += [replace(place, start=start) for start in starts]
    return tuple(result)
