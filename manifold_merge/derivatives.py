"""Derivatives that solvers and implicit differentiation need, on any manifold with a logarithm.

Logarithms may be found by searches that autograd cannot see. Their directional derivatives are
taken by central differences of order four instead: with a step of eps^(1/5) they keep ten digits in
float64, and cost four logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import inner, norm
from manifold_merge.lora import LoRAQuotient
from manifold_merge.solvers import Problem

__all__ = [
    "along",
    "in_gradient_metric",
    "length_scale",
    "lower",
    "mean_direction",
    "mean_hessian",
    "transported",
]

# f(-2h), f(-h), f(h), f(2h), divided by h.
_STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


def lower(manifold: Any, x: Tensor, u: Tensor) -> Tensor:
    """The covector of ``u``: the array c with <c, v> = g_x(u, v) for each tangent vector v.

    It is the Euclidean gradient whose Riemannian gradient is ``u``.

    Args:
        manifold: Any geoopt manifold.
        x: Point, ``(..., *point)``.
        u: Tangent vector at ``x``, ``(..., *point)``.

    Returns:
        The covector, ``(..., *point)``.

    Example:
        >>> import geoopt, torch
        >>> x = torch.diag(torch.tensor([1.0, 2.0]))
        >>> lower(geoopt.SymmetricPositiveDefinite(), x, x)  # x⁻¹ u x⁻¹
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    x, u = torch.broadcast_tensors(x.detach(), u.detach())
    with torch.enable_grad():
        v = torch.zeros_like(u).requires_grad_()
        # A zero weight on v itself keeps the graph where a projection ignores its argument.
        value = inner(manifold, x, u, manifold.proju(x, v)).sum()
        (covector,) = torch.autograd.grad(value, v)
    return covector


def along(
    manifold: Any, x: Tensor, u: Tensor, function: Callable[[Tensor], Tensor], *, scale: Tensor
) -> Tensor:
    """Derivative of a tensor-valued function along the tangent vector ``u``.

    Args:
        manifold: Any geoopt manifold.
        x: Points, ``(L, *point)``.
        u: Tangent vectors, ``(L, *point)``.
        function: Takes points ``(L, *point)`` to tensors ``(..., L, *point)``.
        scale: Length on which the function changes much, ``(L,)``; sets the step.

    Returns:
        The derivatives, ``(..., L, *point)``; zero where ``u`` is.
    """
    length = norm(manifold, x, u)
    step = torch.finfo(x.dtype).eps ** 0.2 * scale
    tiny = torch.finfo(x.dtype).tiny
    spread = (len(x), *(1,) * manifold.ndim)
    unit = u / length.clamp(min=tiny).reshape(spread)
    terms = []
    for k, weight in _STENCIL:
        value = function(move(manifold, x, (k * step).reshape(spread) * unit))
        terms.append((weight * length / step.clamp(min=tiny)).reshape(spread) * value)
    return torch.stack(terms).sum(0)


def move(manifold: Any, x: Tensor, u: Tensor) -> Tensor:
    """A point in direction ``u``; on factor pairs a straight line of velocity ``u``."""
    return x + u if isinstance(manifold, LoRAQuotient) else manifold.expmap(x, u)


def transported(manifold: Any, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Bring ``v`` from ``y`` near ``x`` to the tangent space at ``x``."""
    if isinstance(manifold, geoopt.Manifold) and _has_transport(manifold):
        return manifold.transp(y, x, v)
    return manifold.proju(x, v)


def _has_transport(manifold: Any) -> bool:
    return getattr(type(manifold), "transp", None) is not geoopt.Manifold.transp


def in_gradient_metric(manifold: Any) -> Any:
    """The manifold in whose metric the logarithm is the gradient of -½ d².

    Chordal logarithms of factor pairs are gradients in the embedded metric, whatever metric their
    manifold has besides; the mean does not depend on it.
    """
    if isinstance(manifold, LoRAQuotient) and manifold.distance == "chordal":
        return LoRAQuotient(manifold.out_features, manifold.in_features, "embedded", "chordal")
    return manifold


def length_scale(problem: Problem, state: Any) -> Tensor:
    """Length on which the gradient of the cost changes much, ``(L,)``.

    The median's changes on the distance to the nearest anchor, however small; one at the iterate
    itself takes no part.
    """
    if problem.p == 2:
        return state.scale
    x = state.point[:, None]
    distances = norm(problem.manifold, x.expand_as(state.logs), state.logs)
    far = distances > 1e-9 * distances.amax(1, keepdim=True)
    return torch.where(far, distances, torch.inf).amin(1).clamp(max=state.scale)


def mean_direction(problem: Problem, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Minus the Riemannian gradient of the cost at ``x``, ``(L, *point)``."""
    state = problem.evaluate(x, rows)
    spread = (len(x), *(1,) * (x.ndim - 1))
    return state.stiffness.reshape(spread) * state.direction


def mean_hessian(problem: Problem, x: Tensor, u: Tensor, rows: Tensor | None = None) -> Tensor:
    """Riemannian Hessian of the cost at ``x``, applied to ``u``, both ``(L, *point)``.

    On factor pairs the Euclidean gradient is differentiated and converted with the connection term
    (:func:`manifold_merge.lora_hessian.ehess2rhess`); elsewhere the gradient is brought back from
    nearby points by the manifold's transport. Derivatives along ``u`` are central differences of
    order four.
    """
    manifold = problem.manifold
    scale = length_scale(problem, problem.evaluate(x, rows))
    if isinstance(manifold, LoRAQuotient):

        def egrad(y: Tensor) -> Tensor:
            return -lower(manifold, y, mean_direction(problem, y, rows))

        ehess = along(manifold, x, u, egrad, scale=scale)
        return manifold.ehess2rhess(x, egrad(x), ehess, u)

    def back(y: Tensor) -> Tensor:
        return -transported(manifold, x, y, mean_direction(problem, y, rows))

    return manifold.proju(x, along(manifold, x, u, back, scale=scale))
