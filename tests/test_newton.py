"""Newton's method on spheres, where anchors are spread over more than a hemisphere."""

from __future__ import annotations

import geoopt
import pytest
import torch

from manifold_merge.frechet import frechet_mean

SPHERE = geoopt.Sphere()


@pytest.mark.parametrize("dimension", [2, 3, 10])
def test_wide_clouds_converge_on_the_sphere(dimension: int):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 300, dimension, generator=generator, dtype=torch.float64)
    points[..., 0] += 1.5
    points = points / points.norm(dim=-1, keepdim=True)
    mean = frechet_mean(SPHERE, points, tolerance=1e-13)
    assert mean.converged
    assert mean.solver == "newton"
    assert int(mean.iterations.max()) <= 12  # Karcher's iteration takes some fifty
    assert float((mean.point.norm(dim=-1) - 1).abs().amax()) <= 1e-15
    cosine = (mean.point * points).sum(-1, keepdim=True)
    across = points - cosine * mean.point
    angle = torch.atan2(across.norm(dim=-1, keepdim=True), cosine)
    logs = angle * across / across.norm(dim=-1, keepdim=True)
    assert float(logs.mean(0).norm(dim=-1).amax()) <= 1e-12
    assert float((mean.objective - angle.square().mean(0)[:, 0]).abs().amax()) <= 1e-12
