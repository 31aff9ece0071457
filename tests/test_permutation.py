"""Multisets of points: the contract, the assignment, Sinkhorn, and means."""

from __future__ import annotations

import itertools
import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifold_merge import FisherEuclidean, LoRAQuotient, PermutationQuotient, frechet_mean
from manifold_merge.accurate import dist2_logmap
from manifold_merge.assignment import assign, inverse_permutation, sinkhorn, softassign
from manifold_merge.checks import check_manifold, list_laws
from manifold_merge.power import PowerManifold

CHORDAL = {"distance": "chordal"}
HEADS = geoopt.ProductManifold(
    (LoRAQuotient(3, 3, **CHORDAL), (6, 1)), (LoRAQuotient(2, 3, **CHORDAL), (5, 1))
)
FLAT = {
    "Euclidean": (geoopt.Euclidean(1), (4, 3)),
    "scalars": (geoopt.Euclidean(0), (4,)),
    "Fisher": (FisherEuclidean(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)), (4, 3)),
    "Sphere": (geoopt.Sphere(), (3, 4)),
    "nested": (PermutationQuotient(geoopt.Euclidean(1), 3), (2, 3, 4)),
    "product": (geoopt.ProductManifold((geoopt.Euclidean(1), 2), (geoopt.Sphere(), 3)), (3, 5)),
}
# The chord between low-rank matrices is no geodesic distance.
CHORDAL_DEFECTS = ("geodesic_distance", "log_distance", "distance_gradient")


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("case", FLAT)
def test_every_law_holds(case, batch):
    base, shape = FLAT[case]
    check_manifold(PermutationQuotient(base, shape[0]), shape=shape, batch=batch)


@pytest.mark.parametrize("case", FLAT)
def test_every_law_holds_for_arrays_in_order(case):
    base, shape = FLAT[case]
    check_manifold(PowerManifold(base, shape[0]), shape=shape)


QUOTIENT_LAWS = [
    "shapes", "batching", "projections", "gradient", "representatives", "gauge_invariance",
    "gauge_equivariance", "horizontality", "optimiser_equivariance",
]  # fmt: skip


@pytest.mark.parametrize("base", [LoRAQuotient(3, 2, **CHORDAL), HEADS], ids=["LoRA", "heads"])
def test_quotient_laws_hold_over_quotients(base):
    """GL(r) inside, permutations outside: the wreath product."""
    shape = (2, 5, 1) if isinstance(base, LoRAQuotient) else (2, 11)
    manifold = PermutationQuotient(base, 2)
    check_manifold(manifold, shape=shape, laws=QUOTIENT_LAWS, exact=False, radius=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("base", [LoRAQuotient(4, 3, **CHORDAL), HEADS], ids=["LoRA", "heads"])
def test_every_law_holds_over_quotients(base):
    shape = (2, 7, 2) if isinstance(base, LoRAQuotient) else (2, 11)
    manifold = PermutationQuotient(base, 2)
    skip = CHORDAL_DEFECTS
    check_manifold(manifold, shape=shape, skip=skip, exact=False, radius=0.2)


def test_no_law_was_forgotten():
    assert set(QUOTIENT_LAWS) | set(CHORDAL_DEFECTS) <= set(list_laws())


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_distance_is_the_least_over_all_permutations(count, seed):
    x, y = double(count, 2, seed=seed), double(count, 2, seed=seed + 1)
    manifold = PermutationQuotient(geoopt.Euclidean(1), count)
    least = min(
        float((x - y[list(p)]).square().sum()) for p in itertools.permutations(range(count))
    )
    assert float(manifold.dist2(x, y)) == pytest.approx(least, abs=1e-12)


def test_score_of_a_flat_base_ranks_as_its_distances():
    x, y = double(2, 5, 3), double(2, 5, 3, seed=1)
    for base in (geoopt.Euclidean(1), FLAT["Fisher"][0]):
        power = PowerManifold(base, 5)
        half = -0.5 * power.pairwise_dist2(x, y)
        rest = power.pairwise_score(x, y) - half
        rest = rest - rest.mean(-1, keepdim=True) - rest.mean(-2, keepdim=True)
        assert torch.allclose(rest + rest.mean((-2, -1), keepdim=True) * 0, rest)
        centred = rest - rest.mean((-2, -1), keepdim=True)
        assert float(centred.abs().max()) < 1e-12


def test_match_tells_where_each_point_went():
    manifold = PermutationQuotient(geoopt.Euclidean(1), 6)
    x, order = double(6, 3), torch.randperm(6)
    found = manifold.match(x, x[order])
    assert torch.equal(order[found], torch.arange(6))
    assert torch.equal(found, inverse_permutation(order))
    assert torch.equal(manifold.align(x, x[order]), x)


def test_heads_are_recovered_through_reordering_and_change_of_basis():
    manifold = PermutationQuotient(HEADS, 4)
    x = double(4, 11)
    y = manifold.random_representative(x)
    assert float((x - y).abs().max()) > 0.1
    assert torch.allclose(manifold.align(x, y), x, atol=1e-8)


# --- assignment and Sinkhorn ----------------------------------------------------------------------


def test_assignments_are_batched_and_maximal():
    score = double(2, 3, 5, 5)
    found = assign(score)
    assert found.shape == (2, 3, 5)
    value = score.gather(-1, found[..., None]).sum((-2, -1))
    best = torch.stack(
        [sum(score[..., i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5))]
    ).amax(0)
    assert torch.allclose(value, best)
    with pytest.raises(ValueError, match="square"):
        assign(double(2, 3))


def test_plan_is_doubly_stochastic_and_tends_to_the_permutation():
    score = double(6, 6)
    plan = sinkhorn(score, 0.5, 500)
    assert torch.allclose(plan.sum(0), torch.ones(6).double())
    assert torch.allclose(plan.sum(1), torch.ones(6).double())
    cold = sinkhorn(score, 0.01, 5000)
    assert torch.equal(cold.argmax(1), assign(score))
    assert float(cold.amax(1).min()) > 0.99
    with pytest.raises(ValueError, match="temperature"):
        sinkhorn(score, 0.0)


def test_plan_is_differentiable():
    score = double(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, 0.7, 30), score)


