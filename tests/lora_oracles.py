"""Slow, independent oracles for the geometry of low-rank products, and points to try it on.

Nothing here calls the formulas under test: inner products are taken from dense matrices, horizontal
projections from dense linear systems, distances of rank-1 products from the geometry of cones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_merge import LoRAQuotient

METRICS = ("mixed", "invariant", "embedded")
DISTANCES = ("exact", "aligned", "chordal")
# (m, n, r): tall, full rank on one side or both, rank 1, m < 2r, scalars.
SIZES = ((6, 5, 2), (3, 5, 3), (4, 4, 4), (5, 2, 2), (7, 1, 1), (5, 6, 4), (1, 1, 1))


def draw(m: int, n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw points ``(*batch, m + n, r)`` for ``shape = (*batch, r)``, as plain tensors.

    Factors have singular values between 0.5 and 1.5: square Gaussian ones may be nearly singular.
    """
    generator = torch.Generator().manual_seed(seed)
    *batch, r = shape
    options = {"generator": generator, "dtype": torch.float64}
    factors = []
    for rows in (m, n):
        u, _, vh = torch.linalg.svd(torch.randn(*batch, rows, r, **options), full_matrices=False)
        values = 0.5 + torch.rand(*batch, 1, r, **options)
        factors.append((u * values) @ vh)
    return torch.cat(factors, -2).to(dtype)


def regauge(manifold: LoRAQuotient, x: Tensor, condition: float = 1e4, seed: int = 0) -> Tensor:
    """Return other representatives of the same products."""
    generator = torch.Generator().manual_seed(seed)
    return manifold.random_representative(x, generator=generator, condition=condition)


def near(x: Tensor, amount: float, seed: int = 1) -> Tensor:
    """Add independent entries of the given size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    return x + amount * noise


def split(manifold: LoRAQuotient, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) with A ``(..., n, r)``."""
    return x[..., : manifold.out_features, :], x[..., manifold.out_features :, :]


def product(manifold: LoRAQuotient, x: Tensor) -> Tensor:
    """Dense W."""
    b, a = split(manifold, x)
    return b @ a.mT


def differential(manifold: LoRAQuotient, x: Tensor, u: Tensor) -> Tensor:
    """Dense dW."""
    (b, a), (ub, ua) = split(manifold, x), split(manifold, u)
    return ub @ a.mT + b @ ua.mT


def relative_gap(manifold: LoRAQuotient, x: Tensor, y: Tensor) -> float:
    """Greatest |W_x - W_y| / |W_x| of a batch, from dense products."""
    one, two = product(manifold, x), product(manifold, y)
    return float(((one - two).norm(dim=(-2, -1)) / one.norm(dim=(-2, -1))).max())


def dense_inner(manifold: LoRAQuotient, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """g(u, v) of the batch shape, from its definition with dense matrices."""
    (b, a), (ub, ua), (vb, va) = (split(manifold, z) for z in (x, u, v))
    if manifold.metric == "mixed":
        terms = (ub @ a.mT) * (vb @ a.mT) + (b @ ua.mT) * (b @ va.mT)
        return terms.sum((-2, -1))
    if manifold.metric == "embedded":
        return ((ub @ a.mT + b @ ua.mT) * (vb @ a.mT + b @ va.mT)).sum((-2, -1))
    total = torch.zeros(x.shape[:-2], dtype=x.dtype)
    for y, s, t in ((b, ub, vb), (a, ua, va)):
        upper = torch.linalg.qr(y)[1]
        s, t = (torch.linalg.solve(upper, z, left=False) for z in (s, t))
        total = total + (s * t).sum((-2, -1))
    return total


def vertical_basis(manifold: LoRAQuotient, x: Tensor) -> Tensor:
    """All r² vertical directions at one point, ``(r², m + n, r)``."""
    b, a = split(manifold, x)
    r = x.shape[-1]
    units = torch.eye(r * r, dtype=x.dtype).reshape(-1, r, r)
    return torch.cat((b @ units, -a @ units.mT), -2)


def dense_horizontal(manifold: LoRAQuotient, x: Tensor, u: Tensor) -> Tensor:
    """Subtract the vertical part of ``u`` at one point by a dense r² x r² linear system.

    The embedded metric does not see vertical vectors; its lifts are those of the mixed metric.
    """
    metric = "mixed" if manifold.metric == "embedded" else manifold.metric
    total = LoRAQuotient(manifold.out_features, manifold.in_features, metric)
    basis = vertical_basis(manifold, x)
    gram = torch.stack([dense_inner(total, x, basis, v.expand_as(basis)) for v in basis])
    along = dense_inner(total, x, basis, u.expand_as(basis))
    coefficients = torch.linalg.solve(gram, along)
    return u - (coefficients[:, None, None] * basis).sum(0)


def tangent_projection(manifold: LoRAQuotient, x: Tensor, z: Tensor) -> Tensor:
    """P_T(Z) = Z - (1 - P_U) Z (1 - P_V), with the dense frames of W."""
    r = x.shape[-1]
    u, _, vh = torch.linalg.svd(product(manifold, x), full_matrices=False)
    u, v = u[..., :r], vh.mT[..., :r]
    left = torch.eye(u.shape[-2], dtype=x.dtype) - u @ u.mT
    right = torch.eye(v.shape[-2], dtype=x.dtype) - v @ v.mT
    return z - left @ z @ right


def injectivity_bound(manifold: LoRAQuotient, x: Tensor) -> Tensor:
    """Distance to the nearest matrix of lower rank, or 1 for the complete invariant metric."""
    if manifold.metric == "invariant":
        return torch.ones(x.shape[:-2], dtype=x.dtype)
    least = torch.linalg.svdvals(product(manifold, x))[..., x.shape[-1] - 1]
    return least / math.sqrt(2) if manifold.metric == "mixed" else least


def rank_one_distance(manifold: LoRAQuotient, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Geodesic distance of rank-1 products in closed form, and where it is attained.

    With W = σ u vᵀ, mixed is dρ² + 2ρ²(|du|² + |dv|²), ρ = σ/√2, embedded dσ² + σ²(|du|² + |dv|²):
    cones over a product of spheres modulo one sign. Invariant is ½(d log σ)² + |du|² + |dv|², a
    Riemannian product.
    """

    def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, a = (factor[..., 0] for factor in split(manifold, z))
        nb, na = b.norm(dim=-1), a.norm(dim=-1)
        return nb * na, b / nb[..., None], a / na[..., None]

    def angle(p: Tensor, q: Tensor) -> Tensor:
        return 2 * torch.atan2((p - q).norm(dim=-1), (p + q).norm(dim=-1))

    (sx, ux, vx), (sy, uy, vy) = parts(x), parts(y)
    turns = torch.stack(
        [(angle(ux, s * uy) ** 2 + angle(vx, s * vy) ** 2).sqrt() for s in (1, -1)]
    ).amin(0)
    if manifold.metric == "invariant":
        return (turns**2 + 0.5 * (sy / sx).log() ** 2).sqrt(), torch.ones_like(turns, dtype=bool)
    stretch = math.sqrt(2) if manifold.metric == "mixed" else 1.0
    turns, sx, sy = stretch * turns, sx / stretch, sy / stretch
    around = ((sx - sy) ** 2 + 4 * sx * sy * torch.sin(turns / 2) ** 2).sqrt()
    return torch.where(turns < math.pi, around, sx + sy), turns < math.pi
