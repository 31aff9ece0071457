"""Laws about orders of convergence: retractions, geodesics, logarithms, gradients, Hessians.

That two numbers are close says little: a wrong factor in a second derivative is invisible next to
a first-order term. The *order* at which an error vanishes with the step shows it. Sources: Boumal,
*An Introduction to Optimization on Smooth Manifolds* (2023), sections 4.8 and 6.8; the numerical
checks of ManifoldsBase.jl and Manopt.jl. Users import :mod:`manifold_merge.checks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_merge.checks_frame import NotApplicable, Sample, register_law, size
from manifold_merge.checks_report import Measurement, claim

__all__ = ["LogLogSlope", "log_log_slope"]

# Coefficients of the seven-point central difference: f(-3h) ... f(3h), divided by h.
_STENCIL = {-3: -1 / 60, -2: 3 / 20, -1: -3 / 4, 1: 3 / 4, 2: -3 / 20, 3: 1 / 60}


@dataclass(frozen=True)
class LogLogSlope:
    """The order at which errors vanish with the step.

    Attributes:
        slope: Slope of log error over log step; infinite where all errors are round-off, NaN where
            an error is not finite.
        start: Smallest step of the fitted window.
        stop: Largest step of the fitted window.
        residual: Root mean square residual of the fit, in decades.
    """

    slope: float
    start: float
    stop: float
    residual: float


def log_log_slope(
    steps: Sequence[float] | Tensor,
    errors: Sequence[float] | Tensor,
    *,
    floor: float = 0.0,
    window: int = 8,
) -> LogLogSlope:
    """Fit the slope of log error over log step on the best window.

    A log-log curve of errors is straight only in its middle: round-off bends it at small steps,
    higher-order terms at large ones. First, errors at or below ``floor`` are dropped as round-off.
    Then a straight line is fitted to every window of ``window`` consecutive steps that are left. Of
    the windows that are nearly as straight as the straightest (residual at most twice the smallest,
    or at most 0.02 decades) the one with the *smallest* steps wins, as the order is a statement
    about the limit: an error 1e-3 t + t² has order 1 although it is straight with slope 2 at first.

    Args:
        steps: Positive steps, ``(k,)``.
        errors: Errors at those steps, ``(k,)``, not negative.
        floor: Size of round-off in the errors. Too low, and a plateau of noise may be taken for
            slope 0; too high, and only large steps remain.
        window: Number of steps in a window, at least 3.

    Returns:
        The slope, the window in which it was found and how straight the curve is there. If no error
        exceeds ten times the floor, the slope is infinite: the identity is exact. With one or two
        errors above the floor the slope is a lower bound taken from the floor.

    Raises:
        ValueError: If lengths differ, there are fewer than 3 steps, or a step is not positive.

    Example:
        >>> steps = [10.0 ** (-k / 8) for k in range(32)]
        >>> errors = [0.3 * t**3 + 1e-14 for t in steps]
        >>> round(log_log_slope(steps, errors, floor=1e-13).slope, 1)
        3.0
    """
    t, e = (np.asarray([float(value) for value in given]) for given in (steps, errors))
    if t.shape != e.shape or t.size < 3 or window < 3:
        raise ValueError(
            f"expected as many steps as errors, at least 3, and window >= 3; got {t.size} steps, "
            f"{e.size} errors and window={window}"
        )
    if not (t > 0).all() or (e < 0).any():
        raise ValueError("expected positive steps and errors that are not negative")
    order = np.argsort(t)
    t, e = t[order], e[order]
    if not np.isfinite(e).all():
        return LogLogSlope(math.nan, float(t[0]), float(t[-1]), math.nan)
    if e.max() <= 10 * floor:
        return LogLogSlope(math.inf, float(t[0]), float(t[-1]), 0.0)
    kept = np.flatnonzero(e > floor)
    if kept.size < 3:
        first, last = max(int(kept[0]) - 1, 0), int(kept[-1])
        rise = math.log(e[last] / max(e[first], floor))
        run = math.log(t[last] / t[first]) if last > first else math.inf
        return LogLogSlope(rise / run, float(t[first]), float(t[last]), 0.0)
    x, y = np.log10(t[kept]), np.log10(e[kept])
    width = min(window, kept.size)
    fits = []
    for i in range(kept.size - width + 1):
        inside = slice(i, i + width)
        slope, offset = np.polyfit(x[inside], y[inside], 1)
        residual = float(np.sqrt(np.mean((y[inside] - slope * x[inside] - offset) ** 2)))
        fits.append((residual, i, float(slope)))
    straight = max(2 * min(fits)[0], 0.02)
    residual, i, slope = next(fit for fit in fits if fit[0] <= straight)
    return LogLogSlope(slope, float(10 ** x[i]), float(10 ** x[i + width - 1]), residual)


def steps(sample: Sample) -> list[float]:
    """Steps from 1 down to 1e-4 (1e-3 in single precision), eight in each decade."""
    decades = 4 if sample.eps < 1e-10 else 3
    return [10 ** (-k / 8) for k in range(8 * decades + 1)]


def order(
    sample: Sample, what: str, error: Callable[[float], float], scale: float, least: float
) -> Measurement:
    """Measure the order at which ``error(t)`` vanishes; ``scale`` is the size of its terms."""
    floor = sample.eps ** (2 / 3) * scale
    ts = steps(sample)
    found = log_log_slope(ts, [error(t) for t in ts], floor=floor)
    return Measurement(f"order of {what}", found.slope, least - sample.slope_tol, ">=")


def identity(
    sample: Sample,
    what: str,
    error: Callable[[float], float],
    scale: float,
    *,
    factor: float = 1.0,
    least: float = 2,
) -> Iterator[Measurement]:
    """Measure an identity that is exact, or holds to order ``least`` if ``sample.exact`` is False.

    ``error(t)`` is the size of the discrepancy of two quantities of size ``scale * t``. Where an
    exact identity fails, the order at which it holds is told too: 3 is what a second-order
    retraction or a second-order approximation of the distance would give.
    """
    if not sample.exact:
        found = order(sample, what, error, scale, least)
        yield found
        second = 3 - sample.slope_tol
        yield Measurement(f"second order in {what}", found.value, second, ">=", required=False)
        return
    worst = max(error(t) / (t * scale) for t in (1.0, 0.5, 0.1))
    if not worst <= factor * sample.rtol:
        slope = order(sample, what, error, scale, least).value
        what += f" fails to be exact (it holds to order {slope:.2g})"
    yield Measurement(what, worst, factor * sample.rtol)


def velocity(sample: Sample, curve: Callable[[float], Tensor], t: float) -> Tensor:
    """Differentiate a curve by seven-point central differences."""
    h = 2 * sample.eps ** (1 / 7)
    terms = [weight / h * curve(t + k * h) for k, weight in _STENCIL.items()]
    return torch.stack(terms).sum(0)


def _check_first_order(sample: Sample, name: str) -> Iterator[Measurement]:
    """Check that a map starts at x, with velocity u, and stays on the manifold."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    move = getattr(m, name)
    yield sample.close(f"{name}(x, 0) == x", move(x, torch.zeros_like(u)), x)
    ok, reason = sample.explained(move(x, u))
    yield claim(f"{name}(x, u) is no valid point: {reason}", ok)
    what = f"{name}(x, t u) - (x + t u)"
    yield order(sample, what, lambda t: size(move(x, t * u) - x - t * u), size(x), 2)


