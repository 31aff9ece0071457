"""Logarithms and distances between polar factorisations, exact and approximated.

All functions take triples (U, R, V), W = U R Vᵀ, of shapes ``(..., m, r)``, ``(..., r, r)`` and
``(..., n, r)``, and the weight λ of the spectrum in the metric. The three constructions have the
names and the codes of :mod:`manifold_merge.lora_log`:

* **chordal**: the horizontal lift of P_T(W_y - W_x), always defined;
* **aligned**: the gauges that minimise the sum of squared chords between frames and squared
  affine-invariant distance between spectra, and that minimum;
* **exact**: the initial velocity of the geodesic in the quotient, by shooting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.stiefel import (
    end_velocity,
    frame_coordinates,
    gmres,
    matrix_exp,
    shoot,
    skew,
    sym,
)

__all__ = [
    "Triple",
    "act",
    "aligned_distance2",
    "aligned_log",
    "aligned_rotation",
    "chordal_covector",
    "chordal_log",
    "exact_log",
    "horizontal",
    "polar_factor",
    "vertical",
]

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


def vertical(x: Triple, k: Tensor) -> Triple:
    """Velocity (U K, R K - K R, V K) of the action along the skew matrix K ``(..., r, r)``."""
    u, spectrum, v = x
    return u @ k, spectrum @ k - k @ spectrum, v @ k


def horizontal(x: Triple, xi: Triple, weight: float) -> Triple:
    """Subtract the vertical part of a tangent vector.

    K solves 2 K + λ(R K R⁻¹ + R⁻¹K R - 2K) = Uᵀξ_U + Vᵀξ_V + λ(ξ_R R⁻¹ - R⁻¹ξ_R), the derivative
    of |ξ - vertical(K)|² (Mishra, Meyer, Bonnabel and Sepulchre 2014, section 4). Multiplied by R
    from both sides it has no inverse, and in the eigenbasis of R it is solved entry by entry.
    """
    u, spectrum, v = x
    momentum = skew(adjoint(u) @ xi[0] + adjoint(v) @ xi[2])

    def rhs(r: Tensor) -> Tensor:
        return r @ momentum @ r + weight * (r @ xi[1] - xi[1] @ r)

    def operator(r: Tensor, k: Tensor) -> Tensor:
        twice = r @ r
        return (2 - 2 * weight) * (r @ k @ r) + weight * (twice @ k + k @ twice)

    fixed = spectrum.detach()
    values, basis = torch.linalg.eigh(fixed)
    products, differences = _products_and_differences(values)
    inverse = _safe_inverse(2 * products + weight * differences.square())

    def solve(scaled: Tensor) -> Tensor:
        return basis @ (scaled * inverse) @ adjoint(basis)

    k = solve(
        products * (adjoint(basis) @ momentum @ basis)
        + weight * differences * (adjoint(basis) @ xi[1] @ basis)
    )
    if spectrum.requires_grad:
        # Eigenvectors have no derivative at repeated eigenvalues, but K has one. The terms below
        # are zero and carry just that.
        change = rhs(spectrum) - rhs(fixed)
        change = change - operator(spectrum, k.detach()) + operator(fixed, k.detach())
        k = k + solve(adjoint(basis) @ change @ basis)
    return tuple(a - b for a, b in zip(xi, vertical(x, k), strict=True))  # type: ignore[return-value]


def _products_and_differences(values: Tensor) -> tuple[Tensor, Tensor]:
    row, column = values[..., :, None], values[..., None, :]
    return row * column, row - column


def _safe_inverse(x: Tensor) -> Tensor:
    """Entry-wise inverse, zero where ``x`` is zero to round-off of its largest entry."""
    cut = torch.finfo(x.dtype).eps ** 2 * x.amax((-2, -1), keepdim=True)
    return torch.where(x > cut, 1 / x.clamp(min=torch.finfo(x.dtype).tiny), 0)


# --- chordal -------------------------------------------------------------------------------------


def _projected_difference(x: Triple, y: Triple) -> tuple[Tensor, Tensor]:
    """(Z V, ZᵀU) for Z = W_y - W_x, without forming W."""
    (u, r, v), (uy, ry, vy) = x, y
    return uy @ (ry @ (adjoint(vy) @ v)) - u @ r, vy @ (ry @ (adjoint(uy) @ u)) - v @ r


def chordal_covector(x: Triple, y: Triple) -> Triple:
    """The Euclidean derivative of -½|W_x - W_y|² with respect to (U, R, V)."""
    right, left = _projected_difference(x, y)
    return right @ x[1], sym(adjoint(x[0]) @ right), left @ x[1]


def chordal_log(x: Triple, y: Triple, weight: float) -> Triple:
    """Horizontal lift at x of the tangent projection of W_y - W_x."""
    u, spectrum, v = x
    right, left = _projected_difference(x, y)
    values, basis = torch.linalg.eigh(spectrum)
    core = adjoint(basis) @ adjoint(u) @ right @ basis
    sums = values[..., :, None] + values[..., None, :]
    turn = basis @ (2 * skew(core) * _safe_inverse(sums)) @ adjoint(basis)
    cut = torch.finfo(values.dtype).eps * values.shape[-1] * values.amax(-1, keepdim=True)
    inverse = torch.where(values > cut, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0)
    inverse = (basis * inverse[..., None, :]) @ adjoint(basis)
    lift = (
        (right - u @ (adjoint(u) @ right)) @ inverse + 0.5 * u @ turn,
        basis @ sym(core) @ adjoint(basis),
        (left - v @ (adjoint(v) @ left)) @ inverse - 0.5 * v @ turn,
    )
    return horizontal(x, lift, weight)


# --- the rotation between two gauges -------------------------------------------------------------


class _SpectrumTie:
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
        return self.lam * self.white_log.square().sum((-2, -1))

    def derivative(self, k: Tensor) -> Tensor:
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


def _ordered(x: Triple, y: Triple) -> tuple[Triple, Triple, Tensor]:
    """Both triples in an order that does not depend on which is called x, and where they swapped.

    All searches start from this order, so that whatever they find is symmetric in x and y.
    """
    traces = [z[1].diagonal(dim1=-2, dim2=-1).sum(-1) for z in (x, y)]
    swap = (traces[0] > traces[1])[:, None, None]
    first = tuple(torch.where(swap, b, a) for a, b in zip(x, y, strict=True))
    second = tuple(torch.where(swap, a, b) for a, b in zip(x, y, strict=True))
    return first, second, swap  # type: ignore[return-value]


def _oriented(rotation: Tensor, swap: Tensor) -> Tensor:
    """A rotation between the points as given, from one between the ordered ones, or back."""
    return torch.where(swap, adjoint(rotation), rotation)


class _Alignment:
    """f(O) = ½|U_x - U_y O|² + ½|V_x - V_y O|² + ½λ d²(R_x, OᵀR_y O), R_x = diag(values).

    Args:
        overlap: U_yᵀU_x + V_yᵀV_x, ``(k, r, r)``.
        values: Eigenvalues of R_x, ``(k, r)``.
        spectrum: R_y, ``(k, r, r)``.
        weight: λ.
    """

    def __init__(self, overlap: Tensor, values: Tensor, spectrum: Tensor, weight: float) -> None:
        self.overlap, self.values, self.spectrum, self.weight = overlap, values, spectrum, weight

    def take(self, index: Tensor) -> _Alignment:
        """The same function for the elements at ``index``, which may repeat."""
        return _Alignment(
            self.overlap[index], self.values[index], self.spectrum[index], self.weight
        )

    def evaluate(self, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value up to a constant, slope in the Lie algebra, and stiffness entry by entry."""
        tie = _SpectrumTie(self.values, self.spectrum, o, self.weight)
        frames = adjoint(self.overlap) @ o
        diagonal = frames.diagonal(dim1=-2, dim2=-1)
        stiff = 0.5 * (diagonal[..., :, None] + diagonal[..., None, :]).abs() + tie.weight
        return (
            0.5 * tie.energy - diagonal.sum(-1),
            skew(frames) + tie.momentum,
            stiff.clamp(min=0.1),
        )

    def descend(self, o: Tensor, steps: int) -> tuple[Tensor, Tensor]:
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
        tie = _SpectrumTie(self.values, self.spectrum, o, self.weight)
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
        o, value = self.take(every.repeat(len(chosen))).descend(torch.cat(chosen), ALIGNMENT_STEPS)
        o, value = o.unflatten(0, (-1, count)), value.unflatten(0, (-1, count))
        order = value.argsort(0)
        return list(o[order, every])

    def _candidates(self) -> list[Tensor]:
        """Rotations that match the frames; signed permutations that match the spectra's axes."""
        overlap, values, spectrum = self.overlap, self.values, self.spectrum
        r = values.shape[-1]
        left, _, right = torch.linalg.svd(overlap)
        flip = torch.ones(r, dtype=values.dtype, device=values.device)
        flip[-1] = -1
        found = [left @ right, left * flip @ right]
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
            for signs in itertools.product((1.0, -1.0), repeat=r):
                diagonal = torch.tensor(signs, dtype=values.dtype, device=values.device)
                found += [axes * diagonal, axes @ matched * diagonal]
        return found


