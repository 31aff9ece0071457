"""Far, opposite, orthogonal and deficient points: every operation has a defined answer."""

from __future__ import annotations

import pytest
import torch
from lora_oracles import (
    draw,
    near,
    product,
)
from test_lora_geodesics import EVERY_DISTANCE, EVERY_METRIC, INTEGRATED, close, tangent
from torch import Tensor

from manifold_merge import LoRAQuotient
from manifold_merge.lora import ALIGNED, CHORDAL, EXACT

FLOAT64 = torch.float64


def far_points() -> dict[str, tuple[Tensor, Tensor]]:
    m, n, r = 8, 7, 3
    x, y = draw(m, n, r), draw(m, n, r, seed=1)
    frames = [torch.linalg.qr(torch.randn(k, k, dtype=FLOAT64))[0] for k in (m, n)]
    orthogonal = [torch.cat([f[:, i : i + r] for f in frames]) for i in (0, 3)]
    sign = torch.cat((-torch.ones(m, 1), torch.ones(n, 1))).double()
    fresh = torch.cat((torch.zeros(m, r).double(), x[m:]))
    deficient = x.clone()
    deficient[:, 2] = deficient[:, 1]
    zero = torch.zeros_like(x)
    half = torch.cat((frames[0][:, :r], y[m:]))
    return {
        "identical": (x, x),
        "random": (x, y),
        "opposite": (x, sign * x),
        "orthogonal": (orthogonal[0], orthogonal[1]),
        "orthogonal columns": (half, torch.cat((frames[0][:, r : 2 * r], y[m:]))),
        "fresh from": (fresh, x),
        "fresh to": (x, fresh),
        "deficient from": (deficient, y),
        "deficient to": (y, deficient),
        "both deficient": (deficient, deficient),
        "zero from": (zero, x),
        "zero to": (x, zero),
        "both zero": (zero, zero),
        "tiny": (1e-4 * x, 1e-4 * near(x, 0.02)),
        "huge": (1e4 * x, 1e4 * near(x, 0.02)),
        "one factor tiny": (torch.cat((1e-4 * x[:m], 1e4 * x[m:])), near(x, 0.02)),
        "very different sizes": (1e-2 * x, 1e2 * y),
    }


NEVER_SHOT = ("opposite", "orthogonal", "fresh", "deficient", "zero")


@EVERY_METRIC
@EVERY_DISTANCE
@pytest.mark.parametrize("case", list(far_points()))
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1.0),
        (FLOAT64, 1.0),
        pytest.param(FLOAT64, 1e4, marks=pytest.mark.slow),
        pytest.param(FLOAT64, 1e-4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_operation_is_defined(metric, distance, case, dtype, scale):
    manifold = LoRAQuotient(8, 7, metric, distance)
    x, y = (scale * z.to(dtype) for z in far_points()[case])
    path, (squared, log) = int(manifold.log_path(x, y)), manifold.dist2_logmap(x, y)
    leaf = x.clone().requires_grad_()
    values = {
        "squared": squared,
        "log": log,
        "dist(x, y)": manifold.dist(x, y),
        "dist(y, x)": manifold.dist(y, x),
        "|log|": manifold.norm(x, log),
        "expmap": manifold.expmap(x, log),
        "retr": manifold.retr(x, log),
        "align": manifold.align(x, y),
        "egrad2rgrad": manifold.egrad2rgrad(x, log),
        "proju": manifold.proju(x, y),
        "transp": manifold.transp(x, y, log),
        "gradient": torch.autograd.grad(manifold.dist2(leaf, y), leaf)[0],
    }
    assert not [name for name, value in values.items() if not bool(value.isfinite().all())]
    assert float(values["dist(x, y)"]) >= 0
    assert path in manifold.path_names
    # A class has one distance, whichever end it is seen from.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        values["dist(x, y)"],
        values["dist(y, x)"],
        rtol=tolerance,
        atol=tolerance * float(values["|log|"]),
    )
    if distance == "chordal" or any(word in case for word in ("fresh", "deficient", "zero")):
        wanted = CHORDAL
    elif case in ("identical", "tiny", "huge", "one factor tiny"):
        wanted = {"exact": EXACT, "aligned": ALIGNED}[distance]
    elif case == "opposite" and (distance == "aligned" or metric != "invariant"):
        wanted = CHORDAL  # every geodesic between them would pass through lower rank
    else:
        return
    assert path == wanted


@EVERY_METRIC
@EVERY_DISTANCE
def test_distances_to_deficient_points_are_chords(metric, distance):
    manifold = LoRAQuotient(8, 7, metric, distance)
    cases = far_points()
    for case in ("fresh from", "fresh to", "deficient to", "zero to", "both deficient"):
        x, y = cases[case]
        if metric == "invariant" and distance != "chordal":
            continue  # rank loss is infinitely far there; the stand-in has no closed form
        chord = (product(manifold, x) - product(manifold, y)).norm()
        torch.testing.assert_close(manifold.dist(x, y), chord, rtol=1e-9, atol=1e-12)


@EVERY_METRIC
def test_distance_of_different_ranks_is_the_chord(metric):
    manifold = LoRAQuotient(8, 7, metric)
    x, y = draw(8, 7, 2), draw(8, 7, 4, seed=1)
    assert int(manifold.log_path(x, y)) == CHORDAL
    if metric != "invariant":
        torch.testing.assert_close(
            manifold.dist(x, y), (product(manifold, x) - product(manifold, y)).norm()
        )


@EVERY_METRIC
@EVERY_DISTANCE
def test_mixed_batch_takes_each_its_own_path(metric, distance):
    """What one element needs must not change another: a batch is solved like its elements."""
    manifold = LoRAQuotient(8, 7, metric, distance)
    cases = far_points()
    names = ["identical", "tiny", "random", "fresh to", "opposite", "deficient from", "huge"]
    x, y = (torch.stack([cases[name][i] for name in names]) for i in (0, 1))
    path, distance_, log = manifold.log_path(x, y), manifold.dist(x, y), manifold.logmap(x, y)
    for i in range(len(names)):
        assert int(path[i]) == int(manifold.log_path(x[i], y[i]))
        torch.testing.assert_close(
            distance_[i],
            manifold.dist(x[i], y[i]),
            rtol=1e-7,
            atol=1e-7 * float(manifold.norm(x[i], y[i])),
        )
        gap = manifold.norm(x[i], log[i] - manifold.logmap(x[i], y[i]))
        assert float(gap) <= 1e-7 * float(distance_[i]) + 1e-12


def test_invariant_geodesics_keep_the_rank():
    manifold = LoRAQuotient(6, 5, "invariant")
    x = draw(6, 5, 5, 2)
    y = manifold.expmap(x, tangent(manifold, x, 8.0))
    s = torch.linalg.svdvals(product(manifold, y))[..., :2]
    assert bool(s.isfinite().all())
    assert bool((s > 0).all())


@INTEGRATED
def test_exponential_beyond_the_end_of_a_geodesic_is_finite(metric):
    """Straight at the matrix of lower rank, through it and far beyond."""
    manifold = LoRAQuotient(4, 3, metric)
    x = draw(4, 3, 2)
    for factor in (0.5, 0.999, 1.0, 1.5, 10.0, 1e3):
        assert bool(manifold.expmap(x, -0.5 * factor * x).isfinite().all())
    shrunk = manifold.expmap(x, -0.25 * x)  # the cone over x is flat: dW = -W/2
    close(product(manifold, shrunk), 0.5 * product(manifold, x), 1e-10)
