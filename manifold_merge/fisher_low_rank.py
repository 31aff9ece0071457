"""Low-rank means with one Kronecker metric for each anchor, in factors throughout.

No m x n matrix is formed, and the result is the same in every gauge. Derivations: docs/fisher.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_merge.fisher import KroneckerFisher
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.fisher_two_sided import TwoSided
from manifold_merge.linalg import adjoint
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_metrics import Pair
from manifold_merge.solution import FrechetSolution, Status

__all__ = ["low_rank_mean", "low_rank_objective", "sides_of"]


def sides_of(
    metrics: Sequence[KroneckerFisher],
) -> tuple[list[MetricFactor] | None, list[MetricFactor] | None]:
    """Input and output sides of all anchors; ``None`` where no anchor has that side."""

    def fill(sides: list[MetricFactor | None], size: int) -> list[MetricFactor] | None:
        given = [s for s in sides if s is not None]
        if not given:
            return None
        like = given[0]
        device = next(like.buffers()).device
        eye = MetricFactor(torch.eye(size, dtype=like.dtype, device=device))
        return [eye if s is None else s for s in sides]

    first = metrics[0]
    return (
        fill([m.input_side for m in metrics], first.in_features),
        fill([m.output_side for m in metrics], first.out_features),
    )


def low_rank_mean(
    manifold: LoRAQuotient,
    points: Sequence[Tensor],
    metrics: Sequence[KroneckerFisher],
    weights: Tensor,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
) -> FrechetSolution:
    """Mean of low-rank products, each with a Kronecker metric of its own, at any rank.

    For metrics of the input side alone, the unconstrained mean is itself a product of rank Σ rᵢ,
    Σ wᵢBᵢ(AᵢGᵢḠ⁻¹) with Ḡ = Σ wᵢGᵢ, and the best product of a lower rank is its truncated singular
    value decomposition in the metric Ḡ. The output side alone is the transpose of that. With both
    sides, B and A are solved for in turn (:class:`~manifold_merge.fisher_two_sided.TwoSided`).

    Args:
        manifold: Says the sizes m and n; its metric and distance do not matter here.
        points: Anchors, k tensors ``(..., m + n, r_i)``; ranks may differ.
        metrics: k metrics, whose batch shapes broadcast against that of the points.
        weights: ``(k, ...)``, not negative, with sum 1.
        rank: Rank of the mean; the greatest of the anchors' ranks if ``None``.
        tolerance: Gradient norm, relative to the length of the anchors, at which the alternating
            solver ends.
        max_iterations: Greatest number of its rounds.

    Returns:
        The mean ``(..., m + n, rank)``, balanced, with zero columns beyond its own rank, and its
        certificate.

    Raises:
        ValueError: The rank is not between 1 and min(m, n), or the numbers do not fit.
    """
    limit = min(manifold.out_features, manifold.in_features)
    rank = max(x.shape[-1] for x in points) if rank is None else rank
    if not 1 <= rank <= limit:
        raise ValueError(f"rank: expected 1 <= rank <= {limit} = min(m, n), got {rank}")
    inputs, outputs = sides_of(metrics)
    pairs = [_orthonormal(LoRAQuotient._split(manifold, x)) for x in points]
    batch = points[0].shape[:-2]
    shares = weights.reshape((*weights.shape, *(1,) * (len(batch) + 1 - weights.ndim)))
    shares = shares.expand(len(points), *batch)
    iterations = torch.zeros(batch, dtype=torch.long, device=points[0].device)
    status = torch.full_like(iterations, Status.CONVERGED)
    gradient = torch.zeros(batch, dtype=points[0].dtype, device=points[0].device)
    if inputs is None or outputs is None:
        grams = outputs if inputs is None else inputs
        assert grams is not None
        swapped = inputs is None
        sided = [(a, b) for b, a in pairs] if swapped else pairs
        mean, gradient = _one_sided(sided, grams, shares, rank)
        pair = (mean[1], mean[0]) if swapped else mean
        solver = "closed_form"
    else:
        problem = TwoSided(pairs, (outputs, inputs), shares)
        tolerance = torch.finfo(points[0].dtype).eps ** 0.4 if tolerance is None else tolerance
        pair, gradient, iterations, status = problem.solve(rank, tolerance, max_iterations)
        solver = "alternating"
    pair = _balanced(pair)
    missing = rank - pair[0].shape[-1]
    pair = tuple(torch.nn.functional.pad(x, (0, missing)) for x in pair)  # type: ignore[assignment]
    return FrechetSolution(
        point=torch.cat(pair, -2),
        objective=low_rank_objective(pair, pairs, metrics, shares),
        gradient_norm=gradient,
        iterations=iterations,
        status=status,
        weights=weights,
        solver=solver,
    )


def low_rank_objective(
    mean: Pair, pairs: Sequence[Pair], metrics: Sequence[KroneckerFisher], weights: Tensor
) -> Tensor:
    """Σ wᵢ gᵢ(W - Wᵢ, W - Wᵢ) from factors, of the batch shape.

    Args:
        mean: B ``(..., m, R)`` and A ``(..., n, R)`` of W = B Aᵀ.
        pairs: The same for each anchor.
        metrics: One for each anchor.
        weights: ``(k, ...)``.
    """
    terms = []
    for (b, a), metric, w in zip(pairs, metrics, weights, strict=True):
        left, right = torch.cat((mean[0], -b), -1), torch.cat((mean[1], a), -1)
        q = adjoint(left) @ (left if metric.output_side is None else metric.output_side @ left)
        p = adjoint(right) @ (right if metric.input_side is None else metric.input_side @ right)
        terms.append(w * (q * p).sum((-2, -1)).clamp(min=0))
    return torch.stack(terms).sum(0)


def _orthonormal(pair: Pair) -> Pair:
    """The same product with Aᵀ orthonormal: a well-conditioned start in any gauge."""
    frame, upper = torch.linalg.qr(pair[1])
    return pair[0] @ adjoint(upper), frame


def _balanced(pair: Pair) -> Pair:
    (u, left), (v, right) = torch.linalg.qr(pair[0]), torch.linalg.qr(pair[1])
    x, s, y = torch.linalg.svd(left @ adjoint(right), full_matrices=False)
    root = s.sqrt()[..., None, :]
    return u @ (x * root), v @ (adjoint(y) * root)


def _one_sided(
    pairs: Sequence[Pair], grams: Sequence[MetricFactor], weights: Tensor, rank: int
) -> tuple[Pair, Tensor]:
    """Σ wᵢBᵢ(AᵢGᵢḠ⁻¹), truncated in the metric Ḡ, with the gradient that rounding leaves."""
    total = MetricFactor.sum(grams, weights)
    spread = weights[..., None, None]
    b = torch.cat([p[0] * w for p, w in zip(pairs, spread, strict=True)], -1)
    images = torch.cat([g @ p[1] for p, g in zip(pairs, grams, strict=True)], -1)
    a = total.solve(images)
    # Left singular vectors of (Σ wᵢWᵢGᵢ Ḡ⁻¹) Ḡ^½: only the rows' Gram matrix in Ḡ is needed.
    u, upper = torch.linalg.qr(b)
    right = torch.linalg.qr(total.whiten(a), mode="r")[1]
    x, s, _ = torch.linalg.svd(upper @ adjoint(right), full_matrices=False)
    x = x[..., :rank]
    mean = (u @ x, a @ (adjoint(upper) @ x))
    residual = images - (total @ a)
    size = (residual.square().sum((-2, -1)) * upper.square().sum((-2, -1))).sqrt()
    return mean, size / s[..., :1].amax(-1).clamp(min=torch.finfo(s.dtype).tiny).sqrt()
