"""The Fréchet mean: argmin over x of Σᵢ wᵢ d(x, xᵢ)ᵖ on any manifold."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, has_logmap
from manifold_merge.anchors import checked_anchors, normalized_weights
from manifold_merge.collective import collective_mean
from manifold_merge.fisher import ConstantMetric
from manifold_merge.fisher_mean import mean_with_metrics
from manifold_merge.implicit import differentiable
from manifold_merge.linalg import stack_points
from manifold_merge.newton import has_newton
from manifold_merge.quotient import QuotientManifold
from manifold_merge.sharded import is_sharded, sharded_mean
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solver_dispatch import (
    Solver,
    checked_solver,
    default_iterations,
    run_solver,
    solver_name,
)
from manifold_merge.solvers import Problem, closed_form_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FrechetSolution", "Status", "frechet_mean", "normalized_weights"]

logger = logging.getLogger(__name__)


@differentiable
def frechet_mean(
    manifold: geoopt.Manifold,
    points: Tensor | Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    solver: Solver = "auto",
    p: int = 2,
    metrics: Sequence[ConstantMetric] | None = None,
    rank: int | None = None,
    start: Tensor | None = None,
    starts: str = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    gauge_check: bool = False,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> FrechetSolution:
    """Compute the weighted Fréchet mean (p = 2) or geometric median (p = 1) of points.

    The batch dimensions are solved together and each element stops on its own. The answer does
    not depend on the order of the points. Gradients flow from ``point`` to points and weights that
    require them (:mod:`manifold_merge.implicit`).

    Args:
        manifold: Any geoopt manifold with ``logmap``; the distance that is averaged is the
            manifold's own.
        points: Anchors, ``(k, ..., *point)``, or a sequence of k tensors ``(..., *point)``. On a
            ``LoRAQuotient`` their ranks may differ. DTensors, of which each process holds a part,
            have means on ``geoopt.Euclidean``, medians with ``ndim=0``, and means with
            ``FisherEuclidean`` metrics.
        weights: ``(k,)`` or ``(k, ...)``; normalised to sum 1. Equal if ``None``.
        solver: ``"auto"`` (the closed form where there is one, else ``"newton"`` where it is
            known, else ``"karcher"``), ``"closed_form"``, ``"newton"`` (spheres and positive
            definite matrices), ``"karcher"`` (gradient steps of length one, shortened until the
            objective decreases), ``"trust_region"`` or ``"conjugate_gradient"`` (pymanopt's), a
            geoopt optimiser, class or instance, or an instance of a pymanopt optimiser. An
            instance lends its options; its own parameters are not touched.
        p: 2 for the mean, 1 for the median (Weiszfeld steps; Fletcher, Venkatasubramanian and
            Joshi 2009).
        metrics: One constant metric for each anchor, in which its distance is measured: the mean
            is then argmin Σ wᵢ dᵢ(x, xᵢ)ᵖ. ``FisherEuclidean`` gives Fisher merging,
            ``KroneckerFisher`` RegMean or, with both sides, MaTS; on a ``LoRAQuotient`` they are
            ``KroneckerFisher`` metrics of the products. ``solver`` is then ``"auto"``,
            ``"closed_form"`` or ``"conjugate_gradient"``.
        rank: Rank of the mean on manifolds of low-rank products; the greatest of the anchors'
            ranks if ``None``.
        start: Where to start, ``(..., *point)``.
        starts: ``"auto"``: one start that treats all anchors alike, or the anchor of least
            objective; ``"anchors"``: from each anchor as well, the least objective wins.
        tolerance: Gradient norm, relative to the spread of the anchors, at which an element has
            converged; depends on the dtype if ``None``.
        max_iterations: Greatest number of iterations; by default 200, or 3000 for geoopt's
            optimisers. An instance of a pymanopt optimiser has its own limit.
        gauge_check: Recompute the mean from random representatives and report the difference.
        generator: Source of randomness for ``gauge_check``.
        process_group: Processes among which the anchors are spread, such as
            ``torch.distributed.group.WORLD`` (``None`` before ``init_process_group``): each passes
            its own ``points``, at least one, and their ``weights``, and receives the mean of all.
            ``solver`` is then ``"auto"``, ``"karcher"``, or ``"closed_form"`` for weighted sums,
            and ``metrics`` are ``FisherEuclidean``.

    Returns:
        The mean with objective, gradient norm, iterations, status and remedy.

    Raises:
        ValueError: If points, weights or options do not fit; the message says what was expected.
            With ``process_group``, it is raised in every process and numbers the one at fault.
        NotImplementedError: If the manifold has no ``logmap`` and the mean no closed form.

    Source: Karcher (1977); merging as Fréchet averaging, arXiv:2604.27155.

    Example:
        The mean of 1 and 4 is 2.5 or 2: it depends on the geometry.

        >>> import torch
        >>> from manifold_merge import LoRAQuotient
        >>> points = torch.tensor([[[1.0], [1.0]], [[2.0], [2.0]]], dtype=torch.float64)
        >>> for metric in ("mixed", "invariant"):
        ...     toy = LoRAQuotient(1, 1, metric=metric)
        ...     print(round(float(toy.product(frechet_mean(toy, points).point)), 6))
        2.5
        2.0
    """
    if process_group is not None:
        result = collective_mean(
            manifold, points, weights, process_group, solver=solver, p=p, metrics=metrics,
            rank=rank, start=start, starts=starts, tolerance=tolerance,
            max_iterations=max_iterations, gauge_check=gauge_check, generator=generator,
        )  # fmt: skip
        if not result.converged:
            logger.warning("frechet_mean: %s", result.message)
        return result
    if is_sharded(points) or (not isinstance(points, Tensor) and any(map(is_sharded, points))):
        return sharded_mean(
            manifold, points, weights, frechet_mean, p=p, metrics=metrics, solver=solver,
            rank=rank, start=start, starts=starts, tolerance=tolerance,
            max_iterations=max_iterations, gauge_check=gauge_check,
        )  # fmt: skip
    anchors = checked_anchors(manifold, points)
    if metrics is not None:
        if start is not None:
            raise ValueError("start: means with metrics= need none; leave it out")
        result = mean_with_metrics(
            manifold, list(anchors), normalized_weights(weights, len(anchors), like=anchors[0]),
            metrics, p=p, rank=rank, solver=solver, tolerance=tolerance,
            max_iterations=max_iterations, gauge_check=gauge_check, generator=generator,
        )  # fmt: skip
        if not result.converged:
            logger.warning("frechet_mean: %s", result.message)
        return result
    solver = checked_solver(solver, manifold)
    if p not in (1, 2):
        raise ValueError(f"p must be 2 (mean) or 1 (median); got {p!r}")
    if starts not in ("auto", "anchors"):
        raise ValueError(f"starts must be 'auto' or 'anchors'; got {starts!r}")
    if tolerance is None:
        tolerance = torch.finfo(anchors[0].dtype).eps ** (2 / 3)
    exact, closed = accurate(manifold), closed_form_of(manifold)
    if solver == "closed_form" and closed is None:
        raise ValueError(
            f"solver='closed_form': the mean on {manifold} has no closed form; use 'karcher'"
        )
    if solver == "auto" and closed is not None:
        solver = "closed_form"
    elif solver == "auto" and p == 2 and has_newton(exact, tuple(anchors[0].shape)):
        solver = "newton"
    elif solver == "auto":
        solver = "karcher" if has_logmap(exact) else "conjugate_gradient"
    signed = solver == "closed_form" and p == 2
    w = normalized_weights(weights, len(anchors), like=anchors[0], negative=signed)

    # An anchor without weight takes no part, however far away it is.
    full_weights, present = w, w.flatten(1).any(1) if w.ndim > 1 else w != 0
    if weights is not None and not bool(present.all()):
        w, anchors = w[present], [x for x, here in zip(anchors, present, strict=True) if here]
    everything = anchors if start is None else [*anchors, start]
    space, stacked, restore = _reduced(manifold, exact, everything, rank)
    # All batch dimensions become one, so that elements can stop on their own.
    inside = stacked.ndim - manifold.ndim
    batch, point = stacked.shape[1:inside], stacked.shape[inside:]
    w = w.reshape((*w.shape, *(1,) * (len(batch) + 1 - w.ndim))).expand(len(anchors), *batch)
    flat = stacked.reshape(len(stacked), -1, *point)
    problem = Problem(
        space,
        flat[: len(anchors)],
        w.reshape(len(anchors), -1),
        p,
        rank,
        tolerance,
        default_iterations(solver) if max_iterations is None else max_iterations,
    )
    if solver == "closed_form":
        result = problem.closed_form()
    else:
        begin: list[Tensor | None] = [None if start is None else flat[-1]]
        if start is None and not (starts == "auto" and solver == "newton"):
            begin = [*problem.starts(starts)]
        result = problem.best_of(begin, lambda x: run_solver(problem, x, solver))
    result = dataclasses.replace(
        result,
        point=restore(result.point.reshape(*batch, *result.point.shape[1:])),
        objective=result.objective.reshape(batch),
        gradient_norm=result.gradient_norm.reshape(batch),
        iterations=result.iterations.reshape(batch),
        status=result.status.reshape(batch),
        weights=full_weights,
        solver=solver if isinstance(solver, str) else solver_name(solver),
    )

    if gauge_check:
        if not isinstance(manifold, QuotientManifold):
            raise ValueError(f"gauge_check: {manifold} is not a quotient manifold, it has no gauge")
        moved = [
            manifold.random_representative(x, generator=generator, condition=100.0) for x in anchors
        ]
        other = frechet_mean(
            manifold,
            moved,
            w,
            solver=solver,
            p=p,
            rank=rank,
            start=start,
            starts=starts,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        residual = manifold.relative_difference(result.point, other.point)
        result = dataclasses.replace(result, gauge_residual=residual)
    if not result.converged:
        logger.warning("frechet_mean: %s", result.message)
    return result


def _reduced(
    manifold: geoopt.Manifold, exact: Any, anchors: Tensor | list[Tensor], rank: int | None
) -> tuple[Any, Tensor, Callable[[Tensor], Tensor]]:
    if isinstance(manifold, QuotientManifold):
        return manifold.reduce(list(anchors), rank=rank)
    if rank is not None:
        raise ValueError(f"rank: points of {manifold} have no rank to choose; leave it out")
    stacked = anchors if isinstance(anchors, Tensor) else stack_points(anchors)
    return exact, stacked, lambda x: x
