"""Laws that hold pointwise: validity, projections, the metric, transports, optimisers.

Sources: Absil, Mahony and Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008), chapters
3, 4 and 8; Boumal, *An Introduction to Optimization on Smooth Manifolds* (2023); the docstrings of
geoopt's ``Manifold``. Users import :mod:`manifold_merge.checks`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import geoopt
import torch
from torch import Tensor

from manifold_merge.checks_frame import NotApplicable, Sample, register_law, size
from manifold_merge.checks_report import Measurement, claim


@register_law(
    "valid_points",
    remedy="make the checks accept what random, retr, projx and proju return, within atol and rtol",
)
def check_valid_points(sample: Sample) -> Iterator[Measurement]:
    """The checks accept random points, retracted points and projected vectors."""
    for what, point in {"a sample point": sample.x, "retr(x, u)": sample.near()}.items():
        ok, reason = sample.explained(point)
        yield claim(f"check_point_on_manifold rejects {what}: {reason}", ok)
        yield claim(f"the accepted point {what} came with a reason", reason is None)
    ok, reason = sample.explained(sample.x, sample.tangent())
    yield claim(f"check_vector_on_tangent rejects proju(x, a): {reason}", ok)


@register_law(
    "wrong_shape", remedy="return (False, reason) from _check_shape before reading shape[-1]"
)
def check_wrong_shape(sample: Sample) -> Iterator[Measurement]:
    """The checks reject an array with too few dimensions, with a reason, and do not raise."""
    if not sample.ndim:
        raise NotApplicable("points have no dimensions of their own")
    small = sample.x.new_zeros((2,) * (sample.ndim - 1))
    ok, reason = sample.manifold.check_point(small, explain=True)
    yield claim("check_point accepts an array of too few dimensions", not ok)
    yield claim("check_point rejects without a reason", ok or bool(reason))


def _off(sample: Sample) -> tuple[Tensor | None, Tensor | None]:
    """A point and a vector that projections would have to move, None where nothing is off."""
    m, x = sample.manifold, sample.x
    # A ball is left only by large steps, a sphere by any.
    points = (x + factor * sample.ambient() for factor in (1.0, 10.0, 100.0))
    point = next((p for p in points if not sample.gap(m.projx(p), p) <= 0.01), None)
    vector = sample.ambient()
    return point, None if sample.gap(m.proju(x, vector), vector) <= 0.01 else vector


def _rejected(sample: Sample, what: str, *invalid: Tensor) -> Iterator[Measurement]:
    """Check that a point, or a vector at a point, is rejected with a reason."""
    check = ("check_point_on_manifold", "check_vector_on_tangent")[len(invalid) - 1]
    ok, reason = sample.explained(*invalid)
    yield claim(f"{check} accepts {what}", not ok)
    yield claim(f"{check} rejects {what} without a reason", ok or bool(reason))


@register_law(
    "invalid_points",
    remedy="return (False, reason) from _check_point_on_manifold and _check_vector_on_tangent",
)
def check_invalid_points(sample: Sample) -> Iterator[Measurement]:
    """The checks reject arrays that projx or proju would have to move, with a reason."""
    point, vector = _off(sample)
    if point is None and vector is None:
        raise NotApplicable("no constraint: projx and proju move nothing")
    if point is not None:
        yield from _rejected(sample, "a point off the manifold", point)
    if vector is not None:
        yield from _rejected(sample, "a vector off the tangent space", sample.x, vector)


@register_law("nan_points", remedy="test torch.isfinite in the checks; comparisons with NaN pass")
def check_nan_points(sample: Sample) -> Iterator[Measurement]:
    """The checks reject NaN; only reported where the manifold has no constraint."""
    off_point, off_vector = _off(sample)
    first = torch.zeros_like(sample.x, memory_format=torch.contiguous_format)
    first.view(-1)[0] = math.nan
    bad_point, bad_vector = sample.x + first, sample.tangent() + first
    for found in _rejected(sample, "NaN as a point", bad_point):
        yield dataclasses.replace(found, required=off_point is not None)
    for found in _rejected(sample, "NaN as a vector", sample.x, bad_vector):
        yield dataclasses.replace(found, required=off_vector is not None)


@register_law(
    "point_projection",
    remedy="projx must return a valid point as it is: a projx that moves it, even along its class, "
    "desynchronises the momentum of optimisers that call it after each step",
)
def check_point_projection(sample: Sample) -> Iterator[Measurement]:
    """Projecting a point twice is projecting it once, and a valid point stays as it is."""
    m, x = sample.manifold, sample.x
    once = m.projx(x + 0.02 * sample.ambient())
    ok, reason = sample.explained(once)
    yield claim(f"projx(x + noise) is no valid point: {reason}", ok)
    yield sample.close("projx(projx(x + noise)) == projx(x + noise)", m.projx(once), once)
    for what, valid in {"x": x, "retr(x, u)": sample.near()}.items():
        yield sample.close(f"projx({what}) == {what}", m.projx(valid), valid)
        if sample.strict:
            yield claim(
                f"projx changes the bits of the valid point {what}",
                torch.equal(m.projx(valid), valid),
            )


@register_law(
    "projections", remedy="make proju(x, .) a linear projection onto the tangent space at x"
)
def check_projections(sample: Sample) -> Iterator[Measurement]:
    """Projecting a vector is linear and idempotent, and gives a valid tangent vector."""
    m, x, a, b = sample.manifold, sample.x, sample.ambient(), sample.ambient()
    once = m.proju(x, a)
    yield sample.close("proju(x, proju(x, a)) == proju(x, a)", m.proju(x, once), once)
    mixed = 2 * once - 3 * m.proju(x, b)
    yield sample.close("proju(x, 2 a - 3 b) is linear", m.proju(x, 2 * a - 3 * b), mixed)
    ok, reason = sample.explained(x, once)
    yield claim(f"check_vector_on_tangent rejects proju(x, a): {reason}", ok)


@register_law(
    "self_adjoint_projection",
    remedy="project orthogonally in the metric at x, not in the Euclidean inner product",
)
def check_self_adjoint_projection(sample: Sample) -> Iterator[Measurement]:
    """The projection is orthogonal in the metric: <P a, b>_x == <a, P b>_x."""
    m, x, a, b = sample.manifold, sample.x, sample.ambient(), sample.ambient()
    pa, pb = m.proju(x, a), m.proju(x, b)
    left, right = sample.inner(x, pa, b), sample.inner(x, a, pb)
    scale = size(sample.inner(x, pa, pa) * sample.inner(x, pb, pb)) ** 0.5
    yield sample.close("<P a, b>_x == <a, P b>_x", left, right, scale=scale)


@register_law("metric", remedy="make inner(x, ., .) a symmetric positive definite bilinear form")
def check_metric(sample: Sample) -> Iterator[Measurement]:
    """The inner product is symmetric, bilinear and positive definite on tangent vectors."""
    x = sample.x
    u, v, w = sample.tangent(), sample.tangent(), sample.tangent()
    uv, uu = sample.inner(x, u, v), sample.inner(x, u, u)
    scale = size(uu)
    yield sample.close("<u, v>_x == <v, u>_x", uv, sample.inner(x, v, u), scale=scale)
    mixed = sample.inner(x, 2 * u - 3 * w, v)
    linear = 2 * uv - 3 * sample.inner(x, w, v)
    yield sample.close("<2 u - 3 w, v>_x is linear in u and w", mixed, linear, scale=scale)
    yield sample.close("inner(x, u) == inner(x, u, u)", sample.inner(x, u), uu)
    vectors = [u, v, w]
    smallest = min(float(sample.inner(x, t).min()) for t in vectors)
    yield Measurement("smallest <u, u>_x of three vectors", smallest, sample.tiny, ">=")
    product = sample.inner(x, u) * sample.inner(x, v)
    # Cauchy-Schwarz sees an indefinite form of which the sampled squares happen to be positive.
    ratio = float((uv.abs() / product.clamp(min=0).sqrt()).max())
    yield Measurement("|<u, v>_x| / (|u|_x |v|_x)", ratio, 1 + sample.rtol)


@register_law(
    "norm", remedy="leave norm to geoopt's Manifold, or return inner(x, u) ** 0.5 and keep keepdim"
)
def check_norm(sample: Sample) -> Iterator[Measurement]:
    """The norm is the root of the inner product."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    squared = sample.inner(x, u)
    yield sample.close("norm(x, u)^2 == inner(x, u)", m.norm(x, u) ** 2, squared)
    kept = squared.reshape(squared.shape + (1,) * sample.ndim)
    yield sample.close("the same with keepdim=True", m.norm(x, u, keepdim=True) ** 2, kept)


