"""Newton's method for means on spheres and positive definite matrices, all problems at once.

On these symmetric spaces the Hessian of the squared distance is known in closed form: along the
geodesic to an anchor it is 1, and across it θ cot θ (sphere, angle θ) or δ/2 coth δ/2 (positive
definite matrices, δ a difference of logarithmic eigenvalues). Newton's step costs little more than
Karcher's, and a few of them suffice where Karcher's iteration takes some twenty.

Newton's method finds critical points, not minima. A result is only taken where the Hessian is
positive definite on the way and the objective did not grow; other elements go to Karcher.

Source: Ferreira, Xavier, Costeira and Barroso, Newton algorithms for Riemannian distance related
problems (2013).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_merge.accurate import SPD, Sphere, safe_eigh
from manifold_merge.linalg import adjoint
from manifold_merge.newton_series import has_series, newton_by_series
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solvers import Problem

__all__ = ["has_newton", "newton"]

MAX_STEPS = 15
# Spheres of more dimensions need no Newton: solving for a step would cost more than it saves.
MAX_DIMENSION = 64
INNER_STEPS = 12


class _Model(NamedTuple):
    """The objective at a point to second order, for each problem."""

    objective: Tensor
    gradient_norm: Tensor
    #: Returns the next point, and zeros where the model is convex.
    step: Callable[[], tuple[Tensor, Tensor]]
    #: Returns these zeros; the model is convex everywhere if it is ``None``.
    info: Callable[[], Tensor | int] | None = None


def has_newton(manifold: Any, shape: tuple[int, ...]) -> bool:
    """Whether means of points of this shape can be found by Newton's method."""
    if isinstance(manifold, Sphere):
        return manifold.projector is None and shape[-1] <= MAX_DIMENSION
    return isinstance(manifold, SPD)


def newton(problem: Problem, start: Tensor | None = None) -> FrechetSolution:
    """Newton's iteration from ``start``, ``(L, *point)``, with Karcher's as a safety net.

    Args:
        problem: On a sphere or on positive definite matrices, p = 2.
        start: ``(L, *point)``; a point that treats all anchors alike if ``None``.

    Returns:
        The solution; iterations of a problem end where its gradient is small enough.
    """
    points, weights = problem.points, problem.weights
    narrow = isinstance(problem.manifold, SPD) and points.numel()
    if not narrow or not has_series(tuple(points.shape[2:]), problem.max_iterations):
        return _by_models(problem, start)
    found = newton_by_series(points, weights, start, problem.tolerance, _floor(problem))
    return _completed(
        problem,
        found[:4],
        found.converged,
        lambda part, rows: _by_models(part, None if start is None else start[rows]),
    )


def _floor(problem: Problem) -> float:
    # Round-off, on the scale on which these manifolds are curved; Problem.floor costs more.
    return 100 * torch.finfo(problem.points.dtype).eps if problem.tolerance else 0.0


def _by_models(problem: Problem, start: Tensor | None) -> FrechetSolution:
    """Newton's iteration on spheres, and on matrices of any size and spectrum."""
    on_sphere = isinstance(problem.manifold, Sphere)
    order, weights = problem.points.transpose(0, 1).contiguous(), problem.weights.T
    start = problem.starts("auto")[0] if start is None else start
    x, count = start, torch.zeros(len(start), dtype=torch.long, device=start.device)
    floor = _floor(problem)
    first: Any = None
    failed: Any = 0
    for left in range(min(MAX_STEPS, problem.max_iterations), -1, -1):
        build = _sphere if on_sphere else _positive_definite
        model = build(x, order, weights, problem.tolerance)
        first = model.objective if first is None else first
        goal = model.objective.sqrt().mul_(problem.tolerance).add_(floor)
        going = model.gradient_norm > goal
        if left == 0 or not bool(going.any()):
            break
        count += going
        # A converged problem takes part in further steps, which only polish it.
        x, info = model.step()
        failed = failed + info
    if model.info is not None:  # a stationary point may be no minimum
        failed = failed + model.info()
    accepted = ~going & (failed == 0) & (model.objective <= first * (1 + 1e-9))
    begin = start
    return _completed(
        problem,
        (x, model.objective, model.gradient_norm, count),
        accepted,
        lambda part, rows: part.karcher(begin[rows]),
    )


def _completed(
    problem: Problem,
    found: tuple[Tensor, ...],
    accepted: Tensor,
    solve: Callable[[Problem, Tensor], FrechetSolution],
) -> FrechetSolution:
    """The solution of the accepted problems, and of the others by another solver."""
    point, objective, gradient_norm, count = found
    solution = FrechetSolution(
        point=point,
        objective=objective,
        gradient_norm=gradient_norm,
        iterations=count,
        status=torch.full_like(count, Status.CONVERGED),
        weights=problem.weights,
        solver="",
    )
    if bool(accepted.all()):
        return solution
    rows = (~accepted).nonzero()[:, 0]
    part = dataclasses.replace(
        problem, points=problem.points[:, rows], weights=problem.weights[:, rows]
    )
    rest = solve(part, rows)
    for name in ("point", "objective", "gradient_norm", "iterations", "status"):
        value = getattr(solution, name).clone()
        value[rows] = getattr(rest, name)
        solution = dataclasses.replace(solution, **{name: value})
    return solution


