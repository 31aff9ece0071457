"""The LoRA pairs of a model as parameter groups, each with the manifold that it lives on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manifold_merge.lora import LoRAQuotient

__all__ = ["as_matrices", "clean_name", "lora_pairs", "param_groups"]

logger = logging.getLogger(__name__)

# PEFT: layer.lora_A.default.weight, layer.lora_embedding_A.default; other libraries drop parts.
_FACTOR = re.compile(
    r"^(?P<stem>.*\.|)lora_(?P<kind>embedding_|)(?P<side>[AB])(?P<tail>(?:\..*)?)$"
)


def param_groups(
    model: nn.Module,
    *,
    metric: str = "mixed",
    distance: str = "chordal",
    trainable: bool = True,
) -> list[dict[str, Any]]:
    """Find the LoRA pairs of a model, one group each; all other parameters make a Euclidean group.

    The groups fit any torch optimiser; ``FrechetMean`` and ``FrechetAveragedModel`` read their key
    ``"manifold"``.

    Args:
        model: For example a PEFT model; also wrapped by ``torch.compile`` or data parallelism.
        metric: Metric of the :class:`~manifold_merge.lora.LoRAQuotient` of each pair.
        distance: Its distance. ``"chordal"`` costs a few small products at each step and is defined
            for fresh adapters (B = 0); ``"exact"`` follows geodesics, by a search at each step.
        trainable: Leave out parameters that take no gradient.

    Returns:
        Groups ``{"params": [(name, B), (name, A)], "manifold": LoRAQuotient(m, n)}``, and last
        ``{"params": [(name, parameter), ...]}`` if any are left.

    Raises:
        ValueError: If the metric or distance is unknown, or all parameters are frozen.

    Example:
        >>> import torch
        >>> layer = torch.nn.ParameterDict(
        ...     {"lora_A": torch.randn(2, 5), "lora_B": torch.randn(6, 2), "bias": torch.randn(6)}
        ... )
        >>> for group in param_groups(layer):
        ...     print([name for name, _ in group["params"]], group.get("manifold"))
        ['lora_B', 'lora_A'] LoRAQuotient(mixed)(6, 5, distance='chordal') manifold
        ['bias'] None
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad or not trainable}
    if not named and any(True for _ in model.parameters()):
        raise ValueError(
            "param_groups: no parameter requires grad; unfreeze some, or pass trainable=False"
        )
    groups: list[dict[str, Any]] = []
    for name_b, name_a in lora_pairs(named):
        b, a = as_matrices(named[name_b], named[name_a])
        group = {
            "params": [(name_b, named.pop(name_b)), (name_a, named.pop(name_a))],
            "manifold": LoRAQuotient(b.shape[0], a.shape[1], metric, distance),
        }
        groups.append(group)
    if named:
        groups.append({"params": list(named.items())})
    return groups


def lora_pairs(named: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names (B, A) of the factors that belong together.

    A pair whose rank exceeds min(m, n) spans all matrices and is left out, with a warning.
    """
    pairs = []
    for name_b in named:
        match = _FACTOR.match(name_b)
        if match is None or match["side"] != "B":
            continue
        name_a = f"{match['stem']}lora_{match['kind']}A{match['tail']}"
        if name_a not in named:
            continue
        matrices = as_matrices(named[name_b], named[name_a], strict=False)
        if matrices is None or matrices[0].shape[1] > min(
            matrices[0].shape[0], matrices[1].shape[1]
        ):
            shapes = tuple(named[name_b].shape), tuple(named[name_a].shape)
            logger.warning(
                "%s and its A have shapes %s, which are no low-rank pair: they are treated as "
                "Euclidean parameters",
                name_b,
                shapes,
            )
            continue
        pairs.append((name_b, name_a))
    return pairs


def as_matrices(b: Tensor, a: Tensor, *, strict: bool = True) -> Any:
    """Factors as matrices (m, r) and (r, n); convolutions have their kernels flattened into A.

    Args:
        b: ``(m, r)`` or ``(m, r, 1, ...)``.
        a: ``(r, n)`` or ``(r, channels, *kernel)``.
        strict: Raise where the shapes do not fit; else return ``None``.

    Raises:
        ValueError: If the shapes are not those of factors.
    """
    fits = b.ndim >= 2 and a.ndim >= 2 and b.shape[1] == a.shape[0] and b[0, 0].numel() == 1
    if fits:
        return b.flatten(1), a.flatten(1)
    if strict:
        raise ValueError(
            f"factors B (m, r) and A (r, n) of one rank are expected, in this order; got "
            f"{tuple(b.shape)} and {tuple(a.shape)}"
        )
    return None


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile, data parallelism and PEFT's adapters add."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "default")]
    while parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)
