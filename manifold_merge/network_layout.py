"""A network's parameters as one vector, and the action of its permutations on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manifold_merge.network_gauges import matrix_gauges
from manifold_merge.network_sites import Block, Order, Route, Site, acted, any_meet, route_to
from manifold_merge.symmetry import NetworkSymmetry, PermutedSet, Placement, SymmetryElement

__all__ = [
    "Block",
    "NetworkLayout",
    "Order",
    "Site",
    "is_running_statistic",
    "named_element",
    "shapes_of",
]


def is_running_statistic(name: str) -> bool:
    """Whether a tensor of a state dict is a statistic of a normalisation, not a parameter.

    Example:
        >>> is_running_statistic("bn.running_mean"), is_running_statistic("bn.weight")
        (True, False)
    """
    return name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")


class NetworkLayout:
    """Where each parameter lies in the vector, and how the sets of a symmetry move its entries.

    Running statistics and integer tensors are no parameters and take no part.

    Args:
        symmetry: Permuted sets of the network.
        shapes: Shape of each tensor of the state dict, by name; ``symmetry.shapes`` if ``None``.
        bases: Let changes of basis act as well, as orthogonal matrices: they are sets whose
            elements are coordinates, listed before all others, and their orders are matrices.

    Raises:
        ValueError: If a placement names a tensor or positions that do not exist, or the tensors of
            a set of whole tensors differ in shape.
    """

    def __init__(
        self,
        symmetry: NetworkSymmetry,
        shapes: Mapping[str, Sequence[int]] | None = None,
        *,
        bases: bool = False,
    ) -> None:
        self.symmetry = symmetry
        gauges = matrix_gauges(symmetry) if bases else ()
        given = symmetry.shapes if shapes is None else shapes
        # A shared tensor lies in the vector once.
        self.shapes = {
            name: tuple(shape)
            for name, shape in given.items()
            if not is_running_statistic(name) and name not in symmetry.aliases
        }
        # An orthogonal matrix is its own inverse transpose.
        self.sets = (
            *(PermutedSet(g.name, g.dimension, g.placements, (), g.parent, g.role) for g in gauges),
            *symmetry.sets,
        )
        self.gauges = len(gauges)  # so many of the sets are changes of basis
        # How the coordinates of a rotary basis are paired; ``None`` for all other sets.
        self.pairings: tuple[str | None, ...] = (
            *(g.pairing if g.kind == "rotation" else None for g in gauges),
            *(None for _ in symmetry.sets),
        )
        self.counts = tuple(each.count for each in self.sets)
        self.names = tuple(each.name for each in self.sets)
        self.blocks: list[Block] = []
        self._home: dict[str, tuple[int, int | None]] = {}
        self._place_blocks()
        self.size = sum(block.size for block in self.blocks)
        # Sites of each block in the order in which their sets act, and of each set.
        self.by_block: list[list[Site]] = [[] for _ in self.blocks]
        self.by_set: list[list[Site]] = [[] for _ in self.sets]
        self._place_sites()
        # A set that meets itself in one entry enters the score as a square.
        self.linear = tuple(not any_meet(sites) for sites in self.by_set)
        self.children = self._children()
        self._routes: dict[tuple[int, int, bool, int | None], Route] = {}

    def _place_blocks(self) -> None:
        stacks = [
            (each, names)
            for each in self.sets
            for names in each.tensors
            if not any(is_running_statistic(n) for n in names)
        ]
        groups: list[tuple[tuple[str, ...], bool]] = [(names, True) for _, names in stacks]
        inside = {name for names, _ in groups for name in names}
        groups = [*(((name,), False) for name in self.shapes if name not in inside), *groups]
        offset = 0
        for names, stacked in groups:
            shapes = set()
            for name in names:
                if name not in self.shapes:
                    raise ValueError(f"{name}: the symmetry names it, the state dict has it not")
                if name in self._home:
                    raise ValueError(f"{name}: two sets move this whole tensor; merge them")
                shapes.add(self.shapes[name])
            if len(shapes) > 1:
                raise ValueError(f"{names}: whole tensors can be exchanged only if alike: {shapes}")
            shape = shapes.pop()
            for position, name in enumerate(names):
                self._home[name] = (len(self.blocks), position if stacked else None)
            self.blocks.append(
                Block(names, (len(names), *shape) if stacked else shape, offset, stacked)
            )
            offset += self.blocks[-1].size

    def _place_sites(self) -> None:
        for owner, each in enumerate(self.sets):
            placed = [p for p in each.placements if not is_running_statistic(p.tensor)]
            sites = [self._site(owner, each.count, place) for place in placed]
            for names in each.tensors:
                if not is_running_statistic(names[0]):
                    block = self._home[names[0]][0]
                    ndim = len(self.blocks[block].shape)
                    sites.append(Site(owner, block, -ndim, each.count, None, ()))
            for site in sites:
                self.by_set[owner].append(site)
                self.by_block[site.block].append(site)

    def _site(self, owner: int, count: int, place: Placement) -> Site:
        if place.tensor not in self._home:
            raise ValueError(
                f"{place.tensor}: the set {self.sets[owner].name!r} lies in it, but the state dict "
                "has no such parameter; give the layout all shapes"
            )
        number, position = self._home[place.tensor]
        shape = self.shapes[place.tensor]
        axis = place.axis - len(shape)
        within = tuple((a - len(shape), i) for a, i in place.within)
        if position is not None:
            within = (*within, (-len(shape) - 1, position))
        index = place.index(count)
        length = shape[place.axis]
        if int(index.max()) >= length or int(index.min()) < 0:
            raise ValueError(
                f"{place.tensor}: axis {place.axis} has {length} positions, the set "
                f"{self.sets[owner].name!r} reaches {int(index.max())}"
            )
        whole = index.numel() == length and torch.equal(index.reshape(-1), torch.arange(length))
        return Site(owner, number, axis, count, None if whole else index, within)

    def _children(self) -> dict[int, list[list[int]]]:
        """Sets nested in the elements of another: for each parent, a list for each element."""
        positions = {name: i for i, name in enumerate(self.names)}
        found: dict[int, list[list[int]]] = {}
        for i, each in enumerate(self.sets):
            if each.parent is None or each.parent[0] not in positions:
                continue
            parent = positions[each.parent[0]]
            if parent <= i:
                raise ValueError(f"sets: {each.name!r} must come before its parent")
            lists = found.setdefault(parent, [[] for _ in range(self.counts[parent])])
            lists[each.parent[1]].append(i)
        return found

    # --- vectors ---------------------------------------------------------------------------------

    def pack(self, state: Mapping[str, Tensor]) -> Tensor:
        """Write the parameters of a state dict into one vector, ``(..., N)``.

        Raises:
            ValueError: If a tensor is missing or has another shape.
        """
        pieces = []
        for block in self.blocks:
            for name in block.names:
                if name not in state:
                    raise ValueError(f"{name}: missing in the state dict; it is not this network's")
                shape, tensor = self.shapes[name], state[name]
                if tuple(tensor.shape[tensor.ndim - len(shape) :]) != shape:
                    raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
                pieces.append(tensor.reshape(*tensor.shape[: tensor.ndim - len(shape)], -1))
        return torch.cat(pieces, -1) if pieces else torch.zeros(0)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Read the parameters from a vector ``(..., N)``, as views, by name."""
        state: dict[str, Tensor] = {}
        for block, array in zip(self.blocks, self.views(vector), strict=True):
            if block.stacked:
                parts = array.unbind(-len(block.shape))
                state.update(zip(block.names, parts, strict=True))
            else:
                state[block.names[0]] = array
        return {name: state[name] for name in self.shapes}

    def views(self, vector: Tensor) -> list[Tensor]:
        """The blocks of a vector ``(..., N)``, as views ``(..., *shape)``."""
        return [
            vector.narrow(-1, b.offset, b.size).reshape(*vector.shape[:-1], *b.shape)
            for b in self.blocks
        ]

    def join(self, arrays: Sequence[Tensor]) -> Tensor:
        """Write blocks ``(..., *shape)`` into one vector, ``(..., N)``."""
        pairs = zip(arrays, self.blocks, strict=True)
        return torch.cat([a.reshape(*a.shape[: a.ndim - len(b.shape)], -1) for a, b in pairs], -1)

    def permute(self, vector: Tensor, orders: Sequence[Order]) -> Tensor:
        """Reorder the elements of each set of a network ``(..., N)``; soft orders mix them."""
        arrays = self.views(vector)
        for number, sites in enumerate(self.by_block):
            arrays[number] = acted(sites, arrays[number], orders)
        return self.join(arrays)

    def rows_after(
        self,
        array: Tensor,
        site: Site,
        orders: Sequence[Order],
        *,
        back: bool,
        skip: int | None = None,
    ) -> Tensor:
        """Rows of a site of its block, ``(count, entries)``, once other sites have acted.

        Args:
            array: The block, ``(..., *shape)``.
            site: The site.
            orders: The orders of all sets.
            back: The sites after this one act, by transposed orders, last first; otherwise those
                before it.
            skip: A set that does not act where ``back``.
        """
        route = self._route(site, back, skip)
        if route.near is not None:
            array = array.index_select(site.axis, route.near.to(array.device))
        array = acted(route.first, array, orders, transpose=back, owned=route.near is not None)
        if route.pick is not None:
            array = array.index_select(site.axis, route.pick.to(array.device))
        owned = route.near is not None or route.pick is not None
        array = acted(route.last, array, orders, transpose=back, owned=owned)
        return site.restrict(array).movedim(site.axis, 0).reshape(site.count, -1)

    def rows_of_basis(
        self,
        array: Tensor,
        site: Site,
        orders: Sequence[Order],
        memory: dict[int, tuple[list[Order], Tensor]],
    ) -> Tensor:
        """As :meth:`rows_after`, ``back``, for a basis: with one array for all bases of a block.

        Bases of different heads do not reach each other's rows, so that what acts on all of them is
        computed once, and again when an order has changed.

        Args:
            array: The block, ``(..., *shape)``.
            site: The site of a basis.
            orders: The orders of all sets.
            memory: The arrays of blocks, with the orders that they were made with.
        """
        route = self._route(site, True, None)
        if any(other.owner < self.gauges for other in (*route.first, *route.last)):
            return self.rows_after(array, site, orders, back=True)
        acting = [s for s in reversed(self.by_block[site.block]) if s.owner >= self.gauges]
        used = [orders[other.owner] for other in acting]
        known = memory.get(site.block)
        if known is None or any(a is not b for a, b in zip(known[0], used, strict=True)):
            known = memory[site.block] = (used, acted(acting, array, orders, transpose=True))
        return site.rows(known[1])

    def _route(self, site: Site, back: bool, skip: int | None) -> Route:
        sites = self.by_block[site.block]
        here = next(i for i, other in enumerate(sites) if other is site)
        key = (site.block, here, back, skip)
        if key not in self._routes:
            acting = [s for s in reversed(sites[here + 1 :]) if s.owner != skip]
            shape = self.blocks[site.block].shape
            self._routes[key] = route_to(site, acting if back else sites[:here], shape)
        return self._routes[key]

    def symmetrized(self, vector: Tensor) -> Tensor:
        """The average of a vector ``(..., N)`` over all permutations of the sets.

        A diagonal metric has to equal its average for permutations to be isometries.
        """
        uniform = [
            torch.full((n, n), 1 / n, dtype=vector.dtype, device=vector.device) for n in self.counts
        ]
        return self.permute(vector, uniform)

    def rows_of_gauges(self) -> list[Tensor]:
        """For each change of basis, where its coordinates lie in the vector, ``(d, entries)``."""
        arrays = self.views(torch.arange(self.size))
        return [
            torch.cat([site.rows(arrays[site.block]) for site in sites], 1)
            for sites in self.by_set[: self.gauges]
        ]

    def compose(self, first: Sequence[Order], second: Sequence[Order]) -> list[Order]:
        """Orders that act as ``first`` followed by ``second``, both hard.

        Nested sets move with their parents: the children of the element that ``second`` brings to
        place e must be reordered as ``second`` asks of the children of e.
        """
        second = list(second)
        moved = list(second)
        for parent, lists in self.children.items():
            order = first[parent]
            if order is None:
                continue
            for place, source in enumerate(order.tolist()):
                for child, original in zip(lists[place], lists[source], strict=True):
                    moved[original] = second[child]
        result: list[Order] = []
        for a, b in zip(first, moved, strict=True):
            result.append(b if a is None else a if b is None else a[b])
        return result


def named_element(layout: NetworkLayout, orders: Sequence[Order]) -> SymmetryElement:
    """Hard orders as a group element: permutations and matrices by the names of their sets."""
    permutations, gauges = {}, {}
    for number, (name, order) in enumerate(zip(layout.names, orders, strict=True)):
        if number < layout.gauges:
            if order is not None:
                gauges[name] = order.cpu()
        else:
            permutations[name] = (
                torch.arange(layout.counts[number]) if order is None else order.cpu()
            )
    return SymmetryElement(permutations, gauges)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a state dict: floating point, no running statistics."""
    return {
        name: tuple(t.shape)
        for name, t in state.items()
        if t.is_floating_point() and not is_running_statistic(name)
    }
