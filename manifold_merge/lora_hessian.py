"""The Riemannian Hessian on :class:`~manifold_merge.lora.LoRAQuotient`, connection included.

A function f of W has a horizontal gradient field V(x) on factor pairs. On a quotient by a group
of isometries the Hessian is the horizontal part of the covariant derivative upstairs (O'Neill 1966;
Absil, Mahony and Sepulchre 2008, proposition 5.3.3; Boumal 2023, section 9.12):

    Hess f[u] = Hor(D V[u] + Γ(u, V)).

D V[u] is the product rule on ``egrad2rgrad``. The connection Γ is read off the geodesic equation
c'' = -Γ(c', c'), made bilinear:

    mixed:      Γ_B = ½ (u_B Ṗ_V + V_B Ṗ_u - B (u_AᵀV_A + V_Aᵀu_A)) P⁻¹,
    invariant:  Γ_B = ½ (B Q⁻¹(u_BᵀV_B + V_Bᵀu_B) - u_B Q⁻¹Q̇_V - V_B Q⁻¹Q̇_u),
    embedded:   Γ is the lift of P_T(u_B V_Aᵀ + V_B u_Aᵀ), the bilinear part of D(dW),

and the same with the factors exchanged. Here Ṗ_u = u_AᵀA + Aᵀu_A and Q̇_u = u_BᵀB + Bᵀu_B; A is the
n x r matrix. Derivation: docs/solvers.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from manifold_merge.linalg import adjoint, hermitian_pinv
from manifold_merge.lora_metrics import METRICS, Pair

if TYPE_CHECKING:
    from manifold_merge.lora import LoRAQuotient

__all__ = ["ehess2rhess"]


def ehess2rhess(
    manifold: LoRAQuotient, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor
) -> Tensor:
    """Riemannian Hessian, applied to ``u``, of a function of the product.

    Args:
        manifold: Its metric decides.
        x: Point of full rank, ``(..., m + n, r)``.
        egrad: Euclidean gradient at ``x``, ``(..., m + n, r)``.
        ehess: Directional derivative of the Euclidean gradient along ``u``, ``(..., m + n, r)``.
        u: Horizontal vector at ``x``, ``(..., m + n, r)``.

    Returns:
        A horizontal vector, ``(..., m + n, r)``.

    Example:
        For f = ½|W|² the embedded metric's Hessian is the identity: W lies in its tangent space,
        and the curvature of the manifold does not see it.

        >>> import torch
        >>> from manifold_merge import LoRAQuotient
        >>> manifold = LoRAQuotient(5, 4, metric="embedded")
        >>> x = torch.randn(9, 2, dtype=torch.float64)
        >>> u = manifold.proju(x, torch.randn(9, 2, dtype=torch.float64))
        >>> f = lambda z: 0.5 * manifold.product(z).square().sum()
        >>> egrad, ehess = torch.func.jvp(torch.func.grad(f), (x,), (u,))
        >>> bool(torch.allclose(ehess2rhess(manifold, x, egrad, ehess, u), u))
        True
    """
    px, pu = manifold._split(x), manifold._split(u)
    pg, ph = manifold._split_covector(egrad), manifold._split_covector(ehess)
    rule = {"mixed": _mixed, "invariant": _invariant, "embedded": _embedded}[manifold.metric]
    pair = rule(px, pg, ph, pu)
    return manifold._join(METRICS[manifold.metric].horizontal(px, pair))


def _rate(y: Tensor, u: Tensor) -> Tensor:
    """Derivative of YᵀY along u."""
    half = adjoint(u) @ y
    return half + adjoint(half)


def _mixed(x: Pair, g: Pair, h: Pair, u: Pair) -> Pair:
    def one(
        b: Tensor, a: Tensor, gb: Tensor, ga: Tensor, hb: Tensor, ub: Tensor, ua: Tensor
    ) -> Tensor:
        p = hermitian_pinv(adjoint(a) @ a)
        q = hermitian_pinv(adjoint(b) @ b)
        vb, va = gb @ p, ga @ q
        rate_u, rate_v = _rate(a, ua), _rate(a, va)
        derivative = hb @ p - vb @ rate_u @ p
        connection = 0.5 * (ub @ rate_v + vb @ rate_u - b @ _sum(ua, va)) @ p
        return derivative + connection

    (b, a), (gb, ga), (hb, ha), (ub, ua) = x, g, h, u
    return one(b, a, gb, ga, hb, ub, ua), one(a, b, ga, gb, ha, ua, ub)


def _sum(u: Tensor, v: Tensor) -> Tensor:
    cross = adjoint(u) @ v
    return cross + adjoint(cross)


def _invariant(x: Pair, g: Pair, h: Pair, u: Pair) -> Pair:
    def one(y: Tensor, gy: Tensor, hy: Tensor, uy: Tensor) -> Tensor:
        gram = adjoint(y) @ y
        inverse = hermitian_pinv(gram)
        vy = gy @ gram
        derivative = hy @ gram + gy @ _rate(y, uy)
        # The geodesic equation is c'' = c' Q⁻¹ Q̇ - c Q⁻¹ c'ᵀc'.
        connection = -0.5 * (
            uy @ inverse @ _rate(y, vy) + vy @ inverse @ _rate(y, uy) - y @ inverse @ _sum(uy, vy)
        )
        return derivative + connection

    return one(x[0], g[0], h[0], u[0]), one(x[1], g[1], h[1], u[1])


def _embedded(x: Pair, g: Pair, h: Pair, u: Pair) -> Pair:
    (b, a), (ub, ua) = x, u
    metric = METRICS["embedded"]

    def gradient(y: Tensor, other: Tensor, gy: Tensor, hy: Tensor, uy: Tensor, uo: Tensor) -> Pair:
        """Factor of V = (I - ½YY⁺) G P⁻¹ and its derivative along u."""
        inverse = hermitian_pinv(adjoint(other) @ other)
        left = hermitian_pinv(adjoint(y) @ y) @ adjoint(y)  # Y⁺
        full = gy @ inverse
        dfull = (hy - full @ _rate(other, uo)) @ inverse
        # D(YY⁺) = S + Sᵀ with S = (I - YY⁺) u Y⁺
        outside = uy - y @ (left @ uy)
        turn = outside @ (left @ full) + adjoint(left) @ (adjoint(outside) @ full)
        return full - 0.5 * y @ (left @ full), dfull - 0.5 * y @ (left @ dfull) - 0.5 * turn

    vb, dvb = gradient(b, a, g[0], h[0], ub, ua)
    va, dva = gradient(a, b, g[1], h[1], ua, ub)
    # N = u_B V_Aᵀ + V_B u_Aᵀ is what the product rule adds to D(dW_V); only P_T(N) is tangent.
    na = ub @ (adjoint(va) @ a) + vb @ (adjoint(ua) @ a)
    nb = va @ (adjoint(ub) @ b) + ua @ (adjoint(vb) @ b)
    lift = metric.gradient(x, (na, nb))
    return dvb + lift[0], dva + lift[1]
