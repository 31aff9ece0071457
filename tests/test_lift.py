"""The lifted mean against dense formulas, and the laws of a mean."""

import pytest
import torch

from manifold_merge import LoRAQuotient, Status, lifted_mean
from manifold_merge.lift import pairwise_cosines, pairwise_inner

M, N = 14, 11


def anchors(ranks=(2, 3, 4), batch=(), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    manifold = LoRAQuotient(M, N)
    return manifold, [
        manifold.random(*batch, M + N, r, generator=generator, dtype=dtype) * (1 + i)
        for i, r in enumerate(ranks)
    ]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def dense_lifted_mean(products, weights, power):
    """The definition, with dense m x n matrices and full eigendecompositions."""
    norms = [w.norm() for w in products]
    units = [w / n for w, n in zip(products, norms, strict=True)]

    def root(moment):
        values, vectors = torch.linalg.eigh(moment)
        keep = values > 1e-12 * values.max()
        return (vectors[:, keep] * values[keep] ** (-power / 2)) @ vectors[:, keep].mT

    left = root(sum(w * c @ c.mT for w, c in zip(weights, units, strict=True)))
    right = root(sum(w * c.mT @ c for w, c in zip(weights, units, strict=True)))
    total = torch.zeros_like(products[0])
    for w, n, c in zip(weights, norms, units, strict=True):
        u, s, vh = torch.linalg.svd(c, full_matrices=False)
        lifted = left @ (u * s ** (1 + 2 * power)) @ vh @ right
        total = total + w * n * lifted / lifted.norm()
    radius = sum(w * n**2 for w, n in zip(weights, norms, strict=True)).sqrt()
    return total, radius


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0, None])
@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.3, 0.5]])
def test_equals_the_dense_definition(power, weights):
    manifold, points = anchors()
    products = [manifold.product(x) for x in points]
    if power is None:
        units = sum(w * p / p.norm() for w, p in zip(weights, products, strict=True))
        exponent = 1 - float(units.norm()) ** 4
    else:
        exponent = power
    total, radius = dense_lifted_mean(
        products, torch.tensor(weights, dtype=torch.float64), exponent
    )
    full = lifted_mean(manifold, points, weights, power=power)
    assert full.point.shape[-1] == 9
    assert relative(manifold.product(full.point), total * radius / total.norm()) < 1e-11

    u, s, vh = torch.linalg.svd(total)
    truncated = (u[:, :3] * s[:3]) @ vh[:3]
    short = lifted_mean(manifold, points, weights, power=power, rank=3)
    assert relative(manifold.product(short.point), truncated * radius / truncated.norm()) < 1e-11


