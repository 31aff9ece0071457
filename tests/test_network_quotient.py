"""Networks modulo permutations: layout, contract, matching and means."""

from __future__ import annotations

import itertools

import pytest
import torch
from network_cases import NETWORKS, experts_symmetry, mlp_symmetry, random_state

from manifold_merge import NetworkQuotient, NetworkSymmetry, PermutedSet, Placement, frechet_mean
from manifold_merge.checks import check_manifold
from manifold_merge.network_layout import NetworkLayout
from manifold_merge.network_matching import (
    METHODS,
    Matching,
    coordinate_descent,
    frank_wolfe,
    random_orders,
    uniform_orders,
)
from manifold_merge.network_synchronize import match_networks, synchronize

SMALL = mlp_symmetry(3, 4, 4, 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def by_name(layout, orders):
    return dict(zip(layout.names, orders, strict=True))


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NETWORKS)
def test_vectors_and_state_dicts_correspond(case):
    symmetry = NETWORKS[case]
    layout, state = NetworkLayout(symmetry), random_state(symmetry)
    vector = layout.pack(state)
    assert vector.shape == (layout.size,)
    back = layout.unpack(vector)
    assert set(back) == {n for n in state if not n.startswith("bn.running")}
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert torch.equal(layout.pack(layout.unpack(vector)), vector)


@pytest.mark.parametrize("case", NETWORKS)
def test_permuting_a_vector_is_permuting_its_state_dict(case):
    """The fast action on vectors agrees with the one that defines the symmetry."""
    symmetry = NETWORKS[case]
    layout, state = NetworkLayout(symmetry), random_state(symmetry)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        orders = random_orders(layout, layout.pack(state), generator)
        expected = layout.pack(symmetry.permute(state, by_name(layout, orders)))
        assert torch.equal(layout.permute(layout.pack(state), orders), expected)


@pytest.mark.parametrize("case", NETWORKS)
def test_score_matrix_is_the_linear_part_of_the_score(case):
    """For soft orders of every set: the whole score, term by term, and its transpose."""
    symmetry = NETWORKS[case]
    layout = NetworkLayout(symmetry)
    x, y = normal(2, layout.size), normal(2, layout.size, seed=1)
    matching = Matching(layout, x, y)
    orders = [torch.rand(n, n, dtype=torch.float64) for n in layout.counts]
    score = matching.score(orders)
    assert score == pytest.approx(float((x * layout.permute(y, orders)).sum()))
    for number, count in enumerate(layout.counts):
        gradient = torch.zeros(count, count, dtype=torch.float64)
        for i, j in itertools.product(range(count), repeat=2):
            moved = list(orders)
            unit = torch.zeros(count, count, dtype=torch.float64)
            unit[i, j] = 1e-5
            moved[number] = orders[number] + unit
            up = matching.score(moved)
            moved[number] = orders[number] - unit
            gradient[i, j] = (up - matching.score(moved)) / 2e-5
        found = matching.score_matrix(number, orders)
        assert torch.allclose(found, gradient, atol=1e-6), layout.names[number]


def test_average_over_permutations_is_invariant():
    for symmetry in NETWORKS.values():
        layout = NetworkLayout(symmetry)
        metric = layout.symmetrized(normal(layout.size).abs())
        orders = random_orders(layout, metric, None)
        assert torch.allclose(layout.permute(metric, orders), metric)
        assert torch.allclose(layout.symmetrized(metric), metric)


