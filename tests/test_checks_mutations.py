"""Each law of the contract suite catches the mistakes it is there for.

A law that nothing can break would be no law: every one is tried on manifolds that are wrong on
purpose, and on the right one beside them.
"""

from __future__ import annotations

import geoopt
import pytest
import torch
from checks_examples import (
    Directions,
    ProjectiveSpace,
    Sphere,
    broken,
    scaled_by,
    second_order_retraction,
)

from manifold_merge.checks import ContractViolation, check_manifold, list_laws


def dot(u: torch.Tensor, v: torch.Tensor, keepdim: bool = False) -> torch.Tensor:
    return (u * v).sum(-1, keepdim=keepdim)


def small_circle(self, x, u):
    """Constant-speed circles of curvature one half on the 2-sphere: a flow, but no geodesics."""
    speed = u.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    side = torch.linalg.cross(x, u / speed)
    axis = (2 * x + side) / 5**0.5
    angle = speed * 5**0.5 / 2
    turned = x * torch.cos(angle) + torch.linalg.cross(axis.expand_as(x), x) * torch.sin(angle)
    return turned + axis * dot(axis, x, True) * (1 - torch.cos(angle))


def entrywise(self, x, u, v=None):
    return u * (u if v is None else v)


def one_ulp_off(self, x):
    return torch.nextafter(x, 2 * x)


def asymmetric_inner(self, x, u, v=None, *, keepdim=False):
    v = u if v is None else v
    return dot(u, v + 0.1 * v.roll(1, -1), keepdim)


def lorentzian_inner(self, x, u, v=None, *, keepdim=False):
    v = u if v is None else v
    return dot(u, v, keepdim) - 3 * (u * v)[..., :1].sum(-1, keepdim=keepdim)


def unstable_dist(self, x, y, *, keepdim=False):
    return torch.acos(dot(x, y, keepdim))


def half_detached_dist(self, x, y, *, keepdim=False):
    far = (x + y).norm(dim=-1, keepdim=keepdim).detach() - 0.1 * (x - y).norm(
        dim=-1, keepdim=keepdim
    )
    return 2 * torch.atan2((x - y).norm(dim=-1, keepdim=keepdim), far)


def vertical_expmap(self, x, u):
    return Directions.expmap(self, x, u) * (1 + dot(u, u, True))


def in_place_gradient(self, x, u):
    u -= dot(x, u, True) * x
    return u


def coarse_gradient(self, x, u):
    return self.proju(x, u.bfloat16().to(u.dtype) if u.dtype == torch.float32 else u)


def branching_retr(self, x, u):
    return x if u.abs().max() == 0 else self.expmap(x, u)


def first_order_retraction(self, x, u):
    return Sphere.expmap(self, x, u * (1 + u.norm(dim=-1, keepdim=True)))


def untransported(self, x, u, v):
    return self.retr(x, u), v


def through_retr(self, x, u, v):
    y = self.projx(x + u)
    return y, self.proju(y, v)


