"""The labelled formulas of docs/mathematics.md, against slow code that knows definitions only.

This file holds sections 1 to 8 and the pages themselves, test_mathematics_means.py the rest. Each
test names the formulas that it checks; none may be left out.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import test_mathematics_means  # noqa: F401 (its tests register their formulas)
import torch
from mathematics_oracle import (
    KAPPA,
    TESTED,
    acceleration,
    close,
    differential,
    draw,
    formulas,
    frames,
    gram,
    inner,
    lagrangian,
    norm2,
    pinv,
    product,
    project,
    singular_values,
    slope,
    verticals,
)
from torch.func import grad, jacrev, jvp

from manifold_merge import LoRAQuotient, frechet_mean, lifted_mean
from manifold_merge.lora_log import chordal_log
from manifold_merge.lora_metrics import METRICS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("mathematics", "notation", "geometries")
SIZES = ((6, 5, 2), (3, 4, 3), (4, 5, 1))

every_metric = pytest.mark.parametrize("metric", sorted(METRICS))
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
cones = pytest.mark.parametrize("metric", sorted(KAPPA))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- 1 to 4: points, metrics, lifts, gradients ----------------------------------------------------


@every_size
@formulas("differential", "vertical")
def test_vertical_vectors_are_the_kernel(size):
    m, x, u = draw(size)
    jacobian = jacrev(lambda z: product(z, m))(x).reshape(-1, x.numel())
    close(jacobian @ u.flatten(), differential(x, u, m).flatten())
    kernel = verticals(x, m)
    close(jacobian @ kernel, torch.zeros(len(jacobian), kernel.shape[1]))
    rank = int(torch.linalg.matrix_rank(jacobian))
    assert rank == (size[0] + size[1] - size[2]) * size[2]
    assert int(torch.linalg.matrix_rank(kernel)) == size[2] ** 2 == x.numel() - rank


@every_metric
@every_size
@formulas("metrics", "weights")
def test_metrics_in_the_singular_frame(metric, size):
    m, x, u = draw(size)
    r, manifold = size[2], LoRAQuotient(*size[:2], metric=metric)
    gauge = manifold.random_gauge(x)
    close(lagrangian(metric, gauge(x), gauge(u), m), lagrangian(metric, x, u, m))
    left, s, right = torch.linalg.svd(product(x, m))
    z = left.T @ differential(x, u, m) @ right.T
    rows, columns = (torch.cat((s[:r], torch.zeros(k - r))) for k in size[:2])
    core = (rows[:, None] > 0) & (columns > 0)
    squares = rows[:, None] ** 2 + columns**2
    weight = {
        "embedded": torch.ones_like(z),
        "mixed": torch.where(core, 0.5, 1.0),
        "invariant": torch.where(squares > 0, 1 / squares, 0.0),
    }[metric]
    least = project(metric, x, u, m)
    close((weight * z * z).sum(), inner(metric, x, least, least, m))


@every_metric
@formulas("comparison", "spectral-bound")
def test_bounds_between_distances(metric):
    m, x, u = draw((6, 5, 2))
    y = x + 0.2 * u
    d = {name: float(LoRAQuotient(6, 5, metric=name).dist(x, y)) for name in METRICS}
    chord = float((product(x, m) - product(y, m)).norm())
    assert chord < d["embedded"] < math.sqrt(2) * d["mixed"]
    assert d["mixed"] < d["embedded"]
    assert chord / math.sqrt(2) < d["mixed"]
    logs = (singular_values(x, m).log() - singular_values(y, m).log()).norm() / math.sqrt(2)
    assert float(logs) < d["invariant"]


@every_metric
@every_size
@formulas("horizontal", "lift")
def test_horizontal_lift(metric, size):
    m, x, u = draw(size)
    (b, a), (ub, ua) = (x[:m], x[m:]), (u[:m], u[m:])
    p, q = a.T @ a, b.T @ b
    if metric == "invariant":
        residual = torch.linalg.solve(q, ub.T @ b) - a.T @ ua @ torch.linalg.inv(p)
        k = q @ p
        mt = torch.from_numpy(
            scipy.linalg.solve_sylvester(*(z.numpy() for z in (k, k, q @ residual @ p)))
        )
        lower = torch.linalg.cholesky(q)
        s, n = lower.T @ p @ lower, torch.linalg.solve(lower, mt @ lower)
        close(n @ s + s @ n, lower.T @ residual @ p @ lower)
    else:
        mt = 0.5 * (pinv(b) @ ub - (pinv(a) @ ua).T).T
    lifted = u - torch.cat((b @ mt.T, -a @ mt))
    close(lifted, project(metric, x, u, m))
    close(LoRAQuotient(*size[:2], metric=metric).horizontal(x, u), lifted)
    hb, ha = lifted[:m], lifted[m:]
    if metric == "invariant":
        close(torch.linalg.solve(q, hb.T @ b), a.T @ ha @ torch.linalg.inv(p))
    else:
        close(b.T @ hb @ p, q @ ha.T @ a)
        close(pinv(b) @ hb, (pinv(a) @ ha).T)


@every_metric
@every_size
@formulas("gradients", "tangent-projection")
def test_gradients(metric, size):
    m, x, u = draw(size)
    target = differential(x, u, m)
    g = grad(lambda z: (product(z, m) - target).sin().sum())(x)
    gw = (product(x, m) - target).cos()
    (b, a), (gb, ga) = (x[:m], x[m:]), (g[:m], g[m:])
    p, q = a.T @ a, b.T @ b
    half_b, half_a = (torch.eye(len(y)) - 0.5 * y @ pinv(y) for y in (b, a))
    formula = {
        "mixed": lambda: torch.cat((gb @ torch.linalg.inv(p), ga @ torch.linalg.inv(q))),
        "invariant": lambda: torch.cat((gb @ q, ga @ p)),
        "embedded": lambda: torch.cat(
            (half_b @ gb @ torch.linalg.inv(p), half_a @ ga @ torch.linalg.inv(q))
        ),
    }[metric]()
    close(formula, torch.linalg.solve(gram(metric, x, m), g.flatten()).reshape(x.shape))
    close(LoRAQuotient(*size[:2], metric=metric).egrad2rgrad(x, g), formula)
    tangents = jacrev(lambda z: product(z, m))(x).reshape(-1, x.numel())
    dense = tangents @ torch.linalg.lstsq(tangents, gw.reshape(-1, 1), driver="gelsd").solution
    out_b, out_a = (torch.eye(len(y)) - y @ pinv(y) for y in (b, a))
    close(gw - out_b @ gw @ out_a, dense.reshape(gw.shape))
    if metric == "embedded":
        close(differential(x, formula, m), dense.reshape(gw.shape))


# --- 5 to 7: geodesics, scaling, spans ------------------------------------------------------------


@cones
@every_size
@formulas("geodesic-mixed", "geodesic-blocks", "core-rate", "geodesic-embedded")
def test_geodesic_equations(metric, size):
    m, x, u = draw(size)
    u = project(metric, x, u, m)
    (b, a), (vb, va) = (x[:m], x[m:]), (u[:m], u[m:])
    p, q = a.T @ a, b.T @ b
    expected = acceleration(metric, x, u, m)
    ab, aa = expected[:m], expected[m:]
    theta = pinv(b) @ vb
    ob, oa = vb - b @ theta, va - a @ theta.T
    if metric == "mixed":
        dp, dq = va.T @ a + a.T @ va, vb.T @ b + b.T @ vb
        close(ab, (b @ va.T @ va - vb @ dp) @ torch.linalg.inv(p))
        close(aa, (a @ vb.T @ vb - va @ dq) @ torch.linalg.inv(q))
    else:
        delta = oa.T @ oa @ torch.linalg.inv(p) - torch.linalg.solve(q, ob.T @ ob)
        close(ab, -2 * vb @ theta + b @ theta @ theta + 0.5 * b @ delta)
        close(aa, -2 * va @ theta.T + a @ (theta @ theta).T - 0.5 * a @ delta.T)
        close(ab - b @ pinv(b) @ ab, -2 * ob @ theta)
        close(aa - a @ pinv(a) @ aa, -2 * oa @ theta.T)
        close(pinv(b) @ ab + (pinv(a) @ aa).T, -2 * theta @ theta)
        zero, one = torch.tensor(0.0), torch.tensor(1.0)
        for y, v, w, rate in (
            (b, vb, ab, pinv(b) @ ab - theta @ theta + torch.linalg.solve(q, ob.T @ ob)),
            (a, va, aa, pinv(a) @ aa - (theta @ theta).T + torch.linalg.solve(p, oa.T @ oa)),
        ):
            close(jvp(lambda t: pinv(y + t * v) @ (v + t * w), (zero,), (one,))[1], rate)  # noqa: B023
    code = METRICS[metric].acceleration(b, a, vb, va, torch.eye(m), torch.eye(len(a)))
    close(torch.cat(code), expected)


@every_size
@formulas("exponential", "invariant-curve", "cylinder")
def test_invariant_exponential(size):
    m, x, u = draw(size)
    u = 0.5 * project("invariant", x, u, m)
    manifold = LoRAQuotient(*size[:2], metric="invariant")

    def factor(y, v, t):
        omega, j = v @ pinv(y), torch.linalg.solve(y.T @ y, v.T @ y)
        return torch.linalg.matrix_exp(t * (omega - omega.T)) @ y @ torch.linalg.matrix_exp(t * j)

    def curve(t):
        return torch.cat((factor(x[:m], u[:m], t), factor(x[m:], u[m:], t)))

    def velocity(t):
        return jvp(curve, (t,), (torch.tensor(1.0),))[1]

    close(curve(torch.tensor(1.0)), manifold.expmap(x, u))
    core, other = (
        torch.linalg.solve(y.T @ y, v.T @ y) for y, v in ((x[:m], u[:m]), (x[m:], u[m:]))
    )
    close(core, other.T)
    for t in torch.tensor([0.0, 0.7]):
        q, v = curve(t), velocity(t)
        second = jvp(velocity, (t,), (torch.tensor(1.0),))[1]
        close(second, acceleration("invariant", q, v, m))
        close(torch.linalg.solve(q[:m].T @ q[:m], v[:m].T @ q[:m]), core)
        close(inner("invariant", q, v, v, m), inner("invariant", x, u, u, m))
        omega_b, omega_a = u[:m] @ pinv(x[:m]), u[m:] @ pinv(x[m:])
        turn_b, turn_a = (torch.linalg.matrix_exp(t * (o - o.T)) for o in (omega_b, omega_a))
        middle = x[:m] @ torch.linalg.matrix_exp(2 * t * core) @ x[m:].T
        close(product(q, m), turn_b @ middle @ turn_a.T)
        rise = singular_values(q, m).log().sum() - singular_values(x, m).log().sum()
        close(rise, 2 * t * core.trace())
    y, r = manifold.expmap(x, u), size[2]
    rise = float(2 * core.trace())
    level = torch.cat((math.exp(-rise / r) * y[:m], y[m:]))
    close(manifold.dist2(x, y), rise**2 / (2 * r) + manifold.dist2(x, level), 1e-8)


@every_metric
@formulas("span", "norm-law")
def test_integrated_geodesics(metric):
    m, x, u = draw((6, 5, 2), seed=1)
    u = 0.3 * project(metric, x, u, m)

    def flow(_, state):
        q, v = (z.reshape(x.shape) for z in torch.from_numpy(state).chunk(2))
        return torch.cat((v.flatten(), acceleration(metric, q, v, m).flatten())).numpy()

    start = torch.cat((x.flatten(), u.flatten())).numpy()
    end = scipy.integrate.solve_ivp(flow, (0, 1), start, "DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
    y, v = (z.reshape(x.shape) for z in torch.from_numpy(end).chunk(2))
    close(LoRAQuotient(6, 5, metric=metric).expmap(x, u), y, 1e-7)
    close(project(metric, y, v, m), v, 1e-7)  # still horizontal
    for part in (slice(None, m), slice(m, None)):
        basis, _ = torch.linalg.qr(torch.cat((x[part], u[part]), -1))
        close(basis @ basis.T @ y[part], y[part], 1e-8)
    if metric in KAPPA:
        w, dw = product(x, m), differential(x, u, m)
        law = norm2(w) + 2 * (w * dw).sum() + KAPPA[metric] * inner(metric, x, u, u, m)
        close(norm2(product(y, m)), law, 1e-7)


@formulas("equal-size")
@pytest.mark.parametrize("metric", ["mixed", "embedded"])
@pytest.mark.parametrize("length", [0.1, 1.0, 4.0])
def test_geodesics_of_cones_at_equal_size(metric, length):
    manifold = LoRAQuotient(7, 6, metric)
    x = torch.randn(10, 13, 2, dtype=torch.float64)
    u = manifold.proju(x, torch.randn_like(x))
    size = manifold.product(x).flatten(1).norm(dim=1) / manifold.norm(x, u)
    u = length * u * size[:, None, None]
    pair, speed = ((z[:, :7], z[:, 7:]) for z in (x, u))
    direct = METRICS[metric]._integrated(pair, speed, fine=True)
    # The representatives agree too: scaling is horizontal and commutes with every lift.
    torch.testing.assert_close(torch.cat(direct, -2), manifold.expmap(x, u), rtol=1e-9, atol=1e-9)


@every_metric
@formulas("rescale", "cone")
def test_size_separates_from_direction(metric):
    m, x, u = draw((6, 5, 2), seed=2)
    manifold, radial = LoRAQuotient(6, 5, metric=metric), 0.5 * x
    close(project(metric, x, radial, m), radial)
    close(differential(x, radial, m), product(x, m))
    y = x + 0.15 * u
    y = torch.cat((y[:m] * product(x, m).norm() / product(y, m).norm(), y[m:]))
    log, c = manifold.logmap(x, y), 1.3
    scaled = torch.cat((c * y[:m], y[m:]))
    rule = log + math.log(c) * radial if metric == "invariant" else c * log + (c - 1) * radial
    close(manifold.logmap(x, scaled), rule, 1e-8)
    if metric in KAPPA:
        rho = float(product(x, m).norm()) / math.sqrt(KAPPA[metric])
        angle = 2 * math.asin(float(manifold.dist(x, y)) / (2 * rho))
        law = rho**2 * (1 + c**2 - 2 * c * math.cos(angle))
        close(manifold.dist2(x, scaled), law, 1e-8)


@pytest.mark.parametrize("rule", ["chordal", "lifted"])
@formulas("equivariance")
def test_equivariant_rules_commute_with_frames(rule):
    tall, small = LoRAQuotient(9, 8, distance="chordal"), LoRAQuotient(6, 6, distance="chordal")
    points = [draw((6, 6, 2), seed)[1] for seed in range(3)]
    (left, right) = (q[:, :6] for q in frames(9, 8))
    placed = [torch.cat((left @ x[:6], right @ x[6:])) for x in points]
    mean = {"chordal": frechet_mean, "lifted": lifted_mean}[rule]
    coordinates = small.product(mean(small, points).point)
    close(tall.product(mean(tall, placed).point), left @ coordinates @ right.T)


@every_metric
def test_mean_in_the_span_is_critical_in_the_whole_space(metric):
    m, x, u = draw((8, 7, 1))
    manifold = LoRAQuotient(8, 7, metric=metric)
    points = [x, x + 0.1 * u, x - 0.05 * u.flip(0)]
    solution = frechet_mean(manifold, points)
    assert solution.converged
    mean = solution.point
    outward = project(metric, mean, draw((8, 7, 1), 7)[2], m)

    def objective(t):
        return sum(float(manifold.dist2(mean + t * outward, p)) for p in points)

    down, here, up = (objective(t) for t in (-1e-3, 0.0, 1e-3))
    assert min(up, down) > here
    assert abs(up - down) < 1e-3 * (up + down - 2 * here)


# --- 8: logarithms --------------------------------------------------------------------------------


@every_metric
@every_size
@formulas("aligned", "aligned-root")
def test_aligned_representative(metric, size):
    m, x, u = draw(size)
    y = LoRAQuotient(*size[:2]).random_representative(x + 0.1 * u)
    (b, a), (by, ay) = (x[:m], x[m:]), (y[:m], y[m:])
    p, q = a.T @ a, b.T @ b
    left, right = pinv(b) @ by, (pinv(a) @ ay).T
    closed = pinv(b) @ product(y, m) @ pinv(a).T
    if metric == "invariant":
        left, right = p @ b.T @ by, ay.T @ a @ q
        closed = p @ b.T @ product(y, m) @ a @ q
    close(left @ right, closed)
    g = torch.linalg.solve(left, torch.from_numpy(np.real(scipy.linalg.sqrtm(closed.numpy()))))
    close(g @ left @ g, right, 1e-8)
    difference = torch.cat((by @ g, ay @ torch.linalg.inv(g).T)) - x
    close(project(metric, x, difference, m), difference, 1e-8)
    aligned = LoRAQuotient(*size[:2], metric=metric, distance="aligned")
    close(aligned.logmap(x, y), difference, 1e-8)
    opposite = torch.cat((-by, ay))  # all eigenvalues change sign: there is no principal root
    assert aligned.path_names[int(aligned.log_path(x, opposite))] == "chordal"


ORDERS = {
    ("embedded", "aligned"): (2, 4),
    ("mixed", "aligned"): (2, 4),
    ("invariant", "aligned"): (2, 4),
    ("embedded", "chordal"): (3, 4),
    ("mixed", "chordal"): (2, None),
    ("invariant", "chordal"): (2, None),
}


@pytest.mark.parametrize(("metric", "distance"), ORDERS, ids="-".join)
@formulas("orders")
def test_orders_of_approximate_logarithms(metric, distance):
    m, x, u = draw((7, 6, 2), seed=1)
    exact = LoRAQuotient(7, 6, metric=metric)
    rough = LoRAQuotient(7, 6, metric=metric, distance=distance)
    u = project(metric, x, u, m)
    steps = np.array([0.08, 0.04, 0.02, 0.01])
    ends = [exact.expmap(x, t * u) for t in steps]
    logs = [
        float(exact.norm(x, rough.logmap(x, y) - t * u)) for t, y in zip(steps, ends, strict=True)
    ]
    square = float(inner(metric, x, u, u, m))
    squares = [
        abs(float(rough.dist2(x, y)) - t**2 * square) for t, y in zip(steps, ends, strict=True)
    ]
    order, order_of_squares = ORDERS[metric, distance]
    assert slope(steps, logs) == pytest.approx(order, abs=0.15)
    if order_of_squares:
        assert slope(steps, squares) == pytest.approx(order_of_squares, abs=0.2)


@cones
@formulas("shooting")
def test_shooting_contracts_with_the_order_of_the_chart(metric):
    m, x, u = draw((7, 6, 2), seed=1)
    manifold, space = LoRAQuotient(7, 6, metric=metric), METRICS[metric]
    u = project(metric, x, u, m)
    wrong = 1e-4 * project(metric, x, draw((7, 6, 2), 5)[2], m)

    def chart(z):
        return torch.cat(chordal_log(space, (x[:m], x[m:]), (z[:m], z[m:])))

    steps = np.array([0.08, 0.04, 0.02])
    factors = []
    for t in steps:
        v = t * (u + wrong)
        v = v + chart(manifold.expmap(x, t * u)) - chart(manifold.expmap(x, v))
        factors.append(float(manifold.norm(x, v - t * u) / manifold.norm(x, t * wrong)))
    assert slope(steps, factors) == pytest.approx({"mixed": 1, "embedded": 2}[metric], abs=0.2)


# --- the pages ------------------------------------------------------------------------------------


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def test_every_labelled_formula_is_checked():
    labels = re.findall(r"^\$\$ \((eq:[\w-]+)\)$", page("mathematics"), re.MULTILINE)
    assert len(labels) == len(set(labels))
    assert set(labels) == TESTED


@pytest.mark.parametrize("name", PAGES)
def test_references_resolve(name):
    labels = set(re.findall(r"\((eq:[\w-]+)\)", page("mathematics")))
    assert set(re.findall(r"\{eq\}`([^`]+)`", page(name))) <= labels
    assert set(re.findall(r"\{doc\}`([^`]+)`", page(name))) <= {x.stem for x in DOCS.glob("*.md")}


@pytest.mark.parametrize("name", PAGES)
def test_code_on_the_page_runs(name):
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL):
        exec(compile(block, f"{name}.md", "exec"), scope)
