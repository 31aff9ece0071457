"""What averaging does to activations, and how data repairs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_merge.frechet import normalized_weights
from manifold_merge.statistics import _call, _quiet

__all__ = ["reestimate_batch_norm", "repair"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set the running statistics of all batch normalisations to those of the data.

    Merged weights produce activations of other means and variances than any of the networks they
    came from; statistics that were averaged along with the weights are wrong.

    Args:
        model: The merged network; its running statistics are changed, nothing else.
        batches: Inputs, as at training time, some hundred to a thousand in all. A mapping is passed
            as keyword arguments without ``"labels"``, of a list or tuple the first item is input.

    Returns:
        The number of normalisations whose statistics were set.

    Raises:
        ValueError: If the model has no batch normalisation with running statistics, or there are
            no batches.

    Source: Izmailov et al., *SWA*, arXiv:1803.05407, section 3.2; Jordan et al., arXiv:2211.08403.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> reestimate_batch_norm(model, [torch.tensor([[1.0], [3.0]])])
        1
        >>> model[0].running_mean.tolist()
        [2.0]
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError("the model has no batch normalisation with running statistics to set")
    before = [(m.momentum, m.training) for m in norms]
    kept = [{name: t.clone() for name, t in m.named_buffers()} for m in norms]
    number = 0
    try:
        with _quiet(model):  # dropout stays off
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average over batches
                norm.train()
            for batch in batches:
                _call(model, batch)
                number += 1
    finally:
        for norm, buffers, (momentum, training) in zip(norms, kept, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
            if not number:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
    if not number:
        raise ValueError("batches is empty; give at least one batch")
    return len(norms)


@torch.no_grad()
def repair(
    model: nn.Module,
    references: Sequence[nn.Module],
    batches: Iterable[Any],
    weights: Sequence[float] | Tensor | None = None,
    *,
    modules: Sequence[str] | None = None,
) -> int:
    """Give each unit of a merged network the mean and spread that it has in its references.

    Averages of units that agree in part vary less than the units themselves, layer after layer.
    The outputs of each linear and convolutional layer are rescaled and shifted, channel by channel,
    to the weighted mean of the references' means and standard deviations; layers before it are
    already repaired when it is measured. The change is written into weights and biases. Batch
    normalisations are re-estimated on the way.

    Args:
        model: The merged network; its weights are changed.
        references: The networks it was merged from, **aligned** to it.
        batches: Inputs, as for :func:`reestimate_batch_norm`; iterated over twice.
        weights: ``(k,)``, those of the merge; equal if ``None``.
        modules: Names of the layers to repair; all linear and convolutional layers with a bias
            and more than one output, but the last one, if ``None``.

    Returns:
        The number of layers repaired.

    Raises:
        ValueError: If a module is unknown or has no bias, or there are no batches.

    Source: Jordan et al., *REPAIR*, arXiv:2211.08403.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        >>> shrunk = copy.deepcopy(model)
        >>> _ = shrunk[0].weight.data.mul_(0.5)
        >>> repair(shrunk, [model], [torch.randn(100, 2)])
        1
        >>> torch.allclose(shrunk[0].weight, model[0].weight, atol=1e-4)
        True
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give at least one batch")
    if not references:
        raise ValueError("references is empty; give the networks that were merged, aligned")
    chosen = _chosen(model, modules)
    shares = normalized_weights(weights, len(references), like=torch.zeros(1))
    means: dict[str, Tensor] = {}
    spreads: dict[str, Tensor] = {}
    for reference, share in zip(references, shares.tolist(), strict=True):
        for name, (mean, spread) in _moments(reference, chosen, batches).items():
            means[name] = means.get(name, 0.0) + share * mean
            spreads[name] = spreads.get(name, 0.0) + share * spread
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    measured: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in chosen}
    layers = dict(model.named_modules())
    handles = []
    momenta = [norm.momentum for norm in norms]
    states = [norm.training for norm in norms]
    try:
        with _quiet(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for name in chosen:

                def hook(module: nn.Module, _: Any, result: Tensor, name: str = name) -> Tensor:
                    """Normalise by this batch, so that later layers see repaired inputs."""
                    mean, variance = _batch_moments(module, result)
                    measured[name].append((mean, variance))
                    factor, shift = _correction(mean, variance, means[name], spreads[name])
                    return result * _channels(factor, module, result) + _channels(
                        shift, module, result
                    )

                handles.append(layers[name].register_forward_hook(hook))
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum, training in zip(norms, momenta, states, strict=True):
            norm.momentum = momentum
            norm.train(training)
    for name in chosen:
        layer: Any = layers[name]
        mean = torch.stack([m for m, _ in measured[name]]).mean(0)
        variance = torch.stack([v for _, v in measured[name]]).mean(0)
        factor, shift = _correction(mean, variance, means[name], spreads[name])
        layer.weight.mul_(factor.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
        layer.bias.mul_(factor).add_(shift)
    return len(chosen)


def _chosen(model: nn.Module, modules: Sequence[str] | None) -> list[str]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _Layer)}
    if modules is None:
        return [n for n in list(layers)[:-1] if layers[n].bias is not None]
    for name in modules:
        if name not in layers:
            raise ValueError(f"modules: {name!r} is no linear or convolutional layer of the model")
        if layers[name].bias is None:
            raise ValueError(f"modules: {name!r} has no bias to take the shift; leave it out")
    return list(modules)


def _channels(values: Tensor, module: Any, result: Tensor) -> Tensor:
    """A vector over channels, shaped to broadcast against the output of a layer."""
    if isinstance(module, nn.Linear):
        return values
    spatial = module.weight.ndim - 2
    return values.reshape(-1, *(1,) * spatial)


def _batch_moments(module: Any, result: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Linear):
        rows = result.reshape(-1, result.shape[-1])
    else:
        spatial = module.weight.ndim - 2
        rows = result.movedim(result.ndim - spatial - 1, -1).reshape(-1, module.weight.shape[0])
    return rows.mean(0), rows.var(0, unbiased=False)


def _correction(
    mean: Tensor, variance: Tensor, goal_mean: Tensor, goal_spread: Tensor
) -> tuple[Tensor, Tensor]:
    # A unit that is constant stays so: there is nothing to stretch.
    spread = variance.sqrt()
    factor = torch.where(spread > 1e-8, goal_spread / spread.clamp(min=1e-8), 1.0)
    return factor, goal_mean - factor * mean


def _moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel of some layers' outputs, over all batches."""
    sums: dict[str, list[Tensor]] = {}
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    with _quiet(model), _measuring(layers, names, sums):
        for batch in batches:
            _call(model, batch)
    result = {}
    for name, (number, first, second) in sums.items():
        mean = first / number
        spread = (second / number - mean.square()).clamp(min=0).sqrt()
        dtype = next(layers[name].parameters()).dtype
        result[name] = (mean.to(dtype), spread.to(dtype))
    return result


@contextlib.contextmanager
def _measuring(
    layers: Mapping[str, nn.Module], names: Sequence[str], sums: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []
    try:
        for name in names:
            if name not in layers:
                raise ValueError(f"references: a network has no layer {name!r}")

            def hook(module: nn.Module, _: Any, result: Tensor, name: str = name) -> None:
                mean, variance = _batch_moments(module, result)
                number = result.numel() // len(mean)
                new = [
                    torch.tensor(float(number)),
                    number * mean.double(),
                    number * (variance.double() + mean.double().square()),
                ]
                old = sums.get(name)
                sums[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

            handles.append(layers[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
