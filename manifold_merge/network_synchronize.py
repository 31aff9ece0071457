"""Matching many networks to each other at once, so that their mean loses least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_merge.accurate import weighted_sum
from manifold_merge.network_layout import NetworkLayout, Order
from manifold_merge.network_matching import (
    Matching,
    anneal,
    coordinate_descent,
    frank_wolfe,
    random_orders,
    uniform_orders,
)

__all__ = ["match_networks", "synchronize"]


def match_networks(
    matching: Matching,
    *,
    method: str = "anneal",
    steps: int = 40,
    starts: int = 1,
    seed: int = 0,
) -> list[Order]:
    """Find orders of great score: best of several starts, each polished by coordinate descent.

    The first start depends on no representative; the others are random.

    Args:
        matching: The score.
        method: ``"anneal"``, ``"coordinate"`` (coordinate descent alone) or ``"frank_wolfe"``.
        steps: Number of temperatures of ``"anneal"``.
        starts: Number of starts; the best score wins.
        seed: Seed of the random starts.

    Returns:
        The orders, hard.
    """
    layout, like = matching.layout, matching.like
    generator = torch.Generator().manual_seed(seed)
    best: list[Order] | None = None
    best_score = 0.0
    for start in range(starts):
        if method == "anneal":
            (orders,) = anneal([matching], steps=steps, generator=generator, noise=float(start > 0))
        else:
            orders = uniform_orders(layout, like)
            if start:
                orders = random_orders(layout, like, generator)
            if method == "frank_wolfe":
                orders = frank_wolfe(matching, _softened(orders, like, layout))
        orders, _ = coordinate_descent(matching, orders)
        score = matching.score(orders) if starts > 1 else 0.0
        if best is None or score > best_score:
            best, best_score = orders, score
    assert best is not None
    return best


def _softened(orders: Sequence[Order], like: Tensor, layout: NetworkLayout) -> list[Order]:
    """Orders as matrices, half way to the centre where they are permutations."""
    soft: list[Order] = []
    for number, (order, n) in enumerate(zip(orders, layout.counts, strict=True)):
        assert order is not None
        if number < layout.gauges:
            order = 0.5 * order
        elif order.ndim == 1:
            eye = torch.eye(n, dtype=like.dtype, device=like.device)
            order = 0.5 * eye[order] + 0.5 / n
        soft.append(order)
    return soft


def synchronize(
    layout: NetworkLayout,
    points: Tensor,
    weights: Tensor,
    *,
    metric: Tensor | None = None,
    method: str = "anneal",
    steps: int = 40,
    starts: int = 1,
    seed: int = 0,
) -> list[list[Order]]:
    """Reorder k networks so that Σ wᵢ |mean - gᵢ xᵢ|² is least, mean = Σ wᵢ gᵢ xᵢ.

    The objective is Σ wᵢ|xᵢ|² - |mean|²; as a function of one gᵢ it is -2 wᵢ <Σ_{j≠i} wⱼ gⱼ xⱼ,
    gᵢ xᵢ> plus a constant. So each network is matched to the mean of the others, one after another,
    softly at first where the method anneals, at last by exact assignments until none improves.

    Args:
        layout: Where the sets lie in a vector.
        points: The networks, ``(k, N)``.
        weights: ``(k,)``, with sum 1.
        metric: Diagonal of a metric that permutations leave alone, ``(N,)``; Euclidean if ``None``.
        method: ``"anneal"``, ``"coordinate"`` or ``"frank_wolfe"``; the latter two match the
            networks to the mean of those before them.
        steps: Number of temperatures of ``"anneal"``.
        starts: Number of starts; each holds another network fixed while the others are matched.
        seed: Seed of random starts, of which there are any only if ``starts`` exceeds k.

    Returns:
        For each network, in the order given, the orders of its sets.
    """
    count = len(points)
    # The result must not depend on the order in which the networks are given, nor on theirs inside.
    # Rounding of the norms is all that an order could change.
    sizes = points.double().square().sum(-1)
    ranked = sorted(range(count), key=lambda i: (-float(sizes[i]), -float(weights[i])))
    best: list[list[Order]] | None = None
    best_size = -torch.inf
    for start in range(starts):
        turned = [*ranked[start % count :], *ranked[: start % count]]
        orders = _synchronize_from(
            layout, points, weights, turned, metric, method, steps, seed + start, start >= count
        )
        moved = torch.stack([layout.permute(x, o) for x, o in zip(points, orders, strict=True)])
        mean = weighted_sum(weights, moved)
        size = float((mean * mean if metric is None else metric * mean * mean).sum())
        if best is None or size > best_size:
            best, best_size = orders, size
    assert best is not None
    return best


def _synchronize_from(
    layout: NetworkLayout,
    points: Tensor,
    weights: Tensor,
    ranked: Sequence[int],
    metric: Tensor | None,
    method: str,
    steps: int,
    seed: int,
    random: bool,
) -> list[list[Order]]:
    """One start: the first of the ranked networks stays, the others are matched."""
    anchor, others = ranked[0], ranked[1:]
    orders: list[list[Order]] = [[None] * len(layout.sets) for _ in points]
    moved = points.clone()

    def target(i: int, among: Sequence[int]) -> Tensor:
        rest = [j for j in among if j != i]
        mean = weighted_sum(weights[rest], moved[rest]) / weights[rest].sum()
        return (mean if metric is None else metric * mean)[None]

    def aimed(i: int, among: Sequence[int]) -> Matching:
        return Matching(layout, target(i, among), points[i][None])

    if method == "anneal":
        matchings = [aimed(i, [anchor, i]) for i in others]

        def refresh(number: int) -> None:
            # The network before this one has just moved: show it to this one.
            i = others[number]
            previous = others[number - 1]
            moved[previous] = layout.permute(points[previous], latest[number - 1])
            matchings[number].aim(target(i, ranked))

        generator = torch.Generator().manual_seed(seed)
        latest = [uniform_orders(layout, points) for _ in others]
        for number, i in enumerate(others):
            moved[i] = layout.permute(points[i], latest[number])
        found = anneal(
            matchings,
            steps=steps,
            refresh=refresh if len(others) > 1 else None,
            generator=generator,
            noise=float(random),
            orders=latest,
        )
        for i, order in zip(others, found, strict=True):
            orders[i] = order
    else:
        for number, i in enumerate(others):
            matching = aimed(i, [*ranked[: number + 1], i])
            orders[i] = match_networks(matching, method=method, steps=steps, seed=seed)
            moved[i] = layout.permute(points[i], orders[i])
    for i in ranked:
        moved[i] = layout.permute(points[i], orders[i])
    if len(others) == 1:  # two networks: coordinate descent on one of them is all there is
        i = others[0]
        orders[i], _ = coordinate_descent(aimed(i, ranked), orders[i])
        return orders
    still = 0
    while still < len(ranked):
        for i in ranked:
            orders[i], changed = coordinate_descent(aimed(i, ranked), orders[i], max_sweeps=1)
            if changed:
                moved[i] = layout.permute(points[i], orders[i])
            still = 0 if changed else still + 1
            if still >= len(ranked):
                break
    return orders