# Law, what is wrong, and the manifold that has it wrong.
MUTATIONS: list[tuple[str, str, geoopt.Manifold]] = [
    (
        "shapes",
        "keepdim ignored",
        broken(
            Sphere, inner=lambda self, x, u, v=None, *, keepdim=False: dot(u, u if v is None else v)
        ),
    ),
    (
        "shapes",
        "precision lost",
        broken(Sphere, logmap=lambda self, x, y: Sphere.logmap(self, x, y).float()),
    ),
    ("arguments_unchanged", "gradient in place", broken(Sphere, egrad2rgrad=in_place_gradient)),
    (
        "batching",
        "sum over the batch",
        broken(Sphere, proju=lambda self, x, u: u - (x * u).sum() * x),
    ),
    (
        "broadcasting",
        "concatenation",
        broken(Sphere, expmap=lambda self, x, u: Sphere.expmap(self, x, torch.stack([x, u])[1])),
    ),
    ("vmap", "branch on values", broken(Sphere, retr=branching_retr)),
    ("single_precision", "bfloat16 inside", broken(Sphere, egrad2rgrad=coarse_gradient)),
    (
        "valid_points",
        "rejects all",
        broken(Sphere, _check_vector_on_tangent=lambda self, x, u, **_: (False, "no")),
    ),
    (
        "wrong_shape",
        "accepts all",
        broken(Sphere, _check_shape=lambda self, shape, name: (True, None)),
    ),
    (
        "invalid_points",
        "accepts all",
        broken(Sphere, _check_point_on_manifold=lambda self, x, **_: (True, None)),
    ),
    (
        "invalid_points",
        "no reason",
        broken(
            Sphere,
            _check_vector_on_tangent=lambda self, x, u, **_: (
                bool(dot(x, u).abs().max() < 1e-4),
                None,
            ),
        ),
    ),
    (
        "nan_points",
        "compares the wrong way",
        broken(
            Sphere,
            _check_point_on_manifold=lambda self, x, **_: (
                (False, "norm") if ((x.norm(dim=-1) - 1).abs() > 1e-4).any() else (True, None)
            ),
        ),
    ),
    (
        "point_projection",
        "moves valid points",
        broken(Sphere, projx=lambda self, x: -x / x.norm(dim=-1, keepdim=True)),
    ),
    ("point_projection", "not idempotent", broken(Directions, projx=lambda self, x: 1.001 * x)),
    (
        "projections",
        "not idempotent",
        broken(Sphere, proju=lambda self, x, u: 0.5 * Sphere.proju(self, x, u)),
    ),
    (
        "projections",
        "not linear",
        broken(Sphere, proju=lambda self, x, u: Sphere.proju(self, x, u.abs())),
    ),
    ("projections", "not tangent", broken(Sphere, proju=lambda self, x, u: u)),
    (
        "self_adjoint_projection",
        "oblique",
        broken(Directions, proju=lambda self, x, u: u - u[..., :1] / x[..., :1] * x),
    ),
    ("metric", "asymmetric", broken(Sphere, inner=asymmetric_inner)),
    ("metric", "indefinite", broken(Sphere, inner=lorentzian_inner)),
    ("metric", "negative", broken(Sphere, inner=scaled_by(-1, "inner"))),
    (
        "metric",
        "not bilinear",
        broken(
            Sphere,
            inner=lambda self, x, u, v=None, *, keepdim=False: dot(
                u, u if v is None else v, keepdim
            ).abs(),
        ),
    ),
    (
        "norm",
        "not the root",
        broken(Sphere, norm=lambda self, x, u, *, keepdim=False: self.inner(x, u, keepdim=keepdim)),
    ),
    ("component_inner", "entry by entry", broken(Sphere, component_inner=entrywise)),
    (
        "component_inner",
        "entry by entry on a quotient",
        broken(Directions, component_inner=entrywise),
    ),
    (
        "component_inner",
        "too large",
        broken(
            Sphere, component_inner=lambda self, x, u, v=None: 2 * self.inner(x, u, v, keepdim=True)
        ),
    ),
    ("gradient", "factor two", broken(Sphere, egrad2rgrad=scaled_by(2, "proju"))),
    ("gradient", "metric forgotten", broken(Directions, egrad2rgrad=Directions.proju)),
    ("gradient", "not tangent", broken(Sphere, egrad2rgrad=lambda self, x, u: u)),
    ("retr_transp", "vector left behind", broken(Sphere, retr_transp=untransported)),
    ("retr_transp", "another point than retr", broken(Sphere, retr_transp=through_retr)),
    ("expmap_transp", "another point than expmap", broken(Sphere, expmap_transp=through_retr)),
    ("transport", "vector left behind", broken(Sphere, transp=lambda self, x, y, v: v)),
    (
        "transport",
        "not linear",
        broken(Sphere, transp=lambda self, x, y, v: self.proju(y, v.abs())),
    ),
    ("isometric_transport", "projection", broken(Sphere, isometric_transport=True)),
    ("optimisers", "ascends", broken(Sphere, egrad2rgrad=scaled_by(-1, "proju"))),
    (
        "optimisers",
        "leaves the manifold",
        broken(Sphere, retr_transp=lambda self, x, u, v: (1.01 * x + u, v)),
    ),
    (
        "scaled",
        "static method",
        broken(
            Sphere, retr=staticmethod(lambda x, u: (x + u) / (x + u).norm(dim=-1, keepdim=True))
        ),
    ),
    (
        "retraction",
        "factor two",
        broken(Sphere, retr=lambda self, x, u: Sphere.expmap(self, x, 2 * u)),
    ),
    ("retraction", "leaves the manifold", broken(Sphere, retr=lambda self, x, u: x + u)),
    (
        "retraction",
        "does not start at x",
        broken(Sphere, retr=lambda self, x, u: self.projx(x + u + 1e-3)),
    ),
    (
        "retraction_order",
        "factor two",
        broken(Sphere, retr=lambda self, x, u: Sphere.expmap(self, x, 2 * u)),
    ),
    (
        "exponential",
        "factor two",
        broken(Sphere, expmap=lambda self, x, u: Sphere.expmap(self, x, 2 * u)),
    ),
    ("geodesic_speed", "a second-order retraction", broken(Sphere, expmap=second_order_retraction)),
    ("geodesic_speed", "a first-order retraction", broken(Sphere, expmap=first_order_retraction)),
    ("geodesic_flow", "a second-order retraction", broken(Sphere, expmap=second_order_retraction)),
    ("geodesic_variation", "small circles", broken(Sphere, expmap=small_circle)),
    (
        "geodesic_variation",
        "a second-order retraction",
        broken(Sphere, expmap=second_order_retraction),
    ),
    (
        "geodesic_distance",
        "a second-order retraction",
        broken(Sphere, expmap=second_order_retraction),
    ),
    (
        "geodesic_distance",
        "chord instead of arc",
        broken(
            Sphere, dist=lambda self, x, y, *, keepdim=False: (x - y).norm(dim=-1, keepdim=keepdim)
        ),
    ),
    ("exp_log", "scaled logarithm", broken(Sphere, logmap=scaled_by(1.001, "logmap"))),
    (
        "exp_log",
        "projection as logarithm",
        broken(Sphere, logmap=lambda self, x, y: self.proju(x, y - x)),
    ),
    ("exp_log", "not aligned", broken(Directions, logmap=lambda self, x, y: y - x)),
    (
        "log_distance",
        "scaled distance",
        broken(Directions, dist=scaled_by(1.001, "dist", Directions)),
    ),
    (
        "distance",
        "asymmetric",
        broken(
            Sphere,
            dist=lambda self, x, y, *, keepdim=False: (
                Sphere.dist(self, x, y, keepdim=keepdim) * (2 + x[..., :1].sum(-1, keepdim=keepdim))
            ),
        ),
    ),
    (
        "distance",
        "squared",
        broken(
            Sphere,
            dist=lambda self, x, y, *, keepdim=False: torch.expm1(
                2 * Sphere.dist(self, x, y, keepdim=keepdim)
            ),
        ),
    ),
    (
        "distance",
        "dist2 is no square",
        broken(Sphere, dist2=lambda self, x, y, *, keepdim=False: dot(x - y, x - y, keepdim)),
    ),
    ("distance_to_itself", "clamped", broken(Sphere, dist=geoopt.Sphere.dist)),
    ("distance_gradient", "partly detached", broken(Sphere, dist=half_detached_dist)),
    ("distance_gradient", "factor two", broken(Sphere, egrad2rgrad=scaled_by(2, "proju"))),
    ("finite_gradients", "acos at one", broken(Sphere, dist=unstable_dist)),
    ("gradient_slope", "factor two", broken(Sphere, egrad2rgrad=scaled_by(2, "proju"))),
    (
        "gradient_slope",
        "wrong retraction",
        broken(Sphere, retr=lambda self, x, u: Sphere.expmap(self, x, 2 * u)),
    ),
    (
        "hessian",
        "no connection term",
        broken(Sphere, ehess2rhess=lambda self, x, egrad, ehess, u: self.proju(x, ehess)),
    ),
    (
        "hessian",
        "connection term of the wrong sign",
        broken(
            Sphere,
            ehess2rhess=lambda self, x, egrad, ehess, u: (
                self.proju(x, ehess) + dot(x, egrad, True) * u
            ),
        ),
    ),
    (
        "hessian",
        "metric forgotten",
        broken(Directions, ehess2rhess=lambda self, x, egrad, ehess, u: self.proju(x, ehess)),
    ),
    (
        "hessian",
        "not tangent",
        broken(
            Sphere, ehess2rhess=lambda self, x, egrad, ehess, u: ehess - dot(x, egrad, True) * u
        ),
    ),
    ("representatives", "no alignment", broken(ProjectiveSpace, align=lambda self, x, y: y)),
    (
        "representatives",
        "leaves the class",
        broken(Directions, align=lambda self, x, y: self.proju(x, y)),
    ),
    (
        "gauge_invariance",
        "Euclidean metric",
        broken(
            Directions,
            inner=lambda self, x, u, v=None, *, keepdim=False: dot(
                u, u if v is None else v, keepdim
            ),
        ),
    ),
    ("gauge_invariance", "distance in the total space", broken(ProjectiveSpace, dist=Sphere.dist)),
    ("gauge_equivariance", "metric forgotten", broken(Directions, egrad2rgrad=Directions.proju)),
    (
        "gauge_equivariance",
        "logarithm of the sphere",
        broken(
            Directions,
            logmap=lambda self, x, y: Directions.logmap(self, x / x.norm(dim=-1, keepdim=True), y),
        ),
    ),
    (
        "gauge_equivariance",
        "retraction with a fixed step",
        broken(Directions, retr=lambda self, x, u: x + u / x.norm(dim=-1, keepdim=True)),
    ),
    ("horizontality", "total gradient", broken(Directions, proju=lambda self, x, u: u)),
    (
        "horizontality",
        "oblique",
        broken(Directions, proju=lambda self, x, u: u - u[..., :1] / x[..., :1] * x),
    ),
    (
        "horizontality",
        "exponential drifts along the class",
        broken(Directions, expmap=vertical_expmap),
    ),
    (
        "optimiser_equivariance",
        "Euclidean second moment",
        broken(Directions, component_inner=lambda self, x, u, v=None: dot(u, u, True)),
    ),
]


