"""Pairs of factors modulo GL(r), as arrays: what holds for every metric on them."""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.lora_metrics import Pair
from manifold_merge.quotient import Gauge, QuotientManifold

__all__ = ["FactorPairs"]


class FactorPairs(QuotientManifold):
    """Stacked factors X = [B; Aᵀ], ``(..., m + n, r)``, modulo (B, A) ~ (B G, G⁻¹A).

    Packing, gauges and random points. A subclass adds a metric: see
    :class:`manifold_merge.LoRAQuotient`.

    Args:
        out_features: m, rows of B and of W.
        in_features: n, columns of A and of W.

    Raises:
        ValueError: If a size is not positive.
    """

    __scaling__ = QuotientManifold.__scaling__.copy()

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(geoopt.Euclidean(ndim=2))
        if out_features < 1 or in_features < 1:
            raise ValueError(
                f"{type(self).__name__} needs positive sizes, got out_features={out_features} "
                f"and in_features={in_features}"
            )
        self.out_features = out_features
        self.in_features = in_features

    # --- factors ---------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def pack(self, B: Tensor, A: Tensor) -> Tensor:
        """Stack the factors of W = B A into a point.

        Args:
            B: ``(..., m, r)``.
            A: ``(..., r, n)``.

        Returns:
            The point [B; Aᵀ], ``(..., m + n, r)``.

        Raises:
            ValueError: If the shapes do not fit this manifold or each other.
        """
        expected = f"B (..., {self.out_features}, r) and A (..., r, {self.in_features})"
        if (
            B.ndim < 2
            or A.ndim < 2
            or B.shape[-2] != self.out_features
            or A.shape[-1] != self.in_features
            or B.shape[-1] != A.shape[-2]
        ):
            raise ValueError(
                f"pack expects {expected} of one rank r; got B {tuple(B.shape)} and "
                f"A {tuple(A.shape)}"
            )
        return torch.cat((B, adjoint(A)), -2)

    @__scaling__(ScalingInfo())
    def unpack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split a point into B ``(..., m, r)`` and A ``(..., r, n)``."""
        self._assert_check_shape(tuple(x.shape), "x")
        b, a = self._split(x)
        return b, adjoint(a)

    @__scaling__(ScalingInfo())
    def product(self, x: Tensor) -> Tensor:
        """The model itself, W = B A, ``(..., m, n)``."""
        b, a = self.unpack(x)
        return b @ a

    def _split(self, x: Tensor) -> Pair:
        return x[..., : self.out_features, :], x[..., self.out_features :, :]

    def _join(self, pair: Pair) -> Tensor:
        return torch.cat(pair, -2)

    # --- gauges ----------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def random_gauge(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Gauge:
        """Draw G in GL(r) and return its action, X = [B; Aᵀ] -> [B G; Aᵀ G⁻ᵀ].

        Args:
            x: Point, ``(..., m + n, r)``.
            generator: Source of randomness.
            condition: Condition number of each G.

        Returns:
            A function from ``(..., m + n, r)`` to ``(..., m + n, r)``.
        """
        r = x.shape[-1]
        like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        left, right = (
            torch.linalg.qr(torch.randn(*x.shape[:-2], r, r, generator=generator, **like))[0]
            for _ in range(2)
        )
        spread = torch.logspace(-0.5, 0.5, r, base=condition, **like)
        gauge = left * spread @ right
        inverse_adjoint = left / spread @ right
        return lambda z: self._join(
            (self._split(z)[0] @ gauge, self._split(z)[1] @ inverse_adjoint)
        )

    @__scaling__(ScalingInfo())
    def random_vertical(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw M and return the vertical vector [B M; -Aᵀ Mᵀ], ``(..., m + n, r)``."""
        r = x.shape[-1]
        m = torch.randn(*x.shape[:-2], r, r, generator=generator, dtype=x.dtype, device=x.device)
        b, a = self._split(x)
        return self._join((b @ m, -a @ adjoint(m)))

    # --- points ----------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> geoopt.ManifoldTensor:
        """Draw factors with independent entries, W having entries of variance 1.

        Args:
            size: Shape of the point, ``(..., m + n, r)``.
            dtype: Floating-point type.
            device: Device.
            kwargs: ``generator``, a source of randomness.

        Returns:
            A point, ``(..., m + n, r)``.
        """
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        x = torch.randn(shape, dtype=dtype, device=device, **kwargs) / shape[-1] ** 0.25
        return geoopt.ManifoldTensor(x, manifold=self)

    @__scaling__(ScalingInfo())
    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """The partial identity W = I_r, a fixed point of the right shape, ``(..., m + n, r)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        r = shape[-1]
        b, a = (
            torch.eye(k, r, dtype=dtype, device=device)
            for k in (self.out_features, self.in_features)
        )
        return geoopt.ManifoldTensor(self._join((b, a)).expand(shape).clone(), manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        m, n = self.out_features, self.in_features
        if len(shape) < 2 or shape[-2] != m + n:
            return False, f"`{name}` should have shape (..., {m} + {n}, r), got {tuple(shape)}"
        if not 1 <= shape[-1] <= min(m, n):
            return False, f"`{name}` should have rank 1 <= r <= {min(m, n)}, got r = {shape[-1]}"
        return True, None
