"""geoopt's manifolds with the digits and the logarithms that a Fréchet mean needs.

Some formulas of geoopt 0.5.1 lose the digits on which a mean of close points depends: on the sphere
``dist`` clamps the argument of acos, so that ``dist(x, x)`` is 4.5e-4 in float64 and the logarithm
of a close point is up to that much too long. An iteration that uses it never settles. geoopt itself
is left alone: :func:`accurate` returns a manifold with the same points and the same metric whose
distance and logarithm are computed by other formulas, and the solvers work on that one.

A subclass with a ``dist`` or ``logmap`` of its own is taken as it is.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import adjoint, broadcast_shapes
from manifold_merge.quotient import QuotientManifold
from manifold_merge.stiefel import Stiefel, sym

__all__ = [
    "SPD",
    "LinAlgError",
    "Sphere",
    "accurate",
    "dist2_logmap",
    "has_logmap",
    "inner",
    "norm",
    "unit_length",
    "weighted_sum",
]


def weighted_sum(weights: Tensor, points: Tensor) -> Tensor:
    """Σᵢ wᵢ xᵢ, ``(..., *point)``, of weights ``(k, ...)`` and points ``(k, ..., *point)``."""
    if weights.ndim == 1 and weights.dtype == points.dtype:
        return torch.tensordot(weights, points, 1)  # without a temporary of the size of all points
    spread = weights.reshape((*weights.shape, *(1,) * (points.ndim - weights.ndim)))
    return (spread * points).sum(0)


# torch.linalg exports it without declaring it.
LinAlgError: type[Exception] = vars(torch.linalg)["LinAlgError"]


def accurate(manifold: geoopt.Manifold) -> Any:
    """The same manifold, computed with formulas that keep their digits for close points.

    Args:
        manifold: Any geoopt manifold. Spheres, affine-invariant positive definite matrices,
            Euclidean Stiefel manifolds and hyperboloids, and products of them, are exchanged; all
            others are returned as they are.

    Returns:
        A manifold with the same points, tangent vectors and metric.

    Example:
        >>> import geoopt, torch
        >>> x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> float(geoopt.Sphere().dist(x, x)) > 1e-4  # acos of a clamped argument
        True
        >>> float(accurate(geoopt.Sphere()).dist(x, x))
        0.0
    """
    kind = type(manifold)
    if isinstance(manifold, QuotientManifold | Sphere | SPD | Stiefel):
        return manifold
    if _inherits(kind, geoopt.Sphere):
        return Sphere(manifold)
    if kind is geoopt.SymmetricPositiveDefinite:
        if manifold.default_metric.name != "AIM":
            raise ValueError(
                f"{manifold}: geoopt's exponential and logarithm are those of the affine-invariant "
                "metric (AIM) and do not fit this distance; use SymmetricPositiveDefinite('AIM')"
            )
        return SPD()
    if kind in (geoopt.EuclideanStiefel, geoopt.EuclideanStiefelExact):
        return Stiefel()
    if kind is geoopt.Lorentz:
        return _Lorentz(manifold.k)
    if kind is geoopt.ProductManifold:
        return _Product(
            *((accurate(m), s) for m, s in zip(manifold.manifolds, manifold.shapes, strict=True))
        )
    if kind is geoopt.Scaled:
        return geoopt.Scaled(accurate(manifold.base), manifold.scale.detach())
    return manifold


def _inherits(kind: type, base: type) -> bool:
    """Whether the class has distance, logarithm and exponential from ``base`` itself."""
    names = ("dist", "logmap", "expmap", "inner")
    return issubclass(kind, base) and all(
        getattr(kind, name) is getattr(base, name) for name in names
    )


class Sphere(geoopt.Sphere):
    """geoopt's sphere; angles by atan2 of two chords, accurate from 0 to π."""

    __scaling__ = geoopt.Sphere.__scaling__.copy()

    def __init__(self, base: geoopt.Sphere) -> None:
        geoopt.Manifold.__init__(self)
        self.register_buffer("projector", base.projector)

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(self, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., *point)``."""
        u = self.proju(x, y - x)
        sine = u.norm(dim=-1, keepdim=True)
        angle = torch.atan2(sine, (x * y).sum(-1, keepdim=True))
        # At an antipode no direction is shorter than another: the logarithm is taken to be zero.
        factor = torch.where(sine > 0, angle / sine.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
        return angle[..., 0].square(), factor * u

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm, ``(..., *point)``."""
        return self.dist2_logmap(x, y)[1]

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance, of the batch shape."""
        chords = (x - y).norm(dim=-1, keepdim=keepdim), (x + y).norm(dim=-1, keepdim=keepdim)
        return 2 * torch.atan2(*chords)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, ``(..., *point)``."""
        angle = u.norm(dim=-1, keepdim=True)
        y = x * angle.cos() + u * torch.sinc(angle / torch.pi)
        return y / y.norm(dim=-1, keepdim=True)

    retr = expmap

    @__scaling__(ScalingInfo())
    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """A point that treats all anchors alike, ``(..., *point)``."""
        return self.projx(weighted_sum(weights, points))


