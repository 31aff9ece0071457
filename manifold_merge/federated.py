"""Federated rounds: the LoRA updates of clients, tensors in and tensors out, as a Fréchet mean.

A client trains its own factors B and A; what it sends is one point for each pair, the product
W = B A, in a gauge of its own. The mean of the factors is not the factors of a mean,
Σ wᵢBᵢ Σ wⱼAⱼ ≠ Σ wᵢBᵢAᵢ, and changes when a client re-bases its factors; the Fréchet mean of the
products does not. :mod:`manifold_merge.flower` runs this in Flower. Derivations: docs/federated.md.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from manifold_merge.client_update import ClientUpdate, UpdateError
from manifold_merge.lora_log import chordal_distance
from manifold_merge.merge import merge_adapters
from manifold_merge.merge_plan import GEOMETRIES

__all__ = ["UpdateMerge", "merge_updates"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class UpdateMerge:
    """The mean of a round, with its certificate.

    Attributes:
        tensors: The mean under the keys of the updates, on the CPU: B ``(m, R)`` and A ``(R, n)``
            of each pair balanced (BᵀB = A Aᵀ), all other tensors in their own shapes.
        recipe: Options, and the normalised weights under the names of the clients.
        distances: Chordal distance √Σ |Wᵢ - W|² over all pairs between each client's update and the
            mean. A client far beyond the others is worth a look.
        status: How many pairs ended in which :class:`~manifold_merge.solution.Status`.
        rejected: What was wrong with the updates that were left out.
    """

    tensors: dict[str, Tensor]
    recipe: dict[str, Any]
    distances: dict[str, float]
    status: dict[str, int]
    rejected: dict[str, str]


def merge_updates(
    updates: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    like: Mapping[str, Any] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    geometry: str = "embedded",
    distance: str | None = None,
    p: int = 2,
    rank: int | str | None = None,
    scaling: Callable[[int], float] | None = None,
    invalid: str = "raise",
    **options: Any,
) -> UpdateMerge:
    """Average the tensors that clients trained: each LoRA pair on its quotient, the rest as arrays.

    Args:
        updates: For each client its tensors (or NumPy arrays) by name, all of the same names:
            factors ``...lora_B...`` ``(m, r)`` and ``...lora_A...`` ``(r, n)`` as in PEFT (or with
            the kernel dimensions of a convolution), ranks r of each client's own, and any other
            trained tensors, such as a head.
        weights: One for each client, such as its number of examples. Equal if ``None``.
        names: What to call the clients in messages; ``client 0``, ... if ``None``.
        like: Tensors that say which names and shapes are expected, such as those of the global
            model; those of the first client if ``None``. Ranks may differ.
        pairs: Names of (B, A) of each pair, where they do not contain ``lora_B`` and ``lora_A``.
        geometry: ``"embedded"``, ``"mixed"``, ``"invariant"``, ``"polar"``, ``"lifted"`` or
            ``"auto"``, as in :func:`~manifold_merge.merge.merge_adapters`.
        distance: As there. Default: ``"chordal"``, which is defined everywhere, for factors that
            are zero before training too: the mean is the truncated sum of the products.
        p: 2 for the mean; 1 for the geometric median of each tensor, which clients of less than
            half the weight cannot carry off, whatever they send.
        rank: Rank of the mean, an integer or ``"full"`` (the sum of the ranks, without truncation).
            Default: the greatest rank of the updates.
        scaling: Function from a rank to the factor s of the model's s B A, where it differs between
            clients, such as ``lambda r: 16 / r`` for PEFT's ``lora_alpha=16``. The mean is then
            that of s B A, and the returned factors belong to s of their own rank.
        invalid: ``"raise"`` an error for an update that cannot be averaged, or ``"drop"`` it with a
            warning in the log.
        options: Further options of :func:`~manifold_merge.merge.merge_adapters`: ``scale``,
            ``transform``, ``device``, ``max_bytes``.

    Returns:
        The mean, with what it was made of.

    Raises:
        UpdateError: A client lacks a tensor, has an unknown one, one of another shape, NaN or
            infinite values, or a weight that is not a positive number; or no update is left.
        ValueError: An option is unknown or contradicts another.

    Source: Robust aggregation by a geometric median, Pillutla, Kakade and Harchaoui (2022,
    arXiv:1912.13445); averages of products in place of factors, Bai et al. (2024,
    arXiv:2402.11505).

    Example:
        Two clients hold one model in different gauges. The product of the averaged factors is a
        fraction of it; the mean is the model.

        >>> import torch
        >>> one = {"q.lora_B": torch.tensor([[1.0], [2.0]]), "q.lora_A": torch.tensor([[3.0, 4.0]])}
        >>> two = {"q.lora_B": -one["q.lora_B"], "q.lora_A": -one["q.lora_A"]}
        >>> averaged = (one["q.lora_B"] + two["q.lora_B"]) @ (one["q.lora_A"] + two["q.lora_A"]) / 4
        >>> mean = merge_updates([one, two]).tensors
        >>> averaged.tolist(), (mean["q.lora_B"] @ mean["q.lora_A"]).round(decimals=4).tolist()
        ([[0.0, 0.0], [0.0, 0.0]], [[3.0, 4.0], [6.0, 8.0]])
    """
    distance = _checked_options(geometry, distance, p, invalid, options)
    names, weights = _checked_clients(len(updates), names, weights)
    reference = None if like is None else ClientUpdate("like", like, pairs, scaling)
    kept: list[ClientUpdate] = []
    used: list[float] = []
    rejected: dict[str, str] = {}
    for name, tensors, weight in zip(names, updates, weights, strict=True):
        try:
            update = ClientUpdate(name, tensors, pairs, scaling)
            reference = reference or update
            update.check_fits(reference)
            used.append(_checked_weight(name, weight))
            kept.append(update)
        except UpdateError as error:
            if invalid == "raise":
                raise
            logger.warning("left out: %s", error)
            rejected[name] = str(error)
    if reference is None or not kept:
        raise UpdateError(
            f"updates: none is left to average, {len(updates)} came and {len(rejected)} could not "
            "be used; keep the model of the last round"
        )
    total = math.fsum(used)
    if not total:
        raise UpdateError("updates: all weights are zero; give at least one client a positive one")
    if p == 1:
        for update, weight in zip(kept, used, strict=True):
            if len(kept) > 1 and weight >= total / 2:
                logger.warning(
                    "%s has %.0f %% of the weight, which puts the median at its mercy; give equal "
                    "weights, or bound what a client may claim", update.name, 100 * weight / total,
                )  # fmt: skip
    if rank is None and geometry in ("auto", "lifted"):  # whose own default grows with each round
        rank = max(module.rank for update in kept for module in update.modules.values())
    merged = merge_adapters(
        kept, weights=used, geometry=geometry, distance=distance, p=p, rank=rank,
        missing="present", **options,
    )  # fmt: skip
    modules = {key: (b.cpu(), a.cpu()) for key, (b, a) in merged.modules.items()}
    recipe = {key: merged.recipe[key] for key in ("geometry", "distance", "rank", "scale", "p")}
    recipe["weights"] = {x.name: w / total for x, w in zip(kept, used, strict=True)}
    return UpdateMerge(
        tensors=reference.named_like(modules, merged.extras, scaling),
        recipe=recipe,
        distances=_distances(kept, modules),
        status=merged.status,
        rejected=rejected,
    )


def _checked_options(
    geometry: str, distance: str | None, p: int, invalid: str, options: Mapping[str, Any]
) -> str | None:
    """The distance, by default that of a federated round; the merge checks all else."""
    known = [x for x in GEOMETRIES if x != "fisher"]
    if geometry not in known:
        raise ValueError(f"geometry must be one of {', '.join(known)}; got {geometry!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 2 (mean) or 1 (median); got {p!r}")
    if invalid not in ("raise", "drop"):
        raise ValueError(f"invalid must be 'raise' or 'drop'; got {invalid!r}")
    unknown = sorted(options.keys() - {"scale", "transform", "device", "max_bytes"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no option of merge_updates; see its docstring")
    if distance is None and geometry not in ("auto", "lifted"):
        return "chordal"
    return distance


def _checked_clients(
    count: int, names: Sequence[str] | None, weights: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    names = [f"client {i}" for i in range(count)] if names is None else list(names)
    weights = [1.0] * count if weights is None else list(weights)
    for what, given in (("names", names), ("weights", weights)):
        if len(given) != count:
            raise ValueError(f"{what}: expected {count}, one for each update; got {len(given)}")
    if len(set(names)) < count:
        raise ValueError(f"names: two clients have one name in {names}")
    return names, weights


def _checked_weight(name: str, weight: float) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise UpdateError(f"{name}: its weight is {weight!r}, expected a number >= 0")
    return number


def _distances(
    updates: Sequence[ClientUpdate], merged: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    found = {}
    for update in updates:
        squared = 0.0
        for key, (b, a) in merged.items():
            own_b, own_a = update.factors(key)
            squared += float(chordal_distance((own_b, own_a.mT), (b, a.mT))) ** 2
        found[update.name] = math.sqrt(squared)
    return found
