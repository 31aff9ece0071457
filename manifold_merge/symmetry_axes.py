"""Families of positions along tensor axes: which must be reordered together, and how they nest.

Every axis of every tensor of a traced network is a *node*: ``size`` positions that some group acts
on. Nodes are tied when an operation forces the same reordering on both (union-find). A node is
refined when a view splits its axis into a product (heads × width) or a slice cuts it into segments
(a fused query-key-value axis); all nodes tied to it are refined with it.

Beside the permutations each node carries a *frame*, the basis in which its values are written.
Frames are tied with a parity: two factors of a contraction change basis by G and by its inverse
transpose. Operations that are not linear (or not positively homogeneous) along an axis fix its
frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

__all__ = ["Families", "Incompatible", "Product", "Segments"]

FrameTie = Literal["same", "dual", "none"]


class Incompatible(Exception):
    """Two ways to cut one axis that have no common refinement."""


@dataclass(frozen=True)
class Product:
    """An axis as an outer family whose element ``i`` holds the inner family ``inners[i]``."""

    outer: int
    inners: tuple[int, ...]


@dataclass(frozen=True)
class Segments:
    """An axis as a concatenation."""

    parts: tuple[int, ...]


class Families:
    """A store of nodes, their ties, refinements and frames."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.structures: list[Product | Segments | None] = []
        self._parents: list[int] = []
        self._members: dict[int, list[int]] = {}
        self._reasons: dict[int, str] = {}
        self._frame_parents: list[int] = []
        self._frame_parities: list[int] = []
        self._not_linear: set[int] = set()
        self._not_positive: set[int] = set()

    def new(self, size: int, frozen: str | None = None) -> int:
        """A new node, tied to nothing; ``frozen`` is the reason why it may not move."""
        node = len(self.sizes)
        self.sizes.append(size)
        self.structures.append(None)
        self._parents.append(node)
        self._members[node] = [node]
        self._frame_parents.append(node)
        self._frame_parities.append(0)
        if frozen is not None:
            self._reasons[node] = frozen
            self.fix_frame(node)
        return node

    def composite(self, structure: Product | Segments) -> int:
        """A node for an axis that is assembled from existing ones."""
        if isinstance(structure, Product):
            size = self.sizes[structure.outer] * self.sizes[structure.inners[0]]
        else:
            size = sum(self.sizes[part] for part in structure.parts)
        node = self.new(size)
        self.structures[node] = structure
        return node

    def find(self, node: int) -> int:
        """The representative of the nodes that are reordered together with this one."""
        root = node
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[node] != root:
            self._parents[node], node = root, self._parents[node]
        return root

    def frame(self, node: int) -> tuple[int, int]:
        """The representative of the node's frame, and 1 if the node is dual to it."""
        path = []
        while self._frame_parents[node] != node:
            path.append(node)
            node = self._frame_parents[node]
        parity = 0
        for each in reversed(path):
            parity ^= self._frame_parities[each]
            self._frame_parents[each], self._frame_parities[each] = node, parity
        return node, parity

    def leaves(self, node: int) -> list[int]:
        """The unrefined nodes below a node."""
        structure = self.structures[node]
        if structure is None:
            return [node]
        below = (
            (structure.outer, *structure.inners)
            if isinstance(structure, Product)
            else structure.parts
        )
        return [leaf for each in below for leaf in self.leaves(each)]

    def freeze(self, node: int, reason: str) -> None:
        """Forbid any reordering of a node; the first reason is kept."""
        for leaf in self.leaves(node):
            self._reasons.setdefault(self.find(leaf), reason)

    def reason(self, node: int) -> str | None:
        """Why an unrefined node is frozen, or ``None`` if it is free."""
        return self._reasons.get(self.find(node))

    def fix_frame(self, node: int, *, positive: bool = True) -> None:
        """Forbid changes of basis; ``positive=False`` still allows positive factors."""
        for leaf in self.leaves(node):
            root, _ = self.frame(leaf)
            self._not_linear.add(root)
            if positive:
                self._not_positive.add(root)

    def is_linear(self, node: int) -> bool:
        """Whether any change of basis of this node's frame is still allowed."""
        return self.frame(node)[0] not in self._not_linear

    def is_positive(self, node: int) -> bool:
        """Whether positive factors on the coordinates are still allowed."""
        return all(self.frame(leaf)[0] not in self._not_positive for leaf in self.leaves(node))

    def tie(self, first: int, second: int, frame: FrameTie = "same") -> None:
        """Make two nodes move together."""
        if self.sizes[first] != self.sizes[second]:
            raise AssertionError(f"sizes {self.sizes[first]} and {self.sizes[second]} are tied")
        if first == second:
            if frame == "dual":
                self.fix_frame(first)
            return
        a, b = self.structures[first], self.structures[second]
        if a is None and b is None:
            self._tie_leaves(first, second, frame)
            return
        try:
            if isinstance(a, Product) or (a is None and isinstance(b, Product)):
                count = self.sizes[a.outer if isinstance(a, Product) else b.outer]  # type: ignore[union-attr]
                self.split(first, count)
                self.split(second, count)
            else:
                parts = a.parts if isinstance(a, Segments) else b.parts  # type: ignore[union-attr]
                sizes = [self.sizes[part] for part in parts]
                self.segment(second if isinstance(a, Segments) else first, sizes)
                other = self.structures[second if isinstance(a, Segments) else first]
                if isinstance(other, Product):
                    raise Incompatible
                fine = [self.sizes[part] for part in other.parts]  # type: ignore[union-attr]
                self.segment(first if isinstance(a, Segments) else second, fine)
        except Incompatible:
            for node in (first, second):
                self.freeze(node, "an axis that is cut in two ways which do not fit")
                self.fix_frame(node)
            return
        a, b = self.structures[first], self.structures[second]
        if isinstance(a, Product) and isinstance(b, Product):
            self.tie(a.outer, b.outer, frame)
            for x, y in zip(a.inners, b.inners, strict=True):
                self.tie(x, y, frame)
        elif isinstance(a, Segments) and isinstance(b, Segments):
            for x, y in zip(a.parts, b.parts, strict=True):
                self.tie(x, y, frame)
        else:
            raise AssertionError("refined nodes have the same structure")

    def split(self, node: int, count: int) -> Product:
        """Refine a node into ``count`` equal blocks and return its structure.

        Raises:
            Incompatible: If the node is already cut in a way that does not allow it.
        """
        width = self.sizes[node] // count
        structure = self.structures[node]
        if isinstance(structure, Product):
            have = self.sizes[structure.outer]
            if have == count:
                return structure
            if have % count == 0:
                deeper = have // count
                outer = self.split(structure.outer, count)
                inners = tuple(
                    self.composite(Product(inner, structure.inners[i * deeper : (i + 1) * deeper]))
                    for i, inner in enumerate(outer.inners)
                )
                refined = Product(outer.outer, inners)
            elif count % have == 0:
                pieces = [self.split(inner, count // have) for inner in structure.inners]
                joint = self.composite(Product(structure.outer, tuple(p.outer for p in pieces)))
                refined = Product(joint, tuple(inner for p in pieces for inner in p.inners))
            else:
                raise Incompatible
        elif isinstance(structure, Segments):
            refined = self._split_segments(structure, count, width)
        else:
            self._refine(node, lambda: self._new_product(count, width))
            made = self.structures[node]
            assert isinstance(made, Product)
            return made
        self.structures[node] = refined
        return refined

    def segment(self, node: int, sizes: list[int]) -> list[int]:
        """Cut a node into consecutive pieces and return them.

        Raises:
            Incompatible: If the cuts do not fit with how the node is already refined.
        """
        sizes = [size for size in sizes if size]
        if len(sizes) == 1:
            return [node]
        structure = self.structures[node]
        if structure is None:
            self._refine(node, lambda: Segments(tuple(self.new(size) for size in sizes)))
        elif isinstance(structure, Product):
            width = self.sizes[structure.inners[0]]
            if any(size % width for size in sizes):
                raise Incompatible
            outers = self.segment(structure.outer, [size // width for size in sizes])
            parts, start = [], 0
            for outer in outers:
                stop = start + self.sizes[outer]
                inners = structure.inners[start:stop]
                parts.append(
                    self.composite(Product(outer, inners)) if len(inners) > 1 else inners[0]
                )
                start = stop
            self.structures[node] = Segments(tuple(parts))
            return parts
        structure = self.structures[node]
        assert isinstance(structure, Segments)
        ends = _ends(sizes)
        fine: list[int] = []
        start = 0
        for part in structure.parts:
            stop = start + self.sizes[part]
            cuts = [start, *(end for end in ends if start < end < stop), stop]
            fine += self.segment(part, [b - a for a, b in pairwise(cuts)])
            start = stop
        self.structures[node] = Segments(tuple(fine))
        result, group, filled = [], [], 0
        for part in fine:
            group.append(part)
            filled += self.sizes[part]
            if filled in ends:
                result.append(
                    group[0] if len(group) == 1 else self.composite(Segments(tuple(group)))
                )
                group = []
        return result

    def _split_segments(self, structure: Segments, count: int, width: int) -> Product:
        if all(self.sizes[part] % width == 0 for part in structure.parts):
            outers, inners = [], []
            for part in structure.parts:
                blocks = self.sizes[part] // width
                if blocks == 1:
                    outers.append(self.new(1))
                    inners.append(part)
                else:
                    piece = self.split(part, blocks)
                    outers.append(piece.outer)
                    inners += piece.inners
            return Product(self.composite(Segments(tuple(outers))), tuple(inners))
        groups: list[list[int]] = [[]]
        filled = 0
        for part in structure.parts:
            groups[-1].append(part)
            filled += self.sizes[part]
            if filled > width:
                raise Incompatible
            if filled == width:
                groups.append([])
                filled = 0
        outer = self.new(count, frozen="segments of a concatenation")
        return Product(outer, tuple(self.composite(Segments(tuple(g))) for g in groups[:-1]))

    def _new_product(self, count: int, width: int) -> Product:
        product = Product(self.new(count), tuple(self.new(width) for _ in range(count)))
        # A change of basis that mixes blocks is no longer one of each block's coordinates.
        self.fix_frame(product.outer, positive=False)
        return product

    def _refine(self, node: int, make: object) -> None:
        """Give every node tied to ``node`` a structure, and tie the structures like the nodes."""
        root = self.find(node)
        reason = self._reasons.get(root)
        members = self._members[root]
        frames = {member: self.frame(member) for member in members}
        first_of_frame: dict[int, int] = {}
        for member in members:
            self.structures[member] = make()  # type: ignore[operator]
        for member in members:
            frame, parity = frames[member]
            if frame in first_of_frame:
                other = first_of_frame[frame]
                dual = parity != frames[other][1]
                self.tie(other, member, "dual" if dual else "same")
            else:
                first_of_frame[frame] = member
                if frame in self._not_linear:
                    self.fix_frame(member, positive=frame in self._not_positive)
                self.tie(members[0], member, "none")
        if reason is not None:
            self.freeze(node, reason)

    def _tie_leaves(self, first: int, second: int, frame: FrameTie) -> None:
        a, b = self.find(first), self.find(second)
        if a != b:
            if len(self._members[a]) < len(self._members[b]):
                a, b = b, a
            self._parents[b] = a
            self._members[a] += self._members.pop(b)
            reason = self._reasons.pop(b, None)
            if reason is not None:
                self._reasons.setdefault(a, reason)
        if frame == "none":
            return
        (x, p), (y, q) = self.frame(first), self.frame(second)
        parity = p ^ q ^ (frame == "dual")
        if x == y:
            if parity:
                # G and its inverse transpose at once: no factor but one is left.
                self._not_linear.add(x)
                self._not_positive.add(x)
            return
        self._frame_parents[y], self._frame_parities[y] = x, parity
        if y in self._not_linear:
            self._not_linear.add(x)
        if y in self._not_positive:
            self._not_positive.add(x)


def _ends(sizes: list[int]) -> set[int]:
    total, ends = 0, set()
    for size in sizes:
        total += size
        ends.add(total)
    return ends