def safe_eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of symmetric matrices; NaN, in place of an error, of what is none."""
    try:
        values, vectors = torch.linalg.eigh(x)
    except LinAlgError:
        finite = x.isfinite().all(-1).all(-1)[..., None]
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        values, vectors = torch.linalg.eigh(torch.where(finite[..., None], x, eye))
        values = torch.where(finite, values, torch.nan)
    return values, vectors


class SPD(geoopt.SymmetricPositiveDefinite):
    """Affine-invariant geometry by Cholesky factors, shared by all points seen from one x."""

    __scaling__ = geoopt.SymmetricPositiveDefinite.__scaling__.copy()

    @staticmethod
    def _whiten(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        root, info = torch.linalg.cholesky_ex(x)
        root = torch.where((info == 0)[..., None, None], root, torch.nan)
        half = torch.linalg.solve_triangular(root, y, upper=False)
        return root, torch.linalg.solve_triangular(root, adjoint(half), upper=False)

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(self, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., *point)``."""
        root, white = self._whiten(x, y)
        values, vectors = safe_eigh(white)
        logs = values.log()
        frame = root @ vectors
        return logs.square().sum(-1), (frame * logs[..., None, :]) @ adjoint(frame)

    def logmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Logarithm, ``(..., *point)``."""
        return self.dist2_logmap(x, u)[1]

    def dist(self, x: Tensor, y: Tensor, keepdim: bool = False) -> Tensor:
        """Distance, of the batch shape."""
        squared = torch.linalg.eigvalsh(self._whiten(x, y)[1]).log().square()
        distance = squared.sum(-1).sqrt()
        return distance[..., None, None] if keepdim else distance

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, keepdim: bool = False) -> Tensor:
        """Inner product, of the batch shape."""
        left = self._whiten(x, u)[1]
        right = left if v is None else self._whiten(x, v)[1]
        return (left * right).sum((-2, -1), keepdim=keepdim)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, ``(..., *point)``."""
        root, white = self._whiten(x, u)
        values, vectors = safe_eigh(white)
        frame = root @ (vectors * (0.5 * values).exp()[..., None, :])
        return frame @ adjoint(frame)

    retr = expmap

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport along the geodesic, ``(..., *point)``."""
        root, white = self._whiten(x, y)
        values, vectors = safe_eigh(white)
        # Parallel transport along the geodesic: E v Eᵀ with E = (y x⁻¹)^½.
        half = root @ (vectors * values.sqrt()[..., None, :]) @ adjoint(vectors)
        carry = adjoint(torch.linalg.solve_triangular(adjoint(root), adjoint(half), upper=True))
        return sym(carry @ v @ adjoint(carry))

    @__scaling__(ScalingInfo())
    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """A point that treats all anchors alike, ``(..., *point)``."""
        # The geometric mean of arithmetic and harmonic mean, which is close to the mean of all.
        arithmetic = weighted_sum(weights, points)
        harmonic = torch.linalg.inv_ex(
            weighted_sum(weights, torch.linalg.inv_ex(points).inverse)
        ).inverse
        return self.expmap(arithmetic, 0.5 * self.logmap(arithmetic, sym(harmonic)))


class _Lorentz(geoopt.Lorentz):
    """geoopt's hyperboloid; distances by asinh of a chord in place of a clamped arcosh."""

    __scaling__ = geoopt.Lorentz.__scaling__.copy()

    def __init__(self, k: Tensor) -> None:
        super().__init__(k.detach())

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(self, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., *point)``."""
        step = y - x
        k = self.k.to(x.dtype)
        chord = self._minkowski(step, step).clamp(min=0).sqrt()
        length = 2 * k.sqrt() * torch.asinh(chord / (2 * k.sqrt()))
        u = step + self._minkowski(x, step) / k * x
        size = self._minkowski(u, u).clamp(min=0).sqrt()
        factor = torch.where(size > 0, length / size.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
        return length[..., 0].square(), factor * u

    def logmap(self, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
        """Logarithm, ``(..., *point)``."""
        return self.dist2_logmap(x, y)[1]

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False, dim: int = -1) -> Tensor:
        """Distance, of the batch shape."""
        distance = self.dist2_logmap(x, y)[0].sqrt()
        return distance[..., None] if keepdim else distance

    def expmap(self, x: Tensor, u: Tensor, *, norm_tan: bool = True, **_: Any) -> Tensor:
        """Exponential map, ``(..., *point)``."""
        root = self.k.to(x.dtype).sqrt()
        t = self._minkowski(u, u).clamp(min=0).sqrt() / root
        ratio = torch.where(t > 1e-4, torch.sinh(t) / t.clamp(min=1e-4), 1 + t * t / 6)
        y = x * torch.cosh(t) + u * ratio
        time = (y[..., 1:].square().sum(-1, keepdim=True) + root * root).sqrt()
        return torch.cat((time, y[..., 1:]), -1)

    def retr(self, x: Tensor, u: Tensor, **_: Any) -> Tensor:
        """Retraction: the exponential map."""
        return self.expmap(x, u)

    @staticmethod
    def _minkowski(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(-1, keepdim=True) - 2 * u[..., :1] * v[..., :1]


class _Product(geoopt.ProductManifold):
    """A product of accurate manifolds; distances and logarithms share their work."""

    __scaling__ = geoopt.ProductManifold.__scaling__.copy()

    def _parts(self, x: Tensor) -> list[Tensor]:
        return [self.take_submanifold_value(x, i) for i in range(self.n_manifolds)]

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(self, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., *point)``."""
        batch = broadcast_shapes(x.shape[:-1], y.shape[:-1])
        total, logs = x.new_zeros(batch), []
        for manifold, px, py in zip(self.manifolds, self._parts(x), self._parts(y), strict=True):
            squared, log = dist2_logmap(manifold, px, py)
            # A manifold of dimension 0 in geoopt's sense has one distance for each entry.
            total = total + squared.reshape(*batch, -1).sum(-1)
            logs.append(log.reshape(*batch, -1))
        return total, torch.cat(logs, -1)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm, ``(..., *point)``."""
        return self.dist2_logmap(x, y)[1]

    @__scaling__(ScalingInfo())
    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor | None:
        """A point that treats all anchors alike, ``(..., *point)``."""
        starts = []
        for manifold, part in zip(self.manifolds, self._parts(points), strict=True):
            if isinstance(manifold, geoopt.Euclidean):
                start = weighted_sum(weights, part)
            elif hasattr(manifold, "start_mean"):
                start = manifold.start_mean(part, weights, None)
            else:
                return None
            if start is None:
                return None
            starts.append(start.reshape(*points.shape[1:-1], -1))
        return torch.cat(starts, -1)


def dist2_logmap(manifold: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance ``(...)`` and logarithm ``(..., *point)`` on any manifold."""
    if isinstance(manifold, QuotientManifold):
        batch = broadcast_shapes(x.shape[: -manifold.ndim], y.shape[: -manifold.ndim])
        x = x.expand(*batch, *x.shape[-manifold.ndim :])
    if hasattr(manifold, "dist2_logmap"):
        return manifold.dist2_logmap(x, y)
    x, y = torch.broadcast_tensors(x, y)
    if not has_logmap(manifold):
        return _by_gradient(manifold, x, y)
    log = manifold.logmap(x, y)
    return inner(manifold, x, log), log


