"""All solvers find the same mean on every manifold."""

import itertools

import geoopt
import pymanopt
import pytest
import torch
from frechet_cases import CASES, GEOOPT, OURS, Case, cloud, difference, names, tangent

from manifold_merge import LoRAQuotient, Status, frechet_mean
from manifold_merge.accurate import accurate, inner, norm
from manifold_merge.checks import check_manifold, log_log_slope
from manifold_merge.derivatives import mean_direction, mean_hessian
from manifold_merge.solvers import Problem

SOLVERS = {
    "newton": "newton",
    "karcher": "karcher",
    "trust_region": "trust_region",
    "conjugate_gradient": "conjugate_gradient",
    "RiemannianSGD": geoopt.optim.RiemannianSGD,
    "RiemannianAdam": geoopt.optim.RiemannianAdam,
    "RiemannianLineSearch": geoopt.optim.RiemannianLineSearch,
    "SGD instance": geoopt.optim.RiemannianSGD([torch.zeros(1)], lr=0.4, momentum=0.5),
    "Adam instance": geoopt.optim.RiemannianAdam([torch.zeros(1)], lr=0.05, amsgrad=True),
    "TrustRegions": pymanopt.optimizers.TrustRegions(verbosity=0, min_gradient_norm=1e-9),
    "ConjugateGradient": pymanopt.optimizers.ConjugateGradient(verbosity=0, min_gradient_norm=1e-6),
    "SteepestDescent": pymanopt.optimizers.SteepestDescent(verbosity=0),
}
# pymanopt's line searches compare costs, which have no digits left at a gradient of 1e-8.
LOOSE = {"SteepestDescent": 1e-5, "ConjugateGradient": 1e-5, "RiemannianLineSearch": 1e-6}
SEARCHED = ("Stiefel", "Polar", "LoRA(invariant, exact)")


# geoopt's line search hands tensors to scipy, which numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def reference(name, p=2):
    case = CASES[name]
    points, weights = cloud(case, 4, seed=1), [1.0, 2.0, 1.5, 0.7]
    solver = "karcher" if p == 2 else "auto"
    return case, points, weights, frechet_mean(case.manifold, points, weights, solver=solver, p=p)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", names(searched=False))
def test_solvers_agree(name, solver):
    case, points, weights, expected = reference(name)
    if solver == "newton" and name not in ("Sphere", "SphereExact", "SPD"):
        pytest.skip("Hessians in closed form are known on spheres and SPD matrices only")
    loose = LOOSE.get(solver, 0.0)
    solution = frechet_mean(
        case.manifold,
        points,
        weights,
        solver=SOLVERS[solver],
        start=points[0],
        tolerance=loose or None,
    )
    assert solution.converged, solution
    assert difference(case, expected.point, solution.point) < max(10 * loose, 1e-9)
    assert float(solution.objective) == pytest.approx(float(expected.objective), rel=1e-8)
    assert solution.solver == solver or solver.endswith("instance")


@pytest.mark.parametrize("solver", ["trust_region", "conjugate_gradient", "RiemannianSGD"])
@pytest.mark.parametrize(
    "name",
    [
        *SEARCHED,
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("LoRA(mixed, exact)", "LoRA(embedded, exact)")
        ),
    ],
)
def test_solvers_agree_where_logarithms_are_searched(name, solver):
    case, points, weights, expected = reference(name)
    solution = frechet_mean(case.manifold, points, weights, solver=SOLVERS[solver], tolerance=1e-8)
    assert solution.converged
    assert difference(case, expected.point, solution.point) < 1e-7


@pytest.mark.parametrize("solver", ["trust_region", "conjugate_gradient"])
@pytest.mark.parametrize("name", ["SPD", "PoincareBall"])
def test_medians_by_other_solvers(name, solver):
    case, points, weights, expected = reference(name, p=1)
    solution = frechet_mean(
        case.manifold, points, weights, solver=solver, p=1, start=points.mean(0), tolerance=1e-8
    )
    assert difference(case, expected.point, solution.point) < 1e-6


def test_batches_and_float32_go_through_pymanopt():
    case = GEOOPT["SPD"]
    points = cloud(case, 4, 3).float()
    expected = frechet_mean(case.manifold, points)
    solution = frechet_mean(case.manifold, points, solver="trust_region")
    assert solution.point.dtype == torch.float32
    assert solution.iterations.shape == (3,)
    assert difference(case, expected.point, solution.point) < 1e-5


