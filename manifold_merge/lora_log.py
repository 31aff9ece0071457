"""Logarithms and distances between classes of factor pairs, exact and approximated.

All functions take pairs (B, A) with B ``(..., m, r)`` and A ``(..., n, r)``, W = B Aᵀ, and a metric
of :mod:`manifold_merge.lora_metrics`. Three named constructions of the tangent vector at x that
points to y:

* **chordal**: the horizontal lift of P_T(W_y - W_x), always defined;
* **aligned**: the representative of y whose difference from x is horizontal, in closed form; it is
  defined unless a certain r x r matrix has an eigenvalue on the closed negative real axis;
* **exact**: the initial velocity of the geodesic, by shooting.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from manifold_merge.linalg import _traced, adjoint, hermitian_pinv, principal_sqrt
from manifold_merge.lora_metrics import METRICS, LoRAMetric, Pair

__all__ = [
    "ALIGNED",
    "CHORDAL",
    "EXACT",
    "aligned_representative",
    "balance",
    "chordal_covector",
    "chordal_distance",
    "chordal_log",
    "exact_log",
    "exact_log_between",
    "full_rank",
    "substitute_covector",
    "substitute_dist2",
]

EXACT, ALIGNED, CHORDAL = 0, 1, 2

MAX_SHOTS = 80
ANDERSON_WINDOW = 12
# A step that changes a factor by more than this fraction is shortened; see LoRAMetric.speed.
MAX_SPEED = 0.7
# Above this relative endpoint error, steps are taken plainly; below it they are accelerated.
ACCELERATE_BELOW = 0.3
# Below this endpoint error a coarse integration has told all that it can.
COARSE_ERROR = 1e-5
# An element whose endpoint has not come closer in so many shots is given up.
PATIENCE = 6


def product(x: Pair) -> Tensor:
    """W = B Aᵀ, ``(..., m, n)``."""
    return x[0] @ adjoint(x[1])


def norm(x: Tensor) -> Tensor:
    """Frobenius norm over the last two dimensions, of the batch shape."""
    return x.square().sum((-2, -1)).sqrt()


def balance(x: Pair) -> tuple[Pair, Tensor, Tensor]:
    """Change the gauge of x so that both Gram matrices equal the singular values of W.

    Args:
        x: Factors ``(..., m, r)`` and ``(..., n, r)``.

    Returns:
        The balanced pair (U S^½, V S^½), and the r x r matrices (T_B, T_A) that take tangent
        vectors back to the gauge of x: u_B = û_B T_B, u_A = û_A T_A. Directions in which W has no
        rank are mapped to zero.
    """
    (frame_b, upper_b), (frame_a, upper_a) = (torch.linalg.qr(y) for y in x)
    u, s, vh = torch.linalg.svd(upper_b @ adjoint(upper_a), full_matrices=False)
    root = s.sqrt()
    cut = torch.finfo(s.dtype).eps * s.shape[-1] * s[..., :1]
    inverse = torch.where(s > cut, 1 / root.clamp(min=torch.finfo(s.dtype).tiny), 0)[..., None]
    v = adjoint(vh)
    balanced = (frame_b @ (u * root[..., None, :]), frame_a @ (v * root[..., None, :]))
    return balanced, inverse * (adjoint(u) @ upper_b), inverse * (vh @ upper_a)


def chordal_covector(x: Pair, y: Pair) -> Pair:
    """(Z A, ZᵀB) for Z = W_y - W_x: the Euclidean derivative of -½|W_x - W_y|² at x."""
    (b, a), (by, ay) = x, y
    return (
        by @ (adjoint(ay) @ a) - b @ (adjoint(a) @ a),
        ay @ (adjoint(by) @ b) - a @ (adjoint(b) @ b),
    )


def chordal_log(metric: LoRAMetric, x: Pair, y: Pair) -> Pair:
    """Horizontal lift at x of the tangent projection of W_y - W_x."""
    lift = METRICS["embedded"].gradient(x, chordal_covector(x, y))
    # Mixed and embedded have one horizontal space; the gradient lies in it.
    return metric.horizontal(x, lift) if metric.name == "invariant" else lift


def chordal_distance(x: Pair, y: Pair) -> Tensor:
    """|W_x - W_y|_F of the batch shape, without cancellation and without forming W."""
    r = x[0].shape[-1]
    upper_b, upper_a = (
        torch.linalg.qr(torch.cat(pair, -1), mode="r")[1] for pair in zip(x, y, strict=True)
    )
    sign = torch.ones(r + y[0].shape[-1], dtype=upper_b.dtype, device=upper_b.device)
    sign[r:] = -1
    return norm((upper_b * sign) @ adjoint(upper_a))


def substitute_dist2(metric: LoRAMetric, x: Pair, y: Pair) -> Tensor:
    """Squared distance where no geodesic is known, of the batch shape: a function of the chord.

    |W_x - W_y|² in the metrics that grow with W. The invariant metric does not, nor does its
    substitute r |W_x - W_y|² / (|W_x|² + |W_y|²): it agrees with the metric for multiples of one
    matrix, to second order in their ratio, and is at most 2r.
    """
    # Products of Gram matrices have the derivatives, and cancel where W_x and W_y are close.
    grams = _squared_size(x) + _squared_size(y) - 2 * _inner(x, y)
    with torch.no_grad():
        exact = chordal_distance(x, y) ** 2 - grams
    chord = grams + exact
    if metric.name != "invariant":
        return chord
    size = _squared_size(x) + _squared_size(y)
    return x[0].shape[-1] * chord / torch.where(size > 0, size, 1.0)


def substitute_covector(metric: LoRAMetric, x: Pair, y: Pair) -> Pair:
    """Euclidean derivative at x of -½ :func:`substitute_dist2`."""
    chord = chordal_covector(x, y)
    if metric.name != "invariant":
        return chord
    size = _squared_size(x) + _squared_size(y)
    size = torch.where(size > 0, size, 1.0)[..., None, None]
    share = chordal_distance(x, y)[..., None, None] ** 2 / size
    (b, a), factor = x, x[0].shape[-1] / size
    return (
        factor * (chord[0] + share * b @ (adjoint(a) @ a)),
        factor * (chord[1] + share * a @ (adjoint(b) @ b)),
    )


def _inner(x: Pair, y: Pair) -> Tensor:
    """<W_x, W_y> of the batch shape."""
    return ((adjoint(x[0]) @ y[0]) * (adjoint(x[1]) @ y[1])).sum((-2, -1))


def _squared_size(x: Pair) -> Tensor:
    """|W|² of the batch shape."""
    return _inner(x, x)


def aligned_representative(metric: LoRAMetric, x: Pair, y: Pair) -> tuple[Pair, Tensor]:
    """The representative of y whose difference from x is horizontal, in closed form.

    Writing it (B_y G, A_y G⁻ᵀ), the horizontality condition is a quadratic equation for G. For the
    mixed metric it is G (B⁺B_y) G = A_yᵀA P⁻¹; for the invariant metric, with H = Gᵀ,
    H (B_yᵀB P) H = Q AᵀA_y. Either has the solution X⁻¹(X Y)^½.

    Returns:
        The representative, and a boolean of the batch shape: false where no principal square root
        exists, and there the representative is y itself.
    """
    with torch.no_grad():
        aligned, good = _horizontal_difference(metric, x, y)
    if any(z.requires_grad for z in (*x, *y)) or _traced(x[0]):
        # What is not finite would enter derivatives even where it is not selected.
        aligned, _ = _horizontal_difference(metric, _safe(good, x), _safe(good, y))
    keep = good[..., None, None]
    return (torch.where(keep, aligned[0], y[0]), torch.where(keep, aligned[1], y[1])), good


def _safe(good: Tensor, x: Pair) -> Pair:
    """x, with partial identities in place of the elements that are not good."""
    eyes = (torch.eye(*z.shape[-2:], dtype=z.dtype, device=z.device) for z in x)
    b, a = (torch.where(good[..., None, None], z, eye) for z, eye in zip(x, eyes, strict=True))
    return b, a


def _horizontal_difference(metric: LoRAMetric, x: Pair, y: Pair) -> tuple[Pair, Tensor]:
    # The result does not depend on the gauges, its rounding does: work in balanced ones. As
    # constants they take no part in derivatives, which they do not change either.
    (to_b, to_a), (back_b, back_a) = _balancing_gauge(x)
    (by_gauge, ay_gauge), _ = _balancing_gauge(y)
    b, a = x[0] @ to_b, x[1] @ to_a
    by, ay = y[0] @ by_gauge, y[1] @ ay_gauge
    p, q = adjoint(a) @ a, adjoint(b) @ b
    if metric.name == "invariant":
        left, right = adjoint(by) @ b @ p, q @ (adjoint(a) @ ay)
    else:
        left, right = hermitian_pinv(q) @ (adjoint(b) @ by), adjoint(ay) @ a @ hermitian_pinv(p)
    root, good = principal_sqrt(left @ right)
    gauge = torch.linalg.solve_ex(left, root)[0]
    if metric.name == "invariant":
        gauge = adjoint(gauge)
    inverse = torch.linalg.inv_ex(gauge)[0]
    aligned = (by @ gauge @ back_b, ay @ adjoint(inverse) @ back_a)
    good = good & aligned[0].isfinite().all(-1).all(-1) & aligned[1].isfinite().all(-1).all(-1)
    return aligned, good


@torch.no_grad()
def _balancing_gauge(x: Pair) -> tuple[Pair, Pair]:
    """(G, G⁻ᵀ) that balances x, and its inverse (G⁻¹, Gᵀ)."""
    _, inverse, adjoint_gauge = balance(x)
    return (adjoint(adjoint_gauge), adjoint(inverse)), (inverse, adjoint_gauge)


def exact_log(
    metric: LoRAMetric,
    x: Pair,
    y: Pair,
    *,
    tolerance: float,
    guess: Pair | None = None,
    precise: bool = True,
) -> tuple[Pair, Tensor]:
    """Solve exp_x(v) = y for horizontal v by shooting with Anderson acceleration.

    The iteration v ← v + residual uses that the chordal logarithm inverts the exponential to
    second order; acceleration (Walker and Ni 2011) makes it behave like a Newton-Krylov method at
    the cost of one exponential per iteration.

    Args:
        metric: The metric.
        x: Balanced factors of full rank, one batch dimension: ``(k, m, r)``, ``(k, n, r)``.
        y: Factors, same shapes.
        tolerance: Relative error of the endpoint at which an element has converged.
        guess: Tangent vectors to start from, shaped as x; the chordal logarithm if ``None``.
        precise: With ``False``, stop at what a coarse integration can tell, about 5 digits.

    Returns:
        The tangent vectors and a boolean ``(k,)`` that says where the iteration converged.
    """
    # A vertical part would never be corrected: it moves no endpoint, and makes the vector too long.
    v = chordal_log(metric, x, y) if guess is None else metric.horizontal(x, guess)
    error = torch.full_like(x[0][:, 0, 0], torch.inf)
    if metric.is_integrated:
        # Most shots are far off and a coarse integration serves them. Each pass treats each
        # element as if it were alone, so that a batch changes no answer.
        v, error = _shoot(metric, x, y, v, goal=COARSE_ERROR, fine=False)
    near = (error <= COARSE_ERROR).nonzero()[:, 0] if metric.is_integrated else None
    if precise or near is None:
        rows = torch.arange(len(error), device=error.device) if near is None else near
        start = _take(v, rows)
        goal = tolerance if precise else COARSE_ERROR
        fine, fine_error = _shoot(metric, _take(x, rows), _take(y, rows), start, goal=goal)
        v = (v[0].index_put((rows,), fine[0]), v[1].index_put((rows,), fine[1]))
        error = torch.full_like(error, torch.inf).index_put((rows,), fine_error)
    # The last digit costs many shots and is worth nothing; a solution to 1e3 tolerances is one.
    return v, error <= (1e3 * tolerance if precise else COARSE_ERROR)


def _shoot(
    metric: LoRAMetric, x: Pair, y: Pair, start: Pair, *, goal: float, fine: bool = True
) -> tuple[Pair, Tensor]:
    """The vectors of the least relative endpoint errors met on the way to ``goal``, and these."""
    target = product(y)
    scale = norm(target).clamp(min=torch.finfo(target.dtype).tiny)
    v = _shorten(metric, x, start)
    best = (v[0].clone(), v[1].clone())
    best_error = torch.full_like(scale, torch.inf)
    active = torch.arange(len(scale), device=scale.device)
    stale = torch.zeros_like(active)
    # More differences than dimensions would make the secant equations singular.
    r = x[0].shape[-1]
    window = max(1, min(ANDERSON_WINDOW, r * (x[0].shape[-2] + x[1].shape[-2] - r)))
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(MAX_SHOTS if len(active) else 0):
        here, there = _take(x, active), _take(y, active)
        # No minimising geodesic is that fast, and integrating it would cost the most of all.
        over = (metric.speed(here, v) / metric.speed_limit).clamp(min=1.0)[..., None, None]
        v = (v[0] / over, v[1] / over)
        endpoint = metric.exponential(here, v, fine=fine)
        error = norm(product(endpoint) - target[active]) / scale[active]
        error = torch.where(error.isfinite(), error, torch.inf)
        better = error < best_error[active]
        stale = torch.where(error < 0.9 * best_error[active], 0, stale + 1)
        best[0][active], best[1][active] = _where(better, v, _take(best, active))
        best_error[active] = torch.minimum(error, best_error[active])
        residual = metric.shooting_residual(here, v, endpoint, there, chordal_log)
        residual = _shorten(metric, here, residual)
        broken = ~(error.isfinite() & residual[0].isfinite().all(-1).all(-1))
        # An element that left the domain restarts from half its vector.
        residual = _where(broken, (-0.5 * v[0], -0.5 * v[1]), residual)
        history = [*history[-window:], (_flatten(v), _flatten(residual))]
        accelerated = _anderson(history, here)
        plain = (v[0] + residual[0], v[1] + residual[1])
        v = _where((error < ACCELERATE_BELOW) & ~broken, accelerated, plain)

        going = (error > goal) & (stale < PATIENCE)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            active, stale, v = active[going], stale[going], _take(v, going)
            history = [(a[going], b[going]) for a, b in history]
    return best, best_error


def exact_log_between(
    metric: LoRAMetric,
    x: Pair,
    y: Pair,
    *,
    guess: Pair | None = None,
    precise: bool = True,
) -> tuple[Pair, Tensor]:
    """The exact logarithm in any gauge and size, where it is found.

    Both points are expressed in the frame of at most 2r directions that holds them, and x is
    balanced, so that shooting sees well-scaled numbers whatever the gauge.

    Args:
        metric: The metric.
        x: Factors ``(k, m, r)``, ``(k, n, r)``.
        y: Factors, same shapes.
        guess: Tangent vectors at x to start from.
        precise: See :func:`exact_log`.

    Returns:
        Tangent vectors, zero where none was found, and a boolean ``(k,)`` that says where one was.
    """
    result = (torch.zeros_like(x[0]), torch.zeros_like(x[1]))
    found = full_rank(x) & full_rank(y)
    rows = found.nonzero()[:, 0]
    if not len(rows):
        return result, found
    x, y = _take(x, rows), _take(y, rows)
    frames = [_joint_frame(p, q) for p, q in zip(x, y, strict=True)]
    small_x, small_y = ((adjoint(frames[0]) @ z[0], adjoint(frames[1]) @ z[1]) for z in (x, y))
    balanced, *back = balance(small_x)
    start = None
    if guess is not None:  # into the frames, and from the gauge of x to the balanced one
        pair = _take(guess, rows)
        start = (
            torch.linalg.solve(back[0], adjoint(frames[0]) @ pair[0], left=False),
            torch.linalg.solve(back[1], adjoint(frames[1]) @ pair[1], left=False),
        )
    tolerance = 10 * x[0].shape[-1] * torch.finfo(x[0].dtype).eps
    # Size separates exactly from direction, so that shooting only has to find the direction.
    ratio = norm(product(small_y)) / norm(product(small_x))
    if start is not None:
        start = metric.at_equal_size(balanced, start, ratio)
    root = ratio.sqrt()[..., None, None]
    equal = tuple(part / root for part in balance(small_y)[0])
    v, converged = exact_log(
        metric, balanced, (equal[0], equal[1]), tolerance=tolerance, guess=start, precise=precise
    )
    v = metric.at_size(balanced, v, ratio)
    exact = (frames[0] @ v[0] @ back[0], frames[1] @ v[1] @ back[1])
    for part in exact:
        converged = converged & part.isfinite().all(-1).all(-1)
    found[rows] = converged
    for whole, part in zip(result, exact, strict=True):
        whole[rows[converged]] = part[converged]
    return result, found


def full_rank(x: Pair) -> Tensor:
    """Whether the product has full numerical rank, of the batch shape."""
    with torch.no_grad():
        upper = [torch.linalg.qr(y, mode="r")[1] for y in x]
        s = torch.linalg.svdvals(upper[0] @ adjoint(upper[1]))
        cut = 1e-3 * torch.finfo(s.dtype).eps ** 0.5
        return s[..., -1] > cut * s[..., 0].clamp(min=torch.finfo(s.dtype).tiny)


def _joint_frame(p: Tensor, q: Tensor) -> Tensor:
    """Orthonormal frame whose span contains both factors, ``(k, m, min(m, 2 r))``."""
    if p.shape[-2] <= 2 * p.shape[-1]:
        eye = torch.eye(p.shape[-2], dtype=p.dtype, device=p.device)
        return eye.expand(*p.shape[:-2], -1, -1)
    return torch.linalg.qr(torch.cat((p, q), -1))[0]


def _take(u: Pair, index: Tensor) -> Pair:
    return u[0][index], u[1][index]


def _anderson(history: list[tuple[Tensor, Tensor]], x: Pair) -> Pair:
    v, residual = history[-1]
    combined = v + residual
    if len(history) > 1:
        dv = torch.stack([b[0] - a[0] for a, b in itertools.pairwise(history)], -1)
        de = torch.stack([b[1] - a[1] for a, b in itertools.pairwise(history)], -1)
        dv, de = torch.nan_to_num(dv), torch.nan_to_num(de)
        gamma = torch.linalg.pinv(de, rtol=1e-10) @ torch.nan_to_num(residual)[..., None]
        combined = combined - ((dv + de) @ gamma)[..., 0]
    size = x[0].shape[-2] * x[0].shape[-1]
    return combined[..., :size].reshape(x[0].shape), combined[..., size:].reshape(x[1].shape)


def _flatten(u: Pair) -> Tensor:
    return torch.cat((u[0].flatten(-2), u[1].flatten(-2)), -1)


def _shorten(metric: LoRAMetric, x: Pair, u: Pair) -> Pair:
    factor = (MAX_SPEED / metric.speed(x, u).clamp(min=MAX_SPEED))[..., None, None]
    return u[0] * factor, u[1] * factor


def _where(condition: Tensor, u: Pair, v: Pair) -> Pair:
    condition = condition[..., None, None]
    return torch.where(condition, u[0], v[0]), torch.where(condition, u[1], v[1])
