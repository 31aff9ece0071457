"""Means in two-sided metrics, in layers wider than all anchors together, against dense oracles."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from test_fisher import close, draw, spd
from torch import Tensor, nn

from manifold_merge import LoRAQuotient, Status
from manifold_merge.calibrate import calibrate_adapter
from manifold_merge.fisher import KroneckerFisher
from manifold_merge.fisher_low_rank import low_rank_mean, low_rank_objective
from manifold_merge.fisher_mean import flat_mean
from manifold_merge.fisher_two_sided import SMALL_ROUNDS, TwoSided
from manifold_merge.statistics import collect_statistics
from manifold_merge.statistics_gram import Gram

FLOAT64 = torch.float64
M, N, R = 26, 22, 2
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=FLOAT64)
SPACE = LoRAQuotient(M, N)


def gram(size: int, seed: int, strength: float = 1.0) -> Gram:
    """A few strong directions over a small diagonal, as Grams of layers have."""
    torch.manual_seed(seed)
    factor = torch.randn(size, 3, dtype=FLOAT64) * torch.tensor([3.0, 1.0, 0.5]) * strength
    return Gram(factor=factor, remainder=0.2 + torch.rand(size, dtype=FLOAT64))


def metrics(kind: str = "low rank") -> list[KroneckerFisher]:
    make = gram if kind == "low rank" else spd
    return [
        KroneckerFisher(M, N, input_gram=make(N, i), output_gram=make(M, 10 + i)) for i in range(3)
    ]


def anchors(*batch: int, seed: int = 0) -> list[Tensor]:
    return [draw(*batch, M + N, R, seed=seed + i) for i in range(3)]


def problem(points: list[Tensor], found: list[KroneckerFisher], w: Tensor = SHARES) -> TwoSided:
    sides = [m.output_side for m in found], [m.input_side for m in found]
    return TwoSided([LoRAQuotient._split(SPACE, x) for x in points], sides, w)  # type: ignore[arg-type]


def objective(pair: tuple[Tensor, Tensor], points: list[Tensor], found: list) -> float:
    pairs = [LoRAQuotient._split(SPACE, x) for x in points]
    return float(low_rank_objective(pair, pairs, found, SHARES))


def dense(points: list[Tensor], found: list[KroneckerFisher]) -> tuple[Tensor, float]:
    """The mean without a bound on the rank, from whole matrices."""
    solution = flat_mean(torch.stack([SPACE.product(x) for x in points]), found, SHARES)
    assert int(solution.status) == Status.CONVERGED
    return solution.point, float(solution.objective)


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_the_small_problem_is_nearly_the_whole_one(kind):
    """It is a minimum over a subspace: never below the mean, and far below what RegMean leaves."""
    points, found = anchors(), metrics(kind)
    _, best = dense(points, found)
    pair = problem(points, found).start(12)
    assert pair[0].shape == (M, 12)
    reached = objective(pair, points, found)
    # The mean of the inputs' metrics alone, which is what RegMean minimises.
    inputs = [KroneckerFisher(M, N, input_gram=m.input_side) for m in found]
    regmean = low_rank_mean(SPACE, points, inputs, SHARES, rank=6).point
    other = objective(LoRAQuotient._split(SPACE, regmean), points, found)
    assert best * (1 - 1e-12) <= reached < best + 0.3 * (other - best)


def test_a_common_metric_needs_no_rounds():
    """All anchors in one metric: the mean is the weighted sum, which the spans hold."""
    points, found = anchors(), [metrics()[0]] * 3
    b, a = problem(points, found).start(6)
    expected = sum(w * SPACE.product(x) for w, x in zip(SHARES, points, strict=True))
    close(b @ a.mT, expected, 1e-9)
    solution = low_rank_mean(SPACE, points, found, SHARES, rank=6)
    assert int(solution.iterations) == 0
    assert bool(solution.converged)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rounds_only_lower_the_objective_and_end_where_its_gradient_vanishes(rank):
    points, found = anchors(), metrics()
    solver = problem(points, found)
    pair = list(solver.start(rank))
    values = [objective(tuple(pair), points, found)]
    for _ in range(6):
        solver._round(pair)
        values.append(objective(tuple(pair), points, found))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]
    (b, a), gradient, count, status = solver.solve(rank, 1e-8, 1500)
    assert int(status) == Status.CONVERGED
    assert int(count) > 0
    assert float(gradient) <= 1e-8 * float(solver._scale())
    # By automatic differentiation, which knows nothing of frames or metrics.
    pairs = [LoRAQuotient._split(SPACE, x) for x in points]

    def slope(b: Tensor, a: Tensor) -> float:
        pair = (b.clone().requires_grad_(), a.clone().requires_grad_())
        value = low_rank_objective(pair, pairs, found, SHARES)
        return max(float(g.norm()) for g in torch.autograd.grad(value, pair))

    assert slope(b, a) < 1e-6 * slope(1.1 * b, a)


@pytest.mark.parametrize("inner", [2, 4])
def test_few_inner_steps_do_not_stall(monkeypatch, inner):
    """The residual may grow within a few steps that lower the objective: they are taken."""
    points, found = anchors(), metrics()
    values = []
    for steps in (12, inner):
        monkeypatch.setattr("manifold_merge.fisher_two_sided.INNER_ITERATIONS", steps)
        pair, _, _, status = problem(points, found).solve(2, 1e-6, 400)
        assert int(status) == Status.CONVERGED
        values.append(objective(pair, points, found))
    assert values[1] == pytest.approx(values[0], rel=1e-8)


def test_the_gradient_is_that_of_the_result():
    """The norm in the mean metric, with the other factor a frame: from dense matrices."""
    points, found = anchors(), metrics()
    solver = problem(points, found)
    (b, a), gradient, count, status = solver.solve(3, 0.0, 2)
    assert (int(count), int(status)) == (2, Status.MAX_ITERATIONS)
    residual = sum(
        w * m.output_side.dense() @ (b @ a.mT - SPACE.product(x)) @ m.input_side.dense()
        for w, m, x in zip(SHARES, found, points, strict=True)
    )
    left, right = (mean.dense() for mean in solver.means)
    squared = 0.0
    for matrix, near, far, other in ((residual, left, right, a), (residual.mT, right, left, b)):
        root = torch.linalg.cholesky(other.mT @ far @ other)
        frame = torch.linalg.solve_triangular(root, other.mT, upper=False).mT
        half = matrix @ frame
        squared += float((half * torch.linalg.solve(near, half)).sum())
    assert squared**0.5 > 0
    assert float(gradient) == pytest.approx(squared**0.5, rel=1e-6)


def test_the_mean_of_full_rank_is_the_dense_one():
    """With spans that fill the layer, the alternating solver reaches the unconstrained mean."""
    points = [draw(M + N, 6, seed=i) for i in range(3)]  # 2 · 18 columns: more than rows
    found = [  # gentle ones: bounded by the rank or not, alternating steps are slow elsewhere
        KroneckerFisher(M, N, input_gram=gram(N, i, 0.2), output_gram=gram(M, 10 + i, 0.2))
        for i in range(3)
    ]
    expected, best = dense(points, found)
    solution = low_rank_mean(SPACE, points, found, SHARES, rank=N, tolerance=1e-10)
    assert bool(solution.converged)
    close(SPACE.product(solution.point), expected, 1e-6)
    assert float(solution.objective) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("case", ["plain", "copies", "zero"])
@pytest.mark.parametrize("rank", [2, 5])
def test_gauges_change_nothing_even_where_spans_degenerate(case, rank):
    points, found = anchors(), metrics()
    if case == "copies":
        points[1] = points[0]
    elif case == "zero":  # as PEFT initialises: B is zero
        points[1] = torch.cat((torch.zeros(M, R, dtype=FLOAT64), points[1][M:]))
    generator = torch.Generator().manual_seed(5)
    moved = [SPACE.random_representative(x, generator=generator, condition=100.0) for x in points]
    starts = [problem(x, found).start(rank) for x in (points, moved)]
    close(starts[1][0] @ starts[1][1].mT, starts[0][0] @ starts[0][1].mT, 1e-8)
    for rounds, digits in ((5, 1e-8), (200, 1e-5)):  # at the end, as far as it has converged
        results = [
            low_rank_mean(SPACE, x, found, SHARES, rank=rank, max_iterations=rounds)
            for x in (points, moved)
        ]
        close(SPACE.product(results[1].point), SPACE.product(results[0].point), digits)


def test_nothing_but_zeros():
    points = [torch.zeros(M + N, R, dtype=FLOAT64)] * 3
    solution = low_rank_mean(SPACE, points, metrics(), SHARES, rank=4)
    assert bool(solution.converged)
    assert float(SPACE.product(solution.point).norm()) == 0


def test_a_batch_is_its_elements():
    points, found = anchors(4), metrics()
    shares = SHARES[:, None].expand(3, 4)
    whole = low_rank_mean(SPACE, points, found, shares, rank=3, tolerance=0.0, max_iterations=3)
    for i in range(4):
        one = [x[i] for x in points]
        alone = low_rank_mean(SPACE, one, found, SHARES, rank=3, tolerance=0.0, max_iterations=3)
        close(SPACE.product(whole.point[i]), SPACE.product(alone.point), 1e-9)
        assert float(whole.objective[i]) == pytest.approx(float(alone.objective), rel=1e-9)


FORMS = {
    # Of embeddings only frequencies are stored; a side may be missing, and forms may be mixed.
    "diagonal": [{"input_gram": Gram(remainder=torch.arange(1.0, N + 1).double())}] * 3,
    "mixed": [{"input_gram": spd(N, 0)}, {"input_gram": gram(N, 1)}, {}],
}


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_grams(form, batch):
    points = anchors(*batch)
    found = [
        KroneckerFisher(M, N, output_gram=(gram, spd)[i % 2](M, i), **sides)
        for i, sides in enumerate(FORMS[form])
    ]
    shares = SHARES.reshape(3, *(1,) * len(batch)).expand(3, *batch)
    solution = low_rank_mean(SPACE, points, found, shares, rank=12)
    assert bool(solution.converged)
    for i in range(3 if batch else 1):
        best = dense([x[i] for x in points] if batch else points, found)[1]
        reached = float(solution.objective[i] if batch else solution.objective)
        assert best * (1 - 1e-9) <= reached <= 1.02 * best


def test_rounds_in_the_small_problem_pay(monkeypatch):
    points, found = anchors(), metrics()
    with_rounds = objective(problem(points, found).start(2), points, found)
    monkeypatch.setattr("manifold_merge.fisher_two_sided.SMALL_ROUNDS", 0)
    without = objective(problem(points, found).start(2), points, found)
    assert SMALL_ROUNDS > 0
    assert with_rounds < without


# --- the statistics behind the metrics ------------------------------------------------------------


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).to(FLOAT64)


def exact_output_gram(model: nn.Sequential, x: Tensor) -> Tensor:
    """E JᵀJ of the first layer's output, by its derivative."""
    total = torch.zeros(6, 6, dtype=FLOAT64)
    for row in model[0](x).detach():
        jacobian = torch.autograd.functional.jacobian(model[1:], row)
        total += jacobian.T @ jacobian
    return total / len(x)


