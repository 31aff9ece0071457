"""The laws of the symmetry group, with sets nested in sets, and checks of specifications."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetry_cases import CASES, Case, built
from torch import Tensor

from manifold_merge import (
    GaugeGroup,
    NetworkSymmetry,
    PermutedSet,
    Placement,
    SymmetryElement,
    SymmetryError,
    symmetry_of,
)

# Nested sets, stacked and listed experts, gauges inside heads, along sets and in their elements.
NAMES = [
    "mlp_relu",
    "group_norm",
    "llama",
    "routed_experts",
    "stacked_experts",
    "qk_norm_no_rotary",
]
NESTED = [case for case in CASES if case.name in [*NAMES, "mixtral"]]

_known: dict[str, tuple[NetworkSymmetry, dict[str, Tensor]]] = {}


def known(case: Case) -> tuple[NetworkSymmetry, dict[str, Tensor]]:
    if case.name not in _known:
        model, inputs = built(case)
        state = {name: tensor.double() for name, tensor in model.state_dict().items()}
        generator = torch.Generator().manual_seed(2)
        state = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for name, tensor in state.items()
        }
        _known[case.name] = symmetry_of(model, inputs), state
    return _known[case.name]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


nested = pytest.mark.parametrize("case", NESTED, ids=lambda case: case.name)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)


@nested
@few
@given(a=seeds, b=seeds)
def test_acting_twice_is_acting_with_the_product(case: Case, a: int, b: int) -> None:
    symmetry, state = known(case)
    g, h = (symmetry.random(generator) for generator in generators(a, b))
    twice = symmetry.apply(symmetry.apply(state, g), h)
    assert_same(symmetry.apply(state, symmetry.compose(g, h)), twice)


@nested
@few
@given(a=seeds)
def test_the_inverse_undoes(case: Case, a: int) -> None:
    symmetry, state = known(case)
    (g,) = (symmetry.random(generator) for generator in generators(a))
    inverse = symmetry.inverse(g)
    assert_same(symmetry.apply(symmetry.apply(state, g), inverse), state)
    assert_same(symmetry.apply(symmetry.apply(state, inverse), g), state)


@nested
@few
@given(a=seeds, b=seeds, c=seeds)
def test_the_product_is_associative(case: Case, a: int, b: int, c: int) -> None:
    symmetry, _ = known(case)
    f, g, h = (symmetry.random(generator) for generator in generators(a, b, c))
    left = symmetry.compose(symmetry.compose(f, g), h)
    right = symmetry.compose(f, symmetry.compose(g, h))
    assert all(torch.equal(left.permutations[n], right.permutations[n]) for n in left.permutations)
    for name, value in left.gauges.items():
        torch.testing.assert_close(value, right.gauges[name])


@nested
def test_the_identity_is_neutral(case: Case) -> None:
    symmetry, state = known(case)
    (g,) = (symmetry.random(generator) for generator in generators(4))
    identity = symmetry.identity()
    assert_same(symmetry.apply(state, identity), state)
    for product in (symmetry.compose(identity, g), symmetry.compose(g, identity)):
        assert_same(symmetry.apply(state, product), symmetry.apply(state, g))
    nothing = symmetry.compose(g, symmetry.inverse(g))
    for name, order in nothing.permutations.items():
        assert torch.equal(order, torch.arange(len(order))), name


@nested
def test_parts_that_are_left_out_are_identities(case: Case) -> None:
    symmetry, state = known(case)
    g, h = (symmetry.random(generator) for generator in generators(5, 6))
    for part in (SymmetryElement(g.permutations), SymmetryElement({}, g.gauges), SymmetryElement()):
        twice = symmetry.apply(symmetry.apply(state, part), h)
        assert_same(symmetry.apply(state, symmetry.compose(part, h)), twice)
        back = symmetry.apply(symmetry.apply(state, part), symmetry.inverse(part))
        assert_same(back, state)


def test_a_nested_permutation_moves_with_its_parent() -> None:
    """Two blocks of three: the block is reordered inside, then the blocks change places."""
    blocks = PermutedSet("blocks", 2, (Placement("w", 0, block=3),))
    inner = [
        PermutedSet(f"inner{i}", 3, (Placement("w", 0, start=3 * i),), parent=("blocks", i))
        for i in range(2)
    ]
    symmetry = NetworkSymmetry((*inner, blocks), shapes={"w": (6,)})
    symmetry.check({"w": torch.zeros(6)})
    state = {"w": torch.arange(6)}
    swap, turn = torch.tensor([1, 0]), torch.tensor([1, 2, 0])
    moved = symmetry.permute(state, {"blocks": swap, "inner0": turn})
    assert moved["w"].tolist() == [3, 4, 5, 1, 2, 0]
    # First swap, then turn the block that now comes first: it is the second one of the source.
    product = symmetry.compose(SymmetryElement({"blocks": swap}), SymmetryElement({"inner0": turn}))
    assert symmetry.apply(state, product)["w"].tolist() == [4, 5, 3, 0, 1, 2]
    assert product.permutations.keys() == {"blocks", "inner1"}


def test_permute_leaves_the_input_alone_and_shares_the_rest() -> None:
    hidden = PermutedSet("hidden", 3, (Placement("w", 0),))
    symmetry = NetworkSymmetry((hidden,), shapes={"w": (3, 2)})
    state = {"w": torch.arange(6.0).reshape(3, 2), "other": torch.ones(2)}
    moved = symmetry.permute(state, {"hidden": torch.tensor([2, 0, 1])})
    assert state["w"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert moved["w"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert moved["other"] is state["other"]


def test_gauges_transform_by_the_matrix_and_its_inverse_transpose() -> None:
    gauge = GaugeGroup(
        "hidden",
        "general_linear",
        3,
        (
            Placement("a", 0),
            Placement("b", 1, inverse=True),
            Placement("c", 1, 2, step=1, stride=3),
        ),
    )
    symmetry = NetworkSymmetry((), (gauge,), {"a": (3, 4), "b": (5, 3), "c": (2, 6)})
    state = {name: torch.randn(shape).double() for name, shape in symmetry.shapes.items()}
    matrix = torch.randn(3, 3).double()
    moved = symmetry.transform(state, {"hidden": matrix})
    torch.testing.assert_close(moved["a"], matrix @ state["a"])
    torch.testing.assert_close(moved["b"] @ moved["a"], state["b"] @ state["a"])
    both = (state["c"].reshape(2, 2, 3) @ matrix.T).reshape(2, 6)
    torch.testing.assert_close(moved["c"], both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype: torch.dtype) -> None:
    gauge = GaugeGroup("g", "positive", 3, (Placement("a", 0), Placement("b", 1, inverse=True)))
    symmetry = NetworkSymmetry((), (gauge,), {"a": (3, 4), "b": (5, 3)})
    state = {name: torch.randn(shape, dtype=dtype) for name, shape in symmetry.shapes.items()}
    moved = symmetry.apply(state, symmetry.random(torch.Generator().manual_seed(0)))
    assert {tensor.dtype for tensor in moved.values()} == {dtype}
    assert not torch.equal(moved["a"], state["a"])


def pair(**changes: object) -> PermutedSet:
    return replace(PermutedSet("a", 2, (Placement("w", 0, block=3),)), **changes)  # type: ignore[arg-type]


SHAPES = {"w": (6, 4), "v": (2,)}
INSIDE = [
    PermutedSet(f"in{i}", 3, (Placement("w", 0, start=3 * i),), parent=("a", i)) for i in range(2)
]

UNSOUND = {
    "two sets have one name": ((pair(), pair()), (), "unique"),
    "no such parent": ((pair(parent=("b", 0)),), (), "no permuted set"),
    "no such element": ((replace(INSIDE[0], parent=("a", 2)), pair()), (), "element 2"),
    "the parent comes first": ((pair(), *INSIDE), (), "before 'a'"),
    "an element without counterpart": ((INSIDE[0], pair()), (), "no counterpart"),
    "counterparts of different size": (
        (INSIDE[0], replace(INSIDE[1], count=2), pair()),
        (),
        "3 and 2",
    ),
    "no such tensor": ((pair(placements=(Placement("u", 0),)),), (), "'u'"),
    "no such axis": ((pair(placements=(Placement("w", 2),)),), (), "axis 2"),
    "no such slice": ((pair(placements=(Placement("w", 0, within=((1, 4),)),)),), (), "position 4"),
    "beyond the end": ((pair(placements=(Placement("w", 0, block=4),)),), (), "0 to 7"),
    "elements overlap": ((pair(placements=(Placement("w", 0, block=3, step=2),)),), (), "overlap"),
    "placed twice": (
        (pair(placements=(Placement("w", 0), Placement("w", 0))),),
        (),
        "placed twice",
    ),
    "sets overlap": ((pair(), PermutedSet("b", 2, (Placement("w", 0),))), (), "must be nested"),
    "roles of different size": ((pair(placements=(), tensors=(("v",),)),), (), "1 tensors"),
    "a gauge beyond the end": (
        (),
        (GaugeGroup("g", "positive", 9, (Placement("w", 0),)),),
        "0 to 8",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_specifications_raise(name: str) -> None:
    sets, gauges, message = UNSOUND[name]
    symmetry = NetworkSymmetry(sets, gauges, SHAPES)
    with pytest.raises(SymmetryError, match=message):
        symmetry.check({key: torch.zeros(shape) for key, shape in SHAPES.items()})


def test_rows_and_columns_of_a_grid_may_overlap() -> None:
    """Heads change places as blocks; a coordinate changes place in all heads at once."""
    columns = PermutedSet("b", 3, (Placement("w", 0, block=2, step=1, stride=3),))
    symmetry = NetworkSymmetry((columns, pair()), shapes=SHAPES)
    symmetry.check({key: torch.zeros(shape) for key, shape in SHAPES.items()})
    state = {"w": torch.randn(6, 4), "v": torch.zeros(2)}
    g, h = (symmetry.random(generator) for generator in generators(1, 2))
    twice = symmetry.apply(symmetry.apply(state, g), h)
    assert_same(symmetry.apply(state, symmetry.compose(g, h)), twice)
