"""Statistics on any geoopt manifold: median, variance, geodesics, one-pass mean, tangent PCA.

All functions take batches, and compute on :func:`manifold_merge.accurate.accurate` manifolds, so
that clusters of close points lose no digits to geoopt's clamped distances. The names are those of
Manifolds.jl where it has the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, dist2_logmap, inner, weighted_sum
from manifold_merge.frechet import frechet_mean, normalized_weights
from manifold_merge.solution import FrechetSolution

__all__ = [
    "TangentPCA",
    "frechet_median",
    "frechet_variance",
    "geodesic",
    "inductive_mean",
    "tangent_pca",
]

Points = Tensor | Sequence[Tensor]
Weights = Sequence[float] | Tensor | None


def frechet_median(
    manifold: geoopt.Manifold, points: Points, weights: Weights = None, **options: Any
) -> FrechetSolution:
    """Geometric median: argmin over x of Σ wᵢ d(x, xᵢ), which outliers cannot move far.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        points: ``(k, ..., *point)`` or a sequence of k tensors.
        weights: ``(k,)`` or ``(k, ...)``, not negative.
        options: Those of :func:`~manifold_merge.frechet.frechet_mean`.

    Returns:
        The median with its certificate.

    Source: Fletcher, Venkatasubramanian and Joshi (2009).

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [2.0], [100.0], [1.5]], dtype=torch.float64)
        >>> round(float(frechet_median(geoopt.Euclidean(1), points).point), 4)
        1.5
    """
    return frechet_mean(manifold, points, weights, p=1, **options)


def frechet_variance(
    manifold: geoopt.Manifold, points: Points, weights: Weights = None, mean: Tensor | None = None
) -> Tensor:
    """Weighted variance Σ wᵢ d²(x, xᵢ) around the mean, or around a given point.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        points: ``(k, ..., *point)`` or a sequence of k tensors.
        weights: ``(k,)`` or ``(k, ...)``; normalised.
        mean: ``(..., *point)``; computed if ``None``.

    Returns:
        Variances of the batch shape.

    Example:
        >>> frechet_variance(geoopt.Euclidean(1), torch.tensor([[0.0], [2.0]]))
        tensor(1.)
    """
    if mean is None:
        return frechet_mean(manifold, points, weights).objective
    stacked = torch.stack(list(points))
    w = normalized_weights(weights, len(stacked), like=stacked)
    squared = dist2_logmap(accurate(manifold), mean.expand_as(stacked), stacked)[0]
    return weighted_sum(w, squared)


def geodesic(
    manifold: geoopt.Manifold, x: Tensor, y: Tensor, t: float | Sequence[float] | Tensor
) -> Tensor:
    """Points on the geodesic from ``x`` at t = 0 to ``y`` at t = 1; beyond, it is extrapolated.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        x: ``(..., *point)``.
        y: ``(..., *point)``.
        t: A number, or a sequence ``(s,)``.

    Returns:
        ``(..., *point)`` for a number, ``(s, ..., *point)`` for a sequence.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> geodesic(geoopt.Sphere(), x, y, [0.5])
        tensor([[0.7071, 0.7071]])
    """
    space = accurate(manifold)
    x, y = torch.broadcast_tensors(x, y)
    log = dist2_logmap(space, x, y)[1]
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    steps = times.reshape((*times.shape, *(1,) * x.ndim)) * log
    return space.expmap(x.expand_as(steps), steps)


def inductive_mean(manifold: geoopt.Manifold, points: Points, weights: Weights = None) -> Tensor:
    """One-pass mean: each point in turn pulls the mean along the geodesic by its share.

    On Hadamard manifolds it converges to the Fréchet mean as the number of points grows. In a flat
    space it is the mean; elsewhere it depends on the order of few points.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        points: ``(k, ..., *point)``, or any iterable sequence of tensors ``(..., *point)``.
        weights: ``(k,)``, not negative.

    Returns:
        ``(..., *point)``.

    Source: Sturm, Probability measures on metric spaces of nonpositive curvature (2003).

    Example:
        >>> inductive_mean(geoopt.Euclidean(1), torch.tensor([[1.0], [2.0], [6.0]]))
        tensor([3.])
    """
    w = normalized_weights(weights, len(points), like=points[0])
    mean, total = points[0], w[0]
    for point, weight in zip(list(points)[1:], w[1:], strict=True):
        total = total + weight
        if bool(total > 0):
            mean = geodesic(manifold, mean, point, float(weight / total))
    return mean


@dataclasses.dataclass(frozen=True)
class TangentPCA:
    """Principal directions of points around their mean.

    Attributes:
        manifold: Where the points live.
        mean: ``(..., *point)``.
        directions: Tangent vectors at the mean, orthonormal in the metric, ``(c, ..., *point)``.
        variances: Variance along each direction, largest first, ``(c, ...)``.
        scores: Coordinates of the points, ``(k, c, ...)``.
        total: Variance in all directions, of the batch shape.
    """

    manifold: geoopt.Manifold
    mean: Tensor
    directions: Tensor
    variances: Tensor
    scores: Tensor
    total: Tensor

    def reconstruct(self, scores: Tensor | None = None) -> Tensor:
        """Points with the given coordinates, those of the data if ``None``.

        Args:
            scores: ``(k, c, ...)``.

        Returns:
            ``(k, ..., *point)``.
        """
        scores = self.scores if scores is None else scores
        spread = scores.reshape((*scores.shape, *(1,) * self.manifold.ndim))
        vectors = (spread * self.directions).sum(1)
        return self.manifold.expmap(self.mean.expand_as(vectors), vectors)


@torch.no_grad()
def tangent_pca(
    manifold: geoopt.Manifold,
    points: Points,
    weights: Weights = None,
    *,
    components: int | None = None,
    mean: Tensor | None = None,
) -> TangentPCA:
    """Principal component analysis of the logarithms at the Fréchet mean.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        points: ``(k, ..., *point)`` or a sequence of k tensors of one shape.
        weights: ``(k,)``, not negative; normalised.
        components: Number of directions c; k if ``None``. Directions of no variance are zero.
        mean: ``(..., *point)``; computed if ``None``.

    Returns:
        Mean, directions, variances and scores.

    Raises:
        ValueError: If the number of components is not between 1 and k.

    Source: Fletcher, Lu, Pizer and Joshi (2004).

    Example:
        >>> line = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
        >>> pca = tangent_pca(geoopt.Euclidean(1), line, components=1)
        >>> pca.directions.abs()
        tensor([[0.7071, 0.7071]], dtype=torch.float64)
        >>> round(float(pca.variances / pca.total), 6)
        1.0
    """
    stacked = torch.stack(list(points))
    count = len(stacked)
    c = count if components is None else components
    if not 1 <= c <= count:
        raise ValueError(f"components: expected 1 <= components <= {count}, got {components}")
    w = normalized_weights(weights, count, like=stacked)
    space = accurate(manifold)
    if mean is None:
        mean = frechet_mean(manifold, stacked, w).point
    base = mean.expand_as(stacked)
    logs = dist2_logmap(space, base, stacked)[1]
    # Everything is in the k x k matrix of inner products, whatever the dimension.
    pairs = [inner(space, base, logs, logs[i].expand_as(logs)) for i in range(count)]
    root = w.reshape((count, *(1,) * (pairs[0].ndim - 1))).expand_as(pairs[0]).sqrt()
    gram = (torch.stack(pairs) * root[:, None] * root[None]).movedim((0, 1), (-2, -1))
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1)[..., :c].clamp(min=0), vectors.flip(-1)[..., :c]
    cut = values[..., :1] * torch.finfo(values.dtype).eps * count
    scale = torch.where(values > cut, values, torch.inf).rsqrt()
    mix = (vectors * scale[..., None, :]).movedim((-2, -1), (0, 1)) * root[:, None]
    directions = (mix.reshape((*mix.shape, *(1,) * space.ndim)) * logs[:, None]).sum(0)
    scores = torch.stack([inner(space, base, logs, d.expand_as(logs)) for d in directions], 1)
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return TangentPCA(space, mean, directions, values.movedim(-1, 0), scores, total)
