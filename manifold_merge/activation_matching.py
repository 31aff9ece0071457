"""Which units of two networks respond alike: scores for matching from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_merge.network_layout import is_running_statistic
from manifold_merge.statistics import _call, _quiet
from manifold_merge.symmetry import NetworkSymmetry, Placement

__all__ = ["activation_scores", "unit_responses"]

KINDS = ("correlation", "inner")
_NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass
class _Moments:
    """Sums over all examples and positions, of the units of two networks."""

    first: Tensor  # (2, units)
    second: Tensor  # (2, units)
    cross: Tensor  # (units, units)
    number: int = 0


def activation_scores(
    state_model: nn.Module,
    to_model: nn.Module,
    symmetry: NetworkSymmetry,
    batches: Iterable[Any],
    *,
    kind: str = "correlation",
) -> dict[str, Tensor]:
    """How alike units of two networks respond to the same inputs, for ``align(..., scores=)``.

    Both models run on each batch once. The response of an element of a set is the output of the
    layers whose rows it owns: those of a normalisation with running statistics if there is one,
    otherwise of linear and convolutional layers, over all positions.

    Args:
        state_model: The network to be rebased.
        to_model: The network that stays.
        symmetry: The symmetry of both.
        batches: Inputs; a mapping is passed as keyword arguments without ``"labels"``, of a list
            or tuple the first item is the input.
        kind: ``"correlation"`` (Pearson's) or ``"inner"`` (uncentred products).

    Returns:
        For each set a matrix ``(count, count)``: element i of ``to_model`` against element j of
        ``state_model``, summed over the positions and layers of an element.

    Raises:
        ValueError: If there are no batches, or no layer shows the responses of a set.

    Source: Li et al., *Convergent learning*, arXiv:1511.07543; Ainsworth et al., arXiv:2209.04836,
    section 3.1.

    Example:
        >>> import torch
        >>> from manifold_merge import activation_scores, symmetry_of
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> symmetry = symmetry_of(model, torch.randn(5, 3))
        >>> scores = activation_scores(model, model, symmetry, [torch.randn(50, 3)])
        >>> scores["0"].diagonal().round(decimals=3).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    watched = _watched(to_model, symmetry)
    moments: dict[tuple[str, Placement], _Moments] = {}
    with _quiet(state_model), _quiet(to_model), torch.no_grad():
        empty = True
        for batch in batches:
            empty = False
            outputs = [_outputs(model, batch, watched) for model in (to_model, state_model)]
            for each in symmetry.sets:
                for name, place in watched[each.name]:
                    units = [_units(o[name], place, each.count) for o in outputs]
                    _add(moments, (name, place), units)
    if empty:
        raise ValueError("batches is empty; give at least one batch")
    scores = {}
    for each in symmetry.sets:
        total: Any = 0.0
        for key in watched[each.name]:
            matrix = _matrix(moments[key], kind)
            width = len(matrix) // each.count
            # Position b of one element is compared with position b of another.
            total = total + torch.einsum("ibjb->ij", matrix.reshape(each.count, width, -1, width))
        scores[each.name] = torch.as_tensor(total).float()
    return scores


def unit_responses(
    model: nn.Module,
    symmetry: NetworkSymmetry,
    batches: Iterable[Any],
    *,
    samples: int = 4096,
) -> dict[str, Tensor]:
    """Standardised responses of the elements of each set, for ``merge_networks(responses=)``.

    The inner product of the responses of two elements, of one or of two networks, is the
    correlation of their outputs, so responses join the parameters of a unit as further coordinates.

    Args:
        model: A network.
        symmetry: Its symmetry.
        batches: Inputs, the same for each network; as for :func:`activation_scores`.
        samples: Greatest number of examples and positions kept of each layer, evenly spread.

    Returns:
        For each set ``(count, width * samples)``.

    Raises:
        ValueError: If there are no batches, or no layer shows the responses of a set.

    Example:
        >>> import torch
        >>> from manifold_merge import symmetry_of, unit_responses
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> symmetry = symmetry_of(model, torch.randn(5, 3))
        >>> responses = unit_responses(model, symmetry, [torch.randn(50, 3)])
        >>> responses["0"].shape, responses["0"].square().sum(1).round(decimals=3).tolist()
        (torch.Size([4, 50]), [1.0, 1.0, 1.0, 1.0])
    """
    watched = _watched(model, symmetry)
    kept: dict[tuple[str, Placement], list[Tensor]] = {}
    with _quiet(model), torch.no_grad():
        for batch in batches:
            outputs = _outputs(model, batch, watched)
            for each in symmetry.sets:
                for name, place in watched[each.name]:
                    units = _units(outputs[name], place, each.count)
                    kept.setdefault((name, place), []).append(_thinned(units, samples))
    if symmetry.sets and not kept:
        raise ValueError("batches is empty; give at least one batch")
    responses = {}
    for each in symmetry.sets:
        parts = []
        for key in watched[each.name]:
            rows = _thinned(torch.cat(kept[key]), samples)
            rows = rows - rows.mean(0)
            size = rows.norm(dim=0)
            # A unit that never changes correlates with none.
            rows = torch.where(size > 1e-6, rows / size.clamp(min=1e-6), 0.0)
            parts.append(rows.mT.reshape(each.count, -1))
        responses[each.name] = torch.cat(parts, 1)
    return responses


def _thinned(rows: Tensor, samples: int) -> Tensor:
    """At most ``samples`` rows, evenly spread."""
    if len(rows) <= samples:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, samples, device=rows.device).long()]


