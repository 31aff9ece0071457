"""The rotation between the gauges of two polar factorisations.

Two triples (U, R, V) of one rank are compared after one of them has been rotated, O in O(r). The
rotation minimises a function that is not convex: chords between frames pull towards the orthogonal
Procrustes solution, the affine-invariant distance of the spectra towards axes that match.
"""

from __future__ import annotations

import itertools

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from manifold_merge.linalg import adjoint, matrix_exp
from manifold_merge.stiefel import gmres, skew

__all__ = ["Alignment", "SpectrumTie", "Triple", "act", "ordered", "oriented", "polar_factor"]

Triple = tuple[Tensor, Tensor, Tensor]

ALIGNMENT_STEPS = 30
POLISHING_STEPS = 10
# Up to this rank all sign patterns of the spectra's eigenvectors are tried as starts.
ENUMERATED_RANK = 3
# So many of the minima over O are followed, the lowest after a few steps.
FOLLOWED_STARTS = 2


def act(x: Triple, o: Tensor) -> Triple:
    """The action of O(r): (U O, OᵀR O, V O)."""
    u, spectrum, v = x
    return u @ o, adjoint(o) @ spectrum @ o, v @ o


class SpectrumTie:
    """How the spectra tie both frames together: λ d²(diag(s), OᵀR O) as a function of O."""

    def __init__(self, values: Tensor, spectrum: Tensor, gauge: Tensor, weight: float) -> None:
        self.lam = weight
        self.target = adjoint(gauge) @ spectrum @ gauge
        root = values.sqrt()
        self.scale = root[..., :, None] * root[..., None, :]
        ratio = root[..., :, None] / root[..., None, :]
        self.lever = ratio - adjoint(ratio)
        eigenvalues, self.vectors = torch.linalg.eigh(self.target / self.scale)
        eigenvalues = eigenvalues.clamp(min=torch.finfo(values.dtype).tiny)
        logs = eigenvalues.log()
        self.white_log = (self.vectors * logs[..., None, :]) @ adjoint(self.vectors)
        # (log a - log b) / (a - b)
        self.slopes = (
            _over_sinh(logs) / (eigenvalues[..., :, None] * eigenvalues[..., None, :]).sqrt()
        )
        self.momentum = weight * self.white_log * self.lever
        # The derivative would be diagonal if the target were: a good model near the solution.
        diagonal = self.target.diagonal(dim1=-2, dim2=-1)
        turned = (diagonal[..., :, None] - diagonal[..., None, :]) / (
            diagonal[..., :, None] * diagonal[..., None, :]
        ).sqrt()
        self.weight = (weight * self.lever * turned * _over_sinh((diagonal / values).log())).abs()

    @property
    def energy(self) -> Tensor:
        """The squared distance times λ, of the batch shape."""
        return self.lam * self.white_log.square().sum((-2, -1))

    def derivative(self, k: Tensor) -> Tensor:
        """How ``momentum`` changes when the target turns with velocity ``k``."""
        moved = (self.target @ k - k @ self.target) / self.scale
        rotated = adjoint(self.vectors) @ moved @ self.vectors
        white = self.vectors @ (rotated * self.slopes) @ adjoint(self.vectors)
        return self.lam * white * self.lever


def _over_sinh(logs: Tensor) -> Tensor:
    """Return x / sinh(x) for half the pairwise differences x."""
    half = 0.5 * (logs[..., :, None] - logs[..., None, :])
    small = half.abs() < 1e-3
    safe = torch.where(small, 1.0, half)
    return torch.where(small, 1 - half.square() / 6, safe / torch.sinh(safe))


def polar_factor(x: Tensor) -> Tensor:
    """Nearest orthogonal matrix to ``(..., r, r)`` matrices."""
    left, _, right = torch.linalg.svd(x)
    return left @ right


