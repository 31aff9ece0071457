"""Multisets of points: arrays of points modulo their order."""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge import accurate as digits
from manifold_merge.assignment import assign, sinkhorn
from manifold_merge.linalg import broadcast_shapes
from manifold_merge.power import (
    PowerManifold,
    align_in,
    gauge_of,
    horizontal_in,
    root,
    vertical_in,
)
from manifold_merge.quotient import Gauge, QuotientManifold

__all__ = ["PermutationQuotient"]

ASSIGNMENTS = ("exact", "sinkhorn")


class PermutationQuotient(QuotientManifold):
    """Multisets of ``count`` points of a manifold: base^count modulo the order of the points.

    A point is an array ``(..., count, *point of base)``; arrays that differ by a permutation of
    the points are one class, and d²(x, y) = min over p of Σᵢ d_base²(xᵢ, y_p(i)). A hidden layer
    is a multiset of units (base ``Euclidean(1)``, a unit being [w_in, b, w_out]); a layer of heads
    is a multiset over a product of two ``LoRAQuotient``, whose group is GL(d) ≀ S_count.

    Args:
        base: Any geoopt manifold, itself a quotient or a product if need be.
        count: Number of points in a multiset.
        assignment: ``"exact"`` (a linear assignment problem, solved by scipy) or ``"sinkhorn"``:
            every point is matched in part to every other, which makes the distance smooth. Then
            d²(x, y) = min over doubly stochastic P of Σ Pᵢⱼ dᵢⱼ² + T Σ Pᵢⱼ log(count Pᵢⱼ), at
            least the exact one and at most T · count · log(count) above it; logmap is its gradient.
        temperature: T, in the units of a squared distance of the base.
        iterations: Normalisations of Sinkhorn's algorithm.

    Raises:
        ValueError: If an option is unknown or a number not positive.

    Source: Ainsworth, Hayase and Srinivasa, arXiv:2209.04836 (units of networks); Cuturi,
    arXiv:1306.0895 (entropy).

    Example:
        >>> import geoopt, torch
        >>> units = PermutationQuotient(geoopt.Euclidean(1), count=2)
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> y = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> float(units.dist(x, y))  # the second unit of y is the first of x
        1.0
        >>> units.align(x, y).tolist()
        [[0.0, 1.0], [2.0, 1.0]]
    """

    __scaling__ = QuotientManifold.__scaling__.copy()
    # Gradients are those of the base at the matched points, which are differentiable themselves.
    log_is_searched = False

    def __init__(
        self,
        base: geoopt.Manifold,
        count: int,
        *,
        assignment: str = "exact",
        temperature: float = 0.1,
        iterations: int = 100,
    ) -> None:
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment: expected one of {ASSIGNMENTS}, got {assignment!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        super().__init__(PowerManifold(base, count))
        self.count = count
        self.assignment = assignment
        self.temperature = temperature
        self.iterations = iterations
        self.log_is_gradient = bool(getattr(base, "log_is_gradient", True))

    @property
    def base(self) -> Any:
        """The manifold of one point."""
        return self.total.base

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the base's, as geoopt's error messages print it."""
        return f"PermutationQuotient({self.base.name}, {self.count})"

    # --- matching --------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def match(self, x: Tensor, y: Tensor) -> Tensor:
        """The permutation that matches the points of ``y`` to those of ``x``.

        Args:
            x: Point, ``(..., count, *point)``.
            y: Point, ``(..., count, *point)``; batch dimensions broadcast.

        Returns:
            p, ``(..., count)``: point p[i] of ``y`` belongs to point i of ``x``.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        with torch.no_grad():
            return assign(self.total.pairwise_score(x, y))

    def plan(self, x: Tensor, y: Tensor) -> Tensor:
        """Sinkhorn's doubly stochastic plan at ``temperature``, ``(..., count, count)``.

        It is differentiable in both points.

        Args:
            x: Point, ``(..., count, *point)``.
            y: Point, ``(..., count, *point)``; batch dimensions broadcast.
        """
        return sinkhorn(-self.total.pairwise_dist2(x, y), self.temperature, self.iterations)

    def _reorder(self, x: Tensor, permutation: Tensor) -> Tensor:
        point = x.shape[x.ndim - self.ndim + 1 :]
        batch = broadcast_shapes(x.shape[: x.ndim - self.ndim], permutation.shape[:-1])
        x = x.expand(*batch, *x.shape[x.ndim - self.ndim :])
        index = permutation.expand(*batch, self.count)
        index = index[(..., *(None,) * len(point))].expand(*batch, self.count, *point)
        return x.gather(len(batch), index)

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        return align_in(self.base, x, self._reorder(y, self.match(x, y)))

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        return horizontal_in(self.base, x, u)

    @__scaling__(ScalingInfo())
    def random_vertical(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A vertical vector of the base at each point, ``(..., count, *point)``; zero if none."""
        return vertical_in(self.base, x, generator)

    @__scaling__(ScalingInfo())
    def random_gauge(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Gauge:
        """A random order of the points, after a random gauge of the base for each of them.

        Args:
            x: Point, ``(..., count, *point)``; one group element is drawn for each batch element.
            generator: Source of randomness.
            condition: Condition number of the base's group elements, where that has a meaning.

        Returns:
            A function from ``(..., count, *point)`` to ``(..., count, *point)``.
        """
        batch = x.shape[: x.ndim - self.ndim]
        drawn = torch.rand((*batch, self.count), generator=generator, device=x.device)
        order, inside = drawn.argsort(-1), gauge_of(self.base, x, generator, condition)
        return lambda array: self._reorder(inside(array) if inside else array, order)

    # --- distances -------------------------------------------------------------------------------

    @__scaling__(ScalingInfo(2))
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared distance of two multisets, of the batch shape; differentiable."""
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        if self.assignment == "exact":
            return self.total.dist2(x, self._reorder(y, self.match(x, y)), keepdim=keepdim)
        squared = self._transport(self.total.pairwise_dist2(x, y))[0]
        return squared[(..., *(None,) * self.ndim)] if keepdim else squared

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance of two multisets, of the batch shape."""
        return root(self.dist2(x, y, keepdim=keepdim))

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Horizontal vector at ``x`` to the matched points of ``y``, ``(..., count, *point)``."""
        return self.dist2_logmap(x, y)[1]

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(
        self, x: Tensor, y: Tensor, *, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., count, *point)`` in one computation.

        Args:
            x: Point, ``(..., count, *point)``.
            y: Point, ``(..., count, *point)``; batch dimensions broadcast.
            guess: Not needed: the matching is exact.
            precise: Not needed.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        if self.assignment == "exact":
            return self.total.dist2_logmap(x, self._reorder(y, self.match(x, y)))
        split = self.ndim - 1
        left, right = x.unsqueeze(x.ndim - split), y.unsqueeze(y.ndim - split - 1)
        left, right = torch.broadcast_tensors(left, right)
        squared, logs = digits.dist2_logmap(self.base, left, right)
        value, plan = self._transport(squared)
        return value, (plan[(..., *(None,) * split)] * logs).sum(-split - 1)

    def _transport(self, squared: Tensor) -> tuple[Tensor, Tensor]:
        """Entropic transport cost, ``(...)``, and its plan, ``(..., count, count)``."""
        plan = sinkhorn(-squared, self.temperature, self.iterations)
        # Columns sum to one exactly and rows nearly; normalise so that logarithms are averages.
        plan = plan / plan.sum(-1, keepdim=True)
        # At the least cost its derivative is that at a constant plan: the envelope theorem.
        fixed = plan.detach()
        entropy = torch.xlogy(fixed, self.count * fixed)
        return (fixed * squared + self.temperature * entropy).sum((-2, -1)), plan

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{self} needs none: autograd differentiates its distance")

    @__scaling__(ScalingInfo())
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """Hessian of a function of multisets applied to ``u``, ``(..., count, *point)``.

        Raises:
            NotImplementedError: If the base does not know its Hessian.
        """
        return self.total.ehess2rhess(x, egrad, ehess, u)

    @__scaling__(ScalingInfo())
    def origin(self, *size: Any, **kwargs: Any) -> geoopt.ManifoldTensor:
        """The origin of the base, repeated, ``(..., count, *point)``."""
        point = self.total.origin(*size, **kwargs).as_subclass(Tensor)
        return geoopt.ManifoldTensor(point, manifold=self)

    @__scaling__(ScalingInfo())
    def random(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> geoopt.ManifoldTensor:
        """Random points of the base, ``(..., count, *point)``."""
        point = self.total.random(*size, dtype=dtype, device=device, **kwargs).as_subclass(Tensor)
        return geoopt.ManifoldTensor(point, manifold=self)

    def relative_difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance by the size of the points where the base is flat, else the base's own unit."""
        distance = self.dist(x, y)
        if isinstance(self.base, geoopt.Euclidean):
            size = torch.maximum(self.total.norm(x, x), self.total.norm(y, y))
            return distance / torch.where(size > 0, size, 1.0)
        return distance
