"""Conjugate gradients for a batch of linear systems, without forming a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradient", "dot"]


def dot(x: Tensor, y: Tensor, ndim: int) -> Tensor:
    """Inner product over the last ``ndim`` dimensions, of the batch shape."""
    return (x * y).flatten(x.ndim - ndim).sum(-1)


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    ndim: int,
    tolerance: float,
    max_iterations: int,
    *,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve operator(x) = target for a positive definite operator, each batch element on its own.

    Args:
        operator: Linear map of ``(..., *point)``.
        target: ``(..., *point)``.
        start: ``(..., *point)``.
        precondition: Approximate inverse of the operator, positive definite.
        ndim: Trailing dimensions that make up one point.
        tolerance: Preconditioned residual, relative to that of zero, that counts as solved.
        max_iterations: Greatest number of iterations.
        last: Return the last iterate, not that of the least residual. Each step lowers the error in
            the operator's norm, but the residual may grow for a while: a few steps of an outer
            iteration would come to nothing there.

    Returns:
        The solutions, the iterations that each took, and whether each reached the tolerance.

    Source: Hestenes and Stiefel (1952); preconditioned as in Saad, *Iterative Methods* (2003), 9.2.
    """
    x = start.expand(target.shape).clone()
    residual = target - operator(x)
    direction = z = precondition(residual)
    rho = dot(residual, z, ndim)
    goal = tolerance**2 * dot(target, precondition(target), ndim)
    count = torch.zeros(rho.shape, dtype=torch.long, device=x.device)
    best, least = x, rho
    for _ in range(max_iterations):
        running = rho > goal
        if not bool(running.any()):
            break
        image = operator(direction)
        curvature = dot(direction, image, ndim)
        step = torch.where(running & (curvature > 0), rho / curvature.clamp(min=1e-300), 0.0)
        stretched = step[(..., *(None,) * ndim)]
        x = x + stretched * direction
        residual = residual - stretched * image
        z = precondition(residual)
        new = dot(residual, z, ndim)
        ratio = torch.where(running, new / rho.clamp(min=1e-300), 0.0)
        direction = z + ratio[(..., *(None,) * ndim)] * direction
        rho, count = torch.where(running, new, rho), count + running
        better = rho < least
        best = torch.where(better[(..., *(None,) * ndim)], x, best)
        least = torch.minimum(least, rho)
    return (x if last else best), count, rho <= goal