def test_an_instance_lends_its_options_only():
    case = GEOOPT["Sphere"]
    own = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0, 0.0]), manifold=case.manifold)
    optimizer = geoopt.optim.RiemannianSGD([own], lr=0.5)
    frechet_mean(case.manifold, cloud(case, 3), solver=optimizer)
    assert own.tolist() == [1, 0, 0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["params"][0] is own
    assert not optimizer.state


@pytest.mark.parametrize("solver", ["newton", "karcher", "trust_region", "conjugate_gradient"])
def test_objectives_never_grow_from_a_bad_start(solver):
    case = GEOOPT["SPD"]
    points = cloud(case, 4, radius=2.0)
    start = torch.diag(torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64))
    solution = frechet_mean(case.manifold, points, solver=solver, start=start)
    expected = frechet_mean(case.manifold, points)
    assert solution.converged
    assert difference(case, expected.point, solution.point) < 1e-8


def test_newton_on_the_sphere_takes_no_maximum():
    """From the far side Newton's method would find the maximum; Karcher's takes over."""
    case = GEOOPT["Sphere"]
    points = cloud(case, 5)
    expected = frechet_mean(case.manifold, points).point
    solution = frechet_mean(case.manifold, points, solver="newton", start=-expected + 1e-3)
    start = -expected + 0.1 * points[0]
    solution = frechet_mean(case.manifold, points, solver="newton", start=start / start.norm())
    assert difference(case, expected, solution.point) < 1e-9


# --- second order ---------------------------------------------------------------------------------

HESSIANS = ["Sphere", "SPD", "PoincareBall", "Product", "LoRA(invariant, exact)", "Stiefel"]


def problem_of(case, points):
    weights = torch.full(points.shape[:2], 1 / len(points), dtype=torch.float64)
    return Problem(accurate(case.manifold), points, weights, 2, None, 1e-10, 100)


@pytest.mark.parametrize(
    "name", [*HESSIANS, *(pytest.param(n, marks=pytest.mark.slow) for n in OURS if "exact" in n)]
)
def test_hessian_of_the_objective_has_a_third_order_remainder(name):
    """f(exp(t u)) - f - t <grad, u> - t²/2 <Hess u, u> = O(t³), away from the mean."""
    case = CASES[name]
    problem = problem_of(case, cloud(case, 3, 1))
    x = cloud(case, 1, 1, seed=4, radius=0.2)[0]
    x = problem.points[0] if "LoRA" in name else x
    x = case.manifold.expmap(x, tangent(case, x, 0.2))
    u = tangent(case, x, 1.0)
    m = problem.manifold

    def cost(y):
        return float(problem.cost(problem.evaluate(y)))

    slope = -float(inner(m, x, mean_direction(problem, x), u))
    curvature = float(inner(m, x, mean_hessian(problem, x, u), u))
    steps = [10 ** (-k / 4) for k in range(2, 10)]
    errors = [
        abs(cost(m.expmap(x, t * u)) - cost(x) - t * slope - 0.5 * t * t * curvature) for t in steps
    ]
    found = log_log_slope(steps, errors, floor=1e-12, window=5)
    assert found.slope > 2.8, (found, errors)
    wrong = [
        abs(cost(m.expmap(x, t * u)) - cost(x) - t * slope - 0.3 * t * t * curvature) for t in steps
    ]
    assert log_log_slope(steps, wrong, floor=1e-12, window=5).slope < 2.5


@pytest.mark.parametrize(
    "metric",
    [
        "invariant",
        pytest.param("mixed", marks=pytest.mark.slow),
        pytest.param("embedded", marks=pytest.mark.slow),
    ],
)
def test_trust_regions_converge_quadratically(metric, monkeypatch):
    """Each gradient is bounded by a multiple of the square of the one before it."""
    case = Case(LoRAQuotient(5, 4, metric), (9, 2), 1.0)
    points = cloud(case, 3, seed=2)
    expected = frechet_mean(case.manifold, points, tolerance=1e-12).point
    seen = []

    class Recorder(pymanopt.optimizers.TrustRegions):
        def run(self, problem, **options):
            gradient = problem.riemannian_gradient

            def record(x):
                value = gradient(x)
                seen.append(problem.manifold.norm(x, value))
                return value

            problem._riemannian_gradient = record
            return super().run(problem, **options)

    optimizer = Recorder(verbosity=0, min_gradient_norm=1e-11, kappa=0.01)
    start = frechet_mean(case.manifold, [expected, points[0]], [2, 1], tolerance=1e-6).point
    solution = frechet_mean(case.manifold, points, solver=optimizer, start=start)
    assert difference(case, expected, solution.point) < 1e-9
    gradients = [g for g in seen if g > 1e-13]
    last = [g for g in gradients if g < 0.5]
    assert len(last) >= 3, seen
    for one, two in itertools.pairwise(last):
        assert two < 2 * one**2 + 1e-10, seen


