"""Laws of quotient manifolds: nothing may depend on which representative of a class is stored.

They run on any manifold with the method ``random_gauge`` of
:class:`manifold_merge.quotient.QuotientManifold`; each further hook is used where it exists:
``random_representative``, ``align``, ``same_point``, ``horizontal``, ``random_vertical``,
``product`` (an array that depends on the class alone, and determines it).
Source: Absil, Mahony and Sepulchre (2008), sections 3.4 to 3.6; Boumal (2023), chapter 9.
Users import :mod:`manifold_merge.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from manifold_merge.checks_frame import NotApplicable, Sample, register_law, size
from manifold_merge.checks_laws import descend
from manifold_merge.checks_report import Measurement, claim
from manifold_merge.checks_slopes import velocity

LINEAR = (
    "random_gauge must be linear: it is applied to tangent vectors too; a translation group is "
    "tested with skip=('gauge_invariance', 'gauge_equivariance')"
)


def _hook(sample: Sample, name: str) -> Callable[..., Any] | None:
    """A method that only quotient manifolds have, None where this one lacks it."""
    if not sample.is_quotient:
        raise NotApplicable("not a quotient manifold: it has no random_gauge")
    return getattr(sample.manifold, name, None)


@register_law(
    "representatives",
    remedy="align(x, y) must return a point of y's class, and x itself for y in the class of x",
)
def check_representatives(sample: Sample) -> Iterator[Measurement]:
    """Another representative is a valid point, the same class, at distance zero, aligned to x."""
    m, x, y = sample.manifold, sample.x, sample.near()
    other = sample.gauge(x)(x)
    ok, reason = sample.explained(other)
    yield claim(f"check_point_on_manifold rejects another representative: {reason}", ok)
    if product := _hook(sample, "product"):
        yield sample.close("product(g x) == product(x)", product(other), product(x))
    yield sample.close("cost(g x) == cost(x)", sample.cost(other), sample.cost(x))
    if drawn := _hook(sample, "random_representative"):
        yield sample.same("random_representative(x) ~ x", drawn(x), x)
    if same_point := _hook(sample, "same_point"):
        yield claim(
            "same_point(x, g x) is False", bool(torch.as_tensor(same_point(x, other)).all())
        )
        same = torch.as_tensor(same_point(x, y))
        yield claim("same_point(x, y) is True for another point y", not bool(same.any()))
    if align := _hook(sample, "align"):
        yield sample.close("align(x, g x) == x", align(x, other), x)
        moved = align(x, sample.gauge(y)(y))
        yield sample.close("align(x, g y) == align(x, y)", moved, align(x, y))
        yield sample.same("align(x, y) ~ y", align(x, y), y)
        yield sample.close("align(x, align(x, y)) == align(x, y)", align(x, moved), moved)
    far = float(m.dist(x, other).abs().max())
    yield Measurement("dist(x, g x)", far, 100 * sample.eps**0.5)


@register_law(
    "gauge_invariance",
    remedy="build inner and dist from quantities that no change of representative can alter; "
    + LINEAR,
)
def check_gauge_invariance(sample: Sample) -> Iterator[Measurement]:
    """Inner products, norms and distances are those of the classes: <g u, g v>_gx == <u, v>_x."""
    m, x, u, v = sample.manifold, sample.x, sample.tangent(), sample.tangent()
    g, scale = sample.gauge(x), size(sample.inner(x, u))
    moved = sample.inner(g(x), g(u), g(v))
    yield sample.close("<g u, g v>_gx == <u, v>_x", moved, sample.inner(x, u, v), scale=scale)
    yield sample.close("|g u|_gx == |u|_x", m.norm(g(x), g(u)), m.norm(x, u))
    y = sample.near()
    h = sample.gauge(y)
    yield sample.close("dist(g x, y) == dist(x, y)", m.dist(g(x), y), m.dist(x, y), factor=10)
    yield sample.close("dist(x, h y) == dist(x, y)", m.dist(x, h(y)), m.dist(x, y), factor=10)
    z = sample.points[1]
    moved = m.dist(g(x), sample.gauge(z)(z))
    yield sample.close("dist(g x, h z) == dist(x, z), far", moved, m.dist(x, z), factor=100)


@register_law(
    "gauge_equivariance",
    remedy="every vector returned must move with the representative as points do; " + LINEAR,
)
def check_gauge_equivariance(sample: Sample) -> Iterator[Measurement]:
    """Projections, gradients, steps, logarithms and transports commute with a change of gauge."""
    m, x, u, v = sample.manifold, sample.x, sample.tangent(), sample.tangent()
    a, g = sample.ambient(), sample.gauge(x)
    gx, y = g(x), m.retr(x, u)
    yield sample.close("proju(g x, g a) == g proju(x, a)", m.proju(gx, g(a)), g(m.proju(x, a)))
    rgrad = m.egrad2rgrad(x, sample.derivatives(x)[0])
    moved = m.egrad2rgrad(gx, sample.derivatives(gx)[0])
    yield sample.close("grad f(g x) == g grad f(x)", moved, g(rgrad))
    adam = v / m.component_inner(x, u).expand_as(x).sqrt()
    moved = g(v) / m.component_inner(gx, g(u)).expand_as(x).sqrt()
    yield sample.close("the step of RiemannianAdam at g x is g times that at x", moved, g(adam))
    yield sample.same("retr(g x, g u) ~ retr(x, u)", m.retr(gx, g(u)), y)
    moved = m.expmap(gx, g(u))
    yield sample.same("expmap(g x, g u) ~ expmap(x, u)", moved, m.expmap(x, u), factor=10)
    if transp := implemented(m.transp, x, y, v):
        moved = m.transp(gx, g(y), g(v))
        yield sample.close("transp(g x, g y, g v) == g transp(x, y, v)", moved, g(transp[0]))
    log = m.logmap(x, y)
    yield sample.close("logmap(g x, y) == g logmap(x, y)", m.logmap(gx, y), g(log), factor=10)
    moved = m.logmap(x, sample.gauge(y)(y))
    yield sample.close("logmap(x, h y) == logmap(x, y)", moved, log, factor=10)


def implemented(method: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor] | None:
    """Call an optional method; None if the manifold does not implement it."""
    try:
        return (method(*arguments),)
    except NotImplementedError:
        return None


def _rate(sample: Sample, function: Callable[..., Any], direction: Tensor) -> float:
    """Size of the derivative of a function of points at x along a direction."""
    return size(velocity(sample, lambda t: function(sample.x + t * direction), 0.0))


@register_law(
    "horizontality",
    remedy="subtract the vertical part in the metric: proju, egrad2rgrad, logmap and the velocity "
    "of expmap must all be horizontal",
)
def check_horizontality(sample: Sample) -> Iterator[Measurement]:
    """Tangent vectors are orthogonal to the class, and geodesics stay so.

    What proju removes must be vertical: it changes no ``product`` and is orthogonal to all tangent
    vectors. The hook ``random_vertical(x, generator=...)`` gives further vertical vectors.
    """
    m, x, u, a = sample.manifold, sample.x, sample.tangent(), sample.ambient()
    # The part of a that is tangent to the total manifold: what projx does to first order.
    a = velocity(sample, lambda t: m.projx(x + t * a / size(a)), 0.0)
    removed = {"a - proju(x, a)": a - m.proju(x, a)}
    if random_vertical := _hook(sample, "random_vertical"):
        removed["random_vertical(x)"] = random_vertical(x, generator=sample.generator)
    product, horizontal = _hook(sample, "product"), _hook(sample, "horizontal")
    for name, vertical in removed.items():
        length = size(vertical)
        if length <= 100 * sample.rtol * size(a):
            continue  # the group is discrete
        orthogonal = sample.inner(x, u, vertical)
        # The metric's size is taken from u: on vertical vectors it may be degenerate.
        scale = size(sample.inner(x, u)) * length / size(u)
        zero = torch.zeros_like(orthogonal)
        yield sample.close(f"<u, {name}>_x == 0", orthogonal, zero, scale=scale)
        what = f"|proju(x, {name})| / |{name}|"
        yield Measurement(what, size(m.proju(x, vertical)) / length, sample.rtol)
        if product is not None:
            change = _rate(sample, product, vertical) / length
            relative = change / (_rate(sample, product, u) / size(u))
            yield Measurement(f"change of product along {name}", relative, 100 * sample.rtol)
    if horizontal is not None:
        yield sample.close("horizontal(x, u) == u", horizontal(x, u), u)
    for t in (0.3, 1.0):
        y = m.expmap(x, t * u)
        speed = velocity(sample, lambda s: m.expmap(x, s * u), t)
        what = f"the velocity of expmap(x, t u) is horizontal at t = {t}"
        yield sample.close(what, m.proju(y, speed), speed, factor=100)


@register_law(
    "optimiser_equivariance",
    remedy="look at gauge_equivariance; an entry-wise second moment, or a projx or retr that picks "
    "its own gauge while the momentum stays behind, breaks it",
)
def check_optimiser_equivariance(sample: Sample) -> Iterator[Measurement]:
    """Twenty steps of RiemannianSGD and RiemannianAdam from two gauges reach the same class."""
    x = sample.x
    runs = [list(descend(sample, start)) for start in (x, sample.gauge(x)(x))]
    for (name, one, *_), (_, two, *_) in zip(*runs, strict=True):
        points = [p.detach().as_subclass(Tensor) for p in (one, two)]
        yield sample.same(f"{name} from x and from g x", *points, factor=100)
