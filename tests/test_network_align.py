"""Rebasing and merging state dicts: functions stay, scale goes, statistics come along."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from network_cases import NETWORKS, mlp, mlp_symmetry, random_state
from torch import nn

from manifold_merge import (
    activation_scores,
    align,
    balanced,
    merge_networks,
    reestimate_batch_norm,
    repair,
    symmetry_of,
    unit_responses,
)
from manifold_merge.network_align import fisher_channels
from manifold_merge.network_layout import NetworkLayout
from manifold_merge.network_matching import METHODS
from manifold_merge.rescaling import balance_factors, positive_gauges, rescaled

WIDTHS = (5, 8, 9, 3)
SYMMETRY = mlp_symmetry(*WIDTHS)


class ConvNet(nn.Module):
    """Convolution with batch normalisation, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def network():
    return mlp(*WIDTHS).double()


@pytest.fixture
def conv():
    model = ConvNet().double()
    with torch.no_grad():
        for tensor in model.bn.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def outputs(model, state, x):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model(x)


def shuffled(state, symmetry, seed=0):
    generator = torch.Generator().manual_seed(seed)
    orders = {s.name: torch.randperm(s.count, generator=generator) for s in symmetry.sets}
    return symmetry.permute(state, orders)


# --- align ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_rebasing_undoes_a_permutation_and_keeps_the_function(network, method):
    state = network.state_dict()
    other = {n: t + 0.01 * torch.randn_like(t) for n, t in shuffled(state, SYMMETRY).items()}
    found = align(other, to=state, symmetry=SYMMETRY, method=method)
    x = torch.randn(7, WIDTHS[0], dtype=torch.float64)
    assert torch.allclose(outputs(network, found.state, x), outputs(network, other, x))
    assert all(torch.allclose(found.state[n], state[n], atol=0.1) for n in state)
    assert found.distance_after < 0.3 < found.distance_before
    assert "moved" in str(found)


def test_rebasing_takes_running_statistics_along(conv):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    symmetry = symmetry_of(conv, x)
    state = conv.state_dict()
    other = shuffled(state, symmetry)
    found = align(other, to=state, symmetry=symmetry).state
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_rebasing_removes_scale_as_well(network):
    """A unit's scale and order hide the same network; the result has the target's scales."""
    state, gauges = network.state_dict(), positive_gauges(SYMMETRY)
    factors = [torch.exp(torch.randn(g.dimension, dtype=torch.float64)) for g in gauges]
    other = shuffled(rescaled(state, gauges, factors), SYMMETRY)
    x = torch.randn(7, WIDTHS[0], dtype=torch.float64)
    assert torch.allclose(outputs(network, other, x), network(x))
    found = align(other, to=state, symmetry=SYMMETRY, rescale=True)
    assert all(torch.allclose(found.state[n], state[n], atol=1e-5) for n in state)
    assert align(other, to=state, symmetry=SYMMETRY).distance_after < 1e-5  # the default
    assert align(other, to=state, symmetry=SYMMETRY, rescale=False).distance_after > 0.1


def test_fisher_channels_expand_the_weighted_square():
    """<φ, g ψ> is -½ Σ f (x - g y)² but for a constant, with metrics that move along."""
    layout = NetworkLayout(SYMMETRY)
    x, y = torch.randn(2, layout.size, dtype=torch.float64)
    fx, fy = torch.rand(2, layout.size, dtype=torch.float64)
    for first, second in ((fx, fy), (fx, None), (None, fy), (None, None)):
        left, right = fisher_channels(x, y, first, second)
        constants = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            orders = [torch.randperm(n, generator=generator) for n in layout.counts]
            moved = layout.permute(y, orders)
            known = [] if first is None else [first]
            if second is not None:
                known.append(layout.permute(second, orders))
            weight = sum(known) / len(known) if known else torch.ones_like(x)
            score = float((left * layout.permute(right, orders)).sum())
            constants.append(score + 0.5 * float((weight * (x - moved) ** 2).sum()))
        assert max(constants) - min(constants) < 1e-10


def test_fisher_decides_what_counts(network):
    """Units that agree where the Fisher information lies are matched, whatever the rest says."""
    state = network.state_dict()
    other = shuffled(state, SYMMETRY)
    noisy = {n: t.clone() for n, t in other.items()}
    noisy["0.weight"][:, 1:] += 30 * torch.randn_like(noisy["0.weight"][:, 1:])
    fisher = {n: torch.ones_like(t) for n, t in state.items()}
    fisher["0.weight"][:, 1:] = 1e-9
    clean = align(other, to=state, symmetry=SYMMETRY).permutations
    for options in (
        {"to_fisher": fisher},
        {"fisher": fisher},
        {"fisher": fisher, "to_fisher": fisher},
    ):
        found = align(noisy, to=state, symmetry=SYMMETRY, **options)
        assert all(torch.equal(found.permutations[k], clean[k]) for k in clean)
        assert found.distance_after < 1e-2 < found.distance_before
    plain = align(noisy, to=state, symmetry=SYMMETRY, rescale=False).permutations
    assert not torch.equal(plain["0"], clean["0"])