@register_law(
    "retraction",
    remedy="make retr(x, 0) = x with derivative u along u; geoopt's CanonicalStiefel, for one, "
    "gives u + x x^T u",
)
def check_retraction(sample: Sample) -> Iterator[Measurement]:
    """retr(x, t u) starts at x with velocity u and stays on the manifold."""
    yield from _check_first_order(sample, "retr")


@register_law(
    "retraction_order", remedy="a retraction must agree with the exponential map to first order"
)
def check_retraction_order(sample: Sample) -> Iterator[Measurement]:
    """Retr agrees with expmap to first order; whether to second order is reported."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    what = "retr(x, t u) - expmap(x, t u)"
    found = order(sample, what, lambda t: size(m.retr(x, t * u) - m.expmap(x, t * u)), size(x), 2)
    yield found
    second = 3 - sample.slope_tol
    yield Measurement("second-order retraction", found.value, second, ">=", required=False)


@register_law(
    "exponential",
    remedy="make expmap(x, 0) = x with derivative u along u, and return points of the manifold",
)
def check_exponential(sample: Sample) -> Iterator[Measurement]:
    """expmap(x, t u) starts at x with velocity u and stays on the manifold."""
    yield from _check_first_order(sample, "expmap")


@register_law(
    "geodesic_speed",
    remedy="expmap must be the exponential map of inner; a retraction has no constant speed",
)
def check_geodesic_speed(sample: Sample) -> Iterator[Measurement]:
    """Geodesics t -> expmap(x, t u) have constant speed in the metric."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    start = sample.inner(x, u)
    for t in (0.0, 0.3, 0.6, 1.0):
        y = m.expmap(x, t * u)
        speed = sample.inner(y, velocity(sample, lambda s: m.expmap(x, s * u), t))
        yield sample.close(f"|velocity|^2 at t = {t} == |u|^2", speed, start, factor=100)