def _watched(model: nn.Module, symmetry: NetworkSymmetry) -> dict[str, list[tuple[str, Placement]]]:
    """For each set the modules whose output channels are its elements, with their places."""
    modules = dict(model.named_modules())
    found: dict[str, list[tuple[str, Placement]]] = {}
    for each in symmetry.sets:
        linear, normalised = [], []
        for place in each.placements:
            module = modules.get(place.tensor.rpartition(".")[0])
            if place.axis != 0 or place.within or not place.tensor.endswith(".weight"):
                continue
            if isinstance(module, _NORMALISATIONS):
                normalised.append((place.tensor.rpartition(".")[0], place))
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                linear.append((place.tensor.rpartition(".")[0], place))
        batch_norm = any(is_running_statistic(place.tensor) for place in each.placements)
        found[each.name] = normalised if batch_norm and normalised else linear or normalised
        if not found[each.name]:
            raise ValueError(
                f"set {each.name!r}: none of its tensors is the weight of a linear, convolutional "
                "or normalisation layer that shows its responses; match it by weights"
            )
    return found


def _outputs(
    model: nn.Module, batch: Any, watched: dict[str, list[tuple[str, Placement]]]
) -> dict[str, Tensor]:
    """Outputs of the watched modules, ``(rows, channels)``, in one pass."""
    outputs: dict[str, list[Tensor]] = {name: [] for v in watched.values() for name, _ in v}
    with _hooks(model, outputs):
        _call(model, batch)
    missing = [name for name, values in outputs.items() if not values]
    if missing:
        raise ValueError(f"module {missing[0]!r} was not called; is it used by this network?")
    return {name: torch.cat(values) for name, values in outputs.items()}


@contextlib.contextmanager
def _hooks(model: nn.Module, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    handles = []
    modules = dict(model.named_modules())
    try:
        for name, values in outputs.items():

            def hook(
                module: nn.Module, _: Any, result: Tensor, kept: list[Tensor] = values
            ) -> None:
                channels = -1 if isinstance(module, nn.Linear) or result.ndim < 3 else 1
                moved = result.detach().movedim(channels, -1)
                kept.append(moved.reshape(-1, moved.shape[-1]))

            handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _units(rows: Tensor, place: Placement, count: int) -> Tensor:
    """The channels of a set in the order of its elements, ``(rows, count * width)``."""
    return rows.index_select(1, place.index(count).reshape(-1).to(rows.device))


def _add(
    moments: dict[tuple[str, Placement], _Moments],
    key: tuple[str, Placement],
    units: list[Tensor],
) -> None:
    a, b = units
    if len(a) != len(b):
        raise ValueError(f"module {key[0]!r}: {len(a)} and {len(b)} positions; inputs differ")
    double = torch.float64
    first = torch.stack([a.sum(0, dtype=double), b.sum(0, dtype=double)])
    second = torch.stack([a.double().square().sum(0), b.double().square().sum(0)])
    cross = (a.mT @ b).double()
    if key in moments:
        old = moments[key]
        first, second, cross = first + old.first, second + old.second, cross + old.cross
        moments[key] = _Moments(first, second, cross, len(a) + old.number)
    else:
        moments[key] = _Moments(first, second, cross, len(a))


def _matrix(m: _Moments, kind: str) -> Tensor:
    """Correlations or mean products of units of the first and the second network."""
    if kind == "inner":
        return m.cross / m.number
    mean = m.first / m.number
    deviation = (m.second / m.number - mean.square()).clamp(min=0).sqrt()
    covariance = m.cross / m.number - mean[0][:, None] * mean[1]
    product = deviation[0][:, None] * deviation[1]
    # A unit that never changes correlates with none.
    return torch.where(product > 1e-12, covariance / product.clamp(min=1e-12), 0.0)
