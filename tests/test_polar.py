"""Polar factorisations modulo O(r), and the Stiefel logarithm they rest on."""

import math

import geoopt
import numpy as np
import pymanopt
import pytest
import scipy.optimize
import torch
from torch import Tensor

from manifold_merge.checks import check_manifold
from manifold_merge.frechet import frechet_mean
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_log import ALIGNED, CHORDAL, EXACT
from manifold_merge.polar import PolarLoRAQuotient
from manifold_merge.polar_alignment import act
from manifold_merge.stiefel import Stiefel, frame_coordinates, matrix_exp, shoot

DOUBLE = torch.float64
SIZES = [(5, 4, 1), (8, 7, 2), (9, 7, 3), (4, 4, 4), (9, 5, 5), (24, 18, 6)]


def points(manifold: PolarLoRAQuotient, rank: int, *batch: int, count: int = 2) -> list[Tensor]:
    rows = manifold.out_features + rank + manifold.in_features
    return [
        manifold.random(*batch, rows, rank, dtype=DOUBLE).as_subclass(Tensor) for _ in range(count)
    ]


def tangent(manifold: PolarLoRAQuotient, x: Tensor, length: float) -> Tensor:
    u = manifold.proju(x, torch.randn_like(x))
    return length * u / manifold.norm(x, u, keepdim=True)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- Stiefel -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r"), [(2, 1), (3, 2), (4, 2), (9, 2), (6, 5), (10, 5), (30, 5)])
@pytest.mark.parametrize("length", [0.1, 1.5, 3.1])
def test_stiefel_logarithm_inverts_exponential_up_to_pi(m: int, r: int, length: float) -> None:
    frames = Stiefel()
    x = frames.random(7, m, r, dtype=DOUBLE).as_subclass(Tensor)
    u = frames.proju(x, torch.randn_like(x))
    u = length * u / frames.norm(x, u, keepdim=True)
    y = frames.expmap(x, u)
    assert gap(frames.logmap(x, y), u) < 1e-10
    assert torch.allclose(frames.dist(x, y), torch.tensor(length, dtype=DOUBLE), atol=1e-11)


def test_stiefel_exponential_equals_pymanopt() -> None:
    frames, oracle = Stiefel(), pymanopt.manifolds.Stiefel(7, 3)
    x = frames.random(7, 3, dtype=DOUBLE).as_subclass(Tensor)
    u = frames.proju(x, torch.randn_like(x))
    expected = torch.from_numpy(oracle.exp(x.numpy(), u.numpy()))
    assert gap(frames.expmap(x, u), expected) < 1e-13


def test_matrix_exponential_of_one_matrix() -> None:
    # torch.matrix_exp itself is off by 8e-11 here (pytorch issue 196592).
    angle = 0.04
    x = angle * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    c, s = math.cos(angle), math.sin(angle)
    assert gap(matrix_exp(x), torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)) < 1e-15


def test_stiefel_names_unreachable_frames() -> None:
    x = torch.eye(3, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match="no geodesic was found for 1 of 1"):
        Stiefel().logmap(x, torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=DOUBLE)))


def test_spectrum_geometry_equals_pymanopt() -> None:
    manifold = PolarLoRAQuotient(4, 4)
    spectra, oracle = manifold.total.factors[1], pymanopt.manifolds.SymmetricPositiveDefinite(3)
    x, y = (manifold.total.split(p)[1] for p in points(manifold, 3))
    u, v = (spectra.proju(x, torch.randn_like(x)) for _ in range(2))
    arrays = [t.numpy() for t in (x, y, u, v)]
    exact = [
        (spectra.expmap(x, u), oracle.exp(arrays[0], arrays[2])),
        (spectra.logmap(x, y), oracle.log(arrays[0], arrays[1])),
        (spectra.inner(x, u, v), oracle.inner_product(arrays[0], arrays[2], arrays[3])),
        (spectra.egrad2rgrad(x, u), oracle.euclidean_to_riemannian_gradient(arrays[0], arrays[2])),
    ]
    for ours, theirs in exact:
        assert gap(ours, torch.as_tensor(theirs)) < 1e-12
    moved = spectra.transp(x, y, u), spectra.transp(x, y, v)
    assert torch.isclose(spectra.inner(y, *moved), spectra.inner(x, u, v))


