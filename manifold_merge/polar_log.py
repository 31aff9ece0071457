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

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.lora_log import ALIGNED, CHORDAL, EXACT
from manifold_merge.polar_alignment import Alignment, SpectrumTie, Triple, act, ordered, oriented
from manifold_merge.stiefel import end_velocity, frame_coordinates, shoot, skew, sym

__all__ = [
    "aligned_distance2",
    "aligned_log",
    "aligned_rotation",
    "chordal_covector",
    "chordal_log",
    "exact_log",
    "full_rank",
    "horizontal",
    "search",
    "vertical",
]


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
    base, goal, swap = ordered(x, y)
    values, basis = torch.linalg.eigh(base[1])
    overlap = (adjoint(goal[0]) @ base[0] + adjoint(goal[2]) @ base[2]) @ basis
    alignment = Alignment(overlap, values, goal[1], weight)
    if start is None:
        found = alignment.minima()[0]
    else:
        found, _ = alignment.descend(oriented(start, swap) @ basis)
    rotation = alignment.polish(found) @ adjoint(basis)
    return oriented(rotation, swap)


def spectrum_log(base: Tensor, target: Tensor) -> Tensor:
    """Affine-invariant logarithm of ``target`` at ``base``, R^½ log(R^-½ T R^-½) R^½."""
    values, basis = torch.linalg.eigh(base)
    tie = SpectrumTie(values, target, basis, 1.0)
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
    return frames + SpectrumTie(values, y[1], basis, weight).energy


# --- exact ---------------------------------------------------------------------------------------


def _restricted(
    tie: Callable[[Tensor, Tensor], SpectrumTie], index: Tensor
) -> Callable[[Tensor, Tensor], SpectrumTie]:
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
    base, goal, swap = ordered(x, y)
    values, basis = torch.linalg.eigh(base[1])
    base = act(base, basis)
    (target_u, frame_u, rows_u), (target_v, frame_v, rows_v) = (
        frame_coordinates(base[i], goal[i]) for i in (0, 2)
    )
    if start is None:
        overlap = adjoint(goal[0]) @ base[0] + adjoint(goal[2]) @ base[2]
        starts = Alignment(overlap, values, goal[1], weight).minima()
    else:
        starts = [oriented(start, swap) @ basis]

    def tie(gauge: Tensor, which: Tensor) -> SpectrumTie:
        return SpectrumTie(values[which], goal[1][which], gauge, weight)

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
    parts = [torch.where(swap, b, f) for f, b in zip(forward, backward, strict=True)]
    for i in (0, 2):  # an endpoint is met up to a residual, and so is the tangent space there
        parts[i] = parts[i] - x[i] @ sym(adjoint(x[i]) @ parts[i])
    velocity = horizontal(x, (parts[0], parts[1], parts[2]), weight)
    return velocity, oriented(gauge @ adjoint(basis), swap), shortest.isfinite()


# --- all three -----------------------------------------------------------------------------------


@torch.no_grad()
def search(
    x: Triple,
    y: Triple,
    weight: float,
    distance: str,
    *,
    start: Tensor | None = None,
    precise: bool = True,
) -> tuple[Triple, Tensor, Triple]:
    """The logarithm by the named construction, or the next one where that is not defined.

    Args:
        x: Triple of any batch shape and precision.
        y: Triple of the same batch shape; its rank may differ if ``distance`` is chordal.
        weight: λ.
        distance: ``"exact"``, ``"aligned"`` or ``"chordal"``.
        start: Rotations ``(..., r, r)`` close to the answer, if such are known.
        precise: With ``False``, exact logarithms have about 5 digits.

    Returns:
        The horizontal vector at x, path codes of the batch shape, and y in the gauge found.
    """
    xi, turned = list(chordal_log(x, y, weight)), [part.clone() for part in y]
    path = torch.full(x[1].shape[:-2], CHORDAL, device=x[1].device)
    full = torch.zeros_like(path, dtype=torch.bool)
    if distance != "chordal":
        full = full_rank(x[1]) & full_rank(y[1])
    if not bool(full.any()):
        return (xi[0], xi[1], xi[2]), path, y
    # Searches need more digits than float32 has if errors are not to add up.
    work = x[1].dtype if x[1].device.type == "mps" else torch.float64
    px, py = (_take(z, full, work) for z in (x, y))
    first = None if start is None else start[full].to(work)
    codes = torch.full_like(path[full], ALIGNED)
    found, gauge = [torch.zeros_like(p) for p in px], torch.zeros_like(px[1])
    missing = torch.ones_like(codes, dtype=torch.bool)
    if distance == "exact":
        velocity, gauge, solved = exact_log(px, py, weight, start=first, precise=precise)
        found = list(velocity)
        missing = ~(solved & torch.stack([t.isfinite().all(-1).all(-1) for t in found]).all(0))
        codes = torch.where(missing, ALIGNED, EXACT)
    if bool(missing.any()):
        sx, sy = (_take(z, missing) for z in (px, py))
        begin = None if first is None else first[missing]
        gauge[missing] = aligned_rotation(sx, sy, weight, start=begin)
        for whole, part in zip(
            found, aligned_log(sx, act(sy, gauge[missing]), weight), strict=True
        ):
            whole[missing] = part
    path[full] = codes
    for whole, part in zip((*xi, *turned), (*found, *act(py, gauge)), strict=True):
        whole[full] = part.to(whole.dtype)
    return (xi[0], xi[1], xi[2]), path, (turned[0], turned[1], turned[2])


def _take(x: Triple, index: Tensor, dtype: torch.dtype | None = None) -> Triple:
    u, spectrum, v = (part[index].to(dtype or part.dtype) for part in x)
    return u, spectrum, v


def full_rank(spectrum: Tensor) -> Tensor:
    """Whether symmetric matrices ``(..., r, r)`` are numerically positive definite."""
    values = torch.linalg.eigvalsh(spectrum)
    cut = 1e2 * spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps
    return (values[..., 0] > cut * values[..., -1]) & (values[..., -1] > 0)
