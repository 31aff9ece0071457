"""Means with one Fisher metric for each anchor, against published formulas and dense oracles."""

from __future__ import annotations

import re
from pathlib import Path

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from test_fisher import close, draw, low_rank, spd
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from manifold_merge import LoRAQuotient, Status, frechet_mean
from manifold_merge.fisher import FisherEuclidean, FisherLoRAQuotient, KroneckerFisher
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.statistics import Gram, collect_statistics

FLOAT64 = torch.float64
WEIGHTS = [0.5, 0.2, 0.3]
M, N = 7, 6
RANKS = (2, 3, 1)


def models(count: int = 3) -> list[nn.Sequential]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
        made.append(model.to(FLOAT64))
    return made


def anchors(*batch: int) -> list[Tensor]:
    return [draw(*batch, M + N, r, seed=10 + r) for r in RANKS]


def kron(metrics: list[KroneckerFisher]) -> list[Tensor]:
    """Each metric as a dense matrix on row-major vectors of W."""
    found = []
    for metric in metrics:
        left = torch.eye(M, dtype=FLOAT64)
        right = torch.eye(N, dtype=FLOAT64)
        left = left if metric.output_side is None else metric.output_side.dense()
        right = right if metric.input_side is None else metric.input_side.dense()
        found.append(torch.kron(left, right))
    return found


def sided(sides: str, seed: int = 0) -> list[KroneckerFisher]:
    made = []
    for i in range(3):
        grams = {}
        if sides in ("input", "both", "mixed"):
            grams["input_gram"] = spd(N, seed + i)
        if sides == "low rank":
            grams["input_gram"] = low_rank(N, 1, 5 * (seed + i))
        if sides in ("output", "both") or (sides == "mixed" and i == 0):
            grams["output_gram"] = spd(M, seed + 7 + i)
        made.append(KroneckerFisher(M, N, **grams))
    return made


SIDES = ("input", "output", "both", "mixed", "low rank")


# --- published methods on whole models -----------------------------------------------------------


def test_fisher_merging_of_whole_models():
    """Matena and Raffel: Σ wᵢFᵢθᵢ / Σ wᵢFᵢ with the diagonal Fisher of each model."""
    nets = models()
    batches = [(draw(6, 5, seed=i),) for i in range(2)]
    statistics = [
        collect_statistics(net, [b[0] for b in batches], kind="diagonal", seed=i)
        for i, net in enumerate(nets)
    ]
    merged = {}
    for name, _ in nets[0].named_parameters():
        points = torch.stack([dict(net.named_parameters())[name].detach() for net in nets])
        fishers = [one.diagonal(name) + 1e-3 for one in statistics]
        metrics = [FisherEuclidean(f) for f in fishers]
        manifold = geoopt.Euclidean(ndim=points.ndim - 1)
        solution = frechet_mean(manifold, points, WEIGHTS, metrics=metrics)
        assert solution.solver == "closed_form"
        parts = list(zip(WEIGHTS, fishers, points, strict=True))
        expected = sum(w * f * x for w, f, x in parts) / sum(w * f for w, f, _ in parts)
        close(solution.point, expected, 1e-12)
        merged[name] = solution.point
    target = models(1)[0]
    target.load_state_dict(merged)
    assert parameters_to_vector(target.parameters()).isfinite().all()


def test_regmean_of_whole_models():
    """Jin et al.: (Σ wᵢWᵢGᵢ)(Σ wᵢGᵢ)⁻¹ with the inputs that each model sees."""
    nets = models()
    inputs = [draw(40, 5, seed=i) for i in range(3)]
    statistics = [collect_statistics(n, [x]) for n, x in zip(nets, inputs, strict=True)]
    for name in ("0", "2"):
        points = torch.stack([net.get_submodule(name).weight.detach() for net in nets])
        m, n = points.shape[1:]
        grams = [one.gram(name) for one in statistics]
        metrics = [KroneckerFisher(m, n, input_gram=gram) for gram in grams]
        solution = frechet_mean(geoopt.Euclidean(ndim=2), points, WEIGHTS, metrics=metrics)
        dense = [
            x if name == "0" else net[:2](x).detach() for net, x in zip(nets, inputs, strict=True)
        ]
        dense = [x.T @ x / len(x) for x in dense]
        left = sum(w * x @ g for w, x, g in zip(WEIGHTS, points, dense, strict=True))
        right = sum(w * g for w, g in zip(WEIGHTS, dense, strict=True))
        close(solution.point, left @ torch.linalg.inv(right))


