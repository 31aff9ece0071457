"""Means of tensors that are spread over processes equal those of whole tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from sharded_worker import MEANS, anchors, mean_of, models, running, step
from two_processes import found_by_two

from manifold_merge import FrechetAveragedModel, frechet_mean
from manifold_merge.sharded import is_sharded, local_part, total_over_mesh

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("sharded_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="torch is built without torch.distributed",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found; started once."""
    return found_by_two(WORKER, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("way", [0, 1, "copies"])
@pytest.mark.parametrize("name", MEANS)
def test_means(seen: list[dict[str, Any]], name: str, way: int | str) -> None:
    """Split by rows, by columns, and by rows with a copy in each process."""
    one = mean_of(name)
    for results in seen:
        point, objective, gradient_norm = results[f"{name}, {way}"]
        torch.testing.assert_close(point, one.point)
        torch.testing.assert_close(objective, one.objective)
        assert gradient_norm.shape == one.gradient_norm.shape


@pytest.mark.parametrize("name", ["step", "step, whole anchors", "step, copies"])
def test_a_step_of_the_optimiser(seen: list[dict[str, Any]], name: str) -> None:
    first, *others = models(4)
    before = first[0].weight.detach().clone()
    parameters, objective = step(first, others)
    assert not torch.equal(parameters["0.weight"], before)
    for results in seen:
        torch.testing.assert_close(results[name], (parameters, objective))


def test_a_running_average(seen: list[dict[str, Any]]) -> None:
    parameters = running(FrechetAveragedModel(models(1)[0]), models())
    for results in seen:
        torch.testing.assert_close(results["running"], parameters)


ERRORS = {
    "sphere": ("points[0]: it is spread over processes", "Sphere", "full_tensor()"),
    "median": ("p=1: the median of points of 2 dimensions", "Euclidean(ndim=0)"),
    "mixed": ("points[3]: expected a DTensor", "Shard(dim=0)", "Replicate()", "redistribute"),
    "plain": ("points[3]: expected a DTensor", "not split"),
    "nan": ("points[1]: 1 entries are NaN",),
    "anchors": ("points: (Shard(dim=0),) spreads the anchors over processes", "process_group="),
    "information": ("metrics[0]: Fisher information of shape (5, 3) does not fit",),
    "gradient": ("no gradient through means of DTensors; call frechet_mean under torch.no_grad",),
    "start": ("start: not for DTensors",),
    "group": ("points: DTensors are spread over processes already",),
    "pair": ("lora_B.default.weight", "LoRAQuotient", "full_tensor()"),
    "running pair": ("lora_B.default.weight", "LoRAQuotient", "full_tensor()"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(seen: list[dict[str, Any]], name: str) -> None:
    for results in seen:
        for text in ERRORS[name]:
            assert text in results["errors"][name]


def test_each_entry_is_a_point_where_points_have_no_dimension() -> None:
    """What the sharded means above are compared with, by torch itself."""
    points = torch.stack(anchors(5, 3))
    mean, median = (frechet_mean(geoopt.Euclidean(), points, p=p) for p in (2, 1))
    torch.testing.assert_close(mean.point, points.mean(0))
    torch.testing.assert_close(median.point, points.median(0).values)
    assert mean.objective.shape == (5, 3)


def test_plain_tensors_stay_as_they_are() -> None:
    x = torch.ones(2)
    assert not is_sharded(x)
    assert local_part(x, x) is x
    assert total_over_mesh(x, x) is x