# --- contract ------------------------------------------------------------------------------------

CONTRACT = [
    pytest.param(5, 4, 1, {}, (), id="rank-1", marks=pytest.mark.slow),
    pytest.param(7, 6, 2, {"spectrum_weight": 2.5}, (), id="exact", marks=pytest.mark.slow),
    pytest.param(4, 4, 4, {}, (), id="square", marks=pytest.mark.slow),
    pytest.param(
        # The length of the logarithm is that of the projected chords: less than the chords'.
        7,
        6,
        2,
        {"distance": "aligned"},
        ("log_distance",),
        id="aligned",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        # A distance of products knows nothing of this metric.
        7,
        6,
        2,
        {"distance": "chordal"},
        ("log_distance", "exp_log", "geodesic_distance", "distance_gradient"),
        id="chordal",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("m", "n", "r", "options", "skip"), CONTRACT)
def test_contract(m: int, n: int, r: int, options: dict, skip: tuple[str, ...]) -> None:
    manifold = PolarLoRAQuotient(m, n, **options)
    exact = manifold.distance == "exact"
    check_manifold(manifold, shape=(m + r + n, r), strict=True, exact=exact, skip=skip)


# --- gauges, exponential and logarithm -----------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
@pytest.mark.parametrize("distance", ["exact", "aligned", "chordal"])
def test_far_points_in_any_gauge(m: int, n: int, r: int, distance: str) -> None:
    manifold = PolarLoRAQuotient(m, n, distance=distance)
    x, y = points(manifold, r, 2)
    squared, log = manifold.dist2_logmap(x, y)
    assert squared.isfinite().all()
    assert manifold.check_vector_on_tangent(x, log, atol=1e-9, rtol=0)
    g, h = manifold.random_gauge(x), manifold.random_gauge(y)
    moved, turned = manifold.dist2_logmap(g(x), h(y))
    assert gap(moved, squared) < 1e-9
    assert gap(turned, g(log)) < 1e-8
    assert gap(manifold.dist(y, x) ** 2, squared) < 1e-9
    unchanged, _ = manifold.dist2_logmap(x, y, guess=g(log))  # nonsense at x
    assert torch.equal(unchanged, squared)


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
def test_chordal_logarithm_lifts_the_projected_difference(m: int, n: int, r: int) -> None:
    manifold = PolarLoRAQuotient(m, n, spectrum_weight=0.7, distance="chordal")
    x, y = points(manifold, r)
    difference = manifold.product(y) - manifold.product(x)
    u, _, v = manifold.total.split(x)
    normal = difference - u @ (u.mT @ difference)
    tangential = difference - (normal - (normal @ v) @ v.mT)
    log = manifold.logmap(x, y)
    velocity = torch.func.jvp(manifold.product, (x,), (log,))[1]
    assert gap(velocity, tangential) < 1e-12
    assert gap(manifold.proju(x, log), log) < 1e-12


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_logarithm_inverts_exponential(m: int, n: int, r: int, weight: float) -> None:
    manifold = PolarLoRAQuotient(m, n, spectrum_weight=weight)
    (x,) = points(manifold, r, 3, count=1)
    u = tangent(manifold, x, 1.0)
    y = manifold.random_gauge(x)(manifold.expmap(x, u))
    assert (manifold.log_path(x, y) == EXACT).all()
    assert gap(manifold.logmap(x, y), u) < 1e-8
    assert gap(manifold.dist(x, y), torch.ones(3, dtype=DOUBLE)) < 1e-9
    assert gap(manifold.align(x, y), manifold.expmap(x, u)) < 1e-8
    squared, rough = manifold.dist2_logmap(x, y, guess=1.1 * u, precise=False)
    assert gap(rough, u) < 1e-3
    assert gap(squared, torch.ones(3, dtype=DOUBLE)) < 1e-3
    assert manifold.check_vector_on_tangent(x, rough, atol=1e-12, rtol=0)
    ends = [manifold.expmap(x, t * u) for t in (0.25, 0.75)]
    assert gap(manifold.dist(*ends), torch.full((3,), 0.5, dtype=DOUBLE)) < 1e-9


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
def test_exact_paths_reach_far_points(m: int, n: int, r: int) -> None:
    manifold = PolarLoRAQuotient(m, n)
    x, y = points(manifold, r, 6)
    u, path = manifold.logmap(x, y), manifold.log_path(x, y)
    product = manifold.product(manifold.expmap(x, u))
    error = (product - manifold.product(y)).flatten(1).norm(dim=1)
    assert float(torch.where(path == EXACT, error, 0).max()) < 1e-9
    assert (path == EXACT).any()
    assert set(path.tolist()) <= {EXACT, ALIGNED}


def test_orthogonal_frames() -> None:
    """Both frames at 90 degrees: every rotation is as near as any other one."""
    eye = torch.eye(6, dtype=DOUBLE)
    spectrum = torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE))
    x = torch.cat((eye[:, :2], spectrum, eye[:, :2]))
    y = torch.cat((eye[:, 3:5], spectrum, eye[:, 3:5]))
    for distance, expected in [("exact", math.pi), ("aligned", math.sqrt(8)), ("chordal", None)]:
        manifold = PolarLoRAQuotient(6, 6, distance=distance)
        d, log = manifold.dist(x, y), manifold.logmap(x, y)
        assert log.isfinite().all()
        expected = math.sqrt(20) if expected is None else expected
        assert torch.isclose(d, torch.tensor(expected, dtype=DOUBLE))


