"""Gradients through frechet_mean against finite differences."""

import geoopt
import pytest
import torch
from frechet_cases import CASES, GEOOPT, SEARCHED, Case, cloud, names, tangent
from torch import nn

from manifold_merge import LoRAQuotient, frechet_mean
from manifold_merge.accurate import accurate

WEIGHTS = torch.tensor([1.0, 1.2, 1.5, 0.7], dtype=torch.float64)
HELD = torch.tensor([1.0, 1.0, 8.0, 0.7], dtype=torch.float64)  # outweighs the other three


def loss(case, x):
    if hasattr(case.manifold, "product"):
        x = case.manifold.product(x)
    weight = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    return (x * weight).sum() + 0.1 * x.square().sum()


def compare(name, weights, p, batch=(2,), step=1e-4, **options):
    """Directional derivative by autograd, and by a difference of order four."""
    case = CASES[name]
    m = accurate(case.manifold)
    points = cloud(case, 4, *batch, seed=2, radius=0.4)
    directions = torch.stack([tangent(case, y) for y in points])
    change = torch.randn(4, dtype=torch.float64)

    def moved(t):
        return torch.stack([m.expmap(y, t * u) for y, u in zip(points, directions, strict=True)])

    def value(t):
        mean = frechet_mean(case.manifold, moved(t), weights + t * change, p=p, **options)
        return float(loss(case, mean.point))

    leaf, w = points.clone().requires_grad_(), weights.clone().requires_grad_()
    result = loss(case, frechet_mean(case.manifold, leaf, w, p=p, **options).point)
    by_points, by_weights = torch.autograd.grad(result, (leaf, w))
    velocity = (moved(1e-5) - moved(-1e-5)) / 2e-5
    found = float((by_points * velocity).sum() + (by_weights * change).sum())
    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return found, (8 * near - far) / (12 * step)


@pytest.mark.parametrize(
    "name",
    [
        *names(searched=False),
        "Stiefel",
        *(pytest.param(n, marks=pytest.mark.slow) for n in SEARCHED if n != "Stiefel"),
    ],
)
def test_gradient_of_the_mean(name):
    batch = () if "exact" in name or name in ("Polar", "Stiefel") else (2,)
    found, expected = compare(name, WEIGHTS, 2, batch, tolerance=1e-11)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("weights", [WEIGHTS, HELD], ids=["between", "on an anchor"])
@pytest.mark.parametrize(
    "name", ["Euclidean", "Sphere", "SPD", "PoincareBall", "Lorentz", "LoRA(embedded, chordal)"]
)
def test_gradient_of_the_median(name, weights):
    found, expected = compare(name, weights, 1, max_iterations=2000)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("solver", ["trust_region", geoopt.optim.RiemannianSGD])
def test_any_solver_may_find_the_mean(solver):
    found, expected = compare("PoincareBall", WEIGHTS, 2, solver=solver, tolerance=1e-11)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_euclidean_mean_has_the_obvious_gradient():
    points = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mean = frechet_mean(geoopt.Euclidean(1), points, [1, 2, 1]).point
    (grad,) = torch.autograd.grad(mean.sum(), points)
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert torch.allclose(grad, weights[:, None].expand(3, 4), atol=1e-9)


def test_batches_do_not_mix():
    case = GEOOPT["SPD"]
    points = cloud(case, 3, 2).requires_grad_()
    mean = frechet_mean(case.manifold, points).point
    (grad,) = torch.autograd.grad(mean[0].sum(), points)
    assert float(grad[:, 0].abs().min()) > 0
    assert float(grad[:, 1].abs().max()) == 0


def test_weights_for_each_batch_element():
    case = GEOOPT["Sphere"]
    points = cloud(case, 3, 2)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: frechet_mean(case.manifold, points, w, tolerance=1e-12).point, weights
    )


def test_common_weights_add_up_over_the_batch():
    case = GEOOPT["Sphere"]
    points = cloud(case, 3, 2)
    common = torch.rand(3, dtype=torch.float64, requires_grad=True)
    each = common.detach()[:, None].expand(3, 2).clone().requires_grad_()
    grads = [
        torch.autograd.grad(frechet_mean(case.manifold, points, w).point.sum(), w)[0]
        for w in (common, each)
    ]
    assert torch.allclose(grads[0], grads[1].sum(1), atol=1e-9)


class Attention(nn.Module):
    """Positive definite matrices, averaged with learnt weights."""

    def __init__(self, count):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, points):
        weights = torch.softmax(self.scores, 0)
        return frechet_mean(geoopt.SymmetricPositiveDefinite(), points, weights).point


def test_a_module_learns_its_weights():
    points = cloud(GEOOPT["SPD"], 3, 4, radius=1.0)
    target = frechet_mean(geoopt.SymmetricPositiveDefinite(), points, [0.7, 0.2, 0.1]).point
    module = Attention(3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        (module(points) - target).square().sum().backward()
        optimizer.step()
    learnt = torch.softmax(module.scores, 0).tolist()
    assert learnt == pytest.approx([0.7, 0.2, 0.1], abs=0.01)


def test_float32_and_lists():
    case = GEOOPT["PoincareBall"]
    points = [x.float().requires_grad_() for x in cloud(case, 3)]
    frechet_mean(case.manifold, points).point.sum().backward()
    wide = [x.detach().double().requires_grad_() for x in points]
    frechet_mean(case.manifold, wide).point.sum().backward()
    for x, y in zip(points, wide, strict=True):
        assert x.grad.dtype == torch.float32
        assert torch.allclose(x.grad.double(), y.grad, atol=1e-4)


def test_nothing_is_recorded_without_need():
    case = GEOOPT["SPD"]
    points = cloud(case, 3)
    assert not frechet_mean(case.manifold, points).point.requires_grad
    with torch.no_grad():
        assert not frechet_mean(case.manifold, points.requires_grad_()).point.requires_grad


PAIRS = cloud(Case(LoRAQuotient(5, 4), (9, 2)), 2)

MISUSE = {
    "aligned": (LoRAQuotient(5, 4, distance="aligned"), [*PAIRS], {}, "exact"),
    "rank": (LoRAQuotient(5, 4, distance="chordal"), [*PAIRS], {"rank": 1}, "rank="),
    "ranks": (
        LoRAQuotient(5, 4, distance="chordal"),
        [PAIRS[0], PAIRS[1][:, :1]],
        {},
        "different ranks",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told(case):
    manifold, points, options, message = MISUSE[case]
    points = [x.clone().requires_grad_() for x in points]
    with pytest.raises(NotImplementedError, match=message):
        frechet_mean(manifold, points, **options)
    with torch.no_grad():
        frechet_mean(manifold, points, **options)


def test_the_gradient_can_be_taken_once():
    points = cloud(GEOOPT["Sphere"], 3).requires_grad_()
    mean = frechet_mean(geoopt.Sphere(), points).point
    (grad,) = torch.autograd.grad(mean.sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()
