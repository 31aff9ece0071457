"""Sections 9 to 13 of docs/mathematics.md: means, closed forms, the lift, relations, numerics."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import sympy
import torch
from mathematics_oracle import (
    KAPPA,
    close,
    draw,
    factors,
    formulas,
    frames,
    inner,
    norm2,
    product,
    project,
    singular_values,
)
from torch.func import jacrev

from manifold_merge import LoRAQuotient, PolarLoRAQuotient, frechet_mean, lifted_mean
from manifold_merge.lora_metrics import METRICS

every_metric = pytest.mark.parametrize("metric", sorted(METRICS))
cones = pytest.mark.parametrize("metric", sorted(KAPPA))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- 9 and 10: means and closed forms -------------------------------------------------------------


@every_metric
@formulas("first-variation")
def test_first_variation_along_curves(metric):
    m, x, u = draw((6, 5, 2), seed=3)
    manifold = LoRAQuotient(6, 5, metric=metric)
    y = x + 0.15 * u
    xi, eta = (project(metric, z, draw((6, 5, 2), seed)[2], m) for z, seed in ((x, 8), (y, 9)))

    def squared(t):
        return float(manifold.dist2(manifold.expmap(x, t * xi), manifold.expmap(y, t * eta)))

    law = -2 * inner(metric, x, manifold.logmap(x, y), xi, m)
    law = law - 2 * inner(metric, y, manifold.logmap(y, x), eta, m)
    close((squared(1e-4) - squared(-1e-4)) / 2e-4, law, 1e-5)


@every_metric
@formulas("cone-mean", "det-mean")
def test_norm_of_a_mean(metric):
    m, x, u = draw((6, 5, 2), seed=4)
    manifold, weights = LoRAQuotient(6, 5, metric=metric), torch.tensor([0.5, 0.3, 0.2])
    points = [x, x + 0.1 * u, 1.1 * x - 0.05 * u]
    solution = frechet_mean(manifold, points, weights)
    assert solution.converged
    if metric == "invariant":
        logs = [singular_values(p, m).log().sum() for p in points]
        mean = singular_values(solution.point, m).log().sum()
        close(mean, (weights * torch.stack(logs)).sum(), 1e-8)
        return
    rho = torch.stack([product(p, m).norm() for p in (solution.point, *points)])
    mean, rho = rho[0] / math.sqrt(KAPPA[metric]), rho[1:] / math.sqrt(KAPPA[metric])
    squares = torch.stack([manifold.dist2(solution.point, p) for p in points])
    close(mean**2 + weights @ squares, weights @ rho**2, 1e-8)
    cosines = (mean**2 + rho**2 - squares) / (2 * mean * rho)
    close(mean, weights @ (rho * cosines), 1e-8)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (2.0, -0.5, -0.5)], ids=str)
@formulas("chordal-mean")
def test_chordal_mean(weights):
    manifold = LoRAQuotient(6, 5, distance="chordal")
    points = [draw((6, 5, 2), seed)[1] for seed in range(3)]
    mean = manifold.product(frechet_mean(manifold, points, weights, rank=3).point)
    total = sum(w * manifold.product(p) for w, p in zip(weights, points, strict=True))
    left, s, right = np.linalg.svd(total.numpy())
    close(mean, (left[:, :3] * s[:3]) @ right[:3])


TOY = {
    "mixed": (lambda p: 1 / math.sqrt(2), lambda p, w: np.dot(w, p)),
    "invariant": (lambda p: 1 / (math.sqrt(2) * p), lambda p, w: math.prod(np.power(p, w))),
    "embedded": (lambda p: 1.0, lambda p, w: np.dot(w, p)),
}


@every_metric
@formulas("toy")
def test_toy(metric):
    speed, mean = TOY[metric]
    manifold, values, weights = LoRAQuotient(1, 1, metric=metric), (1.3, 4.2, 2.0), (0.5, 0.2, 0.3)
    points = [torch.tensor([[2.0], [v / 2]]) for v in values]
    length = scipy.integrate.quad(speed, *values[:2])[0]
    close(manifold.dist(points[0], points[1]), length, 1e-9)
    close(
        manifold.product(frechet_mean(manifold, points, weights).point), [[mean(values, weights)]]
    )


def rank_one(manifold, size, alpha, beta):
    """size times u vᵀ, turned by alpha and beta from the first axes."""
    u, v = torch.zeros(manifold.out_features), torch.zeros(manifold.in_features)
    u[0], u[1], v[0], v[1] = (f(z) for z in (alpha, beta) for f in (math.cos, math.sin))
    return manifold.pack(size * u[:, None], v[None])


@every_metric
@pytest.mark.parametrize(
    ("alpha", "beta", "size"), [(0.3, 0.2, 1.0), (0.4, 0.7, 1.2), (2.9, 2.7, 0.9)]
)
@formulas("rank-one")
def test_rank_one_distance(metric, alpha, beta, size):
    manifold = LoRAQuotient(4, 3, metric=metric)
    x, y = rank_one(manifold, 1.0, 0.0, 0.0), rank_one(manifold, size, alpha, beta)
    theta = min(math.hypot(alpha, beta), math.hypot(math.pi - alpha, math.pi - beta))
    if metric == "invariant":
        law = 0.5 * math.log(size) ** 2 + theta**2
    else:
        kappa = KAPPA[metric]
        law = (1 + size**2 - 2 * size * math.cos(math.sqrt(kappa) * theta)) / kappa
    close(manifold.dist2(x, y), law, 1e-8)


@pytest.mark.parametrize("spectrum_weight", [0.5, 2.0])
def test_polar_distance_at_rank_one(spectrum_weight):
    manifold = PolarLoRAQuotient(4, 3, spectrum_weight=spectrum_weight)
    x, y = rank_one(manifold, 1.0, 0.0, 0.0), rank_one(manifold, 1.7, 0.4, 0.7)
    close(manifold.dist2(x, y), 0.4**2 + 0.7**2 + spectrum_weight * math.log(1.7) ** 2, 1e-8)


@every_metric
@formulas("curvature")
def test_curvature_at_rank_one(metric):
    """Sectional curvatures of W = s u vᵀ with u on a sphere and v on a circle, by Christoffel."""
    s, a, c, b = symbols = sympy.symbols("s alpha gamma beta", positive=True)
    round_part = (1, sympy.sin(a) ** 2, 1)  # |du|² = dα² + sin²α dγ², |dv|² = dβ²
    half = sympy.Rational(1, 2)
    first = {"mixed": half, "embedded": sympy.Integer(1), "invariant": half / s**2}
    factor = 1 if metric == "invariant" else s**2
    g = sympy.diag(first[metric], *(factor * z for z in round_part))
    point = {s: sympy.Rational(3, 2), a: 1, c: sympy.Rational(1, 2), b: sympy.Rational(1, 3)}
    u = sympy.Matrix([sympy.cos(a), sympy.sin(a) * sympy.cos(c), sympy.sin(a) * sympy.sin(c)])
    w = s * u * sympy.Matrix([[sympy.cos(b), sympy.sin(b)]])
    value = torch.tensor(np.array(w.subs(point).evalf(), dtype=float))
    x = factors(LoRAQuotient(3, 2), value, 1)
    for i, one in enumerate(symbols):  # the metric tensor, from the definition
        change = torch.tensor(np.array(w.diff(one).subs(point).evalf(), dtype=float))
        tangents = jacrev(lambda z: product(z, 3))(x).reshape(-1, x.numel())
        lift = torch.linalg.lstsq(tangents, change.reshape(-1, 1), driver="gelsd").solution
        lift = project(metric, x, lift.reshape(x.shape), 3)
        close(inner(metric, x, lift, lift, 3), float(g[i, i].subs(point)), 1e-8)
    inverse, dims = g.inv(), range(4)

    def christoffel(i, j, k):
        terms = (
            inverse[i, h]
            * (g[h, j].diff(symbols[k]) + g[h, k].diff(symbols[j]) - g[j, k].diff(symbols[h]))
            for h in dims
        )
        return half * sum(terms)

    gamma = [[[christoffel(i, j, k) for k in dims] for j in dims] for i in dims]

    def riemann(i, j, k, h):
        value = gamma[i][j][h].diff(symbols[k]) - gamma[i][j][k].diff(symbols[h])
        for e in dims:
            value += gamma[i][k][e] * gamma[e][j][h] - gamma[i][h][e] * gamma[e][j][k]
        return value

    low, high = {"mixed": (-2 / s**2, 0), "embedded": (-1 / s**2, 0), "invariant": (0, 1)}[metric]
    found = [
        sympy.simplify(g[i, i] * riemann(i, j, i, j) / (g[i, i] * g[j, j]))
        for i in range(4) for j in range(i + 1, 4)
    ]  # fmt: skip
    values = [float(sympy.sympify(z).subs(point)) for z in found]
    bounds = [float(sympy.sympify(z).subs(point)) for z in (low, high)]
    assert min(values) == pytest.approx(bounds[0])
    assert max(values) == pytest.approx(bounds[1])


@every_metric
@formulas("orthogonal")
def test_shrinking_of_a_mean_at_rank_one(metric):
    manifold, half = LoRAQuotient(3, 3, metric=metric), 0.25
    points = [rank_one(manifold, 1.0, sign * half, sign * half) for sign in (-1, 1)]
    mean = manifold.product(frechet_mean(manifold, points).point).norm()
    theta = 2 * math.sqrt(2) * half
    cosine = 1.0 if metric == "invariant" else math.cos(math.sqrt(KAPPA[metric]) * theta / 2)
    close(mean, cosine, 1e-8)
    table = {"embedded": 0.444, "mixed": 0.0, "invariant": 1.0}  # θ = π/√2
    limit = 1.0 if metric == "invariant" else math.cos(math.sqrt(KAPPA[metric]) * math.pi / 8**0.5)
    assert limit == pytest.approx(table[metric], abs=5e-4)
    ends = [rank_one(manifold, 1.0, angle, angle) for angle in (0.0, math.pi / 2)]
    chordal = frechet_mean(LoRAQuotient(3, 3, distance="chordal"), ends).point
    close(manifold.product(chordal).norm(), 0.5)
    close(manifold.product(lifted_mean(manifold, ends).point).norm(), 1.0)


@cones
@pytest.mark.parametrize("positive", [True, False])
@formulas("equal-spaces")
def test_equal_spaces_are_flat(metric, positive):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator)
    cores = [torch.eye(3) + 0.2 * root, torch.eye(3) - 0.2 * root @ root]
    if positive:
        cores = [c @ c.T for c in cores]
    left, right = frames(6, 5)
    right = left if positive else right
    manifold = LoRAQuotient(6, len(right), metric=metric)
    x, y = (factors(manifold, left[:, :3] @ c @ right[:, :3].T, 3) for c in cores)
    close(manifold.dist2(x, y), norm2(cores[0] - cores[1]) / KAPPA[metric], 1e-8)


@formulas("log-ratio")
def test_equal_frames_have_log_ratios():
    left, right = frames(6, 5)
    spectra = torch.tensor([[3.0, 1.0, 0.2], [1.5, 1.2, 0.4]])
    manifold = LoRAQuotient(6, 5, metric="invariant")
    x, y = (factors(manifold, left[:, :3] * s @ right[:, :3].T, 3) for s in spectra)
    close(manifold.dist2(x, y), norm2(spectra[0].log() - spectra[1].log()) / 2, 1e-8)


@every_metric
@formulas("blocks")
def test_orthogonal_blocks_add_up(metric):
    left, right = frames(6, 6)
    blocks, total = LoRAQuotient(3, 3, metric=metric), LoRAQuotient(6, 6, metric=metric)
    ends = []
    for turn in (0.0, 1.0):
        parts = [rank_one(blocks, 1 + 0.3 * turn, 0.3 * turn, 0.4 * turn),
                 rank_one(blocks, 2 - 0.2 * turn, 0.2 * turn, -0.5 * turn)]  # fmt: skip
        whole = left @ torch.block_diag(*(blocks.product(p) for p in parts)) @ right.T
        ends.append((parts, factors(total, whole, 2)))
    (xs, x), (ys, y) = ends
    law = sum(blocks.dist2(p, q) for p, q in zip(xs, ys, strict=True))
    close(total.dist2(x, y), law, 1e-8)


# --- 11 to 13: lift, methods, numerics ------------------------------------------------------------


def polar(z):
    u, _, vh = torch.linalg.svd(z, full_matrices=False)
    return u @ vh


def power_of(z, exponent):
    """Power of a positive semi-definite matrix on its range."""
    values, vectors = torch.linalg.eigh(z)
    powers = torch.where(values > 1e-12, values.clamp(min=1e-12) ** exponent, 0.0)
    return vectors * powers @ vectors.T


def anchors(ranks=(2, 1, 2), m=9, n=8):
    return [draw((m, n, r), seed)[1] for seed, r in enumerate(ranks)]


@formulas("procrustes", "lifted")
def test_lift_is_the_procrustes_solution():
    weights = torch.tensor([0.5, 0.2, 0.3])
    units = [w / w.norm() for w in (product(x, 9) for x in anchors())]
    svds = [torch.linalg.svd(c, full_matrices=False) for c in units]
    us, ss, vs = ([part[..., :r] for part, r in zip(parts, (2, 1, 2), strict=True)]
                  for parts in zip(*((u, s, vh.T) for u, s, vh in svds), strict=True))  # fmt: skip

    def stack(fs):
        return torch.cat([w.sqrt() * f * s for w, f, s in zip(weights, fs, ss, strict=True)], -1)

    def cost(q):
        parts = zip(weights, q.split([2, 1, 2], -1), us, ss, strict=True)
        return float(sum(w.sqrt() * norm2((a - u) * s.sqrt()) for w, a, u, s in parts))

    best, other = polar(stack(us)), polar(stack(vs))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            assert cost(polar(best + size * torch.randn(9, 5, generator=generator))) > cost(best)
    mu = sum(w * c @ c.T for w, c in zip(weights, units, strict=True))
    mv = sum(w * c.T @ c for w, c in zip(weights, units, strict=True))
    left, right = power_of(mu, -0.5), power_of(mv, -0.5)
    for w, q, p, s, c in zip(
        weights, best.split([2, 1, 2], -1), other.split([2, 1, 2], -1), ss, units, strict=True
    ):
        close(w * left @ c @ c.T @ c @ right, (q * s) @ p.T)


@pytest.mark.parametrize("rank", [2, 5])
@formulas("power", "lifted-mean")
def test_lifted_mean_is_least_on_the_sphere(rank):
    points, weights = anchors(), torch.tensor([0.5, 0.2, 0.3])
    manifold = LoRAQuotient(9, 8)
    units = [manifold.product(x) / manifold.product(x).norm() for x in points]
    power = 1 - float(sum(w * c for w, c in zip(weights, units, strict=True)).norm()) ** 4
    solution = lifted_mean(manifold, points, weights, rank=rank)
    fixed = lifted_mean(manifold, points, weights, rank=rank, power=power)
    close(manifold.product(solution.point), manifold.product(fixed.point))
    mu = sum(w * c @ c.T for w, c in zip(weights, units, strict=True))
    mv = sum(w * c.T @ c for w, c in zip(weights, units, strict=True))
    left, right = power_of(mu, -power / 2), power_of(mv, -power / 2)
    lifted = []
    for x, c in zip(points, units, strict=True):
        u, s, vh = torch.linalg.svd(c, full_matrices=False)
        z = left @ (u * s ** (1 + 2 * power)) @ vh @ right
        lifted.append(z / z.norm() * manifold.product(x).norm())

    def objective(w):
        return sum(float(a * norm2(w - z)) for a, z in zip(weights, lifted, strict=True))

    radius = math.sqrt(sum(float(a * norm2(z)) for a, z in zip(weights, lifted, strict=True)))
    mean = manifold.product(solution.point)
    close(mean.norm(), radius)
    close(solution.objective, objective(mean), 1e-8)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(20):
            x = solution.point + size * torch.randn(17, rank, generator=generator)
            other = manifold.product(x)
            assert objective(other * radius / other.norm()) > objective(mean)


@pytest.mark.parametrize("flat", [True, False], ids=["flat spectra", "orthogonal frames"])
def test_tsv_m_is_a_lifted_mean(flat):
    manifold, (left, right), k = LoRAQuotient(9, 8), frames(9, 8), 3
    spectra = [torch.full((2,), s) if flat else torch.tensor([2 * s, s]) for s in (1.0, 3.0, 0.5)]
    us, vs = ([q[:, 2 * i : 2 * i + 2] for i in range(k)] for q in (left, right))
    if flat:
        us, vs = ([frames(len(f), seed=i)[0][:, :2] for i, f in enumerate(fs)] for fs in (us, vs))
    points = [factors(manifold, u * s @ v.T, 2) for u, s, v in zip(us, spectra, vs, strict=True)]
    q, p = (polar(torch.cat(fs, -1)).split(2, -1) for fs in (us, vs))
    tsv = sum(a * s @ b.T for a, s, b in zip(q, spectra, p, strict=True))
    power = 1.0 if flat else None
    close(
        math.sqrt(k) * manifold.product(lifted_mean(manifold, points, power=power).point), tsv, 1e-7
    )


def test_relations_to_other_methods():
    manifold, points = LoRAQuotient(9, 8, distance="chordal"), anchors()
    products = [manifold.product(x) for x in points]
    full = 3 * manifold.product(frechet_mean(manifold, points, rank=5).point)
    close(full, sum(products))  # task arithmetic
    u, s, vh = torch.linalg.svd(torch.cat(products, -1), full_matrices=False)  # KnOTS
    close(u * s @ sum(vh.split(8, -1)), sum(products))
    b, a = manifold.unpack(points[0])
    naive = sum(math.sqrt(1 / 4) * b for _ in range(4)) @ sum(
        math.sqrt(1 / 4) * a for _ in range(4)
    )
    close(naive, 4 * products[0])  # PEFT's "linear" of four copies


@pytest.mark.parametrize("spread", [0, 3, 6])
@formulas("condition")
def test_bound_of_the_condition_number(spread):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator) * torch.logspace(0, spread, 6)
    x = x @ (torch.eye(6) + 0.3 * torch.ones(6, 6))
    unit = x / x.norm(dim=0)
    lower = torch.linalg.cholesky(unit.T @ unit)
    condition = float(torch.linalg.cond(unit)) ** 2
    assert condition <= 6 * float(norm2(torch.linalg.inv(lower))) * (1 + 1e-9)