def test_mats_of_whole_models():
    """Tam et al.: the linear system Σ wᵢFᵢ(θ - θᵢ) = 0 with K-FAC's Fᵢ, by conjugate gradients."""
    nets = models()
    batches = [draw(30, 5, seed=i) for i in range(2)]
    statistics = [collect_statistics(net, batches, kind="kfac", seed=3) for net in nets]
    for name in ("0", "2"):
        points = torch.stack([net.get_submodule(name).weight.detach() for net in nets])
        m, n = points.shape[1:]
        metrics = [
            KroneckerFisher(
                m, n, input_gram=one.gram(name), output_gram=one.output_gram(name), damping=1e-2
            )
            for one in statistics
        ]
        solution = frechet_mean(geoopt.Euclidean(ndim=2), points, WEIGHTS, metrics=metrics)
        assert solution.solver == "conjugate_gradient"
        assert solution.converged
        assert 0 < int(solution.iterations) < m * n
        matrices = [
            w * torch.kron(metric.output_side.dense(), metric.input_side.dense())
            for w, metric in zip(WEIGHTS, metrics, strict=True)
        ]
        right = sum(f @ x.flatten() for f, x in zip(matrices, points, strict=True))
        close(solution.point.flatten(), torch.linalg.solve(sum(matrices), right))


@pytest.mark.parametrize("sides", SIDES)
def test_closed_forms_and_conjugate_gradients_agree(sides):
    metrics = sided(sides)
    points = draw(3, M, N)
    solutions = [
        frechet_mean(geoopt.Euclidean(ndim=2), points, WEIGHTS, metrics=metrics, solver=solver)
        for solver in ("auto", "conjugate_gradient")
    ]
    close(solutions[0].point, solutions[1].point)
    matrices = [w * f for w, f in zip(WEIGHTS, kron(metrics), strict=True)]
    right = sum(f @ x.flatten() for f, x in zip(matrices, points, strict=True))
    close(solutions[0].point.flatten(), torch.linalg.solve(sum(matrices), right))
    objective = sum(
        (x - solutions[0].point).flatten() @ f @ (x - solutions[0].point).flatten()
        for f, x in zip(matrices, points, strict=True)
    )
    close(solutions[0].objective, objective)


def test_batches_are_solved_on_their_own():
    metrics = [KroneckerFisher(M, N, input_gram=spd(N, i, 4)) for i in range(2)]
    points = draw(2, 4, M, N)
    whole = frechet_mean(geoopt.Euclidean(ndim=2), points, metrics=metrics)
    both = [KroneckerFisher(M, N, input_gram=spd(N, i, 4), output_gram=spd(M, i)) for i in (0, 1)]
    iterated = frechet_mean(geoopt.Euclidean(ndim=2), points, metrics=both)
    for row in range(4):
        for options, found in ((metrics, whole), (both, iterated)):
            alone = [
                KroneckerFisher(
                    M,
                    N,
                    input_gram=metric.input_side.dense()[row],
                    output_gram=metric.output_side,
                )
                for metric in options
            ]
            single = frechet_mean(geoopt.Euclidean(ndim=2), points[:, row], metrics=alone)
            close(found.point[row], single.point)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", SIDES)
def test_adapters_at_full_rank_are_the_mean_of_their_products(sides):
    manifold, points, metrics = LoRAQuotient(M, N), anchors(), sided(sides)
    products = torch.stack([manifold.product(x) for x in points])
    dense = frechet_mean(geoopt.Euclidean(ndim=2), products, WEIGHTS, metrics=metrics)
    adapters = frechet_mean(
        manifold, points, WEIGHTS, metrics=metrics, rank=N, max_iterations=2000, tolerance=1e-12
    )
    tolerance = 1e-10 if sides in ("input", "output", "low rank") else 1e-7
    close(manifold.product(adapters.point), dense.point, tolerance)
    close(adapters.objective, dense.objective, tolerance)


def test_the_unconstrained_one_sided_mean_has_the_rank_of_the_sum():
    manifold = LoRAQuotient(30, 25)
    points = [draw(55, r, seed=r) for r in RANKS]
    metrics = [KroneckerFisher(30, 25, input_gram=spd(25, i)) for i in range(3)]
    mean = manifold.product(frechet_mean(manifold, points, metrics=metrics, rank=sum(RANKS)).point)
    grams = [metric.input_side.dense() for metric in metrics]
    products = [manifold.product(x) for x in points]
    expected = sum(x @ g for x, g in zip(products, grams, strict=True)) @ torch.linalg.inv(
        sum(grams)
    )
    close(mean, expected)
    assert int(torch.linalg.matrix_rank(expected)) == sum(RANKS)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("sides", SIDES)
