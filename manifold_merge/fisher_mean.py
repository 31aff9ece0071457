"""Means with one Fisher metric for each anchor: argmin over x of Σ wᵢ gᵢ(x - xᵢ, x - xᵢ).

The objective is a quadratic, so the mean solves one linear system, Σ wᵢ gᵢ(x - xᵢ) = 0. It has a
closed form for diagonal metrics (Fisher merging, arXiv:2111.09832) and for Kronecker metrics with
one common side (RegMean, arXiv:2212.09849); else conjugate gradients solve it without forming the
matrix (MaTS, arXiv:2312.04339). With a bound on the rank, a one-sided metric still has a closed
form, and a two-sided one is solved for B and A in turn. Derivations: docs/fisher.md.

Adapters stay in factors throughout: no m x n matrix is formed.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.conjugate_gradient import conjugate_gradient, dot
from manifold_merge.fisher import ConstantMetric, FisherEuclidean, KroneckerFisher
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.fisher_low_rank import (
    low_rank_mean,
    low_rank_objective,
    sides_of,
)
from manifold_merge.fisher_two_sided import mean_output
from manifold_merge.linalg import adjoint
from manifold_merge.lora import LoRAQuotient
from manifold_merge.quotient import QuotientManifold
from manifold_merge.solution import FrechetSolution, Status

__all__ = ["flat_mean", "mean_by_shares", "mean_with_metrics"]

SOLVERS = ("auto", "closed_form", "conjugate_gradient")


def mean_with_metrics(
    manifold: geoopt.Manifold,
    points: Sequence[Tensor],
    weights: Tensor,
    metrics: Sequence[ConstantMetric],
    *,
    p: int = 2,
    rank: int | None = None,
    solver: Any = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    gauge_check: bool = False,
    generator: torch.Generator | None = None,
) -> FrechetSolution:
    """What ``frechet_mean(..., metrics=...)`` solves: argmin of Σ wᵢ dᵢ(x, xᵢ)ᵖ.

    Args:
        manifold: Where x lives: a ``LoRAQuotient`` for adapters, else a flat space.
        points: Anchors, k tensors ``(..., *point)``; on a ``LoRAQuotient`` their ranks may differ.
        weights: ``(k, ...)``, with sum 1.
        metrics: One for each anchor.
        p: 2 for the mean, 1 for the median (Weiszfeld steps).
        rank: Rank of the mean, on a ``LoRAQuotient``.
        solver: ``"closed_form"``, ``"conjugate_gradient"`` or ``"auto"``.
        tolerance: Relative gradient norm at which iterations end.
        max_iterations: Greatest number of iterations; 1000 of conjugate gradients and 200 of
            alternating solves or Weiszfeld steps if ``None``.
        gauge_check: Recompute the mean from random representatives and report the difference.
        generator: Source of randomness for ``gauge_check``.

    Returns:
        The mean with its certificate.

    Raises:
        ValueError: The metrics do not fit the manifold, the anchors or the solver.
    """
    _check_metrics(manifold, points, metrics)
    if p not in (1, 2):
        raise ValueError(f"p must be 2 (mean) or 1 (median); got {p!r}")
    low_rank = isinstance(manifold, LoRAQuotient)
    if rank is not None and not low_rank:
        raise ValueError(f"rank: points of {manifold} have no rank to choose; leave it out")
    if solver not in SOLVERS:
        raise ValueError(
            f"solver must be one of {', '.join(SOLVERS)} with metrics=; got {solver!r}"
        )
    if low_rank and solver == "conjugate_gradient":
        raise ValueError(f"solver={solver!r}: adapters are solved in factors; use 'auto'")
    # An anchor without weight takes no part, however far away it is.
    used = [i for i in range(len(points)) if bool(weights[i].any())]
    some = [metrics[i] for i in used]

    def mean(anchors: Sequence[Tensor]) -> FrechetSolution:
        chosen = [anchors[i] for i in used]

        def solve(w: Tensor) -> FrechetSolution:
            if low_rank:
                return low_rank_mean(
                    manifold, chosen, some, w, rank=rank, tolerance=tolerance,
                    max_iterations=max_iterations or 200,
                )  # fmt: skip
            return flat_mean(
                torch.stack(chosen), some, w, solver=solver, tolerance=tolerance,
                max_iterations=max_iterations or 1000,
            )  # fmt: skip

        solution = solve(weights[used])
        if p == 1:
            solution = _median(
                manifold, chosen, some, weights[used], solve, solution, tolerance,
                max_iterations or 200,
            )  # fmt: skip
        return dataclasses.replace(solution, weights=weights)

    result = mean(points)
    if gauge_check:
        if not isinstance(manifold, QuotientManifold):
            raise ValueError(f"gauge_check: {manifold} is not a quotient manifold, it has no gauge")
        moved = [
            manifold.random_representative(x, generator=generator, condition=100.0) for x in points
        ]
        residual = manifold.relative_difference(result.point, mean(moved).point)
        result = dataclasses.replace(result, gauge_residual=residual)
    return result


def _check_metrics(
    manifold: geoopt.Manifold, points: Sequence[Tensor], metrics: Sequence[ConstantMetric]
) -> None:
    if len(metrics) != len(points):
        raise ValueError(
            f"metrics: expected {len(points)}, one for each anchor; got {len(metrics)}"
        )
    low_rank = isinstance(manifold, LoRAQuotient)
    wanted, ndim = (KroneckerFisher, 2) if low_rank else (ConstantMetric, manifold.ndim)
    for i, metric in enumerate(metrics):
        if not isinstance(metric, wanted) or metric.ndim != ndim:
            raise ValueError(
                f"metrics[{i}]: expected a {wanted.__name__} of points of {ndim} dimensions for "
                f"{manifold}, got {metric}"
            )
    if len({m._point_shape() for m in metrics}) > 1:
        raise ValueError(f"metrics: sizes differ, {[m._point_shape() for m in metrics]}")
    if low_rank and metrics[0]._point_shape() != (manifold.out_features, manifold.in_features):
        raise ValueError(f"metrics: size {metrics[0]._point_shape()} does not fit {manifold}")


def _median(
    manifold: geoopt.Manifold,
    points: Sequence[Tensor],
    metrics: Sequence[ConstantMetric],
    weights: Tensor,
    solve: Callable[[Tensor], FrechetSolution],
    solution: FrechetSolution,
    tolerance: float | None,
    max_iterations: int,
) -> FrechetSolution:
    """Weiszfeld steps: each is a mean with weights divided by the distances."""
    batch = points[0].shape[: points[0].ndim - manifold.ndim]
    shares = weights.reshape((*weights.shape, *(1,) * (len(batch) + 1 - weights.ndim)))
    shares = shares.expand(len(points), *batch)
    tolerance = torch.finfo(points[0].dtype).eps ** 0.5 if tolerance is None else tolerance
    objective, count = points[0].new_full(batch, torch.inf), 0
    settled = torch.zeros_like(objective, dtype=torch.bool)
    for count in range(max_iterations):  # noqa: B007
        squared = _squared_distances(manifold, solution.point, points, metrics)
        distances = squared.clamp(min=0).sqrt()
        new = (shares * distances).sum(0)
        settled = (objective - new).abs() <= tolerance * new
        objective = new
        if bool(settled.all()):
            break
        pull = shares / distances.clamp(min=1e-9 * float(distances.max()) + 1e-300)
        solution = solve(pull / pull.sum(0))
    return dataclasses.replace(
        solution,
        objective=objective,
        iterations=torch.full_like(solution.iterations, count),
        status=torch.where(settled, Status.CONVERGED, Status.MAX_ITERATIONS),
        weights=weights,
        solver=f"weiszfeld, {solution.solver}",
    )


def _squared_distances(
    manifold: geoopt.Manifold,
    x: Tensor,
    points: Sequence[Tensor],
    metrics: Sequence[ConstantMetric],
) -> Tensor:
    if not isinstance(manifold, LoRAQuotient):
        return torch.stack([m.dist2(x, y) for m, y in zip(metrics, points, strict=True)])
    mean = LoRAQuotient._split(manifold, x)
    one = torch.ones_like(x[..., 0, 0])
    return torch.stack(
        [
            low_rank_objective(mean, [LoRAQuotient._split(manifold, y)], [m], one[None])
            for m, y in zip(metrics, points, strict=True)
        ]
    )


def flat_mean(
    points: Tensor,
    metrics: Sequence[ConstantMetric],
    weights: Tensor,
    *,
    solver: str = "auto",
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> FrechetSolution:
    """Mean of whole tensors, each with a constant metric of its own.

    Args:
        points: Anchors, ``(k, ..., *point)``.
        metrics: k metrics of one point shape.
        weights: ``(k, ...)``, with sum 1.
        solver: ``"closed_form"``, ``"conjugate_gradient"``, or ``"auto"``: closed form where
            there is one.
        tolerance: Residual, relative to that of the weighted mean, at which iterations end.
        max_iterations: Greatest number of conjugate gradient iterations.

    Returns:
        The mean, ``(..., *point)``, with its certificate.

    Raises:
        ValueError: A closed form was asked for and there is none.
    """
    ndim = metrics[0].ndim
    spread = weights.reshape((*weights.shape, *(1,) * (points.ndim - weights.ndim)))
    closed = _closed_form(points, metrics, weights)
    if solver == "closed_form" and closed is None:
        raise ValueError(
            "solver='closed_form': metrics with two different sides have none; use "
            "'conjugate_gradient'"
        )
    weighted = [(w, metric) for w, metric in zip(spread, metrics, strict=True)]

    def lower(u: Tensor) -> Tensor:
        return builtins.sum(w * metric.covector(u) for w, metric in weighted)

    target: Tensor = builtins.sum(
        w * metric.covector(x) for (w, metric), x in zip(weighted, points, strict=True)
    )
    batch = points.shape[1 : points.ndim - ndim]
    count = torch.zeros(batch, dtype=torch.long, device=points.device)
    status = torch.full_like(count, Status.CONVERGED)
    if closed is not None and solver != "conjugate_gradient":
        mean, used = closed, "closed_form"
    else:
        start = (spread * points).sum(0)
        tolerance = torch.finfo(points.dtype).eps ** 0.9 if tolerance is None else tolerance
        precondition = _preconditioner(metrics, weights)
        mean, count, good = conjugate_gradient(
            lower, target, start, precondition, ndim, tolerance, max_iterations
        )
        status = torch.where(good, Status.CONVERGED, Status.MAX_ITERATIONS)
        used = "conjugate_gradient"
    residual = target - lower(mean)
    squared = [metric.dist2(mean, x) for metric, x in zip(metrics, points, strict=True)]
    shares = weights.reshape((*weights.shape, *(1,) * (len(batch) + 1 - weights.ndim)))
    raised = _preconditioner(metrics, weights)(residual)
    return FrechetSolution(
        point=mean,
        objective=(shares * torch.stack(squared)).sum(0),
        gradient_norm=dot(residual, raised, ndim).clamp(min=0).sqrt(),
        iterations=count,
        status=status,
        weights=weights,
        solver=used,
    )


def diagonal_mean(
    points: Sequence[Tensor] | Tensor, fishers: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """Σ wᵢFᵢθᵢ / ΣwᵢFᵢ, entry by entry: Fisher merging (Matena and Raffel, arXiv:2111.09832).

    Args:
        points: k anchors ``(..., *point)``.
        fishers: One diagonal for each, ``(..., *point)``.
        weights: ``(k, ...)``, such that each broadcasts against a point.
    """
    return mean_by_shares(points, (w * f for w, f in zip(weights, fishers, strict=True)))


def mean_by_shares(points: Iterable[Tensor], shares: Iterable[Tensor]) -> Tensor:
    """Σ sᵢθᵢ / Σ sᵢ, entry by entry.

    Args:
        points: k anchors ``(..., *point)``.
        shares: A positive share for each entry of each, ``(..., *point)``. Where no gradients are
            recorded the first is overwritten by the sum, so that each later one may come in one
            buffer.
    """
    total: Tensor | None = None
    numerator: Tensor | None = None
    for share, x in zip(shares, points, strict=True):
        if numerator is None or total is None:
            numerator, total = share * x, share
        elif torch.is_grad_enabled() or not share.shape == total.shape == numerator.shape:
            numerator, total = torch.addcmul(numerator, share, x), total + share
        else:  # in place: these sums are ours
            numerator, total = numerator.addcmul_(share, x), total.add_(share)
    if numerator is None or total is None:
        raise ValueError("points: at least one anchor is needed, got none")
    if torch.is_grad_enabled() or numerator.shape != total.shape:
        return numerator / total
    return numerator.div_(total)


def _closed_form(
    points: Tensor, metrics: Sequence[ConstantMetric], weights: Tensor
) -> Tensor | None:
    spread = weights.reshape((*weights.shape, *(1,) * (points.ndim - weights.ndim)))
    if all(isinstance(metric, FisherEuclidean) for metric in metrics):
        return diagonal_mean(points, [metric.fisher for metric in metrics], spread)
    if not all(isinstance(metric, KroneckerFisher) for metric in metrics):
        return None
    inputs, outputs = sides_of(metrics)
    if outputs is None and inputs is not None:
        total = MetricFactor.sum(inputs, weights)
        parts = (w * (g @ adjoint(x)) for w, g, x in zip(spread, inputs, points, strict=True))
        return adjoint(total.solve(builtins.sum(parts)))
    if inputs is None and outputs is not None:
        total = MetricFactor.sum(outputs, weights)
        parts = (w * (g @ x) for w, g, x in zip(spread, outputs, points, strict=True))
        return total.solve(builtins.sum(parts))
    return None


def _preconditioner(
    metrics: Sequence[ConstantMetric], weights: Tensor
) -> Callable[[Tensor], Tensor]:
    """The inverse of an average metric that is easy to invert."""
    if all(isinstance(metric, KroneckerFisher) for metric in metrics):
        inputs, outputs = sides_of(metrics)
        right = None if inputs is None else MetricFactor.sum(inputs, weights)
        left = None if outputs is None else mean_output(inputs, outputs, weights)
        return KroneckerFisher(
            metrics[0].out_features,
            metrics[0].in_features,
            input_gram=right,
            output_gram=left,
        )._raise
    if all(isinstance(metric, FisherEuclidean) for metric in metrics):
        point = metrics[0].ndim
        shares = [
            w.reshape((*w.shape, *(1,) * point)) * m.fisher
            for w, m in zip(weights, metrics, strict=True)
        ]
        return FisherEuclidean(builtins.sum(shares), metrics[0].ndim)._raise
    return lambda u: u
