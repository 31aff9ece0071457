"""The Fréchet mean: argmin over x of Σᵢ wᵢ d(x, xᵢ)ᵖ on any manifold."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, has_logmap
from manifold_merge.fisher import ConstantMetric
from manifold_merge.fisher_mean import mean_with_metrics
from manifold_merge.implicit import differentiable
from manifold_merge.linalg import all_finite
from manifold_merge.newton import has_newton
from manifold_merge.quotient import QuotientManifold
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solver_dispatch import (
    Solver,
    checked_solver,
    default_iterations,
    run_solver,
    solver_name,
)
from manifold_merge.solvers import Problem, closed_form_of

__all__ = ["FrechetSolution", "Status", "frechet_mean", "normalized_weights"]

logger = logging.getLogger(__name__)


def normalized_weights(
    weights: Sequence[float] | Tensor | None,
    count: int,
    *,
    like: Tensor,
    negative: bool = False,
) -> Tensor:
    """Check weights and divide them by their sum.

    Args:
        weights: One weight for each anchor, ``(k,)``, or for each anchor and batch element,
            ``(k, ...)``; equal weights if ``None``.
        count: Number of anchors k.
        like: Tensor whose dtype and device the result takes.
        negative: Whether negative weights are allowed; the sum has to be positive all the same.

    Returns:
        Weights ``(k, ...)`` with sum 1 over the anchors.

    Raises:
        ValueError: If the number is wrong, an entry is not finite or negative, or the sum is not
            positive.

    Example:
        >>> import torch
        >>> normalized_weights([2, 1, 1], 3, like=torch.zeros(1)).tolist()
        [0.5, 0.25, 0.25]
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=like.dtype, device=like.device)
    w = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if w.ndim == 0 or w.shape[0] != count:
        raise ValueError(f"weights: expected {count}, one for each anchor; got {tuple(w.shape)}")
    if not bool(w.isfinite().all()):
        raise ValueError(f"weights: expected finite numbers, got {w.tolist()}")
    if not negative and bool((w < 0).any()):
        raise ValueError(
            f"weights: {w.tolist()} has a negative entry, for which Σ wᵢ d² need not have a "
            "minimum; use a chordal distance, where it has one, or weights >= 0"
        )
    total = w.sum(0)
    if not bool((total > 0).all()):
        raise ValueError(
            f"weights: the sum must be positive, got {w.tolist()}; a sum without normalisation "
            "is not a mean"
        )
    return w / total


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
) -> FrechetSolution:
    """Compute the weighted Fréchet mean (p = 2) or geometric median (p = 1) of points.

    The batch dimensions are solved together and each element stops on its own. The answer does
    not depend on the order of the points. Gradients flow from ``point`` to points and weights that
    require them (:mod:`manifold_merge.implicit`).

    Args:
        manifold: Any geoopt manifold with ``logmap``; the distance that is averaged is the
            manifold's own.
        points: Anchors, ``(k, ..., *point)``, or a sequence of k tensors ``(..., *point)``. On a
            ``LoRAQuotient`` their ranks may differ.
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

    Returns:
        The mean with objective, gradient norm, iterations, status and remedy.

    Raises:
        ValueError: If points, weights or options do not fit; the message says what was expected.
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
    anchors = _checked_points(manifold, points)
    if metrics is not None:
        if start is not None:
            raise ValueError("start: means with metrics= need none; leave it out")
        result = mean_with_metrics(
            manifold, anchors, normalized_weights(weights, len(anchors), like=anchors[0]), metrics,
            p=p, rank=rank, solver=solver, tolerance=tolerance, max_iterations=max_iterations,
            gauge_check=gauge_check, generator=generator,
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
    closed = closed_form_of(manifold)
    if solver == "closed_form" and closed is None:
        raise ValueError(
            f"solver='closed_form': the mean on {manifold} has no closed form; use 'karcher'"
        )
    if solver == "auto" and closed is not None:
        solver = "closed_form"
    elif solver == "auto" and p == 2 and has_newton(accurate(manifold), tuple(anchors[0].shape)):
        solver = "newton"
    elif solver == "auto":
        solver = "karcher" if has_logmap(accurate(manifold)) else "conjugate_gradient"
    signed = solver == "closed_form" and p == 2
    w = normalized_weights(weights, len(anchors), like=anchors[0], negative=signed)

    # An anchor without weight takes no part, however far away it is.
    full_weights, present = w, w.flatten(1).any(1) if w.ndim > 1 else w != 0
    if not bool(present.all()):
        w, anchors = w[present], [x for x, here in zip(anchors, present, strict=True) if here]
    everything = anchors if start is None else [*anchors, start]
    space, stacked, restore = _reduced(manifold, everything, rank)
    # All batch dimensions become one, so that elements can stop on their own.
    batch, point = stacked.shape[1 : stacked.ndim - manifold.ndim], stacked.shape[-manifold.ndim :]
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
        begin = problem.starts(starts) if start is None else [flat[-1]]
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


def _checked_points(manifold: geoopt.Manifold, points: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(points, Tensor) and points.ndim:
        anchors = list(points.detach().unbind())
    else:
        anchors = [torch.as_tensor(x).detach() for x in points]
    if not anchors:
        raise ValueError("points: at least one anchor is needed, got none")
    dtypes = {x.dtype for x in anchors}
    if len(dtypes) > 1 or not anchors[0].is_floating_point():
        raise ValueError(f"points: one floating-point dtype is expected, got {dtypes}")
    if anchors[0].dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"points: {anchors[0].dtype} has too few digits for a mean; convert the anchors to "
            "float32 or float64 and the result back"
        )
    batches = {tuple(x.shape[: x.ndim - manifold.ndim]) for x in anchors}
    if len(batches) > 1:
        raise ValueError(f"points: anchors have different batch shapes {sorted(batches)}")
    whole = isinstance(points, Tensor) and all_finite(points)
    for i, x in enumerate(anchors[:1] if whole else anchors):  # slices of one tensor are alike
        try:
            manifold.assert_check_point(x)
        except ValueError as error:
            raise ValueError(f"points[{i}]: {error}") from error
        if not all_finite(x):
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"points[{i}]: {bad} entries are NaN or infinite; repair that anchor")
    return anchors


def _reduced(
    manifold: geoopt.Manifold, anchors: list[Tensor], rank: int | None
) -> tuple[Any, Tensor, Callable[[Tensor], Tensor]]:
    if isinstance(manifold, QuotientManifold):
        return manifold.reduce(anchors, rank=rank)
    if rank is not None:
        raise ValueError(f"rank: points of {manifold} have no rank to choose; leave it out")
    return accurate(manifold), torch.stack(anchors), lambda x: x
