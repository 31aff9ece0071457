"""Which solver ``solver=`` names, and how it is run on a Fréchet problem."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeAlias

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, has_logmap
from manifold_merge.newton import has_newton, newton
from manifold_merge.solution import FrechetSolution
from manifold_merge.solvers import Problem

__all__ = ["Solver", "checked_solver", "default_iterations", "run_solver", "solver_name"]

# A name, a geoopt optimiser (class or instance) or a pymanopt optimiser (instance).
Solver: TypeAlias = Any

NAMES = ("auto", "closed_form", "newton", "karcher", "trust_region", "conjugate_gradient")


def checked_solver(solver: Solver, manifold: geoopt.Manifold) -> Solver:
    """Tell early whether the solver is known and can work on this manifold.

    Args:
        solver: What the user passed.
        manifold: Where the mean is to be found.

    Returns:
        The solver.

    Raises:
        ValueError: If the name or object is none of the known ones, or the logarithm is no gradient
            so that only Karcher's iteration has a meaning.
        NotImplementedError: If the solver needs a logarithm and the manifold has none.

    Example:
        >>> checked_solver("bfgs", geoopt.Sphere())
        Traceback (most recent call last):
        ...
        ValueError: solver must be one of auto, closed_form, newton, karcher, ...
    """
    if isinstance(solver, str):
        if solver not in NAMES:
            raise ValueError(
                f"solver must be one of {', '.join(NAMES)}, a geoopt optimiser or a pymanopt "
                f"optimiser; got {solver!r}"
            )
    elif inspect.isclass(solver) and not issubclass(solver, torch.optim.Optimizer):
        raise ValueError(
            f"solver={solver.__name__}: of pymanopt's optimisers pass an instance, for example "
            f"{solver.__name__}(verbosity=0)"
        )
    elif not (_is_torch(solver) or _is_pymanopt(solver)):
        raise ValueError(
            f"solver must be one of {', '.join(NAMES)}, a geoopt optimiser or a pymanopt "
            f"optimiser; got {solver!r}"
        )
    if _is_torch(solver) and not solver_class(solver).__module__.startswith("geoopt."):
        raise ValueError(
            f"solver={solver_name(solver)}: torch's optimisers leave the manifold; use "
            "geoopt.optim.RiemannianAdam or geoopt.optim.RiemannianSGD"
        )
    if _is_torch(solver) and "Sparse" in solver_name(solver):
        raise ValueError(f"solver={solver_name(solver)}: gradients of a mean are not sparse")
    gradient = getattr(manifold, "log_is_gradient", True)
    if not gradient and solver not in ("auto", "closed_form", "karcher"):
        raise ValueError(
            f"solver={solver_name(solver)}: with distance='aligned' (polar: 'chordal') the "
            "logarithm is not the gradient of a function that could be minimised; use 'karcher', "
            "which looks for the point where the logarithms cancel, or another distance"
        )
    if isinstance(solver, str) and solver == "karcher" and not has_logmap(accurate(manifold)):
        raise NotImplementedError(
            f"solver='karcher': {manifold} has no logmap. Where it has a differentiable dist, "
            "solver='conjugate_gradient', 'trust_region' and geoopt's optimisers work"
        )
    return solver


def default_iterations(solver: Solver) -> int:
    """Greatest number of iterations if the user names none."""
    return 3000 if _is_torch(solver) else 200


def run_solver(problem: Problem, start: Tensor | None, solver: Solver) -> FrechetSolution:
    """Iterate from ``start``, ``(L, *point)``; ``"newton"`` finds one where it is ``None``."""
    if isinstance(solver, str) and solver == "newton":
        if problem.p != 2 or not has_newton(problem.manifold, tuple(problem.points.shape[1:])):
            raise ValueError(
                "solver='newton': Hessians are known in closed form for means (p=2) on geoopt's "
                "spheres of at most 64 dimensions and SymmetricPositiveDefinite; use "
                "'trust_region', which takes them by differences"
            )
        return newton(problem, start)
    if start is None:
        (start,) = problem.starts("auto")
    if isinstance(solver, str) and solver == "karcher":
        return problem.karcher(start)
    from manifold_merge.derivatives import in_gradient_metric

    problem = dataclasses.replace(problem, manifold=in_gradient_metric(problem.manifold))
    if _is_torch(solver):
        from manifold_merge.solver_geoopt import solve_with_geoopt

        return solve_with_geoopt(problem, start, solver)
    # pymanopt is imported by those who ask for it.
    from manifold_merge.solver_pymanopt import solve_with_pymanopt

    return solve_with_pymanopt(problem, start, solver)


def solver_class(solver: Solver) -> type:
    """The class of an optimiser, given itself or an instance of it."""
    return solver if inspect.isclass(solver) else type(solver)


def solver_name(solver: Solver) -> str:
    """Name of a solver, as the solution reports it."""
    return solver if isinstance(solver, str) else solver_class(solver).__name__


def _is_torch(solver: Solver) -> bool:
    return issubclass(solver_class(solver), torch.optim.Optimizer)


def _is_pymanopt(solver: Solver) -> bool:
    return any(c.__module__.startswith("pymanopt.") for c in type(solver).__mro__)
