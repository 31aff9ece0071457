"""Logarithms of many small positive definite matrices without their eigenvalues.

With the Cayley transform Y = (M - I)(M + I)⁻¹, whose eigenvalues lie between -1 and 1,

    log M = 2 artanh Y = 2 Y f(Y²),   f(z) = artanh(√z)/√z = 1 + z/3 + z²/5 + …

The Chebyshev series of f on [0, reach] converges like ϱ⁻ʲ with ϱ + 1/ϱ = 4/reach - 2 and takes some
ten products of matrices, where an eigendecomposition of a 10 x 10 matrix costs as much as 75.

The eigenvalues of Y² need not be known: the norm of a Chebyshev polynomial of degree 2q, which
grows fast outside of the interval, bounds them afterwards. A result whose bound is within the
margin for which the degree was chosen is right to the accuracy that was asked for.

Source: Higham, Functions of Matrices (2008), sections 4.2 (Paterson and Stockmeyer's evaluation)
and 11.5; Trefethen, Approximation Theory and Approximation Practice (2013), chapter 8.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["cayley_log", "climb", "round_up"]

# Intervals are rounded up such that few different series are ever needed.
GRID = 1.03


class _Series(NamedTuple):
    """The function 2 f as Σᵢ (headsᵢ + Σ_j restᵢⱼ S_j) T_{iq}, i up to m, j up to q - 1."""

    heads: Tensor  # (m + 1, 1, 1)
    rest: Tensor  # (m + 1, q - 1)
    #: Bound on the norm of 2 T_{2q} within which the truncation error is as asked for.
    margin: float


def round_up(reach: float) -> float:
    """The end of the interval [0, reach], rounded up in proportion to its distance from 1."""
    steps = -math.log1p(-min(max(reach, 0.01), 1 - 1e-12)) / math.log(GRID)
    return 1 - GRID ** -math.ceil(steps - 1e-9)


@functools.lru_cache(maxsize=512)
def _series(
    reach: float, accuracy: float, size: int, dtype: torch.dtype, device: torch.device
) -> _Series:
    nodes = np.cos(np.pi * (np.arange(512) + 0.5) / 512)
    z = 0.5 * reach * (1 + nodes)
    root = np.sqrt(z)
    f = np.where(root > 1e-4, np.arctanh(root) / np.maximum(root, 1e-4), 1 + z / 3)
    c = 2 / 512 * np.cos(np.outer(np.arange(400), np.arccos(nodes))) @ f
    c[0] /= 2
    rate = _rate(reach)
    # The computed coefficients end in round-off; the true ones go on at the rate of the series.
    last = int(np.argmax(np.abs(c) < 1e-13 * c[0])) or len(c) - 1
    c[last + 1 :] = c[last] * rate ** -np.arange(1.0, len(c) - last)
    best: tuple[float, int, int] | None = None
    for q in range(2, 16):
        # All eigenvalues within the interval: T_2q has a norm of at most √n. Twice that is allowed.
        margin = 2 * math.sqrt(size)
        growth = np.cosh(np.arange(len(c)) * math.acosh(margin) / (2 * q))
        tails = np.cumsum((np.abs(c) * growth)[::-1])[::-1]
        fits = np.nonzero(tails <= accuracy)[0]
        if not len(fits):
            continue
        m = max(math.ceil(int(fits[0]) / q) - 1, 1)
        cost = q + 1.25 * m
        if best is None or cost < best[0]:
            best = cost, q, m
    assert best is not None
    _, q, m = best
    c = c[: (m + 1) * q].copy()
    blocks = np.zeros((m + 1, q))
    for i in range(m, 0, -1):  # T_{iq+j} = 2 T_j T_{iq} - T_{iq-j}
        blocks[i, 0] = c[i * q]
        blocks[i, 1:] = 2 * c[i * q + 1 : (i + 1) * q]
        c[(i - 1) * q + 1 : i * q] -= c[i * q + 1 : (i + 1) * q][::-1]
    blocks[0] = c[:q]
    make = functools.partial(torch.tensor, dtype=dtype, device=device)
    return _Series(make(2 * blocks[:, :1, None]), make(blocks[:, 1:]), 4 * math.sqrt(size))


def _rate(reach: float) -> float:
    t = 2 / reach - 1
    return t + math.sqrt(t * t - 1)


def cayley_log(y: Tensor, reach: float, accuracy: float) -> tuple[Tensor, Tensor | None]:
    """Logarithms log((I + Y)(I - Y)⁻¹) = 2 artanh Y of many small symmetric matrices.

    Args:
        y: Symmetric matrices with eigenvalues between -1 and 1, ``(B, n, n)``, contiguous.
        reach: The eigenvalues of Y² are at most that, as far as one knows; less than 1.
        accuracy: Relative error that is good enough.

    Returns:
        The logarithms ``(B, n, n)``, and ``None`` if they are as accurate as asked for. Otherwise
        bounds ``(B,)`` on the eigenvalues of Y², at most ``reach`` where they are.

    Example:
        >>> y = torch.tensor([[[0.0, 0.5], [0.5, 0.0]]], dtype=torch.float64)
        >>> log, bound = cayley_log(y, 0.3, 1e-15)
        >>> round(float(log[0, 0, 1]), 12), bound  # log 3
        (1.098612288668, None)
    """
    heads, rest, margin = _series(reach, accuracy, y.shape[-1], y.dtype, y.device)
    q = rest.shape[1] + 1
    # The ladder of S_j = 2 T_j(2 Y²/reach - 1), whose products need no factors.
    ladder = y.new_empty(q, *y.shape)
    torch.bmm(y, y, out=ladder[0]).mul_(4 / reach).diagonal(dim1=-2, dim2=-1).sub_(2)
    giant = climb(ladder)
    sums = torch.mm(rest, ladder[:-1].view(q - 1, -1)).view(-1, *y.shape)
    sums.diagonal(dim1=-2, dim2=-1).add_(heads)
    rows = sums.unbind()
    for i in range(len(rows) - 2, -1, -1):  # Clenshaw's recurrence in T_{iq}
        rows[i].add_(torch.bmm(giant, rows[i + 1]), alpha=1.0 if i else 0.5)
        if i + 2 < len(rows):
            rows[i].sub_(rows[i + 2])
    double = torch.bmm(giant, giant)
    double.diagonal(dim1=-2, dim2=-1).sub_(2)
    size = torch.linalg.vector_norm(double, dim=(-2, -1))
    log = torch.bmm(y, rows[0])
    if float(size.amax()) <= margin:
        return log, None
    angle = (0.5 * size).clamp(min=1.0).acosh() / (2 * q)
    bound = torch.where(size <= margin, reach, reach * (0.5 + 0.5 * angle.cosh()))
    return log, bound.nan_to_num(torch.inf, torch.inf)


def climb(ladder: Tensor) -> Tensor:
    """Fill ``(count, B, n, n)`` with S_1 … S_count, S_j = 2 T_j(t), from S_1 = 2 t in front.

    Returns:
        The last of them, ``(B, n, n)``.
    """
    steps = ladder.unbind()
    for j in range(2, len(steps) + 1):
        step = torch.bmm(steps[j // 2 - 1], steps[j - j // 2 - 1], out=steps[j - 1])
        if j % 2:
            step.sub_(steps[0])
        else:
            step.diagonal(dim1=-2, dim2=-1).sub_(2)
    return steps[-1]