def ordered(x: Triple, y: Triple) -> tuple[Triple, Triple, Tensor]:
    """Both triples in an order that does not depend on which is called x, and where they swapped.

    All searches start from this order, so that whatever they find is symmetric in x and y.
    """
    traces = [z[1].diagonal(dim1=-2, dim2=-1).sum(-1) for z in (x, y)]
    swap = (traces[0] > traces[1])[:, None, None]
    first = tuple(torch.where(swap, b, a) for a, b in zip(x, y, strict=True))
    second = tuple(torch.where(swap, a, b) for a, b in zip(x, y, strict=True))
    return first, second, swap  # type: ignore[return-value]


def oriented(rotation: Tensor, swap: Tensor) -> Tensor:
    """A rotation between the points as given, from one between the ordered ones, or back."""
    return torch.where(swap, adjoint(rotation), rotation)


class Alignment:
    """f(O) = ½|U_x - U_y O|² + ½|V_x - V_y O|² + ½λ d²(R_x, OᵀR_y O), R_x = diag(values).

    Args:
        overlap: U_yᵀU_x + V_yᵀV_x, ``(k, r, r)``.
        values: Eigenvalues of R_x, ``(k, r)``.
        spectrum: R_y, ``(k, r, r)``.
        weight: λ.
    """

    def __init__(self, overlap: Tensor, values: Tensor, spectrum: Tensor, weight: float) -> None:
        self.overlap, self.values, self.spectrum, self.weight = overlap, values, spectrum, weight

    def take(self, index: Tensor) -> Alignment:
        """The same function for the elements at ``index``, which may repeat."""
        return Alignment(self.overlap[index], self.values[index], self.spectrum[index], self.weight)

    def evaluate(self, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value up to a constant, slope in the Lie algebra, and stiffness entry by entry."""
        tie = SpectrumTie(self.values, self.spectrum, o, self.weight)
        frames = adjoint(self.overlap) @ o
        diagonal = frames.diagonal(dim1=-2, dim2=-1)
        stiff = 0.5 * (diagonal[..., :, None] + diagonal[..., None, :]).abs() + tie.weight
        return (
            0.5 * tie.energy - diagonal.sum(-1),
            skew(frames) + tie.momentum,
            stiff.clamp(min=0.1),
        )

    def descend(self, o: Tensor, steps: int = ALIGNMENT_STEPS) -> tuple[Tensor, Tensor]:
        """Preconditioned conjugate gradients on O(r) with backtracking; rotations and values."""
        value, slope, stiff = self.evaluate(o)
        length, direction = torch.ones_like(value), -slope / stiff
        for _ in range(steps):
            rate = (direction * slope).sum((-2, -1))
            waiting = torch.ones_like(value, dtype=torch.bool)
            old_slope, old_stiff, tried = slope, stiff, length
            new: list[Tensor] = [o, value, slope, stiff]
            for _ in range(5):
                moved = o @ matrix_exp(tried[:, None, None] * direction)
                trial = (moved, *self.evaluate(moved))
                good = waiting & (trial[1] <= value + 1e-4 * tried * rate)
                new = [
                    torch.where(good.reshape(-1, *(1,) * (t.ndim - 1)), t, kept)
                    for t, kept in zip(trial, new, strict=True)
                ]
                waiting = waiting & ~good
                if not bool(waiting.any()):
                    break
                tried = torch.where(waiting, 0.3 * tried, tried)
            length = torch.where(waiting, 0.1 * tried, (1.5 * tried).clamp(max=1.0))
            o, value, slope, stiff = new
            if bool((slope.abs() <= 1e-4 * stiff).all()):
                break
            plain = slope / stiff
            growth = ((slope - old_slope) * plain).sum((-2, -1))
            before = (old_slope.square() / old_stiff).sum((-2, -1))
            share = (growth / before.clamp(min=torch.finfo(before.dtype).tiny)).clamp(min=0)
            direction = -plain + share[:, None, None] * direction
            uphill = (direction * slope).sum((-2, -1)) >= 0
            direction = torch.where(uphill[:, None, None], -plain, direction)
        return o, value

    def polish(self, o: Tensor) -> Tensor:
        """Newton steps to a stationary point nearby, as far as they lower the slope."""
        _, slope, stiff = self.evaluate(o)
        size = (slope / stiff).abs().amax((-2, -1))
        for _ in range(POLISHING_STEPS):
            if bool((size <= 1e-14 * o.shape[-1]).all()):
                break
            step = self._newton_step(o, slope, stiff)
            moved = o @ matrix_exp(step)
            _, new_slope, new_stiff = self.evaluate(moved)
            new_size = (new_slope / new_stiff).abs().amax((-2, -1))
            better = new_size < size
            if not bool(better.any()):
                break
            keep = better[:, None, None]
            o, slope = torch.where(keep, moved, o), torch.where(keep, new_slope, slope)
            stiff, size = torch.where(keep, new_stiff, stiff), torch.where(better, new_size, size)
        return o

    def _newton_step(self, o: Tensor, slope: Tensor, stiff: Tensor) -> Tensor:
        tie = SpectrumTie(self.values, self.spectrum, o, self.weight)
        frames = adjoint(self.overlap) @ o

        def derivative(k: list[Tensor]) -> list[Tensor]:
            return [skew(frames @ k[0]) + tie.derivative(k[0])]

        def precondition(k: list[Tensor]) -> list[Tensor]:
            return [skew(k[0]) / stiff]

        return gmres(derivative, precondition, [-slope], tolerance=1e-6)[0]

    def minima(self) -> list[Tensor]:
        """Rotations at low minima, the lowest first, each ``(k, r, r)``."""
        count, every = len(self.values), torch.arange(len(self.values), device=self.values.device)
        starts = torch.stack(self._candidates())
        tiled = self.take(every.repeat(len(starts)))
        o, value = tiled.descend(starts.flatten(0, 1), ALIGNMENT_STEPS // 4)
        o, value = o.unflatten(0, (-1, count)), value.unflatten(0, (-1, count))
        chosen = []
        for _ in range(FOLLOWED_STARTS):
            pick = o[value.argmin(0), every]
            chosen.append(pick)
            # The next one is the lowest of those that are elsewhere.
            value = torch.where((o - pick).abs().amax((-2, -1)) < 1e-2, torch.inf, value)
        o, value = self.take(every.repeat(len(chosen))).descend(torch.cat(chosen))
        o, value = o.unflatten(0, (-1, count)), value.unflatten(0, (-1, count))
        order = value.argsort(0)
        return list(o[order, every])

    def _candidates(self) -> list[Tensor]:
        """Rotations that match the frames; signed permutations that match the spectra's axes."""
        overlap, values, spectrum = self.overlap, self.values, self.spectrum
        r = values.shape[-1]
        nearest = polar_factor(overlap)
        # The other component of O(r): turn round the axis of R_x that is matched worst. Singular
        # vectors would not do, as singular values may come in equal pairs.
        worst = (nearest * overlap).sum(-2).argmin(-1)
        signs = 1 - 2 * torch.nn.functional.one_hot(worst, r).to(values.dtype)
        found = [nearest, nearest * signs[..., None, :]]
        others, axes = torch.linalg.eigh(spectrum)
        seen = adjoint(axes) @ overlap
        gap = (others[..., :, None] / values[..., None, :]).log().square()
        cost = self.weight * gap - 2 * seen.abs()
        matched = torch.zeros_like(seen)
        for element, matrix in enumerate(cost.cpu().numpy()):
            rows, columns = linear_sum_assignment(matrix)
            matched[element, rows, columns] = 1.0
        eye = torch.eye(r, dtype=values.dtype, device=values.device).expand_as(seen)
        for match in (eye, matched):
            signed = torch.where(seen < 0, -match, match)
            weakest = torch.where(match > 0, seen.abs(), torch.inf).flatten(-2).argmin(-1)
            flipped = signed.flatten(-2).clone()
            flipped[torch.arange(len(flipped)), weakest] *= -1
            found += [axes @ signed, axes @ flipped.reshape(signed.shape)]
        if r <= ENUMERATED_RANK:
            for pattern in itertools.product((1.0, -1.0), repeat=r):
                diagonal = torch.tensor(pattern, dtype=values.dtype, device=values.device)
                found += [axes * diagonal, axes @ matched * diagonal]
        return found