BROKEN = {
    "no such parameter": (PermutedSet("a", 4, (Placement("nowhere", 0),)), "nowhere"),
    "beyond the axis": (PermutedSet("a", 9, (Placement("0.weight", 0),)), "0.weight: axis 0"),
    "unlike tensors": (PermutedSet("a", 2, (), (("0.weight", "2.weight"),)), "alike"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_layouts_that_do_not_fit_are_named(case):
    broken, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        NetworkLayout(NetworkSymmetry((broken,), (), SMALL.shapes))


def test_state_dicts_that_do_not_fit_are_named():
    layout, state = NetworkLayout(SMALL), random_state(SMALL)
    with pytest.raises(ValueError, match=r"0\.bias: missing"):
        layout.pack({k: v for k, v in state.items() if k != "0.bias"})
    with pytest.raises(ValueError, match=r"0\.bias: expected"):
        layout.pack({**state, "0.bias": torch.zeros(7)})


# --- the manifold ---------------------------------------------------------------------------------


def contract(symmetry, metric, batch, **options):
    quotient = NetworkQuotient(symmetry, **options)
    if metric == "Fisher":
        fisher = quotient.symmetrize(0.5 + torch.rand(quotient.layout.size, dtype=torch.float64))
        quotient = NetworkQuotient(symmetry, fisher=fisher, **options)
    check_manifold(quotient, shape=(quotient.layout.size,), batch=batch)


@pytest.mark.parametrize(("metric", "batch"), [("Euclidean", (2,)), ("Fisher", ())])
def test_every_law_holds(metric, batch):
    contract(mlp_symmetry(2, 3, 2), metric, batch, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("metric", ["Euclidean", "Fisher"])
def test_every_law_holds_with_two_sets(metric, batch):
    contract(SMALL, metric, batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", NETWORKS)
def test_planted_permutations_are_recovered(case, method):
    quotient = NetworkQuotient(NETWORKS[case], method=method)
    x = quotient.random(quotient.layout.size, dtype=torch.float64)
    for seed in range(3):
        y = quotient.random_representative(x, generator=torch.Generator().manual_seed(seed))
        assert not torch.equal(x, y)
        assert torch.equal(quotient.align(x, y), x)
        noisy = y + 1e-3 * normal(*y.shape)
        assert float(quotient.dist(x, noisy)) == pytest.approx(float((noisy - y).norm()))


def test_named_permutations_bring_the_state_dict_over():
    symmetry = NETWORKS["experts as tensors"]
    quotient = NetworkQuotient(symmetry)
    state = random_state(symmetry)
    x = quotient.pack(state)
    y = quotient.random_representative(x)
    moved = symmetry.permute(quotient.unpack(y), quotient.match(x, y))
    assert all(torch.equal(moved[name], state[name]) for name in state)


def test_metric_must_be_invariant():
    size = NetworkQuotient(SMALL).layout.size
    with pytest.raises(ValueError, match="symmetrize"):
        NetworkQuotient(SMALL, fisher=torch.arange(1.0, size + 1))
    with pytest.raises(ValueError, match="expected"):
        NetworkQuotient(SMALL, fisher=torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "greedy"}, "method"), ({"starts": 0}, "starts"), ({"steps": 0}, "steps")],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkQuotient(SMALL, **options)


def test_nothing_to_balance_is_an_error():
    with pytest.raises(ValueError, match="no positive gauge"):
        NetworkQuotient(NETWORKS["fused heads"], balance=True)


def test_gradient_of_the_distance_is_the_logarithm():
    quotient = NetworkQuotient(SMALL)
    x, y = normal(quotient.layout.size).requires_grad_(), normal(quotient.layout.size, seed=1)
    (0.5 * quotient.dist(x, y) ** 2).backward()
    assert torch.allclose(x.grad, -quotient.logmap(x.detach(), y))


# --- matching -------------------------------------------------------------------------------------


def test_coordinate_descent_is_monotone_and_stops_at_a_local_solution():
    """No single set can be improved, whatever the start, also where a set meets itself."""
    for symmetry in NETWORKS.values():
        layout = NetworkLayout(symmetry)
        x, y = normal(1, layout.size), normal(1, layout.size, seed=1)
        matching = Matching(layout, x, y)
        orders = random_orders(layout, x, torch.Generator().manual_seed(2))
        before = matching.score(orders)
        first, changed = coordinate_descent(matching, orders, max_sweeps=1)
        after = matching.score(first)
        found, _ = coordinate_descent(matching, first)
        assert changed
        assert before < after <= matching.score(found) + 1e-9
        _, changed = coordinate_descent(matching, found)
        assert not changed


def test_nested_sets_are_matched_as_one():
    """Two experts exchanged, their neurons shuffled: a flat visit of each set would stay put."""
    symmetry = experts_symmetry(2, 6, 3)
    layout = NetworkLayout(symmetry)
    x = layout.pack(random_state(symmetry))
    x[: 2 * 3] = 0.0  # the router tells nothing about which expert is which
    orders = random_orders(layout, x, torch.Generator().manual_seed(0))
    orders[-1] = torch.tensor([1, 0])
    matching = Matching(layout, x[None], layout.permute(x, orders)[None])
    found, _ = coordinate_descent(matching, [None] * len(layout.sets))
    assert torch.equal(layout.permute(layout.permute(x, orders), found), x)


def test_frank_wolfe_is_exact_for_one_set():
    symmetry = mlp_symmetry(3, 7, 2)
    layout = NetworkLayout(symmetry)
    x, y = normal(1, layout.size), normal(1, layout.size, seed=1)
    matching = Matching(layout, x, y)
    best = match_networks(matching, method="coordinate")
    found = frank_wolfe(matching, uniform_orders(layout, x))
    assert matching.score(found) == pytest.approx(matching.score(best))


def test_more_starts_are_no_worse():
    layout = NetworkLayout(mlp_symmetry(4, 12, 12, 3))
    matching = Matching(layout, normal(1, layout.size), normal(1, layout.size, seed=1))
    for method in METHODS:
        scores = [matching.score(match_networks(matching, method=method, starts=n)) for n in (1, 5)]
        assert scores[0] <= scores[1]


def test_annealing_beats_a_descent_on_average():
    layout = NetworkLayout(mlp_symmetry(6, 24, 24, 24, 3))
    gains = []
    for seed in range(5):
        x, y = normal(1, layout.size, seed=seed), normal(1, layout.size, seed=seed + 50)
        matching = Matching(layout, x, y)
        one, two = (
            matching.score(match_networks(matching, method=m)) for m in ("anneal", "coordinate")
        )
        gains.append(one - two)
    assert sum(gains) > 0


# --- means ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd():
    """Four noisy copies of one network, each with its units in an order of its own."""
    quotient = NetworkQuotient(mlp_symmetry(5, 8, 8, 3))
    centre = normal(quotient.layout.size)
    noisy = torch.stack([centre + 0.3 * normal(*centre.shape, seed=s) for s in range(1, 5)])
    generator = torch.Generator().manual_seed(5)
    return (
        quotient,
        noisy,
        torch.stack([quotient.random_representative(x, generator=generator) for x in noisy]),
    )


@pytest.mark.parametrize("method", METHODS)
def test_mean_is_the_average_in_a_common_order(crowd, method):
    _, noisy, shuffled = crowd
    quotient = NetworkQuotient(mlp_symmetry(5, 8, 8, 3), method=method)
    solution = frechet_mean(quotient, shuffled)
    assert solution.converged
    assert torch.allclose(quotient.align(noisy.mean(0), solution.point), noisy.mean(0))
    variance = (noisy - noisy.mean(0)).square().sum(1).mean()
    assert float(solution.objective) == pytest.approx(float(variance))


def test_mean_is_invariant(crowd):
    """Order of the networks, order of their units, duplication, one-hot weights, idempotence."""
    quotient, _, shuffled = crowd
    weights = torch.tensor([4.0, 3.0, 2.0, 1.0])
    one = frechet_mean(quotient, shuffled, weights, gauge_check=True)
    two = frechet_mean(quotient, shuffled.flip(0), weights.flip(0))
    assert bool(quotient.same_point(one.point, two.point))
    assert float(one.gauge_residual) < 1e-9
    repeated = frechet_mean(quotient, shuffled.repeat_interleave(weights.long(), 0))
    assert bool(quotient.same_point(one.point, repeated.point))
    alone = frechet_mean(quotient, shuffled, [0, 0, 1, 0])
    assert torch.equal(alone.point, shuffled[2])
    same = frechet_mean(quotient, [shuffled[0], quotient.random_representative(shuffled[0])])
    assert bool(quotient.same_point(same.point, shuffled[0]))


def test_mean_of_unlike_networks_is_stationary_and_beats_one_anchor():
    """MergeMany: no network can be aligned better to the mean; Git Re-Basin aligns to one."""
    quotient = NetworkQuotient(mlp_symmetry(5, 10, 10, 3))
    points = torch.stack([normal(quotient.layout.size, seed=s) for s in range(4)])
    solution = frechet_mean(quotient, points)
    assert solution.converged
    layout, aligned = quotient.layout, []
    for x in points:
        matching = quotient._matching(solution.point, x)
        orders = match_networks(matching, method="anneal")
        aligned.append(layout.permute(x, orders))
    to_first = torch.stack([quotient.align(points[0], x) for x in points])
    anchored = (to_first - to_first.mean(0)).square().sum(1).mean()
    assert float(solution.objective) < float(anchored)
    # Karcher's next step, from fresh alignments, finds nothing better.
    again = torch.stack(aligned)
    fresh = (again - again.mean(0)).square().sum(1).mean()
    assert float(solution.objective) <= float(fresh) + 1e-9


def test_karcher_iteration_is_align_and_average():
    """From a given start: each step averages the networks aligned to the last iterate."""
    quotient = NetworkQuotient(mlp_symmetry(4, 6, 6, 2), method="coordinate")
    points = torch.stack([normal(quotient.layout.size, seed=s) for s in range(3)])
    start = points[0]
    once = frechet_mean(quotient, points, start=start, max_iterations=1)
    by_hand = torch.stack([quotient.align(start, x) for x in points]).mean(0)
    assert torch.allclose(once.point, by_hand)
    whole = frechet_mean(quotient, points, start=start)
    at_start = torch.stack([quotient.dist(start, x) ** 2 for x in points]).mean()
    assert whole.converged
    assert float(whole.objective) <= float(once.objective) + 1e-9 <= float(at_start) + 2e-9


def test_starts_at_anchors_are_no_worse():
    quotient = NetworkQuotient(mlp_symmetry(4, 6, 6, 2))
    points = torch.stack([normal(quotient.layout.size, seed=s) for s in range(3)])
    auto = frechet_mean(quotient, points)
    many = frechet_mean(quotient, points, starts="anchors")
    assert float(many.objective) <= float(auto.objective) + 1e-9


def test_batches_of_networks_are_solved_side_by_side(crowd):
    quotient, _, shuffled = crowd
    both = frechet_mean(quotient, torch.stack([shuffled, 2 * shuffled], 1))
    assert both.objective.shape == (2,)
    assert float(both.objective[1]) == pytest.approx(4 * float(both.objective[0]))


def test_median_ignores_a_foreign_network(crowd):
    quotient, noisy, shuffled = crowd
    foreign = 50 * normal(1, quotient.layout.size, seed=9)
    points = torch.cat([shuffled, foreign])
    median = frechet_mean(quotient, points, p=1, tolerance=1e-4)
    centre = noisy.mean(0)
    assert float(quotient.dist(centre, median.point)) < 0.5 * float(centre.norm())
    mean = frechet_mean(quotient, points)
    assert float(quotient.dist(centre, mean.point)) > float(centre.norm())


def test_synchronized_orders_are_no_worse_with_more_starts():
    layout = NetworkLayout(mlp_symmetry(4, 12, 12, 3))
    points = torch.stack([normal(layout.size, seed=s) for s in range(3)])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def size(orders):
        moved = torch.stack([layout.permute(x, o) for x, o in zip(points, orders, strict=True)])
        return float((weights @ moved).square().sum())

    sizes = [size(synchronize(layout, points, weights, starts=n)) for n in (1, 5)]
    assert sizes[0] <= sizes[1] + 1e-9


def test_annealing_all_networks_together_beats_matching_one_after_another():
    """They see each other move while their orders are soft."""
    layout = NetworkLayout(mlp_symmetry(6, 24, 24, 3))
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    for group in range(2):
        points = torch.stack([normal(layout.size, seed=10 * group + s) for s in range(4)])
        sizes = {}
        for method in ("anneal", "coordinate"):
            orders = synchronize(layout, points, weights, method=method)
            moved = [layout.permute(x, o) for x, o in zip(points, orders, strict=True)]
            sizes[method] = float(torch.stack(moved).mean(0).square().sum())
        assert sizes["anneal"] > 1.02 * sizes["coordinate"]