# --- aligned -------------------------------------------------------------------------------------


@torch.no_grad()
def aligned_rotation(x: Triple, y: Triple, weight: float, *, start: Tensor | None = None) -> Tensor:
    """The rotation O of least |U_x - U_y O|² + |V_x - V_y O|² + λ d²(R_x, OᵀR_y O).

    Args:
        x: Triple of full rank with one batch dimension, float64.
        y: Triple of full rank, same shapes.
        weight: λ.
        start: Rotations ``(k, r, r)`` close to the answer, if such are known.

    Returns:
        O, ``(k, r, r)``.
    """
    base, goal, swap = _ordered(x, y)
    values, basis = torch.linalg.eigh(base[1])
    overlap = (adjoint(goal[0]) @ base[0] + adjoint(goal[2]) @ base[2]) @ basis
    alignment = _Alignment(overlap, values, goal[1], weight)
    if start is None:
        found = alignment.minima()[0]
    else:
        found, _ = alignment.descend(_oriented(start, swap) @ basis, ALIGNMENT_STEPS)
    rotation = alignment.polish(found) @ adjoint(basis)
    return _oriented(rotation, swap)


def spectrum_log(base: Tensor, target: Tensor) -> Tensor:
    """Affine-invariant logarithm of ``target`` at ``base``, R^½ log(R^-½ T R^-½) R^½."""
    values, basis = torch.linalg.eigh(base)
    tie = _SpectrumTie(values, target, basis, 1.0)
    return basis @ (tie.white_log * tie.scale) @ adjoint(basis)


