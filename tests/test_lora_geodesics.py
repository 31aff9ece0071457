"""Exponentials, logarithms and distances of LoRAQuotient against closed forms and slow oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from lora_oracles import (
    DISTANCES,
    METRICS,
    dense_horizontal,
    dense_inner,
    differential,
    draw,
    injectivity_bound,
    near,
    product,
    rank_one_distance,
    regauge,
    relative_gap,
    tangent_projection,
)
from torch import Tensor

from manifold_merge import LoRAQuotient, lora_metrics
from manifold_merge.checks import log_log_slope
from manifold_merge.lora import EXACT

FLOAT64 = torch.float64
EVERY_METRIC = pytest.mark.parametrize("metric", METRICS)
INTEGRATED = pytest.mark.parametrize("metric", ["mixed", "embedded"])
EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)
# (m, n, r): r below m/2, above it, equal to one or both of m and n.
SHAPES = ((6, 5, 2), (3, 5, 3), (3, 4, 2), (3, 3, 3), (20, 12, 8), (1, 1, 1))


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare arrays relative to the largest entry."""
    scale = float(expected.abs().amax())
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * scale)


def tangent(manifold: LoRAQuotient, x: Tensor, length: Tensor | float, seed: int = 5) -> Tensor:
    """Draw horizontal vectors of the given length, by the dense definitions."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    u = torch.stack([dense_horizontal(manifold, p, v) for p, v in zip(x, u, strict=True)])
    size = dense_inner(manifold, x, u, u).sqrt()
    return u * (length / size)[:, None, None]


# --- exponential and logarithm invert each other --------------------------------------------------


@EVERY_METRIC
@pytest.mark.parametrize(("m", "n", "r"), SHAPES, ids=str)
def test_exponential_and_logarithm_invert_each_other(metric, m, n, r):
    manifold = LoRAQuotient(m, n, metric)
    count = 8
    x = regauge(manifold, draw(m, n, count, r), condition=20)
    reach = torch.linspace(0.02, 0.9, count, dtype=FLOAT64)
    if metric == "invariant":
        reach = reach * 0.8
    length = reach * injectivity_bound(manifold, x)
    u = tangent(manifold, x, length)
    y = regauge(manifold, manifold.expmap(x, u), condition=20, seed=1)
    assert manifold.log_path(x, y).tolist() == [EXACT] * count
    log = manifold.logmap(x, y)
    error = dense_inner(manifold, x, log - u, log - u).sqrt() / length
    assert float(error.max()) < 1e-8
    close(manifold.dist(x, y) / length, torch.ones_like(length), 1e-9)
    close(manifold.dist(y, x) / length, torch.ones_like(length), 1e-9)
    assert relative_gap(manifold, manifold.expmap(x, log), y) < 1e-9


# --- rank 1: cones and products of spheres, in closed form ----------------------------------------


@EVERY_METRIC
@pytest.mark.parametrize(("m", "n"), [(5, 4), (1, 4), (3, 1)], ids=str)
def test_rank_one_within_the_injectivity_radius(metric, m, n):
    manifold = LoRAQuotient(m, n, metric)
    count = 60
    x = draw(m, n, count, 1)
    reach = torch.linspace(0.1, 0.9, count, dtype=FLOAT64)
    if metric == "invariant":
        reach = 1.4 * reach
    length = reach * injectivity_bound(manifold, x)
    y = manifold.expmap(x, tangent(manifold, x, length))
    wanted, attained = rank_one_distance(manifold, x, y)
    assert bool(attained.all())
    close(wanted / length, torch.ones_like(length), 1e-9)  # the exponential travels that far
    path = manifold.log_path(x, y)
    assert float((path == EXACT).double().mean()) == 1.0
    close(manifold.dist(x, y) / wanted, torch.ones_like(length), 1e-9)


@EVERY_METRIC
def test_rank_one_anywhere_is_never_shorter_than_the_truth(metric):
    """Far points: what shooting finds is the shortest geodesic, else the path code says chordal."""
    manifold = LoRAQuotient(5, 4, metric)
    x, y = draw(5, 4, 40, 1), draw(5, 4, 40, 1, seed=1)
    wanted, _ = rank_one_distance(manifold, x, y)
    found, path = manifold.dist(x, y), manifold.log_path(x, y)
    exact = path == EXACT
    assert int(exact.sum()) >= 8
    close((found / wanted)[exact], torch.ones(int(exact.sum()), dtype=FLOAT64), 1e-8)
    assert bool(found.isfinite().all())


# --- diagonal matrices: a flat, totally geodesic part ---------------------------------------------


def diagonal(values: Tensor, m: int, n: int, flip: int = 1) -> Tensor:
    """Points with W = diag(values), (..., m + n, r)."""
    r = values.shape[-1]
    root = values.abs().sqrt()
    b, a = (
        torch.zeros(*values.shape[:-1], m, r).double(),
        torch.zeros(*values.shape[:-1], n, r).double(),
    )
    b[..., range(r), range(r)] = values.sign() * root
    a[..., range(r), range(r)] = root
    return torch.cat((b, a), -2)


FLAT = {
    "mixed": lambda s: s / math.sqrt(2),
    "invariant": lambda s: s.log() / math.sqrt(2),
    "embedded": lambda s: s,
}
UNFLAT = {
    "mixed": lambda t: t * math.sqrt(2),
    "invariant": lambda t: (t * math.sqrt(2)).exp(),
    "embedded": lambda t: t,
}


@EVERY_METRIC
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (2, 2, 2), (4, 3, 2), (3, 3, 3)], ids=str)
def test_diagonal_matrices_are_flat(metric, m, n, r):
    manifold = LoRAQuotient(m, n, metric)
    values, target = 1 + torch.rand(2, 6, r, dtype=FLOAT64)
    x = regauge(manifold, diagonal(values, m, n), condition=5)
    y = regauge(manifold, diagonal(target, m, n), condition=5, seed=1)
    start, end = FLAT[metric](values), FLAT[metric](target)
    close(manifold.dist(x, y), (start - end).norm(dim=-1), 1e-10)
    log = manifold.logmap(x, y)
    for t in (0.25, 0.5, 1.0):
        between = UNFLAT[metric]((1 - t) * start + t * end)
        close(
            product(manifold, manifold.expmap(x, t * log)),
            product(manifold, diagonal(between, m, n)),
            1e-10,
        )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_square_full_rank_embedded_is_euclidean(size):
    manifold = LoRAQuotient(size, size, "embedded")
    x = draw(size, size, 5, size)
    dw = 0.2 * torch.randn(5, size, size, dtype=FLOAT64)
    b, a = x[:, :size], x[:, size:]
    # Any lift of dW will do: B moves by dW A⁻ᵀ.
    u = manifold.proju(
        x, torch.cat((torch.linalg.solve(a.mT, dw, left=False), torch.zeros_like(a)), -2)
    )
    close(differential(manifold, x, u), dw, 1e-10)
    y = manifold.expmap(x, u)
    close(product(manifold, y), b @ a.mT + dw, 1e-10)
    close(manifold.dist(x, y), dw.norm(dim=(-2, -1)), 1e-10)


# --- geodesics of the total metric, from its Euler-Lagrange equation ------------------------------


def euler_lagrange(manifold: LoRAQuotient, x: Tensor, u: Tensor, t: float) -> Tensor:
    """Integrate the geodesic of the dense metric on pairs with SciPy; derivatives by autograd.

    A geodesic of the total space that starts horizontal stays so, and is one of the quotient.
    """
    shape, count = x.shape, x.numel()

    def energy(q: Tensor, v: Tensor) -> Tensor:
        return 0.5 * dense_inner(manifold, q.reshape(shape), v.reshape(shape), v.reshape(shape))

    momentum = torch.func.grad(energy, 1)

    def acceleration(_: float, state: np.ndarray) -> np.ndarray:
        q, v = torch.from_numpy(state).split(count)
        mass = torch.func.jacrev(momentum, 1)(q, v)
        _, drift = torch.func.jvp(lambda q: momentum(q, v), (q,), (v,))
        force = torch.func.grad(energy, 0)(q, v) - drift
        return torch.cat((v, torch.linalg.solve(mass, force))).numpy()

    start = torch.cat((x.flatten(), u.flatten())).numpy()
    solution = scipy.integrate.solve_ivp(
        acceleration, (0, t), start, method="DOP853", rtol=1e-11, atol=1e-12
    )
    return torch.from_numpy(solution.y[:count, -1]).reshape(shape)


@pytest.mark.parametrize("metric", ["mixed", "invariant"])
@pytest.mark.parametrize(("m", "n", "r"), [(3, 2, 2), (2, 3, 1), (4, 3, 2)], ids=str)
def test_exponential_solves_the_euler_lagrange_equation(metric, m, n, r):
    manifold = LoRAQuotient(m, n, metric)
    x = draw(m, n, 1, r)
    u = tangent(manifold, x, 0.8 * injectivity_bound(manifold, x))
    wanted = euler_lagrange(manifold, x[0], u[0], 1.0)
    close(manifold.expmap(x, u)[0], wanted, 1e-8)  # the same curve, gauge included


def curve_derivatives(
    manifold: LoRAQuotient, x: Tensor, u: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """First and second derivative of the dense W(t) along a geodesic, by nine-point differences."""
    h = 0.02
    w = {k: product(manifold, manifold.expmap(x, (t + k * h) * u)) for k in range(-4, 5)}
    first = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
    second = {1: 8 / 5, 2: -1 / 5, 3: 8 / 315, 4: -1 / 560}
    velocity = sum(c * (w[k] - w[-k]) for k, c in first.items()) / h
    bend = (sum(c * (w[k] + w[-k]) for k, c in second.items()) - 205 / 72 * w[0]) / h**2
    return velocity, bend


@pytest.mark.parametrize(("m", "n", "r"), [(6, 5, 2), (3, 4, 2), (4, 4, 3)], ids=str)
def test_embedded_geodesics_have_no_tangential_acceleration(m, n, r):
    manifold = LoRAQuotient(m, n, "embedded")
    x = draw(m, n, 3, r)
    length = 0.7 * injectivity_bound(manifold, x)
    u = tangent(manifold, x, length)
    for t in (0.1, 0.5, 0.9):
        velocity, bend = curve_derivatives(manifold, x, u, t)
        close(velocity.norm(dim=(-2, -1)), length, 1e-8)
        y = manifold.expmap(x, t * u)
        assert float(bend.norm()) > 0.01
        assert float(tangent_projection(manifold, y, bend).norm() / bend.norm()) < 1e-6


@EVERY_METRIC
@pytest.mark.parametrize(("m", "n", "r"), [(6, 5, 2), (3, 5, 3)], ids=str)
def test_geodesics_have_constant_speed_and_stay_horizontal(metric, m, n, r):
    manifold = LoRAQuotient(m, n, metric)
    x = draw(m, n, 3, r)
    length = 0.8 * injectivity_bound(manifold, x)
    u, h = tangent(manifold, x, length), 0.01
    stencil = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
    for t in (0.0, 0.4, 1.0):
        y = manifold.expmap(x, t * u)
        velocity = (
            sum(
                c * (manifold.expmap(x, (t + k * h) * u) - manifold.expmap(x, (t - k * h) * u))
                for k, c in stencil.items()
            )
            / h
        )
        close(dense_inner(manifold, y, velocity, velocity).sqrt(), length, 1e-9)
        for point, v in zip(y, velocity, strict=True):
            close(dense_horizontal(manifold, point, v), v, 1e-8)


@EVERY_METRIC
def test_no_perturbed_path_is_shorter(metric):
    """The distance is a minimum over paths, not only a critical value."""
    manifold = LoRAQuotient(4, 3, metric)
    x = draw(4, 3, 1, 2)[0]
    y = near(x, 0.2)
    y = manifold.expmap(x, manifold.logmap(x, y))
    distance, log = manifold.dist(x, y), manifold.logmap(x, y)
    nodes, weights = (torch.from_numpy(z) for z in np.polynomial.legendre.leggauss(20))
    t = (0.5 * (nodes + 1))[:, None, None]
    straight = torch.stack([manifold.expmap(x, float(s) * log) for s in t])
    ends = (
        torch.stack(
            [
                manifold.expmap(x, (float(s) + 1e-4) * log)
                - manifold.expmap(x, (float(s) - 1e-4) * log)
                for s in t
            ]
        )
        / 2e-4
    )

    def length(amount: float, bump: Tensor) -> float:
        path = straight + amount * torch.sin(math.pi * t) * bump
        velocity = ends + amount * math.pi * torch.cos(math.pi * t) * bump
        # The part along the class costs nothing in the quotient.
        level = torch.stack(
            [dense_horizontal(manifold, p, v) for p, v in zip(path, velocity, strict=True)]
        )
        return float((0.5 * weights * dense_inner(manifold, path, level, level).sqrt()).sum())

    assert length(0.0, torch.zeros_like(x)) == pytest.approx(float(distance), rel=1e-6)
    for seed in range(6):
        for amount in (0.02, 0.1):
            assert length(amount, draw(4, 3, 2, seed=seed)) > float(distance) * (1 - 1e-7)


# --- symmetries of the geometry -------------------------------------------------------------------


@EVERY_METRIC
@EVERY_DISTANCE
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_distance_and_logarithm_in_any_gauge(metric, distance, condition):
    manifold = LoRAQuotient(6, 5, metric, distance)
    x = draw(6, 5, 3, 2)
    y = near(x, 0.1)
    gauge = manifold.random_gauge(x, condition=condition)
    moved = gauge(x), regauge(manifold, y, condition)
    close(manifold.dist(*moved), manifold.dist(x, y), 1e-8)
    assert torch.equal(manifold.log_path(*moved), manifold.log_path(x, y))
    log, wanted = manifold.logmap(*moved), gauge(manifold.logmap(x, y))
    # Tangent vectors meet the inverses of Gram matrices, whose condition is the gauge's squared.
    tolerance = max(1e-9, 1e-13 * condition**2)
    gap = dense_inner(manifold, moved[0], log - wanted, log - wanted).sqrt()
    assert float((gap / manifold.dist(x, y)).max()) < tolerance
    step = manifold.expmap(moved[0], wanted)
    assert relative_gap(manifold, manifold.expmap(x, manifold.logmap(x, y)), step) < tolerance


@EVERY_METRIC
@EVERY_DISTANCE
def test_rotations_transposition_and_scale(metric, distance):
    manifold = LoRAQuotient(6, 5, metric, distance)
    x = draw(6, 5, 3, 2)
    y = near(x, 0.1)
    wanted = manifold.dist(x, y)
    turn = torch.block_diag(*(torch.linalg.qr(torch.randn(k, k, dtype=FLOAT64))[0] for k in (6, 5)))
    close(manifold.dist(turn @ x, turn @ y), wanted, 1e-9)
    flipped = LoRAQuotient(5, 6, metric, distance)
    swap = torch.cat((torch.arange(6, 11), torch.arange(6)))
    close(flipped.dist(x[:, swap], y[:, swap]), wanted, 1e-9)
    for scale in (1e-8, 1e8):  # W scales by scale², evenly split or not
        uneven = torch.tensor([[scale**2]] * 6 + [[1.0]] * 5, dtype=FLOAT64)
        degree = 0 if metric == "invariant" and distance == "exact" else 2
        if metric == "invariant" and distance == "aligned":
            degree = 0
        for factor in (scale, uneven):
            close(manifold.dist(factor * x, factor * y), scale**degree * wanted, 1e-9)


@EVERY_METRIC
@pytest.mark.parametrize("ratio", [1e-4, 0.1, 30.0, 1e4])
def test_size_is_no_obstacle(metric, ratio):
    """Whatever has a logarithm has one at any size, as precise."""
    manifold = LoRAQuotient(9, 7, metric)
    x = draw(9, 7, 12, 3)
    y = manifold.expmap(x, tangent(manifold, x, 0.8 * injectivity_bound(manifold, x)))
    sized = math.sqrt(ratio) * y
    assert manifold.log_path(x, sized).tolist() == [EXACT] * 12
    assert relative_gap(manifold, manifold.expmap(x, manifold.logmap(x, sized)), sized) < 1e-9
    close(manifold.dist(sized, x), manifold.dist(x, sized), 1e-9)


@EVERY_METRIC
@pytest.mark.parametrize("distance", ["exact", "aligned"])
@pytest.mark.parametrize("case", ["opposite", "far"])
def test_substitutes_have_their_own_gradient(metric, distance, case):
    """Where no construction is found the distance, its derivative and the logarithm agree."""
    manifold = LoRAQuotient(7, 6, metric, distance)
    if case == "opposite":
        x = draw(7, 6, 4, 2)
        y = torch.cat((-x[:, :7], x[:, 7:]), -2) + 0.3 * draw(7, 6, 4, 2, seed=1)
    elif distance == "exact":  # far apart: either end may find another geodesic, or none
        x, y = draw(7, 6, 3, 2), draw(7, 6, 3, 2, seed=1)
    else:  # aligned from one end and not from the other
        x, y = draw(7, 6, 200, 2), draw(7, 6, 200, 2, seed=1)
        one_sided = manifold.log_path(x, y) != manifold.log_path(y, x)
        assert int(one_sided.sum()) >= 2
        x, y = x[one_sided][:4], y[one_sided][:4]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(manifold.dist2(leaf, y).sum(), leaf)
    assert bool(gradient.isfinite().all())
    step, h = draw(7, 6, len(x), 2, seed=3), 1e-6
    ahead, behind = manifold.dist2(x + h * step, y), manifold.dist2(x - h * step, y)
    slope = (gradient * step).sum((-2, -1))
    # A geodesic found from y alone has its direction at x from the way it arrives, to 5 digits.
    close((ahead - behind) / (2 * h), slope, 1e-6 if case == "opposite" else 1e-4)
    if case == "opposite" and distance == "exact":
        log = manifold.logmap(x, y)
        close(-2 * manifold.inner(x, log, manifold.proju(x, step)), slope, 1e-10)


# --- accuracy of the integrator -------------------------------------------------------------------


@INTEGRATED
def test_accuracy_of_the_integrator(metric, monkeypatch):
    manifold = LoRAQuotient(6, 5, metric)
    x = draw(6, 5, 4, 2)
    u = tangent(manifold, x, 0.8 * injectivity_bound(manifold, x))

    def end(steps: float) -> Tensor:
        monkeypatch.setattr(lora_metrics, "STEPS_PER_UNIT_SPEED", steps)
        return manifold.expmap(x, u)

    default = lora_metrics.STEPS_PER_UNIT_SPEED
    reference, speed = (
        end(8 * default),
        float(lora_metrics.LoRAMetric.speed((x[:, :6], x[:, 6:]), (u[:, :6], u[:, 6:])).max()),
    )
    assert float((end(default) - reference).abs().max()) < 1e-10
    counts = [2, 3, 4, 5, 6]
    errors = [float((end((k - 1.5) / speed) - reference).abs().max()) for k in counts]
    assert log_log_slope([1 / k for k in counts], errors, floor=1e-14, window=3).slope > 6.5


@pytest.mark.parametrize("metric", METRICS)
def test_single_precision_keeps_its_digits(metric):
    manifold = LoRAQuotient(6, 5, metric)
    x = draw(6, 5, 4, 2)
    y = near(x, 0.1)
    close(manifold.dist(x.float(), y.float()).double(), manifold.dist(x, y), 1e-5)
    close(manifold.logmap(x.float(), y.float()).double(), manifold.logmap(x, y), 1e-4)
    log = manifold.logmap(x, y)
    close(manifold.expmap(x.float(), log.float()).double(), manifold.expmap(x, log), 1e-5)
