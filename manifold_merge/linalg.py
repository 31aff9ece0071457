"""Small batched matrix functions that the geometries share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor

__all__ = [
    "adjoint",
    "all_finite",
    "broadcast_shapes",
    "hermitian_pinv",
    "in_batches",
    "integrate",
    "matrix_exp",
    "principal_sqrt",
    "refuse_class",
    "stack_points",
    "symmetric_sylvester",
]

_STAGES = DOP853.n_stages
_NODES = [[float(a) for a in row[:i]] for i, row in enumerate(DOP853.A[:_STAGES])]
_WEIGHTS = [float(b) for b in DOP853.B]


def adjoint(x: Tensor) -> Tensor:
    """Transpose of the last two dimensions, ``(..., n, m)`` from ``(..., m, n)``."""
    return x.transpose(-1, -2)


def hermitian_pinv(x: Tensor) -> Tensor:
    """Pseudo-inverse of symmetric positive semi-definite matrices ``(..., r, r)``.

    Singular matrices are the normal case for a freshly initialised adapter (B = 0), for which the
    pseudo-inverse gives the gradient of least norm.
    """
    return torch.linalg.pinv(x, hermitian=True)


def symmetric_sylvester(s: Tensor, h: Tensor) -> Tensor:
    """Solve ``N S + S N = H`` for N, with S symmetric positive semi-definite.

    Args:
        s: Symmetric matrices, ``(..., r, r)``.
        h: Right-hand sides, ``(..., r, r)``.

    Returns:
        The solutions, ``(..., r, r)``; least-norm where S is singular.
    """
    values, vectors = torch.linalg.eigh(s.detach())
    sums = values[..., :, None] + values[..., None, :]
    cut = torch.finfo(s.dtype).eps * s.shape[-1] * sums.amax((-2, -1), keepdim=True)
    inverse = torch.where(sums > cut, 1 / sums.clamp(min=torch.finfo(s.dtype).tiny), 0)

    def solve(rhs: Tensor) -> Tensor:
        rotated = adjoint(vectors) @ rhs @ vectors
        return vectors @ (rotated * inverse) @ adjoint(vectors)

    if not s.requires_grad:
        return solve(h)
    # Eigenvectors have no derivative at repeated eigenvalues, but the solution has one:
    # dN S + S dN = dH - N dS - dS N. The difference below is zero and carries just that term.
    fixed = solve(h.detach())
    change = s - s.detach()
    return solve(h - fixed @ change - change @ fixed)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass without a temporary tensor.

    NaN and infinity survive a sum; a sum that overflows by itself is told apart by the slow test.
    """
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return bool(total.isfinite()) or bool(x.isfinite().all())


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape to which the given ones broadcast.

    As ``torch.broadcast_shapes``, whose first call imports a computer algebra system (0.4 seconds).
    """
    if torch.compiler.is_compiling():
        return torch.Size(torch.broadcast_shapes(*shapes))
    return torch.Size(np.broadcast_shapes(*map(tuple, shapes)))


def stack_points(points: Sequence[Tensor]) -> Tensor:
    """Points of one shape, ``(k, ..., *point)``.

    Raises:
        ValueError: If their shapes differ; the message lists them.
    """
    shapes = {tuple(x.shape) for x in points}
    if len(shapes) > 1:
        raise ValueError(f"points: one shape is expected, of a start too; got {sorted(shapes)}")
    return torch.stack(list(points))


def principal_sqrt(x: Tensor, *, iterations: int = 40) -> tuple[Tensor, Tensor]:
    """Principal square root of general matrices, where it exists.

    Scaled product form of the Denman-Beavers iteration (Higham, *Functions of Matrices*, 2008,
    eq. 6.29). It converges quadratically unless an eigenvalue lies on the closed negative real
    axis, in which case no principal square root exists and the iteration does not settle.

    Args:
        x: Square matrices, ``(..., r, r)``.
        iterations: Greatest number of iterations.

    Returns:
        The roots ``(..., r, r)`` and a boolean of the batch shape that says where they are valid;
        the root is the identity elsewhere.
    """
    r = x.shape[-1]
    eye = torch.eye(r, dtype=x.dtype, device=x.device).expand_as(x)
    # Determinants of tiny or huge matrices leave the range of float32.
    size = x.detach().abs().amax((-2, -1), keepdim=True)
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    x = x / size
    product, root = x, x
    for step in range(iterations):
        inverse, _ = torch.linalg.inv_ex(product)
        # Determinantal scaling speeds up the first steps; near convergence it must switch off.
        if step < 8:
            scale = torch.linalg.det(product).abs() ** (-1 / (2 * r))
            scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)[..., None, None]
        else:
            scale = torch.ones_like(product[..., :1, :1])
        square = scale.detach() ** 2
        root = 0.5 * scale.detach() * root @ (eye + inverse / square)
        product = 0.5 * (eye + 0.5 * (square * product + inverse / square))
        error = (product - eye).abs().amax((-2, -1))
        if not _traced(x) and step >= 3 and bool((error < 1e-15 * r).all()):
            break
    residual = (root @ root - x).abs().amax((-2, -1))
    good = residual <= 1e3 * torch.finfo(x.dtype).eps ** 0.75 * x.abs().amax((-2, -1))
    return torch.where(good[..., None, None], size.sqrt() * root, eye), good


def integrate(
    acceleration: Callable[[Tensor, Tensor], Tensor],
    position: Tensor,
    velocity: Tensor,
    *,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Integrate ``q'' = f(q, q')`` from time 0 to 1 with the order-8 Dormand-Prince method.

    Args:
        acceleration: ``f(position, velocity)``, shaped as the position.
        position: Initial position, any shape.
        velocity: Initial velocity, shaped as the position.
        steps: Number of steps of equal length (Hairer, Norsett and Wanner 1993, section II.5).

    Returns:
        Position and velocity at time 1.
    """
    state = torch.stack((position, velocity))
    h = 1.0 / steps
    for _ in range(steps):
        slopes: list[Tensor] = []
        for row in _NODES:
            point = _combine(state, slopes, row, h)
            slopes.append(torch.stack((point[1], acceleration(point[0], point[1]))))
        state = _combine(state, slopes, _WEIGHTS, h)
    return state[0], state[1]


def _combine(state: Tensor, slopes: list[Tensor], weights: list[float], h: float) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            state = torch.add(state, slope, alpha=h * weight)
    return state


def in_batches(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Call a function of matrices with a batch of at least two.

    ``torch.matrix_exp`` of one single matrix is wrong by up to 1e-10 in float64 and 1e-5 in float32
    (pytorch issue 196592); for two matrices it takes another way, which is right.
    """
    if matrices[0].ndim > 2 and matrices[0].shape[:-2].numel() != 1:
        return function(*matrices)
    return function(*(m.expand(2, *m.shape) for m in matrices))[0]


def matrix_exp(x: Tensor) -> Tensor:
    """Matrix exponential of ``(..., r, r)`` matrices."""
    return in_batches(torch.linalg.matrix_exp, x)


def _traced(x: Tensor) -> bool:
    """Whether values of ``x`` are opaque: in a functorch transform or a compiled region."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)


def refuse_class(manifold: object) -> None:
    """Raise ``ValueError`` if the class of a manifold was given in the place of an instance."""
    if isinstance(manifold, type):
        raise ValueError(
            f"manifold: expected an instance, got the class {manifold.__name__}; pass "
            f"{manifold.__name__}(...)"
        )
