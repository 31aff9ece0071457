"""Laws of frechet_mean on geoopt's manifolds and ours."""

import geoopt
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import torch
from checks_examples import ProjectiveSpace
from frechet_cases import CASES, GEOOPT, Case, cloud, difference, names, random_point, tangent

from manifold_merge import LoRAQuotient, Status, frechet_mean
from manifold_merge.accurate import accurate, dist2_logmap, norm, weighted_sum

WEIGHTS = [1.0, 2.0, 0.5, 1.5]


def gradient(case, x, points, weights):
    """Σ wᵢ log_x xᵢ, from the definition."""
    w = torch.tensor(weights, dtype=x.dtype)
    space = accurate(case.manifold)
    logs = dist2_logmap(space, x.expand_as(points), points)[1]
    return norm(space, x, weighted_sum(w / w.sum(), logs))


@pytest.mark.parametrize("name", names())
def test_logarithms_cancel_and_neighbours_are_worse(name):
    case = CASES[name]
    points = cloud(case, 4, 2)
    solution = frechet_mean(case.manifold, points, WEIGHTS)
    assert solution.converged
    assert solution.message == "converged"
    if "chordal" not in name:
        assert float(gradient(case, solution.point, points, WEIGHTS).max()) < 1e-9

    def objective(x):
        squared = dist2_logmap(accurate(case.manifold), x.expand_as(points), points)[0]
        w = torch.tensor(WEIGHTS, dtype=x.dtype)
        return weighted_sum(w / w.sum(), squared)

    assert torch.allclose(objective(solution.point), solution.objective, rtol=1e-9)
    for _ in range(3):
        step = tangent(case, solution.point, 0.05)
        nearby = case.manifold.expmap(solution.point, step)
        assert bool((objective(nearby) > solution.objective).all())


@pytest.mark.parametrize("name", names())
def test_mean_of_one_point_and_of_copies(name):
    case = CASES[name]
    x = random_point(case, 2)
    for points in ([x], [x, x, x]):
        solution = frechet_mean(case.manifold, points)
        assert difference(case, x, solution.point) < 1e-10
        assert solution.converged
        assert float(solution.objective.abs().max()) < 1e-15


@pytest.mark.parametrize("name", names(searched=False))
def test_weights_count_copies(name):
    case = CASES[name]
    x, y, z = cloud(case, 3, 2)
    weighted = frechet_mean(case.manifold, [x, y, z], [2, 1, 3]).point
    copied = frechet_mean(case.manifold, [x, z, y, x, z, z]).point
    assert difference(case, weighted, copied) < 1e-9


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", names(searched=False))
def test_order_does_not_matter(name, p):
    case = CASES[name]
    points = cloud(case, 4, 2, seed=3)
    order = [2, 0, 3, 1]
    one = frechet_mean(case.manifold, points, WEIGHTS, p=p).point
    other = frechet_mean(case.manifold, points[order], [WEIGHTS[i] for i in order], p=p).point
    assert difference(case, one, other) < 1e-8


@pytest.mark.parametrize("name", names())
def test_batch_equals_one_by_one(name):
    case = CASES[name]
    points = cloud(case, 3, 3)
    whole = frechet_mean(case.manifold, points)
    for i in range(3):
        single = frechet_mean(case.manifold, points[:, i])
        assert difference(case, single.point, whole.point[i]) < 1e-9
        assert float(single.objective) == pytest.approx(float(whole.objective[i]), rel=1e-9)
        assert single.status.shape == ()


def test_batch_of_two_dimensions_and_weights_for_each_element():
    case = GEOOPT["Sphere"]
    points = cloud(case, 3, 2, 4)
    weights = torch.rand(3, 2, 4, dtype=torch.float64) + 0.1
    whole = frechet_mean(case.manifold, points, weights)
    assert whole.point.shape == (2, 4, 3)
    single = frechet_mean(case.manifold, points[:, 1, 2], weights[:, 1, 2])
    assert difference(case, single.point, whole.point[1, 2]) < 1e-12


@pytest.mark.parametrize("name", names(searched=False))
def test_two_points_have_their_midpoint(name):
    if "chordal" in name:
        pytest.skip("the best approximation of a given rank need not be equally far from both")
    case = CASES[name]
    x, y = cloud(case, 2, 2)
    mean = frechet_mean(case.manifold, [x, y]).point
    there, here = (dist2_logmap(accurate(case.manifold), mean, z)[0].sqrt() for z in (x, y))
    assert torch.allclose(there, here, rtol=1e-8)


