"""Manifolds, and clouds of points on them, on which means are tested."""

from __future__ import annotations

from dataclasses import dataclass

import geoopt
import pytest
import torch

from manifold_merge import LoRAQuotient, PolarLoRAQuotient
from manifold_merge.accurate import accurate, norm


@dataclass(frozen=True)
class Case:
    """A manifold, the shape of a point, and how far points of a cloud are from its centre."""

    manifold: geoopt.Manifold
    shape: tuple[int, ...]
    radius: float = 0.5


# geoopt draws points in the dtype of the curvature.
ONE = torch.tensor(1.0, dtype=torch.float64)

GEOOPT = {
    "Euclidean": Case(geoopt.Euclidean(1), (3,)),
    "Sphere": Case(geoopt.Sphere(), (3,)),
    "SphereExact": Case(geoopt.SphereExact(), (4,)),
    "SPD": Case(geoopt.SymmetricPositiveDefinite(), (3, 3)),
    "Stiefel": Case(geoopt.EuclideanStiefel(), (5, 2)),
    "PoincareBall": Case(geoopt.PoincareBall(ONE), (3,)),
    "Lorentz": Case(geoopt.Lorentz(ONE), (4,)),
    "Product": Case(
        geoopt.ProductManifold(
            (geoopt.Sphere(), 3),
            (geoopt.Euclidean(1), 2),
            (geoopt.SymmetricPositiveDefinite(), (2, 2)),
        ),
        (9,),
    ),
    "Scaled": Case(geoopt.Scaled(geoopt.Sphere(), 2.0), (3,)),
}

OURS = {
    **{
        f"LoRA({metric}, {distance})": Case(LoRAQuotient(5, 4, metric, distance), (9, 2))
        for metric in ("mixed", "invariant", "embedded")
        for distance in ("exact", "chordal")
    },
    "Polar": Case(PolarLoRAQuotient(5, 4), (11, 2)),
}

CASES = GEOOPT | OURS

# Cases whose logarithms are searched for; the first two take long.
SLOW = ("LoRA(mixed, exact)", "LoRA(embedded, exact)")
SEARCHED = (*SLOW, "LoRA(invariant, exact)", "Polar", "Stiefel")


def names(*, searched: bool = True) -> list:
    """Names of the cases, as parameters of a test."""
    chosen = [name for name in CASES if searched or name not in SEARCHED]
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in chosen]


def random_point(case: Case, *batch: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    draw = getattr(case.manifold, "random_normal", None) or case.manifold.random
    return draw(*batch, *case.shape, dtype=torch.float64).as_subclass(torch.Tensor)


def tangent(case: Case, x: torch.Tensor, length: float = 1.0) -> torch.Tensor:
    u = case.manifold.proju(x, torch.randn_like(x))
    size = norm(case.manifold, x, u)
    return length * u / size.reshape((*size.shape, *(1,) * case.manifold.ndim))


def cloud(case: Case, count: int, *batch: int, seed: int = 0, radius: float | None = None):
    """Points at one distance from a random centre, ``(count, *batch, *shape)``."""
    x = random_point(case, *batch, seed=seed)
    length = case.radius if radius is None else radius
    space = accurate(case.manifold)
    return torch.stack([space.expmap(x, tangent(case, x, length)) for _ in range(count)])


def difference(case: Case, x: torch.Tensor, y: torch.Tensor) -> float:
    """How much two points differ, whatever their gauge."""
    if hasattr(case.manifold, "relative_difference"):
        return float(case.manifold.relative_difference(x, y).max())
    return float((x - y).abs().max())