def test_objective_is_least_on_the_sphere():
    """Every other matrix of the same rank and norm has a larger objective."""
    manifold, points = anchors((3, 3))
    power = 0.7
    products = [manifold.product(x) for x in points]
    weights = torch.tensor([0.5, 0.5]).double()
    solution = lifted_mean(manifold, points, power=power, rank=3)
    mean = manifold.product(solution.point)
    total, radius = dense_lifted_mean(products, weights, power)
    # Σ wᵢ|W - Ŵᵢ|² = 2 radius² - 2 <W, D> on the sphere of that radius.
    assert float(solution.objective) == pytest.approx(
        float(2 * radius**2 - 2 * (mean * total).sum())
    )
    for seed in range(20):
        direction = manifold.random(
            M + N, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        other = manifold.product(solution.point + 1e-3 * direction)
        other = other * radius / other.norm()
        assert float((other * total).sum()) <= float((mean * total).sum()) + 1e-12


@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_gauge(condition):
    manifold, points = anchors(batch=(2,))
    moved = [
        manifold.random_representative(
            x, condition=condition, generator=torch.Generator().manual_seed(5)
        )
        for x in points
    ]
    one, two = (manifold.product(lifted_mean(manifold, p).point) for p in (points, moved))
    assert relative(two, one) < 1e-9


LAWS = {
    "copies are their own mean": (lambda x, y, z: ([x, x, x], None), lambda x, y, z: ([x], None)),
    "one-hot": (lambda x, y, z: ([x, y, z], [0, 1, 0]), lambda x, y, z: ([y], None)),
    "duplication": (
        lambda x, y, z: ([x, y], [2, 1]),
        lambda x, y, z: ([x, x, y], None),
    ),
    "order": (
        lambda x, y, z: ([x, y, z], [1, 2, 3]),
        lambda x, y, z: ([z, x, y], [3, 1, 2]),
    ),
    "weights have no scale": (
        lambda x, y, z: ([x, y, z], [1, 2, 3]),
        lambda x, y, z: ([x, y, z], [10, 20, 30]),
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("power", [None, 1.0])
def test_laws(law, power):
    manifold, points = anchors((3, 3, 3))
    one, two = (
        manifold.product(lifted_mean(manifold, p, w, rank=9, power=power).point)
        for p, w in (make(*points) for make in LAWS[law])
    )
    assert relative(two, one) < 1e-10


def test_one_anchor_is_its_own_mean():
    manifold, (x, *_) = anchors()
    assert relative(manifold.product(lifted_mean(manifold, [x]).point), manifold.product(x)) < 1e-12


def test_orthogonal_anchors_keep_their_norm():
    manifold = LoRAQuotient(6, 6)
    eye = torch.eye(6, dtype=torch.float64)
    points = [manifold.pack(eye[:, [i]] * 3, eye[[i]]) for i in range(4)]
    mean = manifold.product(lifted_mean(manifold, points).point)
    assert torch.allclose(mean, sum(manifold.product(x) for x in points) / 2, atol=1e-12)


def test_continuous_at_copies():
    """A small change of one of two copies changes the mean little; with power 1 it would not."""
    manifold, (x, y, _) = anchors((3, 3, 3))
    size = 1e-4 * x.norm() / y.norm()
    jumps = {}
    for power in (None, 1.0):
        mean = lifted_mean(manifold, [x, x + size * y], rank=6, power=power).point
        jumps[power] = relative(manifold.product(mean), manifold.product(x))
    assert jumps[None] < 1e-3 < 1e-1 < jumps[1.0]


def test_opposite_anchors_cancel_and_say_so():
    manifold, (x, *_) = anchors(batch=(2,))
    opposite = manifold.pack(-manifold.unpack(x)[0], manifold.unpack(x)[1])
    solution = lifted_mean(manifold, [x, opposite])
    assert not solution.point.any()
    assert (solution.status == Status.CANCELLED).all()
    squares = torch.stack([manifold.product(z).square().sum((-2, -1)) for z in (x, opposite)])
    torch.testing.assert_close(solution.objective, squares.mean(0))
    assert "opposite anchors cancel" in solution.message


def test_zero_anchors_and_batches():
    manifold, points = anchors((2, 2), batch=(3,))
    points[1] = points[1] * torch.tensor([1.0, 0.0, 1.0]).double()[:, None, None]
    both = lifted_mean(manifold, points)
    for i in range(3):
        single = lifted_mean(manifold, [p[i] for p in points])
        assert relative(manifold.product(both.point)[i], manifold.product(single.point)) < 1e-12
    # With a zero update beside it, the sphere is that of the mean squared norm.
    norm = manifold.product(both.point)[1].norm() / manifold.product(points[0])[1].norm()
    assert float(norm) == pytest.approx(0.5**0.5)
    nothing = lifted_mean(manifold, [p * 0 for p in points])
    assert not nothing.point.any()
    assert nothing.converged


def test_cosines_and_inner_products():
    manifold, points = anchors(batch=(2,))
    products = [manifold.product(x) for x in points]
    dense = torch.stack([torch.stack([(a * b).sum((-2, -1)) for b in products]) for a in products])
    assert torch.allclose(pairwise_inner(manifold, points), dense, rtol=1e-12)
    norms = torch.stack([a.norm(dim=(-2, -1)) for a in products])
    cosines = dense / norms[:, None] / norms[None]
    assert torch.allclose(pairwise_cosines(manifold, points), cosines, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"power": 1.5}, "power: expected a number from 0"),
        ({"weights": [1, -1, 1]}, "negative entry"),
        ({"weights": [1, 1]}, "expected 3, one for each anchor"),
        ({"rank": 12}, "rank: expected 1 <= rank <= 11"),
    ],
)
def test_misuse(options, match):
    manifold, points = anchors()
    with pytest.raises(ValueError, match=match):
        lifted_mean(manifold, points, **options)


def test_float32_keeps_its_digits():
    manifold, points = anchors()
    exact = manifold.product(lifted_mean(manifold, points).point)
    single = lifted_mean(manifold, [x.float() for x in points]).point
    assert single.dtype == torch.float32
    assert relative(manifold.product(single).double(), exact) < 1e-5
