"""One of two processes that compute means together; ``test_collective.py`` starts both.

``python collective_worker.py RANK FOLDER`` runs all cases and saves what it saw in
``FOLDER/RANK.pt``. The cases are shared with the tests, which compute the means in one process.
"""

from __future__ import annotations

import datetime
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge import (
    FisherEuclidean,
    LoRAQuotient,
    PermutationQuotient,
    PolarLoRAQuotient,
    frechet_mean,
)

# What one process waits for another: a mistake is an error then, and no hang.
PATIENCE = datetime.timedelta(seconds=60)
SPHERE = geoopt.Sphere()
SPD = geoopt.SymmetricPositiveDefinite()
LINE = geoopt.Euclidean(ndim=1)
PRODUCT = geoopt.ProductManifold((geoopt.Sphere(), 4), (SPD, (3, 3)), (LINE, 2))


@dataclass
class Case:
    """A mean; ``split`` is how many of the anchors the first process has."""

    manifold: Any
    points: Any  # (k, ..., *point), or k tensors
    weights: Any = None
    split: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    metrics: Any = None

    def share(self, rank: int) -> tuple[Any, Any, Any]:
        """Points, weights and metrics of one process."""
        own = slice(0, self.split) if rank == 0 else slice(self.split, None)
        beside = [None if x is None else x[own] for x in (self.weights, self.metrics)]
        return self.points[own], *beside


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@functools.cache
def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = noise(5, 3, 4)
    sphere = unit(torch.eye(4, dtype=torch.float64)[0] + 0.4 * noise(5, 3, 4))
    square = noise(5, 3, 3, 3)
    spd = square @ square.mT + torch.eye(3)
    lora = noise(9, 2) + 0.2 * noise(5, 2, 9, 2)
    product = torch.cat((sphere, spd.flatten(-2), flat[..., :2]), -1)
    polar = PolarLoRAQuotient(5, 4, distance="aligned")
    heads = torch.arange(3.0).double()[:, None] * 3 + 0.5 * noise(5, 2, 3, 2)
    weights = [1.0, 2.0, 3.0, 0.5, 1.0]
    each = torch.rand(5, 3, generator=generator, dtype=torch.float64) + 0.1
    wide = [noise(9, r) for r in (2, 1, 3)]
    wide = [torch.nn.functional.pad(wide[0] + 0.1 * noise(9, 2), (0, 3 - 2))[..., :r] + 0.1 * x
            for r, x in zip((2, 1, 3), wide, strict=True)]  # fmt: skip
    fishers = [FisherEuclidean(f, 1) for f in (0.1 + noise(5, 3, 4).square())]
    far = torch.cat((flat[:4], 20 + flat[4:]))
    opposite = torch.cat((sphere[:4], unit(sphere[4:] * torch.tensor([0.1, 1.0, 1.0, -1.0]))))
    out = {
        "euclidean": Case(LINE, flat, weights),
        "euclidean, negative weight": Case(LINE, flat, [2.0, -0.5, 1.0, 1.0, 1.0]),
        "euclidean, karcher": Case(LINE, flat, each, 1, {"solver": "karcher"}),
        "euclidean median": Case(LINE, far, None, 4, {"p": 1}),
        "fisher": Case(LINE, flat, weights, metrics=fishers),
        "fisher, weights each": Case(LINE, flat, each, 4, metrics=fishers),
        "float32": Case(LINE, flat.float(), weights),
        "sphere": Case(SPHERE, sphere, weights, 4),
        "sphere, weights each": Case(SPHERE, sphere, each),
        "sphere, no batch": Case(SPHERE, sphere[:, 0], None, 1),
        "sphere, more batch": Case(SPHERE, sphere[:4].reshape(2, 2, 3, 4), None, 1),
        # The first process is at its own anchor, and the second has one beyond the cut locus.
        "opposite points": Case(SPHERE, torch.stack((sphere[0], -sphere[0])), None, 1),
        "sphere median": Case(SPHERE, opposite, None, 4, {"p": 1}),
        "positive definite": Case(SPD, spd, weights, 1),
        "positive definite median": Case(SPD, spd[:3, :1], None, 1, {"p": 1}),
        "product": Case(PRODUCT, product, weights),
        "written by a user": Case(Own(), [*sphere.exp()], torch.tensor(weights)),
        "ball": Case(geoopt.PoincareBall(0.5), sphere / 2, weights, 1),
        "from a start": Case(SPHERE, sphere, weights, 2, {"start": sphere[3]}),
        "from all anchors": Case(SPHERE, sphere, weights, 2, {"starts": "anchors"}),
        "a process without weight": Case(SPHERE, sphere, [1.0, 2.0, 0.0, 0.0, 0.0]),
        "permutations": Case(PermutationQuotient(LINE, 3), heads, weights),
        "polar": Case(polar, torch.stack([polar.pack(x[..., :5, :], x[..., 5:, :].mT)
                                          for x in lora]), weights),
        "ranks differ": Case(LoRAQuotient(5, 4, "mixed", "aligned"), wide, [1.0, 1.0, 2.0]),
        "another rank": Case(LoRAQuotient(5, 4, "embedded", "chordal"), lora, weights, 1,
                             {"rank": 3, "solver": "karcher"}),
        "adapter median": Case(LoRAQuotient(5, 4, "invariant", "chordal"),
                               torch.cat((lora[:4], 3 * lora[4:])), None, 4, {"p": 1}),
    }  # fmt: skip
    for metric in ("mixed", "invariant", "embedded"):
        for distance in ("aligned", "chordal"):
            manifold = LoRAQuotient(5, 4, metric, distance)
            out[f"adapters {metric} {distance}"] = Case(manifold, lora, weights)
    out["adapters exact"] = Case(LoRAQuotient(5, 4), lora[:, :1], weights)
    return out


