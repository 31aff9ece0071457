"""geoopt in pymanopt, pymanopt in geoopt, and the Hessian of LoRAQuotient."""

import geoopt
import numpy as np
import pymanopt
import pytest
import torch
from frechet_cases import CASES, Case, cloud, names, random_point, tangent
from pymanopt.optimizers import ConjugateGradient, NelderMead, ParticleSwarm, TrustRegions

from manifold_merge import LoRAQuotient, frechet_mean
from manifold_merge.accurate import accurate, norm
from manifold_merge.checks import check_manifold, log_log_slope
from manifold_merge.lora_hessian import ehess2rhess
from manifold_merge.pymanopt_bridge import GeooptInPymanopt, PymanoptInGeoopt

DIMENSIONS = {
    "Euclidean": 3,
    "Sphere": 2,
    "SPD": 6,
    "Stiefel": 7,
    "PoincareBall": 3,
    "Lorentz": 3,
    "Product": 2 + 2 + 3,
    "LoRA(mixed, chordal)": (5 + 4 - 2) * 2,
    "LoRA(invariant, exact)": (5 + 4 - 2) * 2,
    "Polar": (5 + 4 - 2) * 2,
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimension(name):
    case = CASES[name]
    assert GeooptInPymanopt(case.manifold, case.shape).dim == DIMENSIONS[name]
    assert GeooptInPymanopt(case.manifold, (2, *case.shape)).dim == 2 * DIMENSIONS[name]


@pytest.mark.parametrize("name", names())
def test_bridge_into_pymanopt_computes_what_geoopt_does(name):
    case = CASES[name]
    space = GeooptInPymanopt(case.manifold, case.shape)
    point = random_point(case)
    u, v = tangent(case, point, 0.3), tangent(case, point, 0.5)
    x, a, b = point.numpy(), u.numpy(), v.numpy()
    m = accurate(case.manifold)
    assert space.norm(x, a) == pytest.approx(0.3)
    inner = m.inner(point, u, v, keepdim=True)
    assert space.inner_product(x, a, b) == pytest.approx(float(inner))
    y = space.exp(x, a)
    if "chordal" in name:
        return  # chords are shorter than geodesics
    assert np.allclose(y, m.expmap(point, u).numpy())
    assert space.dist(x, y) == pytest.approx(0.3, rel=1e-3)
    assert space.norm(x, space.log(x, y)) == pytest.approx(0.3, rel=1e-3)
    assert np.allclose(space.projection(x, a), a)
    carried = space.transport(x, y, b)
    assert np.allclose(space.projection(y, carried), carried, atol=1e-8)
    middle = space.pair_mean(x, y)
    assert space.dist(x, middle) == pytest.approx(0.15, rel=2e-3)
    assert np.array_equal(space.zero_vector(x), 0 * x)
    assert space.norm(x, space.random_tangent_vector(x)) == pytest.approx(1)
    assert space.random_point().shape == case.shape


@pytest.mark.parametrize("optimizer", [NelderMead, ParticleSwarm])
def test_methods_without_gradients_run_on_the_bridge(optimizer):
    case = CASES["Sphere"]
    points = cloud(case, 3)
    expected = frechet_mean(case.manifold, points).point
    solver = optimizer(verbosity=0, max_iterations=60)
    found = frechet_mean(case.manifold, points, solver=solver).point
    assert float((found - expected).norm()) < 0.05


PYMANOPT = {
    "Sphere": (pymanopt.manifolds.Sphere(4), geoopt.Sphere()),
    "SPD": (
        pymanopt.manifolds.SymmetricPositiveDefinite(3),
        geoopt.SymmetricPositiveDefinite(),
    ),
    "Euclidean": (pymanopt.manifolds.Euclidean(3), geoopt.Euclidean(1)),
}


@pytest.mark.parametrize("name", PYMANOPT)
def test_bridge_into_geoopt_agrees_with_geoopt(name):
    theirs, ours = PYMANOPT[name]
    bridged = PymanoptInGeoopt(theirs)
    case = Case(ours, bridged.point_shape)
    points = cloud(case, 4, 2)
    x, y = points[:2]
    u = tangent(case, x, 0.4)
    assert torch.allclose(bridged.expmap(x, u), accurate(ours).expmap(x, u), atol=1e-12)
    assert torch.allclose(bridged.logmap(x, y), accurate(ours).logmap(x, y), atol=1e-10)
    assert torch.allclose(bridged.dist(x, y), accurate(ours).dist(x, y))
    assert bridged.inner(x, u, keepdim=True).shape == (2, *(1,) * bridged.ndim)
    expected = frechet_mean(ours, points).point
    for solver in ("karcher", "trust_region", geoopt.optim.RiemannianSGD):
        found = frechet_mean(bridged, points, solver=solver, tolerance=1e-8).point
        assert torch.allclose(found, expected, atol=1e-7)


def test_bridged_manifolds_pass_the_laws_that_matter():
    laws = ["exp_log", "retraction", "exponential", "geodesic_speed", "log_distance", "gradient"]
    for theirs, _ in PYMANOPT.values():
        bridged = PymanoptInGeoopt(theirs)
        check_manifold(bridged, shape=bridged.point_shape, batch=(2,), laws=laws)


def test_gradients_flow_through_the_bridged_distance():
    bridged = PymanoptInGeoopt(pymanopt.manifolds.Sphere(3))
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(bridged.dist(x, y) ** 2, x)
    log = bridged.logmap(x.detach(), y)
    assert torch.allclose(bridged.egrad2rgrad(x.detach(), grad), -2 * log, atol=1e-12)


def test_there_and_back():
    sphere = pymanopt.manifolds.Sphere(3)
    back = GeooptInPymanopt(PymanoptInGeoopt(sphere), (3,))
    x, y = sphere.random_point(), sphere.random_point()
    assert back.dist(x, y) == pytest.approx(sphere.dist(x, y))
    assert back.dim == sphere.dim


def test_points_of_several_arrays_are_refused():
    with pytest.raises(ValueError, match="ProductManifold"):
        PymanoptInGeoopt(pymanopt.manifolds.FixedRankEmbedded(4, 3, 2))


def test_missing_hessians_are_told():
    space = GeooptInPymanopt(geoopt.PoincareBall(), (3,))
    x = np.zeros(3)
    with pytest.raises(NotImplementedError, match="ehess2rhess"):
        space.euclidean_to_riemannian_hessian(x, x, x, x)


# --- the Hessian of LoRAQuotient ------------------------------------------------------------------

METRICS = ("mixed", "invariant", "embedded")


class WithHessian(LoRAQuotient):
    def ehess2rhess(self, x, egrad, ehess, u):
        return ehess2rhess(self, x, egrad, ehess, u)


def cost(manifold, x):
    w = manifold.product(x)
    rows, columns = w.shape[-2:]
    weight = torch.linspace(-1, 2, rows * columns, dtype=w.dtype).reshape(rows, columns)
    return (torch.sin(w) * weight).sum() + 0.05 * w.pow(4).sum()


def derivatives(manifold, x, u):
    return torch.func.jvp(torch.func.grad(lambda z: cost(manifold, z)), (x,), (u,))


@pytest.mark.parametrize("metric", METRICS)
def test_hessian_obeys_the_law_of_the_contract_suite(metric):
    manifold = WithHessian(6, 5, metric)
    check_manifold(manifold, shape=(11, 2), laws=["hessian"])


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_taylor_remainder_is_of_third_order_along_geodesics(metric, rank):
    case = Case(LoRAQuotient(6, 4, metric), (10, rank))
    m, x = case.manifold, random_point(case, seed=rank)
    u = tangent(case, x)
    egrad, ehess = derivatives(m, x, u)
    hess = ehess2rhess(m, x, egrad, ehess, u)
    slope = float(m.inner(x, m.egrad2rgrad(x, egrad), u))
    steps = [10 ** (-k / 4) for k in range(2, 14)]

    def order(curvature):
        start = float(cost(m, x))
        errors = [
            abs(float(cost(m, m.expmap(x, t * u))) - start - t * slope - t * t / 2 * curvature)
            for t in steps
        ]
        return log_log_slope(steps, errors, floor=1e-12, window=5).slope

    assert order(float(m.inner(x, hess, u))) > 2.85
    # Without the connection term the remainder is of second order.
    field = torch.func.jvp(m.egrad2rgrad, (x, egrad), (u, ehess))[1]
    assert order(float(m.inner(x, m.horizontal(x, field), u))) < 2.3


@pytest.mark.parametrize("metric", METRICS)
def test_hessian_is_symmetric_horizontal_and_gauge_equivariant(metric):
    case = Case(LoRAQuotient(6, 5, metric), (3, 11, 2))
    m, x = case.manifold, random_point(Case(case.manifold, (11, 2)), 3)
    u, v = tangent(case, x), tangent(case, x)
    hu, hv = (ehess2rhess(m, x, *derivatives(m, x, w), w) for w in (u, v))
    assert torch.allclose(m.inner(x, hu, v), m.inner(x, u, hv), rtol=1e-10)
    assert torch.allclose(m.horizontal(x, hu), hu, atol=1e-12)
    act = m.random_gauge(x)
    turned = ehess2rhess(m, act(x), *derivatives(m, act(x), act(u)), act(u))
    assert torch.allclose(turned, act(hu), rtol=1e-9, atol=1e-9)


def test_embedded_hessian_is_that_of_the_fixed_rank_manifold():
    """Vandereycken (2013), P_T(∇²f[dW]) plus a curvature term with the pseudo-inverse."""
    m = LoRAQuotient(6, 5, "embedded")
    case = Case(m, (11, 2))
    x = random_point(case)
    u = tangent(case, x)
    b, a = m.unpack(x)
    w, dw = b @ a, u[:6] @ a + b @ u[6:].mT

    def function(z):
        weight = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).reshape(z.shape)
        return (torch.sin(z) * weight).sum() + 0.05 * z.pow(4).sum()

    g, h = torch.func.jvp(torch.func.grad(function), (w,), (dw,))
    left, _, right = torch.linalg.svd(w)
    pl, pr = left[:, :2] @ left[:, :2].mT, right[:2].mT @ right[:2]
    ol, or_ = torch.eye(6, dtype=w.dtype) - pl, torch.eye(5, dtype=w.dtype) - pr
    inverse = torch.linalg.pinv(w, rtol=1e-10)
    tangent_part = h - ol @ h @ or_
    curvature = ol @ g @ or_ @ dw.mT @ inverse.mT + inverse.mT @ dw.mT @ ol @ g @ or_
    hess = ehess2rhess(m, x, *derivatives(m, x, u), u)
    ours = hess[:6] @ a + b @ hess[6:].mT
    assert torch.allclose(ours, tangent_part + curvature, atol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_low_rank_approximation_by_trust_regions(metric):
    """min |B A - target|² by pymanopt through the bridge, against the truncated SVD."""
    m = LoRAQuotient(6, 5, metric)
    left, right = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for k in (6, 5))
    target = left[:, :5] * torch.tensor([5.0, 4.0, 1.0, 0.5, 0.2], dtype=torch.float64) @ right
    space = GeooptInPymanopt(m, (11, 2))

    def value(z):
        return 0.5 * (m.product(z) - target).square().sum()

    @pymanopt.function.numpy(space)
    def objective(point):
        return float(value(torch.as_tensor(point)))

    @pymanopt.function.numpy(space)
    def gradient(point):
        return torch.func.grad(value)(torch.as_tensor(point)).numpy()

    @pymanopt.function.numpy(space)
    def hessian(point, vector):
        x, u = torch.as_tensor(point), torch.as_tensor(vector)
        return torch.func.jvp(torch.func.grad(value), (x,), (u,))[1].numpy()

    problem = pymanopt.Problem(
        space, objective, euclidean_gradient=gradient, euclidean_hessian=hessian
    )
    start = random_point(Case(m, (11, 2))).numpy()
    result = TrustRegions(verbosity=0, min_gradient_norm=1e-10).run(problem, initial_point=start)
    expected = 0.5 * (1.0 + 0.25 + 0.04)
    assert result.cost == pytest.approx(expected, rel=1e-8)
    assert result.iterations < 60
    slower = ConjugateGradient(verbosity=0, max_iterations=500).run(problem, initial_point=start)
    assert slower.cost == pytest.approx(expected, rel=1e-4)


def test_hessian_survives_a_batch_of_zeros():
    m = LoRAQuotient(6, 5)
    x = random_point(Case(m, (11, 2)), 2)
    zero = torch.zeros_like(x)
    assert torch.equal(ehess2rhess(m, x, zero, zero, zero), zero)
    assert float(norm(m, x, zero).sum()) == 0
