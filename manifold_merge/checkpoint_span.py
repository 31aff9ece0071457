"""Means of very long vectors from their inner products alone.

A mean of k vectors, on a sphere or in a flat space, lies in their span, so that k numbers determine
it: the problem is solved in the coordinates of the span, which the k x k Gram matrix gives, and the
vectors are read once more to be combined. This is the core reduction of
:mod:`manifold_merge.core` for points that are single vectors.
"""

from __future__ import annotations

from collections.abc import Iterable

import geoopt
import torch
from torch import Tensor

from manifold_merge.frechet import frechet_mean

__all__ = ["core_coefficients", "stacked_gram_of"]


def stacked_gram_of(parts: Iterable[Tensor]) -> Tensor:
    """Inner products of k vectors that come in parts ``(k, entries)``: ``(k, k)``, in float64.

    They are formed from the first vector and the differences of the others to it, in the type of
    the parts, so that the distances of vectors that are close to one another keep their digits.
    The parts are overwritten.
    """
    gram: Tensor | None = None
    for part in parts:
        part[1:] -= part[0]
        product = (part @ part.mT).cpu().double()
        gram = product if gram is None else gram + product
    if gram is None:
        raise ValueError("parts is empty; give at least one part of the vectors")
    back = torch.eye(len(gram), dtype=gram.dtype)
    back[:, 0] = 1
    return back @ gram @ back.mT


def core_coefficients(gram: Tensor, weights: Tensor, geometry: str, p: int) -> Tensor:
    """Coefficients c with mean = Σ cᵢ xᵢ.

    Args:
        gram: Inner products of the anchors, ``(k, k)``.
        weights: ``(k,)``, with sum 1.
        geometry: ``"euclidean"``, or ``"sphere"``: directions on the sphere, norms averaged apart.
        p: 2 for the mean, 1 for the geometric median.

    Returns:
        ``(k,)``, in float64.

    Example:
        Half way between two orthogonal unit vectors, on the circle:

        >>> core_coefficients(torch.eye(2).double(), torch.tensor([0.5, 0.5]).double(), "sphere", 2)
        tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    if geometry == "euclidean":
        if p == 2:
            return weights
        # Seen from the mean, so that a common part of the anchors costs no digits.
        centred = gram - (gram @ weights)[:, None] - (weights @ gram) + weights @ gram @ weights
        points, back = _coordinates(centred)
        median = frechet_mean(geoopt.Euclidean(ndim=1), points, weights, p=1).point
        own = back @ median
        return own + weights * (1 - own.sum())
    norms = gram.diagonal().clamp(min=0).sqrt()
    used = norms > 0
    result = torch.zeros_like(weights)
    if not bool(used.any()):
        return weights
    shares = weights * used
    total = float(shares.sum())
    if total <= 0:
        return result
    shares, length = shares / total, norms[used]
    units = gram[used][:, used] / (length[:, None] * length)
    points, back = _coordinates(units)
    points = points / points.norm(dim=-1, keepdim=True)
    direction = points[0]
    if len(points) > 1:
        direction = frechet_mean(geoopt.SphereExact(), points, shares[used], p=p).point
    if p == 2:
        radius = (weights * norms).sum()
    else:
        line = frechet_mean(geoopt.Euclidean(ndim=1), norms[:, None], weights, p=1)
        radius = line.point.reshape(())
    result[used] = radius * (back @ direction) / length
    return result


def _coordinates(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``(k, k)`` with these inner products, and the map from a point to coefficients."""
    values, vectors = torch.linalg.eigh(gram)
    cut = torch.finfo(gram.dtype).eps * len(gram) * values[-1:].clamp(min=0)
    present = values > cut
    root = torch.where(present, values.clamp(min=torch.finfo(gram.dtype).tiny).sqrt(), 0.0)
    inverse = torch.where(present, 1 / root.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
    return vectors * root, vectors * inverse