@pytest.mark.parametrize(
    ("law", "manifold"),
    [pytest.param(law, manifold, id=f"{law}: {what}") for law, what, manifold in MUTATIONS],
)
def test_mutations_are_caught_by_the_right_law(law, manifold):
    base = type(manifold).__mro__[1]
    options = {"laws": [law], "shape": (3,), "batch": (2,)}
    assert check_manifold(base(), **options).results[0].status in ("passed", "skipped")
    with pytest.raises(ContractViolation) as caught:
        check_manifold(manifold, **options)
    assert caught.value.report.failed == (law,)


def test_every_law_has_a_mutation_that_it_catches():
    assert {law for law, *_ in MUTATIONS} == set(list_laws())


def test_a_retraction_posing_as_exponential_is_named_by_its_order():
    manifold = broken(Sphere, expmap=second_order_retraction)
    report = check_manifold(manifold, laws=["geodesic_distance"], raise_on_failure=False)
    assert "it holds to order 3" in str(report["geodesic_distance"].worst)


def test_exact_false_asks_for_orders_only():
    laws = ["geodesic_distance", "exp_log", "log_distance", "distance_gradient"]
    second = broken(Sphere, expmap=second_order_retraction)
    assert not check_manifold(second, laws=laws, exact=False).failed
    # An inverse retraction of first order is enough for a logarithm, but not for a distance.
    first = broken(Sphere, expmap=first_order_retraction)
    report = check_manifold(first, laws=laws, exact=False, raise_on_failure=False)
    assert report.failed == ("geodesic_distance",)
    assert report["geodesic_distance"].failures[0].value == pytest.approx(2, abs=0.1)
    wrong = broken(Sphere, logmap=scaled_by(1.01, "logmap"))
    report = check_manifold(wrong, laws=laws, exact=False, raise_on_failure=False)
    assert report.failed == ("exp_log", "log_distance", "distance_gradient")


def test_strict_sees_a_projection_that_moves_the_last_bit():
    manifold = broken(Directions, projx=one_ulp_off)
    check_manifold(manifold, laws=["point_projection"])
    with pytest.raises(ContractViolation, match="changes the bits"):
        check_manifold(manifold, laws=["point_projection"], strict=True)
