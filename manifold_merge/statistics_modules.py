"""How each kind of layer sees its input as rows: which modules have a Gram, and of what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "attention_mask",
    "base_name",
    "core_module",
    "gradient_rows",
    "gram_features",
    "input_rows",
    "is_conv1d",
    "is_embedding",
    "select_modules",
    "unfold",
]

_PEFT_PREFIX = "base_model.model."
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def base_name(model: nn.Module, name: str) -> str:
    """A module's name in the base model, without what PEFT puts before it."""
    return name.removeprefix(_PEFT_PREFIX) if hasattr(model, "get_base_model") else name


def core_module(module: nn.Module) -> nn.Module:
    """The layer itself, without the wrapper of PEFT."""
    base = getattr(module, "base_layer", None)
    return core_module(base) if isinstance(base, nn.Module) else module


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with a transposed weight."""
    # Known by name, so that transformers need not be installed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_supported(module: nn.Module) -> bool:
    core = core_module(module)
    return isinstance(core, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) or is_conv1d(core)


def select_modules(model: nn.Module, modules: Iterable[str] | None) -> dict[str, nn.Module]:
    """Find the modules to watch by their names in the base model.

    Args:
        model: A model, or a model wrapped by PEFT, whose names are then those of the base model.
        modules: Names; each may also be the end of names (``"query"``), as in PEFT's
            ``target_modules``. ``None`` takes the adapted modules of a PEFT model, and every
            linear, convolutional and embedding layer of any other.

    Raises:
        ValueError: A name fits nothing, or a module of a kind that has no Gram; says which.
    """
    found: dict[str, nn.Module] = {}
    adapted: set[str] = set()
    inner: tuple[str, ...] = ()
    for full_name, module in model.named_modules():
        if inner and full_name.startswith(inner):
            continue  # inside PEFT's wrapper of a layer: factors, dropout, the layer itself
        name = base_name(model, full_name)
        if core_module(module) is not module:
            inner = (*inner, f"{full_name}.")
            adapted.add(name)
        found[name] = module
    if modules is None:
        chosen = {name: found[name] for name in found if name in adapted} or {
            name: module for name, module in found.items() if _is_supported(module)
        }
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no linear, convolutional or embedding layer; name "
                "the modules to watch"
            )
    else:
        chosen = {}
        for wanted in modules:
            matches = [n for n in found if n == wanted or n.endswith(f".{wanted}")]
            if wanted in found:
                matches = [wanted]
            if not matches:
                raise ValueError(
                    f"module {wanted!r} is not in {type(model).__name__}; its modules are named "
                    f"like {next((n for n in found if _is_supported(found[n])), '(none)')!r}"
                )
            chosen.update({name: found[name] for name in matches})
    for name, module in chosen.items():
        core = core_module(module)
        if not _is_supported(module):
            raise ValueError(
                f"module {name!r} is a {type(core).__name__}, which has no input Gram; name "
                "linear, convolutional (1d, 2d) or embedding layers"
            )
        if isinstance(core, _CONVOLUTIONS) and core.groups != 1:
            raise ValueError(
                f"module {name!r} is a convolution with {core.groups} groups, whose weight is not "
                "one matrix; leave it out of `modules`"
            )
    return dict(sorted(chosen.items()))


def gram_features(module: nn.Module) -> int:
    """Number of columns of the module's weight as a matrix."""
    core = core_module(module)
    if isinstance(core, nn.Linear):
        return core.in_features
    if isinstance(core, nn.Embedding):
        return core.num_embeddings
    if isinstance(core, _CONVOLUTIONS):
        return core.in_channels * math.prod(core.kernel_size)
    assert isinstance(core.weight, Tensor)
    return int(core.weight.shape[0])


def is_embedding(module: nn.Module) -> bool:
    """Whether the module looks rows up, so that its Gram is diagonal."""
    return isinstance(core_module(module), nn.Embedding)


def attention_mask(batch: Any, mask: Callable[[Any], Tensor | None] | None) -> Tensor | None:
    """The (batch, seq) mask of one batch as booleans; True for what counts.

    Raises:
        ValueError: The mask is not a matrix.
    """
    if mask is not None:
        value = mask(batch)
    elif isinstance(batch, Mapping):
        value = batch.get("attention_mask")
    else:
        value = None
    if value is None:
        return None
    if value.ndim != 2:
        raise ValueError(
            f"the mask has shape {tuple(value.shape)}, expected (batch, seq) with 1 for tokens "
            "that count; pass mask=, a function from the batch to such a tensor or to None"
        )
    value = value.bool()
    return None if bool(value.all()) else value  # selecting everything would only copy


def _select(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, d) of a tensor (..., d) at positions that count."""
    if mask is not None and rows.shape[:2] == mask.shape and rows.ndim == 3:
        kept = mask.to(rows.device).flatten().nonzero()[:, 0]  # faster than a mask as an index
        return rows.flatten(0, 1).index_select(0, kept)
    flat = rows.reshape(-1, rows.shape[-1])
    if mask is not None and rows.ndim == 2 and flat.shape[0] == mask.numel():
        return flat[mask.to(rows.device).flatten()]  # a model that flattens (batch, seq) itself
    return flat


def input_rows(module: nn.Module, value: Tensor, mask: Tensor | None) -> Tensor:
    """What multiplies the weight matrix: rows (N, d), or indices (N,) of an embedding."""
    core = core_module(module)
    if isinstance(core, nn.Embedding):
        return _select(value[..., None], mask)[:, 0]
    if isinstance(core, _CONVOLUTIONS):
        return unfold(core, value).transpose(1, 2).flatten(0, 1)
    return _select(value, mask)


def gradient_rows(module: nn.Module, value: Tensor, mask: Tensor | None) -> Tensor:
    """Gradients of the module's output as rows (N, out_features)."""
    if isinstance(core_module(module), _CONVOLUTIONS):
        return value.flatten(2).transpose(1, 2).flatten(0, 1)
    return _select(value, mask)


def unfold(core: nn.Module, value: Tensor) -> Tensor:
    """Patches (batch, channels * kernel, positions) in the order of the weight's columns."""
    assert isinstance(core, _CONVOLUTIONS)
    if isinstance(core.padding, str) or core.padding_mode != "zeros":
        mode = "constant" if core.padding_mode == "zeros" else core.padding_mode
        value = functional.pad(value, core._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(core.kernel_size)
    else:
        padding = core.padding
    if isinstance(core, nn.Conv1d):
        return functional.unfold(
            value.unsqueeze(-2),
            (1, *core.kernel_size),
            (1, *core.dilation),
            (0, *padding),
            (1, *core.stride),
        )
    return functional.unfold(value, core.kernel_size, core.dilation, padding, core.stride)
