"""The three GL(r)-invariant Riemannian metrics on pairs of factors.

Throughout, B is ``(..., m, r)``, A is ``(..., n, r)`` (the transpose of PEFT's ``lora_A``), the
product is W = B Aᵀ, and P = AᵀA, Q = BᵀB are the Gram matrices. The group acts by
(B, A) -> (B G, A G⁻ᵀ); the vertical space is (B M, -A Mᵀ), M an r x r matrix.

A metric is defined by one map, ``covector``: g(u, v) = <covector(u), v>. Everything else has to
agree with it, and :mod:`manifold_merge.checks` tests that it does. Derivations:
docs/mathematics.md.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from manifold_merge.linalg import (
    _traced,
    adjoint,
    hermitian_pinv,
    integrate,
    matrix_exp,
    symmetric_sylvester,
)

__all__ = ["METRICS", "EmbeddedMetric", "InvariantMetric", "LoRAMetric", "MixedMetric"]

Pair = tuple[Tensor, Tensor]

# Chosen so that the order-8 integrator is accurate to about 1e-11 (tests/test_lora_geodesics.py).
STEPS_PER_UNIT_SPEED = 16.0
COARSE_STEPS = 4.0
STEPS_WHEN_TRACED = 16
MAX_STEPS = 128


class LoRAMetric(abc.ABC):
    """A GL(r)-invariant metric on pairs (B, A) of full column rank."""

    name: str
    speed_limit = math.inf  # of a minimising geodesic, in the units of `speed`
    is_integrated = False  # whether `fine` makes a difference to `exponential`

    @abc.abstractmethod
    def covector(self, x: Pair, u: Pair) -> Pair:
        """Lower the index: the pair c with <c, v> = g(u, v) for each v, shapes as ``x``."""

    @abc.abstractmethod
    def gradient(self, x: Pair, g: Pair) -> Pair:
        """Raise the index of the Euclidean gradient of a gauge-invariant function."""

    @abc.abstractmethod
    def horizontal(self, x: Pair, u: Pair) -> Pair:
        """Subtract the vertical part of ``u``."""

    @abc.abstractmethod
    def exponential(self, x: Pair, u: Pair, *, fine: bool = True) -> Pair:
        """Geodesic from ``x`` along the horizontal vector ``u``, at time 1.

        With ``fine=False`` an integrated geodesic is only accurate to about 1e-6.
        """

    @abc.abstractmethod
    def at_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        """log_x(c y) from ``u`` = log_x(y), exactly; c > 0 is ``ratio``, of the batch shape.

        docs/mathematics.md, *Scaling*.
        """

    @abc.abstractmethod
    def at_equal_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        """log_x(y) from ``u`` = log_x(c y): the inverse of :meth:`at_size`."""

    def inner(self, x: Pair, u: Pair, v: Pair) -> Tensor:
        """g(u, v), of shape ``(..., 1, 1)``."""
        cb, ca = self.covector(x, u)
        return (cb * v[0]).sum((-2, -1), keepdim=True) + (ca * v[1]).sum((-2, -1), keepdim=True)

    def shooting_residual(
        self, x: Pair, v: Pair, endpoint: Pair, y: Pair, chart: Callable[..., Pair]
    ) -> Pair:
        """How far, at x, the geodesic along ``v`` with this endpoint misses y, to second order.

        Args:
            x: Starting point.
            v: Starting velocity.
            endpoint: ``exponential(x, v)``.
            y: The point to reach.
            chart: Approximate logarithm, ``chart(metric, x, y)``.
        """
        there, here = chart(self, x, y), chart(self, x, endpoint)
        return there[0] - here[0], there[1] - here[1]

    @staticmethod
    def speed(x: Pair, u: Pair) -> Tensor:
        """Bound on the relative rate of change of a factor, |u Y⁺|₂, of the batch shape.

        Scale-free and gauge-invariant. It limits steps and sets the integrator's resolution.
        """
        rates = []
        for y, v in zip(x, u, strict=True):
            ratio = hermitian_pinv(adjoint(y) @ y) @ (adjoint(v) @ v)
            # The largest eigenvalue of a product of positive semi-definite matrices is at most
            # tr(M⁴)^¼, and at least that over r^¼: close enough, and three products.
            square = ratio @ ratio
            rates.append((square * adjoint(square)).sum((-2, -1)).clamp(min=0) ** 0.125)
        return torch.maximum(*rates)


class _IntegratedMetric(LoRAMetric):
    """A metric whose geodesics are integrated.

    A geodesic stays in the span of the starting point and the starting velocity, so its unknowns
    are the 2r x r coefficients in the basis [Y, u] and all geometry enters through the 2r x 2r
    Gram matrices of that basis, ``nb`` and ``na``.
    """

    # From rank loss to rank loss a factor turns by at most a right angle while it is scaled.
    speed_limit = 4.0
    is_integrated = True

    # Both metrics are cones: W -> c W multiplies lengths by c, and rays are geodesics.
    @override
    def at_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        c = ratio[..., None, None]
        return c * u[0] + (c - 1) / 2 * x[0], c * u[1] + (c - 1) / 2 * x[1]

    @override
    def at_equal_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        c = ratio[..., None, None]
        return (u[0] - (c - 1) / 2 * x[0]) / c, (u[1] - (c - 1) / 2 * x[1]) / c

    @staticmethod
    @abc.abstractmethod
    def acceleration(b: Tensor, a: Tensor, vb: Tensor, va: Tensor, nb: Tensor, na: Tensor) -> Pair:
        """Right-hand side of the geodesic equation, (B̈, Ä), in coefficients ``(..., 2r, r)``."""

    def exponential(self, x: Pair, u: Pair, *, fine: bool = True) -> Pair:
        # In the flat sector of the cone between x and its geodesic, the end has size |E + u|/|E|,
        # E = X/2. Integrating to the size of x instead stays clear of the apex and of long ways.
        ray = x[0] / 2, x[1] / 2
        moved = ray[0] + u[0], ray[1] + u[1]
        length = self.inner(x, ray, ray)
        known = length > 0
        c = (self.inner(x, moved, moved) / torch.where(known, length, 1.0)).clamp(min=0)
        c = torch.where(known & (c > 0), c, 1.0).sqrt()
        end = self._integrated(x, self.at_equal_size(x, u, c[..., 0, 0]), fine=fine)
        root = c.sqrt()
        return root * end[0], root * end[1]

    def _integrated(self, x: Pair, u: Pair, *, fine: bool) -> Pair:
        r = x[0].shape[-1]
        bases = [torch.cat((y, v), -1) for y, v in zip(x, u, strict=True)]
        grams = [adjoint(basis) @ basis for basis in bases]
        eye = torch.eye(2 * r, dtype=x[0].dtype, device=x[0].device)
        start = eye.expand(2, *bases[0].shape[:-2], 2 * r, 2 * r)
        end, _ = integrate(
            lambda q, v: torch.stack(self.acceleration(q[0], q[1], v[0], v[1], *grams)),
            start[..., :r],
            start[..., r:],
            steps=self._steps(x, u, STEPS_PER_UNIT_SPEED if fine else COARSE_STEPS),
        )
        return bases[0] @ end[0], bases[1] @ end[1]

    def _steps(self, x: Pair, u: Pair, density: float) -> int:
        if _traced(x[0]) or _traced(u[0]):
            return STEPS_WHEN_TRACED
        speed = float(self.speed(x, u).amax()) if x[0].numel() else 0.0
        if not math.isfinite(speed):
            return 1
        return min(MAX_STEPS, 1 + math.ceil(density * speed))


class MixedMetric(_IntegratedMetric):
    """g = tr(P ξ_Bᵀη_B) + tr(Q ξ_Aᵀη_A) = <ξ_B Aᵀ, η_B Aᵀ> + <B ξ_Aᵀ, B η_Aᵀ>.

    Its gradient is the preconditioner of Riemannian LoRA training (Zhang and Pilanci,
    arXiv:2402.02347), after Mishra, Apuroop and Sepulchre (arXiv:1211.1550).
    """

    name = "mixed"

    @override
    def covector(self, x: Pair, u: Pair) -> Pair:
        b, a = x
        return u[0] @ (adjoint(a) @ a), u[1] @ (adjoint(b) @ b)

    @override
    def gradient(self, x: Pair, g: Pair) -> Pair:
        b, a = x
        return self.horizontal(
            x, (g[0] @ hermitian_pinv(adjoint(a) @ a), g[1] @ hermitian_pinv(adjoint(b) @ b))
        )

    @override
    def horizontal(self, x: Pair, u: Pair) -> Pair:
        (b, a), (ub, ua) = x, u
        core_b, core_a = _core_coefficients(x, u)
        m = 0.5 * (core_b - adjoint(core_a))
        return ub - b @ m, ua + a @ adjoint(m)

    @staticmethod
    @override
    def acceleration(b: Tensor, a: Tensor, vb: Tensor, va: Tensor, nb: Tensor, na: Tensor) -> Pair:
        q_half, p_half = adjoint(vb) @ nb @ b, adjoint(va) @ na @ a
        dq, dp = q_half + adjoint(q_half), p_half + adjoint(p_half)
        return (
            (b @ (adjoint(va) @ na @ va) - vb @ dp) @ _inverse(adjoint(a) @ na @ a),
            (a @ (adjoint(vb) @ nb @ vb) - va @ dq) @ _inverse(adjoint(b) @ nb @ b),
        )


class EmbeddedMetric(_IntegratedMetric):
    """g = <dW, dW'> with dW = ξ_B Aᵀ + B ξ_Aᵀ: the fixed-rank matrices as a submanifold.

    Vandereycken, *Low-rank matrix completion by Riemannian optimization* (2013). dW does not
    determine the lift; among all lifts we take the one that is horizontal for the mixed metric.
    """

    name = "embedded"

    @override
    def covector(self, x: Pair, u: Pair) -> Pair:
        (b, a), (ub, ua) = x, u
        return (
            ub @ (adjoint(a) @ a) + b @ (adjoint(ua) @ a),
            ua @ (adjoint(b) @ b) + a @ (adjoint(ub) @ b),
        )

    @override
    def gradient(self, x: Pair, g: Pair) -> Pair:
        b, a = x
        ub, ua = METRICS["mixed"].gradient(x, g)
        core_b, core_a = _core_coefficients(x, (ub, ua))
        # The mixed metric weighs the core block UᵀdW V by one half, this one by one.
        return ub - 0.5 * b @ core_b, ua - 0.5 * a @ core_a

    @override
    def horizontal(self, x: Pair, u: Pair) -> Pair:
        return METRICS["mixed"].horizontal(x, u)

    @staticmethod
    @override
    def acceleration(b: Tensor, a: Tensor, vb: Tensor, va: Tensor, nb: Tensor, na: Tensor) -> Pair:
        p, q = adjoint(a) @ na @ a, adjoint(b) @ nb @ b
        p_inverse, q_inverse = _inverse(p), _inverse(q)
        core_a, core_b = adjoint(va) @ na @ a @ p_inverse, adjoint(vb) @ nb @ b @ q_inverse
        # The condition P_T(Ẅ) = 0 leaves r x r gauge freedom. It is spent on staying horizontal,
        # that is on keeping adjoint(core_b) equal to core_a.
        square = -2 * core_a @ core_a
        drift = (adjoint(va) @ na @ va - core_a @ p @ adjoint(core_a)) @ p_inverse - q_inverse @ (
            adjoint(vb) @ nb @ vb - core_b @ q @ adjoint(core_b)
        )
        return (
            -2 * vb @ core_a - 0.5 * b @ (square - drift),
            -2 * va @ core_b - 0.5 * a @ adjoint(square + drift),
        )


class InvariantMetric(LoRAMetric):
    """g = tr(Q⁻¹ξ_Bᵀη_B) + tr(P⁻¹ξ_Aᵀη_A): scale-free, complete, rank loss is infinitely far.

    The vertical part solves MᵀK + K Mᵀ = Q R P with K = Q P and R = Q⁻¹ξ_BᵀB - AᵀξA P⁻¹ (the
    transposes of the equation printed in arXiv:2505.05409 leave a vertical residual).
    """

    name = "invariant"

    # A cylinder: W -> c W is an isometry, and rays are geodesics of unit relative speed.
    @override
    def at_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        half = ratio.log()[..., None, None] / 2
        return u[0] + half * x[0], u[1] + half * x[1]

    @override
    def at_equal_size(self, x: Pair, u: Pair, ratio: Tensor) -> Pair:
        return self.at_size(x, u, 1 / ratio)

    @override
    def covector(self, x: Pair, u: Pair) -> Pair:
        b, a = x
        return u[0] @ hermitian_pinv(adjoint(b) @ b), u[1] @ hermitian_pinv(adjoint(a) @ a)

    @override
    def gradient(self, x: Pair, g: Pair) -> Pair:
        b, a = x
        return self.horizontal(x, (g[0] @ (adjoint(b) @ b), g[1] @ (adjoint(a) @ a)))

    @override
    def horizontal(self, x: Pair, u: Pair) -> Pair:
        (b, a), (ub, ua) = x, u
        p, q = adjoint(a) @ a, adjoint(b) @ b
        residual = hermitian_pinv(q) @ (adjoint(ub) @ b) - (adjoint(a) @ ua) @ hermitian_pinv(p)
        root = _psd_root(q)
        # With Q = L Lᵀ, K = L S L⁻¹ and S = LᵀP L symmetric: N = L⁻¹MᵀL solves N S + S N = LᵀR P L.
        s = adjoint(root) @ p @ root
        n = symmetric_sylvester(s, adjoint(root) @ residual @ p @ root)
        m = adjoint(root @ n @ torch.linalg.pinv(root))
        return ub - b @ m, ua + a @ adjoint(m)

    @override
    def exponential(self, x: Pair, u: Pair, *, fine: bool = True) -> Pair:
        b, a = (self._flow(y, v) for y, v in zip(x, u, strict=True))
        return b, a

    @override
    def shooting_residual(
        self, x: Pair, v: Pair, endpoint: Pair, y: Pair, chart: Callable[..., Pair]
    ) -> Pair:
        # Lengths grow exponentially in this metric, so one chart at x cannot serve. The miss is
        # measured at the endpoint and brought back by the flow of the geodesic itself.
        miss = chart(self, endpoint, y)
        eye = [torch.eye(z.shape[-2], dtype=z.dtype, device=z.device) for z in x]
        back = [
            torch.linalg.solve_ex(self._flow(z, w, one), e)[0]
            for z, w, e, one in zip(x, v, miss, eye, strict=True)
        ]
        return self.horizontal(x, (back[0], back[1]))

    @staticmethod
    def _flow(y: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
        """exp(Ω - Ωᵀ) exp(Ωᵀ) applied to Y, or to ``start``; Ω = u Y⁺.

        For Y all happens in the basis [Y, u], with 2r x 2r matrices.
        """
        if start is not None:
            omega = v @ hermitian_pinv(adjoint(y) @ y) @ adjoint(y)
            rotation = matrix_exp(omega - adjoint(omega))
            return rotation @ matrix_exp(adjoint(omega)) @ start
        r = y.shape[-1]
        basis = torch.cat((y, v), -1)
        gram = adjoint(basis) @ basis
        scaled = hermitian_pinv(gram[..., :r, :r]) @ gram.unflatten(-2, (2, r)).movedim(-3, 0)
        zero = torch.zeros_like(scaled[0])
        omega, omega_adjoint = torch.cat((zero, scaled[0]), -2), torch.cat((scaled[1], zero), -2)
        flow = matrix_exp(omega_adjoint)[..., :r]
        return basis @ (matrix_exp(omega - omega_adjoint) @ flow)


def _core_coefficients(x: Pair, u: Pair) -> Pair:
    """(B⁺ξ_B, A⁺ξ_A), the parts of a tangent vector inside the spans of the factors."""
    return tuple(  # type: ignore[return-value]
        hermitian_pinv(adjoint(y) @ y) @ (adjoint(y) @ v) for y, v in zip(x, u, strict=True)
    )


def _inverse(gram: Tensor) -> Tensor:
    # No exception for a singular matrix: the caller replaces what is not finite.
    return torch.linalg.inv_ex(gram)[0]


def _psd_root(gram: Tensor) -> Tensor:
    """A factor L with gram = L Lᵀ: Cholesky where it exists, the symmetric root elsewhere."""
    lower, info = torch.linalg.cholesky_ex(gram)
    if _traced(gram) or not bool(info.any()):
        return lower
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ adjoint(vectors)
    return torch.where((info == 0)[..., None, None], lower, root)


METRICS: dict[str, LoRAMetric] = {
    metric.name: metric for metric in (MixedMetric(), InvariantMetric(), EmbeddedMetric())
}
