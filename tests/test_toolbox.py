"""Median, variance, geodesics, one-pass mean and tangent PCA."""

import geoopt
import pytest
import torch
from frechet_cases import CASES, GEOOPT, cloud, difference, names, random_point, tangent
from sklearn.decomposition import PCA

from manifold_merge import frechet_mean
from manifold_merge.accurate import accurate, dist2_logmap, inner
from manifold_merge.toolbox import (
    frechet_median,
    frechet_variance,
    geodesic,
    inductive_mean,
    tangent_pca,
)

QUICK = names(searched=False)
EXACT = [name for name in CASES if "chordal" not in name and name not in ("Polar", "Stiefel")]
EXACT = [name for name in EXACT if "LoRA" not in name or "invariant" in name]


@pytest.mark.parametrize("name", [n for n in QUICK if "chordal" not in n])
def test_median_resists_outliers_that_move_the_mean(name):
    case = CASES[name]
    good = cloud(case, 6, radius=0.2)
    centre = frechet_mean(case.manifold, good).point
    bad = case.manifold.expmap(centre, tangent(case, centre, 1.2))
    m = accurate(case.manifold)
    median = frechet_median(case.manifold, [*good, bad, bad]).point
    mean = frechet_mean(case.manifold, [*good, bad, bad]).point
    moved = [float(dist2_logmap(m, centre, x)[0].sqrt()) for x in (median, mean)]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("name", QUICK)
def test_variance(name):
    case = CASES[name]
    points, weights = cloud(case, 4, 2), [1.0, 2.0, 3.0, 0.5]
    mean = frechet_mean(case.manifold, points, weights)
    around = frechet_variance(case.manifold, points, weights, mean.point)
    assert torch.allclose(around, mean.objective, rtol=1e-9)
    assert torch.allclose(frechet_variance(case.manifold, points, weights), around, rtol=1e-9)
    elsewhere = frechet_variance(case.manifold, points, weights, points[0])
    assert bool((elsewhere > around).all())


@pytest.mark.parametrize("name", EXACT)
def test_geodesic(name):
    case = CASES[name]
    x, y = cloud(case, 2, 2)
    m = accurate(case.manifold)
    path = geodesic(case.manifold, x, y, [0.0, 0.3, 1.0])
    assert path.shape == (3, 2, *case.shape)
    assert difference(case, x, path[0]) < 1e-10
    assert difference(case, y, path[2]) < 1e-8
    whole, part = (dist2_logmap(m, x, z)[0].sqrt() for z in (y, path[1]))
    assert torch.allclose(part, 0.3 * whole, rtol=1e-7)
    assert torch.equal(geodesic(case.manifold, x, y, 0.3), path[1])


@pytest.mark.parametrize("name", [n for n in QUICK if "chordal" not in n])
def test_inductive_mean_of_two_is_the_mean(name):
    case = CASES[name]
    points = cloud(case, 2)
    expected = frechet_mean(case.manifold, points, [1, 3]).point
    assert difference(case, expected, inductive_mean(case.manifold, points, [1, 3])) < 1e-9
    alone = inductive_mean(case.manifold, points, [0, 1])
    assert difference(case, points[1], alone) < 1e-12


def test_inductive_mean_approaches_the_mean():
    case = GEOOPT["SPD"]
    points = cloud(case, 200, radius=1.0)
    mean = frechet_mean(case.manifold, points).point
    errors = [
        float(case.manifold.dist(mean, inductive_mean(case.manifold, points[:k]))) for k in (5, 200)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_tangent_pca_in_a_flat_space_is_that_of_scikit_learn():
    data = torch.randn(12, 5, dtype=torch.float64) * torch.tensor([3, 2, 1, 0.5, 0.1]).double()
    ours, theirs = tangent_pca(geoopt.Euclidean(1), data, components=3), PCA(3).fit(data.numpy())
    assert torch.allclose(ours.mean, torch.as_tensor(theirs.mean_))
    variances = torch.as_tensor(theirs.explained_variance_) * 11 / 12
    assert torch.allclose(ours.variances, variances)
    overlap = (ours.directions @ torch.as_tensor(theirs.components_).mT).abs()
    assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(ours.scores.abs(), torch.as_tensor(theirs.transform(data.numpy())).abs())


@pytest.mark.parametrize("name", EXACT)
def test_tangent_pca_laws(name):
    case = CASES[name]
    points, weights = cloud(case, 4, 2), [1.0, 2.0, 1.0, 1.5]
    pca = tangent_pca(case.manifold, points, weights)
    m = pca.manifold
    base = pca.mean.expand_as(pca.directions)
    for i in range(4):
        other = pca.directions[i].expand_as(pca.directions)
        products = inner(m, base, pca.directions, other)
        expected = torch.zeros_like(products)
        expected[i] = (pca.variances[i] > 1e-12).to(products.dtype)
        assert torch.allclose(products, expected, atol=1e-8)
    assert torch.allclose(pca.variances.sum(0), pca.total)
    assert torch.allclose(pca.total, frechet_variance(case.manifold, points, weights), rtol=1e-6)
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    spread = (w[:, None, None] * pca.scores.square()).sum(0)
    assert torch.allclose(spread, pca.variances, atol=1e-9)
    again = pca.reconstruct()
    for x, y in zip(points, again, strict=True):
        assert difference(case, x, y) < 1e-7


def test_tangent_pca_finds_the_geodesic():
    case = GEOOPT["Sphere"]
    x = random_point(case)
    u = tangent(case, x)
    points = torch.stack([case.manifold.expmap(x, t * u) for t in (-0.6, -0.1, 0.2, 0.5)])
    pca = tangent_pca(case.manifold, points, components=1)
    assert float(pca.variances / pca.total) > 1 - 1e-12
    assert torch.allclose(pca.reconstruct(), points, atol=1e-10)


@pytest.mark.parametrize("components", [0, 5])
def test_number_of_components(components):
    with pytest.raises(ValueError, match="1 <= components <= 4"):
        tangent_pca(geoopt.Euclidean(1), torch.randn(4, 2), components=components)
