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
    #: Returns the next point, and where the model is convex.
    step: Callable[[], tuple[Tensor, Tensor]]
    #: Whether the model is convex without looking.
    certain: bool = True


def has_newton(manifold: Any, shape: tuple[int, ...]) -> bool:
    """Whether means of points of this shape can be found by Newton's method."""
    if isinstance(manifold, Sphere):
        return manifold.projector is None and shape[-1] <= MAX_DIMENSION
    return isinstance(manifold, SPD)


def newton(problem: Problem, start: Tensor) -> FrechetSolution:
    """Newton's iteration from ``start``, ``(L, *point)``, with Karcher's as a safety net.

    Args:
        problem: On a sphere or on positive definite matrices, p = 2.
        start: ``(L, *point)``.

    Returns:
        The solution; iterations of a problem end where its gradient is small enough.
    """
    on_sphere = isinstance(problem.manifold, Sphere)
    order = problem.points if on_sphere else problem.points.transpose(0, 1).contiguous()
    x, count = start, torch.zeros(len(start), dtype=torch.long, device=start.device)
    # Round-off, on the scale on which these manifolds are curved; Problem.floor costs more.
    floor = 100 * torch.finfo(start.dtype).eps if problem.tolerance else 0.0
    first: Any = None
    safe = torch.ones(len(start), dtype=torch.bool, device=start.device)
    for left in range(min(MAX_STEPS, problem.max_iterations), -1, -1):
        build = _sphere if on_sphere else _positive_definite
        model = build(x, order, problem.weights, problem.tolerance)
        first = model.objective if first is None else first
        goal = problem.tolerance * model.objective.sqrt() + floor
        going = model.gradient_norm > goal
        if left == 0 or not bool(going.any()):
            break
        count += going
        # A converged problem takes part in further steps, which only polish it.
        x, convex = model.step()
        safe &= convex
    if not model.certain:  # a stationary point may be no minimum
        safe &= model.step()[1]
    accepted = ~going & safe & (model.objective <= first * (1 + 1e-9))
    solution = FrechetSolution(
        point=x,
        objective=model.objective,
        gradient_norm=model.gradient_norm,
        iterations=count,
        status=torch.full_like(count, Status.CONVERGED),
        weights=problem.weights,
        solver="",
    )
    if bool(accepted.all()):
        return solution
    rows = (~accepted).nonzero()[:, 0]
    rest = dataclasses.replace(
        problem, points=problem.points[:, rows], weights=problem.weights[:, rows]
    ).karcher(start[rows])
    for name in ("point", "objective", "gradient_norm", "iterations", "status"):
        value = getattr(solution, name).clone()
        value[rows] = getattr(rest, name)
        solution = dataclasses.replace(solution, **{name: value})
    return solution


def _sphere(x: Tensor, points: Tensor, weights: Tensor, tolerance: float) -> _Model:
    chord = points - x
    cosine = (points * x).sum(-1)
    u = chord - (chord * x).sum(-1, keepdim=True) * x
    sine = torch.linalg.vector_norm(u, dim=-1)
    angle = torch.atan2(sine, cosine)
    ratio = angle / sine.clamp(min=torch.finfo(x.dtype).tiny)
    ratio = torch.where(sine > 0, ratio, 1.0)
    direction = ((weights * ratio)[..., None] * u).sum(0)

    def step() -> tuple[Tensor, Tensor]:
        across = cosine * ratio  # θ cot θ
        # (1 - θ cot θ)/sin² θ tends to 1/3; the quotient loses digits before.
        along = torch.where(sine > 1e-3, (1 - across) / sine.square().clamp(min=1e-30), 1 / 3)
        columns = ((weights * along)[..., None] * u).permute(1, 2, 0), u.transpose(0, 1)
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        hessian = columns[0] @ columns[1] + (weights * across).sum(0)[:, None, None] * eye
        lower, info = torch.linalg.cholesky_ex(hessian)
        v = torch.cholesky_solve(direction[..., None], lower)[..., 0]
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        y = x * length.cos() + v * torch.sinc(length / torch.pi)
        return y / torch.linalg.vector_norm(y, dim=-1, keepdim=True), info == 0

    objective, size = (weights * angle.square()).sum(0), torch.linalg.vector_norm(direction, dim=-1)
    return _Model(objective, size, step, certain=bool((cosine > 0).all()))


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
    logs, shares = values.log(), weights.T
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
        return frame @ adjoint(frame), info == 0

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
