"""The lifted mean: adapters of different tasks, each with room for its own directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_merge.core import stacked_gram
from manifold_merge.frechet import normalized_weights
from manifold_merge.linalg import adjoint
from manifold_merge.lora import LoRAQuotient
from manifold_merge.solution import FrechetSolution, Status

__all__ = ["lifted_mean", "pairwise_cosines", "pairwise_inner"]

# Below this fraction of the anchors' mean norm nothing but rounding is left of their sum.
CANCELLED = 1e-6


@torch.no_grad()
def lifted_mean(
    manifold: LoRAQuotient,
    points: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    rank: int | None = None,
    power: float | None = None,
) -> FrechetSolution:
    """Fréchet mean of low-rank products that are lifted to a common rank first.

    Products W_i = U_i S_i V_iᵀ of different tasks are nearly orthogonal. At their own rank a mean
    has to discard directions or cancel, and in a flat space it shrinks by 1/√k. So each anchor is
    moved, as little as possible, to a rank-Σrᵢ product whose frames are orthogonal to those of the
    others, and the mean is taken on the sphere that keeps the norm:

        Ŵ_i ∝ M_U^(-p/2) U_i S_i^(1+2p) V_iᵀ M_V^(-p/2),  |Ŵ_i| = |W_i|,
        mean = argmin Σ wᵢ |W - Ŵ_i|²  over  rank W <= rank,  |W|² = Σ wᵢ |W_i|²,

    with the moments M_U = Σ wᵢ C_iC_iᵀ, M_V = Σ wᵢ C_iᵀC_i of the unit anchors C_i = W_i/|W_i|. The
    power p = 1 - |Σ wᵢ C_i|⁴ is read off their agreement: copies of one adapter are not moved at
    all (the mean of copies is the adapter), orthogonal tasks nearly fully (p = 1 - 1/k²), and as p
    stays below 1 the mean is a continuous function of the anchors. The mean depends on the
    anchors only through Σ wᵢ δ(W_i): it is invariant to gauges and order, weights of (2, 1) equal
    a duplicated anchor, and a single anchor is its own mean.

    Args:
        manifold: Says the sizes m and n; its metric and distance do not matter here.
        points: Anchors, k tensors ``(..., m + n, r_i)``; ranks may differ.
        weights: ``(k,)`` or ``(k, ...)``, not negative; normalised. Equal if ``None``.
        rank: Rank of the mean; Σ rᵢ, or min(m, n) if that is less, if ``None``.
        power: Fix p, between 0 (no lift: the rescaled weighted sum) and 1 (full lift).

    Returns:
        The mean ``(..., m + n, rank)``, balanced, with its objective. Its status is ``CANCELLED``
        where opposite anchors cancel: no direction is left and the mean is zero.

    Raises:
        ValueError: If a weight is negative, or the power or rank is out of range.

    Source: the high-rank variant of arXiv:2604.27155; the orthogonal frames are the Procrustes
    solution of TSV-M (arXiv:2412.00081) in a metric. Derivation: docs, "Mathematics".

    Example:
        >>> import torch
        >>> manifold = LoRAQuotient(4, 4)
        >>> x = manifold.pack(torch.eye(4)[:, :1], torch.eye(4)[:1])
        >>> y = manifold.pack(torch.eye(4)[:, 1:2], torch.eye(4)[1:2])
        >>> mean = lifted_mean(manifold, [x, y]).point
        >>> manifold.product(mean).diagonal()  # norm 1 like both anchors, not 1/√2
        tensor([0.7071, 0.7071, 0.0000, 0.0000])
    """
    if power is not None and not 0 <= power <= 1:
        raise ValueError(f"power: expected a number from 0 (no lift) to 1, got {power}")
    limit = min(manifold.out_features, manifold.in_features)
    rank = min(sum(x.shape[-1] for x in points), limit) if rank is None else rank
    if not 1 <= rank <= limit:
        raise ValueError(f"rank: expected 1 <= rank <= {limit} = min(m, n), got {rank}")
    reduced, anchors, restore = manifold.reduce(points)
    weights = normalized_weights(weights, len(anchors), like=anchors)
    weights = weights.reshape((*weights.shape, *(1,) * (anchors.ndim - 2 - weights.ndim)))
    weights = weights.expand(anchors.shape[:-2])

    u, v, s = _singular_frames(reduced, anchors)
    norms = s.square().sum(-1).sqrt()
    unit = s / norms.clamp(min=torch.finfo(s.dtype).tiny)[..., None]
    cosines = _gram(u, v, unit)
    shares = weights * (norms > 0)
    shares = shares / shares.sum(0).clamp(min=torch.finfo(s.dtype).tiny)
    if power is None:
        resultant = torch.einsum("i...,ij...,j...->...", shares, cosines, shares)
        exponent = (1 - resultant.square()).clamp(0, 1)
    else:
        exponent = torch.full_like(norms[0], power)

    moved_u, moved_v = (_move(frame, unit, shares, exponent) for frame in (u, v))
    stretched = unit ** (1 + 2 * exponent[..., None])
    squared = _gram_pair(moved_u * stretched[..., None, :], moved_v)
    factor = weights * norms / squared.sqrt().clamp(min=torch.finfo(s.dtype).tiny)
    left = moved_u * (stretched * factor[..., None])[..., None, :]
    total = torch.einsum("k...ir,k...jr->...ij", left, moved_v)

    left, values, right = torch.linalg.svd(total, full_matrices=False)
    values = torch.nn.functional.pad(values, (0, max(rank - values.shape[-1], 0)))[..., :rank]
    radius = (weights * norms.square()).sum(0).sqrt()
    kept = values.square().sum(-1).sqrt()
    cancelled = (kept <= CANCELLED * (weights * norms).sum(0)) & (radius > 0)
    scale = torch.where(cancelled | (kept == 0), 0.0, radius / kept.clamp(min=1e-300))
    root = (values * scale[..., None]).sqrt()[..., None, :]
    count = min(rank, left.shape[-1])
    mean = torch.cat(
        (left[..., :count] * root[..., :count], adjoint(right)[..., :count] * root[..., :count]), -2
    )
    mean = torch.nn.functional.pad(mean, (0, rank - count))
    # The mean of anchors that cancel is put to zero, at distance n̄ from each on average.
    objective = torch.where(cancelled, radius.square(), 2 * radius * (radius - kept))
    return FrechetSolution(
        point=restore(mean),
        objective=objective,
        gradient_norm=torch.zeros_like(objective),
        iterations=torch.zeros_like(objective, dtype=torch.long),
        status=torch.where(cancelled, Status.CANCELLED, Status.CONVERGED),
        weights=weights,
        solver="lifted",
    )


def pairwise_cosines(manifold: LoRAQuotient, points: Sequence[Tensor]) -> Tensor:
    """Cosines <W_i, W_j>/(|W_i||W_j|) between products, the measure of closeness.

    Args:
        manifold: Says the sizes m and n.
        points: k points ``(..., m + n, r_i)``; ranks may differ.

    Returns:
        ``(k, k, ...)``, zero where a product is zero.
    """
    gram = pairwise_inner(manifold, points)
    norms = gram.diagonal(dim1=0, dim2=1).movedim(-1, 0).clamp(min=0).sqrt()
    return gram / (norms[:, None] * norms[None]).clamp(min=torch.finfo(gram.dtype).tiny)


def pairwise_inner(manifold: LoRAQuotient, points: Sequence[Tensor]) -> Tensor:
    """Inner products <W_i, W_j> of low-rank products, without forming them.

    Args:
        manifold: Says the sizes m and n.
        points: k points ``(..., m + n, r_i)``; ranks may differ.

    Returns:
        ``(k, k, ...)``.
    """
    work = torch.float64 if points[0].device.type != "mps" else points[0].dtype
    pairs = [manifold.unpack(x) for x in points]
    left = stacked_gram([b for b, _ in pairs], work)
    right = stacked_gram([a.mT for _, a in pairs], work)
    widths = [x.shape[-1] for x in points]
    blocks = [
        [block.sum((-2, -1)) for block in row.split(widths, -1)]
        for row in (left * right).split(widths, -2)
    ]
    return torch.stack([torch.stack(row) for row in blocks]).to(points[0].dtype)


def _singular_frames(reduced: LoRAQuotient, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(k, ..., K, r)``, V and singular values ``(k, ..., r)`` of balanced points."""
    b, a = anchors[..., : reduced.out_features, :], anchors[..., reduced.out_features :, :]
    s = b.square().sum(-2)
    inverse = torch.where(s > 0, s.clamp(min=torch.finfo(s.dtype).tiny).rsqrt(), 0.0)[..., None, :]
    return b * inverse, a * inverse, s


