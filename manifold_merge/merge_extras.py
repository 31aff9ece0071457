"""Parts of an adapter merge that need no geometry: extra tensors, plain sums, checks of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import geoopt
import torch
from torch import Tensor

from manifold_merge.adapter_sets import group_modules
from manifold_merge.adapters import Adapter
from manifold_merge.anchors import refuse_names
from manifold_merge.frechet import frechet_mean, normalized_weights
from manifold_merge.lift import pairwise_inner
from manifold_merge.lora import LoRAQuotient
from manifold_merge.solution import FrechetSolution

__all__ = ["check_weights", "least_cosine", "mean_of_extras", "weighted_sum"]


# Modules in which closeness is measured; more change the average by little and cost a read.
CLOSENESS_SAMPLE = 16


def mean_of_extras(
    adapters: Sequence[Adapter],
    weights_of: Callable[[str], Sequence[float]],
    *,
    missing: str,
    sum: bool,
    p: int,
    scale: float,
    device: torch.device,
) -> dict[str, Tensor]:
    """Biases and fully trained modules, merged by name; options as of ``merge_adapters``."""
    merged = {}
    for name in sorted({name for adapter in adapters for name in adapter.extras}):
        having = [a for a in adapters if name in a.extras]
        extra = having[0].extras[name]
        if sum and extra.replaces_base:
            raise ValueError(
                f"sum=True: {extra.kind} tensor {name!r} replaces one of the base model, and a "
                "sum of whole tensors has no meaning; pass extras='drop', or use a mean"
            )
        values, weights = [], []
        for adapter, weight in zip(adapters, weights_of(name), strict=True):
            if name in adapter.extras:
                values.append(adapter.extra(name, device=device).cpu().double())
            elif missing == "zero":
                values.append(torch.zeros(extra.shape, dtype=torch.float64))
            else:
                continue
            weights.append(weight)
        stacked = torch.stack(values)
        if sum:
            mean = torch.einsum("k...,k->...", stacked, stacked.new_tensor(weights))
        else:
            euclidean = geoopt.Euclidean(ndim=stacked.ndim - 1)
            mean = frechet_mean(euclidean, stacked, weights, p=p).point
        merged[name] = mean * (1.0 if extra.replaces_base else scale)
    return merged


def least_cosine(
    adapters: Sequence[Adapter], weights: Sequence[float], points: Callable[..., Tensor]
) -> float:
    """Least cosine between the updates of two adapters, over a sample of their modules.

    The least and not the mean, because it does not change when an adapter is given twice.

    Args:
        adapters: k adapters.
        weights: One for each; those of weight zero are left out.
        points: Function (adapter, group, names, manifold) to points ``(b, m + n, r)``.
    """
    pairs = [(g, name) for g in group_modules(adapters) for name in g.names]
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    count = min(len(pairs), CLOSENESS_SAMPLE)
    for group, name in (pairs[i * len(pairs) // count] for i in range(count)):
        present = [i for i, r in enumerate(group.ranks) if r]
        manifold = LoRAQuotient(group.out_features, group.in_features)
        having = [points(adapters[i], group, [name], manifold) for i in present]
        index = torch.tensor(present)
        gram[index[:, None], index] += pairwise_inner(manifold, having)[..., 0].cpu().double()
    for adapter in adapters:
        adapter.release()
    norms = gram.diagonal().clamp(min=0).sqrt()
    cosines = gram / (norms[:, None] * norms).clamp(min=torch.finfo(gram.dtype).tiny)
    used = torch.tensor(weights) != 0
    return float(cosines[used][:, used].min())


def weighted_sum(
    manifold: LoRAQuotient, points: list[Tensor], weights: list[float], rank: int | None
) -> FrechetSolution:
    """Σ wᵢ Wᵢ at the given rank: the chordal solution without its normalisation."""
    reduced, anchors, restore = manifold.reduce(points, rank=rank)
    w = anchors.new_tensor(weights).reshape(-1, *(1,) * (anchors.ndim - 3))
    w = w.expand(anchors.shape[:-2])
    point = restore(reduced.closed_form_mean(anchors, w, rank))
    zero = torch.zeros(point.shape[:-2], dtype=anchors.dtype, device=anchors.device)
    status = torch.zeros_like(zero, dtype=torch.long)
    return FrechetSolution(point, zero, zero, status, status, w, "sum")


def check_weights(
    what: str, given: Sequence[float], count: int, *, chordal: bool, sum: bool
) -> None:
    """Raise ``ValueError`` if weights are not as many, or not such, as they have to be."""
    where = "weights" if what == "weights" else f"layer_weights[{what!r}]"
    refuse_names(given, where)
    if len(given) != count:
        raise ValueError(f"{where}: expected {count}, one for each adapter; got {len(given)}")
    try:
        if sum:
            if not torch.tensor([float(w) for w in given]).isfinite().all():
                raise ValueError(f"weights: expected finite numbers, got {list(given)}")
            return
        normalized_weights(given, count, like=torch.zeros(1).double(), negative=chordal)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('weights: ')}") from error
