"""Positive rescaling of ReLU units: the same function, other numbers.

A unit of a positively homogeneous activation may have its inputs and bias multiplied by a > 0 and
its outputs divided by a. In each class the representative of least norm is unique up to dead units:
it is the balanced one, where the inputs of each unit are as long as its outputs. The logarithm of
the factors enters the norm convexly, so that balancing one layer after another finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manifold_merge.symmetry import GaugeGroup, NetworkSymmetry, Placement

__all__ = ["balance_factors", "balanced", "positive_gauges", "rescaled", "unit_gauges"]


def positive_gauges(symmetry: NetworkSymmetry) -> tuple[GaugeGroup, ...]:
    """The gauges of a symmetry that are positive factors of units."""
    return tuple(gauge for gauge in symmetry.gauges if gauge.kind == "positive")


def unit_gauges(symmetry: NetworkSymmetry) -> tuple[GaugeGroup, ...]:
    """The positive gauges of units with weights of their own, not those of a norm's gains alone.

    The gains of a normalisation are few and near one in every network; balanced against all the
    weights that read them they move far, and apart.
    """
    return tuple(
        gauge
        for gauge in positive_gauges(symmetry)
        if any(not p.inverse and len(symmetry.shapes[p.tensor]) > 1 for p in gauge.placements)
    )


def _slice(tensor: Tensor, place: Placement) -> Tensor:
    for axis, position in place.within:
        tensor = tensor.narrow(axis, position, 1)
    return tensor


def _squares(tensor: Tensor, place: Placement, count: int) -> Tensor:
    """Sum of squares of the entries of each unit, ``(count,)``."""
    part, index = _slice(tensor, place), place.index(count)
    part = part.index_select(place.axis, index.reshape(-1).to(part.device))
    return part.movedim(place.axis, 0).reshape(count, -1).square().sum(1)


def _multiply(tensor: Tensor, place: Placement, factors: Tensor) -> None:
    """Multiply the entries of each unit by its factor, in place."""
    part, index = _slice(tensor, place), place.index(len(factors))
    along = torch.ones(part.shape[place.axis], dtype=tensor.dtype, device=tensor.device)
    along[index.reshape(-1)] = factors.repeat_interleave(index.shape[1]).to(along)
    shape = [1] * part.ndim
    shape[place.axis] = -1
    part.mul_(along.reshape(shape))


def rescaled(
    state: Mapping[str, Tensor], gauges: Sequence[GaugeGroup], factors: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Rescale units: inputs times their factor, outputs divided by it.

    Args:
        state: A state dict.
        gauges: Positive gauges of the network.
        factors: For each gauge one positive factor for each unit, ``(d,)``.

    Returns:
        A new state dict of the same function; tensors without a unit are shared with ``state``.

    Example:
        >>> import torch
        >>> from manifold_merge.symmetry import GaugeGroup, Placement
        >>> places = (Placement("0.weight", 0), Placement("2.weight", 1, inverse=True))
        >>> state = {"0.weight": torch.ones(1, 2), "2.weight": torch.ones(3, 1)}
        >>> new = rescaled(state, [GaugeGroup("0", "positive", 1, places)], [torch.tensor([2.0])])
        >>> new["0.weight"].tolist(), new["2.weight"].tolist()
        ([[2.0, 2.0]], [[0.5], [0.5], [0.5]])
    """
    result = dict(state)
    for name in {place.tensor for gauge in gauges for place in gauge.placements}:
        result[name] = result[name].clone()
    for gauge, factor in zip(gauges, factors, strict=True):
        for place in gauge.placements:
            _multiply(result[place.tensor], place, 1 / factor if place.inverse else factor)
    return result


def balance_factors(
    state: Mapping[str, Tensor],
    gauges: Sequence[GaugeGroup],
    *,
    tolerance: float = 1e-6,
    max_sweeps: int = 200,
) -> list[Tensor]:
    """Factors that make the inputs of each unit as long as its outputs.

    Args:
        state: A state dict.
        gauges: Positive gauges of the network.
        tolerance: Relative change of the factors at which to stop.
        max_sweeps: Greatest number of visits of each layer.

    Returns:
        For each gauge a factor for each unit, ``(d,)``; 1 where a unit has no input or no output.
    """
    dtype = torch.float64
    names = {place.tensor for gauge in gauges for place in gauge.placements}
    working = {name: state[name].detach().to(dtype, copy=True) for name in names}
    factors = [torch.ones(g.dimension, dtype=dtype) for g in gauges]
    for _ in range(max_sweeps):
        change = 0.0
        for number, gauge in enumerate(gauges):
            ins = torch.zeros(gauge.dimension, dtype=dtype)
            outs = torch.zeros_like(ins)
            for place in gauge.placements:
                squares = _squares(working[place.tensor], place, gauge.dimension)
                (outs if place.inverse else ins).add_(squares.cpu())
            alive = (ins > 0) & (outs > 0)
            step = torch.where(alive, (outs / ins.clamp(min=1e-300)) ** 0.25, 1.0)
            for place in gauge.placements:
                _multiply(working[place.tensor], place, 1 / step if place.inverse else step)
            factors[number] = factors[number] * step
            change = max(change, float((step - 1).abs().max()))
        if change <= tolerance:
            break
    return factors


def balanced(state: Mapping[str, Tensor], symmetry: NetworkSymmetry) -> dict[str, Tensor]:
    """The representative of least norm under positive rescaling of units.

    Balancing commutes with permutations, so that distances of balanced networks are distances of
    classes under both.

    Args:
        state: A state dict.
        symmetry: The symmetry of the network, with its positive gauges.

    Returns:
        A new state dict of the same function.

    Source: Neyshabur, Salakhutdinov and Srebro, arXiv:1506.02617 (rescaling); Du, Hu and Lee,
    arXiv:1806.00900 (balancedness).

    Example:
        >>> import torch
        >>> from manifold_merge.symmetry import GaugeGroup, NetworkSymmetry, Placement
        >>> places = (Placement("0.weight", 0), Placement("2.weight", 1, inverse=True))
        >>> symmetry = NetworkSymmetry((), (GaugeGroup("0", "positive", 1, places),))
        >>> state = {"0.weight": torch.tensor([[8.0]]), "2.weight": torch.tensor([[2.0]])}
        >>> {name: round(float(t), 4) for name, t in balanced(state, symmetry).items()}
        {'0.weight': 4.0, '2.weight': 4.0}
    """
    gauges = positive_gauges(symmetry)
    return rescaled(state, gauges, balance_factors(state, gauges))