@register_law(
    "component_inner",
    remedy="return the whole inner product, broadcast: RiemannianAdam divides the momentum by its "
    "root, and dividing entry by entry leaves the tangent space",
)
def check_component_inner(sample: Sample) -> Iterator[Measurement]:
    """Dividing a tangent vector by the root of component_inner leaves it tangent.

    This is the step of ``geoopt.optim.RiemannianAdam``. Besides, components must lie between zero
    and the whole inner product, and their entries, broadcast to the point, must sum to at least
    that: it holds for the whole product, for entries and for factors of a product manifold.
    """
    m, x, u, momentum = sample.manifold, sample.x, sample.tangent(), sample.tangent()
    components = m.component_inner(x, u).expand_as(x)
    direction = momentum / (components.sqrt() + 1e-8)
    yield sample.close(
        "u / sqrt(component_inner) is tangent", m.proju(x, direction), direction, factor=10
    )
    whole = sample.inner(x, u).reshape(sample.batch + (1,) * sample.ndim).expand_as(x)
    total = components
    if sample.ndim:
        total = components.sum(tuple(range(-sample.ndim, 0)), keepdim=True).expand_as(x)
    slack = sample.rtol * size(whole)
    yield Measurement("-component_inner", -float(components.min()), slack)
    yield Measurement("component_inner - inner", float((components - whole).max()), slack)
    yield Measurement("inner - sum of component_inner", float((whole - total).max()), slack)
    yield sample.close(
        "component_inner(x, 2 u) == 4 component_inner(x, u)",
        m.component_inner(x, 2 * u).expand_as(x),
        4 * components,
    )


