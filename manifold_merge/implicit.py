"""Gradients through a Fréchet mean, by implicit differentiation.

The mean is where grad F(x) = 0, F = ½ Σ wᵢ d²(x, yᵢ). When an anchor moves by dyᵢ or a weight by
dwᵢ, the mean moves by dx with

    Hess F[dx] = -Σ D_{yᵢ} grad F[dyᵢ] + Σ dwᵢ log_x yᵢ.

Backward, one linear system with the Hessian is solved for each mean by conjugate gradients, Hess
F[λ] = the incoming gradient. The rest needs no derivative of a logarithm in its second argument: as
mixed second derivatives of d² may be taken in either order, <λ, D_{yᵢ} grad F[·]> is the derivative
along λ of -wᵢ log_{yᵢ} x. Iterations are not unrolled, so memory does not grow with them, and any
logarithm will do, also one that was found by a search. See Gould et al., arXiv:1607.05447, and
Blondel et al., arXiv:2105.15183.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, dist2_logmap, inner, norm
from manifold_merge.derivatives import along, in_gradient_metric, length_scale, lower, mean_hessian
from manifold_merge.quotient import QuotientManifold
from manifold_merge.sharded import is_sharded
from manifold_merge.solution import FrechetSolution
from manifold_merge.solvers import Problem

__all__ = ["differentiable", "with_gradient"]

MAX_ITERATIONS = 200


P = ParamSpec("P")


def differentiable(function: Callable[P, FrechetSolution]) -> Callable[P, FrechetSolution]:
    """Run a solver without gradients, and give its ``point`` a backward pass where one is wanted.

    Args:
        function: Takes manifold, points, weights and options, as ``frechet_mean`` does.

    Returns:
        The function; if points or weights require gradients, its ``point`` does.
    """

    @functools.wraps(function)
    def solve(*args: P.args, **kwargs: P.kwargs) -> FrechetSolution:
        with torch.no_grad():
            result = function(*args, **kwargs)
        positional: Any = args
        names = ("manifold", "points", "weights")
        given: dict[str, Any] = dict(zip(names, positional, strict=False)) | kwargs
        anchors: Any = given["points"]
        tensors = [*([anchors] if isinstance(anchors, Tensor) else anchors), given.get("weights")]
        wanted = any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
        if not (wanted and torch.is_grad_enabled()):
            return result
        if given.get("process_group") is not None:
            raise NotImplementedError(
                "process_group=: no gradient through means over processes; call frechet_mean under "
                "torch.no_grad(), or detach the points"
            )
        if any(map(is_sharded, tensors)):
            raise NotImplementedError(
                "points: no gradient through means of DTensors; call frechet_mean under "
                "torch.no_grad(), or detach the points"
            )
        if given.get("metrics") is not None or given.get("rank") is not None:
            raise NotImplementedError(
                "metrics=, rank=: no gradient through means in metrics of their anchors or of "
                "another rank; call frechet_mean under torch.no_grad()"
            )
        shapes = {tuple(t.shape) for t in given["points"]}
        if len(shapes) > 1:
            raise NotImplementedError(
                f"points: no gradient through means of different ranks, shapes {sorted(shapes)}; "
                "call frechet_mean under torch.no_grad()"
            )
        points: Any = given["points"]
        points = points if isinstance(points, Tensor) else torch.stack(list(points))
        weights: Any = given.get("weights")
        weights = result.weights if weights is None else torch.as_tensor(weights).to(points)
        point = with_gradient(
            given["manifold"],
            result.point,
            points,
            weights / weights.sum(0),
            given.get("p", 2),
        )
        return dataclasses.replace(result, point=point)

    return solve


def with_gradient(manifold: Any, mean: Tensor, points: Tensor, weights: Tensor, p: int) -> Tensor:
    """The mean, with a backward pass to points and weights.

    Args:
        manifold: Any geoopt manifold with ``logmap`` whose logarithm is the gradient of -½ d².
        mean: The converged mean, ``(..., *point)``.
        points: Anchors, ``(k, ..., *point)``.
        weights: Normalised weights, ``(k, ...)``.
        p: 2 or 1.

    Returns:
        The mean, ``(..., *point)``. Its gradient can be taken once.

    Raises:
        NotImplementedError: If the logarithm is not a gradient (distance ``"aligned"``).
    """
    if not getattr(manifold, "log_is_gradient", True):
        raise NotImplementedError(
            f"{manifold}: no gradient through the mean, as its logarithm is not the gradient of a "
            "squared distance; use distance='exact' or 'chordal', or call frechet_mean under "
            "torch.no_grad()"
        )
    return _ImplicitMean.apply(mean, points, weights, manifold, p)


class _ImplicitMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, points: Tensor, weights: Tensor, m: Any, p: int) -> Tensor:
        ctx.save_for_backward(mean, points, weights)
        ctx.manifold, ctx.p = m, p
        return mean.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mean, points, weights = ctx.saved_tensors
        manifold = ctx.manifold
        while isinstance(manifold, geoopt.Scaled):  # the mean is that of the base
            manifold = manifold.base
        manifold = in_gradient_metric(accurate(manifold))
        point = mean.shape[mean.ndim - manifold.ndim :]
        batch = mean.shape[: mean.ndim - manifold.ndim]
        count = len(points)
        spread = weights.reshape((*weights.shape, *(1,) * (len(batch) + 1 - weights.ndim)))
        work = mean.dtype if mean.device.type == "mps" else torch.float64
        x, g = (t.detach().to(work).reshape(-1, *point) for t in (mean, grad))
        y = points.detach().to(work).reshape(count, -1, *point)
        w = spread.detach().to(work).expand(count, *batch).reshape(count, -1)
        problem = Problem(manifold, y, w, ctx.p, None, 0.0, 0)
        state = problem.evaluate(x)
        scale, rgrad = length_scale(problem, state), manifold.egrad2rgrad(x, g)
        adjoint = _solve(problem, x, rgrad)
        squared, logs = _logs(manifold, x.expand_as(y), y)
        factor = w
        if ctx.p == 1:
            # A median that sits on an anchor moves with that anchor, and no other one moves it.
            distance = squared.clamp(min=0).sqrt()
            here = distance <= 1e-4 * distance.amax(0)
            others = torch.where(here, 0.0, w / distance.clamp(min=torch.finfo(work).tiny))
            force = norm(manifold, x, (others.reshape(*w.shape, *(1,) * len(point)) * logs).sum(0))
            # Close to an anchor the pull of the others tells: below its weight, it holds (Kuhn).
            here = here & ((w > 1.001 * force) | (distance <= 1e-9 * distance.amax(0)))
            held = here.any(0)
            factor = torch.where(here, 0.0, w / distance.clamp(min=torch.finfo(work).tiny))
            factor = torch.where(held, (here & (here.cumsum(0) == 1)).to(work), factor)
            adjoint = torch.where(held.reshape(-1, *(1,) * len(point)), rgrad, adjoint)
            scale = torch.where(held, state.scale, scale)

        def pull(z: Tensor) -> Tensor:
            """wᵢ log_{yᵢ} z (over d for the median) as covectors at the anchors."""
            there = _logs(manifold, y, z.expand_as(y))
            rate = factor
            if ctx.p == 1:
                moving = w / there[0].clamp(min=torch.finfo(work).tiny).sqrt()
                rate = torch.where(held | (factor == 0), factor, moving)
            return rate.reshape(*w.shape, *(1,) * len(point)) * lower(manifold, y, there[1])

        grad_points = grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_points = along(manifold, x, adjoint, pull, scale=scale)
            grad_points = grad_points.reshape(points.shape).to(points.dtype)
        if ctx.needs_input_grad[2]:
            slope = inner(manifold, x.expand_as(y), adjoint.expand_as(y), logs)
            if ctx.p == 1:
                slope = torch.where(held, 0.0, slope * factor / torch.where(w > 0, w, 1.0))
            slope = slope.reshape(count, *batch)
            grad_weights = slope.sum_to_size(spread.shape).reshape(weights.shape).to(weights.dtype)
        return None, grad_points, grad_weights, None, None


def _logs(manifold: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(manifold, QuotientManifold):
        return manifold.dist2_logmap(x, y)
    return dist2_logmap(manifold, x, y)


def _solve(problem: Problem, x: Tensor, right: Tensor) -> Tensor:
    """Conjugate gradients on Hess F[u] = right, each batch element for itself."""
    m = problem.manifold
    spread = (len(x), *(1,) * (x.ndim - 1))
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    energy = inner(m, x, residual, residual)
    goal = (1e-11**2 if x.dtype == torch.float64 else 1e-6**2) * energy
    active = energy > 0
    for _ in range(MAX_ITERATIONS):
        if not bool(active.any()):
            break
        image = mean_hessian(problem, x, direction)
        curvature = inner(m, x, direction, image)
        # At a minimum curvatures are positive; what is not is round-off in a null direction.
        active = active & (curvature > 0)
        step = torch.where(active, energy / torch.where(active, curvature, 1.0), 0.0)
        solution = solution + step.reshape(spread) * direction
        residual = residual - step.reshape(spread) * image
        new = inner(m, x, residual, residual)
        active = active & (new > goal)
        ratio = torch.where(active, new / torch.where(energy > 0, energy, 1.0), 0.0)
        direction = residual + ratio.reshape(spread) * direction
        energy = new
    return solution
