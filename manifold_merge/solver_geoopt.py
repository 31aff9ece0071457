"""The Fréchet problem for geoopt's optimisers, all batch elements side by side."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from typing import Any

import geoopt
import torch
from geoopt.optim.rlinesearch import LineSearchWarning
from torch import Tensor

from manifold_merge.derivatives import lower
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solvers import Problem

__all__ = ["solve_with_geoopt"]

# Steps without a smaller gradient anywhere after which the learning rate is halved.
PATIENCE = 8
# Steps after which an adaptive method forgets the long gradients that it has seen.
CYCLE = 40
# Steps without a smaller gradient after which no more is expected.
GIVE_UP = 200


def solve_with_geoopt(problem: Problem, start: Tensor, optimizer: Any) -> FrechetSolution:
    """Let a Riemannian optimiser minimise ½ Σ wᵢ d² (or Σ wᵢ d).

    An optimiser of constant learning rate circles around a minimum at a distance of about that
    rate. To reach a tolerance, the rate is halved whenever gradients stop shrinking; adaptive
    methods are restarted with a rate in proportion to the gradient. Each element keeps its best
    iterate.

    Args:
        problem: Anchors ``(k, L, *point)`` and weights.
        start: ``(L, *point)``.
        optimizer: A class of geoopt.optim, or an instance, whose options are used.

    Returns:
        The solution; all elements share one count of iterations until each has converged.
    """
    point = geoopt.ManifoldParameter(start.clone(), manifold=problem.manifold)
    best = problem.evaluate(start)
    state = best
    solver = _fresh(optimizer, point, float(best.scale.mean()) if len(start) else 1.0)
    searches = isinstance(solver, geoopt.optim.RiemannianLineSearch)
    count = torch.zeros(len(start), dtype=torch.long, device=start.device)
    stale = waited = 0

    def closure() -> Tensor:
        nonlocal state
        here = point.detach().as_subclass(Tensor).clone()
        if not torch.equal(here, state.point):
            state = problem.evaluate(here)
        rate = state.stiffness.reshape(len(start), *(1,) * (start.ndim - 1))
        point.grad = -lower(problem.manifold, state.point, rate * state.direction)
        return problem.cost(state).sum()

    while waited < GIVE_UP and int(count.max() if len(start) else 0) < problem.max_iterations:
        running = ~problem.stationary(best)
        if not bool(running.any()):
            break
        if searches:
            with warnings.catch_warnings():  # that no step was found shows in the status
                warnings.simplefilter("ignore", LineSearchWarning)
                solver.step(closure)
        else:
            closure()
            solver.step()
        count += running
        closure()
        rows = (running & (state.gradient_norm < best.gradient_norm)).nonzero()[:, 0]
        shrunk = (state.gradient_norm < 0.9 * best.gradient_norm)[running].any()
        stale, waited = (0, 0) if bool(shrunk) else (stale + 1, waited + 1)
        best = best.rows(torch.arange(len(start), device=start.device))  # a copy to write to
        best.put(rows, state.rows(rows))
        patience = CYCLE if "betas" in solver.param_groups[0] else PATIENCE
        if not searches and (stale >= PATIENCE or int(count.max()) % patience == 0):
            if stale >= PATIENCE or patience == CYCLE:
                _restart(solver, point, best.point, float(best.gradient_norm[running].max()))
            stale = 0
    ended = Status.STALLED if waited >= GIVE_UP else Status.MAX_ITERATIONS
    status = torch.where(problem.stationary(best), Status.CONVERGED, ended)
    return problem.solution(best, count, status)


def _restart(solver: Any, point: Tensor, best: Tensor, gradient: float) -> None:
    """Go back to the best iterates with a shorter step and no memory of longer ones."""
    with torch.no_grad():
        point.copy_(best)
    solver.state = defaultdict(dict)
    for group in solver.param_groups:
        if "betas" in group:
            # An adaptive step has the length of the rate, whatever the gradient, down to eps.
            group["lr"] = min(group["lr"], 0.2 * gradient)
            group["eps"] = min(group["eps"], 1e-3 * gradient)
        else:
            group["lr"] /= 2


def _fresh(optimizer: Any, point: Tensor, scale: float) -> Any:
    """The optimiser on our point: of an instance only class and options are used."""
    if inspect.isclass(optimizer):
        kind: Any = optimizer
        if issubclass(kind, geoopt.optim.RiemannianLineSearch):
            return kind([point])
        # A gradient step of length one is Karcher's; Adam's steps have the length of the rate.
        return kind([point], lr=0.1 * scale if issubclass(kind, torch.optim.Adam) else 1.0)
    fresh = copy.copy(optimizer)
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"solver={type(optimizer).__name__}: one parameter group is expected, the instance has "
            f"{len(optimizer.param_groups)} with different options"
        )
    group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "step")}
    fresh.param_groups = [{"params": [point], **group}]
    fresh.state = defaultdict(dict)
    if isinstance(fresh, geoopt.optim.RiemannianLineSearch):
        fresh._params = fresh.param_groups[0]["params"]
    return fresh