@register_law(
    "geodesic_flow",
    remedy="expmap must solve a second-order equation; a retraction bends at each restart",
)
def check_geodesic_flow(sample: Sample) -> Iterator[Measurement]:
    """A geodesic restarted on its way goes on as before: expmap(c(s), t c'(s)) == c(s + t).

    Whether expmap_transp carries the velocity along, as parallel transport does, is reported.
    """
    m, x, u = sample.manifold, sample.x, sample.tangent()
    for s in (0.3, 0.6):
        halfway = m.expmap(x, s * u)
        onward = velocity(sample, lambda r: m.expmap(x, r * u), s)
        for t in (-s, 0.4):
            restarted, straight = m.expmap(halfway, t * onward), m.expmap(x, (s + t) * u)
            what = f"expmap(c({s}), {t:.1g} c'({s})) == c({s + t:.1g})"
            yield sample.same(what, restarted, straight, factor=100)
    # Parallel transport would do so; a projection, geoopt's usual transport, does not.
    carried, onward = m.expmap_transp(x, u, u)[1], velocity(sample, lambda r: m.expmap(x, r * u), 1)
    found = sample.close("expmap_transp(x, u, u)[1] == c'(1)", carried, onward)
    yield dataclasses.replace(found, required=False)


@register_law(
    "geodesic_variation",
    remedy="expmap solves the geodesic equation of another metric than inner; derive it anew",
)
def check_geodesic_variation(sample: Sample) -> Iterator[Measurement]:
    """Geodesics are critical points of the energy under variations with fixed ends.

    The energy is the integral of the squared speed; only inner, proju and retr are used besides
    expmap, so this tells the geodesics of the metric from those of another where there is no dist.
    """
    m, x, u, ambient = sample.manifold, sample.x, sample.tangent(), sample.ambient()
    nodes, weights = np.polynomial.legendre.leggauss(8)

    def varied(t: float, amount: float) -> Tensor:
        y = m.expmap(x, t * u)
        sideways = m.proju(y, ambient)
        length = sample.inner(y, sideways).clamp(min=sample.tiny).sqrt()
        sideways = sideways / length.reshape(length.shape + (1,) * sample.ndim)
        return m.retr(y, amount * 4 * t * (1 - t) * sideways)

    def energy(amount: float) -> Tensor:
        total = torch.zeros_like(sample.inner(x, u))
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            y = varied(float(node), amount)
            speed = velocity(sample, lambda t: varied(t, amount), float(node))
            # Of a quotient's curve only the horizontal part of the velocity counts.
            total = total + float(weight) * sample.inner(y, m.proju(y, speed))
        return total

    h = 0.02 * sample.radius
    near, far = energy(h) - energy(-h), energy(2 * h) - energy(-2 * h)
    slope = (8 * near - far) / (12 * h)
    yield Measurement(
        "relative derivative of the energy",
        size(slope) / size(sample.inner(x, u)),
        1000 * sample.rtol,
    )