def test_mixed_paths_in_one_batch() -> None:
    manifold = PolarLoRAQuotient(6, 5)
    (x,) = points(manifold, 2, 3, count=1)
    y = manifold.expmap(x, tangent(manifold, x, 0.5))
    fresh = manifold.pack(torch.zeros(6, 2, dtype=DOUBLE), torch.randn(2, 5, dtype=DOUBLE))
    y[1] = fresh
    ok, reason = manifold.check_point_on_manifold(y, explain=True)
    assert not ok
    assert "lower rank" in reason
    assert manifold.log_path(x, y).tolist() == [EXACT, CHORDAL, EXACT]
    assert manifold.log_path(y, x).tolist() == [EXACT, CHORDAL, EXACT]
    d = manifold.dist(x, y)
    assert torch.isclose(d[1], manifold.product(x[1]).norm())
    for u in (manifold.logmap(x, y), manifold.logmap(y, x)):
        assert u.isfinite().all()
        assert manifold.expmap(x, u).isfinite().all()
    assert manifold.retr(y, torch.zeros_like(y)).isfinite().all()


def test_unreachable_component_is_aligned() -> None:
    """Square frames of both signs of det W are not connected: no geodesic, but an answer."""
    x, y = (torch.eye(3, dtype=DOUBLE) for _ in range(2))
    y = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=DOUBLE))
    manifold = PolarLoRAQuotient(3, 3)
    x, y = (
        manifold.pack(x, torch.eye(3, dtype=DOUBLE)),
        manifold.pack(y, torch.eye(3, dtype=DOUBLE)),
    )
    assert manifold.log_path(x, y) == ALIGNED
    assert manifold.dist(x, y) == PolarLoRAQuotient(3, 3, distance="aligned").dist(x, y)


# --- the minimum over O(r) -----------------------------------------------------------------------


def squared_arcs(x: Tensor, y: Tensor) -> Tensor:
    """Squared Stiefel distances, infinite where none was found."""
    target, _, rows = frame_coordinates(x, y)
    state, converged = shoot([target], rows=[rows])
    a, b = state[0], state[1]
    squared = a.square().sum((-2, -1)) + b.square().sum((-2, -1))
    return torch.where(converged, squared, torch.inf)


