"""Means over processes equal those of one process; errors reach every process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from collective_worker import FAILING, Case, cases
from two_processes import found_by_two

from manifold_merge import FrechetSolution, QuotientManifold, frechet_mean

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("collective_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="torch is built without torch.distributed",
)
Seen = list[tuple[dict[str, Any], dict[str, str]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Results and errors of both processes; started once."""
    return found_by_two(WORKER, tmp_path_factory.mktemp("processes"))


def gathered(case: Case) -> FrechetSolution:
    """The mean in this process, by the same iteration where the usual solver is another."""
    options = dict(case.options)
    solver = options.pop("solver", "karcher" if options.get("p") == 1 else "auto")
    return frechet_mean(
        case.manifold, case.points, case.weights, solver=solver, metrics=case.metrics, **options
    )


@pytest.mark.parametrize("name", cases())
def test_equal_to_the_mean_in_one_process(seen: Seen, name: str) -> None:
    case = cases()[name]
    mine, other = (results[name] for results, _ in seen)
    assert torch.equal(mine["point"], other["point"])
    assert torch.equal(mine["objective"], other["objective"])
    one = gathered(case)
    assert mine["point"].dtype == one.point.dtype
    assert mine["point"].shape == one.point.shape
    digits = 1e-5 if one.point.dtype == torch.float32 else 1e-8
    if isinstance(case.manifold, QuotientManifold):
        difference = case.manifold.relative_difference(one.point, mine["point"])
        # An angle or root of round-off, where nothing but round-off is left.
        assert float(difference.max()) < max(digits, 1e-7)
    else:
        torch.testing.assert_close(mine["point"], one.point, rtol=digits, atol=digits)
    torch.testing.assert_close(mine["objective"], one.objective, rtol=digits, atol=digits)
    assert mine["gradient_norm"].shape == one.gradient_norm.shape
    assert mine["converged"] == other["converged"]
    assert mine["converged"] or not one.converged
    shares = torch.cat((mine["weights"], other["weights"]))
    torch.testing.assert_close(shares, one.weights)
    if one.paths:
        assert sum(mine["paths"].values()) == sum(one.paths.values())


def test_by_hand(seen: Seen) -> None:
    """A weighted geometric mean, which the user's manifold has."""
    case = cases()["written by a user"]
    points, w = torch.stack(case.points), torch.as_tensor(case.weights).double()
    expected = torch.einsum("k,kbi->bi", w / w.sum(), points.log()).exp()
    torch.testing.assert_close(seen[1][0]["written by a user"]["point"], expected)


def test_the_mean_is_not_that_of_one_share(seen: Seen) -> None:
    """What the first process alone would find is far away: something was exchanged."""
    case = cases()["sphere"]
    points, weights, _ = case.share(0)
    alone = frechet_mean(case.manifold, points, weights)
    assert (alone.point - seen[0][0]["sphere"]["point"]).norm() > 1e-3


def test_no_gauge(seen: Seen) -> None:
    for results, _ in seen:
        assert float(results["gauge residual"].max()) < 1e-6


ERRORS = {
    "nan": "ValueError: process 1 of 2: points[1]: 4 entries are NaN",
    "no anchor": "ValueError: process 1 of 2: points: at least one anchor is needed",
    "batch": "points (batch shape): process 1 has (2,), process 0 has (3,)",
    "size": "points (shape): process 1 has (3,), process 0 has (4,)",
    "dtype": "process 1 has 'torch.float32', process 0 has 'torch.float64'",
    "solver": "p: process 1 has 2, process 0 has 1",
    "unknown solver": "with process_group= the solvers are auto, closed_form, karcher",
    "closed form": "p=2 on geoopt.Euclidean), got p=2 on Sphere manifold; use 'karcher'",
    "weights": "process 1 of 2: weights: [1.0, -1.0] has a negative entry",
    "batch of weights": "process 1 of 2: weights: shape (2, 2) does not fit anchors of batch shape",
    "empty": "points: the batch of shape (0,) is empty; skip this call",
    "weights here only": "weights (given): process 1 has True, process 0 has False",
    "no weight": "their sum over all processes must be positive",
    "metrics": "process 1 of 2: metrics: with process_group= they are FisherEuclidean",
    "rank": "rank: with process_group= it can be chosen on a LoRAQuotient only",
    "start": "process 1 of 2: start: expected shape (3, 4), got (1, 4)",
    "gauge": "gauge_check: Sphere manifold is not a quotient manifold",
    "in the middle": "RuntimeError: process 1 of 2: out of luck",
    **{f"{m}, call {c}": "RuntimeError: process 1 of 2: out of luck" for m, c in FAILING},
    "curvature": "manifold (parameters): process 1 has {'isp_c':",
    "subspace": "manifold (parameters): process 1 has {'projector':",
    "size of information": "process 1 of 2: metrics[0]: Fisher information of shape (3,)",
    "sign of information": "process 1 of 2: weights: [2.0, -1.0] has a negative entry",
    "start of information": "start: means with metrics= need none; leave it out",
    "gradient": "NotImplementedError: process_group=: no gradient",
    "no group": "expected a torch.distributed.ProcessGroup, got 'world'",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_reach_every_process(seen: Seen, name: str) -> None:
    for _, errors in seen:
        assert ERRORS[name] in errors[name]


def test_a_process_that_goes_is_told(seen: Seen) -> None:
    assert "RuntimeError: another process of 2 ended" in seen[0][1]["lost"]