def test_more_draws_come_closer_to_the_expectation():
    model, x = linear(), draw(12, 5)
    expected = exact_output_gram(model, x)

    def error(draws: int) -> float:
        errors = []
        for seed in range(8):
            found = collect_statistics(
                model, [x[:5], x[5:]], ["0"], kind="kfac", likelihood="gaussian",
                draws=draws, seed=seed,
            )  # fmt: skip
            assert found.options["draws"] == draws
            errors.append((found.output_gram("0").dense() - expected).norm())
        return float(torch.stack(errors).mean() / expected.norm())

    one, many = error(1), error(64)
    assert many == pytest.approx(one / 8, rel=0.4)  # the noise falls with the root of the number
    assert many < 0.1


def test_draws_of_the_diagonal_are_averaged():
    model, x = linear(), draw(3, 5)
    total = collect_statistics(model, [x], kind="diagonal", likelihood="gaussian", draws=400)
    jacobian = model[1](model[0](x)).detach()  # of the last layer, noise does not depend on it
    expected = jacobian.square().mean(0).expand(4, 6)
    torch.testing.assert_close(total.diagonals["2.weight"], expected, rtol=0.25, atol=0.02)


def test_grams_of_gradients_have_a_rank_of_their_own():
    model = nn.Sequential(nn.Linear(40, 44), nn.Tanh(), nn.Linear(44, 40)).to(FLOAT64)
    found = collect_statistics(
        model, [draw(30, 40)], kind="kfac", likelihood="gaussian", rank=8, output_rank=3
    )
    assert found.gram("0").factor is not None
    assert found.gram("0").factor.shape == (40, 8)
    assert found.output_gram("0").factor is not None
    assert found.output_gram("0").factor.shape == (44, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws is 0, expected 1 or more"),
        ({"draws": 2, "labels": "given"}, "1 with labels='given': those are not drawn"),
        ({"output_rank": 0}, "output_rank is 0, expected at least 1"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        collect_statistics(linear(), [draw(3, 5)], kind="kfac", **options)


def test_a_scaled_gram():
    for one in (gram(6, 0), Gram(matrix=spd(6, 1))):
        close(one.scaled(2.5).dense(), 2.5 * one.dense(), 1e-14)
    assert Gram(matrix=spd(3, 0), count=7).scaled(2.0).count == 7


def test_calibration_measures_changes_relative_to_the_spread_of_features(tmp_path):
    """Three times the features: what they are worth compared with other tasks stays the same."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": draw(2, 5), "lora_B": draw(6, 2)}
    tensors = {f"base_model.model.0.{name}.weight": x for name, x in factors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model, x = linear(), list(draw(9, 5))

    def calibrate(data, **options):
        return calibrate_adapter(tmp_path, model, data, kind="kfac", **options)

    found = [calibrate(x)]
    with torch.no_grad():
        model[2].weight *= 3
        model[2].bias.add_(5)
    found.append(calibrate(x))
    variance = [one.options["feature_variance"] for one in found]
    assert variance[1] == pytest.approx(9 * variance[0], rel=1e-9)
    close(found[1].output_gram("0").dense(), found[0].output_gram("0").dense(), 1e-9)
    single = calibrate(x[:1])  # no spread to compare with
    assert single.options["feature_variance"] == 1.0
    with pytest.raises(ValueError, match="draws: expected 1 or more, got 0"):
        calibrate(x, draws=0)