def energy(manifold: PolarLoRAQuotient, x: Tensor, y: Tensor, o: Tensor, *, arcs: bool) -> Tensor:
    """d² of x and one representative of y, written without the code under test's aligner."""
    px, py = manifold.total.split(x), act(manifold.total.split(y), o)
    spectra = geoopt.SymmetricPositiveDefinite().dist(px[1], py[1]) ** 2
    frames = [(px[i], py[i]) for i in (0, 2)]
    chords = [squared_arcs(a, b) if arcs else (a - b).square().sum((-2, -1)) for a, b in frames]
    return chords[0] + manifold.spectrum_weight * spectra + chords[1]


def turns(count: int) -> list[Tensor]:
    """A grid over O(2): rotations and reflections."""
    grid = []
    for sign in (1.0, -1.0):
        for angle in torch.linspace(0, 2 * math.pi, count + 1)[:-1].tolist():
            c, s = math.cos(angle), math.sin(angle)
            grid.append(torch.tensor([[c, -s * sign], [s, c * sign]], dtype=DOUBLE))
    return grid


@pytest.mark.parametrize(("distance", "step"), [("exact", 60), ("aligned", 360)])
@pytest.mark.parametrize("near", [True, False])
def test_alignment_against_all_of_o2(distance: str, step: int, near: bool) -> None:
    manifold = PolarLoRAQuotient(8, 7, spectrum_weight=1.5, distance=distance)
    x, y = points(manifold, 2, 8)
    if near:
        y = manifold.random_gauge(x)(manifold.expmap(x, tangent(manifold, x, 1.5)))
    grid = torch.stack(turns(step))
    wide_x, wide_y = (z.repeat(len(grid), 1, 1) for z in (x, y))
    values = energy(
        manifold, wide_x, wide_y, grid.repeat_interleave(len(x), 0), arcs=distance == "exact"
    )
    brute = values.reshape(len(grid), -1).amin(0).sqrt()
    difference = manifold.dist(x, y) - brute
    assert float(difference.max()) < 1e-9
    # The grid's own error is quadratic in its spacing.
    assert float(difference.min()) > -60.0 * (2 * math.pi / step) ** 2


@pytest.mark.parametrize("seed", range(4))
def test_alignment_against_scipy_at_rank_three(seed: int) -> None:
    torch.manual_seed(seed)
    manifold = PolarLoRAQuotient(9, 8, distance="aligned")
    x, y = points(manifold, 3)
    rng = np.random.default_rng(seed)

    def objective(k: np.ndarray, start: Tensor) -> float:
        a, b, c = torch.from_numpy(k)
        zero = torch.zeros_like(a)
        skew = torch.stack([zero, a, b, -a, zero, c, -b, -c, zero]).reshape(3, 3)
        return float(energy(manifold, x, y, start @ matrix_exp(skew), arcs=False))

    found = []
    for trial in range(16):
        start = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE))[0]
        start[:, 0] *= torch.linalg.det(start).sign() * (-1) ** trial
        result = scipy.optimize.minimize(objective, rng.normal(size=3), args=(start,))
        found.append(result.fun)
    assert float(manifold.dist(x, y) ** 2) == pytest.approx(min(found), rel=1e-8)


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["exact", "aligned", "chordal"])
def test_gradient_of_distance_by_differences(distance: str) -> None:
    manifold = PolarLoRAQuotient(6, 5, spectrum_weight=0.7, distance=distance)
    x, y = points(manifold, 2, 3)
    u, v = tangent(manifold, x, 1.0), tangent(manifold, y, 1.0)
    leaves = [z.clone().requires_grad_(True) for z in (x, y)]
    grads = torch.autograd.grad(manifold.dist(*leaves).sum(), leaves)
    h = 1e-5
    for grad, w, move in [
        (grads[0], u, lambda t: manifold.dist(manifold.expmap(x, t * u), y)),
        (grads[1], v, lambda t: manifold.dist(x, manifold.expmap(y, t * v))),
    ]:
        slope = (8 * (move(h) - move(-h)) - (move(2 * h) - move(-2 * h))) / (12 * h)
        assert gap((grad * w).sum((-2, -1)), slope) < 1e-7