@pytest.mark.parametrize("kind", ["correlation", "inner"])
def test_activations_recover_a_permutation(network, conv, kind):
    for model, shape in ((network, (40, WIDTHS[0])), (conv, (10, 2, 4, 4))):
        x = torch.randn(shape, dtype=torch.float64)
        symmetry = symmetry_of(model, x)
        other = copy.deepcopy(model)
        other.load_state_dict(shuffled(model.state_dict(), symmetry))
        scores = activation_scores(other, model, symmetry, x.split(10), kind=kind)
        found = align(other.state_dict(), model.state_dict(), symmetry, scores=scores)
        state = model.state_dict()
        if kind == "correlation":
            assert all(torch.allclose(found.state[name], state[name]) for name in state)
        assert torch.allclose(outputs(model, found.state, x), model(x))
    whole = activation_scores(other, model, symmetry, [x], kind=kind)
    assert torch.allclose(whole["conv"], scores["conv"], atol=1e-5)


def test_correlations_are_pearsons(network):
    x = torch.randn(30, WIDTHS[0], dtype=torch.float64)
    other = mlp(*WIDTHS).double()
    scores = activation_scores(other, network, SYMMETRY, x.split(7))
    both = torch.cat([network[0](x), other[0](x)], 1)
    expected = torch.corrcoef(both.T)[: WIDTHS[1], WIDTHS[1] :]
    assert torch.allclose(scores["0"], expected.float(), atol=1e-5)