def _sphere(x: Tensor, points: Tensor, weights: Tensor, tolerance: float) -> _Model:
    chord = points - x[:, None]
    along = torch.bmm(chord, x[..., None])
    u = torch.baddbmm(chord, along, x[:, None], alpha=-1)
    sine, cosine = torch.linalg.vector_norm(u, dim=-1), along[..., 0] + 1
    angle = torch.atan2(sine, cosine)
    ratio = torch.nan_to_num(angle / sine, nan=1.0, posinf=1.0)  # at the point and its antipode
    pull = weights * ratio
    direction = torch.bmm(pull[:, None], u)[:, 0]

    def hessian() -> tuple[Tensor, Tensor]:
        across = pull * cosine  # θ cot θ
        # (1 - θ cot θ)/sin² θ loses digits for small angles, where it multiplies a small square.
        excess = (weights - across) / sine.square().clamp(min=1e-6)
        matrix = torch.bmm(adjoint(excess[..., None] * u), u)
        matrix.diagonal(dim1=-2, dim2=-1).add_(across.sum(-1, keepdim=True))
        return torch.linalg.cholesky_ex(matrix)

    def step() -> tuple[Tensor, Tensor]:
        lower, info = hessian()
        v = torch.cholesky_solve(direction[..., None], lower)[..., 0]
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        y = torch.addcmul(x * length.cos(), v, torch.sinc(length / torch.pi))
        return y / torch.linalg.vector_norm(y, dim=-1, keepdim=True), info

    objective, size = (
        (weights * angle.square()).sum(-1),
        torch.linalg.vector_norm(direction, dim=-1),
    )
    # Where all anchors are less than a right angle away, θ cot θ is positive.
    return _Model(objective, size, step, lambda: 0 if bool((cosine > 0).all()) else hessian()[1])


def _positive_definite(x: Tensor, points: Tensor, weights: Tensor, tolerance: float) -> _Model:
    # All in the frame of a Cholesky factor of x, in which x is the identity. The k eigenbases of a
    # problem stand side by side, (L, n, k n), so that sums over anchors are products of matrices.
    size_k, n = points.shape[1], x.shape[-1]
    root, info = torch.linalg.cholesky_ex(x)
    inverse = torch.linalg.solve_triangular(
        root, torch.eye(n, dtype=x.dtype, device=x.device), upper=False
    )
    half = (points.reshape(len(x), size_k * n, n) @ adjoint(inverse)).reshape(points.shape)
    values, vectors = safe_eigh(inverse[:, None] @ half)
    logs, shares = values.log(), weights
    bases = vectors.transpose(1, 2).reshape(len(x), n, size_k * n)
    pulls = (shares[..., None] * logs).reshape(len(x), 1, -1)
    direction = (bases * pulls) @ adjoint(bases)
    size = direction.square().sum((-2, -1)).sqrt()
    objective = (shares * logs.square().sum(-1)).sum(-1)

    def step() -> tuple[Tensor, Tensor]:
        delta = 0.5 * (logs[..., :, None] - logs[..., None, :])
        stiff = torch.where(delta.abs() > 1e-4, delta / delta.tanh(), 1 + delta.square() / 3)
        stiff = shares[..., None, None] * stiff.nan_to_num(1.0)

        def hessian(u: Tensor) -> Tensor:
            seen = (adjoint(bases) @ u).reshape(points.shape) @ vectors
            back = (seen * stiff) @ adjoint(vectors)
            return bases @ back.reshape(len(x), size_k * n, n)

        scale = objective.sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        # As many digits as the next iterate can have: the error of Newton's step is quadratic.
        accuracy = (0.1 * size / scale).clamp(min=0.1 * tolerance, max=0.02)
        v = _conjugate_gradients(hessian, direction, accuracy * size)
        rate, basis = safe_eigh(v)
        frame = root @ (basis * (0.5 * rate).exp()[..., None, :])
        return frame @ adjoint(frame), info

    return _Model(objective, size, step)


def _conjugate_gradients(hessian: Any, right: Tensor, goal: Tensor) -> Tensor:
    """Solve for symmetric matrices ``(L, n, n)``; the eigenvalues of these Hessians exceed 1."""
    solution, residual, direction = torch.zeros_like(right), right, right
    energy = residual.square().sum((-2, -1))
    for _ in range(INNER_STEPS):
        image = hessian(direction)
        curvature = (direction * image).sum((-2, -1))
        step = (energy / curvature.clamp(min=1e-300))[:, None, None]
        solution = solution + step * direction
        residual = residual - step * image
        new = residual.square().sum((-2, -1))
        if bool((new.sqrt() <= goal).all()):
            break
        direction = residual + (new / energy.clamp(min=1e-300))[:, None, None] * direction
        energy = new
    return solution