def test_gradient_at_coinciding_points_is_zero() -> None:
    manifold = PolarLoRAQuotient(6, 5)
    (x,) = points(manifold, 2, count=1)
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(manifold.dist(leaf, x), leaf)
    assert grad.isfinite().all()
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(manifold.dist2(leaf, x), leaf)
    assert float(grad.abs().max()) < 1e-10


def test_projection_and_factors_are_differentiable() -> None:
    """Also where the spectrum has equal values, at which eigenvectors have no derivative."""
    manifold = PolarLoRAQuotient(4, 3, spectrum_weight=0.7)
    x = manifold.origin(9, 2, dtype=DOUBLE).as_subclass(Tensor).requires_grad_(True)
    u = torch.randn(9, 2, dtype=DOUBLE)

    def even(z: Tensor) -> Tensor:
        top, r, bottom = manifold.total.split(z)
        return manifold.total.join((top, 0.5 * (r + r.mT), bottom))

    assert torch.autograd.gradcheck(lambda z: manifold.proju(even(z), u), x)
    assert torch.autograd.gradcheck(lambda z: manifold.unpack(even(z)), x)


@pytest.mark.parametrize("distance", ["exact", "aligned", "chordal"])
def test_vmap_of_distance_and_its_gradient(distance: str) -> None:
    manifold = PolarLoRAQuotient(6, 5, distance=distance)
    x, y = points(manifold, 2, 4)
    assert gap(torch.func.vmap(manifold.dist)(x, y), manifold.dist(x, y)) < 1e-12
    assert gap(torch.func.vmap(manifold.dist, (0, None))(x, y[0]), manifold.dist(x, y[0])) < 1e-12


# --- adapters ------------------------------------------------------------------------------------


def test_pack_and_unpack() -> None:
    manifold = PolarLoRAQuotient(7, 5)
    b, a = torch.randn(3, 7, 2, dtype=DOUBLE), torch.randn(3, 2, 5, dtype=DOUBLE)
    x = manifold.pack(b, a)
    assert manifold.check_point_on_manifold(x)
    assert gap(manifold.product(x), b @ a) < 1e-14
    y = manifold.random_gauge(x)(x)
    b2, a2 = manifold.unpack(y)
    assert gap(b2 @ a2, b @ a) < 1e-14
    assert gap(b2.mT @ b2, a2 @ a2.mT) < 1e-13
    assert torch.equal(manifold.projx(y), y)


@pytest.mark.parametrize(
    ("b", "a", "message"),
    [
        ((7, 2), (3, 5), "of one rank r"),
        ((6, 2), (2, 5), r"B \(\.\.\., 7, r\)"),
        ((7,), (2, 5), "pack expects"),
        ((7, 6), (6, 5), r"exceeds min\(m, n\) = 5"),
    ],
)
def test_pack_refuses(b: tuple[int, ...], a: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolarLoRAQuotient(7, 5).pack(torch.randn(b), torch.randn(a))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "positive sizes"),
        ((3, 3, 0.0), "spectrum_weight must be positive"),
        ((3, 3, math.inf), "spectrum_weight must be positive"),
        ((3, 3, 1.0, "nearest"), "distance must be one of exact, aligned, chordal"),
    ],
)
def test_constructor_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolarLoRAQuotient(*arguments)


def test_ranks_must_agree_unless_chordal() -> None:
    manifold = PolarLoRAQuotient(6, 5)
    x, y = points(manifold, 2, count=1)[0], points(manifold, 3, count=1)[0]
    with pytest.raises(ValueError, match="ranks 2 and 3 differ"):
        manifold.dist(x, y)
    chordal = PolarLoRAQuotient(6, 5, distance="chordal")
    expected = (manifold.product(x) - manifold.product(y)).norm()
    assert torch.isclose(chordal.dist(x, y), expected)