def test_rank_constrained_means_are_stationary_and_best(sides, rank):
    manifold, points, metrics = LoRAQuotient(M, N), anchors(), sided(sides)
    solution = frechet_mean(manifold, points, WEIGHTS, metrics=metrics, rank=rank, tolerance=1e-9)
    assert solution.converged, solution.message
    matrices = [w * f for w, f in zip(WEIGHTS, kron(metrics), strict=True)]
    products = [manifold.product(x).flatten() for x in points]

    def objective(x: Tensor) -> Tensor:
        w = manifold.product(x).flatten()
        gaps = [(w - y) @ f @ (w - y) for y, f in zip(products, matrices, strict=True)]
        return torch.stack(gaps).sum()

    x = solution.point.clone().requires_grad_()
    value = objective(x)
    (gradient,) = torch.autograd.grad(value, x)
    value = value.detach()
    close(solution.objective, value)
    assert float(gradient.norm()) <= 1e-6 * float(value)

    def search(start: Tensor) -> float:
        def cost(array):
            y = torch.from_numpy(array).reshape(M + N, rank).requires_grad_()
            found = objective(y)
            return found.item(), torch.autograd.grad(found, y)[0].flatten().numpy()

        return float(minimize(cost, start.flatten().numpy(), jac=True, method="L-BFGS-B").fun)

    best = min(search(draw(M + N, rank, seed=seed)) for seed in range(4))
    slack = 1e-8 if sides in ("input", "output", "low rank") else 2e-2  # local minima exist
    assert float(value) <= best * (1 + slack)


def test_the_truncation_is_that_of_the_fisher_quotient():
    gram = spd(N, 3)
    quotient = FisherLoRAQuotient(M, N, distance="chordal", input_gram=gram)
    points = anchors()
    common = frechet_mean(quotient, points, WEIGHTS, rank=2)
    metrics = [KroneckerFisher(M, N, input_gram=gram)] * 3
    each = frechet_mean(LoRAQuotient(M, N), points, WEIGHTS, metrics=metrics, rank=2)
    close(quotient.product(common.point), quotient.product(each.point))
    close(common.objective, each.objective)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [2, 6])
def test_gauges_and_order_change_nothing(sides, rank):
    manifold, points, metrics = LoRAQuotient(M, N), anchors(), sided(sides)
    solution = frechet_mean(
        manifold, points, WEIGHTS, metrics=metrics, rank=rank, gauge_check=True, max_iterations=50
    )
    assert float(solution.gauge_residual) < 1e-9
    turned = frechet_mean(
        manifold,
        points[::-1],
        WEIGHTS[::-1],
        metrics=metrics[::-1],
        rank=rank,
        max_iterations=50,
    )
    close(manifold.product(turned.point), manifold.product(solution.point), 1e-9)


@settings(max_examples=8)
@given(seed=st.integers(0, 50), condition=st.sampled_from([1.0, 1e2, 1e4]))
def test_any_gauge_gives_one_mean(seed, condition):
    manifold, points, metrics = LoRAQuotient(M, N), anchors(), sided("both")
    generator = torch.Generator().manual_seed(seed)
    moved = [
        manifold.random_representative(x, generator=generator, condition=condition) for x in points
    ]
    means = [
        manifold.product(frechet_mean(manifold, x, metrics=metrics, rank=2, tolerance=1e-6).point)
        for x in (points, moved)
    ]
    close(means[1], means[0], 1e-9 * condition)


def test_copies_of_one_adapter_are_their_mean():
    manifold = LoRAQuotient(M, N)
    x = draw(M + N, 2)
    solution = frechet_mean(manifold, [x, x, x], metrics=sided("both"))
    close(manifold.product(solution.point), manifold.product(x), 1e-7)


def test_weights_without_effect_and_medians():
    manifold, points, metrics = LoRAQuotient(M, N), anchors(), sided("input")
    some = frechet_mean(manifold, points[:2], [1, 2], metrics=metrics[:2], rank=3)
    zero = frechet_mean(manifold, points, [1, 2, 0], metrics=metrics, rank=3)
    close(zero.point, some.point)
    # With two of three anchors at one place, the median is there and the mean is not.
    twins = [points[0], points[0], 10 * points[1]]
    median = frechet_mean(manifold, twins, metrics=[metrics[0]] * 3, p=1)
    assert float(manifold.relative_difference(points[0], median.point)) < 1e-3
    mean = frechet_mean(manifold, twins, metrics=[metrics[0]] * 3)
    assert float(manifold.relative_difference(points[0], mean.point)) > 1


