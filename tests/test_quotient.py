"""The abstraction itself, on a discrete and on a continuous quotient without LoRA."""

from __future__ import annotations

import copy
import math
import pickle

import geoopt
import pytest
import torch
from torch import Tensor

from manifold_merge import QuotientManifold, frechet_mean
from manifold_merge.checks import check_manifold
from manifold_merge.quotient import squared_distance

FLOAT64 = torch.float64


class SwappedPairs(QuotientManifold):
    """Unordered pairs of points of the plane: the group exchanges the two rows."""

    name = "SwappedPairs"

    def __init__(self):
        super().__init__(geoopt.Euclidean(ndim=2))

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        swapped = y.flip(-2)
        kept_is_closer = (x - y).square().sum((-2, -1)) <= (x - swapped).square().sum((-2, -1))
        return torch.where(kept_is_closer[..., None, None], y, swapped)

    def random_gauge(self, x, *, generator=None, condition=10.0):
        return lambda z: z.flip(-2)


class Shapes(QuotientManifold):
    """Clouds of three points modulo translation: a continuous group of isometries."""

    name = "Shapes"

    def __init__(self):
        super().__init__(geoopt.Euclidean(ndim=2))

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (x - y).mean(-2, keepdim=True)

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        return u - u.mean(-2, keepdim=True)

    def random_vertical(self, x, *, generator=None):
        shift = torch.randn(*x.shape[:-2], 1, x.shape[-1], dtype=x.dtype, generator=generator)
        return shift.expand_as(x)

    def random_gauge(self, x, *, generator=None, condition=10.0):
        # Translations act affinely on points and trivially on vectors: no linear action exists.
        raise NotImplementedError


CASES = {"discrete": (SwappedPairs(), (2, 2)), "continuous": (Shapes(), (3, 2))}
BOTH = pytest.mark.parametrize(("manifold", "shape"), CASES.values(), ids=CASES)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_contract_of_a_discrete_quotient(batch, dtype):
    report = check_manifold(SwappedPairs(), shape=(2, 2), batch=batch, dtype=dtype, strict=True)
    assert report["gauge_invariance"].status == "passed"
    assert report["geodesic_distance"].status == "passed"


@BOTH
def test_distance_is_the_least_over_the_class(manifold, shape):
    x, y = torch.randn(2, 50, *shape, dtype=FLOAT64)
    if shape == (2, 2):
        members = torch.stack((y, y.flip(-2)))
    else:
        steps = torch.linspace(-3, 3, 61, dtype=FLOAT64)
        members = y + torch.cartesian_prod(steps, steps)[:, None, None]
    wanted = (x - members).square().sum((-2, -1)).amin(0).sqrt()
    slack = 0.0 if shape == (2, 2) else 0.2
    assert bool((manifold.dist(x, y) <= wanted + 1e-12).all())
    assert bool((manifold.dist(x, y) >= wanted - slack - 1e-12).all())
    torch.testing.assert_close(manifold.dist(x, y), manifold.dist(y, x))
    squared, log = manifold.dist2_logmap(x, y)
    torch.testing.assert_close(squared, manifold.dist(x, y) ** 2)
    torch.testing.assert_close(log, manifold.logmap(x, y))
    assert bool(manifold.same_point(manifold.expmap(x, log), y).all())
    assert not bool(manifold.same_point(x, y).any())


@BOTH
def test_keepdim_and_broadcasting(manifold, shape):
    x, y = torch.randn(4, 1, *shape, dtype=FLOAT64), torch.randn(3, *shape, dtype=FLOAT64)
    assert manifold.dist(x, y).shape == (4, 3)
    assert manifold.dist(x, y, keepdim=True).shape == (4, 3, 1, 1)
    assert manifold.inner(x, x, keepdim=True).shape == (4, 1, 1, 1)


def test_horizontal_vectors_of_a_continuous_quotient():
    manifold = Shapes()
    x, u = torch.randn(2, 5, 3, 2, dtype=FLOAT64)
    vertical = manifold.random_vertical(x)
    for method in (manifold.horizontal, manifold.proju, manifold.egrad2rgrad):
        lifted = method(x, u)
        torch.testing.assert_close(manifold.inner(x, lifted, vertical), torch.zeros(5).double())
        torch.testing.assert_close(method(x, lifted), lifted)
    carried = manifold.transp(x, x + 1, u)
    torch.testing.assert_close(manifold.horizontal(x + 1, carried), carried)
    ok, reason = manifold.check_vector_on_tangent(x, u, explain=True)
    assert not ok
    assert "vertical part" in reason
    assert manifold.check_vector_on_tangent(x, manifold.proju(x, u))


