"""Means of small positive definite matrices by Newton's method without eigenvalues.

Points are looked at in a frame R of the iterate x = R Rᵀ, which moves along by R exp(v/2): there x
is the identity, parallel transport too, and the Hessian hardly changes from one step to the next.
Logarithms come from a polynomial (:mod:`manifold_merge.symmetric_log`) of

    Y = (R⁻¹ p R⁻ᵀ/c - I)(R⁻¹ p R⁻ᵀ/c + I)⁻¹ = I - 2 Rᵀ(p/c + x)⁻¹R,

with a factor c for each point that centres its spectrum. The Hessian u ↦ Σ w h(ad X) u of the mean,
h(s) = s/2 coth(s/2), becomes a dense matrix by a polynomial in two variables on the spectra,
h(a - b) ≈ Σ_r ± φ_r(a) φ_r(b), as Σ w h(ad X) u ≈ Σ_r ± Σ w φ_r(X) u φ_r(X). It need not be exact,
and is not computed anew at each step: the gradient is what is certified, and on this space, where
the objective is convex, a point without gradient is the mean. See ``docs/solvers.md``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.symmetric_log import cayley_log, climb, round_up

__all__ = ["SeriesMean", "has_series", "newton_by_series"]

# Eigenvalues of smaller matrices cost less; of larger ones, Hessians of n(n + 1)/2 rows cost more.
SIZES = range(6, 21)
MAX_STEPS = 9
# Entries of the points that are worked on at once: what is made of them stays in the cache.
CHUNK = 32_000
# With fewer matrices it is the number of operations that counts, not the time of each.
FEW = 100
# Spectra that are wider have too long a series: ratios of eigenvalues of up to 1e4.
WIDEST = 0.96
# The first iterates are far from the mean, and their logarithms need few digits.
ACCURACY = (1e-3, 1e-8)
# Degrees of the Hessian at the start, and at the iterates after it.
START_DEGREE, DEGREE = 4, 7


class SeriesMean(NamedTuple):
    """Results of all problems, and which of them converged."""

    point: Tensor
    objective: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    converged: Tensor


def has_series(shape: tuple[int, ...], max_iterations: int) -> bool:
    """Whether matrices of this shape have a size for it, and steps are not rationed."""
    return shape[-1] in SIZES and max_iterations >= MAX_STEPS


def newton_by_series(
    points: Tensor, weights: Tensor, start: Tensor | None, tolerance: float, floor: float
) -> SeriesMean:
    """Newton's iteration on positive definite matrices.

    Args:
        points: ``(k, L, n, n)``, n in ``SIZES``.
        weights: ``(k, L)`` with sum 1 over the points.
        start: ``(L, n, n)``; the arithmetic means if ``None``.
        tolerance: Goal of the gradient norm relative to the spread of the points.
        floor: What is added to that goal.

    Returns:
        The means; those that are not ``converged`` mean nothing. Such are spectra that are too
        wide for the series, and points that are not positive definite.
    """
    count, size, n = points.shape[0], points.shape[1], points.shape[-1]
    part = max(1, CHUNK // (count * n * n)) if points.device.type == "cpu" else max(size, 1)
    parts = []
    for rows in (slice(i, i + part) for i in range(0, size, part)):
        begin = None if start is None else start[rows]
        parts.append(_newton(points[:, rows], weights[:, rows], begin, (tolerance, floor)))
    if len(parts) == 1:
        return parts[0]
    return SeriesMean(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _newton(
    points: Tensor, weights: Tensor, start: Tensor | None, goal: tuple[float, float]
) -> SeriesMean:
    (count, size, n), weights = points.shape[:3], weights.T
    points = points.transpose(0, 1).contiguous()
    if start is None:
        start = torch.bmm(weights[:, None], points.view(size, count, n * n)).view(size, n, n)
    root, info = torch.linalg.cholesky_ex(start)
    view = _View(points, root)
    usable = going = info == 0
    iterations = torch.zeros(size, dtype=torch.long, device=points.device)
    for step in range(MAX_STEPS + 1):
        logs, centre, fine, reach = view.look(root, step)
        if fine is not None:
            usable, going = usable & fine, going & fine
        if step < 2 or step > 3:
            lower = _hessian(logs, weights, reach, DEGREE if step else START_DEGREE)
        shift = view.measure(logs, usable) if step == 0 and size * count > FEW else 0.0
        logs.diagonal(dim1=-2, dim2=-1).add_(centre[..., None])
        flat = logs.view(size, count, n * n)
        direction = torch.bmm(weights[:, None].to(logs), flat).view(size, n, n).to(root)
        if step >= view.rough:
            objective = (weights * torch.linalg.vector_norm(flat, dim=-1).square_()).sum(-1)
            gradient = torch.linalg.vector_norm(direction, dim=(-2, -1))
            going = going & ~(gradient <= goal[0] * objective.sqrt() + goal[1])
            if step == MAX_STEPS or not bool(going.any()):
                break
        # A problem that has converged stays where it is, whatever the others do.
        iterations += going
        v = torch.where(going[:, None, None], _solve(lower, direction), 0.0)
        root = torch.bmm(root, _half_exponential(v, precise=step == 0))
        if step == 0:
            view.move(shift - v.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
    point = torch.bmm(root, adjoint(root))
    return SeriesMean(point, objective, gradient, iterations, usable & ~going)


class _Seen(NamedTuple):
    """Points from an iterate."""

    logs: Tensor  # (L, k, n, n), less their centres
    centre: Tensor  # (L, k)
    fine: Tensor | None  # (L,), where they are right; everywhere if None
    reach: float  # of their Cayley transforms


class _View:
    """The points of some problems, ``(L, k, n, n)``, as they look from an iterate."""

    #: Steps whose logarithms have few digits.
    rough = len(ACCURACY)

    def __init__(self, points: Tensor, root: Tensor) -> None:
        size, count, n, _ = points.shape
        self._points, self._reach = points, 0.75
        # Spectra lean to below their mean; the first logarithms tell more.
        inverse = torch.cholesky_inverse(root).reshape(size, n * n, 1)
        trace = torch.bmm(points.view(size, count, n * n), inverse)[..., 0]
        self._centre = (trace * (0.4 / n)).log()
        # The first logarithms, rough as they are, fit in single precision.
        self._unit = torch.linalg.vector_norm(root, dim=(-2, -1))[:, None, None]
        self._scaled = torch.empty_like(points, dtype=torch.float32)
        factor = (-self._centre).exp()[..., None, None] / self._unit[:, None].square()
        torch.mul(points, factor, out=self._scaled)

    def look(self, root: Tensor, step: int) -> _Seen:
        """Logarithms in the frame ``root``, ``(L, n, n)``."""
        accuracy = 32 * torch.finfo(root.dtype).eps
        if step < self.rough:
            accuracy = max(ACCURACY[step], accuracy)
        frame = root if step else (root / self._unit).to(torch.float32)
        size, count, n, _ = self._scaled.shape
        total = self._scaled + torch.bmm(frame, adjoint(frame))[:, None]
        lower, info = torch.linalg.cholesky_ex(total)
        half = torch.linalg.solve_triangular(lower, frame[:, None].expand_as(lower), upper=False)
        half = half.reshape(-1, n, n)
        y = torch.bmm(adjoint(half), half).mul_(-2)
        y.diagonal(dim1=-2, dim2=-1).add_(1)
        fine = (info == 0).all(-1) if bool(info.any()) else None
        reach = self._reach
        for _ in range(3):  # bounds are sharp: the second series has the right interval
            end = round_up(min(reach, WIDEST))
            logs, bound = cayley_log(y, end, accuracy)
            if bound is None:
                break
            worst = bound.view(size, count).amax(-1)
            fine = worst <= WIDEST if fine is None else fine & (worst <= WIDEST)
            reach = float(torch.where(fine, worst, 0.0).amax())
            if reach <= end:
                break
        else:
            fine = worst <= end if fine is None else fine & (worst <= end)
        self._reach = end
        return _Seen(logs.view(size, count, n, n), self._centre, fine, end)

    def measure(self, logs: Tensor, usable: Tensor) -> Tensor:
        """Middles ``(L, k)`` of the spectra; what reaches how far from them is kept in mind."""
        n = logs.shape[-1]
        square = torch.matmul(logs, logs)
        mean = logs.diagonal(dim1=-2, dim2=-1).mean(-1)
        second = square.diagonal(dim1=-2, dim2=-1).mean(-1) - mean.square()
        third = (square * logs).sum((-2, -1)) / n - mean * (3 * second + mean.square())
        # As large as an eigenvalue at most, which round-off in small logarithms does not know.
        most = (n * second.clamp(min=0)).sqrt()
        skew = 0.5 * third / second.clamp(min=torch.finfo(logs.dtype).tiny)
        shift = mean + skew.clamp(-most, most)
        # Σ λ⁸ of the shifted matrix bounds its greatest eigenvalue from above, closely.
        moved = square - 2 * shift[..., None, None] * logs
        moved.diagonal(dim1=-2, dim2=-1).add_(shift.square()[..., None])
        eighth = torch.linalg.vector_norm(torch.matmul(moved, moved), dim=(-2, -1))
        widest = float(torch.where(usable[:, None], eighth, 0.0).amax())
        self._reach = math.tanh(0.485 * widest**0.25) ** 2 if math.isfinite(widest) else WIDEST
        return shift

    def move(self, shift: Tensor) -> None:
        """Move the centres by ``(L, k)``, for all digits from now on."""
        self._centre = self._centre + shift
        self._scaled = self._points * (-self._centre).exp()[..., None, None]


def _half_exponential(v: Tensor, *, precise: bool) -> Tensor:
    """A positive definite function of symmetric matrices ``(L, n, n)`` close to exp(v/2)."""
    even = torch.bmm(v, v)
    if not precise:  # ((I + v/2)² + I)/2
        even.mul_(0.125).add_(v, alpha=0.5).diagonal(dim1=-2, dim2=-1).add_(1)
        return even
    even.mul_(1 / 48).diagonal(dim1=-2, dim2=-1).add_(1)  # Padé's approximation of degree [2/2]
    lower, _ = torch.linalg.cholesky_ex(even - 0.25 * v)
    return torch.cholesky_solve(even + 0.25 * v, lower)


class _Kernel(NamedTuple):
    """φ_r as sums of Chebyshev polynomials S_j = 2 T_j on [-end, end], the negative ones last."""

    end: float
    heads: Tensor  # (degree + 1, 1, 1)
    rest: Tensor  # (degree + 1, degree)
    positive: int


@functools.lru_cache(maxsize=256)
def _kernel(reach: float, degree: int, device: torch.device) -> _Kernel:
    end = 2 * math.atanh(math.sqrt(reach))
    angle = np.pi * (np.arange(64) + 0.5) / 64
    half = 0.5 * end * np.subtract.outer(np.cos(angle), np.cos(angle))
    values = np.where(half == 0, 1.0, half / np.tanh(np.where(half == 0, 1.0, half)))
    transform = np.cos(np.outer(np.arange(degree + 1), angle)) / 32
    transform[0] /= 2
    weights, vectors = np.linalg.eigh(transform @ values @ transform.T)
    order = np.argsort(-weights)
    factors = (vectors * np.sqrt(np.abs(weights)))[:, order].T
    factors[:, 1:] /= 2
    make = functools.partial(torch.tensor, dtype=torch.float32, device=device)
    return _Kernel(end, make(factors[:, :1, None]), make(factors[:, 1:]), int((weights > 0).sum()))


class _Triangle(NamedTuple):
    """Symmetric matrices as vectors of the entries on and above the diagonal."""

    entries: Tensor  # (N,), where these entries are in the matrix
    scale: Tensor  # (N,), makes the coordinates orthonormal
    pairs: tuple[Tensor, Tensor]  # (1, N²), (ab, cd) and (ac, bd) of (ad, bc)
    basis: Tensor  # (N, n²), an orthonormal one


@functools.lru_cache(maxsize=64)
def _triangle(n: int, device: torch.device) -> _Triangle:
    row, column = torch.triu_indices(n, n, device=device)
    order = torch.arange(len(row), device=device)
    place = torch.zeros(n, n, dtype=torch.long, device=device)
    place[row, column] = place[column, row] = order
    a, d, b, c = row[:, None], column[:, None], row[None], column[None]
    first = place[a, b] * len(row) + place[c, d]
    second = place[a, c] * len(row) + place[b, d]
    scale = torch.where(row == column, 1.0, math.sqrt(2.0)).to(device, torch.float32)
    basis = (place.flatten() == order[:, None]) / scale[:, None]
    pairs = first.reshape(1, -1), second.reshape(1, -1)
    return _Triangle(row * n + column, scale, pairs, basis)


def _hessian(logs: Tensor, weights: Tensor, reach: float, degree: int) -> Tensor:
    """Cholesky factors ``(L, N, N)`` of the Hessians in single precision."""
    size, count, n, _ = logs.shape
    kernel, triangle = _kernel(reach, degree, logs.device), _triangle(n, logs.device)
    ladder = torch.empty(degree, size * count, n, n, dtype=torch.float32, device=logs.device)
    torch.mul(logs.reshape(-1, n, n), 2 / kernel.end, out=ladder[0])
    climb(ladder)
    factors = torch.mm(kernel.rest, ladder.view(degree, -1)).view(-1, size * count, n, n)
    factors.diagonal(dim1=-2, dim2=-1).add_(kernel.heads)
    rows = factors.reshape(degree + 1, size, count, n * n).transpose(0, 1)
    share = weights.to(torch.float32).sqrt()[:, None, :, None]
    if size * count <= FEW:
        half = rows[..., triangle.entries] * share
    else:
        half = rows.new_empty(size, degree + 1, count, len(triangle.scale))
        for a in range(n):  # rows from the diagonal on, in half of the time of an index
            end = (a + 1) * n - a * (a + 1) // 2
            torch.mul(rows[..., a * n + a : (a + 1) * n], share, out=half[..., end - n + a : end])
    plus = half[:, : kernel.positive].reshape(size, -1, half.shape[-1])
    minus = half[:, kernel.positive :].reshape(size, -1, half.shape[-1])
    gram = torch.bmm(adjoint(plus), plus).sub_(torch.bmm(adjoint(minus), minus))
    gram = gram.reshape(size, -1)
    first, second = (gram.gather(1, p.expand(size, -1)) for p in triangle.pairs)
    scale = triangle.scale
    hessian = first.add_(second).reshape(size, len(scale), -1)
    return torch.linalg.cholesky_ex(hessian.mul_(0.5 * scale[:, None] * scale))[0]


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """Solve the systems of :func:`_hessian` for symmetric matrices ``(L, n, n)``."""
    basis = _triangle(right.shape[-1], right.device).basis
    vector = torch.mm(right.view(len(right), -1).to(torch.float32), basis.T)
    vector = torch.cholesky_solve(vector[..., None], lower)[..., 0]
    return torch.mm(vector, basis).view(right.shape).to(right)
