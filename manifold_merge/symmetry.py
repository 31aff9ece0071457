"""Symmetries of a whole network: which parameters move together, and how.

A :class:`NetworkSymmetry` is data: a list of :class:`PermutedSet` (neurons, channels, heads,
experts that may be reordered) and of :class:`GaugeGroup` (spaces whose basis may be changed). Each
names the places in the state dict where its elements lie. It is derived from a model by
:func:`manifold_merge.symmetry_of`, can be printed and edited by hand, and travels as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_merge.symmetry_group import (
    Kinship,
    SymmetryElement,
    SymmetryError,
    composed,
    inverted,
    random_element,
)
from manifold_merge.symmetry_sets import (
    GaugeGroup,
    PermutedSet,
    Placement,
    Workspace,
    permute_placement,
    transform_placement,
)

__all__ = [
    "GaugeGroup",
    "NetworkSymmetry",
    "PermutedSet",
    "Placement",
    "SymmetryElement",
    "SymmetryError",
]


@dataclass(frozen=True)
class NetworkSymmetry:
    """The symmetry group of one network, as data.

    Args:
        sets: Permuted sets; one that is nested comes before its parent.
        gauges: Continuous groups; they act before the permutations.
        shapes: Shape of each tensor of the state dict that a symmetry touches.
        aliases: Other names of shared tensors, and the names that ``sets`` and ``gauges`` use.
        frozen: Why an axis may not be reordered, by ``"tensor[axis]"``.

    Example:
        >>> hidden = PermutedSet("0", 4, (Placement("0.weight", 0), Placement("0.bias", 0),
        ...     Placement("2.weight", 1)))
        >>> shapes = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4)}
        >>> symmetry = NetworkSymmetry((hidden,), shapes=shapes)
        >>> print(symmetry)
        permuted sets
          0  4  0.weight[0], 0.bias[0], 2.weight[1]
        >>> state = {name: torch.randn(shape) for name, shape in shapes.items()}
        >>> element = symmetry.random(torch.Generator().manual_seed(0))
        >>> moved = symmetry.apply(state, element)
        >>> back = symmetry.apply(moved, symmetry.inverse(element))
        >>> all(torch.equal(back[name], state[name]) for name in state)
        True
    """

    sets: tuple[PermutedSet, ...]
    gauges: tuple[GaugeGroup, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)

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
        work = Workspace(state, self.aliases)
        for each in self.sets:
            if each.name not in permutations:
                continue
            order = permutations[each.name]
            for place in each.placements:
                permute_placement(work.writable(place.tensor), place, order)
            for names in each.tensors:
                work.move(names, order)
        return work.finished()

    def transform(
        self, state: Mapping[str, Tensor], gauges: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Change the basis of each space: its axes transform by G or by its inverse transpose.

        Args:
            state: A state dict of the network.
            gauges: For each gauge group to act with, by name, a matrix ``(d, d)``, or factors
                ``(d,)`` for the kind ``"positive"``. The arithmetic is done in the more precise of
                the two types, the result has the type of the tensors.

        Returns:
            A new state dict; tensors that no group touches are shared with ``state``.
        """
        work = Workspace(state, self.aliases)
        for gauge in self.gauges:
            if gauge.name not in gauges:
                continue
            for place in gauge.placements:
                transform_placement(work.writable(place.tensor), place, gauges[gauge.name])
        return work.finished()

    def apply(self, state: Mapping[str, Tensor], element: SymmetryElement) -> dict[str, Tensor]:
        """Act on a state dict: gauges first, then nested sets, then their parents.

        Raises:
            SymmetryError: If the element names unknown sets or gauges, or has wrong shapes.
        """
        self._check_element(element)
        return self.permute(self.transform(state, element.gauges), element.permutations)

    def identity(self) -> SymmetryElement:
        """The element that changes nothing."""
        permutations = {each.name: torch.arange(each.count) for each in self.sets}
        gauges = {
            each.name: torch.ones(each.dimension, dtype=torch.float64)
            if each.kind == "positive"
            else torch.eye(each.dimension, dtype=torch.float64)
            for each in self.gauges
        }
        return SymmetryElement(permutations, gauges)

    def random(
        self, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64
    ) -> SymmetryElement:
        """A random element: uniform permutations, well-conditioned changes of basis."""
        return random_element(self.sets, self.gauges, generator, dtype)

    def compose(self, first: SymmetryElement, second: SymmetryElement) -> SymmetryElement:
        """The element that acts like ``first`` and then ``second``.

        Raises:
            SymmetryError: If a nested set has no counterpart where ``first`` puts it.
        """
        return composed(self.sets, self.gauges, first, second)

    def inverse(self, element: SymmetryElement) -> SymmetryElement:
        """The element that undoes ``element``.

        Raises:
            SymmetryError: If a nested set has no counterpart where ``element`` puts it.
        """
        return inverted(self.sets, self.gauges, element)

    @property
    def members(self) -> tuple[PermutedSet | GaugeGroup, ...]:
        """All sets and gauges."""
        return (*self.sets, *self.gauges)

    def __getitem__(self, name: str) -> PermutedSet | GaugeGroup:
        """The set or gauge of this name."""
        for each in self.members:
            if each.name == name:
                return each
        raise KeyError(
            f"no set or gauge is called {name!r}; there are {[m.name for m in self.members]}"
        )

    def without(self, name: str) -> NetworkSymmetry:
        """The subgroup that leaves a set or gauge alone.

        A nested one is left alone in every element of its parent, since those change places. What
        was nested in a set that is removed is then nested in that set's own parent.
        """
        gone = self[name]
        names = {name}
        if gone.parent is not None and gone.parent[0] in {each.name for each in self.sets}:
            family = self._cousins(gone.parent[0])
            names = {
                each.name
                for each in self.members
                if type(each) is type(gone)
                and each.role == gone.role
                and each.parent is not None
                and each.parent[0] in family
            }
        return self._kept(lambda each: each.name not in names)

    def _cousins(self, name: str) -> set[str]:
        """The sets that may take this one's place."""
        each = self[name]
        if each.parent is None:
            return {name}
        parents = self._cousins(each.parent[0])
        return {
            s.name for s in self.sets if s.parent and s.parent[0] in parents and s.role == each.role
        }

    def only(
        self,
        kind: Literal["permutation", "general_linear", "positive", "orthogonal", "rotation"],
    ) -> NetworkSymmetry:
        """The subgroup of permutations, or of gauges of one kind."""
        return self._kept(
            lambda each: (each.kind if isinstance(each, GaugeGroup) else "permutation") == kind
        )

    def _kept(self, keep: Any) -> NetworkSymmetry:
        sets = [each for each in self.sets if keep(each)]
        left = {each.name for each in sets}
        parents = {each.name: each.parent for each in self.sets}

        def adopted(each: Any) -> Any:
            parent = each.parent
            while parent is not None and parent[0] not in left:
                parent = parents.get(parent[0])
            changes = {"parent": parent}
            if isinstance(each, GaugeGroup):
                changes["along"] = each.along if each.along in left else None
            return replace(each, **changes)

        gauges = tuple(adopted(each) for each in self.gauges if keep(each))
        return replace(self, sets=tuple(adopted(each) for each in sets), gauges=gauges)

    def discrete(self) -> NetworkSymmetry:
        """The group with the permutations of the coordinates in place of general linear gauges."""
        made = tuple(
            PermutedSet(
                each.name,
                each.dimension,
                tuple(replace(place, inverse=False) for place in each.placements),
                parent=each.parent,
                role=each.role,
            )
            for each in self.gauges
            if each.kind in ("general_linear", "orthogonal")
        )
        names = {each.name for each in made}
        gauges = tuple(each for each in self.gauges if each.name not in names)
        return replace(self, sets=made + self.sets, gauges=gauges)

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Check that this specification is sound and that a state dict fits it.

        Raises:
            SymmetryError: If a name repeats, a tensor is missing or has another shape, a placement
                leaves its axis, two sets overlap without being nested, or a nested set has no
                counterpart in another element of its parent.
        """
        from manifold_merge.symmetry_check import check_state, check_structure

        check_structure(self)
        check_state(self, state)

    def _check_element(self, element: SymmetryElement) -> None:
        known: dict[str, PermutedSet | GaugeGroup] = {each.name: each for each in self.sets}
        for name, order in element.permutations.items():
            each = known.get(name)
            if not isinstance(each, PermutedSet):
                raise SymmetryError(f"no permuted set is called {name!r}; there are {list(known)}")
            if sorted(order.tolist()) != list(range(each.count)):
                raise SymmetryError(
                    f"the permutation of {name!r} must hold each of 0, ..., {each.count - 1} once"
                )
        spaces = {each.name: each for each in self.gauges}
        for name, value in element.gauges.items():
            if name not in spaces:
                raise SymmetryError(f"no gauge group is called {name!r}; there are {list(spaces)}")
            d = spaces[name].dimension
            wanted = (d,) if spaces[name].kind == "positive" else (d, d)
            if tuple(value.shape) != wanted:
                raise SymmetryError(
                    f"the gauge {name!r} must have shape {wanted}, not {tuple(value.shape)}"
                )

    def kinship(self) -> Kinship:
        """Which nested sets and gauges change places when permutations act."""
        return Kinship(self.sets, self.gauges)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries, ready for JSON; :meth:`from_dict` reads them."""
        return {
            "sets": [_plain(each) for each in self.sets],
            "gauges": [_plain(each) for each in self.gauges],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "aliases": dict(self.aliases),
            "frozen": dict(self.frozen),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkSymmetry:
        """Read what :meth:`to_dict` wrote.

        Raises:
            SymmetryError: If keys are missing or unknown.
        """
        try:
            return cls(
                tuple(_read(PermutedSet, each) for each in data["sets"]),
                tuple(_read(GaugeGroup, each) for each in data.get("gauges", ())),
                {name: tuple(shape) for name, shape in data.get("shapes", {}).items()},
                dict(data.get("aliases", {})),
                dict(data.get("frozen", {})),
            )
        except (KeyError, TypeError) as error:
            raise SymmetryError(
                f"this is no symmetry specification as written by to_dict(): {error}"
            ) from error

    def describe(self, *, frozen: bool = True) -> str:
        """A table of sets, gauges and (if asked) frozen axes with their reasons."""
        from manifold_merge.symmetry_table import table

        return table(self, frozen=frozen)

    def __str__(self) -> str:
        return self.describe()


def _plain(each: PermutedSet | GaugeGroup) -> dict[str, Any]:
    """A dataclass without the values that are defaults."""
    fields = {
        name: value
        for name, value in asdict(each).items()
        if value not in ((), None, "") and (name, value) != ("pairing", "halves")
    }
    fields["placements"] = [
        {
            key: value
            for key, value in asdict(place).items()
            if key in ("tensor", "axis") or value != getattr(Placement, key)
        }
        for place in each.placements
    ]
    return fields


def _read(kind: Any, data: Mapping[str, Any]) -> Any:
    fields = dict(data)
    fields["placements"] = tuple(
        Placement(**{**p, "within": tuple(tuple(pair) for pair in p.get("within", ()))})
        for p in fields.get("placements", ())
    )
    if "tensors" in fields:
        fields["tensors"] = tuple(tuple(names) for names in fields["tensors"])
    if fields.get("parent") is not None:
        fields["parent"] = (str(fields["parent"][0]), int(fields["parent"][1]))
    return kind(**fields)