BAD = {
    "method": ({"method": "greedy"}, "method"),
    "no gauge": ({"rescale": True}, "no positive gauge"),
    "set missing": ({"scores": {}}, "is missing"),
    "size": ({"scores": {"channels": torch.zeros(2, 2)}}, "expected"),
    "both": ({"scores": {}, "fisher": {}}, "leave one out"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradicting_options_are_named(case):
    options, message = BAD[case]
    symmetry = NETWORKS["flattened channels"]
    state = random_state(symmetry)
    with pytest.raises(ValueError, match=message):
        align(state, to=state, symmetry=symmetry, **options)


def test_networks_that_do_not_fit_are_named(network):
    state = network.state_dict()
    with pytest.raises(ValueError, match=r"0\.weight has shape"):
        align(state, to=mlp(6, 8, 9, 3).double().state_dict(), symmetry=SYMMETRY)
    broken = {**state, "0.bias": state["0.bias"].clone()}
    broken["0.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"state: 0\.bias has 1 entries"):
        align(broken, to=state, symmetry=SYMMETRY)


# --- scale ----------------------------------------------------------------------------------------


def test_balanced_networks_are_equal_in_and_out_and_shortest(network):
    state = network.state_dict()
    new = balanced(state, SYMMETRY)
    x = torch.randn(7, WIDTHS[0], dtype=torch.float64)
    assert torch.allclose(outputs(network, new, x), network(x))
    for i in (0, 2):
        ins = new[f"{i}.weight"].square().sum(1) + new[f"{i}.bias"].square()
        outs = new[f"{i + 2}.weight"].square().sum(0)
        assert torch.allclose(ins, outs, rtol=1e-4)
    gauges = positive_gauges(SYMMETRY)

    def size(s):
        return sum(float(t.square().sum()) for t in s.values())

    assert size(new) < size(state)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        factors = [
            torch.exp(0.1 * torch.randn(g.dimension, dtype=torch.float64, generator=generator))
            for g in gauges
        ]
        moved = rescaled(new, gauges, factors)
        assert size(moved) > size(new)
        again = balanced(rescaled(state, gauges, factors), SYMMETRY)
        assert all(torch.allclose(again[n], new[n], rtol=1e-4, atol=1e-7) for n in new)


def test_dead_units_keep_their_scale(network):
    state = network.state_dict()
    state["0.weight"][3] = 0.0
    state["0.bias"][3] = 0.0
    factors = balance_factors(state, positive_gauges(SYMMETRY))
    assert float(factors[0][3]) == 1.0
    assert all(bool(f.isfinite().all()) for f in factors)


# --- merges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [False, True])
def test_copies_merge_to_themselves(network, balance):
    state = network.state_dict()
    copies = [shuffled(state, SYMMETRY, seed) for seed in range(3)]
    merged = merge_networks(copies, SYMMETRY, balance=balance)
    x = torch.randn(7, WIDTHS[0], dtype=torch.float64)
    assert torch.allclose(outputs(network, merged.state, x), network(x))
    assert float(merged.solution.objective) < 1e-10


def test_merges_average_statistics_in_order_and_keep_counters(conv):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    symmetry = symmetry_of(conv, x)
    states = [shuffled(conv.state_dict(), symmetry, seed) for seed in range(2)]
    noisy = [
        {n: t + 0.01 * torch.rand_like(t) if t.is_floating_point() else t for n, t in s.items()}
        for s in states
    ]
    merged = merge_networks(noisy, symmetry, [3, 1])
    assert list(merged.state) == list(noisy[0])
    for name in ("bn.running_mean", "bn.running_var", "conv.weight"):
        mean = 0.75 * merged.aligned[0][name] + 0.25 * merged.aligned[1][name]
        assert torch.allclose(merged.state[name], mean)
    assert merged.state["bn.num_batches_tracked"].dtype == torch.long
    for aligned, given, orders in zip(merged.aligned, noisy, merged.permutations, strict=True):
        assert torch.allclose(outputs(conv, aligned, x), outputs(conv, given, x))
        again = symmetry.permute(given, orders)
        assert all(torch.equal(again[n], aligned[n]) for n in again)


def test_alignments_of_a_merge_are_cycle_consistent(network):
    """Going from one network to the next and around brings every unit home: g₁₂ g₂₃ g₃₁ = 1."""
    states = [mlp(*WIDTHS).double().state_dict() for _ in range(3)]
    merged = merge_networks(states, SYMMETRY)
    assert repr(merged).startswith(f"NetworkMerge(networks: {len(states)}; tensors: ")
    assert "status: converged" in repr(merged)
    assert "tensor(" not in repr(merged)
    for each in SYMMETRY.sets:
        to_mean = [p[each.name] for p in merged.permutations]
        cycle = torch.arange(each.count)
        for i, j in itertools.pairwise((0, 1, 2, 0)):
            cycle = to_mean[j][to_mean[i].argsort()[cycle]]
        assert torch.equal(cycle, torch.arange(each.count))


def test_merges_of_half_precision_and_of_shared_tensors():
    """The mean is taken in single precision; a tensor with two names is moved and kept once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.up, self.down = nn.Linear(5, 9), nn.Linear(9, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            return self.head(h + self.down(torch.relu(self.up(h))))

    model, x = Tied(), torch.arange(7)[None]
    symmetry = symmetry_of(model, x)
    state = model.state_dict()
    copies = [shuffled(state, symmetry, seed) for seed in range(2)]
    merged = merge_networks(copies, symmetry).state
    assert torch.equal(merged["head.weight"], merged["embed.weight"])
    assert torch.allclose(outputs(model, merged, x), model(x), atol=1e-5)
    half = merge_networks([{n: t.half() for n, t in c.items()} for c in copies], symmetry)
    assert {t.dtype for t in half.state.values()} == {torch.float16}
    assert all(torch.allclose(half.state[n].float(), merged[n], atol=1e-2) for n in merged)


def test_one_network_is_its_own_mean(network):
    state = network.state_dict()
    merged = merge_networks([state], SYMMETRY, balance=False)
    assert all(torch.equal(merged.state[n], state[n]) for n in state)
    merged = merge_networks([state], SYMMETRY)  # there and back again
    assert all(torch.allclose(merged.state[n], state[n]) for n in state)
    with pytest.raises(ValueError, match="at least one"):
        merge_networks([], SYMMETRY)
    with pytest.raises(ValueError, match=r"states\[0\]: .* pass network\.state_dict\(\)"):
        merge_networks([network], SYMMETRY)


def test_weights_choose_between_networks(network):
    states = [mlp(*WIDTHS).double().state_dict() for _ in range(2)]
    merged = merge_networks(states, SYMMETRY, [1, 0], balance=False)
    assert all(torch.equal(merged.state[n], states[0][n]) for n in states[0])
    assert len(merged.aligned) == 2
    metric = {n: torch.ones_like(t) for n, t in states[0].items()}
    plain = merge_networks(states, SYMMETRY, balance=False)
    same = merge_networks(states, SYMMETRY, fisher=metric)
    assert float(plain.solution.objective) == pytest.approx(float(same.solution.objective))


# --- data repairs what averaging does -------------------------------------------------------------


def test_statistics_are_those_of_the_data(conv):
    x = torch.randn(20, 2, 4, 4, dtype=torch.float64)
    training = copy.deepcopy(conv).train()
    weights = {n: t.clone() for n, t in training.state_dict().items() if "running" not in n}
    assert reestimate_batch_norm(training, [x]) == 1
    rows = conv.conv(x)
    assert torch.allclose(training.bn.running_mean, rows.mean((0, 2, 3)))
    assert torch.allclose(training.bn.running_var, rows.var((0, 2, 3)))
    assert training.training
    assert training.bn.training
    assert training.bn.momentum == 0.1
    kept = training.state_dict()
    assert all(torch.equal(kept[n], t) for n, t in weights.items() if "tracked" not in n)
    before = training.bn.running_mean.clone()
    with pytest.raises(ValueError, match="empty"):
        reestimate_batch_norm(training, [])
    assert torch.equal(training.bn.running_mean, before)
    with pytest.raises(ValueError, match="no batch normalisation"):
        reestimate_batch_norm(nn.Linear(2, 2), [x])


def moments(layer, rows):
    values = layer(rows)
    return values.mean(0), values.std(0, unbiased=False)


def test_repair_gives_units_their_mean_and_spread(network):
    x = torch.randn(400, WIDTHS[0], dtype=torch.float64)
    other = mlp(*WIDTHS).double()
    merged = copy.deepcopy(network)
    merged.load_state_dict(
        {n: 0.75 * t + 0.25 * other.state_dict()[n] for n, t in network.state_dict().items()}
    )
    assert repair(merged, [network, other], [x], [3, 1]) == 2
    for depth in (1, 3):
        goals = [moments(model[:depth], x) for model in (network, other)]
        found = moments(merged[:depth], x)
        for part in (0, 1):
            goal = 0.75 * goals[0][part] + 0.25 * goals[1][part]
            assert torch.allclose(found[part], goal, atol=1e-6)


def test_repair_of_one_network_by_itself_changes_nothing(network, conv):
    for model, shape in ((network, (50, WIDTHS[0])), (conv, (50, 2, 4, 4))):
        x = torch.randn(shape, dtype=torch.float64)
        again = copy.deepcopy(model)
        if model is conv:
            reestimate_batch_norm(again, [x])
        state = copy.deepcopy(again.state_dict())
        repair(again, [copy.deepcopy(again)], [x])
        for name, tensor in again.state_dict().items():
            assert torch.allclose(tensor, state[name], atol=1e-6), name


def test_layers_that_cannot_be_repaired_are_named(network, conv):
    x = torch.randn(5, WIDTHS[0], dtype=torch.float64)
    with pytest.raises(ValueError, match="'9'"):
        repair(network, [network], [x], modules=["9"])
    with pytest.raises(ValueError, match="no bias"):
        repair(conv, [conv], [x], modules=["conv"])
    with pytest.raises(ValueError, match="references"):
        repair(network, [], [x])
    with pytest.raises(ValueError, match="batches"):
        repair(network, [network], [])


def test_responses_are_correlations_and_decide_where_weights_do_not(network, conv):
    x = torch.randn(30, WIDTHS[0], dtype=torch.float64)
    other = mlp(*WIDTHS).double()
    both = [unit_responses(m, SYMMETRY, x.split(10)) for m in (network, other)]
    scores = activation_scores(other, network, SYMMETRY, [x])
    for name in scores:
        assert torch.allclose((both[0][name] @ both[1][name].mT).float(), scores[name], atol=1e-5)
    thin = unit_responses(network, SYMMETRY, [x], samples=12)
    assert thin["0"].shape == (WIDTHS[1], 12)
    # The same function in other weights: a permuted copy whose weights are drowned in noise.
    state = network.state_dict()
    moved = shuffled(state, SYMMETRY)
    twin = mlp(*WIDTHS).double()
    twin.load_state_dict(moved)
    seen = [unit_responses(m, SYMMETRY, [x]) for m in (network, twin)]
    noisy = {n: t + 3 * torch.randn_like(t) for n, t in moved.items()}
    merged = merge_networks([state, noisy], SYMMETRY, responses=seen, response_scale=1e4)
    clean = merge_networks([state, moved], SYMMETRY)
    for each in SYMMETRY.sets:
        relative = [
            m.permutations[1][each.name][m.permutations[0][each.name].argsort()]
            for m in (merged, clean)
        ]
        assert torch.equal(*relative)
    assert list(merged.state) == list(state)
    assert {n: t.shape for n, t in merged.state.items()} == {n: t.shape for n, t in state.items()}
    with pytest.raises(ValueError, match="responses"):
        merge_networks([state, noisy], SYMMETRY, responses=seen[:1])
