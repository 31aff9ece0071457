"""Fisher manifolds: their contract, and their formulas against dense oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manifold_merge.checks import check_manifold, list_laws
from manifold_merge.fisher import FisherEuclidean, FisherLoRAQuotient, KroneckerFisher
from manifold_merge.statistics import Gram

FLOAT64 = torch.float64
M, N = 5, 4


def spd(n: int, seed: int, *batch: int, spread: float = 1.0) -> Tensor:
    """A random positive definite matrix, ``(..., n, n)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, 3 * n, n, generator=generator, dtype=FLOAT64)
    x = x * torch.logspace(-spread / 2, spread / 2, n, dtype=FLOAT64)
    return x.mT @ x / (3 * n)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def low_rank(n: int, k: int, seed: int) -> Gram:
    return Gram(factor=draw(n, k, seed=seed), remainder=draw(n, seed=seed + 1).square() + 0.1)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Compare arrays relative to their largest entry."""
    scale = float(expected.abs().amax())
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * scale)


# --- the contract suite ---------------------------------------------------------------------------

FLAT = {
    "diagonal": (lambda: FisherEuclidean(draw(M, N).square() + 0.1), (M, N)),
    "diagonal of a vector": (lambda: FisherEuclidean(draw(7).square() + 0.1), (7,)),
    "input": (lambda: KroneckerFisher(M, N, input_gram=spd(N, 1)), (M, N)),
    "output": (lambda: KroneckerFisher(M, N, output_gram=spd(M, 1)), (M, N)),
    "both": (lambda: KroneckerFisher(M, N, input_gram=spd(N, 1), output_gram=spd(M, 2)), (M, N)),
    "low rank": (lambda: KroneckerFisher(M, N, input_gram=low_rank(N, 1, 3)), (M, N)),
}


@pytest.mark.parametrize("law", list_laws())
@pytest.mark.parametrize("name", FLAT)
def test_contract_of_flat_metrics(name, law):
    make, shape = FLAT[name]
    check_manifold(make(), shape=shape, laws=[law])


APPROXIMATE = {
    "exact": (),
    "aligned": ("distance", "log_distance"),
    "chordal": ("geodesic_distance", "log_distance", "distance_gradient"),
}
SIDES = {
    "input": {"input_gram": spd(N, 1)},
    "output": {"output_gram": spd(M, 2)},
    "both": {"input_gram": low_rank(N, 1, 3), "output_gram": spd(M, 2)},
}


def quotient_contract(metric: str, distance: str, sides: str, **options) -> None:
    skip: tuple[str, ...] = APPROXIMATE[distance]
    if (metric, distance) == ("embedded", "chordal"):
        skip = ("log_distance",)  # the chord is longer than its projection on the tangent space
        if sides == "both":
            # Differences of products, unwhitened by a Gram matrix of nearly low rank: in float32
            # rounding hides the order of the error.
            skip += ("single_precision",)
    first = draw(M + N, 2)
    check_manifold(
        FisherLoRAQuotient(M, N, metric, distance, **SIDES[sides]),
        points=[first, first + 0.1 * draw(M + N, 2, seed=2), first + 0.1 * draw(M + N, 2, seed=3)],
        exact=distance == "exact",
        strict=True,
        radius=0.2,
        skip=skip,
        **options,
    )


# What an isometry that is wrong on one side would break; the slow run has every law.
CORE = (
    "shapes", "batching", "vmap", "wrong_shape", "projections", "metric", "component_inner",
    "gradient", "retraction", "transport", "distance_to_itself", "log_distance",
    "representatives", "gauge_invariance", "gauge_equivariance", "horizontality",
)  # fmt: skip


@pytest.mark.parametrize(
    ("sides", "distance"),
    [("both", "exact"), ("both", "aligned"), *((sides, "chordal") for sides in SIDES)],
)
def test_contract_of_the_quotient(sides, distance):
    laws = [law for law in CORE if law not in APPROXIMATE[distance]]
    if distance == "exact":
        laws = [law for law in laws if law != "batching"]
    quotient_contract("mixed", distance, sides, laws=laws)


def test_exponentials_and_logarithms_of_the_quotient():
    laws = ["exp_log", "geodesic_distance", "geodesic_speed", "distance_gradient", "optimisers"]
    quotient_contract("invariant", "exact", "both", laws=laws)


@pytest.mark.slow
@pytest.mark.parametrize("distance", APPROXIMATE)
@pytest.mark.parametrize("metric", ["mixed", "invariant", "embedded"])
@pytest.mark.parametrize("sides", SIDES)
def test_every_law_of_the_quotient(sides, metric, distance):
    quotient_contract(metric, distance, sides)
