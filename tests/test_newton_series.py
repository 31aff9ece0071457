"""Means of positive definite matrices without eigenvalues: against eigenvalues and Karcher."""

from __future__ import annotations

import geoopt
import pytest
import torch
from torch import Tensor

import manifold_merge.newton
from manifold_merge.accurate import SPD
from manifold_merge.frechet import frechet_mean
from manifold_merge.newton_series import _hessian, _solve, newton_by_series

FLOAT64 = torch.float64
MATRICES = geoopt.SymmetricPositiveDefinite()


def matrices(count: int, *batch: int, n: int = 8, ratio: float = 30.0, seed: int = 0) -> Tensor:
    """Random matrices whose eigenvalues lie between ratio**-½ and ratio**½."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, *batch, n, n, generator=generator, dtype=FLOAT64)
    values = torch.rand(count, *batch, n, generator=generator, dtype=FLOAT64) - 0.5
    frame = torch.linalg.qr(normal)[0]
    return (frame * (ratio**values)[..., None, :]) @ frame.mT


def gradients(mean: Tensor, points: Tensor, weights: Tensor | None = None) -> Tensor:
    """Norms of the mean logarithms, by eigenvalues."""
    root = torch.linalg.cholesky(mean.double())
    white = torch.linalg.inv(root) @ points.double() @ torch.linalg.inv(root).mT
    values, vectors = torch.linalg.eigh(white)
    logs = (vectors * values.log()[..., None, :]) @ vectors.mT
    if weights is None:
        weights = torch.full(points.shape[:-2], 1 / len(points), dtype=FLOAT64)
    return (weights[..., None, None] * logs).sum(0).norm(dim=(-2, -1))


def by_series(points: Tensor, tolerance: float = 1e-13, weights: Tensor | None = None):
    """The series alone, without what comes after it."""
    if weights is None:
        weights = torch.full(points.shape[:2], 1 / len(points), dtype=points.dtype)
    return newton_by_series(points, weights, None, tolerance, 1e-14)


@pytest.mark.parametrize("size", [1, 30])  # few matrices and many
@pytest.mark.parametrize("n", [6, 10, 16, 20])
@pytest.mark.parametrize("ratio", [1.0 + 1e-9, 1.1, 30.0, 300.0])
def test_gradients_vanish(n: int, ratio: float, size: int):
    points = matrices(8, size, n=n, ratio=ratio)
    found = by_series(points)
    assert bool(found.converged.all())
    true = gradients(found.point, points)
    assert float(true.amax()) <= 1e-12
    assert float((found.gradient_norm - true).abs().amax()) <= 1e-13


def test_mean_and_objective_are_those_of_karcher():
    points = matrices(6, 4, n=7)
    weights = torch.rand(6, 4, dtype=FLOAT64)
    weights[2, 1] = 0.0
    mean = frechet_mean(MATRICES, points, weights, tolerance=1e-13)
    other = frechet_mean(MATRICES, points, weights, solver="karcher", tolerance=1e-13)
    assert mean.solver == "newton"
    assert float(SPD().dist(mean.point, other.point).amax()) <= 1e-12
    torch.testing.assert_close(mean.objective, other.objective, rtol=1e-12, atol=0)
    assert int(mean.iterations.max()) <= 4
    assert bool((mean.point == mean.point.mT).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_units_do_not_matter(scale: float):
    points = matrices(5, 3)
    expected, found = by_series(points), by_series(scale * points)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.point / scale, expected.point, rtol=1e-11, atol=1e-12)


def test_single_precision():
    points = matrices(5, 6).float()
    mean = frechet_mean(MATRICES, points)
    assert mean.converged
    assert mean.point.dtype == torch.float32
    assert float(gradients(mean.point, points).amax()) <= 1e-5


def hard_batch() -> Tensor:
    """Easy problems between two that the series cannot do, and one of equal points."""
    points = matrices(6, 8, ratio=20.0)
    points[:, 2] = matrices(6, ratio=1e6, seed=1)
    points[:, 5] = matrices(6, ratio=3e3, seed=2)
    points[:, 6] = points[0, 6]
    return points


def test_hard_problems_are_left_to_eigenvalues(monkeypatch):
    rest = []
    original = manifold_merge.newton._by_models

    def by_models(problem, start):
        rest.append(problem.points.shape[1])
        return original(problem, start)

    monkeypatch.setattr(manifold_merge.newton, "_by_models", by_models)
    points = hard_batch()
    mean = frechet_mean(MATRICES, points)
    assert mean.converged
    assert rest in ([1], [2])
    assert float(gradients(mean.point, points).amax()) <= 1e-9


def test_companions_change_round_off_only():
    points = hard_batch()
    together = frechet_mean(MATRICES, points, tolerance=1e-12).point
    for i in (0, 1, 3, 4, 6, 7):
        alone = frechet_mean(MATRICES, points[:, i], tolerance=1e-12).point
        assert float(SPD().dist(alone, together[i])) <= 1e-13


@pytest.mark.parametrize("chunk", [1, 1500, 10**9])
def test_chunks_change_round_off_only(monkeypatch, chunk: int):
    points = matrices(4, 9)
    expected = by_series(points)
    monkeypatch.setattr("manifold_merge.newton_series.CHUNK", chunk)
    found = by_series(points)
    torch.testing.assert_close(found.point, expected.point, rtol=0, atol=1e-13)
    assert found.iterations.tolist() == expected.iterations.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_points_that_are_none_spoil_nothing_else(bad: float):
    points = matrices(4, 3)
    points[1, 1] = bad * torch.eye(8)
    found = by_series(points)
    assert found.converged.tolist() == [True, False, True]
    good = torch.tensor([0, 2])
    assert float(gradients(found.point[good], points[:, good]).amax()) <= 1e-12


def test_a_start_is_used(monkeypatch):
    starts = []

    def record(points, weights, start, *goal):
        starts.append(start)
        return newton_by_series(points, weights, start, *goal)

    monkeypatch.setattr(manifold_merge.newton, "newton_by_series", record)
    points = hard_batch()
    mean = frechet_mean(MATRICES, points, tolerance=1e-11)
    again = frechet_mean(MATRICES, points, start=mean.point, tolerance=1e-10)
    assert bool((starts[1] == mean.point).all())
    hard = torch.tensor([2, 5])  # these start there with eigenvalues
    assert again.iterations[hard].tolist() == [0, 0]
    assert bool((mean.iterations[hard] > 0).all())
    far = frechet_mean(MATRICES, points, start=100 * mean.point, tolerance=1e-11)
    assert float(SPD().dist(mean.point, far.point).amax()) <= 1e-9


def test_what_does_not_converge_is_told():
    points = matrices(4, 3)
    found = newton_by_series(points, torch.full((4, 3), 0.25, dtype=FLOAT64), points[0], 0.0, 0.0)
    assert not bool(found.converged.any())
    assert found.iterations.tolist() == [9, 9, 9]


def test_few_iterations_are_told():
    points = matrices(5, 3, ratio=100.0)
    mean = frechet_mean(MATRICES, points, max_iterations=1)
    assert not mean.converged
    assert "raise `max_iterations`" in mean.message


@pytest.mark.parametrize(("degree", "error"), [(4, 1e-3), (7, 3e-5)])
def test_hessian_is_that_of_the_eigenbases(degree: int, error: float):
    logs = matrices(3, 5, ratio=9.0).transpose(0, 1)
    logs = torch.linalg.eigh(logs)
    logs = (logs[1] * logs[0].log()[..., None, :]) @ logs[1].mT
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=FLOAT64).expand(5, 3)
    reach = float(torch.linalg.eigvalsh(logs).abs().max().div(2).tanh() ** 2)
    right = matrices(5, seed=3) - 1.5 * matrices(5, seed=4)
    found = _solve(_hessian(logs, weights, reach, degree), right)
    values, vectors = torch.linalg.eigh(logs)
    half = 0.5 * (values[..., :, None] - values[..., None, :])
    stiff = (half / half.tanh()).nan_to_num(1.0)
    image = vectors @ ((vectors.mT @ found[:, None] @ vectors) * stiff) @ vectors.mT
    image = (weights[..., None, None] * image).sum(1)
    assert float((image - right).norm() / right.norm()) <= error
    assert float((found - right).norm() / right.norm()) > 10 * error  # it is not the identity


def test_gradients_flow_through_the_mean():
    points = matrices(3, n=6, ratio=5.0).requires_grad_()
    direction = torch.randn(6, 6, dtype=FLOAT64)

    def value(x: Tensor) -> Tensor:
        return (frechet_mean(MATRICES, 0.5 * (x + x.mT), tolerance=1e-14).point * direction).sum()

    (found,) = torch.autograd.grad(value(points), points)
    step = 1e-5 * matrices(3, n=6, seed=5)
    with torch.no_grad():
        expected = (value(points + step) - value(points - step)) / 2
    assert float((found * step).sum()) == pytest.approx(float(expected), rel=1e-6)
