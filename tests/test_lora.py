"""LoRAQuotient against dense oracles, and its contract: metrics, gradients, plumbing."""

from __future__ import annotations

import copy
import io
import pickle

import geoopt
import pytest
import torch
from lora_oracles import (
    DISTANCES,
    METRICS,
    SIZES,
    dense_horizontal,
    dense_inner,
    differential,
    draw,
    near,
    product,
    regauge,
    relative_gap,
    split,
    tangent_projection,
    vertical_basis,
)
from torch import Tensor

from manifold_merge import LoRAQuotient, frechet_mean
from manifold_merge.checks import check_manifold

FLOAT64 = torch.float64
EVERY_METRIC = pytest.mark.parametrize("metric", METRICS)
EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)
EVERY_SIZE = pytest.mark.parametrize(("m", "n", "r"), SIZES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Compare arrays relative to their largest entry."""
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * scale)


# --- the contract suite ---------------------------------------------------------------------------

# Approximated distances are no distances of the metric, and what follows from that.
APPROXIMATE = {
    "exact": (),
    # The mean of two one-sided lengths of the aligned difference: no triangle inequality.
    "aligned": ("distance", "log_distance"),
    # A chord measures with the metric of the surrounding matrices, not with the manifold's own.
    "chordal": ("geodesic_distance", "log_distance", "distance_gradient"),
}


# Laws that evaluate many integrated geodesics; the slow run has them for these too.
LONG = ("single_precision", "distance", "geodesic_variation", "broadcasting", "batching")


def contract(
    metric: str,
    distance: str,
    dtype: torch.dtype = FLOAT64,
    batch: tuple[int, ...] = (),
    left_out: tuple[str, ...] = (),
) -> None:
    skip = (*APPROXIMATE[distance], *left_out)
    if (metric, distance) == ("embedded", "chordal"):
        # The chord is longer than its projection on the tangent space.
        skip = ("log_distance", *left_out)
    m, n, r = 4, 3, 2
    # Points that shooting reaches from each other; those that it does not are a test of their own.
    first = draw(m, n, *batch, r)
    report = check_manifold(
        LoRAQuotient(m, n, metric, distance),
        points=[first, near(first, 0.15, seed=2), near(first, 0.15, seed=3)],
        batch=batch,
        dtype=dtype,
        exact=distance == "exact",
        strict=True,
        radius=0.2,
        skip=skip,
    )
    for law in ("gauge_invariance", "gauge_equivariance", "horizontality", "optimisers", "vmap"):
        assert report[law].status == "passed"


@EVERY_METRIC
@EVERY_DISTANCE
def test_contract(metric, distance):
    contract(metric, distance, left_out=() if metric == "invariant" else LONG)


@pytest.mark.slow
@EVERY_METRIC
@EVERY_DISTANCE
@pytest.mark.parametrize(
    ("dtype", "batch"),
    [(torch.float32, ()), (torch.float32, (2,)), (FLOAT64, ()), (FLOAT64, (2, 1, 3))],
    ids=str,
)
def test_contract_of_batches_and_single_precision(metric, distance, dtype, batch):
    contract(metric, distance, dtype, batch)


# --- metrics against their dense definitions ------------------------------------------------------


@EVERY_METRIC
@EVERY_SIZE
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_inner_product_is_its_definition(metric, m, n, r, batch):
    manifold = LoRAQuotient(m, n, metric)
    x = regauge(manifold, draw(m, n, *batch, r), condition=10)
    u, v = draw(m, n, *batch, r, seed=1), draw(m, n, *batch, r, seed=2)
    close(manifold.inner(x, u, v), dense_inner(manifold, x, u, v))
    close(manifold.inner(x, u), dense_inner(manifold, x, u, u))
    close(manifold.norm(x, u), dense_inner(manifold, x, u, u).sqrt())
    assert manifold.inner(x, u, keepdim=True).shape == (*batch, 1, 1)
    assert manifold.norm(x, u, keepdim=True).shape == (*batch, 1, 1)
    whole = manifold.component_inner(x, u, v)
    assert whole.shape == x.shape
    close(whole, manifold.inner(x, u, v, keepdim=True).expand_as(x), 0)


@EVERY_METRIC
@EVERY_SIZE
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_horizontal_projection_is_the_orthogonal_one(metric, m, n, r, condition):
    manifold = LoRAQuotient(m, n, metric)
    x = regauge(manifold, draw(m, n, r), condition)
    u = draw(m, n, r, seed=1)
    for method in (manifold.horizontal, manifold.proju):
        close(method(x, u), dense_horizontal(manifold, x, u), 1e-8)
        close(method(x, method(x, u)), method(x, u), 1e-8)
    close(differential(manifold, x, manifold.horizontal(x, u)), differential(manifold, x, u), 1e-8)
    for vertical in vertical_basis(manifold, x):
        assert float(manifold.horizontal(x, vertical).abs().max()) < 1e-8 * condition
    assert float(differential(manifold, x, manifold.random_vertical(x)).abs().max()) < 1e-8


def linear_gradient(manifold: LoRAQuotient, x: Tensor, g: Tensor) -> Tensor:
    """Euclidean gradient of <G, W>."""
    b, a = split(manifold, x)
    return torch.cat((g @ a, g.mT @ b), -2)


@EVERY_METRIC
@EVERY_SIZE
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gradient_represents_the_differential(metric, m, n, r, batch):
    manifold = LoRAQuotient(m, n, metric)
    x = regauge(manifold, draw(m, n, *batch, r), condition=10)
    g = torch.randn(*batch, m, n, dtype=FLOAT64)
    egrad = linear_gradient(manifold, x, g)
    rgrad = manifold.egrad2rgrad(x, egrad)
    close(manifold.horizontal(x, rgrad), rgrad)
    scale = (manifold.norm(x, rgrad) ** 2).amax()
    for seed in range(2 * r * r + 1):  # more directions than the vertical space has
        v = draw(m, n, *batch, r, seed=seed)
        gap = manifold.inner(x, rgrad, v) - (egrad * v).sum((-2, -1))
        assert float(gap.abs().max()) < 1e-9 * float(scale + (egrad * v).sum((-2, -1)).abs().amax())


@EVERY_SIZE
def test_embedded_gradient_is_the_tangent_projection(m, n, r):
    manifold = LoRAQuotient(m, n, "embedded")
    x = regauge(manifold, draw(m, n, 3, r), condition=100)
    g = torch.randn(3, m, n, dtype=FLOAT64)
    rgrad = manifold.egrad2rgrad(x, linear_gradient(manifold, x, g))
    close(differential(manifold, x, rgrad), tangent_projection(manifold, x, g))


@EVERY_METRIC
def test_chordal_logarithm_is_the_projected_difference(metric):
    manifold = LoRAQuotient(6, 5, metric, "chordal")
    x, y = draw(6, 5, 4, 2), draw(6, 5, 4, 3, seed=1)
    log = manifold.logmap(x, y)
    target = product(manifold, y) - product(manifold, x)
    close(differential(manifold, x, log), tangent_projection(manifold, x, target))
    close(manifold.dist(x, y), target.norm(dim=(-2, -1)))


@pytest.mark.parametrize("metric", METRICS)
@EVERY_SIZE
def test_aligned_difference_is_horizontal(metric, m, n, r):
    manifold = LoRAQuotient(m, n, metric, "aligned")
    x = draw(m, n, 3, r)
    y = regauge(manifold, near(x, 0.02), condition=100)
    aligned = manifold.align(x, y)
    assert bool((manifold.log_path(x, y) == 1).all())
    assert relative_gap(manifold, aligned, y) < 1e-11
    for point, lift in zip(x, aligned - x, strict=True):
        close(dense_horizontal(manifold, point, lift), lift, 1e-7)
    close(manifold.logmap(x, y), aligned - x, 1e-7)
    # Differences that are orthogonal to the class: aligning was a critical point of the distance.
    for point, one in zip(x, aligned, strict=True):
        basis = vertical_basis(manifold, point)
        total = LoRAQuotient(m, n, "mixed" if metric == "embedded" else metric)
        slopes = total.inner(point.expand_as(basis), (one - point).expand_as(basis), basis)
        assert float(slopes.abs().max()) < 1e-8


# --- points, factors and messages -----------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_pack_and_unpack(dtype, batch):
    manifold = LoRAQuotient(6, 5)
    B, A = torch.randn(*batch, 6, 2, dtype=dtype), torch.randn(*batch, 2, 5, dtype=dtype)
    x = manifold.pack(B, A)
    assert x.shape == (*batch, 11, 2)
    for back, given in zip(manifold.unpack(x), (B, A), strict=True):
        assert torch.equal(back, given)
    torch.testing.assert_close(manifold.product(x), B @ A)


@pytest.mark.parametrize(
    ("b", "a"),
    [((6,), (2, 5)), ((5, 2), (2, 5)), ((6, 2), (2, 6)), ((6, 2), (3, 5)), ((6, 2), (5, 2))],
    ids=str,
)
def test_pack_refuses(b, a):
    with pytest.raises(ValueError, match=r"pack expects B \(\.\.\., 6, r\) and A \(\.\.\., r, 5\)"):
        LoRAQuotient(6, 5).pack(torch.zeros(b), torch.zeros(a))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "positive sizes, got out_features=0"),
        ((5, -1), "in_features=-1"),
        ((5, 5, "euclidean"), "mixed, invariant, embedded; got 'euclidean'"),
        ((5, 5, "mixed", "geodesic"), "exact, aligned, chordal; got 'geodesic'"),
    ],
    ids=str,
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRAQuotient(*arguments)


EXPLAINED = {
    "too few dimensions": (torch.zeros(11), r"shape \(\.\.\., 6 \+ 5, r\)"),
    "wrong rows": (torch.zeros(10, 2), r"shape \(\.\.\., 6 \+ 5, r\)"),
    "rank above the size": (torch.ones(11, 6), "rank 1 <= r <= 5, got r = 6"),
    "rank zero": (torch.ones(11, 0), "got r = 0"),
    "not finite": (torch.full((11, 2), torch.nan), "22 entries that are not finite"),
    "fresh adapter": (
        torch.cat((torch.zeros(6, 2), torch.ones(5, 2))),
        "1 of 1 pairs have a product of rank below 2 .*B = 0",
    ),
}


@pytest.mark.parametrize(("x", "message"), EXPLAINED.values(), ids=EXPLAINED)
def test_points_are_explained(x, message):
    manifold = LoRAQuotient(6, 5)
    assert not manifold.check_point_on_manifold(x)
    ok, _ = manifold.check_point_on_manifold(x, explain=True)
    assert not ok
    with pytest.raises(ValueError, match=message):
        manifold.assert_check_point_on_manifold(x)


def test_vectors_are_explained():
    manifold = LoRAQuotient(6, 5)
    x = draw(6, 5, 2)
    ok, reason = manifold.check_vector_on_tangent(x, manifold.random_vertical(x), explain=True)
    assert not ok
    assert "vertical part of size" in reason
    assert manifold.check_vector_on_tangent(x, manifold.proju(x, draw(6, 5, 2, seed=1)))


@pytest.mark.parametrize("method", ["dist", "dist2", "align", "horizontal"])
def test_wrong_shapes_are_named(method):
    with pytest.raises(ValueError, match=r"should have shape \(\.\.\., 6 \+ 5, r\)"):
        getattr(LoRAQuotient(6, 5), method)(torch.zeros(11, 2), torch.zeros(9, 2))


@EVERY_METRIC
def test_projx_returns_its_argument(metric):
    x = draw(6, 5, 2)
    assert torch.equal(LoRAQuotient(6, 5, metric).projx(x), x)


@DTYPES
def test_random_and_origin(dtype):
    manifold = LoRAQuotient(60, 50)
    x = manifold.random(20, 110, 8, dtype=dtype)
    assert isinstance(x, geoopt.ManifoldTensor)
    assert x.dtype == dtype
    assert 0.8 < float(manifold.product(x).square().mean()) < 1.2
    same = [manifold.random(110, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)
    for size in ((110, 4), (2, 3, 110, 4)):
        origin = manifold.origin(size, dtype=dtype)
        assert origin.shape == size
        assert manifold.check_point_on_manifold(origin)
        corner = manifold.product(origin)[..., :4, :4]
        assert torch.equal(corner, torch.eye(4, dtype=dtype).expand_as(corner))
    with pytest.raises(ValueError, match="should have shape"):
        manifold.random(3, 2)


def test_gauges_have_the_condition_that_was_asked_for():
    manifold = LoRAQuotient(8, 8)
    x = draw(8, 8, 5, 4)
    for condition in (1.0, 1e4):
        gauge = manifold.random_gauge(x, condition=condition)
        G = torch.linalg.lstsq(x[:, :8], gauge(x)[:, :8]).solution
        assert torch.linalg.cond(G).sub(condition).abs().max() < 1e-6 * condition
        assert relative_gap(manifold, x, gauge(x)) < 1e-11  # rounding times condition


# --- autograd, vmap, compile ----------------------------------------------------------------------

PAIRS = pytest.mark.parametrize(
    ("metric", "distance"), [(m, d) for m in METRICS for d in DISTANCES]
)


@PAIRS
@pytest.mark.parametrize(("m", "n", "r"), [(4, 3, 2), (4, 2, 1), (2, 2, 2), (1, 1, 1)], ids=str)
def test_gradient_of_the_distance_by_differences(metric, distance, m, n, r):
    manifold = LoRAQuotient(m, n, metric, distance)
    x = draw(m, n, 2, r)
    y = regauge(manifold, near(x, 0.1), condition=5)
    steps = draw(m, n, 2, 2, r, seed=7)
    for method in (manifold.dist, manifold.dist2):
        leaves = [z.clone().requires_grad_() for z in (x, y)]
        gradients = torch.autograd.grad(method(*leaves).sum(), leaves)
        for i, (gradient, step) in enumerate(zip(gradients, steps, strict=True)):
            shift = [1e-4 * step if i == j else torch.zeros_like(step) for j in range(2)]
            ahead, back = (method(x + t * shift[0], y + t * shift[1]) for t in (1, -1))
            close((gradient * step).sum((-2, -1)), (ahead - back) / 2e-4, 1e-5)


@PAIRS
@DTYPES
def test_gradient_at_coinciding_points_is_zero(metric, distance, dtype):
    manifold = LoRAQuotient(6, 5, metric, distance)
    x = draw(6, 5, 3, 2, dtype=dtype)
    for y in (x.clone(), regauge(manifold, x, condition=10)):
        for method in (manifold.dist, manifold.dist2):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(method(leaf, y).sum(), leaf)
            assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) < 1e4 * torch.finfo(dtype).eps
    assert float(manifold.dist(x, x).max()) < 10 * torch.finfo(dtype).eps ** 0.5


@PAIRS
def test_second_derivatives_are_right_or_refused(metric, distance):
    manifold = LoRAQuotient(3, 3, metric, distance)
    x = draw(3, 3, 2).requires_grad_()
    y, v, step = near(x.detach(), 0.1), draw(3, 3, 2, seed=5), 1e-5

    def gradient(z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(manifold.dist2(leaf, y), leaf)[0]

    wanted = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    (slope,) = torch.autograd.grad(manifold.dist2(x, y), x, create_graph=True)
    try:
        (found,) = torch.autograd.grad((slope * v).sum(), x)
    except (NotImplementedError, RuntimeError) as error:
        assert distance == "exact"
        assert "deriv" in str(error)  # noqa: PT017
    else:
        close(found, wanted, 1e-5)


@PAIRS
def test_vmap_of_the_distance_and_its_gradient(metric, distance):
    manifold = LoRAQuotient(4, 3, metric, distance)
    x = draw(4, 3, 3, 2)
    y = near(x, 0.05)
    close(torch.func.vmap(manifold.dist)(x, y), manifold.dist(x, y), 1e-10)
    close(torch.func.vmap(manifold.dist, in_dims=(None, 0))(x[0], y), manifold.dist(x[0], y), 1e-10)
    mapped = torch.func.vmap(torch.func.grad(manifold.dist2))(x, y)
    outside = torch.func.grad(lambda x: torch.func.vmap(manifold.dist2)(x, y).sum())(x)
    single = torch.stack([torch.func.grad(manifold.dist2)(p, q) for p, q in zip(x, y, strict=True)])
    close(mapped, single, 1e-9)
    close(outside, single, 1e-9)


@EVERY_METRIC
@pytest.mark.parametrize("name", ["egrad2rgrad", "proju", "retr", "expmap", "inner"])
def test_vmap_of_other_methods(metric, name):
    manifold = LoRAQuotient(4, 3, metric)
    method = getattr(manifold, name)
    x, u = draw(4, 3, 3, 2), 0.1 * draw(4, 3, 3, 2, seed=1)
    u = manifold.proju(x, u)
    close(torch.func.vmap(method)(x, u), method(x, u), 1e-9)


@EVERY_METRIC
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step(metric, backend):
    manifold = LoRAQuotient(6, 5, metric)
    x, egrad = draw(6, 5, 3, 2), draw(6, 5, 3, 2, seed=1)

    def step(x: Tensor, g: Tensor) -> Tensor:
        return manifold.retr(x, -0.01 * manifold.egrad2rgrad(x, g))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    close(compiled(x, egrad), step(x, egrad), 1e-12)


# --- geoopt plumbing ------------------------------------------------------------------------------


@PAIRS
def test_scaled_wrapper(metric, distance):
    manifold = LoRAQuotient(4, 3, metric, distance)
    scaled = geoopt.Scaled(LoRAQuotient(4, 3, metric, distance), 2.0)
    x = draw(4, 3, 3, 2)
    y = near(x, 0.05)
    log = scaled.logmap(x, y)
    close(scaled.dist(x, y), 2 * manifold.dist(x, y))
    close(scaled.dist(x, y, keepdim=True), 2 * manifold.dist(x, y, keepdim=True))
    close(scaled.dist2(x, y), 4 * manifold.dist2(x, y))
    squared, pair = scaled.dist2_logmap(x, y)
    close(squared, 4 * manifold.dist2(x, y))
    close(pair, log)
    if distance == "exact":
        close(scaled.norm(x, log), scaled.dist(x, y), 1e-8)
    reached = scaled.expmap(x, log)
    close(reached, manifold.expmap(x, manifold.logmap(x, y)))
    assert torch.equal(scaled.log_path(x, y), manifold.log_path(x, y))
    assert torch.equal(scaled.product(x), manifold.product(x))


@PAIRS
@pytest.mark.parametrize("batches", [((4, 1), (3,)), ((2,), (2,)), ((), (3,))], ids=str)
def test_keepdim_and_broadcasting(metric, distance, batches):
    manifold = LoRAQuotient(4, 3, metric, distance)
    x, y = (draw(4, 3, *b, 2, seed=i) for i, b in enumerate(batches))
    y = draw(4, 3, 2) + 0.03 * y
    x = draw(4, 3, 2) + 0.03 * x
    shape = torch.broadcast_shapes(*batches)
    assert manifold.dist(x, y).shape == shape
    assert manifold.dist(x, y, keepdim=True).shape == (*shape, 1, 1)
    assert manifold.dist2(x, y, keepdim=True).shape == (*shape, 1, 1)
    assert manifold.logmap(x, y).shape == (*shape, 7, 2)
    assert manifold.log_path(x, y).shape == shape
    squared, log = manifold.dist2_logmap(x, y)
    assert squared.shape == shape
    assert manifold.expmap(x, log).shape == (*shape, 7, 2)
    close(squared, manifold.dist(x, y) ** 2)


def copies(manifold: LoRAQuotient) -> list[LoRAQuotient]:
    return [copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))]


@PAIRS
def test_copies_of_the_manifold(metric, distance):
    manifold = LoRAQuotient(4, 3, metric, distance)
    x = draw(4, 3, 2)
    for twin in copies(manifold):
        assert (twin.metric, twin.distance) == (metric, distance)
        assert repr(twin) == repr(manifold)
        assert torch.equal(twin.dist(x, near(x, 0.1)), manifold.dist(x, near(x, 0.1)))
    assert f"4, 3, distance='{distance}'" in repr(manifold)
    assert metric in repr(manifold)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        manifold = LoRAQuotient(4, 3)
        self.point = geoopt.ManifoldParameter(manifold.random(7, 2), manifold=manifold)


def test_copies_of_a_parameter():
    layer = Layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(twin.point, geoopt.ManifoldParameter)
        assert isinstance(twin.point.manifold, LoRAQuotient)
        assert torch.equal(twin.point, layer.point)


def test_state_dict_through_a_file():
    layer, other = Layer(), Layer()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.point, layer.point)
    assert isinstance(other.point, geoopt.ManifoldParameter)


def test_a_mean_has_no_rank_beyond_the_span_of_its_anchors():
    points = [draw(4, 4, 1, seed=i) for i in range(3)]
    manifold = LoRAQuotient(4, 4, "embedded", "chordal")
    with pytest.raises(ValueError, match="ranks add up to 3; got 4, expected at most 3"):
        frechet_mean(manifold, points, rank=4)
    assert frechet_mean(manifold, points, rank=3).point.shape == (8, 3)
