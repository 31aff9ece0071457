"""Networks modulo changes of basis: balanced bases, alignment of heads, distances and means."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import tiny_transformers
import torch
from torch import nn

from manifold_merge import (
    GaugeGroup,
    NetworkQuotient,
    NetworkSymmetry,
    PermutedSet,
    Placement,
    align,
    frechet_mean,
    merge_networks,
    network_matching,
    symmetry_of,
)
from manifold_merge.checks import check_manifold
from manifold_merge.network_gauges import (
    balancing_element,
    closest_isometry,
    inverse_gauges,
    matrix_gauges,
    random_isometry,
    skew_solution,
    softened_isometry,
)
from manifold_merge.network_layout import NetworkLayout, named_element
from manifold_merge.network_matching import METHODS, Matching, random_orders, rounded
from manifold_merge.network_synchronize import match_networks
from manifold_merge.rescaling import positive_gauges, unit_gauges


def attention(heads: int, width: int, features: int, *, queries: int = 1, rotary: bool = False):
    """Separate projections of heads with ``queries`` query heads each, and their bases."""
    sets, gauges = [], []
    size = heads * width
    for h in range(heads):
        inside, start = ("heads", h), h * width
        if queries > 1:
            first = h * queries * width
            blocks = (
                Placement("q", 0, block=width, start=first),
                Placement("o", 1, block=width, start=first),
            )
            sets.append(PermutedSet(f"queries.{h}", queries, blocks, parent=inside, role="queries"))
        asked = tuple(Placement("q", 0, start=(h * queries + g) * width) for g in range(queries))
        keys = (*asked, Placement("k", 0, start=start, inverse=True))
        kind = "rotation" if rotary else "general_linear"
        gauges.append(GaugeGroup(f"qk.{h}", kind, width, keys, inside, role="qk"))
        out = Placement("o", 1, block=queries, start=h * queries * width, step=1, stride=width)
        values = (Placement("v", 0, start=start), Placement("bias", 0, start=start))
        values = (*values, Placement(**{**vars(out), "inverse": True}))
        gauges.append(GaugeGroup(f"vo.{h}", "general_linear", width, values, inside, role="vo"))
    wide = queries * width
    whole = (
        Placement("q", 0, block=wide),
        Placement("k", 0, block=width),
        Placement("v", 0, block=width),
        Placement("bias", 0, block=width),
        Placement("o", 1, block=wide),
    )
    sets.append(PermutedSet("heads", heads, whole))
    shapes = {
        "q": (queries * size, features),
        "k": (size, features),
        "v": (size, features),
        "bias": (size,),
        "o": (features, queries * size),
    }
    return NetworkSymmetry(tuple(sets), tuple(gauges), shapes)


CASES = {
    "heads": attention(3, 2, 5),
    "rotary": attention(3, 4, 5, rotary=True),
    "grouped": attention(2, 2, 5, queries=2),
    "grouped, rotary": attention(2, 4, 5, queries=2, rotary=True),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def state_of(symmetry: NetworkSymmetry, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in symmetry.shapes.items()
    }


def moved(state, symmetry, seed):
    return symmetry.apply(state, symmetry.random(torch.Generator().manual_seed(seed)))


def close(a, b, atol=1e-5):
    return all(torch.allclose(a[name], b[name], atol=atol) for name in b)


# --- balanced bases -------------------------------------------------------------------------------


def grams(state, gauge):
    sides = [0.0, 0.0]
    for place in gauge.placements:
        rows = state[place.tensor].movedim(place.axis, 0)[place.index(gauge.dimension)]
        rows = rows.reshape(gauge.dimension, -1)
        sides[place.inverse] = sides[place.inverse] + rows @ rows.mT
    return sides


@pytest.mark.parametrize("case", CASES)
def test_balanced_bases_are_equal_on_both_sides_and_shortest(case):
    symmetry = CASES[case]
    state = moved(state_of(symmetry), symmetry, 1)
    element = balancing_element(state, symmetry, scales=(), bases=True)
    new = symmetry.transform(state, element)
    for gauge in matrix_gauges(symmetry):
        direct, dual = grams(new, gauge)
        if gauge.kind == "rotation":
            i = torch.arange(gauge.dimension // 2)
            j = i + gauge.dimension // 2
            direct, dual = (g.diagonal()[i] + g.diagonal()[j] for g in (direct, dual))
        assert torch.allclose(direct, dual, rtol=1e-6)
    back = symmetry.transform(new, inverse_gauges(element))
    assert close(back, state, 1e-9)

    def size(s):
        return sum(float(t.square().sum()) for t in s.values())

    for seed in range(3):
        gauges = symmetry.random(torch.Generator().manual_seed(seed)).gauges
        assert size(symmetry.transform(new, gauges)) > size(new)


def test_bases_without_a_shortest_representative_stay():
    symmetry = CASES["heads"]
    state = state_of(symmetry)
    state["k"] = torch.zeros_like(state["k"])
    element = balancing_element(state, symmetry, scales=(), bases=True)
    assert torch.equal(element["qk.0"], torch.eye(2).double())
    assert not torch.allclose(element["vo.0"], torch.eye(2).double())


def test_scales_and_bases_are_balanced_together():
    """Two linear layers in a row behind ReLU units: GL(3) and positive factors share a tensor."""
    ins = (Placement("a", 0), Placement("b", 1, inverse=True))
    chain = (Placement("b", 0), Placement("c", 1, inverse=True))
    gauges = (
        GaugeGroup("scale", "positive", 4, ins),
        GaugeGroup("base", "general_linear", 3, chain),
    )
    symmetry = NetworkSymmetry((), gauges, {"a": (4, 2), "b": (3, 4), "c": (5, 3)})
    state = state_of(symmetry)
    new = symmetry.transform(
        state, balancing_element(state, symmetry, scales=positive_gauges(symmetry), bases=True)
    )
    assert torch.allclose(new["b"] @ new["b"].mT, new["c"].mT @ new["c"], atol=1e-5)
    assert torch.allclose(new["a"].square().sum(1), new["b"].square().sum(0), atol=1e-5)
    assert torch.allclose(
        new["c"] @ new["b"] @ new["a"].abs(), state["c"] @ state["b"] @ state["a"].abs()
    )


# --- orthogonal matrices --------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", [None, "halves", "neighbours"])
def test_closest_isometry_is_best_among_many(pairing):
    scores = normal(4, 4, seed=7)
    best = closest_isometry(scores, pairing)
    assert torch.allclose(best @ best.mT, torch.eye(4).double())
    generator = torch.Generator().manual_seed(0)
    others = [random_isometry(4, scores, generator, pairing) for _ in range(500)]
    values = torch.stack([(scores * each).sum() for each in others])
    assert float(values.max()) < float((scores * best).sum()) < 1.3 * float(values.max())
    soft = [softened_isometry(scores, t, pairing) for t in (1e-8, 1e3)]
    assert torch.allclose(soft[0], best, atol=1e-6)
    assert float(soft[1].abs().max()) < 1e-2
    if pairing is None:
        assert torch.allclose(soft[1], scores / 4e3, rtol=1e-4)


@pytest.mark.parametrize("pairing", [None, "halves"])
def test_skew_solution_is_the_projection(pairing):
    x, u = normal(4, 6), normal(4, 6, seed=1)
    spin = skew_solution(x @ x.mT, u @ x.mT, pairing)
    assert torch.allclose(spin, -spin.mT)
    for seed in range(5):
        other = skew_solution(torch.eye(4).double(), normal(4, 4, seed=seed), pairing)
        assert abs(float(((u - spin @ x) * (other @ x)).sum())) < 1e-10


# --- the manifold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_acting_on_a_vector_is_acting_on_its_state_dict(case):
    symmetry = CASES[case]
    layout, state = NetworkLayout(symmetry, bases=True), state_of(symmetry)
    assert layout.gauges == len(symmetry.gauges)
    orders = random_orders(layout, layout.pack(state), torch.Generator().manual_seed(0))
    expected = layout.pack(symmetry.apply(state, named_element(layout, orders)))
    assert torch.allclose(layout.permute(layout.pack(state), orders), expected)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_nested_sets_are_gains_of_the_whole_score(case):
    """Exchanging two heads gains what the matrix says, with what is inside them matched anew."""
    symmetry = CASES[case]
    layout = NetworkLayout(symmetry, bases=True)
    matching = Matching(layout, normal(1, layout.size), normal(1, layout.size, seed=1))
    orders = random_orders(layout, matching.like, torch.Generator().manual_seed(0))
    number = layout.names.index("heads")
    orders[number] = torch.arange(layout.counts[number])
    scores, inner = matching.nested_matrix(number, orders)
    now = matching.score(orders) - float(matching.score_matrix(number, orders).trace())
    for order in itertools.permutations(range(layout.counts[number])):
        trial = list(orders)
        trial[number] = torch.tensor(order)
        for i, j in enumerate(order):
            for child, inside in zip(layout.children[number][j], inner[i, j], strict=True):
                trial[child] = inside
        expected = now + sum(float(scores[i, j]) for i, j in enumerate(order))
        assert matching.score(trial) == pytest.approx(expected)


def contract(case, **options):
    symmetry = (
        attention(1, 2, 2) if case == "one head" else attention(2, 2, 2, rotary=case == "rotary")
    )
    quotient = NetworkQuotient(symmetry, basis=True, steps=5, starts=3)
    check_manifold(quotient, shape=(quotient.layout.size,), exact=False, radius=0.1, **options)


QUICK_LAWS = [
    "projections", "self_adjoint_projection", "gradient", "horizontality", "representatives",
    "gauge_invariance", "gauge_equivariance", "exp_log", "distance_to_itself", "finite_gradients",
    "hessian",
]  # fmt: skip


@pytest.mark.parametrize("case", ["heads", "rotary"])
def test_quotient_laws_hold(case):
    contract(case, laws=QUICK_LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one head", "heads", "rotary"])
def test_every_law_holds(case):
    contract(case, batch=(2,))


def test_distance_of_a_head_is_that_of_bures_and_wasserstein():
    """Of balanced factors modulo O(d), as matrices ZZᵀ; scipy's eigenvalues."""
    symmetry = attention(1, 2, 4).only("general_linear")
    quotient = NetworkQuotient(symmetry, basis=True)
    x, y = (quotient.pack(state_of(symmetry, seed)) for seed in (0, 1))
    squared = 0.0
    for rows in quotient.layout.rows_of_gauges():
        a, b = (z[rows].mT @ z[rows] for z in (x, y))
        # tr (A^½ B A^½)^½, by the eigenvalues of A B, which are those of its square
        cross = np.sqrt(scipy.linalg.eigvals(a.numpy() @ b.numpy()).real.clip(0)).sum()
        squared += float(a.trace() + b.trace()) - 2 * cross
    assert float(quotient.dist(x, y)) ** 2 == pytest.approx(squared, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_planted_bases_are_recovered(case, method):
    symmetry = CASES[case]
    state = state_of(symmetry)
    other = moved(state, symmetry, 1)
    found = align(other, to=state, symmetry=symmetry, method=method)
    assert close(found.state, state)
    assert found.distance_after < 1e-5 < found.distance_before
    plain = align(other, to=state, symmetry=symmetry, method=method, basis=False)
    assert plain.distance_after > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_heads_of_transformers_are_recovered_and_functions_stay(name):
    torch.manual_seed(0)
    model = getattr(tiny_transformers, name)().eval().double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = {"input_ids": torch.randint(30, (2, 7))}
    symmetry = symmetry_of(model, output=lambda result: result.logits, **tokens)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    copies = [moved(state, symmetry, seed) for seed in (1, 2)]
    found = align(copies[0], to=state, symmetry=symmetry, rescale=bool(positive_gauges(symmetry)))
    assert close(found.state, state)
    merged = merge_networks([state, *copies], symmetry, balance=bool(positive_gauges(symmetry)))
    assert float(merged.solution.objective) < 1e-9
    with torch.no_grad():
        expected = model(**tokens).logits
        for each in (copies[1], merged.state, *merged.aligned):
            model.load_state_dict(each)
            assert torch.allclose(model(**tokens).logits, expected, atol=1e-6)


def test_large_groups_of_queries_are_compared_as_they_stand(monkeypatch):
    """Without looking into pairs of key-value heads: the same function, and no farther away."""
    symmetry = CASES["grouped"]
    state, other = state_of(symmetry), state_of(symmetry, 1)
    deep = align(other, to=state, symmetry=symmetry)
    monkeypatch.setattr(network_matching, "COUPLED_LIMIT", 0)
    layout = NetworkLayout(symmetry, bases=True)
    matching = Matching(layout, normal(1, layout.size), normal(1, layout.size, seed=1))
    assert not matching.nested(layout.names.index("heads"))
    plain = align(other, to=state, symmetry=symmetry)
    assert plain.distance_after < plain.distance_before
    assert deep.distance_after < 1.1 * plain.distance_after
    again = moved(state, symmetry, 1)
    assert close(align(again, to=state, symmetry=symmetry).state, state)


def test_mean_of_noisy_copies_is_the_mean_in_common_bases():
    symmetry = CASES["heads"]
    quotient = NetworkQuotient(symmetry, basis=True)
    state = state_of(symmetry)
    noisy = [{n: t + 0.02 * normal(*t.shape, seed=s) for n, t in state.items()} for s in range(3)]
    common = frechet_mean(quotient, [quotient.pack(each) for each in noisy])
    hidden = frechet_mean(
        quotient, [quotient.pack(moved(n, symmetry, s)) for s, n in enumerate(noisy)]
    )
    assert float(hidden.objective) == pytest.approx(float(common.objective), rel=1e-6)
    assert bool(quotient.dist(common.point, hidden.point) < 1e-5)
    copies = [moved(n, symmetry, s) for s, n in enumerate(noisy)]
    with_bases = merge_networks(copies, symmetry)
    without = merge_networks(copies, symmetry, basis=False)
    assert float(with_bases.solution.objective) < 0.1 * float(without.solution.objective)
    for name, tensor in with_bases.state.items():
        assert torch.allclose(tensor, sum(a[name] for a in with_bases.aligned) / 3)


def test_gradient_of_the_distance_is_the_logarithm():
    symmetry = CASES["rotary"]
    quotient = NetworkQuotient(symmetry, basis=True)
    x, y = normal(2, quotient.layout.size), normal(2, quotient.layout.size, seed=1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(quotient.dist(leaf, y).square().sum(), leaf)
    assert torch.allclose(gradient, -2 * quotient.logmap(x, y))
    element = quotient.element(x[0], y[0])
    assert set(element.gauges) == {g.name for g in symmetry.gauges}
    assert set(element.permutations) == {"heads"}


def test_frank_wolfe_and_annealing_end_at_elements_of_the_group():
    layout = NetworkLayout(CASES["grouped"], bases=True)
    x, y = normal(layout.size), normal(layout.size, seed=1)
    matching = Matching(layout, x[None], y[None])
    for method in METHODS:
        orders = match_networks(matching, method=method, starts=2)
        for number, order in enumerate(orders):
            assert order.ndim == (2 if number < layout.gauges else 1)
        again = rounded(layout, [o if o.ndim == 2 else torch.eye(len(o))[o] for o in orders])
        assert all(
            torch.allclose(a.double(), o.double()) for a, o in zip(again, orders, strict=True)
        )


def test_scores_order_heads_and_weights_turn_their_bases():
    """Activation matching knows no bases inside heads; the weights turn them afterwards."""
    symmetry = CASES["heads"]
    state = state_of(symmetry)
    other = moved(state, symmetry, 1)
    plain = align(other, to=state, symmetry=symmetry)
    scores = {"heads": torch.eye(3)[plain.permutations["heads"]]}
    found = align(other, to=state, symmetry=symmetry, scores=scores)
    assert close(found.state, state)


FLAT = NetworkSymmetry((), (), {"a": (2, 2)})


@pytest.mark.parametrize(
    ("symmetry", "options", "message"),
    [
        (FLAT, {"basis": True}, "no basis to change"),
        (CASES["heads"], {"basis": True, "fisher": {}}, "one basis"),
        (CASES["heads"], {"basis": "yes"}, "'auto'"),
    ],
)
def test_bases_that_cannot_be_removed_are_named(symmetry, options, message):
    state = state_of(symmetry)
    with pytest.raises(ValueError, match=message):
        align(state, to=state, symmetry=symmetry, **options)
    with pytest.raises(ValueError, match=message):
        merge_networks([state], symmetry, **options)
    if options == {"basis": True}:
        with pytest.raises(ValueError, match=message):
            NetworkQuotient(symmetry, basis=True)


def test_what_only_was_permuted_comes_back_exactly():
    """In single precision as well: balancing and its inverse leave no rounding."""
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    symmetry = symmetry_of(model, torch.randn(5, 3))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    order = symmetry.random(torch.Generator().manual_seed(0)).permutations
    found = align(symmetry.permute(state, order), to=state, symmetry=symmetry)
    assert all(torch.equal(found.state[n], state[n]) for n in state)


def test_result_has_the_gauges_of_a_given_network():
    """Merging removes scales and bases to compare networks, and gives them back."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    symmetry = symmetry_of(model, normal(6, 3))
    assert {g.kind for g in symmetry.gauges} == {"general_linear", "positive"}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    merged = merge_networks([state], symmetry)
    assert close(merged.state, state, 1e-9)


def test_gains_of_norms_keep_their_scale_by_default():
    """Only units with weights of their own are balanced unless all are asked for."""
    norm = (Placement("norm.weight", 0), Placement("up", 1, inverse=True))
    unit = (Placement("up", 0), Placement("down", 1, inverse=True))
    gauges = (GaugeGroup("norm", "positive", 3, norm), GaugeGroup("unit", "positive", 4, unit))
    symmetry = NetworkSymmetry((), gauges, {"norm.weight": (3,), "up": (4, 3), "down": (2, 4)})
    assert [g.name for g in unit_gauges(symmetry)] == ["unit"]
    state = state_of(symmetry)
    other = symmetry.transform(state, {"unit": torch.tensor([2.0, 3.0, 0.5, 1.0]).double()})
    assert align(other, to=state, symmetry=symmetry).distance_after < 1e-5
    other = symmetry.transform(state, {"norm": torch.tensor([2.0, 3.0, 0.5]).double()})
    assert align(other, to=state, symmetry=symmetry).distance_after > 0.1
    assert align(other, to=state, symmetry=symmetry, rescale=True).distance_after < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_whole_block_after_all_others_acted(case):
    """Nothing but what a site depends on is moved, and the array is left as it was."""
    layout = NetworkLayout(CASES[case], bases=True)
    generator = torch.Generator().manual_seed(0)
    vector = normal(2, layout.size)
    hard = random_orders(layout, vector, generator)
    soft = [normal(n, n, seed=i) for i, n in enumerate(layout.counts)]
    arrays, before = layout.views(vector), vector.clone()
    memory = {}
    for orders in (hard, soft):
        for sites in layout.by_block:
            for here, site in enumerate(sites):
                for back in (False, True):
                    for skip in (None, *{s.owner for s in sites[here + 1 :]}) if back else (None,):
                        expected = arrays[site.block]
                        for other in reversed(sites[here + 1 :]) if back else sites[:here]:
                            if other.owner != skip:
                                order = orders[other.owner]
                                expected = other.act(expected, order, transpose=back)
                        found = layout.rows_after(
                            arrays[site.block], site, orders, back=back, skip=skip
                        )
                        assert torch.allclose(found, site.rows(expected))
                        if back and skip is None and site.owner < layout.gauges:
                            kept = layout.rows_of_basis(arrays[site.block], site, orders, memory)
                            assert torch.allclose(kept, found)
    assert torch.equal(vector, before)


def test_mean_of_three_ends_where_bases_no_longer_turn(caplog):
    """Bases turn in ever smaller steps: the mean is reported as found, in any order."""
    symmetry = CASES["heads"]
    for states in itertools.combinations([state_of(symmetry, i) for i in range(4)], 3):
        merged = merge_networks(states, symmetry)
        assert merged.solution.converged
        assert not caplog.records
        for name, tensor in merged.state.items():
            mean = sum(each[name] for each in merged.aligned) / 3
            assert torch.allclose(tensor, mean, atol=1e-5)
        again = merge_networks(states[::-1], symmetry)
        assert float(again.solution.objective) == pytest.approx(float(merged.solution.objective))


def test_the_mean_is_in_the_bases_of_the_longest_network():
    """Whatever the order in which networks are given; also where all keep the order of units."""
    places = (Placement("q", 0), Placement("k", 0, inverse=True))
    gauges = (GaugeGroup("head", "general_linear", 2, places),)
    symmetry = NetworkSymmetry((), gauges, {"q": (2, 5), "k": (2, 5)})
    states = [state_of(symmetry, i) for i in range(3)]
    states[1] = {name: 2 * t for name, t in states[1].items()}
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        merged = merge_networks([states[i] for i in order], symmetry)
        assert close(merged.aligned[order.index(1)], states[1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Balancing and its inverse cancel before anything is rounded."""
    symmetry = CASES["heads"]
    state = {name: t.to(dtype) for name, t in state_of(symmetry).items()}
    state["q"] = 30 * state["q"]
    merged = merge_networks([state], symmetry)
    for found in (merged.state, merged.aligned[0]):
        assert all(found[name].dtype == dtype for name in state)
        for name, tensor in state.items():
            error = (found[name].double() - tensor.double()).abs()
            assert bool((error <= torch.finfo(dtype).eps * tensor.double().abs() + 1e-6).all())
