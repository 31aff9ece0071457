"""Squared gradients of each example: the diagonal of the Fisher information, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manifold_merge.statistics_modules import base_name, core_module, is_conv1d, unfold

__all__ = ["LIKELIHOODS", "default_output", "example_loss", "fisher_modules", "squared_gradients"]

LIKELIHOODS = ("categorical", "gaussian")
_CHUNK = 2**24  # numbers of per-example gradients held at once


def default_output(result: Any, mask: Tensor | None) -> Tensor:
    """The tensor a model's result is about: logits, or the mean over tokens of the last layer.

    Raises:
        TypeError: The result holds neither; pass ``output=``.
    """
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            if name == "last_hidden_state" and value.ndim == 3:
                kept = (
                    value.new_ones(value.shape[:2])
                    if mask is None
                    else mask.to(value.device, value.dtype)
                )[..., None]
                return (value * kept).sum(1) / kept.sum(1).clamp(min=1)
            return value
    raise TypeError(
        f"the model returns {type(result).__name__}, which is no tensor and has no logits or "
        "last_hidden_state; pass output=, a function from (result, batch) to a tensor"
    )


def example_loss(
    output: Tensor,
    mask: Tensor | None,
    likelihood: str,
    labels: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Sum over examples of the negative log-likelihood of one label each.

    Args:
        output: Logits ``(batch, ..., classes)``, or features ``(batch, ...)`` for ``"gaussian"``.
        mask: ``(batch, seq)``; positions of a (batch, seq, classes) output that count.
        likelihood: ``"categorical"`` or ``"gaussian"`` (unit variance; its Fisher is that of the
            squared distance between outputs).
        labels: The labels, or ``None`` to draw them from the model's own distribution, which gives
            the true Fisher and needs no labels.
        generator: Draws the labels.
    """
    if likelihood == "gaussian":
        if labels is None:
            noise = torch.randn(
                output.shape, generator=generator, dtype=output.dtype, device="cpu"
            ).to(output.device)
            loss = output * noise
        else:
            loss = (output - labels.to(output)).square() / 2
        if mask is not None and loss.ndim == 3 and loss.shape[:2] == mask.shape:
            loss = loss * mask.to(loss)[..., None]
        return loss.sum()
    flat = output.reshape(-1, output.shape[-1]).float()
    if labels is None:
        probabilities = flat.detach().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(flat.device)
    else:
        drawn = labels.reshape(-1).to(flat.device)
    loss = functional.cross_entropy(flat, drawn, reduction="none")
    if mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape:
        loss = loss * mask.to(loss).flatten()
    return loss.sum()


def fisher_modules(
    model: nn.Module, chosen: Mapping[str, nn.Module], *, everything: bool
) -> dict[str, nn.Module]:
    """The modules whose parameters get a diagonal Fisher; layer norms too if ``everything``."""
    found = dict(chosen)
    if everything:
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                found[base_name(model, name)] = module
    return dict(sorted(found.items()))


def squared_gradients(
    module: nn.Module, calls: Iterable[tuple[Tensor, Tensor]], mask: Tensor | None
) -> dict[str, Tensor]:
    """Sum over the examples of a batch of the squared gradient of each parameter.

    Args:
        module: Linear, convolution, embedding, layer norm or transformers' Conv1D.
        calls: For each call in the forward pass the input ``(batch, ..., d)`` (indices for an
            embedding) and the gradient of the output ``(batch, ..., m)``.
        mask: ``(batch, seq)``; positions that count.

    Returns:
        ``"weight"`` and, where there is one, ``"bias"``, each of the parameter's shape.
    """
    core = core_module(module)
    pairs = [_flatten(core, x, g, mask) for x, g in calls]
    x = torch.cat([x for x, _ in pairs], 1)
    g = torch.cat([g for _, g in pairs], 1)
    result: dict[str, Tensor] = {}
    if isinstance(core, nn.Embedding):
        result["weight"] = _embedding(core, x, g)
    elif isinstance(core, nn.LayerNorm):
        shape = tuple(core.weight.shape)
        result["weight"] = (x * g).sum(1).square().sum(0).reshape(shape)
    else:
        weight = core.weight
        assert isinstance(weight, Tensor)
        product = _batched(x, g) if is_conv1d(core) else _batched(g, x)
        result["weight"] = product.reshape(weight.shape)
    bias = getattr(core, "bias", None)
    if isinstance(bias, Tensor):
        result["bias"] = g.sum(1).square().sum(0).reshape(bias.shape)
    return result


def _flatten(core: nn.Module, x: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring one call to (batch, positions, d) and (batch, positions, m)."""
    if isinstance(core, (nn.Conv1d, nn.Conv2d)):
        return unfold(core, x).transpose(1, 2), g.flatten(2).transpose(1, 2)
    if mask is not None and g.ndim == 3 and g.shape[:2] == mask.shape:
        g = g * mask.to(g)[..., None]
    batch = g.shape[0]
    if isinstance(core, nn.Embedding):
        return x.reshape(batch, -1), g.reshape(batch, -1, g.shape[-1])
    if isinstance(core, nn.LayerNorm):
        shape = core.normalized_shape
        normal = functional.layer_norm(x, shape, eps=core.eps)
        size = core.weight.numel()
        return normal.reshape(batch, -1, size), g.reshape(batch, -1, size)
    return x.reshape(batch, -1, x.shape[-1]), g.reshape(batch, -1, g.shape[-1])


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """Σ over examples of (leftᵀ right)², a few examples at a time."""
    step = max(1, _CHUNK // (left.shape[-1] * right.shape[-1]))
    total = left.new_zeros(left.shape[-1], right.shape[-1])
    for start in range(0, left.shape[0], step):
        chunk = slice(start, start + step)
        total += (left[chunk].transpose(1, 2) @ right[chunk]).square().sum(0)
    return total


def _embedding(core: nn.Embedding, indices: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros_like(core.weight)
    for row, gradient in zip(indices, gradients, strict=True):
        used, position = row.unique(return_inverse=True)
        summed = gradient.new_zeros(len(used), gradient.shape[-1])
        summed.index_add_(0, position, gradient)
        total[used] += summed.square()
    return total
