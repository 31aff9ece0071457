"""Orthonormal frames: geoopt's Stiefel manifold with the logarithm that it lacks.

The metric is the Euclidean one, <ξ, η> = tr ξᵀη. In the frame [X, Q], Q orthonormal to X, a tangent
vector is ξ = X A + Q B with A skew, and its geodesic is

    exp_X(ξ) = [X, Q] exp(Z) [exp(-A); 0],     Z = [[2A, -Bᵀ], [B, 0]]

(Edelman, Arias and Smith 1998; Zimmermann and Hüper 2022, eq. 12 with α = -½). All unknowns of a
logarithm live in this 2r x 2r matrix Z, whatever the number of rows. The injectivity radius is π
(Zimmermann and Stoye, arXiv:2405.02268).

The equation for the logarithm is solved by Newton's method with GMRES and an exact derivative. As
start serves the signed closed form at A = 0, as preconditioner the exact inverse derivative at
A = 0, so that frames at 90 degrees to each other are no special case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import adjoint, in_batches, matrix_exp
from manifold_merge.quotient import squared_distance

__all__ = [
    "Coupling",
    "Stiefel",
    "end_velocity",
    "frame_coordinates",
    "gmres",
    "shoot",
    "skew",
    "sym",
]

MAX_NEWTON_STEPS = 25
KRYLOV_DIMENSION = 40
# Steps turn no frame by more than this angle at once.
MAX_ANGLE = 0.7
# Below this residual an element counts as solved; iterations aim for TARGET.
ACCEPT, TARGET = 1e-9, 2e-13
ROUGH = 1e-5
# Angles from which the preconditioner is frozen: at π its formulas have poles.
MAX_PRECONDITIONER_ANGLE = 2.6

Vector = list[Tensor]


def sym(x: Tensor) -> Tensor:
    """Symmetric part of ``(..., r, r)`` matrices."""
    return 0.5 * (x + adjoint(x))


def skew(x: Tensor) -> Tensor:
    """Skew-symmetric part of ``(..., r, r)`` matrices."""
    return 0.5 * (x - adjoint(x))


class Stiefel(geoopt.EuclideanStiefelExact):
    """Orthonormal r-frames in R^m with the Euclidean metric, logarithm and distance included.

    A point is a matrix ``(..., m, r)`` with orthonormal columns. Everything but ``logmap``,
    ``dist`` and ``projx`` is geoopt's. Distances can be differentiated, logarithms cannot.

    Example:
        >>> import torch
        >>> frames = Stiefel()
        >>> x, y = (torch.eye(3)[:, k : k + 1] for k in (0, 1))
        >>> round(float(frames.dist(x, y)), 4)
        1.5708
    """

    name = "Stiefel(euclidean)"
    __scaling__ = geoopt.EuclideanStiefelExact.__scaling__.copy()

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x`` along the tangent vector ``u``, at time 1, ``(..., m, r)``."""
        x, u = torch.broadcast_tensors(x, u)
        return in_batches(super().expmap, x, u)

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential: a retraction that commutes with rotations of the frame."""
        return self.expmap(x, u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Initial velocity of a geodesic from ``x`` to ``y``; not differentiable.

        Args:
            x: Point, ``(..., m, r)``.
            y: Point, ``(..., m, r)``.

        Returns:
            Tangent vector, ``(..., m, r)``.

        Raises:
            RuntimeError: If no geodesic was found for some element: square frames of opposite
                orientation have none. Move the points closer together.
        """
        x, y = torch.broadcast_tensors(x, y)
        with torch.no_grad():
            shape, m, r = x.shape, x.shape[-2], x.shape[-1]
            wide = [z.reshape(-1, m, r).to(torch.float64) for z in (x, y)]
            target, basis, rows = frame_coordinates(*wide)
            (a, b, _), converged = shoot([target], rows=[rows])
            if not bool(converged.all()):
                raise RuntimeError(
                    f"no geodesic was found for {int((~converged).sum())} of "
                    f"{converged.numel()} pairs of frames: they lie too far apart"
                )
            return (basis @ torch.cat((a, b), -2)).reshape(shape).to(x.dtype)

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of the geodesic that ``logmap`` finds, of the batch shape or ``(..., 1, 1)``."""
        squared = self.dist2(x, y, keepdim=keepdim)
        # The root has no derivative at zero; that of the distance is taken to be zero there.
        positive = squared > 0
        return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)

    @__scaling__(ScalingInfo(2))
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared distance, of the batch shape or ``(..., 1, 1)``."""
        squared = squared_distance(self, x, y)
        return squared[..., None, None] if keepdim else squared

    log_is_searched = True

    def _dist2(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logmap(x, y).square().sum((-2, -1))

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logmap(x, y)  # the metric is that of the surrounding space

    def projx(self, x: Tensor) -> Tensor:
        """Nearest frame; a matrix that is orthonormal to round-off is returned as it is."""
        with torch.no_grad():
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            error = (adjoint(x) @ x - eye).abs().amax((-2, -1))
            valid = (error <= 1e3 * torch.finfo(x.dtype).eps)[..., None, None]
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return torch.where(valid, x, u @ vh)


# --- the equations -------------------------------------------------------------------------------


class Coupling(Protocol):
    """What ties the frames of several factors together when they share one rotation O(r).

    Attributes:
        momentum: Contribution to the momentum of the rotation, ``(..., r, r)``.
        weight: Positive approximation of its derivative, entry by entry, ``(..., r, r)``.
    """

    momentum: Tensor
    weight: Tensor

    def derivative(self, k: Tensor) -> Tensor:
        """Derivative of ``momentum`` along the rotation's velocity ``k``, ``(..., r, r)``."""


def frame_coordinates(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Coordinates of ``y`` in an orthonormal basis [X, Q] of the span of both frames.

    Args:
        x: Frames, ``(..., m, r)``.
        y: Frames, ``(..., m, r)``.

    Returns:
        Coordinates ``(..., 2r, r)``, the basis ``(..., m, 2r)`` and the number of rows of Q that
        exist: with m < 2r the rest is zero.
    """
    m, r = x.shape[-2:]
    inside = adjoint(x) @ y
    rows = min(r, m - r)
    q, _ = torch.linalg.qr(torch.cat((x, y - x @ inside), -1))
    q = torch.nn.functional.pad(q[..., r:], (0, r - rows))
    return torch.cat((inside, adjoint(q) @ y), -2), torch.cat((x, q), -1), rows


def closed_form_start(target: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of coordinates ``(..., 2r, r)`` to first order in A, angles up to π.

    Signed angles matter: measured from the polar factor instead, a frame that is more than 90
    degrees away in some direction would be approached the wrong way round.
    """
    r = target.shape[-1]
    cosine, v = torch.linalg.eigh(sym(target[..., :r, :]))
    angle = torch.acos(cosine.clamp(-1, 1))
    factor = 1 / torch.sinc(angle.clamp(max=3.1) / math.pi)
    b = target[..., r:, :] @ (v * factor[..., None, :]) @ adjoint(v)
    # Where A is not zero the factor may exaggerate; no frame is further away than π.
    length = torch.linalg.matrix_norm(b, 2).clamp(min=math.pi)[..., None, None]
    return skew(target[..., :r, :]), b * (math.pi / length)


def end_velocity(frame: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Velocity at time 1 of the geodesic with coordinates (A, B) in ``frame``, ``(..., m, r)``."""
    return frame @ matrix_exp(_generator(a, b)) @ torch.cat((a, b), -2) @ matrix_exp(-a)


class _Flow:
    """Exponential of a skew-symmetric matrix and its derivative."""

    def __init__(self, x: Tensor) -> None:
        frequency, self.vectors = torch.linalg.eigh(-1j * x)
        difference = frequency[..., :, None] - frequency[..., None, :]
        # (1 - exp(-iω)) / (iω)
        self.kernel = torch.complex(torch.sinc(difference / math.pi), -_versine(difference))
        phase = torch.exp(1j * frequency)[..., None, :]
        self.exponential = ((self.vectors * phase) @ self.vectors.mH).real.contiguous()

    def derivative(self, dx: Tensor) -> Tensor:
        """exp(-X) d exp(X)[dX] = ∫ exp(-sX) dX exp(sX) ds over [0, 1]."""
        rotated = self.vectors.mH @ dx.to(self.vectors.dtype) @ self.vectors
        return (self.vectors @ (rotated * self.kernel) @ self.vectors.mH).real


def _versine(x: Tensor) -> Tensor:
    """(1 - cos x) / x."""
    return 0.5 * x * torch.sinc(0.5 * x / math.pi) ** 2


def _generator(a: Tensor, b: Tensor) -> Tensor:
    top = torch.cat((2 * a, -adjoint(b)), -1)
    return torch.cat((top, torch.cat((b, torch.zeros_like(b)), -1)), -2)


class _Shot:
    """One frame's endpoint for the initial velocity (A, B), seen from the endpoint itself."""

    def __init__(self, a: Tensor, b: Tensor, target: Tensor, rows: int) -> None:
        self.r, self.rows = a.shape[-1], rows
        self.flow, self.spin = _Flow(_generator(a, b)), _Flow(a)
        seen = adjoint(self.flow.exponential) @ target @ self.spin.exponential
        self.residual = [skew(seen[..., : self.r, :]), seen[..., self.r :, :]]
        # At an endpoint that is met it is r; with zero residual it may also be r - 2, r - 4, ...
        self.agreement = seen.diagonal(dim1=-2, dim2=-1).sum(-1)
        # At A = 0, and in the singular frames of B, the derivative couples only the entries (i, j)
        # and (j, i); each such block is inverted by hand.
        self.left, angle, right = torch.linalg.svd(b)
        self.right = adjoint(right)
        cap = MAX_PRECONDITIONER_ANGLE
        plus = (angle[..., :, None] + angle[..., None, :]).clamp(max=cap)
        minus = (angle[..., :, None] - angle[..., None, :]).clamp(-cap, cap)
        self.sinc = torch.sinc(minus / math.pi), torch.sinc(plus / math.pi)
        self.versine = _versine(minus), _versine(plus)
        stretch = sum(s + v * v / s for s, v in zip(self.sinc, self.versine, strict=True))
        self.weight = 1 / (stretch - 1)

    def derivative(self, a: Tensor, b: Tensor) -> Vector:
        """How the endpoint moves with the velocity."""
        moved = self.flow.derivative(_generator(a, b))[..., : self.r]
        return [moved[..., : self.r, :] - self.spin.derivative(a), moved[..., self.r :, :]]

    def rotated(self, k: Tensor) -> Tensor:
        """The rotation's velocity ``k`` as seen from the endpoint."""
        return adjoint(self.spin.exponential) @ k @ self.spin.exponential

    def precondition(self, a: Tensor, b: Tensor) -> Vector:
        """Invert :meth:`derivative` as if A were zero."""
        # Krylov vectors at round-off need not be skew-symmetric; directions have to be.
        a = adjoint(self.right) @ skew(a) @ self.right
        b = adjoint(self.left) @ b @ self.right
        halves = b + adjoint(b), b - adjoint(b)
        known = sum(v * h / s for v, h, s in zip(self.versine, halves, self.sinc, strict=True))
        a = (a - 0.5 * known) * self.weight
        parts = zip(self.versine, halves, self.sinc, strict=True)
        b = self.left @ (0.5 * sum((h + 2 * a * v) / s for v, h, s in parts)) @ adjoint(self.right)
        return [self.right @ a @ adjoint(self.right), self._existing(b)]

    def _existing(self, b: Tensor) -> Tensor:
        if self.rows == self.r:
            return b
        return torch.cat((b[..., : self.rows, :], torch.zeros_like(b[..., self.rows :, :])), -2)

    def average_weight(self) -> Tensor:
        """Stiffness of the frame against rotations, entry by entry in the given gauge."""
        share = self.right.square()
        return share @ self.weight @ adjoint(share)


class _System:
    """Residual and derivative of all equations: endpoints met, momentum of the rotation zero."""

    def __init__(
        self,
        state: Vector,
        targets: Sequence[Tensor],
        rows: Sequence[int],
        coupling: Callable[[Tensor], Coupling] | None,
    ) -> None:
        *velocities, gauge = state
        pairs = list(zip(velocities[::2], velocities[1::2], strict=True))
        self.shots = [
            _Shot(a, b, target @ gauge, n)
            for (a, b), target, n in zip(pairs, targets, rows, strict=True)
        ]
        self.residual = [part for shot in self.shots for part in shot.residual]
        self.coupling = None if coupling is None else coupling(gauge)
        if self.coupling is None:
            self.residual.append(torch.zeros_like(gauge))
        else:
            self.residual.append(-sum(velocities[::2]) - self.coupling.momentum)
            self.stiffness = sum(s.average_weight() for s in self.shots) + self.coupling.weight
        size = _flat(self.precondition(self.residual)).norm(dim=-1)
        self.size = torch.where(size.isfinite(), size, torch.inf)
        self.agrees = torch.stack([s.agreement > s.r - 0.5 for s in self.shots]).all(0)

    def derivative(self, step: Vector) -> Vector:
        *velocities, k = step
        out: Vector = []
        for shot, a, b in zip(self.shots, velocities[::2], velocities[1::2], strict=True):
            da, db = shot.derivative(a, b)
            out += [da if self.coupling is None else da - shot.rotated(k), db]
        if self.coupling is None:
            return [*out, k]
        return [*out, sum(velocities[::2]) + self.coupling.derivative(k)]

    def precondition(self, rhs: Vector) -> Vector:
        *parts, momentum = rhs
        pairs = list(zip(self.shots, parts[::2], parts[1::2], strict=True))
        if self.coupling is None:
            k = momentum
        else:
            known = sum(shot.precondition(a, b)[0] for shot, a, b in pairs)
            k = skew(momentum - known) / self.stiffness
        return [t for shot, a, b in pairs for t in shot.precondition(a + k, b)] + [k]


@torch.no_grad()
def shoot(
    targets: Sequence[Tensor],
    *,
    rows: Sequence[int],
    gauge: Tensor | None = None,
    coupling: Callable[[Tensor, Tensor], Coupling] | None = None,
    precise: bool = True,
) -> tuple[Vector, Tensor]:
    """Find initial velocities of geodesics that reach the target frames, up to a common rotation.

    Args:
        targets: Coordinates of frames, each ``(k, 2r, r)`` (:func:`frame_coordinates`), float64.
        rows: Number of existing rows of Q for each target.
        gauge: Rotation of the targets to start from, ``(k, r, r)``.
        coupling: Function of the rotation and of the indices of the elements still at work. Without
            it the rotation stays as it is.
        precise: With ``False``, stop at about 5 digits.

    Returns:
        [A_1, B_1, A_2, B_2, ..., O], the velocities in coordinates, ``(k, r, r)`` each, and the
        rotation; and a boolean ``(k,)`` that says where the equations are solved.
    """
    if gauge is None:
        r = targets[0].shape[-1]
        gauge = torch.eye(r, dtype=targets[0].dtype, device=targets[0].device)
        gauge = gauge.expand(*targets[0].shape[:-2], r, r)
    state = [t for target in targets for t in closed_form_start(target @ gauge)] + [gauge.clone()]
    best = [t.clone() for t in state]
    error = torch.full(gauge.shape[:-2], torch.inf, dtype=gauge.dtype, device=gauge.device)
    active = torch.arange(len(gauge), device=gauge.device)
    past: list[Tensor] = []
    accept, goal = (ACCEPT, TARGET * math.sqrt(gauge.shape[-1])) if precise else (ROUGH, ROUGH)

    def build(state: Vector, which: Tensor) -> _System:
        tie = None if coupling is None else lambda rotation: coupling(rotation, which)
        return _System(state, [t[which] for t in targets], rows, tie)

    system = build(state, active)
    for _ in range(MAX_NEWTON_STEPS):
        better = system.size < error[active]
        for kept, new in zip(best, state, strict=True):
            kept[active[better]] = new[better]
        error[active] = torch.minimum(error[active], system.size)
        past.append(error.clone())
        going = system.size > goal
        if len(past) > 5:  # give up where five steps have not brought one digit
            going &= error[active] < 0.1 * past[-6][active]
        if len(past) > 2:  # near round-off two steps without progress are the end
            going &= (error[active] > accept * 1e-2) | (error[active] < 0.5 * past[-3][active])
        if not bool(going.any()):
            break
        if not bool(going.all()):
            active, state = active[going], [t[going] for t in state]
            system = build(state, active)
        state, system = _newton_step(state, system, functools.partial(build, which=active))
    agrees = build(best, torch.arange(len(gauge), device=gauge.device)).agrees
    return best, agrees & (error <= accept)


def _newton_step(
    state: Vector, system: _System, build: Callable[[Vector], _System]
) -> tuple[Vector, _System]:
    tolerance = float(system.size.max().clamp(1e-6, 1e-2))
    step = gmres(system.derivative, system.precondition, system.residual, tolerance)
    turns = [_generator(a, b) for a, b in zip(step[:-1:2], step[1:-1:2], strict=True)]
    angle = torch.stack([torch.linalg.matrix_norm(t, 2) for t in (*turns, step[-1])]).amax(0)
    length = MAX_ANGLE / angle.clamp(min=MAX_ANGLE)
    for _ in range(6):
        scaled = [length[:, None, None] * t for t in step]
        new = [z + t for z, t in zip(state[:-1], scaled[:-1], strict=True)]
        new.append(state[-1] @ matrix_exp(scaled[-1]))
        trial = build(new)
        good = (trial.size <= (1 - 1e-4 * length) * system.size) | (trial.size < ACCEPT)
        if bool(good.all()):
            break
        length = torch.where(good, length, 0.5 * length)
    return new, trial


def _flat(vector: Vector) -> Tensor:
    return torch.cat([t.flatten(-2) for t in vector], -1)


def gmres(
    derivative: Callable[[Vector], Vector],
    precondition: Callable[[Vector], Vector],
    rhs: Vector,
    tolerance: float,
) -> Vector:
    """Solve linear equations of a batch with right-preconditioned GMRES (Saad and Schultz 1986)."""

    def unflat(v: Tensor) -> Vector:
        sizes = [t.shape[-2] * t.shape[-1] for t in rhs]
        return [part.reshape(t.shape) for part, t in zip(v.split(sizes, -1), rhs, strict=True)]

    b = torch.nan_to_num(_flat(rhs))
    tiny = torch.finfo(b.dtype).tiny
    norm = b.norm(dim=-1)
    basis, directions = [b / norm.clamp(min=tiny)[:, None]], []
    hessenberg = b.new_zeros(len(b), KRYLOV_DIMENSION + 1, KRYLOV_DIMENSION)
    for j in range(min(KRYLOV_DIMENSION, b.shape[-1])):
        direction = precondition(unflat(basis[j]))
        directions.append(_flat(direction))
        w = torch.nan_to_num(_flat(derivative(direction)))
        stacked, before = torch.stack(basis, -1), w.norm(dim=-1)
        for _ in range(2):  # orthogonalise twice: once is not enough
            along = adjoint(stacked) @ w[..., None]
            w = w - (stacked @ along)[..., 0]
            hessenberg[:, : j + 1, j] += along[..., 0]
        # What is left at round-off is no new direction.
        length = w.norm(dim=-1)
        length = torch.where(length > 1e-13 * before, length, 0)
        hessenberg[:, j + 1, j] = length
        basis.append(torch.where(length > 0, 1 / length.clamp(min=tiny), 0)[:, None] * w)
        if j % 5 != 4 and j + 1 < min(KRYLOV_DIMENSION, b.shape[-1]):
            continue
        square = hessenberg[:, : j + 2, : j + 1]
        first = torch.nn.functional.pad(norm[:, None, None], (0, 0, 0, j + 1))
        weights = torch.linalg.pinv(square, rtol=1e-13) @ first
        if bool(((first - square @ weights)[..., 0].norm(dim=-1) <= tolerance * norm).all()):
            break
    return unflat((torch.stack(directions, -1) @ weights)[..., 0])