def has_logmap(manifold: Any) -> bool:
    """Whether the manifold, or each factor of a product, brings its own ``logmap``."""
    if isinstance(manifold, geoopt.ProductManifold):
        return all(has_logmap(m) for m in manifold.manifolds)
    if isinstance(manifold, geoopt.Scaled):
        return has_logmap(manifold.base)
    return _overrides(manifold, "logmap")


def _overrides(manifold: Any, name: str) -> bool:
    return getattr(type(manifold), name) is not getattr(geoopt.Manifold, name)


def _by_gradient(manifold: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """d² and -½ grad d², which is the logarithm where it is defined."""
    if not (_overrides(manifold, "dist") or _overrides(manifold, "dist2")):
        raise NotImplementedError(
            f"{manifold} has neither logmap nor dist, so that no solver has a distance to average: "
            "write logmap(x, y) in a subclass, or dist(x, y), which is enough for "
            "solver='conjugate_gradient', 'trust_region' and geoopt's optimisers"
        )
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        squared = manifold.dist2(leaf, y.detach())
        (egrad,) = torch.autograd.grad(squared.sum(), leaf)
    # Where x is y the root in most distances has no derivative; that of its square is zero.
    log = manifold.egrad2rgrad(x, -0.5 * egrad.nan_to_num(0.0, 0.0, 0.0))
    return squared.detach(), log


def inner(manifold: Any, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """Inner product of the batch shape, also where ``keepdim=False`` is wrong (PoincareBall)."""
    if isinstance(manifold, QuotientManifold):
        return manifold.inner(x, u, v)
    value = manifold.inner(x, u, v, keepdim=True)
    return value.reshape(value.shape[: value.ndim - manifold.ndim])


def unit_length(manifold: Any) -> float:
    """Length on which the manifold is curved where its points say nothing about it, else 0."""
    if isinstance(manifold, geoopt.Scaled):
        return float(manifold.scale.detach()) * unit_length(manifold.base)
    curved = (Sphere, SPD, Stiefel, _Lorentz, _Product, geoopt.Stereographic)
    return 1.0 if isinstance(manifold, curved) else 0.0


def norm(manifold: Any, x: Tensor, u: Tensor) -> Tensor:
    """Length of a tangent vector, of the batch shape."""
    return inner(manifold, x, u).clamp(min=0).sqrt()