def test_softened_assignment_is_sinkhorns():
    score = double(7, 7)
    plan, potential = softassign(score, 0.3, torch.zeros(7).double(), iterations=400)
    assert torch.allclose(plan, sinkhorn(score, 0.3, 400), atol=1e-8)
    again, _ = softassign(score, 0.3, potential, iterations=1)
    assert torch.allclose(again, plan, atol=1e-8)


def test_smooth_distance_brackets_the_exact_one_and_has_its_logarithm_as_gradient():
    x, y = double(5, 2), double(5, 2, seed=1)
    exact = PermutationQuotient(geoopt.Euclidean(1), 5)
    least = float(exact.dist2(x, y))
    for temperature in (1.0, 0.1, 0.01):
        smooth = PermutationQuotient(
            geoopt.Euclidean(1), 5, assignment="sinkhorn", temperature=temperature, iterations=3000
        )
        leaf = x.clone().requires_grad_()
        squared = smooth.dist2(leaf, y)
        (gradient,) = torch.autograd.grad(squared, leaf)
        value, log = smooth.dist2_logmap(x, y)
        squared = squared.detach()
        assert least - 1e-9 <= float(squared) <= least + temperature * 5 * math.log(5) + 1e-9
        assert float(value) == pytest.approx(float(squared))
        assert torch.allclose(gradient, -2 * log, atol=1e-6)
    assert float(squared) == pytest.approx(least, abs=0.1)


@pytest.mark.parametrize("case", ["Euclidean", "Fisher", "Sphere", "scalars"])
def test_gradient_of_the_smooth_distance_agrees_with_finite_differences(case):
    """Of its value, not of another formula: no envelope theorem is used here."""
    base, shape = FLAT[case]
    options = {"assignment": "sinkhorn", "temperature": 0.3, "iterations": 2000}
    manifold = PermutationQuotient(base, shape[0], **options)
    x, y = (manifold.projx(double(*shape, seed=s)) for s in (0, 1))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(manifold.dist2(leaf, y), leaf)
    gradient = manifold.egrad2rgrad(x, gradient)
    log = manifold.logmap(x, y)
    for seed in (2, 3):
        u = manifold.proju(x, double(*shape, seed=seed))

        def value(t, u=u):
            return float(manifold.dist2(manifold.expmap(x, t * u), y))

        h = 1e-4
        slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        assert float(manifold.inner(x, gradient, u)) == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert -2 * float(manifold.inner(x, log, u)) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("temperature", [4.0, 1.0])
