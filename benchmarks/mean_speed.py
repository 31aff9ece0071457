"""Time Fréchet means at equal gradient norm, one thread: ours, pyriemann, geomstats, plain geoopt.

    python benchmarks/mean_speed.py [--geomstats PYTHON]

20 positive definite 10 x 10 matrices, and 50 points of the 2-sphere, ten problems of each; every
method goes on until the norm of the mean logarithm is at most 1e-12, measured for all by one
formula. Each peer gets the loosest of its tolerances that reaches it for all ten. The plain loop is
what the documentation of geoopt leads to: ``x = expmap(x, logmap(x, points).mean(0))``. Then 1,000
such problems at once.

geomstats 2.8 needs numpy < 2: name the interpreter of an environment that has it. It takes turns
with the others, in the same run: each solves the ten problems one after the other, after a call
that is not timed. pyriemann is left out where it is not installed. Times are means over the
problems of the median for each.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import geoopt
import harness
import numpy as np
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, dist2_logmap, norm
from manifold_merge.frechet import frechet_mean

try:
    from pyriemann.utils.mean import mean_riemann
except ImportError:
    mean_riemann = None

GOAL = 1e-12
# How many problems of a kind are solved one by one.
PROBLEMS = 10
SPACES = {"SPD 10 x 10, 20 points": "spd", "2-sphere, 50 points": "sphere"}

GEOMSTATS = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from geomstats.geometry.hypersphere import Hypersphere
from geomstats.geometry.spd_matrices import SPDMatrices
from geomstats.learning.frechet_mean import FrechetMean
points, kind, epsilon = np.load(sys.argv[1]), *sys.argv[2:]
space = SPDMatrices(points.shape[-1]) if kind == "spd" else Hypersphere(points.shape[-1] - 1)
mean = FrechetMean(space)
mean.set(epsilon=float(epsilon), max_iter=500)
seconds, found = [], []
mean.fit(points[:, 0])
for i in range(points.shape[1]):
    start = time.perf_counter()
    mean.fit(points[:, i])
    seconds.append(time.perf_counter() - start)
    found.append(np.asarray(mean.estimate_).tolist())
print(json.dumps({"seconds": seconds, "points": found}))
"""


def manifold_of(kind: str) -> Any:
    """The geoopt manifold of a problem."""
    return geoopt.SymmetricPositiveDefinite() if kind == "spd" else geoopt.Sphere()


def problems(kind: str, count: int, seed: int) -> Tensor:
    """Random points ``(k, count, *point)``: Wishart matrices, or directions around an axis."""
    rng = np.random.default_rng(seed)
    if kind == "spd":
        factors = rng.standard_normal((20, count, 10, 20))
        return torch.as_tensor(factors @ factors.swapaxes(-1, -2) / 20)
    x = torch.as_tensor(rng.standard_normal((50, count, 3)) + np.array([2.0, 0.0, 0.0]))
    return x / x.norm(dim=-1, keepdim=True)


def gradient(kind: str, point: Tensor, points: Tensor) -> float:
    """Largest norm of the mean logarithm, by formulas that keep their digits."""
    space = accurate(manifold_of(kind))
    logs = dist2_logmap(space, point.expand_as(points), points)[1]
    return float(norm(space, point, logs.mean(0)).max())


def ours(kind: str, points: Tensor) -> Tensor:
    """``frechet_mean``; its tolerance is relative to the spread, about 1 here."""
    return frechet_mean(manifold_of(kind), points, tolerance=GOAL / 4).point


def plain(kind: str, points: Tensor) -> Tensor:
    """Karcher's iteration written by hand on geoopt, from the projected arithmetic mean."""
    manifold = manifold_of(kind)
    x = manifold.projx(points.mean(0))
    for _ in range(500):
        step = manifold.logmap(x.expand_as(points), points).mean(0)
        if bool((manifold.inner(x, step).sqrt() <= GOAL).all()):
            break
        x = manifold.expmap(x, step)
    return x


def pyriemann(points: Tensor, tolerance: float) -> Tensor:
    """Karcher iteration of pyriemann, ``mean_riemann``."""
    return torch.as_tensor(mean_riemann(points.numpy(), tol=tolerance, maxiter=500))


