"""The central abstraction: a total manifold modulo a group of symmetries.

A point of a quotient manifold is a *class* of parameters that all mean the same model. It is stored
as any one member of the class, a representative, in the total manifold. Everything that a Fréchet
mean needs then follows from the total manifold and one more function, the **aligner**::

    dist(x, y)   = total.dist(x, align(x, y))
    logmap(x, y) = total.logmap(x, align(x, y))

where ``align(x, y)`` is the representative of ``y``'s class that lies closest to ``x``. Tangent
vectors of the quotient are stored as their horizontal lifts: tangent vectors of the total manifold
at the representative, orthogonal to the directions in which the class itself extends.

See Absil, Mahony and Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008), section 3.5,
and Boumal, *An Introduction to Optimization on Smooth Manifolds* (2023), chapter 9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import broadcast_shapes, stack_points

__all__ = ["QuotientManifold", "squared_distance"]

Gauge = Callable[[Tensor], Tensor]


class _SquaredDistance(torch.autograd.Function):
    """d²(x, y) with its exact derivative, -2 <covector(log_x y), ·>, and no unrolled iterations.

    Distances are found by loops whose length depends on the data. Neither autograd nor ``vmap``
    has to see them: the first variation formula gives the gradient, and as every method takes
    batches, a mapped dimension is one more batch dimension.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, manifold: Any) -> Tensor:
        return manifold._dist2(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.manifold = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        scale = -2 * grad[(..., *(None,) * ctx.manifold.ndim)]
        # A covector in closed form can be differentiated again, one that was searched for cannot.
        searched = getattr(ctx.manifold, "log_is_searched", False)
        covector = _Covector.apply if searched else lambda a, b, m: m._dist2_covector(a, b)
        grad_x = scale * covector(x, y, ctx.manifold) if ctx.needs_input_grad[0] else None
        grad_y = scale * covector(y, x, ctx.manifold) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor, manifold: Any) -> Any:
        return _SquaredDistance.apply(*_as_batch(info, in_dims, x, y), manifold), 0


class _Covector(torch.autograd.Function):
    """The derivative of -d²/2 where it takes a search: opaque to vmap, not differentiable."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, manifold: Any) -> Tensor:
        return manifold._dist2_covector(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.manifold = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError(
            f"second derivatives of the distance on {ctx.manifold} are not available: its "
            "logarithm is found by a search; use distance='chordal' or 'aligned', or differentiate "
            "the gradient by finite differences"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor, manifold: Any) -> Any:
        return _Covector.apply(*_as_batch(info, in_dims, x, y), manifold), 0


def _as_batch(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> list[Tensor]:
    """Make the mapped dimension of each tensor its first, ordinary batch dimension."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]


def squared_distance(manifold: Any, x: Tensor, y: Tensor) -> Tensor:
    """Squared distance with an exact first derivative, for manifolds that iterate to find it.

    Args:
        manifold: Provides ``_dist2(x, y)``, which is d² without gradient, and
            ``_dist2_covector(x, y)``, the Euclidean derivative of -d²/2 with respect to ``x``.
        x: Point, ``(..., *point)``.
        y: Point, ``(..., *point)``; batch dimensions broadcast.

    Returns:
        Squared distances of the batch shape.
    """
    batch = broadcast_shapes(x.shape[: -manifold.ndim], y.shape[: -manifold.ndim])
    x = x.expand(*batch, *x.shape[-manifold.ndim :])
    y = y.expand(*batch, *y.shape[-manifold.ndim :])
    return _SquaredDistance.apply(x, y, manifold)