@register_law(
    "geodesic_distance",
    remedy="dist must be the length of the geodesic; if expmap or dist is an approximation, pass "
    "exact=False, which asks that their errors vanish to third order",
)
def check_geodesic_distance(sample: Sample) -> Iterator[Measurement]:
    """The distance travelled is the length of the vector: dist(x, expmap(x, t u)) == t |u|_x."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    length = sample.inner(x, u).sqrt()

    def error(t: float) -> float:
        return size(m.dist(x, m.expmap(x, t * u)) - t * length)

    yield from identity(
        sample, "dist(x, expmap(x, t u)) == t |u|", error, size(length), factor=10, least=3
    )


@register_law(
    "exp_log",
    remedy="logmap must invert expmap; shorten radius if it exceeds the injectivity radius, and "
    "pass exact=False if logmap is an approximation",
)
def check_exp_log(sample: Sample) -> Iterator[Measurement]:
    """The logarithm inverts the exponential, on points and on vectors."""
    m, x, u = sample.manifold, sample.x, sample.tangent()

    def error(t: float) -> float:
        return size(m.logmap(x, m.expmap(x, t * u)) - t * u)

    yield from identity(sample, "logmap(x, expmap(x, t u)) == t u", error, size(u), factor=10)
    y = sample.near()
    log = m.logmap(x, y)
    ok, reason = sample.explained(x, log)
    yield claim(f"check_vector_on_tangent rejects logmap(x, y): {reason}", ok)
    if sample.exact:
        yield sample.same("expmap(x, logmap(x, y)) == y", m.expmap(x, log), y, factor=10)


@register_law(
    "log_distance", remedy="return dist and logmap of one and the same geometry and approximation"
)
def check_log_distance(sample: Sample) -> Iterator[Measurement]:
    """The logarithm is as long as the distance: |logmap(x, y)|_x == dist(x, y).

    Where the manifold has ``dist2_logmap(x, y)``, it must return the square of one and the other.
    """
    m, x, u = sample.manifold, sample.x, sample.tangent()

    def error(t: float) -> float:
        y = m.retr(x, t * u)
        return size(sample.inner(x, m.logmap(x, y)).clamp(min=0).sqrt() - m.dist(x, y))

    what = "|logmap(x, y)|_x == dist(x, y)"
    yield from identity(sample, what, error, size(sample.inner(x, u).sqrt()), factor=10)
    if hasattr(m, "dist2_logmap"):
        y = m.retr(x, u)
        squared, log = m.dist2_logmap(x, y)
        dist2, same = m.dist(x, y) ** 2, m.logmap(x, y)
        yield sample.close("dist2_logmap(x, y)[0] == dist(x, y)^2", squared, dist2, factor=10)
        yield sample.close("dist2_logmap(x, y)[1] == logmap(x, y)", log, same, factor=10)


@register_law("distance", remedy="return the length of a shortest curve, in either direction")
def check_distance(sample: Sample) -> Iterator[Measurement]:
    """The distance is symmetric, positive, obeys the triangle inequality; dist2 is its square."""
    m, x, y, z = sample.manifold, *sample.points[:3]
    xy, yz, xz = m.dist(x, y), m.dist(y, z), m.dist(x, z)
    finite = torch.stack([xy, yz, xz]).isfinite()
    yield claim("dist of far points is not finite", bool(finite.all()))
    yield sample.close("dist(x, y) == dist(y, x), far", xy, m.dist(y, x))
    near = sample.near()
    other = sample.near(near)
    short, onward, direct = m.dist(x, near), m.dist(near, other), m.dist(x, other)
    yield sample.close("dist(x, y) == dist(y, x), near", short, m.dist(near, x))
    yield sample.close("dist2(x, y) == dist(x, y)^2", m.dist2(x, near), short**2)
    least = float(torch.stack([xy, yz, short, onward]).min())
    yield Measurement("least dist(x, y)", least, sample.tiny, ">=")
    for what, straight, detour in (("far", xz, xy + yz), ("near", direct, short + onward)):
        excess = float(((straight - detour) / detour).max())
        yield Measurement(f"triangle inequality, {what}: relative excess", excess, sample.rtol)


@register_law(
    "distance_to_itself",
    remedy="do not clamp the argument of acos or acosh away from 1; use atan2, asinh or a chord",
)
def check_distance_to_itself(sample: Sample) -> Iterator[Measurement]:
    """dist(x, x) is zero up to the root of round-off, below which a mean cannot converge."""
    bound = 10 * math.sqrt(sample.eps)
    for x in sample.points:
        yield Measurement("dist(x, x)", float(sample.manifold.dist(x, x).abs().max()), bound)


@register_law(
    "distance_gradient",
    remedy="avoid in-place writes and detached tensors in dist, and check egrad2rgrad",
)
def check_distance_gradient(sample: Sample) -> Iterator[Measurement]:
    """Autograd through dist gives the logarithm: grad of dist(x, y)^2 / 2 in x is -logmap(x, y)."""
    m, x, u = sample.manifold, sample.x, sample.tangent()

    def error(t: float) -> float:
        y = m.expmap(x, t * u)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_(True)
            (egrad,) = torch.autograd.grad(0.5 * (m.dist(leaf, y) ** 2).sum(), leaf)
        return size(m.egrad2rgrad(x, egrad) + m.logmap(x, y))

    yield from identity(
        sample, "rgrad of dist(x, y)^2 / 2 == -logmap(x, y)", error, size(u), factor=100
    )


@register_law(
    "finite_gradients",
    remedy="guard roots, acos and eigenvectors at coinciding arguments (a double torch.where)",
)
def check_finite_gradients(sample: Sample) -> Iterator[Measurement]:
    """The gradient of dist2(x, y) is zero, not NaN, where y is x: a mean may start at an anchor.

    The origin is tried too, as its symmetry makes eigenvalues coincide.
    """
    m, points = sample.manifold, {f"sample point {i}": x for i, x in enumerate(sample.points)}
    # Where there is no origin of this shape, nothing is said: origin() has no law of its own.
    with contextlib.suppress(Exception):
        points["origin"] = m.origin(*sample.x.shape, dtype=sample.x.dtype, device=sample.x.device)
    for name, point in points.items():
        with torch.enable_grad():
            leaf = point.detach().as_subclass(Tensor).clone().requires_grad_(True)
            value = m.dist2(leaf, leaf.detach()).sum()
            egrad = torch.autograd.grad(value, leaf)[0] if value.requires_grad else 0 * leaf
        bound = 100 * math.sqrt(sample.eps)
        yield Measurement(f"|gradient of dist2(x, x)| at the {name}", size(egrad), bound)


@register_law(
    "gradient_slope", remedy="fix egrad2rgrad (law gradient) or the retraction (law retraction)"
)
def check_gradient_slope(sample: Sample) -> Iterator[Measurement]:
    """The gradient predicts the cost to first order along retractions."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    egrad, _ = sample.derivatives(x)
    value, slope = sample.cost(x), sample.inner(x, m.egrad2rgrad(x, egrad), u)

    def error(t: float) -> float:
        return size(sample.cost(m.retr(x, t * u)) - value - t * slope)

    what = "f(retr(x, t u)) - f(x) - t <grad f, u>_x"
    yield order(sample, what, error, max(size(value), size(slope)), 2)