def geomstats(python: str, kind: str, points: Tensor, epsilon: float) -> Any:
    """Seconds and mean of each problem, from an interpreter that can import geomstats."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.npy"
        np.save(file, points.numpy())
        arguments = [str(file), kind, repr(epsilon)]
        run = subprocess.run(
            [python, "-c", GEOMSTATS, *arguments], check=True, capture_output=True, text=True
        )
    return json.loads(run.stdout)


def loosest(reach: Callable[[float], float], tolerances: list[float]) -> float:
    """The first tolerance with which a method gets to the goal, else the strictest."""
    return next((t for t in tolerances if reach(t) <= GOAL), tolerances[-1])


def measure(kind: str, rounds: int, python: str | None) -> dict[str, Any]:
    """Times of single problems, all methods in turn, and of a batch."""
    points = problems(kind, PROBLEMS, 0)
    singles = [x.contiguous() for x in points.unbind(1)]

    def each(method: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([method(x) for x in singles])

    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "manifold_merge": functools.partial(ours, kind),
        "geoopt, plain loop": functools.partial(plain, kind),
    }
    if kind == "spd" and mean_riemann is not None:

        def reached(value: float) -> float:
            return gradient(kind, each(lambda x: pyriemann(x, value)), points)

        tolerance = loosest(reached, [10.0**-k for k in range(8, 15)])
        methods["pyriemann"] = functools.partial(pyriemann, tolerance=tolerance)
    timings: dict[str, list[list[float]]] = {name: [] for name in methods}
    gradients = {name: gradient(kind, each(method), points) for name, method in methods.items()}
    epsilon = 0.0
    if python is not None:

        def reach(value: float) -> float:
            found = torch.tensor(geomstats(python, kind, points, value)["points"]).to(points)
            return gradient(kind, found, points)

        epsilon = loosest(reach, [10.0**-k for k in range(22, 30)])
        timings["geomstats"], gradients["geomstats"] = [], reach(epsilon)
    for _ in range(rounds):
        for name, method in methods.items():
            method(singles[0])
            row = []
            for x in singles:
                start = time.perf_counter()
                method(x)
                row.append(time.perf_counter() - start)
            timings[name].append(row)
        if python is not None:
            timings["geomstats"].append(geomstats(python, kind, points, epsilon)["seconds"])
    many = problems(kind, 1000, 1)
    batch = []
    for _ in range(3):
        start = time.perf_counter()
        mean = ours(kind, many)
        batch.append((time.perf_counter() - start) / 1000)
    return {
        "seconds": {
            name: float(np.median(values, axis=0).mean()) for name, values in timings.items()
        },
        "gradients": gradients,
        "batch": float(np.median(batch)),
        "batch_gradient": gradient(kind, mean, many),
    }


def render(result: Mapping[str, Any]) -> str:
    """Tables of all measurements."""
    parts = []
    for title, kind in SPACES.items():
        measured = result["spaces"][kind]
        own, batch = measured["seconds"]["manifold_merge"], measured["batch"]
        rows = [
            [
                name,
                harness.seconds(value),
                f"{measured['gradients'][name]:.0e}",
                f"{value / own:.1f} x",
                f"{value / batch:.0f} x",
            ]
            for name, value in measured["seconds"].items()
        ]
        rows.append(
            [
                "manifold_merge, one of 1,000 at once",
                harness.seconds(batch),
                f"{measured['batch_gradient']:.0e}",
                f"{batch / own:.2f} x",
                "1 x",
            ]
        )
        header = [title, "time", "gradient norm", "of ours", "of ours in the batch"]
        parts.append(harness.table(header, rows))
    return "\n\n".join([*parts, harness.footer(result)])


def main() -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="calls of each method and problem")
    parser.add_argument("--geomstats", metavar="PYTHON", help="interpreter that has geomstats")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    before = harness.load()
    spaces = {k: measure(k, arguments.repeats, arguments.geomstats) for k in SPACES.values()}
    result = {
        "environment": harness.environment(),
        "command": harness.command(),
        "load_average": {"before": before, "after": harness.load()},
        "spaces": spaces,
    }
    harness.finish("mean_speed", result, render, arguments.output)


if __name__ == "__main__":
    main()
