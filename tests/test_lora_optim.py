"""geoopt's optimisers and PEFT's preconditioner on LoRAQuotient."""

import geoopt
import pytest
import torch

from manifold_merge import LoRAQuotient, frechet_mean

M, N, R = 10, 8, 3


def regression(manifold, start, optimiser, steps=100):
    """Fit W X = Y by low-rank W; returns the products and the losses along the way."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(N, 40, generator=generator, dtype=torch.float64)
    target = manifold.product(manifold.random(M + N, R, generator=generator, dtype=torch.float64))
    outputs = target @ inputs
    point = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = optimiser([point])
    products, losses = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (manifold.product(point) @ inputs - outputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        products.append(manifold.product(point.detach()))
    return torch.stack(products), losses


# Steps are lengths in the metric, whose units differ: the invariant metric has none.
OPTIMISERS = {
    ("adam", "mixed"): lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    ("adam", "embedded"): lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    ("adam", "invariant"): lambda p: geoopt.optim.RiemannianAdam(p, lr=0.02),
    ("sgd", "mixed"): lambda p: geoopt.optim.RiemannianSGD(p, lr=1.0),
    ("sgd", "embedded"): lambda p: geoopt.optim.RiemannianSGD(p, lr=1.0),
    ("sgd", "invariant"): lambda p: geoopt.optim.RiemannianSGD(p, lr=0.002),
}


@pytest.mark.parametrize("condition", [10.0, 1e3])
@pytest.mark.parametrize(("name", "metric"), OPTIMISERS)
def test_two_gauges_of_one_start_train_alike(name, metric, condition):
    manifold = LoRAQuotient(M, N, metric)
    generator = torch.Generator().manual_seed(1)
    start = manifold.random(M + N, R, generator=generator, dtype=torch.float64)
    other = manifold.random_representative(start, condition=condition, generator=generator)
    optimiser = OPTIMISERS[name, metric]
    one, losses = regression(manifold, start, optimiser)
    two, _ = regression(manifold, other, optimiser)
    assert losses[-1] < 0.5 * losses[0]
    assert float((one[-1] - two[-1]).norm() / one[-1].norm()) <= 1e-8


def test_entrywise_adam_depends_on_the_gauge():
    """The counter-example: torch's Adam on the factors, from two gauges of one start."""
    manifold = LoRAQuotient(M, N)
    start = manifold.random(M + N, R, dtype=torch.float64)
    other = manifold.random_representative(start, condition=10.0)
    one, two = (
        regression(manifold, x, lambda p: torch.optim.Adam(p, lr=0.05), steps=20)[0]
        for x in (start, other)
    )
    assert float((one[-1] - two[-1]).norm() / one[-1].norm()) > 1e-2


def test_mixed_gradient_is_pefts_preconditioner():
    """create_riemannian_optimizer with its regulariser -> 0 computes egrad2rgrad."""
    from peft.optimizers.riemannian import _RiemannianPreconditioner

    manifold = LoRAQuotient(M, N, "mixed")
    b = torch.randn(M, R, dtype=torch.float64, requires_grad=True)
    a = torch.randn(R, N, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(M, N, dtype=torch.float64)
    loss = torch.sin(b @ a * weight).sum()
    loss.backward()
    point = manifold.pack(b.detach(), a.detach())
    ours = manifold.egrad2rgrad(point, manifold.pack(b.grad, a.grad))
    _RiemannianPreconditioner([(a, b)], reg=0.0).step()
    theirs = manifold.pack(b.grad, a.grad)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "mean"), [("mixed", 3.5), ("invariant", 10**0.5), ("embedded", 3.5)]
)
def test_toy_of_the_paper(metric, mean):
    """m = n = r = 1, products 2 and 5: arithmetic mean in the mixed metric, geometric invariant."""
    manifold = LoRAQuotient(1, 1, metric)
    points = torch.tensor([[[2.0], [1.0]], [[0.5], [10.0]]], dtype=torch.float64)
    solution = frechet_mean(manifold, points)
    assert solution.converged
    assert float(manifold.product(solution.point)) == pytest.approx(mean, rel=1e-13)
    if metric == "mixed":
        distance = float(manifold.dist(points[0], points[1]))
        assert distance == pytest.approx(3 / 2**0.5, rel=1e-10)
