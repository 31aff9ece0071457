"""The Fréchet problem for pymanopt's optimisers: trust regions, conjugate gradients, any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pymanopt
import torch
from pymanopt.optimizers import ConjugateGradient, NelderMead, ParticleSwarm, TrustRegions
from pymanopt.optimizers.optimizer import Optimizer
from torch import Tensor

from manifold_merge.accurate import LinAlgError
from manifold_merge.derivatives import mean_direction, mean_hessian
from manifold_merge.pymanopt_bridge import GeooptInPymanopt, _array, _tensor
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solvers import Problem

__all__ = ["GradientLineSearcher", "solve_with_pymanopt"]


def solve_with_pymanopt(
    problem: Problem, start: Tensor, optimizer: str | Optimizer
) -> FrechetSolution:
    """Minimise ½ Σ wᵢ d² (or Σ wᵢ d) for one batch element after the other, in float64.

    Args:
        problem: Anchors ``(k, L, *point)`` and weights.
        start: ``(L, *point)``.
        optimizer: ``"trust_region"``, ``"conjugate_gradient"``, or a pymanopt optimiser, whose own
            limits count: an element that reached its ``min_gradient_norm`` has converged.

    Returns:
        The solution, with the number of iterations of each element.
    """
    dtype = start.dtype
    wide = dataclasses.replace(
        problem, points=problem.points.to(torch.float64), weights=problem.weights.to(torch.float64)
    )
    runs = [_solve(wide, i, x, optimizer) for i, x in enumerate(start.to(torch.float64))]
    count = torch.tensor([run[1] for run in runs], device=start.device)
    reached = torch.tensor(["min grad norm" in run[2] for run in runs], device=start.device)
    state = wide.evaluate(torch.stack([run[0] for run in runs]))
    status = torch.full_like(count, Status.MAX_ITERATIONS)
    converged = wide.stationary(state)
    if isinstance(optimizer, Optimizer):
        converged = converged | reached
    else:
        status[count < problem.max_iterations] = Status.STALLED
    status[converged] = Status.CONVERGED
    solution = wide.solution(state, count, status)
    return dataclasses.replace(solution, point=solution.point.to(dtype))


class _ExactMean(Exception):
    """A point whose gradient is zero to the last digit."""

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point = point


def _solve(
    problem: Problem, index: int, x: Tensor, optimizer: str | Optimizer
) -> tuple[Tensor, int, str]:
    total, reason = 0, ""
    # The tolerance is relative to the spread around the iterate, which a bad start exaggerates.
    for _ in range(3 if isinstance(optimizer, str) else 1):
        allowed = problem.max_iterations - total
        if isinstance(optimizer, str) and allowed <= 0:
            break
        x, count, reason = _solve_one(problem, index, x, optimizer, allowed)
        total += count
        rows = torch.tensor([index], device=x.device)
        if bool(problem.stationary(problem.evaluate(x[None], rows))):
            break
    return x, total, reason


def _solve_one(
    problem: Problem, index: int, x: Tensor, optimizer: str | Optimizer, allowed: int
) -> tuple[Tensor, int, str]:
    device, rows = x.device, torch.tensor([index], device=x.device)
    space = GeooptInPymanopt(problem.manifold, x.shape)

    def state(point: Any) -> Any:
        return problem.evaluate(_tensor(point).to(device)[None], rows)

    @pymanopt.function.numpy(space)
    def cost(point: Any) -> float:
        try:
            value = float(problem.cost(state(point)))
        except LinAlgError:  # a line search left the numbers that there are
            return float("inf")
        return value if value == value else float("inf")

    @pymanopt.function.numpy(space)
    def gradient(point: Any) -> Any:
        here = _tensor(point).to(device)
        value = -mean_direction(problem, here[None], rows)[0].cpu()
        if not bool(value.any()):  # pymanopt's conjugate gradients would divide by it
            raise _ExactMean(here)
        return _array(value)

    @pymanopt.function.numpy(space)
    def hessian(point: Any, vector: Any) -> Any:
        x, u = (_tensor(array).to(device)[None] for array in (point, vector))
        return _array(mean_hessian(problem, x, u, rows)[0].cpu())

    task = pymanopt.Problem(space, cost, riemannian_gradient=gradient, riemannian_hessian=hessian)
    options: dict[str, Any] = {}
    if isinstance(optimizer, str):
        begin = problem.evaluate(x[None], rows)
        scale = float(begin.scale)
        limits = {
            # The iterate moves on: aim below the tolerance, which is relative to the last one.
            "min_gradient_norm": 0.5 * (problem.tolerance * scale + float(begin.floor)),
            "max_iterations": allowed,
            "min_step_size": 1e-300,
            "max_time": float("inf"),
            "verbosity": 0,
        }
        if optimizer == "trust_region":
            # The spread of the anchors is the length on which the quadratic model means something.
            options = {"Delta_bar": 4 * scale + 1e-300, "Delta0": scale + 1e-300}
            run: Optimizer = TrustRegions(**limits)
        else:
            run = ConjugateGradient(line_searcher=GradientLineSearcher(gradient), **limits)
    else:
        run = optimizer
    # At a minimum there is no direction to search, which pymanopt's optimisers do not expect.
    if bool(problem.stationary(problem.evaluate(x[None], rows))):
        return x, 0, "min grad norm"
    if not isinstance(run, NelderMead):  # which takes a simplex, and draws a better one itself
        options["initial_point"] = _array(x.cpu())
    if isinstance(run, ParticleSwarm):
        count = run._population_size or min(40, 10 * space.dim)
        anchors = [_array(y.cpu()) for y in problem.points[:, index]]
        options["initial_point"] = [anchors[i % len(anchors)] for i in range(count)]
    try:
        # Where curvatures are round-off, pymanopt's trust regions take roots of negative numbers.
        with np.errstate(invalid="ignore", divide="ignore"):
            result = run.run(task, **options)
    except _ExactMean as found:
        return found.point, 1, "min grad norm"
    return _tensor(result.point).to(device), result.iterations, result.stopping_criterion


class GradientLineSearcher:
    """A line search for pymanopt that trusts slopes where the cost has no digits left.

    Near a minimum the cost changes by less than its rounding, and a search that compares costs
    stops at a gradient of 1e-8. Slopes keep their digits: a step is accepted if the cost decreases
    enough, or stays equal to round-off while the slope shrinks (Hager and Zhang, SIAM J. Optim. 16,
    2005). The first trial has length one, which is the Newton step in a flat space; a secant step
    corrects it.

    Args:
        gradient: Riemannian gradient, a function of the point.
    """

    def __init__(self, gradient: Callable[[Any], Any]) -> None:
        # Behind a function: pymanopt copies its line searcher deeply.
        self._gradient = gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientLineSearcher:
        return GradientLineSearcher(self._gradient)

    def search(
        self, objective: Any, manifold: Any, x: Any, d: Any, f0: float, df0: float
    ) -> tuple[float, Any]:
        """Find a step along ``d``; returns its length and the new point."""
        length = manifold.norm(x, d)
        rounding = 1e-11 * abs(f0)
        step, before = 1.0, (0.0, df0)  # the last trial, and its slope
        for trial in range(40):
            y = manifold.retraction(x, step * d)
            f = objective(y)
            if f <= f0 + rounding:
                slope = manifold.inner_product(y, self._gradient(y), manifold.transport(x, y, d))
                small = abs(slope) <= 0.5 * abs(df0)
                if small or (f <= f0 + 1e-4 * step * df0 and slope < 0 and trial > 8):
                    return step * length, y
                apart = step - before[0]
                change = (slope - before[1]) / apart if apart else 0.0
                if trial <= 8 and change > 0:
                    before, step = (
                        (step, slope),
                        min(max(step - slope / change, 0.1 * step), 4 * step),
                    )
                    continue
            step /= 2
        return 0.0, x
