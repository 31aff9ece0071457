"""The contract suite: right manifolds pass, known defects are found, reports say enough."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from checks_examples import Directions, ProjectiveSpace, Sphere, broken, scaled_by

import manifold_merge
from manifold_merge import QuotientManifold, checks
from manifold_merge.accurate import accurate
from manifold_merge.checks import (
    LAWS,
    CheckReport,
    ContractViolation,
    Measurement,
    check_manifold,
    list_laws,
    register_law,
)

# --- positive cases: right manifolds pass ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A manifold, and why it breaks the laws that are left out."""

    manifold: geoopt.Manifold
    defects: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    double: bool = False  # works only where torch's default precision is float64


ACOS = "dist(x, x) is 4.5e-4: the argument of acos is clamped away from 1"
CAT = "concatenates x and u, which must then have the same batch dimensions"
KEEPDIM = "inner(keepdim=False) multiplies a factor that kept its dimension with one that did not"
EIGENVALUES = "the derivative of eigh is not finite where eigenvalues coincide"
OTHER_METRIC = dict.fromkeys(
    ["geodesic_distance", "log_distance", "distance_gradient"],
    "dist is that of another metric than inner, expmap and logmap",
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # geoopt says itself that these two are incomplete
    NOT_AIM_METRICS = {name: geoopt.SymmetricPositiveDefinite(name) for name in ("LEM", "SM")}
STEREOGRAPHIC = dict.fromkeys(["shapes", "batching", "broadcasting", "vmap"], KEEPDIM)
NO_PROJECTION = "proju(x, u) projects x * u, which is no projection"

GEOOPT = {
    "Euclidean(0)": Case(geoopt.Euclidean()),
    "Euclidean(1)": Case(geoopt.Euclidean(1)),
    "Euclidean(2)": Case(geoopt.Euclidean(2)),
    "Sphere": Case(geoopt.Sphere(), {"distance_to_itself": ACOS}),
    "SphereExact": Case(geoopt.SphereExact(), {"distance_to_itself": ACOS}),
    "SPD(AIM)": Case(
        geoopt.SymmetricPositiveDefinite(), {"finite_gradients": EIGENVALUES}, {"shape": (3, 3)}
    ),
    "SPD(LEM)": Case(
        NOT_AIM_METRICS["LEM"],
        {**OTHER_METRIC, "finite_gradients": EIGENVALUES},
        {"shape": (3, 3)},
    ),
    "SPD(SM)": Case(
        NOT_AIM_METRICS["SM"],
        {**OTHER_METRIC, "distance": "the Stein divergence is a squared distance"},
        {"shape": (3, 3)},
    ),
    "EuclideanStiefel": Case(geoopt.EuclideanStiefel(), {"broadcasting": CAT}),
    "EuclideanStiefelExact": Case(geoopt.EuclideanStiefelExact(), {"broadcasting": CAT}),
    "PoincareBall": Case(geoopt.PoincareBall(), STEREOGRAPHIC),
    "PoincareBallExact": Case(geoopt.PoincareBallExact(), STEREOGRAPHIC),
    "SphereProjection": Case(geoopt.SphereProjection(), STEREOGRAPHIC),
    "Lorentz": Case(
        geoopt.Lorentz(),
        {
            "arguments_unchanged": "egrad2rgrad flips the sign of the gradient's first entry",
            "finite_gradients": "arcosh has an infinite slope at 1",
            "norm": "norm takes no point",
            "single_precision": "the checks compare with a zero of torch's default precision",
        },
        double=True,
    ),
    "Product": Case(
        geoopt.ProductManifold(
            (Sphere(), 3), (geoopt.Euclidean(1), 2), (geoopt.SymmetricPositiveDefinite(), (2, 2))
        ),
        {
            "wrong_shape": "_check_shape reads shape[-1] of a scalar",
            "finite_gradients": EIGENVALUES,
        },
    ),
    "BirkhoffPolytope": Case(
        geoopt.BirkhoffPolytope(max_iter=500, tol=1e-10),
        {
            "vmap": "torch.jit code that tests values",
            **dict.fromkeys(
                [
                    "projections",
                    "self_adjoint_projection",
                    "component_inner",
                    "gradient",
                    "retr_transp",
                    "expmap_transp",
                    "transport",
                    "gradient_slope",
                ],
                NO_PROJECTION,
            ),
            **dict.fromkeys(["geodesic_speed", "geodesic_variation"], "expmap is retr"),
        },
        {"shape": (4, 4)},
    ),
    "our Sphere": Case(Sphere()),
    "ProjectiveSpace": Case(ProjectiveSpace()),
    "Directions": Case(Directions(), options={"strict": True}),
}


# What the solvers put in the place of geoopt's manifolds; the rest of the defects is inherited.
ROOT = "the square root of a squared chord has no derivative at 0"
ACCURATE = {
    name: Case(accurate(GEOOPT[name].manifold), defects, GEOOPT[name].options, GEOOPT[name].double)
    for name, defects in {
        "Sphere": {},
        "SphereExact": {},
        "SPD(AIM)": {"finite_gradients": EIGENVALUES},
        "EuclideanStiefel": {},
        "EuclideanStiefelExact": {},
        "Lorentz": {**GEOOPT["Lorentz"].defects, "finite_gradients": ROOT},
        "Product": GEOOPT["Product"].defects,
    }.items()
}


@pytest.fixture
def default_precision(request):
    """Torch's default precision while a case runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if request.param else torch.float32)
    yield
    torch.set_default_dtype(before)


def cases(*batches: tuple[int, ...], of: dict[str, Case] = GEOOPT) -> Any:
    """Parametrise over cases and the given batch shapes."""
    return pytest.mark.parametrize(
        ("case", "batch", "default_precision"),
        [
            pytest.param(case, batch, case.double, id=f"{name}-{batch}")
            for name, case in of.items()
            for batch in batches
        ],
        indirect=["default_precision"],
    )


@cases((), (2,), (2, 1))
def test_right_manifolds_keep_every_law(case, batch, default_precision):
    report = check_manifold(case.manifold, batch=batch, skip=tuple(case.defects), **case.options)
    assert not report.failed
    # What is neither passed nor named above must be something the manifold does not have.
    for name in set(report.skipped) - set(case.defects):
        assert any(
            why in report[name].reason
            for why in (
                "is not implemented",
                "ehess2rhess",
                "not a quotient",
                "no constraint",
                "no dimensions of their own",
                "reported only",
                "accepts NaN as a vector",  # reported only as well
            )
        ), report[name]


@cases((), (2, 1), of=ACCURATE)
def test_manifolds_of_the_solvers_keep_every_law(case, batch, default_precision):
    assert isinstance(case.manifold, geoopt.Manifold)
    report = check_manifold(case.manifold, batch=batch, skip=tuple(case.defects), **case.options)
    assert not report.failed


def test_every_manifold_has_a_contract_test():
    """By name, in the files that call the suite."""
    files = Path(__file__).parent.glob("test_*.py")
    text = "".join(x for x in (f.read_text("utf-8") for f in files) if "check_manifold(" in x)
    classes = [getattr(manifold_merge, name) for name in manifold_merge.__all__]
    manifolds = {x.__name__ for x in classes if inspect.isclass(x)
                 and issubclass(x, geoopt.Manifold) and not inspect.isabstract(x)}  # fmt: skip
    assert len(manifolds) >= 7
    assert not {name for name in manifolds if f"{name}(" not in text}


@cases((2,), of={name: case for name, case in GEOOPT.items() if case.defects})
def test_documented_defects_are_caught(case, batch, default_precision):
    with pytest.raises(ContractViolation) as caught:
        check_manifold(case.manifold, batch=batch, laws=tuple(case.defects), **case.options)
    assert set(caught.value.report.failed) == set(case.defects)


@pytest.mark.parametrize("law", ["retraction", "exponential", "gradient_slope"])
def test_canonical_stiefel_is_wrong_at_first_order(law):
    # DR(0)[u] = u + x x^T u instead of u: the error is of order 1 where it must be of order 2.
    report = check_manifold(geoopt.CanonicalStiefel(), raise_on_failure=False)
    assert law in report.failed
    (order,) = (m for m in report[law].failures if m.what.startswith("order of"))
    assert order.value == pytest.approx(1, abs=0.05)


def test_sphere_distance_to_itself_is_measured():
    found = check_manifold(geoopt.Sphere(), laws=["distance_to_itself"], raise_on_failure=False)
    assert found["distance_to_itself"].worst.value == pytest.approx(4.5e-4, rel=0.01)
    found = check_manifold(
        geoopt.Sphere(),
        laws=["distance_to_itself"],
        dtype=torch.float32,
        raise_on_failure=False,
    )
    assert found["distance_to_itself"].worst.value == pytest.approx(1.4e-2, rel=0.02)


@pytest.mark.parametrize("manifold", [Sphere(), ProjectiveSpace(), Directions()], ids=repr)
def test_right_manifolds_pass_in_single_precision(manifold):
    report = check_manifold(manifold, batch=(2,), dtype=torch.float32)
    assert "single_precision" in report.skipped
    assert {"hessian", "geodesic_variation", "exp_log"} <= set(report.passed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("manifold", [Sphere(), ProjectiveSpace(), Directions()], ids=repr)
def test_right_manifolds_pass_for_any_seed(manifold, seed):
    check_manifold(manifold, shape=(3,), seed=seed)


# --- the suite itself -----------------------------------------------------------------------------


def test_every_law_is_a_public_documented_function():
    for name in list_laws():
        check = getattr(checks, f"check_{name}")
        assert f"check_{name}" in checks.__all__
        assert check.__doc__.splitlines()[0] == list_laws()[name]
        assert f"``{name}``" in checks.__doc__
        assert list(inspect.signature(check).parameters) == ["manifold", "options"]
    assert all(law.remedy for law in LAWS.values())


def test_a_law_can_be_called_alone():
    report = checks.check_gradient(Sphere(), shape=(4,))
    assert isinstance(report, CheckReport)
    assert report.passed == ("gradient",)
    with pytest.raises(ContractViolation):
        checks.check_gradient(broken(Sphere, egrad2rgrad=scaled_by(2, "proju")))


def test_the_violation_tells_law_number_tolerance_and_remedy():
    manifold = broken(Sphere, egrad2rgrad=scaled_by(2, "proju"), norm=scaled_by(3, "inner"))
    with pytest.raises(ContractViolation) as caught:
        check_manifold(manifold, shape=(4,))
    message, report = str(caught.value), caught.value.report
    assert {"gradient", "norm"} <= set(report.failed)
    for name in report.failed:
        assert f"* {name}" in message
        assert LAWS[name].remedy in message
        assert all(str(m) in message for m in report[name].failures)
    assert "must be <= 1.49e-08" in message
    assert isinstance(caught.value, AssertionError)


def test_the_report_prints_one_line_for_each_law():
    report = check_manifold(Sphere(), shape=(4,), skip=["vmap"])
    lines = str(report).splitlines()
    assert "points (4,), batch (), torch.float64" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(list_laws())
    assert report["vmap"].reason == "left out by the caller"
    assert "vmap" in report.skipped
    with pytest.raises(KeyError, match="no law named"):
        report["no such law"]


def test_missing_methods_are_skipped_with_their_names():
    report = check_manifold(geoopt.EuclideanStiefel(), skip=["broadcasting"])
    assert report["distance"].reason == "dist is not implemented"
    assert report["exp_log"].reason == "logmap is not implemented"


def test_a_law_that_ran_in_part_says_so_and_still_fails_on_what_it_saw():
    def no_log(self, x, y):
        raise NotImplementedError

    report = check_manifold(broken(Directions, logmap=no_log), raise_on_failure=False)
    assert report["gauge_equivariance"].status == "passed"
    assert report["gauge_equivariance"].reason == "in part: no_log is not implemented"
    worse = broken(Directions, logmap=no_log, egrad2rgrad=Directions.proju)
    assert "gauge_equivariance" in check_manifold(worse, raise_on_failure=False).failed


def test_a_crash_is_a_failure_of_its_law_only():
    def crash(self, x, y, v):
        raise RuntimeError("out of luck")

    report = check_manifold(broken(Sphere, transp=crash), raise_on_failure=False)
    assert "RuntimeError: out of luck" in str(report["transport"].failures[0])
    assert "gradient" in report.passed


@pytest.mark.parametrize("argument", ["laws", "skip", "tolerances"])
def test_unknown_names_are_refused(argument):
    value = {"nonsense": 1.0} if argument == "tolerances" else ["nonsense"]
    with pytest.raises(ValueError, match=f"{argument}: expected .* names from list_laws"):
        check_manifold(Sphere(), **{argument: value})
    with pytest.raises(ValueError, match="sequence of names"):
        check_manifold(Sphere(), skip="vmap")


def test_tolerances_of_single_laws():
    manifold = broken(Sphere, logmap=scaled_by(1.0001, "logmap"))
    laws = ["exp_log", "log_distance"]
    report = check_manifold(manifold, laws=laws, raise_on_failure=False)
    assert report.failed == tuple(laws)
    report = check_manifold(
        manifold, laws=laws, tolerances={"exp_log": 1e-3}, raise_on_failure=False
    )
    assert report.failed == ("log_distance",)


def test_points_and_cost_can_be_given():
    points = Sphere().random(4, 2, 3, dtype=torch.float64)
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    seen = []

    def cost(x):
        seen.append(x.shape)
        return ((x - target) ** 2).sum(-1)

    report = check_manifold(Sphere(), points=points, batch=(2,), cost=cost)
    assert "hessian" in report.passed
    assert set(seen) == {(2, 3)}
    with pytest.raises(ValueError, match="batch shape"):
        check_manifold(Sphere(), points=points, batch=(5,))
    # A cost that depends on the representative is no cost on the quotient.
    with pytest.raises(ContractViolation, match="cost"):
        check_manifold(ProjectiveSpace(), points=points[:, 0], cost=lambda x: (x * target).sum(-1))


def test_a_quotient_without_product_gets_a_cost_from_its_distance():
    class WithoutProduct(ProjectiveSpace):
        product = property()  # hides the inherited method: reading it raises AttributeError

    report = check_manifold(WithoutProduct())
    assert {"gradient", "gauge_equivariance", "optimisers"} <= set(report.passed)


def test_the_shape_must_be_known():
    class ThreeDimensional(geoopt.Euclidean):
        def __init__(self):
            super().__init__(ndim=3)

    with pytest.raises(ValueError, match="pass shape="):
        check_manifold(ThreeDimensional())
    assert check_manifold(ThreeDimensional(), shape=(2, 2, 2), laws=["gradient"]).passed


def test_a_class_is_no_manifold():
    with pytest.raises(ValueError, match=r"got the class Sphere; pass Sphere\("):
        check_manifold(geoopt.Sphere)


class Torus(QuotientManifold):
    """Angles modulo whole turns: a discrete group that acts by translations."""

    name = "Torus"

    def __init__(self):
        super().__init__(geoopt.Euclidean(ndim=1))

    def _align(self, x, y):
        return y + 2 * torch.pi * torch.round((x - y) / (2 * torch.pi))

    def random_gauge(self, x, *, generator=None, condition=10.0):
        return lambda y: y + 4 * torch.pi


def test_translations_break_two_laws_whose_remedy_says_why():
    laws = ("gauge_invariance", "gauge_equivariance")
    report = check_manifold(Torus(), shape=(2,), raise_on_failure=False)
    assert report.failed == laws
    assert all("random_gauge must be linear" in report[law].remedy for law in laws)
    assert "representatives" in check_manifold(Torus(), shape=(2,), skip=laws).passed


def test_the_manifold_and_the_global_generator_are_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    manifold = geoopt.PoincareBall()
    one = check_manifold(manifold, raise_on_failure=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert manifold.dtype == torch.float32
    assert str(check_manifold(manifold, raise_on_failure=False)) == str(one)
    # A law gives the same numbers alone as among the others.
    alone = check_manifold(manifold, laws=["transport"])
    assert alone["transport"] == one["transport"]


def test_laws_can_be_added_and_names_are_unique():
    @register_law("has_name", remedy="set the class attribute name")
    def check_has_name(sample):
        """The manifold has a name."""
        yield Measurement("length of the name", len(sample.manifold.name), 1, ">=")

    try:
        assert list_laws()["has_name"] == "The manifold has a name."
        assert check_manifold(Sphere())["has_name"].status == "passed"
        with pytest.raises(ContractViolation, match="set the class attribute name"):
            check_has_name(broken(Sphere, name=""))
        with pytest.raises(ValueError, match="exists already"):
            register_law("has_name", remedy="")
    finally:
        del LAWS["has_name"]


def test_nan_never_keeps_a_bound():
    for sense in ("<=", ">="):
        assert not Measurement("x", float("nan"), 1.0, sense).ok