def _gram(u: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Inner products <W_i, W_j> of W = U S Vᵀ, ``(k, k, ...)``."""
    left = torch.einsum("k...ir,l...is->kl...rs", u * s[..., None, :], u * s[..., None, :])
    right = torch.einsum("k...ir,l...is->kl...rs", v, v)
    return (left * right).sum((-2, -1))


def _gram_pair(u: Tensor, v: Tensor) -> Tensor:
    """Squared norms of U Vᵀ, of the batch shape."""
    return ((adjoint(u) @ u) * (adjoint(v) @ v)).sum((-2, -1)).clamp(min=0)


def _move(frames: Tensor, unit: Tensor, weights: Tensor, exponent: Tensor) -> Tensor:
    """M^(-p/2) U_i with M = Σ wᵢ U_i S_i² U_iᵀ, its null space left alone."""
    scaled = frames * (unit * weights.sqrt()[..., None])[..., None, :]
    moment = torch.einsum("k...ir,k...jr->...ij", scaled, scaled)
    values, vectors = torch.linalg.eigh(moment)
    cut = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
    positive = values.clamp(min=torch.finfo(values.dtype).tiny)
    powers = torch.where(values > cut, positive ** (-exponent / 2)[..., None], 0.0)
    return vectors @ (powers[..., None] * (adjoint(vectors) @ frames))