@pytest.mark.parametrize("name", names(searched=False))
def test_an_anchor_without_weight_takes_no_part(name):
    case = CASES[name]
    points = cloud(case, 3)
    far = random_point(case, seed=9)
    one = frechet_mean(case.manifold, [*points, far], [1, 1, 1, 0])
    assert difference(case, frechet_mean(case.manifold, points).point, one.point) < 1e-10
    assert one.weights.tolist()[-1] == 0


@pytest.mark.parametrize("name", names(searched=False))
def test_float32_agrees_with_float64(name):
    case = CASES[name]
    points = cloud(case, 3, 2)
    wide = frechet_mean(case.manifold, points).point
    narrow = frechet_mean(case.manifold, points.float())
    assert narrow.point.dtype == torch.float32
    assert narrow.converged
    assert difference(case, wide, narrow.point.double()) < 1e-4


@hypothesis.given(st.floats(-6, 0), st.integers(0, 10))
@hypothesis.settings(max_examples=15)
def test_affine_invariance_on_positive_definite_matrices(exponent, seed):
    """mean(A X Aᵀ) = A mean(X) Aᵀ for any invertible A."""
    case = GEOOPT["SPD"]
    points = cloud(case, 4, seed=seed, radius=10**exponent)
    a = torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)
    hypothesis.assume(float(torch.linalg.cond(a)) < 50)
    mean = frechet_mean(case.manifold, points).point
    moved = frechet_mean(case.manifold, a @ points @ a.mT).point
    assert torch.allclose(a @ mean @ a.mT, moved, rtol=1e-9, atol=1e-10)


def test_commuting_matrices_have_the_geometric_mean():
    diagonal = torch.rand(5, 3, dtype=torch.float64) + 0.1
    mean = frechet_mean(geoopt.SymmetricPositiveDefinite(), torch.diag_embed(diagonal)).point
    assert torch.allclose(mean, torch.diag(diagonal.log().mean(0).exp()), atol=1e-14)


def test_two_matrices_have_the_geometric_mean_of_scipy():
    a, b = cloud(GEOOPT["SPD"], 2, radius=2.0)
    root = scipy.linalg.sqrtm(a.numpy())
    inner = scipy.linalg.sqrtm(np.linalg.solve(root, b.numpy()) @ np.linalg.inv(root))
    mean = frechet_mean(geoopt.SymmetricPositiveDefinite(), [a, b]).point
    assert np.allclose(mean.numpy(), root @ inner @ root, atol=1e-12)


# --- digits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("solver", ["auto", "karcher", "trust_region"])
@pytest.mark.parametrize("name", ["Sphere", "SphereExact", "Lorentz", "Product", "Scaled"])
def test_tight_clusters_converge_to_1e_12(name, solver, radius):
    """geoopt's own distance stalls such a mean: its dist(x, x) is 4.5e-4 on the sphere."""
    case = GEOOPT[name]
    points = cloud(case, 5, radius=radius)
    solution = frechet_mean(case.manifold, points, solver=solver, tolerance=1e-7)
    assert solution.converged
    assert float(solution.gradient_norm) < 1e-12 + 1e-7 * radius
    assert float(gradient(case, solution.point, points, [1.0] * 5)) < 1e-12 + 1e-7 * radius
    assert float(solution.objective) == pytest.approx(
        float(
            dist2_logmap(accurate(case.manifold), solution.point.expand_as(points), points)[
                0
            ].mean()
        )
    )


def test_geoopt_itself_is_left_alone():
    before = dict(vars(geoopt.Sphere))
    frechet_mean(geoopt.Sphere(), cloud(GEOOPT["Sphere"], 3))
    assert dict(vars(geoopt.Sphere)) == before
    x = torch.tensor([1.0, 0.0])
    assert float(geoopt.Sphere().dist(x, x)) > 0