def aligned_log(x: Triple, y: Triple, weight: float) -> Triple:
    """Projected chords and logarithm of the spectrum, for y in the gauge of x.

    It is -½ times the gradient of the squared distance, and where the gauges minimise that, it is
    horizontal by itself.
    """
    chords = [b - a @ sym(adjoint(a) @ b) for a, b in ((x[0], y[0]), (x[2], y[2]))]
    return horizontal(x, (chords[0], spectrum_log(x[1], y[1]), chords[1]), weight)


def aligned_distance2(x: Triple, y: Triple, weight: float) -> Tensor:
    """|U_x - U_y|² + |V_x - V_y|² + λ d²(R_x, R_y), for y in the gauge of x."""
    values, basis = torch.linalg.eigh(x[1])
    frames = (x[0] - y[0]).square().sum((-2, -1)) + (x[2] - y[2]).square().sum((-2, -1))
    return frames + _SpectrumTie(values, y[1], basis, weight).energy


# --- exact ---------------------------------------------------------------------------------------


def _restricted(
    tie: Callable[[Tensor, Tensor], _SpectrumTie], index: Tensor
) -> Callable[[Tensor, Tensor], _SpectrumTie]:
    return lambda gauge, which: tie(gauge, index[which])


@torch.no_grad()
def exact_log(
    x: Triple, y: Triple, weight: float, *, start: Tensor | None = None, precise: bool = True
) -> tuple[Triple, Tensor, Tensor]:
    """Solve for the geodesic of the quotient from x to the class of y.

    Newton's method on all unknowns at once: the velocities of both frames and the rotation O. It
    starts from low minima over O of the aligned distance; the shortest geodesic wins.

    Args:
        x: Triple of full rank with one batch dimension, float64.
        y: Triple of full rank, same shapes.
        weight: λ.
        start: Rotations ``(k, r, r)`` close to the answer, if such are known.
        precise: With ``False``, stop at about 5 digits.

    Returns:
        The horizontal initial velocity at x, the rotation O that aligns y with x, and a boolean
        ``(k,)`` that says where the equations are solved.
    """
    base, goal, swap = _ordered(x, y)
    values, basis = torch.linalg.eigh(base[1])
    base = act(base, basis)
    (target_u, frame_u, rows_u), (target_v, frame_v, rows_v) = (
        frame_coordinates(base[i], goal[i]) for i in (0, 2)
    )
    if start is None:
        overlap = adjoint(goal[0]) @ base[0] + adjoint(goal[2]) @ base[2]
        starts = _Alignment(overlap, values, goal[1], weight).minima()
    else:
        starts = [_oriented(start, swap) @ basis]

    def tie(gauge: Tensor, which: Tensor) -> _SpectrumTie:
        return _SpectrumTie(values[which], goal[1][which], gauge, weight)

    best: list[Tensor] = []
    every = torch.arange(len(values), device=values.device)
    shortest = torch.full_like(values[:, 0], torch.inf)
    for number, first in enumerate(starts):
        fresh = every
        if number:  # only where it is another start
            fresh = every[(first - starts[0]).abs().amax((-2, -1)) > 1e-2]
        if not len(fresh):
            break
        state, converged = shoot(
            [target_u[fresh], target_v[fresh]],
            rows=[rows_u, rows_v],
            gauge=first[fresh],
            coupling=_restricted(tie, fresh),
            precise=precise,
        )
        length = torch.stack([t.square().sum((-2, -1)) for t in state[:-1]]).sum(0)
        length = torch.where(converged, length + tie(state[-1], fresh).energy, torch.inf)
        better = length < shortest[fresh]
        best = best or state
        for kept, new in zip(best, state, strict=True):
            kept[fresh[better]] = new[better]
        shortest[fresh[better]] = length[better]

    a_u, b_u, a_v, b_v, gauge = best
    spectrum = tie(gauge, every)
    forward = (
        frame_u @ torch.cat((a_u, b_u), -2),
        spectrum.white_log * spectrum.scale,
        frame_v @ torch.cat((a_v, b_v), -2),
    )
    backward = (
        -end_velocity(frame_u, a_u, b_u),
        # The velocity R^½ X exp(X) R^½ at the end of R^½ exp(tX) R^½.
        -sym((spectrum.white_log @ (spectrum.target / spectrum.scale)) * spectrum.scale),
        -end_velocity(frame_v, a_v, b_v),
    )
    forward, backward = act(forward, adjoint(basis)), act(backward, adjoint(gauge))
    velocity = tuple(torch.where(swap, b, f) for f, b in zip(forward, backward, strict=True))
    return velocity, _oriented(gauge @ adjoint(basis), swap), shortest.isfinite()  # type: ignore[return-value]