# --- a manifold that geoopt does not have ---------------------------------------------------------


class Cylinder(geoopt.Manifold):
    """Pairs (angle, height): a line beside a circle. Written by a user in a few lines."""

    name, ndim, reversible = "Cylinder", 1, False
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def _wrap(self, d):
        angle = torch.remainder(d[..., :1] + torch.pi, 2 * torch.pi) - torch.pi
        return torch.cat((angle, d[..., 1:]), -1)

    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        return bool(x.isfinite().all()), "`x` is not finite"

    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        return True, None

    def inner(self, x, u, v=None, *, keepdim=False):
        v = u if v is None else v
        return (u * v).sum(-1, keepdim=keepdim) + 0 * x.sum(-1, keepdim=keepdim)

    def proju(self, x, u):
        return u + 0 * x

    egrad2rgrad = proju

    def projx(self, x):
        return x

    def retr(self, x, u):
        return x + u

    expmap = retr

    def transp(self, x, y, v):
        return v + 0 * x + 0 * y

    def logmap(self, x, y):
        return self._wrap(y - x)

    def dist(self, x, y, *, keepdim=False):
        return self.logmap(x, y).norm(dim=-1, keepdim=keepdim)

    def random(self, *size, dtype=None, device=None, **kwargs):
        x = torch.randn(*size, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(x, manifold=self)


def test_a_users_manifold_gets_everything():
    case = Case(Cylinder(), (2,))
    points = torch.tensor([[3.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)  # across the seam
    for solver in ("auto", "karcher", "trust_region", "conjugate_gradient", "RiemannianAdam"):
        solution = frechet_mean(case.manifold, points, solver=SOLVERS.get(solver, solver))
        assert solution.converged
        assert abs(abs(float(solution.point[0])) - torch.pi) < 1e-8
        assert float(solution.point[1]) == pytest.approx(0.5)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    height = frechet_mean(case.manifold, points, weights).point[1]
    (grad,) = torch.autograd.grad(height, weights)
    assert grad.tolist() == pytest.approx([-3 / 16, 1 / 16])
    laws = ["exp_log", "geodesic_speed", "gradient", "log_distance", "transport", "retraction"]
    check_manifold(case.manifold, shape=(2,), laws=laws)


# --- errors ---------------------------------------------------------------------------------------

SPHERE, POINTS = geoopt.Sphere(), cloud(GEOOPT["Sphere"], 3)
ALIGNED = LoRAQuotient(5, 4, distance="aligned")
PAIRS = cloud(Case(ALIGNED, (9, 2)), 3)

MISUSE = {
    "name": (SPHERE, POINTS, "bfgs", ValueError, "auto, closed_form, newton, karcher"),
    "object": (SPHERE, POINTS, 3, ValueError, "pymanopt optimiser"),
    "class of pymanopt": (
        SPHERE,
        POINTS,
        pymanopt.optimizers.TrustRegions,
        ValueError,
        r"TrustRegions\(verbosity=0\)",
    ),
    "torch": (SPHERE, POINTS, torch.optim.Adam, ValueError, "RiemannianAdam"),
    "torch instance": (
        SPHERE,
        POINTS,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        ValueError,
        "leave the manifold",
    ),
    "sparse": (SPHERE, POINTS, geoopt.optim.SparseRiemannianAdam, ValueError, "not sparse"),
    "groups": (
        SPHERE,
        POINTS,
        geoopt.optim.RiemannianSGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}], 1),
        ValueError,
        "one parameter group",
    ),
    "no gradient": (ALIGNED, PAIRS, "trust_region", ValueError, "use 'karcher'"),
    "newton elsewhere": (geoopt.PoincareBall(), POINTS / 2, "newton", ValueError, "trust_region"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told(case):
    manifold, points, solver, error, message = MISUSE[case]
    with pytest.raises(error, match=message):
        frechet_mean(manifold, points, solver=solver)


def test_a_solver_that_stops_early_says_so():
    case = GEOOPT["SPD"]
    solver = pymanopt.optimizers.SteepestDescent(verbosity=0, max_iterations=2)
    solution = frechet_mean(case.manifold, cloud(case, 4, radius=2.0), solver=solver)
    assert int(solution.status) == Status.MAX_ITERATIONS
    assert float(norm(accurate(case.manifold), solution.point, 0 * solution.point)) == 0


@pytest.mark.parametrize("solver", ["trust_region", "conjugate_gradient"])
def test_the_limit_of_iterations_is_kept(solver: str) -> None:
    """A solver that is begun again where it stopped has the iterations that are left."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True)
    solution = frechet_mean(geoopt.Sphere(), points, solver=solver, max_iterations=1)
    assert int(solution.iterations) <= 1
