"""Tensors of which each process holds a part: DTensors, as FSDP2 and tensor parallelism make them.

Where a geometry treats each entry by itself (Euclidean means, entry-wise medians, diagonal Fisher
information), the part of the mean is the mean of the parts, and nothing travels but the objective.
Other geometries look at whole tensors, which have to be put together first.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.fisher import FisherEuclidean
from manifold_merge.solution import FrechetSolution

__all__ = ["is_sharded", "local_part", "refuse_sharded", "sharded_mean", "total_over_mesh"]


def is_sharded(x: Any) -> bool:
    """Whether this is a DTensor.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(x, module.DTensor)


def refuse_sharded(label: str, tensor: Any, manifold: Any) -> None:
    """Raise if the tensor is a DTensor, on a manifold whose points have to be whole.

    Raises:
        ValueError: Names the tensor and the remedy.
    """
    if is_sharded(tensor):
        raise ValueError(
            f"{label}: it is spread over processes (a DTensor, {_how(tensor)}), and points of "
            f"{manifold} are whole; put it together with full_tensor() and average that, or keep "
            "this module out of fully_shard (adapters are small). Sharded tensors are averaged on "
            "geoopt.Euclidean and with FisherEuclidean metrics"
        )


def local_part(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor, split as ``like`` is; the whole if ``like`` is not split.

    Args:
        tensor: A DTensor, or a plain tensor that every process has whole.
        like: A DTensor of the same shape, or a plain tensor.
    """
    if not is_sharded(like):
        whole: Any = tensor
        return whole.full_tensor() if is_sharded(tensor) else tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements
    if not is_sharded(tensor):
        everywhere = [Replicate()] * mesh.ndim
        tensor = DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    split: Any = tensor
    local: Tensor = split.redistribute(mesh, placements).to_local()
    return local


def total_over_mesh(value: Tensor, like: Any) -> Tensor:
    """Sum of a number over the processes among which ``like`` is split."""
    if not is_sharded(like):
        return value
    total = value.clone()
    for dimension, placement in enumerate(like.placements):
        if placement.is_shard():
            group = like.device_mesh.get_group(dimension)
            torch.distributed.all_reduce(total, group=group)
    return total


def sharded_mean(
    manifold: geoopt.Manifold,
    points: Any,
    weights: Sequence[float] | Tensor | None,
    solve: Any,
    *,
    p: int = 2,
    metrics: Sequence[Any] | None = None,
    **options: Any,
) -> FrechetSolution:
    """The mean of DTensors, for geometries that treat each entry by itself.

    Args:
        manifold: ``geoopt.Euclidean``.
        points: k DTensors ``(..., *point)``, all split alike, or one ``(k, ..., *point)``.
        weights: ``(k,)``.
        solve: ``frechet_mean``.
        p: 2, or 1 with ``ndim=0``.
        metrics: ``FisherEuclidean`` metrics, or none.
        options: Others of ``frechet_mean``.

    Returns:
        The mean, split as the anchors are. For ``ndim=0`` the certificate is split so too.

    Raises:
        ValueError: If the geometry looks at whole tensors, or the anchors are not split alike.
    """
    if is_sharded(points) and any(x.is_shard(0) for x in points.placements):
        raise ValueError(
            f"points: {_how(points)} spreads the anchors over processes, not their entries; split "
            "another dimension, or pass to_local() with process_group="
        )
    anchors = list(points)
    first = next(x for x in anchors if is_sharded(x))
    diagonal = metrics is not None and all(isinstance(m, FisherEuclidean) for m in metrics)
    flat = isinstance(manifold, geoopt.Euclidean) and (metrics is None or diagonal)
    for i, x in enumerate(anchors):
        if not is_sharded(x) or x.placements != first.placements or x.shape != first.shape:
            raise ValueError(
                f"points[{i}]: expected a DTensor of shape {tuple(first.shape)}, {_how(first)}, as "
                f"another anchor is; got shape {tuple(x.shape)}, {_how(x)}; redistribute it"
            )
        if not flat:
            refuse_sharded(f"points[{i}]", x, manifold if metrics is None else metrics[i])
    if any(placement.is_partial() for placement in first.placements):
        raise ValueError(f"points: {_how(first)} is a sum that is not finished; redistribute it")
    ndim = int(manifold.ndim)
    if p == 1 and ndim:
        raise ValueError(
            f"p=1: the median of points of {ndim} dimensions needs distances between whole "
            "tensors, and these are spread over processes; use geoopt.Euclidean(ndim=0), the "
            "median of each entry, or put them together with full_tensor()"
        )
    usual = {"rank": None, "start": None, "starts": "auto", "gauge_check": False}
    for name, value in usual.items():
        if isinstance(options[name], Tensor) or options[name] != value:
            raise ValueError(f"{name}: not for DTensors; leave it out")
    if weights is not None and torch.as_tensor(weights).ndim != 1:
        raise ValueError("weights: one number for each anchor is expected for DTensors")
    # Each entry is a point of its own.
    local = [x.detach().to_local().reshape(-1, 1) for x in anchors]
    bad = torch.stack([(~x.isfinite()).sum() for x in local])
    bad = total_over_mesh(bad, first)
    if bool(bad.any()):
        i = int(bad.argmax())
        raise ValueError(
            f"points[{i}]: {int(bad[i])} entries are NaN or infinite; repair that anchor"
        )
    own = None
    if metrics is not None:
        own = [_local_fisher(f"metrics[{i}]", m, first) for i, m in enumerate(metrics)]
    if not len(local[0]):  # nothing of a tensor of few rows is here; any number will do
        local = [x.new_zeros(1, 1) for x in local]
        own = None if own is None else [x.new_ones(1, 1) for x in own]
    own = None if own is None else [FisherEuclidean(x, 1) for x in own]
    found = solve(geoopt.Euclidean(ndim=1), local, weights, p=p, metrics=own, **options)
    return _wrapped(found, first, ndim)


def _local_fisher(label: str, metric: FisherEuclidean, like: Any) -> Tensor:
    fisher = metric.fisher
    if fisher.shape != like.shape:
        try:
            fisher = fisher.expand(like.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{label}: Fisher information of shape {tuple(fisher.shape)} does not fit an "
                f"anchor of shape {tuple(like.shape)}; collect it from that anchor"
            ) from error
    return local_part(fisher, like).reshape(-1, 1)


def _wrapped(found: FrechetSolution, like: Any, ndim: int) -> FrechetSolution:
    """The solution of the parts as that of the whole."""
    from torch.distributed.tensor import DTensor

    shape = like.to_local().shape

    def whole(x: Tensor) -> Any:
        own = x[: shape.numel()].reshape(shape)
        return DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape,
            stride=like.stride(),
        )  # fmt: skip

    point: Any = whole(found.point)
    names = ("objective", "gradient_norm", "iterations", "status")
    certificate: dict[str, Any] = {name: whole(getattr(found, name)) for name in names}
    if ndim:  # what belongs to one point is put together; these means are closed forms
        dims = list(range(-ndim, 0))
        counts = found.iterations.new_zeros(like.shape[: like.ndim - ndim])
        length = certificate["gradient_norm"].square().sum(dims).full_tensor().sqrt()
        certificate = {
            "objective": certificate["objective"].sum(dims).full_tensor(),
            "gradient_norm": length,
            "iterations": counts,
            "status": counts,
        }
    return dataclasses.replace(found, point=point, **certificate)


def _how(tensor: Any) -> str:
    return str(tuple(tensor.placements)) if is_sharded(tensor) else "not split"