def test_discrete_quotients_have_no_vertical_vectors():
    manifold = SwappedPairs()
    x = torch.randn(2, 2)
    assert torch.equal(manifold.random_vertical(x), torch.zeros(2, 2))
    assert torch.equal(manifold.horizontal(x, x), x)


def test_what_a_subclass_must_write_is_named():
    bare = QuotientManifold(geoopt.Euclidean(ndim=1))
    x = torch.zeros(3)
    with pytest.raises(NotImplementedError, match="write _align"):
        bare.align(x, x)
    with pytest.raises(NotImplementedError, match=r"add random_gauge\(self, x.*y -> g y"):
        bare.random_gauge(x)
    with pytest.raises(NotImplementedError, match=r"add random_gauge\(self, x.*y -> g y"):
        bare.random_representative(x)
    with pytest.raises(NotImplementedError, match="no closed form"):
        bare.closed_form_mean(x, x)


def test_random_points_are_parameters_of_the_quotient():
    manifold = SwappedPairs()
    parameter = geoopt.ManifoldParameter(manifold.random(2, 2), manifold=manifold)
    assert parameter.manifold is manifold


@pytest.mark.parametrize("method", ["align", "horizontal"])
def test_wrong_shapes_are_refused(method):
    with pytest.raises(ValueError, match="requires more than 2 dim"):
        getattr(SwappedPairs(), method)(torch.zeros(2), torch.zeros(2, 2))


def test_reduce_refuses_a_rank():
    points = [torch.zeros(2, 2), torch.ones(2, 2)]
    manifold, stacked, restore = SwappedPairs().reduce(points)
    assert isinstance(manifold, SwappedPairs)
    assert torch.equal(restore(stacked[1]), points[1])
    with pytest.raises(ValueError, match="rank: points of SwappedPairs"):
        frechet_mean(SwappedPairs(), points, rank=1)


def test_reduce_refuses_points_of_other_shapes():
    with pytest.raises(ValueError, match=r"one shape is expected.*\(3, 2\), \(4, 2\)"):
        frechet_mean(Shapes(), [torch.ones(4, 2), torch.ones(3, 2)])


def test_mean_of_unordered_pairs():
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=FLOAT64)
    points = torch.stack([x, (x + 0.2).flip(-2), x - 0.2])
    mean = frechet_mean(SwappedPairs(), points)
    assert mean.converged
    assert bool(SwappedPairs().same_point(mean.point, x, atol=1e-12))


@BOTH
def test_copies_and_pickles(manifold, shape):
    x, y = torch.randn(2, *shape)
    for twin in (copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))):
        assert torch.equal(twin.dist(x, y), manifold.dist(x, y))


class Circle:
    """Angles, with a distance whose derivative is only known to squared_distance."""

    ndim = 1

    def _dist2(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self._log(x, y).square().sum(-1)

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        return self._log(x, y)

    def _log(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.remainder(y - x + math.pi, 2 * math.pi) - math.pi


def test_squared_distance_broadcasts_and_differentiates():
    x = torch.randn(4, 1, 1, dtype=FLOAT64, requires_grad=True)
    y = torch.randn(3, 1, dtype=FLOAT64, requires_grad=True)
    assert squared_distance(Circle(), x, y).shape == (4, 3)
    assert torch.autograd.gradcheck(lambda x, y: squared_distance(Circle(), x, y), (x, y))


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (1, None)], ids=str)
def test_squared_distance_under_vmap(in_dims):
    shapes = [(4, 1) if dim is None else (4, 5, 1) if dim == 1 else (5, 4, 1) for dim in in_dims]
    x, y = (torch.randn(shape, dtype=FLOAT64) for shape in shapes)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return squared_distance(Circle(), x, y)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return distance(x, y).sum()

    def row(z: Tensor, dim: int | None, i: int) -> Tensor:
        return z if dim is None else z.select(dim, i)

    mapped = torch.func.vmap(distance, in_dims)(x, y)
    inside = torch.func.vmap(torch.func.grad(total), in_dims)(x, y)
    outside = torch.func.grad(lambda x: torch.func.vmap(distance, in_dims)(x, y).sum())(x)
    slopes = []
    for i in range(5):
        one, two = row(x, in_dims[0], i), row(y, in_dims[1], i)
        torch.testing.assert_close(mapped[i], distance(one, two))
        slopes.append(torch.func.grad(total)(one, two))
        torch.testing.assert_close(inside[i], slopes[-1])
    dim = in_dims[0]
    summed = torch.stack(slopes).sum(0) if dim is None else torch.stack(slopes, dim)
    torch.testing.assert_close(outside, summed)