@register_law(
    "gradient",
    remedy="egrad2rgrad must apply the inverse of the metric, then project; scale and metric count",
)
def check_gradient(sample: Sample) -> Iterator[Measurement]:
    """The Riemannian gradient represents the differential: <rgrad, v>_x == <egrad, v>.

    Here egrad is any array and v any tangent vector. For a quotient egrad is the gradient of the
    cost, since only functions that are constant on classes have a gradient there.
    """
    m, x = sample.manifold, sample.x
    egrad = sample.derivatives(x)[0] if sample.is_quotient else sample.ambient()
    rgrad = m.egrad2rgrad(x, egrad.clone())
    for _ in range(3):
        v = sample.tangent()
        pairing = (egrad * v).reshape(*sample.inner(x, v).shape, -1).sum(-1)
        scale, found = size(egrad) * size(v), sample.inner(x, rgrad, v)
        yield sample.close("<rgrad, v>_x == <egrad, v>", found, pairing, scale=scale)
    yield sample.close("egrad2rgrad(x, egrad) is tangent", m.proju(x, rgrad), rgrad)
    ok, reason = sample.explained(x, rgrad)
    yield claim(f"check_vector_on_tangent rejects egrad2rgrad(x, egrad): {reason}", ok)


def _check_transport(sample: Sample, move: str) -> Iterator[Measurement]:
    """Check ``<move>_transp``, which moves a point along u and transports v with it."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    v, w = sample.tangent(), sample.tangent()
    both, kind = getattr(m, f"{move}_transp"), f"{move}_transp"
    y, moved = both(x, u, v)
    yield sample.close(f"{kind}(x, u, v)[0] == {move}(x, u)", y, getattr(m, move)(x, u))
    yield sample.close("the transported vector is tangent at the target", m.proju(y, moved), moved)
    mixed = both(x, u, 2 * v - 3 * w)[1]
    yield sample.close("linear in v", mixed, 2 * moved - 3 * both(x, u, w)[1])
    yield sample.close(f"{kind}(x, 0, v)[1] == v", both(x, torch.zeros_like(u), v)[1], v)
    follow = getattr(m, f"transp_follow_{move}")(x, u, v)
    yield sample.close(f"transp_follow_{move}(x, u, v) == {kind}(x, u, v)[1]", follow, moved)


@register_law("retr_transp", remedy="compose retr and transp, or drop the override of retr_transp")
def check_retr_transp(sample: Sample) -> Iterator[Measurement]:
    """retr_transp retracts as retr does and transports linearly into the new tangent space."""
    yield from _check_transport(sample, "retr")


@register_law(
    "expmap_transp", remedy="compose expmap and transp, or drop the override of expmap_transp"
)
def check_expmap_transp(sample: Sample) -> Iterator[Measurement]:
    """expmap_transp moves as expmap does and transports linearly into the new tangent space."""
    yield from _check_transport(sample, "expmap")


@register_law("transport", remedy="end transp(x, y, v) with proju(y, .) and keep it linear in v")
def check_transport(sample: Sample) -> Iterator[Measurement]:
    """Transport from x to y is linear, ends tangent at y, and is the identity for y = x."""
    m, x, y, v, w = sample.manifold, sample.x, sample.near(), sample.tangent(), sample.tangent()
    moved = m.transp(x, y, v)
    yield sample.close("transp(x, y, v) is tangent at y", m.proju(y, moved), moved)
    mixed = m.transp(x, y, 2 * v - 3 * w)
    yield sample.close("linear in v", mixed, 2 * moved - 3 * m.transp(x, y, w))
    yield sample.close("transp(x, x, v) == v", m.transp(x, x, v), v)
    ok, reason = sample.explained(y, moved)
    yield claim(f"check_vector_on_tangent rejects transp(x, y, v) at y: {reason}", ok)


@register_law(
    "isometric_transport",
    remedy="transport by parallel transport, or do not set isometric_transport = True",
)
def check_isometric_transport(sample: Sample) -> Iterator[Measurement]:
    """Transport keeps inner products; required only with ``isometric_transport = True``."""
    m, x, y, v, w = sample.manifold, sample.x, sample.near(), sample.tangent(), sample.tangent()
    before, after = sample.inner(x, v, w), sample.inner(y, m.transp(x, y, v), m.transp(x, y, w))
    found = sample.close("<T v, T w>_y == <v, w>_x", after, before, scale=sample.radius**2)
    yield dataclasses.replace(found, required=bool(getattr(m, "isometric_transport", False)))


@register_law(
    "optimisers",
    remedy="look at the laws gradient, retraction and component_inner first; then at the cost",
)
def check_optimisers(sample: Sample) -> Iterator[Measurement]:
    """Twenty steps of RiemannianSGD and RiemannianAdam lower the cost and stay on the manifold."""
    for name, parameter, start, end in descend(sample, sample.x):
        # A cost that starts at its minimum could not fall; a random one does not.
        yield Measurement(f"{name}: cost before - cost after", start - end, sample.tiny, ">=")
        point = parameter.detach().as_subclass(Tensor)
        ok, reason = sample.explained(point)
        yield claim(f"{name} leaves the manifold: {reason}", ok)


def descend(
    sample: Sample, x: Tensor, steps: int = 20
) -> Iterator[tuple[str, Tensor, float, float]]:
    """Run geoopt's optimisers on the cost from ``x``; yield name, point, cost before and after."""
    rgrad = sample.manifold.egrad2rgrad(x, sample.derivatives(x)[0])
    length = float(sample.inner(x, rgrad).clamp(min=0).sqrt().max()) or 1.0
    # Steps are short against the radius, so that a smooth cost must fall.
    optimisers = {
        "RiemannianSGD": (geoopt.optim.RiemannianSGD, 0.05 * sample.radius / length),
        "RiemannianAdam": (geoopt.optim.RiemannianAdam, 0.02 * sample.radius),
    }
    for name, (optimiser, rate) in optimisers.items():
        parameter = geoopt.ManifoldParameter(x.clone(), manifold=sample.manifold)
        stepper = optimiser([parameter], lr=rate)
        start = float(sample.cost(parameter).detach().sum())
        for _ in range(steps):
            stepper.zero_grad()
            sample.cost(parameter).sum().backward()
            stepper.step()
        yield name, parameter, start, float(sample.cost(parameter).detach().sum())


@register_law(
    "scaled",
    remedy="write methods as plain methods (no staticmethod, no partial) and register new ones "
    "with __scaling__",
)
def check_scaled(sample: Sample) -> Iterator[Measurement]:
    """Inside geoopt.Scaled(manifold, 2) distances and logarithms double, steps halve."""
    m, x, u = sample.manifold, sample.x, sample.tangent()
    twice = geoopt.Scaled(m, 2.0).to(x)
    yield sample.close("scaled retr(x, 2 u) == retr(x, u)", twice.retr(x, 2 * u), m.retr(x, u))
    yield sample.close("scaled expmap(x, 2 u)", twice.expmap(x, 2 * u), m.expmap(x, u))
    y = sample.near()
    yield sample.close("scaled dist == 2 dist", twice.dist(x, y), 2 * m.dist(x, y))
    yield sample.close("scaled logmap == 2 logmap", twice.logmap(x, y), 2 * m.logmap(x, y))
