"""One of two processes that average sharded tensors; ``test_sharded.py`` starts both.

``python sharded_worker.py RANK FOLDER`` saves whole tensors in ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from manifold_merge import (
    FisherEuclidean,
    FrechetAveragedModel,
    FrechetMean,
    frechet_mean,
    param_groups,
)

# What one process waits for another: a mistake is an error then, and no hang.
PATIENCE = datetime.timedelta(seconds=60)
WEIGHTS = [1.0, 2.0, 0.5]


def anchors(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def information(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1 for _ in range(3)]


def models(count: int = 3) -> list[nn.Sequential]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)) for _ in range(count)]


class WithAdapter(nn.Module):
    """A model with one LoRA pair, named as PEFT names it."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})


# Name: manifold, shape and options of a mean; shapes that do not divide by two as well.
MEANS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mean": (geoopt.Euclidean(), (4, 3), {}),
    "mean, uneven": (geoopt.Euclidean(), (5, 3), {"weights": WEIGHTS}),
    "mean, one row": (geoopt.Euclidean(), (1, 3), {"weights": WEIGHTS}),
    "mean of matrices": (geoopt.Euclidean(ndim=2), (5, 3), {"weights": WEIGHTS}),
    "mean of rows": (geoopt.Euclidean(ndim=1), (5, 3), {"weights": WEIGHTS}),
    "median": (geoopt.Euclidean(), (5, 3), {"p": 1}),
    "fisher": (geoopt.Euclidean(ndim=2), (5, 3), {"weights": WEIGHTS, "metrics": "diagonal"}),
}


def mean_of(name: str, split: Any = lambda x: x) -> Any:
    """One of the means above, of tensors that ``split`` has split."""
    manifold, shape, options = MEANS[name]
    options = dict(options)
    if "metrics" in options:
        options["metrics"] = [FisherEuclidean(split(f)) for f in information(*shape)]
    return frechet_mean(manifold, [split(x) for x in anchors(*shape)], **options)


def step(mean: nn.Module, sources: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters after one step towards the models, and the objective before it."""
    optimizer = FrechetMean(param_groups(mean), anchors=sources, weights=WEIGHTS, lr=0.5)
    objective = optimizer.step()
    return {name: whole(p) for name, p in mean.named_parameters()}, objective


def running(averaged: FrechetAveragedModel, sources: list[Any]) -> dict[str, Tensor]:
    for model in sources:
        averaged.update_parameters(model)
    return {name: whole(p) for name, p in averaged.module.named_parameters()}


def whole(x: Any) -> Tensor:
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def error_of(call: Any) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "no error"


def main(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2, timeout=PATIENCE)  # fmt: skip
    mesh = init_device_mesh("cpu", (2,))
    seen: dict[str, Any] = {}
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    ways: dict[Any, tuple[Any, list[Any]]] = {
        0: (mesh, [Shard(0)]),
        1: (mesh, [Shard(1)]),
        "copies": (hybrid, [Replicate(), Shard(0)]),
    }
    for way, (over, placements) in ways.items():

        def split(x: Tensor, over: Any = over, placements: Any = placements) -> Any:
            return distribute_tensor(x, over, placements)

        for name in MEANS:
            found = mean_of(name, split)
            assert type(found.point).__name__ == "DTensor"
            assert found.converged, found.message
            if "metrics" not in MEANS[name][2]:  # one tensor, its entries split
                manifold, shape, options = MEANS[name]
                moved = [x if x.is_replicate() else Shard(x.dim + 1) for x in placements]
                stacked = distribute_tensor(torch.stack(anchors(*shape)), over, moved)
                found_too = frechet_mean(manifold, stacked, **options)
                assert torch.equal(whole(found_too.point), whole(found.point))
            seen[f"{name}, {way}"] = (whole(found.point), whole(found.objective),
                                      whole(found.gradient_norm))  # fmt: skip

    def sharded(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=mesh)
        return model

    first, *others = models(4)
    seen["step"] = step(sharded(first), [sharded(m) for m in others])
    first, *others = models(4)
    seen["step, whole anchors"] = step(sharded(first), others)
    averaged = FrechetAveragedModel(models(1)[0])
    sharded(averaged.module)
    copies = models(4)
    for model in copies:
        fully_shard(model, mesh=hybrid)
    seen["step, copies"] = step(copies[0], copies[1:])
    seen["running"] = running(averaged, [sharded(m) for m in models()])

    x = [distribute_tensor(a, mesh, [Shard(0)]) for a in anchors(4, 3)]
    other = distribute_tensor(anchors(4, 3)[0], mesh, [Replicate()])
    bad = anchors(4, 3)[0]
    bad[3, 0] = torch.nan  # in the part of the second process
    flat = geoopt.Euclidean(ndim=2)
    adapter = FrechetAveragedModel(WithAdapter())
    sharded(adapter.module)
    model = sharded(WithAdapter())
    adapter.update_parameters(model)
    seen["errors"] = {
        "sphere": error_of(lambda: frechet_mean(geoopt.Sphere(), x)),
        "median": error_of(lambda: frechet_mean(flat, x, p=1)),
        "mixed": error_of(lambda: frechet_mean(flat, [*x, other])),
        "plain": error_of(lambda: frechet_mean(flat, [*x, anchors(4, 3)[0]])),
        "nan": error_of(
            lambda: frechet_mean(flat, [x[0], distribute_tensor(bad, mesh, [Shard(0)])])
        ),
        "anchors": error_of(
            lambda: frechet_mean(
                flat, distribute_tensor(torch.stack(anchors(4, 3)), mesh, [Shard(0)])
            )
        ),
        "information": error_of(
            lambda: frechet_mean(flat, x, metrics=[FisherEuclidean(torch.ones(5, 3))] * 3)
        ),
        "gradient": error_of(lambda: frechet_mean(flat, [x[0], x[1].clone().requires_grad_()])),
        "start": error_of(lambda: frechet_mean(flat, x, start=x[0])),
        "group": error_of(lambda: frechet_mean(flat, x, process_group=dist.group.WORLD)),
        "pair": error_of(lambda: FrechetMean(param_groups(model), anchors=[model])),
        "running pair": error_of(lambda: adapter.update_parameters(model)),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