class Refusing(geoopt.Sphere):
    """A sphere one of whose methods fails at one call in the second process."""

    __scaling__ = geoopt.Sphere.__scaling__.copy()

    def __init__(self, method: str, call: int) -> None:
        super().__init__()
        self.method, self.left = method, call

    def _count(self, method: str) -> None:
        self.left -= method == self.method
        if method == self.method and not self.left and os.environ["RANK"] == "1":
            raise RuntimeError("out of luck")

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        self._count("logmap")
        return super().logmap(x, y)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        self._count("expmap")
        return super().expmap(x, u)

    def inner(self, x: Tensor, u: Tensor, v: Any = None, *, keepdim: bool = False) -> Tensor:
        self._count("inner")
        return super().inner(x, u, v, keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        self._count("proju")
        return super().proju(x, u)


class Own(geoopt.Manifold):
    """Positive numbers by their logarithms: a manifold that somebody wrote, and nothing more."""

    __scaling__ = geoopt.Sphere.__scaling__.copy()
    name = "Own"
    ndim = 1
    reversible = False

    def _check_point_on_manifold(self, x: Any, *, atol: float = 1e-5, rtol: float = 1e-5) -> Any:
        return bool((x > 0).all()), None

    def _check_vector_on_tangent(
        self, x: Any, u: Any, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> Any:
        return True, None

    def inner(self, x: Tensor, u: Tensor, v: Any = None, *, keepdim: bool = False) -> Tensor:
        return (u * (u if v is None else v) / x**2).sum(-1, keepdim=keepdim)

    def projx(self, x: Tensor) -> Tensor:
        return x.abs()

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return u

    egrad2rgrad = proju

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        return x * (u / x).exp()

    retr = expmap

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v * y / x

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        return x * (y / x).log()


# Methods of a manifold, and at which call they fail: at the start, or in a step.
FAILING = [("expmap", 1), ("inner", 1), ("inner", 3), ("proju", 1)]


def wrong(rank: int) -> dict[str, Callable[[Any], Any]]:
    """Calls that must fail in both processes, whichever is at fault."""
    at_fault = rank == 1
    points = cases()["sphere"].points[:2]

    def mean(group: Any, x: Any = points, **options: Any) -> Any:
        return frechet_mean(options.pop("manifold", SPHERE), x, process_group=group, **options)

    bad = points.clone()
    if at_fault:
        bad[1, 0] = torch.nan
    return {
        "nan": lambda g: mean(g, bad),
        "no anchor": lambda g: mean(g, [] if at_fault else points),
        "batch": lambda g: mean(g, points[:, :2] if at_fault else points),
        "size": lambda g: mean(g, unit(points[..., :3]) if at_fault else points),
        "dtype": lambda g: mean(g, points.float() if at_fault else points),
        "solver": lambda g: mean(g, solver="karcher" if at_fault else "auto", p=1 + at_fault),
        "unknown solver": lambda g: mean(g, solver="trust_region"),
        "closed form": lambda g: mean(g, solver="closed_form"),
        "weights": lambda g: mean(g, weights=[1.0, -1.0 if at_fault else 1.0]),
        "batch of weights": lambda g: mean(g, weights=torch.ones(2, 2 if at_fault else 3)),
        "empty": lambda g: mean(g, points[:, :0]),
        "weights here only": lambda g: mean(g, weights=[1.0, 1.0] if at_fault else None),
        "no weight": lambda g: mean(g, weights=[0.0, 0.0]),
        "metrics": lambda g: mean(g, metrics=[SPHERE, SPHERE] if at_fault else None),
        "rank": lambda g: mean(g, rank=2),
        "start": lambda g: mean(g, start=points[0, :1] if at_fault else points[0]),
        "gauge": lambda g: mean(g, gauge_check=True),
        "in the middle": lambda g: mean(g, manifold=Refusing("logmap", 3)),
        **{
            f"{method}, call {call}": lambda g, m=method, c=call: mean(g, manifold=Refusing(m, c))
            for method, call in FAILING
        },
        "curvature": lambda g: mean(g, points / 2, manifold=geoopt.PoincareBall(1.0 + at_fault)),
        "subspace": lambda g: mean(
            g,
            unit(torch.nn.functional.pad(points[..., :3], (0, 1))),
            manifold=geoopt.Sphere(torch.eye(4)[:, : 3 + at_fault].double()),
        ),
        "size of information": lambda g: mean(
            g, manifold=LINE, metrics=[FisherEuclidean(torch.ones(3 if at_fault else 4), 1)] * 2
        ),
        "sign of information": lambda g: mean(
            g,
            manifold=LINE,
            metrics=[FisherEuclidean(torch.ones(4), 1)] * 2,
            weights=[2.0, -1.0 if at_fault else 1.0],
        ),
        "start of information": lambda g: mean(
            g, manifold=LINE, metrics=[FisherEuclidean(torch.ones(4), 1)] * 2, start=points[0]
        ),
        "gradient": lambda g: mean(g, points.clone().requires_grad_()),
        "no group": lambda g: mean("world"),
    }


def main(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2, timeout=PATIENCE)  # fmt: skip
    seen: dict[str, Any] = {}
    for name, case in cases().items():
        points, weights, metrics = case.share(rank)
        found = frechet_mean(case.manifold, points, weights, metrics=metrics,
                             process_group=dist.group.WORLD, **case.options)  # fmt: skip
        seen[name] = {
            "point": found.point, "objective": found.objective, "weights": found.weights,
            "gradient_norm": found.gradient_norm, "converged": found.converged,
            "solver": found.solver, "paths": found.paths, "status": found.status,
        }  # fmt: skip
    errors = {}
    for name, call in wrong(rank).items():
        try:
            call(dist.group.WORLD)
            errors[name] = "no error"
        except (ValueError, RuntimeError, NotImplementedError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    case = cases()["adapters invariant aligned"]
    points, weights, _ = case.share(rank)
    checked = frechet_mean(case.manifold, points, weights, process_group=dist.group.WORLD,
                           gauge_check=True, generator=torch.Generator().manual_seed(rank),
                           solver="karcher")  # fmt: skip
    seen["gauge residual"] = checked.gauge_residual
    # The last thing: one process goes, and the other hears of it.
    if rank == 1:
        torch.save((seen, errors), folder / "1.pt")
        os._exit(0)
    try:
        frechet_mean(case.manifold, points, weights, process_group=dist.group.WORLD)
        errors["lost"] = "no error"
    except RuntimeError as error:
        errors["lost"] = f"{type(error).__name__}: {error}"
    torch.save((seen, errors), folder / "0.pt")
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