class QuotientManifold(geoopt.Manifold):
    """A manifold whose points are classes of representatives in a total manifold.

    Subclasses write the aligner, ``_align``, and, to be tested, ``random_gauge``. If the group is
    discrete (permutations, signs) that is all. If it is continuous they also write ``_horizontal``,
    the orthogonal projection onto the horizontal space, and ``random_vertical``. Any other method
    may be overridden where a faster or more accurate formula than the total manifold's is known.

    ``random_gauge`` must be linear: it is applied to tangent vectors too. A group of translations
    is tested with ``check_manifold(..., skip=("gauge_invariance", "gauge_equivariance"))``.

    The group must act on the total manifold by isometries; otherwise distances between classes are
    not defined. :func:`manifold_merge.checks.check_manifold` tests that, and every other law.

    Args:
        total: The manifold in which representatives live. Its last ``ndim`` dimensions are one
            point and all dimensions before them are batch.

    Example:
        Lines through the origin: the sphere modulo sign, a complete new geometry.

        >>> import geoopt, torch
        >>> class ProjectiveSpace(QuotientManifold):
        ...     name = "ProjectiveSpace"
        ...     def __init__(self):
        ...         super().__init__(geoopt.SphereExact())
        ...     def _align(self, x, y):
        ...         closer = (x * y).sum(-1, keepdim=True) >= 0
        ...         return torch.where(closer, y, -y)
        >>> lines = ProjectiveSpace()
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
        >>> round(float(lines.dist(x, y)), 4)  # the angle between lines, not between arrows
        0.9273
    """

    name = "Quotient"
    reversible = False
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def __init__(self, total: geoopt.Manifold) -> None:
        super().__init__()
        self.total = total

    @property
    def ndim(self) -> int:
        """Number of trailing dimensions that make up one point."""
        return int(self.total.ndim)

    # --- what makes a quotient: alignment, gauges, horizontality ---------------------------------

    def align(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the representative of the class of ``y`` that is closest to ``x``.

        Args:
            x: Point, ``(..., *point)``.
            y: Point, ``(..., *point)``; batch dimensions broadcast against those of ``x``.

        Returns:
            A representative of ``y``, ``(..., *point)``.

        Raises:
            ValueError: If either shape is not that of a point.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        return self._align(x, y)

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} has no aligner: write _align(x, y), which returns the "
            "representative of y that is closest to x"
        )

    def horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Project a total tangent vector onto the horizontal space at ``x``.

        The vertical part, which moves along the class and changes no model, is removed.

        Args:
            x: Point, ``(..., *point)``.
            u: Tangent vector of the total manifold at ``x``, ``(..., *point)``.

        Returns:
            The horizontal part of ``u``, ``(..., *point)``.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(u.shape), "u")
        return self._horizontal(x, u)

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        return u  # a discrete group has no vertical directions

    @__scaling__(ScalingInfo())
    def random_vertical(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw a vertical vector at ``x``: a direction that changes no model.

        Args:
            x: Point, ``(..., *point)``.
            generator: Source of randomness.

        Returns:
            A vertical vector, ``(..., *point)``; zero if the group is discrete.
        """
        return torch.zeros_like(x)

    @__scaling__(ScalingInfo())
    def random_gauge(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Gauge:
        """Draw a random group element and return its action.

        The action is linear in the ambient array, so the returned function maps points as well as
        tangent vectors.

        Args:
            x: Point, ``(..., *point)``; one group element is drawn for each batch element.
            generator: Source of randomness.
            condition: Condition number of the group element, where that has a meaning.

        Returns:
            A function from ``(..., *point)`` to ``(..., *point)``.

        Raises:
            NotImplementedError: If the subclass does not say how its group acts.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its group acts: add random_gauge(self, x, *, "
            "generator=None, condition=10.0), returning a function y -> g y"
        )

    def random_representative(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Tensor:
        """Return another representative of the class of ``x``, ``(..., *point)``."""
        return self.random_gauge(x, generator=generator, condition=condition)(x)

    def same_point(self, x: Tensor, y: Tensor, *, atol: float | None = None) -> Tensor:
        """Tell whether two representatives belong to one class.

        Args:
            x: Point, ``(..., *point)``.
            y: Point, ``(..., *point)``.
            atol: Greatest :meth:`relative_difference` that still counts as equal; by default what
                rounding in the dtype of ``x`` explains.

        Returns:
            Boolean tensor of the batch shape.
        """
        limit = 50 * torch.finfo(x.dtype).eps ** 0.5 if atol is None else atol
        return self.relative_difference(x, y) <= limit

    # --- geoopt's contract, from the total manifold ----------------------------------------------

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance between the classes of ``x`` and ``y``, of the batch shape."""
        return self.total.dist(x, self.align(x, y), keepdim=keepdim)

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(
        self, x: Tensor, y: Tensor, *, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Squared distance and logarithm in one computation.

        A Fréchet mean needs both at each step and they share nearly all their work.

        Args:
            x: Point, ``(..., *point)``.
            y: Point, ``(..., *point)``.
            guess: Approximate logarithm, for manifolds that iterate to find it.
            precise: ``False`` permits such manifolds to stop early.

        Returns:
            Squared distances of the batch shape, and tangent vectors ``(..., *point)``.
        """
        u = self.logmap(x, y)
        return self.inner(x, u), u

    def _dist2(self, x: Tensor, y: Tensor) -> Tensor:
        return self.dist2_logmap(x, y)[0]

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract the tangent vector ``u`` at ``x``, ``(..., *point)``."""
        return self.total.retr(x, u)

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic from ``x`` along the horizontal vector ``u``, ``(..., *point)``."""
        return self.total.expmap(x, u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Horizontal vector at ``x`` whose geodesic reaches ``y``'s class, ``(..., *point)``."""
        return self.horizontal(x, self.total.logmap(x, self.align(x, y)))

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Inner product of horizontal vectors at ``x``, of the batch shape."""
        return self.total.inner(x, u, v, keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project an ambient array onto the horizontal space at ``x``, ``(..., *point)``."""
        return self.horizontal(x, self.total.proju(x, u))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient, horizontal, of the Euclidean gradient ``u``, ``(..., *point)``."""
        return self.horizontal(x, self.total.egrad2rgrad(x, u))

    def projx(self, x: Tensor) -> Tensor:
        """Project an ambient array onto the manifold, ``(..., *point)``."""
        return self.total.projx(x)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y``, a representative in the same gauge as ``x``.

        Args:
            x: Point, ``(..., *point)``.
            y: Point, ``(..., *point)``, reached from ``x`` by ``retr`` or ``expmap``.
            v: Tangent vector at ``x``, ``(..., *point)``.

        Returns:
            Tangent vector at ``y``, ``(..., *point)``.
        """
        return self.horizontal(y, self.total.transp(x, y, v))

    def random(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> Tensor:
        """Draw a random representative of the given shape, ``(..., *point)``."""
        x = self.total.random(*size, dtype=dtype, device=device, **kwargs)
        return geoopt.ManifoldTensor(x.as_subclass(Tensor), manifold=self)

    # --- what a Fréchet mean asks of a manifold --------------------------------------------------

    # False where logmap is an approximation that is not the gradient of -½ d²: the mean is then the
    # point at which the weighted logarithms cancel.
    log_is_gradient: bool = True
    # True where logmap iterates, so that its own derivative is not available.
    log_is_searched: bool = True
    has_closed_form_mean: bool = False

    def closed_form_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """The weighted Fréchet mean, where ``has_closed_form_mean`` says that a formula exists.

        Args:
            points: Anchors, ``(k, ..., *point)``.
            weights: ``(k, ...)``, with sum 1.
            rank: Rank of the mean, on manifolds where it can be chosen.

        Returns:
            The mean, ``(..., *point)``.
        """
        raise NotImplementedError(f"the mean on {type(self).__name__} has no closed form")

    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor | None:
        """A point that treats all anchors alike, to start iterations from, if one is known.

        Args:
            points: Anchors, ``(k, ..., *point)``.
            weights: ``(k, ...)``, with sum 1.
            rank: Rank of the mean, on manifolds where it can be chosen.

        Returns:
            A point, ``(..., *point)``, or ``None``.
        """
        return None

    def reduce(
        self, points: Sequence[Tensor], *, rank: int | None = None
    ) -> tuple[QuotientManifold, Tensor, Callable[[Tensor], Tensor]]:
        """Restrict a problem to the smallest totally geodesic part that holds all anchors.

        Args:
            points: Anchors, k tensors ``(..., *point)``.
            rank: Rank of the mean, on manifolds where it can be chosen.

        Returns:
            A manifold, the anchors on it stacked to ``(k, ..., *point)``, and the function that
            takes its points back to this manifold.

        Raises:
            ValueError: If a rank is given where points have none, or shapes differ.
        """
        if rank is not None:
            raise ValueError(f"rank: points of {self} have no rank to choose; leave it out")
        return self, stack_points(points), lambda x: x

    def relative_difference(self, x: Tensor, y: Tensor) -> Tensor:
        """How much two classes differ, in units that do not depend on their size; batch shape."""
        return self.dist(x, y)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        return self.total._check_shape(shape, name)

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return self.total._check_point_on_manifold(x, atol=atol, rtol=rtol)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        ok, reason = self.total._check_vector_on_tangent(x, u, atol=atol, rtol=rtol)
        if not ok:
            return ok, reason
        vertical = u - self._horizontal(x, u)
        if not torch.allclose(vertical, torch.zeros_like(vertical), atol=atol, rtol=rtol):
            size = float(vertical.detach().abs().max())
            return False, f"the vector has a vertical part of size {size:.2e} (atol={atol:.0e})"
        return True, None