def test_an_iteration_that_is_cut_short_says_so():
    points = draw(3, M, N)
    solution = frechet_mean(
        geoopt.Euclidean(ndim=2), points, metrics=sided("both"), max_iterations=1
    )
    assert int(solution.status) == Status.MAX_ITERATIONS
    assert "max_iterations" in solution.message


# --- one side -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"damping": 0.3}, {"shrinkage": 0.4, "damping": 0.1}])
def test_low_rank_factors_are_their_dense_matrices(options):
    gram = low_rank(12, 3, 0)
    slim = MetricFactor(gram, **options)
    dense = gram.dense()
    expected = (1 - options.get("shrinkage", 0)) * dense
    expected += options.get("shrinkage", 0) * torch.diag(dense.diagonal())
    expected += options.get("damping", 0) * dense.diagonal().mean() * torch.eye(12, dtype=FLOAT64)
    close(slim.dense(), expected)
    close(MetricFactor(dense, **options).dense(), expected)
    x = draw(12, 2)
    close(slim @ x, expected @ x)
    close(slim.solve(x), torch.linalg.solve(expected, x))
    close(slim.trace(), expected.trace())
    root = slim.whiten(torch.eye(12, dtype=FLOAT64))
    close(root.T @ root, expected)
    close(slim.whiten(x, adjoint_root=True), root.T @ x)
    close(slim.unwhiten(slim.whiten(x)), x)
    close(slim.unwhiten(slim.whiten(x, adjoint_root=True), adjoint_root=True), x)
    total = MetricFactor.sum([slim, slim], [0.25, 2.0])
    assert total.low_rank is None  # two factors of rank 3 are no smaller than a dense 12 x 12
    close(total.dense(), 2.25 * expected)
    wide = [MetricFactor(low_rank(40, 2, i), **options) for i in (0, 9)]
    total = MetricFactor.sum(wide, [0.25, 2.0])
    assert total.low_rank.shape == (40, 4)
    close(total.dense(), 0.25 * wide[0].dense() + 2 * wide[1].dense())


def test_diagonal_grams_of_embeddings():
    frequency = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=FLOAT64)
    factor = MetricFactor(Gram(remainder=frequency), damping=0.1)
    close(factor.dense(), torch.diag(frequency + 0.1 * 0.25))


BAD = {
    "singular": (lambda: KroneckerFisher(3, 2, input_gram=torch.ones(2, 2)), "damping > 0"),
    "size": (lambda: KroneckerFisher(3, 2, input_gram=torch.eye(3)), "input_gram: expected size 2"),
    "nan": (lambda: MetricFactor(torch.full((2, 2), torch.nan)), "NaN"),
    "none": (lambda: KroneckerFisher(3, 2), "both None"),
    "damping": (lambda: MetricFactor(torch.eye(2), damping=-1), "damping: expected"),
    "shrinkage": (lambda: MetricFactor(torch.eye(2), shrinkage=2), "shrinkage: expected"),
    "not square": (lambda: MetricFactor(torch.ones(2, 3)), "expected a matrix"),
    "zero diagonal": (lambda: FisherEuclidean(torch.tensor([1.0, 0.0])), "1 of 2 entries are zero"),
    "negative": (lambda: FisherEuclidean(torch.tensor([1.0, -1.0])), "negative"),
    "count": (
        lambda: frechet_mean(LoRAQuotient(M, N), anchors(), metrics=sided("input")[:2]),
        "metrics: expected 3",
    ),
    "kind": (
        lambda: frechet_mean(
            LoRAQuotient(M, N), anchors(), metrics=[FisherEuclidean(draw(M, N).square() + 1)] * 3
        ),
        "expected a KroneckerFisher",
    ),
    "rank": (
        lambda: frechet_mean(LoRAQuotient(M, N), anchors(), metrics=sided("input"), rank=9),
        "expected 1 <= rank <= 6",
    ),
    "closed form": (
        lambda: frechet_mean(
            geoopt.Euclidean(ndim=2), draw(3, M, N), metrics=sided("both"), solver="closed_form"
        ),
        "use 'conjugate_gradient'",
    ),
    "negative weight": (
        lambda: frechet_mean(LoRAQuotient(M, N), anchors(), [1, 1, -1], metrics=sided("input")),
        "negative",
    ),
    "start": (
        lambda: frechet_mean(
            LoRAQuotient(M, N), anchors(), metrics=sided("input"), start=draw(M + N, 2)
        ),
        "start",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_of_the_documentation_runs():
    page = Path(__file__).resolve().parent.parent / "docs" / "fisher.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    before = torch.get_default_dtype()
    try:
        exec(compile(code, str(page), "exec"), {})
    finally:
        torch.set_default_dtype(before)