@register_law(
    "hessian",
    remedy="add the connection term of the metric; projecting the derivative of egrad2rgrad is not "
    "enough for quotient and non-Euclidean metrics",
)
def check_hessian(sample: Sample) -> Iterator[Measurement]:
    """The Hessian is linear, symmetric, and predicts the cost to second order along geodesics.

    It runs if the manifold has ``ehess2rhess(x, egrad, ehess, u)``, which turns the Euclidean
    gradient and its directional derivative along u into the Riemannian Hessian applied to u.
    """
    m, x, u, v = sample.manifold, sample.x, sample.tangent(), sample.tangent()
    if not hasattr(m, "ehess2rhess"):
        raise NotApplicable("the manifold has no method ehess2rhess(x, egrad, ehess, u)")

    def hessian(w: Tensor) -> Tensor:
        return m.ehess2rhess(x, *sample.derivatives(x, w), w)

    hu, hv = hessian(u), hessian(v)
    scale = sample.radius * (size(sample.inner(x, hu, hu)) * size(sample.inner(x, hv, hv))) ** 0.25
    yield sample.close("Hess u is tangent", m.proju(x, hu), hu)
    left, right = sample.inner(x, hu, v), sample.inner(x, u, hv)
    yield sample.close("<Hess u, v>_x == <u, Hess v>_x", left, right, scale=scale)
    yield sample.close("Hess(2 u - 3 v) is linear", hessian(2 * u - 3 * v), 2 * hu - 3 * hv)
    if x.dtype != torch.float64:
        return  # between rounding and the next order, three orders leave nothing to measure
    value, slope = sample.cost(x), sample.inner(x, m.egrad2rgrad(x, sample.derivatives(x)[0]), u)
    curvature = sample.inner(x, hu, u)

    def error(t: float) -> float:
        predicted = value + t * slope + 0.5 * t * t * curvature
        return size(sample.cost(m.expmap(x, t * u)) - predicted)

    what = "f(expmap(x, t u)) - f(x) - t <grad f, u>_x - t^2/2 <Hess f u, u>_x"
    yield order(sample, what, error, max(size(value), size(slope), size(curvature)), 3)
