"""The frame of the contract suite: what a law is, the sample it is tried on, and the runner.

Users import :mod:`manifold_merge.checks`; this module holds what all laws share.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import geoopt
import torch
from torch import Tensor

from manifold_merge.checks_report import (
    CheckReport,
    ContractViolation,
    LawResult,
    Measurement,
    crash,
)
from manifold_merge.linalg import refuse_class

__all__ = ["LAWS", "Law", "Sample", "check_manifold", "list_laws", "register_law"]

Cost: TypeAlias = Callable[[Tensor], Tensor]


class NotApplicable(Exception):
    """Raised inside a law that has nothing to say about the manifold; the law is skipped."""


@dataclass(frozen=True)
class Law:
    """A law of the contract: a name, a body that measures, and a remedy.

    Attributes:
        name: Name of the law, as in ``skip=``.
        summary: What the law says, in one sentence.
        remedy: What to do when it is broken.
        body: Function of a :class:`Sample` that yields measurements.
    """

    name: str
    summary: str
    remedy: str
    body: Callable[[Sample], Iterator[Measurement]]

    def run(self, sample: Sample) -> LawResult:
        """Measure; a missing optional method skips, any other exception fails the law."""
        measured: list[Measurement] = []
        reason = ""
        sample.generator.manual_seed(zlib.crc32(f"{self.name}{sample.seed}".encode()))
        try:
            for measurement in self.body(sample):
                measured.append(measurement)
        except NotApplicable as error:
            reason = str(error)
        except NotImplementedError as error:
            reason = _name_of_missing(error)
        except Exception as error:  # a crash is a finding of this law, not the end of the suite
            measured.append(crash("the law", error))
        if any(not m.ok for m in measured):
            return LawResult(self.name, "failed", "", tuple(measured), self.remedy)
        if not any(m.required for m in measured):
            why = reason or "; ".join(filter(None, map(str, measured))) or "nothing to measure"
            return LawResult(self.name, "skipped", why, tuple(measured), self.remedy)
        partly = f"in part: {reason}" if reason else ""
        return LawResult(self.name, "passed", partly, tuple(measured), self.remedy)


def _name_of_missing(error: NotImplementedError) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_code.co_name
    detail = f": {error}" if str(error) else ""
    return f"{where} is not implemented{detail}"


LAWS: dict[str, Law] = {}
"""All laws by name, in the order in which they run."""


@dataclass(kw_only=True)
class Sample:
    """Points and vectors on which laws are tried, and the tolerances that apply.

    Attributes:
        manifold: The manifold, converted to ``dtype`` and ``device``.
        points: Three points or more, each ``(*batch, *point)``.
        batch: Batch shape.
        radius: Metric length of random tangent vectors.
        rtol: Relative tolerance of identities.
        slope_tol: How far below its order a log-log slope may lie.
        exact: Whether expmap, logmap and dist claim to be exact.
        strict: Whether ``projx`` must return a valid point bit for bit.
        condition: Condition number of random gauges.
        given_cost: The user's cost, or None.
        seed: Seed of all random draws.
        generator: Source of randomness, seeded anew for each law.
    """

    manifold: geoopt.Manifold
    points: tuple[Tensor, ...]
    batch: tuple[int, ...]
    radius: float
    rtol: float
    slope_tol: float
    exact: bool
    strict: bool
    condition: float
    given_cost: Cost | None
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(device=self.x.device)

    @property
    def x(self) -> Tensor:
        """The base point, ``(*batch, *point)``."""
        return self.points[0]

    @property
    def ndim(self) -> int:
        """Number of dimensions of one point."""
        return int(self.manifold.ndim)

    @property
    def eps(self) -> float:
        """Machine precision."""
        return torch.finfo(self.x.dtype).eps

    @property
    def tiny(self) -> float:
        """Least square of a vector of length ``radius`` that counts as more than round-off."""
        return self.eps * self.radius**2

    def ambient(self, like: Tensor | None = None) -> Tensor:
        """Draw a standard normal array shaped like a point."""
        like = self.x if like is None else like
        return torch.randn(
            like.shape, dtype=like.dtype, device=like.device, generator=self.generator
        )

    def tangent(self, x: Tensor | None = None) -> Tensor:
        """Draw a tangent vector at ``x`` whose metric length is ``radius``."""
        x = self.x if x is None else x
        u = self.manifold.proju(x, self.ambient(x))
        length = self.inner(x, u).clamp(min=0).sqrt()
        # A broken metric must fail its own law, not turn every other law's input into NaN.
        length = torch.where(length > 0, length, torch.ones_like(length))
        return u * (self.radius / length.reshape(length.shape + (1,) * self.ndim))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product of the batch shape, also where ``keepdim=False`` is broken.

        That defect (geoopt's PoincareBall has it) fails the law ``shapes`` and no other.
        """
        value = self.manifold.inner(x, u, v)
        batch = x.shape[: x.dim() - self.ndim]
        if value.shape != batch:
            value = self.manifold.inner(x, u, v, keepdim=True).reshape(batch)
        return value

    def near(self, x: Tensor | None = None) -> Tensor:
        """Draw a point close to ``x``: the retraction of a random tangent vector."""
        x = self.x if x is None else x
        return self.manifold.retr(x, self.tangent(x))

    @property
    def is_quotient(self) -> bool:
        """Whether points are representatives of classes."""
        return hasattr(self.manifold, "random_gauge")

    def gauge(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Draw the action of a random group element on the fibre of ``x``.

        Raises:
            NotApplicable: If the manifold is no quotient.
        """
        if not self.is_quotient:
            raise NotApplicable("not a quotient manifold: it has no random_gauge")
        accepted = inspect.signature(self.manifold.random_gauge).parameters
        options = {"generator": self.generator, "condition": self.condition}
        return self.manifold.random_gauge(x, **{k: v for k, v in options.items() if k in accepted})

    @functools.cached_property
    def cost(self) -> Cost:
        """The user's cost, or a smooth random function that is constant on classes."""
        if self.given_cost is not None:
            return self.given_cost
        product = getattr(self.manifold, "product", None)
        if product is None and self.is_quotient:
            target = self.near()
            return lambda x: 0.5 * self.manifold.dist(x, target) ** 2
        embed: Callable[[Tensor], Tensor] = product if product is not None else lambda x: x
        value = embed(self.x)
        generator = torch.Generator(device=value.device).manual_seed(self.seed)
        slope, curvature, wave = (
            torch.randn(value.shape, dtype=value.dtype, device=value.device, generator=generator)
            for _ in range(3)
        )

        def smooth(x: Tensor) -> Tensor:
            w = embed(x)
            terms = slope * w + 0.5 * curvature.abs() * w * w + 0.5 * torch.sin(wave + w)
            return terms.reshape(*x.shape[: x.dim() - self.ndim], -1).sum(-1)

        return smooth

    def derivatives(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Euclidean gradient of the cost at ``x`` and its directional derivative along ``u``."""
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            (egrad,) = torch.autograd.grad(self.cost(leaf).sum(), leaf, create_graph=u is not None)
            ehess = torch.zeros_like(x)
            if u is not None and egrad.requires_grad:
                (ehess,) = torch.autograd.grad((egrad * u).sum(), leaf)
        return egrad.detach(), ehess

    def explained(self, *arguments: Tensor) -> tuple[bool, str | None]:
        """Ask the manifold whether a point, or a point and a vector, are valid, and why not."""
        check = ("check_point_on_manifold", "check_vector_on_tangent")[len(arguments) - 1]
        tol = max(1e-5, self.rtol)
        ok, reason = getattr(self.manifold, check)(*arguments, explain=True, atol=tol, rtol=tol)
        return bool(ok), reason

    def gap(self, a: Tensor, b: Tensor, scale: float | None = None) -> float:
        """Relative difference of two arrays; infinite where their shapes differ."""
        if a.shape != b.shape:
            return math.inf
        difference = size(a - b)
        scale = max(size(a), size(b)) if scale is None else scale
        return difference if difference == 0 else difference / scale if scale else math.inf

    def class_gap(self, a: Tensor, b: Tensor) -> float:
        """Relative difference of two points, as classes if the manifold is a quotient."""
        if self.is_quotient and a.shape == b.shape:
            if hasattr(self.manifold, "product"):
                return self.gap(self.manifold.product(a), self.manifold.product(b))
            return self.gap(a, self.manifold.align(a, b))
        return self.gap(a, b)

    def close(
        self, what: str, a: Tensor, b: Tensor, *, scale: float | None = None, factor: float = 1.0
    ) -> Measurement:
        """Measure whether two arrays agree to ``factor * rtol``."""
        if a.shape != b.shape:
            what += f" (shapes {tuple(a.shape)} and {tuple(b.shape)})"
        return Measurement(what, self.gap(a, b, scale), factor * self.rtol)

    def same(self, what: str, a: Tensor, b: Tensor, *, factor: float = 1.0) -> Measurement:
        """Measure whether two points agree, as classes if the manifold is a quotient."""
        return Measurement(what, self.class_gap(a, b), factor * self.rtol)


def size(x: Tensor) -> float:
    """Euclidean length of an array, all dimensions together."""
    return float(torch.linalg.vector_norm(x.detach()))


def register_law(
    name: str, *, remedy: str
) -> Callable[[Callable[[Sample], Iterator[Measurement]]], Callable[..., CheckReport]]:
    """Add a law to the table that :func:`check_manifold` runs.

    The decorated function takes a :class:`Sample` and yields :class:`Measurement`; its docstring's
    first line is the law in words. What it becomes is a check of that one law, to be called as
    ``check(manifold, **options)`` with the options of :func:`check_manifold`.

    Args:
        name: Name of the law, unique in the table.
        remedy: What to do when the law is broken.

    Returns:
        The decorator.

    Raises:
        ValueError: If the name is taken; choose another or delete ``LAWS[name]`` first.

    Example:
        >>> import geoopt
        >>> from manifold_merge.checks import LAWS, register_law
        >>> @register_law("origin_is_valid", remedy="return a valid point from origin()")
        ... def check_origin_is_valid(sample):
        ...     "The origin is a point of the manifold."
        ...     origin = sample.manifold.origin(*sample.x.shape, dtype=sample.x.dtype)
        ...     yield sample.close("projx(origin) == origin", sample.manifold.projx(origin), origin)
        >>> check_origin_is_valid(geoopt.SphereExact(), shape=(3,)).failed
        ()
        >>> del LAWS["origin_is_valid"]
    """
    if name in LAWS:
        raise ValueError(f"a law named {name!r} exists already; choose another name")

    def decorate(body: Callable[[Sample], Iterator[Measurement]]) -> Callable[..., CheckReport]:
        summary = (body.__doc__ or name).strip().splitlines()[0]
        LAWS[name] = Law(name, summary, remedy, body)

        @functools.wraps(body)
        def check(manifold: geoopt.Manifold, **options: Any) -> CheckReport:
            return check_manifold(manifold, laws=(name,), **options)

        check.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter("manifold", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD),
            ],
            return_annotation="CheckReport",
        )
        return check

    return decorate


def check_manifold(
    manifold: geoopt.Manifold,
    *,
    shape: Sequence[int] | None = None,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    seed: int = 0,
    points: Tensor | Sequence[Tensor] | None = None,
    cost: Cost | None = None,
    laws: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    radius: float = 0.5,
    rtol: float | None = None,
    tolerances: Mapping[str, float] | None = None,
    slope_tol: float = 0.15,
    exact: bool = True,
    strict: bool = False,
    condition: float = 10.0,
    raise_on_failure: bool = True,
) -> CheckReport:
    """Check that a geoopt manifold keeps every law of its contract.

    A law whose methods the manifold does not implement is skipped with the reason. The manifold is
    not changed: where its buffers have another precision or device, a copy is checked.

    Args:
        manifold: The manifold to check; quotients (see
            :class:`manifold_merge.quotient.QuotientManifold`) get the quotient laws too.
        shape: Shape of one point; guessed where the manifold leaves no doubt.
        batch: Batch shape of the sample points.
        dtype: Precision of the sample points.
        device: Device of the sample points.
        seed: Seed of all random draws; the global random state is left as it was.
        points: Sample points, ``(k, *batch, *shape)`` or a sequence of k points; by default drawn
            with ``manifold.random``.
        cost: Smooth function of points ``(..., *shape)`` with values ``(...)``, constant on classes
            if the manifold is a quotient; by default a random one of ``manifold.product(x)`` where
            that exists, else of ``x``.
        laws: Names of the laws to run; all by default.
        skip: Names of laws to leave out.
        radius: Metric length of the random tangent vectors; take it below the injectivity radius.
        rtol: Relative tolerance of identities; by default the root of machine precision.
        tolerances: Relative tolerances of single laws by name, instead of ``rtol``.
        slope_tol: How far a log-log slope may lie below the order it must show.
        exact: Whether expmap, logmap and dist claim to be exact. False asks only that logmap
            inverts expmap to first order (errors of order 2, as an inverse retraction does) and
            that dist measures geodesics to second order (errors of order 3).
        strict: Whether ``projx`` must leave valid points unchanged bit for bit.
        condition: Condition number of the random gauges.
        raise_on_failure: Whether to raise, rather than only report, broken laws.

    Returns:
        A report of all laws with what was measured; it prints as a table.

    Raises:
        ContractViolation: If laws are broken; it names each with the measured numbers and a remedy.
        ValueError: If a name in ``laws``, ``skip`` or ``tolerances`` is unknown, or no point can be
            drawn; pass ``shape`` or ``points``.

    Example:
        >>> import geoopt
        >>> report = check_manifold(geoopt.Euclidean(ndim=1), shape=(3,))
        >>> report["gradient"].status
        'passed'
    """
    refuse_class(manifold)
    tolerances = dict(tolerances or {})
    for argument, names in {"laws": laws or (), "skip": skip, "tolerances": tolerances}.items():
        unknown = [name for name in names if name not in LAWS]
        if unknown or isinstance(names, str):
            raise ValueError(
                f"{argument}: expected a sequence of names from list_laws(), got {names!r}"
            )
    manifold = convert(manifold, dtype, device)
    drawn = _draw_points(manifold, shape, tuple(batch), dtype, device, seed, points)
    sample = Sample(
        manifold=manifold,
        points=drawn,
        batch=tuple(batch),
        radius=radius,
        rtol=math.sqrt(torch.finfo(dtype).eps) if rtol is None else rtol,
        slope_tol=slope_tol,
        exact=exact,
        strict=strict,
        condition=condition,
        given_cost=cost,
        seed=seed,
    )
    results = []
    for name in LAWS if laws is None else laws:
        law = LAWS[name]
        if name in skip:
            results.append(LawResult(name, "skipped", "left out by the caller", (), law.remedy))
            continue
        default, sample.rtol = sample.rtol, tolerances.get(name, sample.rtol)
        results.append(law.run(sample))
        sample.rtol = default
    point = tuple(drawn[0].shape[len(batch) :])
    subject = f"{manifold!r}, points {point}, batch {tuple(batch)}, {dtype}"
    report = CheckReport(subject, tuple(results))
    if raise_on_failure and not report.ok:
        raise ContractViolation(report)
    return report


def list_laws() -> dict[str, str]:
    """List the names of all laws with what each says, in the order in which they run.

    Returns:
        Sentences by name; iterate over it to make each law a test of its own.

    Example:
        >>> list_laws()["gradient"]
        'The Riemannian gradient represents the differential: <rgrad, v>_x == <egrad, v>.'
    """
    return {name: law.summary for name, law in LAWS.items()}


def convert(
    manifold: geoopt.Manifold, dtype: torch.dtype, device: torch.device | str | None
) -> geoopt.Manifold:
    """Return the manifold itself if its buffers fit, else a converted copy."""
    device = torch.device(device or "cpu")
    tensors = itertools.chain(manifold.parameters(), manifold.buffers())
    floating = [t for t in tensors if t.is_floating_point()]
    if all(t.dtype == dtype and t.device.type == device.type for t in floating):
        return manifold
    return copy.deepcopy(manifold).to(device=device, dtype=dtype)


def _draw_points(
    manifold: geoopt.Manifold,
    shape: Sequence[int] | None,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    seed: int,
    points: Tensor | Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """Take the caller's points and draw what three lack; plain tensors without history."""
    place = torch.device(device or "cpu")
    drawn = [] if points is None else list(points)
    if drawn:
        size_ = tuple(drawn[0].shape)
    else:
        size_ = (*batch, *(_guess_shape(manifold) if shape is None else shape))
    if size_[: len(batch)] != batch or len(size_) != len(batch) + manifold.ndim:
        raise ValueError(
            f"points: expected batch shape {batch} and {manifold.ndim} dimensions of the manifold, "
            f"got shape {size_}"
        )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(drawn) < 3:
            try:
                # An empty size must be passed as one argument or geoopt takes it for none.
                drawn.append(manifold.random(*(size_ or ((),)), dtype=dtype, device=place))
            except NotImplementedError:
                drawn.append(manifold.projx(torch.randn(size_, dtype=dtype, device=place)))
    return tuple(p.detach().as_subclass(Tensor).to(place, dtype, copy=True) for p in drawn)


def _guess_shape(manifold: geoopt.Manifold) -> tuple[int, ...]:
    elements = getattr(manifold, "n_elements", None)
    if elements is not None:
        return (int(elements),)
    candidates: dict[int, list[tuple[int, ...]]] = {0: [()], 1: [(5,)], 2: [(5, 3), (4, 4)]}
    for shape in candidates.get(manifold.ndim, []):
        if manifold.check_point(torch.zeros(shape)):
            return shape
    raise ValueError(f"the shape of a point of {manifold!r} is not known: pass shape= or points=")
