"""The product of frames, spectra and frames that polar factorisations live in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import adjoint, hermitian_pinv, in_batches, matrix_exp
from manifold_merge.polar_alignment import Triple
from manifold_merge.stiefel import Stiefel, sym

__all__ = ["PolarFactors"]


class _Spectra(geoopt.SymmetricPositiveDefinite):
    """geoopt's affine-invariant geometry, defined on singular matrices where that has a meaning."""

    __scaling__ = geoopt.SymmetricPositiveDefinite.__scaling__.copy()

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """The inner product with pseudo-inverses, ``(...)`` or ``(..., 1, 1)``."""
        inverse = hermitian_pinv(x)
        left = inverse @ u
        right = left if v is None else inverse @ v
        return (left * adjoint(right)).sum((-2, -1), keepdim=keepdim)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Second-order retraction with a pseudo-inverse, ``(..., r, r)``."""
        return sym(x + u + 0.5 * u @ hermitian_pinv(x) @ u)

    def projx(self, x: Tensor) -> Tensor:
        """Nearest positive definite matrix; one that is symmetric to round-off stays as it is."""
        eps = torch.finfo(x.dtype).eps
        size = x.abs().amax((-2, -1), keepdim=True)
        values, basis = torch.linalg.eigh(sym(x))
        even = (x - adjoint(x)).abs().amax((-2, -1), keepdim=True) <= 1e3 * eps * size
        valid = even & (values[..., :1, None] > 0)
        floor = eps * torch.where(size[..., 0] > 0, size[..., 0], 1.0)
        repaired = (basis * values.abs().clamp(min=floor)[..., None, :]) @ adjoint(basis)
        return torch.where(valid, x, sym(repaired))

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(x, adjoint(x), atol=atol, rtol=rtol):
            return False, f"R is not symmetric with atol={atol}, rtol={rtol}"
        bad = int((torch.linalg.eigvalsh(x)[..., 0] <= 0).sum())
        if bad:
            return False, f"{bad} matrices R are not positive definite: W has a lower rank than r"
        return True, None


class PolarFactors(geoopt.Manifold):
    """The product St(m, r) × SPD(r) × St(n, r), with factors stacked in one array [U; R; V].

    The metric is |ξ_U|² + λ tr (R⁻¹ξ_R)² + |ξ_V|². It is the total manifold of
    :class:`PolarLoRAQuotient`, composed from :class:`~manifold_merge.stiefel.Stiefel` and geoopt's
    ``SymmetricPositiveDefinite``.

    Args:
        out_features: m.
        in_features: n.
        spectrum_weight: λ > 0.
    """

    ndim = 2
    name = "PolarFactors"
    reversible = False
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def __init__(self, out_features: int, in_features: int, spectrum_weight: float = 1.0) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.spectrum_weight = spectrum_weight
        frames = Stiefel()
        self.factors = torch.nn.ModuleList((frames, _Spectra(), frames))

    def split(self, x: Tensor) -> Triple:
        """The factors U ``(..., m, r)``, R ``(..., r, r)`` and V ``(..., n, r)``."""
        u, r, v = x.split((self.out_features, x.shape[-1], self.in_features), -2)
        return u, r, v

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack the factors to ``(..., m + r + n, r)``."""
        return torch.cat(tuple(parts), -2)

    @property
    def _manifolds(self) -> list[Any]:
        return list(self.factors)

    def _each(self, method: str, *arguments: Tensor) -> Tensor:
        arguments = tuple(torch.broadcast_tensors(*arguments))
        parts = zip(self._manifolds, *(self.split(a) for a in arguments), strict=True)
        return self.join([in_batches(getattr(f, method), *given) for f, *given in parts])

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Inner product of tangent vectors, of the batch shape or ``(..., 1, 1)``."""
        v = u if v is None else v
        parts = zip(self._manifolds, self.split(x), self.split(u), self.split(v), strict=True)
        frame, spectrum, other = (f.inner(*given, keepdim=keepdim) for f, *given in parts)
        return frame + self.spectrum_weight * spectrum + other

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract each factor by geoopt's formula, ``(..., m + r + n, r)``."""
        return self._each("retr", x, u)

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic at time 1, factor by factor, ``(..., m + r + n, r)``."""
        return self._each("expmap", x, u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Velocity of the geodesic from ``x`` to ``y``, these representatives."""
        return self._each("logmap", x, y)

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance of the representatives, of the batch shape or ``(..., 1, 1)``."""
        return self.norm(x, self.logmap(x, y), keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project an array onto the tangent space, ``(..., m + r + n, r)``."""
        return self._each("proju", x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian from Euclidean gradient, ``(..., m + r + n, r)``."""
        frame, spectrum, other = self.split(self._each("egrad2rgrad", x, u))
        return self.join((frame, spectrum / self.spectrum_weight, other))

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point; factors that are valid to round-off stay as they are."""
        return self._each("projx", x)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Project frames' velocities, and transport the spectrum's in parallel."""
        return self._each("transp", x, y, v)

    @__scaling__(ScalingInfo())
    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> geoopt.ManifoldTensor:
        """Draw uniform frames and a spectrum around the identity."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        u, r, v = self.split(torch.randn(shape, dtype=dtype, device=device, **kwargs))
        r = matrix_exp(sym(r) / math.sqrt(r.shape[-1]))
        x = self.join((torch.linalg.qr(u)[0], r, torch.linalg.qr(v)[0]))
        return geoopt.ManifoldTensor(x, manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        m, n = self.out_features, self.in_features
        if len(shape) < 2 or shape[-2] != m + shape[-1] + n:
            return False, f"`{name}` should have shape (..., {m} + r + {n}, r), got {tuple(shape)}"
        if not 1 <= shape[-1] <= min(m, n):
            return False, f"`{name}` should have rank 1 <= r <= {min(m, n)}, got r = {shape[-1]}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, f"`x` has {int((~x.isfinite()).sum())} entries that are not finite"
        for factor, part, name in zip(self._manifolds, self.split(x), "URV", strict=True):
            ok, reason = factor._check_point_on_manifold(part, atol=atol, rtol=rtol)
            if not ok:
                return False, f"factor {name}: {reason}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        parts = zip(self._manifolds, self.split(x), self.split(u), "URV", strict=True)
        for factor, point, vector, name in parts:
            ok, reason = factor._check_vector_on_tangent(point, vector, atol=atol, rtol=rtol)
            if not ok:
                return False, f"factor {name}: {reason}"
        return True, None