def test_smooth_distance_is_the_least_of_its_definition(temperature):
    """Transport cost plus T Σ P log(n P) at the plan; other doubly stochastic ones cost more."""
    n = 4
    manifold = PermutationQuotient(
        geoopt.Euclidean(1), n, assignment="sinkhorn", temperature=temperature, iterations=5000
    )
    x, y = double(n, 2), double(n, 2, seed=1)
    squared = (x[:, None] - y).square().sum(-1)

    def cost(plan):
        return float((plan * squared).sum() + temperature * torch.xlogy(plan, n * plan).sum())

    plan = manifold.plan(x, y)
    value = float(manifold.dist2(x, y))
    assert value == pytest.approx(cost(plan), abs=1e-9)
    corners = [torch.eye(n).double()[list(p)] for p in itertools.permutations(range(n))]
    centre = torch.full((n, n), 1 / n, dtype=torch.float64)
    for corner in (*corners, centre):
        for share in (1e-3, 0.3, 1.0):
            assert cost(torch.lerp(plan, corner, share)) >= value - 1e-9


def test_mean_with_the_smooth_distance_lowers_its_objective():
    points = torch.stack([double(4, 2, seed=s) for s in range(3)])
    smooth = PermutationQuotient(geoopt.Euclidean(1), 4, assignment="sinkhorn", temperature=0.5)
    solution = frechet_mean(smooth, points)
    at_anchors = [float(smooth.dist2(x.expand_as(points), points).mean()) for x in points]
    assert float(solution.objective) < min(at_anchors)
    assert float(solution.gradient_norm) < 1e-6


# --- means ----------------------------------------------------------------------------------------


@pytest.fixture
def multisets():
    """Three noisy copies of one multiset, each in an order of its own."""
    manifold = PermutationQuotient(geoopt.Euclidean(1), 6)
    centre = 3 * double(6, 2)
    noisy = [centre + 0.3 * double(6, 2, seed=s) for s in (1, 2, 3)]
    shuffled = [x[torch.randperm(6)] for x in noisy]
    return manifold, torch.stack(noisy), torch.stack(shuffled)


def test_mean_of_multisets_is_the_average_in_order(multisets):
    manifold, noisy, shuffled = multisets
    solution = frechet_mean(manifold, shuffled, gauge_check=True)
    assert solution.converged
    assert torch.allclose(manifold.align(noisy.mean(0), solution.point), noisy.mean(0))
    assert float(solution.gauge_residual) < 1e-9


@pytest.mark.parametrize("starts", ["auto", "anchors"])
def test_mean_does_not_depend_on_the_order_of_the_anchors(multisets, starts):
    manifold, _, shuffled = multisets
    one = frechet_mean(manifold, shuffled, [3, 2, 1], starts=starts)
    two = frechet_mean(manifold, shuffled.flip(0), [1, 2, 3], starts=starts)
    assert bool(manifold.same_point(one.point, two.point))


def test_weights_are_multiplicities(multisets):
    manifold, _, shuffled = multisets
    weighted = frechet_mean(manifold, shuffled, [2, 1, 1])
    repeated = frechet_mean(manifold, torch.cat([shuffled[:1], shuffled]))
    assert bool(manifold.same_point(weighted.point, repeated.point))
    alone = frechet_mean(manifold, shuffled, [0, 1, 0])
    assert bool(manifold.same_point(alone.point, shuffled[1]))
    same = frechet_mean(manifold, shuffled[:1].expand(3, -1, -1))
    assert bool(manifold.same_point(same.point, shuffled[0]))


def test_batches_of_means(multisets):
    manifold, _, shuffled = multisets
    both = frechet_mean(manifold, torch.stack([shuffled, 2 * shuffled], 1)).point
    assert torch.allclose(both[0], frechet_mean(manifold, shuffled).point)
    assert bool(manifold.same_point(both[1], 2 * both[0]))


def test_gradient_flows_through_the_matched_points():
    manifold = PermutationQuotient(geoopt.Euclidean(1), 3)
    x, y = double(3, 2), double(3, 2, seed=1).requires_grad_()
    manifold.dist2(x, y).backward()
    squared, log = dist2_logmap(manifold, y.detach(), x)
    assert torch.allclose(y.grad, -2 * log)
    assert float(squared) == pytest.approx(float(manifold.dist2(x, y.detach())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assignment": "greedy"}, "assignment"),
        ({"temperature": 0.0}, "temperature"),
        ({"count": 0}, "count"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PermutationQuotient(geoopt.Euclidean(1), **{"count": 3, **options})


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="4"):
        PermutationQuotient(geoopt.Euclidean(1), 4).dist(double(3, 2), double(3, 2))
