"""Families of axis positions: refinement by views and cuts, ties, frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_merge.symmetry_axes import Families, Incompatible, Product, Segments
from manifold_merge.symmetry_combine import combine
from manifold_merge.symmetry_labels import Factor, Label


def test_a_split_reaches_everything_that_is_tied() -> None:
    families = Families()
    a, b = families.new(6), families.new(6)
    families.tie(a, b, "dual")
    first = families.split(a, 2)
    second = families.structures[b]
    assert isinstance(second, Product)
    assert families.find(first.outer) == families.find(second.outer)
    for x, y in zip(first.inners, second.inners, strict=True):
        assert families.find(x) == families.find(y)
        (frame, p), (same, q) = families.frame(x), families.frame(y)
        assert frame == same
        assert p != q
    assert len({families.find(x) for x in first.inners}) == 2


@pytest.mark.parametrize(("first", "second"), [(2, 6), (6, 2), (4, 2), (3, 6), (2, 4)])
def test_splits_refine_each_other(first: int, second: int) -> None:
    families = Families()
    node = families.new(12)
    families.split(node, first)
    product = families.split(node, second)
    assert families.sizes[product.outer] == second
    assert all(families.sizes[inner] == 12 // second for inner in product.inners)
    smallest = np.gcd(12 // first, 12 // second)
    assert min(families.sizes[leaf] for leaf in families.leaves(node)) <= smallest


def test_splits_without_common_refinement_raise() -> None:
    families = Families()
    node = families.new(12)
    families.split(node, 4)
    with pytest.raises(Incompatible):
        families.split(node, 6)


def test_cuts_refine_each_other() -> None:
    families = Families()
    node = families.new(9)
    families.segment(node, [4, 5])
    parts = families.segment(node, [2, 4, 3])
    assert [families.sizes[part] for part in parts] == [2, 4, 3]
    structure = families.structures[node]
    assert isinstance(structure, Segments)
    assert [families.sizes[part] for part in structure.parts] == [2, 2, 2, 3]


def test_a_fused_axis_is_cut_and_split() -> None:
    """3 × heads × width: cut in three first, then viewed as heads, or the other way round."""
    one, two = Families(), Families()
    a, b = one.new(24), two.new(24)
    for part in one.segment(a, [8, 8, 8]):
        one.split(part, 2)
    two.split(b, 3)
    parts = two.segment(b, [8, 8, 8])
    assert [one.sizes[x] for x in one.leaves(a)] == [2, 4, 4] * 3
    assert [two.sizes[part] for part in parts] == [8, 8, 8]


def test_ties_of_structures_that_do_not_fit_freeze() -> None:
    families = Families()
    a, b = families.new(12), families.new(12)
    families.split(a, 4)
    families.segment(b, [5, 7])
    families.tie(a, b)
    assert all(families.reason(leaf) for node in (a, b) for leaf in families.leaves(node))


def test_frozen_nodes_stay_frozen_when_refined_or_tied() -> None:
    families = Families()
    a, b = families.new(6, "an input"), families.new(6)
    families.tie(b, a)
    assert families.reason(b) == "an input"
    assert all(families.reason(leaf) == "an input" for leaf in families.leaves(a))
    families.split(b, 3)
    assert all(families.reason(leaf) == "an input" for leaf in families.leaves(b))


def test_a_frame_that_meets_its_dual_is_fixed() -> None:
    families = Families()
    a, b = families.new(4), families.new(4)
    families.tie(a, b, "dual")
    assert families.is_linear(a)
    families.tie(b, a, "same")
    assert not families.is_linear(a)
    assert not families.is_positive(b)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4),
    data=st.data(),
)
def test_labels_follow_reshapes_and_permutations(sizes: list[int], data: st.DataObject) -> None:
    """Shapes and factors after any chain of views are those of a real tensor."""
    families = Families()
    label, tensor = Label.fresh(families, sizes), torch.zeros(sizes)
    for _ in range(3):
        order = data.draw(st.permutations(range(tensor.ndim)))
        label, tensor = label.permuted(order), tensor.permute(order)
        start = data.draw(st.integers(0, tensor.ndim - 1))
        stop = data.draw(st.integers(start, tensor.ndim - 1))
        shape = tensor.flatten(start, stop).shape
        label, tensor = label.reshaped(shape), tensor.reshape(shape)
        assert label.shape == tuple(tensor.shape)
        assert all(f.nodes.ndim == len(label.factors) for f in label.factors)
    # Flattening alone loses nothing: the factors are those of the first tensor.
    assert sorted(f.size for f in label.factors) == sorted(s for s in sizes if s > 1)


def test_a_contraction_over_one_index_ties_what_depends_on_it() -> None:
    """Experts have neurons of their own, until something sums over the experts."""
    families = Families()
    nodes = np.array([[families.new(5)] for _ in range(3)])
    experts = families.new(3)
    label = Label(families, [[Factor(3, np.full((1, 1), experts))], [Factor(5, nodes)]])
    assert len({families.find(int(n)) for n in nodes.flat}) == 3
    kept = label.mixed_axes([1])
    assert len({families.find(int(n)) for f in kept.factors for n in f.nodes.flat}) == 4
    both = label.without_axes([0, 1])
    assert both.shape == ()
    assert len({families.find(int(n)) for n in nodes.flat}) == 3
    label.without_axes([0])
    assert len({families.find(int(n)) for n in nodes.flat}) == 1


def test_combining_grouped_and_flat_axes_refines_the_flat_one() -> None:
    families = Families()
    heads = Label.fresh(families, [2, 3]).reshaped([6])
    flat = Label.fresh(families, [6])
    out = combine(heads, ["i"], flat, ["i"], [])
    assert out.shape == ()
    assert [f.size for f in flat.resolved().factors] == [2, 3]