def test_single_precision() -> None:
    manifold = PolarLoRAQuotient(20, 15)
    x, y = points(manifold, 4, 3)
    single = manifold.dist(x.float(), y.float())
    assert single.dtype == torch.float32
    assert gap(single.double(), manifold.dist(x, y)) < 1e-5
    assert gap(manifold.logmap(x.float(), y.float()).double(), manifold.logmap(x, y)) < 1e-4


@pytest.mark.parametrize("distance", ["exact", "aligned", "chordal"])
def test_core_reduction_changes_nothing(distance: str) -> None:
    manifold = PolarLoRAQuotient(30, 20, spectrum_weight=2.0, distance=distance)
    x, y, z = points(manifold, 2, 2, count=3)
    small, stacked, restore = manifold.reduce([x, y, z])
    assert (small.out_features, small.in_features) == (6, 6)
    assert gap(small.dist(stacked[0], stacked[1]), manifold.dist(x, y)) < 1e-11
    assert gap(restore(small.logmap(stacked[0], stacked[1])), manifold.logmap(x, y)) < 1e-9
    assert gap(manifold.product(restore(stacked[2])), manifold.product(z)) < 1e-13


def test_core_reduction_of_different_ranks() -> None:
    manifold = PolarLoRAQuotient(12, 10, distance="chordal")
    anchors = [points(manifold, r, count=1)[0] for r in (1, 3)]
    _, stacked, restore = manifold.reduce(anchors)
    assert stacked.shape == (2, 4 + 3 + 4, 3)
    for anchor, part in zip(anchors, stacked, strict=True):
        assert gap(manifold.product(restore(part)), manifold.product(anchor)) < 1e-13
    with pytest.raises(ValueError, match="1 <= rank <= 4"):
        manifold.reduce(anchors, rank=5)
    mean = frechet_mean(manifold, anchors, rank=4).point
    half = 0.5 * sum(manifold.product(anchor) for anchor in anchors)
    assert gap(manifold.product(mean), half) < 1e-12


def test_chordal_mean_is_that_of_the_lora_quotient() -> None:
    polar = PolarLoRAQuotient(12, 10, distance="chordal")
    lora = LoRAQuotient(12, 10, metric="embedded", distance="chordal")
    anchors = points(polar, 3, count=3)
    weights = [0.5, 0.3, 0.2]
    ours = polar.product(frechet_mean(polar, anchors, weights).point)
    pairs = [lora.pack(*polar.unpack(x)) for x in anchors]
    assert gap(ours, lora.product(frechet_mean(lora, pairs, weights).point)) < 1e-12


@pytest.mark.parametrize("distance", ["exact", "aligned"])
def test_mean_in_any_gauge(distance: str) -> None:
    manifold = PolarLoRAQuotient(12, 10, distance=distance)
    (x,) = points(manifold, 2, count=1)
    anchors = [manifold.expmap(x, tangent(manifold, x, 0.6)) for _ in range(3)]
    solution = frechet_mean(manifold, anchors, gauge_check=True, max_iterations=400)
    assert solution.converged
    assert solution.gauge_residual is not None
    assert float(solution.gauge_residual) < 1e-9


def test_mean_of_spectra_is_geometric() -> None:
    """Frames that agree: the mean of diag(1, 16) and diag(4, 4) is diag(2, 8)."""
    manifold = PolarLoRAQuotient(3, 3)
    anchors = [
        manifold.pack(
            torch.eye(3, 2, dtype=DOUBLE), torch.tensor([[a, 0, 0], [0, b, 0]]).to(DOUBLE)
        )
        for a, b in ((1.0, 16.0), (4.0, 4.0))
    ]
    mean = manifold.product(frechet_mean(manifold, anchors).point)
    assert gap(mean, torch.diag(torch.tensor([2.0, 8.0, 0.0], dtype=DOUBLE))) < 1e-10
