"""FrechetAveragedModel beside torch's AveragedModel."""

import copy
import io

import geoopt
import pytest
import torch
from test_optim import model, products, train, trainable, vector
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

from manifold_merge import FrechetAveragedModel, LoRAQuotient
from manifold_merge.lora_groups import lora_pairs


class Network(nn.Module):
    """Convolution, batch normalisation and a linear layer: buffers, and nothing low-rank."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean(-1))


def run(averaged, network, steps=4):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 2, 9, generator=generator)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(network)
    return averaged


CONSTRUCTORS = {
    "default": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema, single": {"avg_fn": get_ema_avg_fn(0.8)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "own": {"avg_fn": lambda average, new, n: 0.5 * average + 0.5 * new},
    "buffers": {"use_buffers": True},
    "device": {"device": torch.device("cpu")},
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_equal_to_torch_where_all_is_euclidean(name):
    network = Network()
    pair = [
        run(kind(copy.deepcopy(network), **CONSTRUCTORS[name]), copy.deepcopy(network))
        for kind in (AveragedModel, FrechetAveragedModel)
    ]
    theirs, ours = (p.state_dict() for p in pair)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    assert int(ours["n_averaged"]) == 4


def test_batch_norm_statistics_can_be_updated():
    network = Network()
    averaged = run(FrechetAveragedModel(network), network)
    before = averaged.module.norm.running_mean.clone()
    update_bn([torch.randn(16, 2, 9) for _ in range(3)], averaged)
    assert not torch.equal(averaged.module.norm.running_mean, before)


@pytest.mark.parametrize("distance", ["chordal", "aligned", "exact"])
@pytest.mark.parametrize("geometry", ["mixed", "invariant", "embedded"])
def test_ema_steps_follow_the_geodesic(geometry, distance):
    first, second = model(1), model(1)
    for p in trainable(second).values():
        p.data += 0.05 * torch.randn_like(p)
    averaged = FrechetAveragedModel(
        first, multi_avg_fn=get_ema_multi_avg_fn(0.75), geometry=geometry, distance=distance
    )
    averaged.update_parameters(first)
    averaged.update_parameters(second)
    named = [dict(m.named_parameters()) for m in (first, second, averaged.module)]
    manifold = LoRAQuotient(12, 12, geometry)
    for name_b, name_a in lora_pairs(named[0]):
        x, y, z = (manifold.pack(n[name_b], n[name_a]).detach() for n in named)
        expected = manifold.expmap(x, 0.25 * manifold.logmap(x, y))
        step = float(manifold.relative_difference(x, y))
        # Chords and aligned representatives agree with geodesics to second order.
        limit = 1e-8 if distance == "exact" else step**2
        assert float(manifold.relative_difference(expected, z)) < limit


def test_average_of_a_training_run_is_that_of_the_products():
    """In any gauge of the run; torch's average of the factors is not."""
    network = model(1)
    adam = torch.optim.AdamW(trainable(network).values(), lr=1e-2)
    ours, theirs = FrechetAveragedModel(network), AveragedModel(network)
    turned_ours, turned_theirs = FrechetAveragedModel(network), AveragedModel(network)
    seen = []
    for step in range(8):
        train(network, adam, 1, first=step)
        turned = copy.deepcopy(network)
        named = dict(turned.named_parameters())
        for name_b, name_a in lora_pairs(named):
            gauge = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
            named[name_b].data, named[name_a].data = (
                named[name_b].data @ gauge,
                gauge.mT @ named[name_a].data,
            )
        for averaged, source in (
            (ours, network),
            (theirs, network),
            (turned_ours, turned),
            (turned_theirs, turned),
        ):
            averaged.update_parameters(source)
        seen.append(products(network))
    mean = torch.stack(seen).mean(0)
    scale = float((seen[-1] - seen[0]).norm())

    def error(averaged):
        return float((products(averaged.module) - mean).norm()) / scale

    assert error(ours) < 0.1
    assert float((products(ours.module) - products(turned_ours.module)).norm()) < 1e-8
    assert error(turned_theirs) > 10 * error(turned_ours)


def test_saved_and_loaded_in_the_middle():
    def start():
        network = model(1)
        return (
            network,
            torch.optim.AdamW(trainable(network).values(), lr=1e-2),
            (FrechetAveragedModel(network)),
        )

    def go(parts, steps, first):
        network, adam, averaged = parts
        train(network, adam, steps, lambda: averaged.update_parameters(network), first)

    whole, first, second = start(), start(), start()
    go(whole, 6, 0)
    go(first, 3, 0)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(second, 3, 3)
    assert torch.equal(vector(second[2]), vector(whole[2]))
    assert int(second[2].n_averaged) == 6


def test_manifold_parameters_stay_on_their_manifold():
    class Arrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.arrow = geoopt.ManifoldParameter(
                torch.tensor([1.0, 0.0, 0.0]), manifold=geoopt.Sphere()
            )

    network = Arrow()
    averaged = FrechetAveragedModel(network)
    averaged.update_parameters(network)
    with torch.no_grad():
        network.arrow.copy_(torch.tensor([0.0, 1.0, 0.0]))
    averaged.update_parameters(network)
    expected = torch.tensor([0.5**0.5, 0.5**0.5, 0.0])
    assert torch.allclose(averaged.module.arrow.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    network = model(1, dtype)
    averaged = FrechetAveragedModel(network)
    for _ in range(3):
        averaged.update_parameters(network)
    assert torch.allclose(products(averaged.module), products(network), rtol=0.02, atol=1e-2)
    assert next(averaged.module.parameters()).dtype == dtype


MISUSE = {
    "geometry": ({"geometry": "flat"}, "mixed, invariant, embedded"),
    "distance": ({"distance": "far"}, "exact, aligned, chordal"),
    "no average": ({"avg_fn": lambda average, new, n: average + new}, "combination"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told(case):
    options, message = MISUSE[case]
    network = model(1)

    def use():
        averaged = FrechetAveragedModel(network, **options)
        for _ in range(2):
            averaged.update_parameters(network)

    with pytest.raises(ValueError, match=message):
        use()
