"""Anchors and weights of a mean, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.linalg import all_finite, refuse_class

__all__ = [
    "checked_anchors", "checked_points", "checked_weights", "normalized_weights", "refuse_names",
]  # fmt: skip


# Points are far off a manifold where its constraint is broken by more than this.
OFF = 5e-3


def normalized_weights(
    weights: Sequence[float] | Tensor | None,
    count: int,
    *,
    like: Tensor,
    negative: bool = False,
) -> Tensor:
    """Check weights and divide them by their sum.

    Args:
        weights: One weight for each anchor, ``(k,)``, or for each anchor and batch element,
            ``(k, ...)``; equal weights if ``None``.
        count: Number of anchors k.
        like: Tensor whose dtype and device the result takes.
        negative: Whether negative weights are allowed; the sum has to be positive all the same.

    Returns:
        Weights ``(k, ...)`` with sum 1 over the anchors.

    Raises:
        ValueError: If the number is wrong, an entry is not finite or negative, or the sum is not
            positive.

    Example:
        >>> import torch
        >>> normalized_weights([2, 1, 1], 3, like=torch.zeros(1)).tolist()
        [0.5, 0.25, 0.25]
    """
    w = checked_weights(weights, count, like=like, negative=negative)
    if weights is None and count:
        return w / count
    total = w.sum(0)
    if not bool((total > 0).all()):
        raise ValueError(
            f"weights: the sum must be positive, got {w.tolist()}; a sum without normalisation "
            "is not a mean"
        )
    return w / total


def checked_weights(
    weights: Sequence[float] | Tensor | None,
    count: int,
    *,
    like: Tensor,
    negative: bool = False,
) -> Tensor:
    """Check weights and leave their size.

    Args:
        weights: See :func:`normalized_weights`; ones if ``None``.
        count: Number of anchors k.
        like: Tensor whose dtype and device the result takes.
        negative: Whether negative weights are allowed.

    Returns:
        Weights ``(k, ...)``.

    Raises:
        ValueError: If the number is wrong, or an entry is not finite or negative.

    Example:
        >>> checked_weights(None, 2, like=torch.zeros(1)).tolist()
        [1.0, 1.0]
    """
    refuse_names(weights)
    if weights is None:
        return torch.ones(count, dtype=like.dtype, device=like.device)
    w = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if w.ndim == 0 or w.shape[0] != count:
        raise ValueError(f"weights: expected {count}, one for each anchor; got {tuple(w.shape)}")
    if not bool(w.isfinite().all()):
        raise ValueError(f"weights: expected finite numbers, got {w.tolist()}")
    if not negative and bool((w < 0).any()):
        raise ValueError(
            f"weights: {w.tolist()} has a negative entry, for which Σ wᵢ d² need not have a "
            "minimum; use a chordal distance, where it has one, or weights >= 0 (a sum, sum=True, "
            "can take an adapter away)"
        )
    return w


def refuse_names(weights: Any, what: str = "weights") -> None:
    """Raise ``ValueError`` if weights are a string or a mapping, in whose place a list belongs."""
    if isinstance(weights, str | Mapping):
        raise ValueError(
            f"{what}: expected a list of numbers in the order of the anchors, got a "
            f"{type(weights).__name__}; leave it out for equal weights"
        )


def checked_points(manifold: geoopt.Manifold, points: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Anchors as a list of finite points of one batch shape, type and device, without gradients.

    Args:
        manifold: Where they live.
        points: ``(k, ..., *point)``, or a sequence of k tensors ``(..., *point)``.

    Raises:
        ValueError: If there is none, or one is no point; the message numbers it. If the manifold
            is a class.

    Example:
        >>> checked_points(geoopt.Sphere(), torch.eye(2))
        [tensor([1., 0.]), tensor([0., 1.])]
    """
    return list(checked_anchors(manifold, points))


def checked_anchors(
    manifold: geoopt.Manifold, points: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor]:
    """What :func:`checked_points` does, but points in one tensor stay in one."""
    refuse_class(manifold)
    anchors: Tensor | list[Tensor]
    if isinstance(points, Tensor) and points.ndim:
        anchors = points.detach()
    else:
        for i, x in enumerate(points):
            if isinstance(x, list | tuple) and any(isinstance(part, Tensor) for part in x):
                how = "manifold.pack(B, A)" if hasattr(manifold, "pack") else "torch.stack"
                raise ValueError(
                    f"points[{i}]: a point is one tensor, got a {type(x).__name__}; use {how}"
                )
        anchors = [torch.as_tensor(x).detach() for x in points]
    if not len(anchors):
        raise ValueError("points: at least one anchor is needed, got none")
    seen = anchors[:1] if isinstance(points, Tensor) else anchors  # slices of a tensor are alike
    dtypes = {x.dtype for x in seen}
    if len(dtypes) > 1 or not anchors[0].is_floating_point():
        raise ValueError(f"points: one floating-point dtype is expected, got {dtypes}")
    if anchors[0].dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"points: {anchors[0].dtype} has too few digits for a mean; convert the anchors to "
            "float32 or float64 and the result back"
        )
    devices = {str(x.device) for x in seen}
    if len(devices) > 1:
        raise ValueError(f"points: one device is expected, got {sorted(devices)}")
    batches = {tuple(x.shape[: x.ndim - manifold.ndim]) for x in seen}
    if len(batches) > 1:
        raise ValueError(f"points: anchors have different batch shapes {sorted(batches)}")
    whole = isinstance(points, Tensor) and all_finite(points)
    for i, x in enumerate(seen if whole else anchors):
        try:
            manifold.assert_check_point(x)
        except ValueError as error:
            raise ValueError(f"points[{i}]: {error}") from error
        if not all_finite(x):
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"points[{i}]: {bad} entries are NaN or infinite; repair that anchor")
    if isinstance(anchors, Tensor) and not _off(manifold, anchors):
        return anchors
    for i, x in enumerate(anchors):
        reason = _off(manifold, x)
        if reason:
            raise ValueError(
                f"points[{i}] is not on {manifold}: {reason}; project it with manifold.projx"
            )
    return anchors


def _off(manifold: geoopt.Manifold, x: Tensor) -> str:
    """Why points, ``(..., *point)``, are far off a manifold of geoopt's; empty where they are not.

    Round-off is none of its business, and neither is low precision: half a percent is.
    """
    if not x.numel():
        return ""
    if isinstance(manifold, geoopt.SymmetricPositiveDefinite):  # without eigenvalues
        if float((x - x.mT).abs().amax()) > OFF * float(x.abs().amax()):
            return "it is not symmetric"
        return "" if not bool(torch.linalg.cholesky_ex(x).info.any()) else "it is not positive"
    if isinstance(manifold, geoopt.Sphere):  # most means are small: geoopt's check takes as long
        away = float((torch.linalg.vector_norm(x, dim=-1) - 1).abs().amax())
        return f"its norm is off 1 by {away:.2g}" if away > OFF else ""
    if not isinstance(manifold, geoopt.EuclideanStiefel | geoopt.Stereographic):
        return ""
    ok, reason = manifold.check_point_on_manifold(x, explain=True, atol=OFF, rtol=OFF)
    return "" if ok else str(reason)
