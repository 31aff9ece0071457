"""Many points of one manifold side by side: a product manifold whose factors are all alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge import accurate as digits
from manifold_merge.linalg import broadcast_shapes
from manifold_merge.quotient import Gauge, QuotientManifold

__all__ = ["PowerManifold", "align_in", "gauge_of", "horizontal_in", "vertical_in"]


class PowerManifold(geoopt.Manifold):
    """Arrays of ``count`` points of a manifold, ``(..., count, *point)``, with the sum of metrics.

    Args:
        base: Any geoopt manifold.
        count: Number of points.

    Raises:
        ValueError: If the count is not positive.

    Example:
        >>> import geoopt, torch
        >>> plane = PowerManifold(geoopt.Euclidean(1), 2)
        >>> plane.dist(torch.zeros(2, 3), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        tensor(5.)
    """

    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def __init__(self, base: geoopt.Manifold, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        self.base: Any = digits.accurate(base)
        self.count = count
        self.name = f"{base.name}^{count}"
        self.ndim = int(base.ndim) + 1
        self.reversible = bool(base.reversible)

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Sum of the inner products of all factors, of the batch shape."""
        value = digits.inner(self.base, x, u, v).sum(-1)
        return value[(..., *(None,) * self.ndim)] if keepdim else value

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of ``u``, of the batch shape."""
        return root(self.inner(x, u, keepdim=keepdim))

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The terms of the inner product that the base reports for each point."""
        value = self.base.component_inner(x, u, v)
        return value.expand(broadcast_shapes(x.shape, u.shape))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project each vector, ``(..., count, *point)``."""
        return self.base.proju(x, u)

    def projx(self, x: Tensor) -> Tensor:
        """Project each point, ``(..., count, *point)``."""
        return self.base.projx(x)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The gradient on each factor, ``(..., count, *point)``."""
        return self.base.egrad2rgrad(x, u)

    @__scaling__(ScalingInfo())
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """The Hessian on each factor, where the base knows it, ``(..., count, *point)``."""
        if isinstance(self.base, geoopt.Euclidean):
            return ehess
        if not hasattr(self.base, "ehess2rhess"):
            raise NotImplementedError(f"{self.base} has no ehess2rhess")
        return self.base.ehess2rhess(x, egrad, ehess, u)

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract on each factor, ``(..., count, *point)``."""
        return self.base.retr(x, u)

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow a geodesic on each factor, ``(..., count, *point)``."""
        return self.base.expmap(x, u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The logarithm on each factor, ``(..., count, *point)``."""
        return self.base.logmap(x, y)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport on each factor, ``(..., count, *point)``."""
        return self.base.transp(x, y, v)

    @__scaling__(ScalingInfo(2))
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Sum of squared distances, of the batch shape."""
        value = self.base.dist2(x, y).sum(-1)
        return value[(..., *(None,) * self.ndim)] if keepdim else value

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance, of the batch shape."""
        return root(self.dist2(x, y, keepdim=keepdim))

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(self, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., count, *point)``."""
        squared, log = digits.dist2_logmap(self.base, x, y)
        return squared.sum(-1), log

    @__scaling__(ScalingInfo())
    def random(self, *size: Any, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Random points of the base, ``(..., count, *point)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        point = self.base.random(*shape, **kwargs).as_subclass(Tensor)
        return geoopt.ManifoldTensor(point, manifold=self)

    @__scaling__(ScalingInfo())
    def origin(self, *size: Any, **kwargs: Any) -> geoopt.ManifoldTensor:
        """The origin of the base, repeated, ``(..., count, *point)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        point = self.base.origin(*shape, **kwargs).as_subclass(Tensor)
        return geoopt.ManifoldTensor(point, manifold=self)

    def pairwise_score(self, x: Tensor, y: Tensor) -> Tensor:
        """How well point i of ``x`` fits point j of ``y``, up to terms of i or j alone.

        Args:
            x: ``(..., count, *point)``.
            y: ``(..., count, *point)``.

        Returns:
            Scores ``(..., count, count)`` of which an assignment maximises the sum; -½ d² up to
            terms that no assignment changes. On flat bases it is one product of matrices.
        """
        from manifold_merge.fisher import ConstantMetric

        base, point = self.base, self.ndim - 1
        if isinstance(base, geoopt.Euclidean | ConstantMetric):
            dual = base.covector(x) if isinstance(base, ConstantMetric) else x
            left, right = (z.flatten(z.ndim - point) if point else z[..., None] for z in (dual, y))
            return left @ right.mT
        return -0.5 * self.pairwise_dist2(x, y)

    def pairwise_dist2(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared distances of each point of ``x`` to each of ``y``, ``(..., count, count)``."""
        split = self.ndim - 1
        left = x.unsqueeze(x.ndim - split)
        right = y.unsqueeze(y.ndim - split - 1)
        return self.base.dist2(left, right)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        place = len(shape) - self.ndim
        if place < 0 or shape[place] != self.count:
            return False, (
                f"`{name}` should have shape (..., {self.count}, *point of {self.base.name}), "
                f"got {tuple(shape)}"
            )
        return self.base._check_shape(tuple(shape), name)

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, f"`x` has {int((~x.isfinite()).sum())} entries not finite"
        return self.base._check_point_on_manifold(x, atol=atol, rtol=rtol)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(u.isfinite().all()):
            return False, f"`u` has {int((~u.isfinite()).sum())} entries not finite"
        return self.base._check_vector_on_tangent(x, u, atol=atol, rtol=rtol)


def root(squared: Tensor) -> Tensor:
    """Square root with derivative zero, not infinite, at zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


# --- gauges inside the factors: quotients, and products that hold quotients ----------------------


def _parts(base: Any, *arrays: Tensor) -> list[tuple[Any, ...]]:
    return [
        (manifold, *(base.take_submanifold_value(a, i) for a in arrays))
        for i, manifold in enumerate(base.manifolds)
    ]


def _map_parts(base: Any, function: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
    done = [function(manifold, *parts) for manifold, *parts in _parts(base, *arrays)]
    batch = arrays[-1].shape[:-1]
    return torch.cat([x.reshape(*batch, -1) for x in done], -1)


def align_in(base: Any, x: Tensor, y: Tensor) -> Tensor:
    """Representatives of ``y`` closest to ``x`` on a quotient, or on the quotients of a product."""
    if isinstance(base, QuotientManifold):
        return base.align(x, y)
    if isinstance(base, geoopt.ProductManifold):
        x, y = torch.broadcast_tensors(x, y)
        return _map_parts(base, align_in, x, y)
    return y


def horizontal_in(base: Any, x: Tensor, u: Tensor) -> Tensor:
    """The horizontal part of ``u`` on a quotient, or on the quotients of a product."""
    if isinstance(base, QuotientManifold):
        return base.horizontal(x, u)
    if isinstance(base, geoopt.ProductManifold):
        x, u = torch.broadcast_tensors(x, u)
        return _map_parts(base, horizontal_in, x, u)
    return u


def vertical_in(base: Any, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random vertical vector on a quotient, or on the quotients of a product; else zero."""
    if isinstance(base, QuotientManifold):
        return base.random_vertical(x, generator=generator)
    if isinstance(base, geoopt.ProductManifold):
        return _map_parts(base, lambda m, part: vertical_in(m, part, generator), x)
    return torch.zeros_like(x)


def gauge_of(
    base: Any, x: Tensor, generator: torch.Generator | None, condition: float
) -> Gauge | None:
    """A random change of gauge on a quotient, or on the quotients of a product; else ``None``."""
    if isinstance(base, QuotientManifold):
        return base.random_gauge(x, generator=generator, condition=condition)
    if isinstance(base, geoopt.ProductManifold):
        gauges = [gauge_of(m, part, generator, condition) for m, part in _parts(base, x)]
        if any(gauges):

            def act(array: Tensor) -> Tensor:
                pieces = [
                    gauge(part) if gauge else part
                    for (_, part), gauge in zip(_parts(base, array), gauges, strict=True)
                ]
                batch = array.shape[:-1]
                return torch.cat([p.reshape(*batch, -1) for p in pieces], -1)

            return act
    return None