def test_a_subclass_with_its_own_distance_is_taken_as_it_is():
    lines = ProjectiveSpace()
    assert accurate(lines) is lines
    x = torch.tensor([[1.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)
    mean = frechet_mean(lines, x / x.norm(dim=-1, keepdim=True)).point
    assert float(lines.dist(mean, torch.tensor([1.0, 0.0], dtype=torch.float64))) < 1e-10


# --- status, remedies, errors ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e5, 1e8, 1e12])
@pytest.mark.parametrize("solver", ["auto", "karcher"])
@pytest.mark.parametrize("metric", [None, "embedded", "mixed"])
def test_no_outlier_carries_off_a_median(metric, solver, size, dtype):
    """|W - C| <= 2 h M / (2 h - 1) for honest weight h within M of C (docs/federated.md)."""
    torch.manual_seed(0)
    if metric is None:
        manifold, centre = geoopt.Euclidean(ndim=1), torch.randn(6, dtype=dtype)
        values = [centre + 0.1 * torch.randn_like(centre) for _ in range(4)]
        points, embedded = [*values, -size * centre], lambda x: x
    else:
        manifold = LoRAQuotient(5, 4, metric, "chordal")
        centre = torch.randn(9, 2, dtype=dtype)
        points = [centre + 0.05 * torch.randn_like(centre) for _ in range(4)]
        sign = torch.where(torch.arange(9) < 5, -1.0, 1.0).to(dtype)[:, None]
        points, embedded = [*points, size**0.5 * sign * centre], manifold.product
    solution = frechet_mean(manifold, points, p=1, solver=solver, max_iterations=2000)
    if metric and solver == "karcher" and size == 1e12:
        # The objective has no digits left for steps of this size, which is told.
        assert int(solution.status) in (Status.CONVERGED, Status.STALLED)
    else:
        assert bool(solution.converged)
    if not bool(solution.converged):
        return
    first = embedded(points[0]).double()
    honest = torch.stack([embedded(x).double() for x in points[:4]])
    reach = (honest - first).flatten(1).norm(dim=1).max()
    assert (embedded(solution.point).double() - first).norm() <= 1.6 / 0.6 * reach


def test_a_median_stays_with_copies_that_have_the_majority():
    copy = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = [copy, copy, copy, copy + 1.0, 1e9 * copy]
    solution = frechet_mean(geoopt.Euclidean(ndim=1), points, p=1, max_iterations=5000)
    assert bool(solution.converged)
    assert torch.allclose(solution.point, copy, rtol=0, atol=1e-12)


def test_no_mean_direction_between_poles():
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    solution = frechet_mean(geoopt.Sphere(), poles)
    assert not solution.converged
    assert int(solution.status) == Status.STALLED
    assert "injectivity radius" in solution.message


def test_few_iterations_name_the_option():
    case = GEOOPT["SPD"]
    solution = frechet_mean(
        case.manifold, cloud(case, 4, 3, radius=2.0), solver="karcher", max_iterations=1
    )
    assert int(solution.status.max()) == Status.MAX_ITERATIONS
    assert "3 of 3 elements" in solution.message
    assert "max_iterations" in solution.message
    assert "max_iterations" in str(solution)


def test_start_and_starts():
    case = GEOOPT["PoincareBall"]
    points = cloud(case, 4)
    expected = frechet_mean(case.manifold, points).point
    far = random_point(case, seed=5)
    assert difference(case, expected, frechet_mean(case.manifold, points, start=far).point) < 1e-9
    every = frechet_mean(case.manifold, points, starts="anchors").point
    assert difference(case, expected, every) < 1e-9


class Bare(geoopt.Sphere):
    """A sphere without logarithm; the distance is differentiable."""

    def logmap(self, x, y):
        raise NotImplementedError

    def dist(self, x, y, *, keepdim=False):
        return (x - y).norm(dim=-1, keepdim=keepdim)


Bare.logmap = geoopt.Manifold.logmap


class Blind(Bare):
    """Neither logarithm nor distance."""


Blind.dist = geoopt.Manifold.dist

SPHERE = geoopt.Sphere()
POINTS = cloud(GEOOPT["Sphere"], 3)
PAIRS = cloud(Case(LoRAQuotient(5, 4), (9, 2)), 2)

MISUSE = {
    "no points": ([SPHERE, []], {}, ValueError, "at least one anchor"),
    "integers": ([SPHERE, torch.ones(2, 3).long()], {}, ValueError, "floating-point"),
    "half": ([SPHERE, POINTS.half()], {}, ValueError, "too few digits"),
    "shape": ([LoRAQuotient(6, 4), PAIRS], {}, ValueError, r"(?s)points\[0\].*6 \+ 4"),
    "batches": ([SPHERE, [POINTS, POINTS[0]]], {}, ValueError, "different batch shapes"),
    "nan": ([SPHERE, POINTS * torch.nan], {}, ValueError, r"points\[0\]: 3 entries"),
    "weights": ([SPHERE, POINTS, [1, 2]], {}, ValueError, "expected 3"),
    "negative": ([SPHERE, POINTS, [1, -1, 1]], {}, ValueError, "negative entry"),
    "zero sum": ([SPHERE, POINTS, [0, 0, 0]], {}, ValueError, "sum must be positive"),
    "nan weight": ([SPHERE, POINTS, [1, 1, float("nan")]], {}, ValueError, "finite"),
    "p": ([SPHERE, POINTS], {"p": 3}, ValueError, "p must be"),
    "starts": ([SPHERE, POINTS], {"starts": "all"}, ValueError, "starts must be"),
    "rank": ([SPHERE, POINTS], {"rank": 1}, ValueError, "no rank to choose"),
    "gauge": ([SPHERE, POINTS], {"gauge_check": True}, ValueError, "no gauge"),
    "class": ([geoopt.Sphere, POINTS], {}, ValueError, r"got the class Sphere; pass Sphere\("),
    "factors": (
        [LoRAQuotient(5, 4), [(PAIRS[0, :5], PAIRS[0, 5:].mT)]],
        {},
        ValueError,
        r"points\[0\]: .* got a tuple; use manifold\.pack\(B, A\)",
    ),
    "shapes": (
        [SPHERE, [torch.eye(3)[0], torch.eye(2)[0]]],
        {},
        ValueError,
        r"one shape is expected.*\(2,\), \(3,\)",
    ),
    "devices": ([SPHERE, [POINTS[0], POINTS[0].to("meta")]], {}, ValueError, "'cpu', 'meta'"),
    "named weights": ([SPHERE, POINTS, "uniform"], {}, ValueError, "weights: .* got a str"),
    "weights by name": ([SPHERE, POINTS, {"a": 1}], {}, ValueError, "weights: .* got a dict"),
    "no closed form": ([SPHERE, POINTS], {"solver": "closed_form"}, ValueError, "use 'karcher'"),
    "no logmap": ([Bare(), POINTS], {"solver": "karcher"}, NotImplementedError, "conjugate_grad"),
    "blind": ([Blind(), POINTS], {}, NotImplementedError, "neither logmap nor dist"),
    "other metric": (
        [geoopt.CanonicalStiefel(), torch.eye(3)[None, :, :2]],
        {},
        NotImplementedError,
        "neither logmap nor dist",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told(case):
    arguments, options, error, message = MISUSE[case]
    with pytest.raises(error, match=message):
        frechet_mean(*arguments, **options)


OFF = {
    "Sphere": (geoopt.Sphere(), 3 * torch.eye(3), "its norm is off 1 by 2"),
    "PoincareBall": (geoopt.PoincareBall(), 2 * torch.eye(2), "norm lies out of the bounds"),
    "asymmetric": (geoopt.SymmetricPositiveDefinite(), torch.ones(2, 3, 3).triu(), "not symmetric"),
    "negative": (geoopt.SymmetricPositiveDefinite(), -torch.eye(3).expand(2, 3, 3), "not positive"),
    "Stiefel": (geoopt.EuclideanStiefel(), torch.ones(2, 4, 2), "X.T X != I"),
}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", OFF)
def test_points_off_the_manifold_are_refused(name, stacked):
    manifold, points, message = OFF[name]
    with pytest.raises(ValueError, match=rf"points\[0\] is not on .*{message}.*projx"):
        frechet_mean(manifold, points if stacked else list(points))


def test_single_precision_is_not_off_the_manifold():
    points = torch.nn.functional.normalize(torch.randn(5, 300), dim=-1) * (1 + 1e-4)
    assert bool(frechet_mean(geoopt.Sphere(), points).converged)


def test_a_differentiable_distance_is_enough():
    """Chordal mean on the sphere: the normalised arithmetic mean."""
    solution = frechet_mean(Bare(), POINTS)
    assert solution.solver == "conjugate_gradient"
    expected = POINTS.mean(0) / POINTS.mean(0).norm()
    assert torch.allclose(solution.point, expected, atol=1e-7)
