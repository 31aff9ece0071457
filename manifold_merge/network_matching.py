"""Matching the elements of two networks: coordinate descent, annealing and Frank-Wolfe.

Two networks, packed into vectors x and y, are closest where <x, g y> is greatest over all orders g
of the sets. That score is linear in the order of each single set, given all others; the matrix of
this linear function is what :meth:`Matching.score_matrix` computes, and a linear assignment
maximises it exactly. All methods below are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from manifold_merge.assignment import assign, softassign
from manifold_merge.network_gauges import (
    closest_isometry,
    is_isometry,
    random_isometry,
    softened_isometry,
)
from manifold_merge.network_layout import NetworkLayout
from manifold_merge.network_sites import Order, Site, acted, any_meet

__all__ = ["METHODS", "Matching", "anneal", "coordinate_descent", "frank_wolfe", "uniform_orders"]

METHODS = ("anneal", "coordinate", "frank_wolfe")

# The hot end lies above the temperature at which the first set decides, at some 2 standard
# deviations of its scores; at the cold end nearly all plans are permutations.
HOT = 2.0
COOLING = 40.0
# Rounds over sets inside one element that meet each other, as the query heads of one key-value
# head and the basis of its values do.
COUPLED_SWEEPS = 3
# Beyond so many entries to visit, pairs of elements are compared as their insides stand.
COUPLED_LIMIT = 2e8
# Matrices change in ever smaller steps; those below this share of the score wake no neighbour.
NEGLIGIBLE = 1e-6


class Matching:
    """The score <φ, g ψ> + Σ_s tr(P_sᵀ U_s) of orders g = (P_s) of the sets of a network.

    Args:
        layout: Where the sets lie in a vector.
        target: φ, ``(c, N)``: the network that stays, in the dual of the metric. One channel for
            Euclidean and constant diagonal metrics; see :func:`fisher_channels` for more.
        source: ψ, ``(c, N)``: the network to be reordered.
        unary: U_s by the name of the set, ``(count, count)``: scores from elsewhere, such as
            correlations of activations.
    """

    def __init__(
        self,
        layout: NetworkLayout,
        target: Tensor,
        source: Tensor,
        unary: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layout = layout
        self.target = layout.views(target)
        self.source = layout.views(source)
        self.unary = {layout.names.index(name): u for name, u in (unary or {}).items()}
        self.like = source
        self._memory: dict[int, tuple[list[Order], Tensor]] = {}

    def aim(self, target: Tensor) -> None:
        """Exchange φ, ``(c, N)``."""
        self.target = self.layout.views(target)
        self._memory = {}

    def score_matrix(self, number: int, orders: Sequence[Order]) -> Tensor:
        """What the score gains from each pair of elements of a set, ``(count, count)``.

        The score is Σᵢⱼ P[i, j] times this matrix, up to terms without P, for the order P of set
        ``number``, where the orders of all other sets are given.
        """
        count = self.layout.counts[number]
        total = self.unary.get(number)
        for site in self.layout.by_set[number]:
            term = self._rows_of(site, orders) @ self._rows_of(site, orders, source=True).mT
            total = term if total is None else total + term
        return self.like.new_zeros(count, count) if total is None else total

    def _rows_of(
        self, site: Site, orders: Sequence[Order], *, source: bool = False, skip: int | None = None
    ) -> Tensor:
        """Rows of φ taken back through the sites after one, or of ψ moved through those before."""
        array = (self.source if source else self.target)[site.block]
        if not source and skip is None and site.owner < self.layout.gauges:
            return self.layout.rows_of_basis(array, site, orders, self._memory)
        return self.layout.rows_after(array, site, orders, back=not source, skip=skip)

    def score(self, orders: Sequence[Order]) -> float:
        """The whole score of some orders, soft or hard."""
        total = 0.0
        for number, sites in enumerate(self.layout.by_block):
            source = acted(sites, self.source[number], orders)
            total += float((self.target[number] * source).sum(dtype=torch.float64))
        for number, scores in self.unary.items():
            total += float(value_of(scores, orders[number]))
        return total

    def nested_matrix(
        self, number: int, orders: Sequence[Order]
    ) -> tuple[Tensor, dict[tuple[int, int], list[Tensor]]]:
        """Scores of a set that holds others, each pair of elements with its best inner orders.

        Returns:
            Scores ``(count, count)``, and for each pair (i, j) the orders of the sets in element j.
        """
        scores, lists = self.score_matrix(number, orders).clone(), self.layout.children[number]
        best: dict[tuple[int, int], list[Tensor]] = {}
        if self.separable(number):
            ours, theirs = self._rows_of_children(number, orders)
            for i in range(len(lists)):
                for j, there in enumerate(lists):
                    pairs = zip(ours[i], theirs[j], there, strict=True)
                    inner = [(other, rows @ twins.mT) for rows, twins, other in pairs]
                    best[i, j] = [closest_order(self.layout, other, c) for other, c in inner]
                    for (other, c), order in zip(inner, best[i, j], strict=True):
                        scores[i, j] += value_of(c, order) - value_of(c, orders[other])
            return scores, best
        for i, here in enumerate(lists):
            for j, there in enumerate(lists):
                # What is inside the element of ψ acts at its new place.
                here_orders, there_orders = list(orders), list(orders)
                for _ in range(COUPLED_SWEEPS):
                    for child, other in zip(here, there, strict=True):
                        for place, source in zip(here, there, strict=True):
                            here_orders[place] = there_orders[source]
                        c = self._inner_matrix(number, child, other, here_orders, there_orders)
                        order = closest_order(self.layout, other, c)
                        scores[i, j] += value_of(c, order) - value_of(c, there_orders[other])
                        there_orders[other] = order
                best[i, j] = [there_orders[other] for other in there]  # type: ignore[misc]
        return scores, best

    def _rows_of_children(
        self, number: int, orders: Sequence[Order]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Entries of the sets inside each element, of φ and of ψ, all else being applied."""
        lists = self.layout.children[number]
        family = {number, *(child for each in lists for child in each)}
        inside = self._descendants(number) - family
        blocks = {site.block for each in lists for c in each for site in self.layout.by_set[c]}
        targets, sources = {}, {}
        for block in blocks:
            target, source = self.target[block], self.source[block]
            sites = [s for s in self.layout.by_block[block] if s.owner not in family]
            for site in sites:
                if site.owner in inside:
                    source = site.act(source, orders[site.owner])
            for site in reversed(sites):
                if site.owner not in inside:
                    target = site.act(target, orders[site.owner], transpose=True)
            targets[block], sources[block] = target, source

        def rows(arrays: Mapping[int, Tensor]) -> list[list[Tensor]]:
            return [
                [
                    torch.cat([s.rows(arrays[s.block]) for s in self.layout.by_set[c]], 1)
                    for c in each
                ]
                for each in lists
            ]

        return rows(targets), rows(sources)

    def _descendants(self, number: int) -> set[int]:
        found: set[int] = set()
        for each in self.layout.children.get(number, []):
            for child in each:
                found |= {child} | self._descendants(child)
        return found

    def _inner_matrix(
        self,
        parent: int,
        child: int,
        other: int,
        here: Sequence[Order],
        there: Sequence[Order],
    ) -> Tensor:
        """Scores of the elements of ``other`` (of ψ) in the place of those of ``child`` (of φ)."""
        total = self.like.new_zeros(self.layout.counts[child], self.layout.counts[child])
        pairs = zip(self.layout.by_set[child], self.layout.by_set[other], strict=True)
        for site, twin in pairs:
            ours = self._rows_of(site, here, skip=parent)
            total += ours @ self._rows_of(twin, there, source=True).mT
        return total

    def nested(self, number: int) -> bool:
        """Whether the elements of a set can be matched together with the sets inside them."""
        lists = self.layout.children.get(number)
        if not lists or len({tuple(self.layout.counts[c] for c in each) for each in lists}) > 1:
            return False
        inside = [child for each in lists for child in each]
        if not all(self.layout.linear[c] and c not in self.unary for c in inside):
            return False
        blocks = {site.block for child in inside for site in self.layout.by_set[child]}
        entries = len(lists) ** 2 * sum(self.layout.blocks[block].size for block in blocks)
        return entries <= COUPLED_LIMIT or not self._coupled(number)

    def separable(self, number: int) -> bool:
        """Whether, in addition, the sets inside one element do not meet each other."""
        return self.nested(number) and not self._coupled(number)

    def _coupled(self, number: int) -> bool:
        """Whether sets inside one element of a set share entries."""
        return any(
            any_meet([site for child in each for site in self.layout.by_set[child]])
            for each in self.layout.children[number]
        )


def value_of(scores: Tensor, order: Order) -> Tensor:
    """tr(Pᵀ scores), for a permutation, a soft order or the identity (``None``)."""
    if order is None:
        return scores.diagonal().sum()
    if order.ndim == 2:
        return (scores * order).sum()
    return scores.gather(1, order[:, None]).sum()


def closest_order(layout: NetworkLayout, number: int, scores: Tensor) -> Tensor:
    """The order of one set that maximises tr(Pᵀ scores): a permutation, or a polar factor."""
    if number < layout.gauges:
        return closest_isometry(scores, layout.pairings[number])
    return assign(scores)


def is_hard(layout: NetworkLayout, number: int, order: Order) -> bool:
    """Whether an order is an element of the group and no average of such."""
    if order is None or order.ndim == 1:
        return True
    return number < layout.gauges and is_isometry(order)


def uniform_orders(layout: NetworkLayout, like: Tensor) -> list[Order]:
    """Orders that match every element to every other alike: the centre of all permutations.

    That of the orthogonal matrices is zero.
    """
    return [
        like.new_zeros((n, n)) if number < layout.gauges else like.new_full((n, n), 1 / n)
        for number, n in enumerate(layout.counts)
    ]


def random_orders(
    layout: NetworkLayout, like: Tensor, generator: torch.Generator | None
) -> list[Order]:
    """One random permutation for each set, one random orthogonal matrix for each basis."""
    return [
        random_isometry(n, like, generator, layout.pairings[number])
        if number < layout.gauges
        else torch.randperm(n, generator=generator).to(like.device)
        for number, n in enumerate(layout.counts)
    ]


def coordinate_descent(
    matching: Matching,
    orders: Sequence[Order],
    *,
    max_sweeps: int = 100,
    only: Collection[int] | None = None,
) -> tuple[list[Order], bool]:
    """Solve the assignment of one set after another until none improves the score.

    The score never decreases. Sets inside the elements of another are matched together with it.

    Args:
        matching: The score.
        orders: Where to start; soft orders are replaced when their set is first visited.
        max_sweeps: Greatest number of visits of each set.
        only: The sets to visit; all if ``None``.

    Returns:
        The orders, hard, and whether any of them changed.

    Source: Ainsworth, Hayase and Srinivasa, arXiv:2209.04836, algorithm 1.
    """
    layout, orders = matching.layout, list(orders)
    visits = visiting_order(matching, orders)
    neighbours = [
        {other.owner for site in sites for other in layout.by_block[site.block]}
        for sites in layout.by_set
    ]
    allowed = set(range(len(layout.sets)) if only is None else only)
    waiting = set(allowed)
    changed = False
    for _ in range(max_sweeps):
        if not waiting:
            break
        for number in visits:
            if number in waiting:
                waiting.discard(number)
                if _improve(matching, number, orders):
                    changed = True
                    waiting |= (neighbours[number] & allowed) - {number}
                    if not layout.linear[number]:
                        waiting.add(number)
    return orders, changed


def _improve(matching: Matching, number: int, orders: list[Order]) -> bool:
    """Solve one assignment in place; whether it improved the score beyond rounding."""
    layout, old = matching.layout, orders[number]
    now = value_of(scores := matching.score_matrix(number, orders), old)
    nested = matching.nested(number)
    if nested:
        scores, inner = matching.nested_matrix(number, orders)
    order = closest_order(layout, number, scores)
    rounding = 10 * torch.finfo(scores.dtype).eps * float(scores.abs().amax(1).sum())
    soft = not is_hard(layout, number, old)
    gain = float(value_of(scores, order) - now)
    if not soft and not gain > rounding:
        return False
    trial = list(orders)
    trial[number] = order
    if nested:
        for i, j in enumerate(order.tolist()):
            for child, inside in zip(layout.children[number][j], inner[i, j], strict=True):
                trial[child] = inside
    square = not soft and not layout.linear[number]
    if square and not matching.score(trial) > matching.score(orders) + rounding:
        return False
    orders[:] = trial
    return soft or number >= layout.gauges or gain > NEGLIGIBLE * abs(float(now))


def anneal(
    matchings: Sequence[Matching],
    *,
    steps: int = 40,
    refresh: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
    orders: list[list[Order]] | None = None,
) -> list[list[Order]]:
    """Soft orders of falling temperature, from the centre of all permutations to one of them.

    At each temperature T the order of each set is the doubly stochastic matrix that maximises
    score + T · entropy, given all others (one softened assignment). Far from a permutation the
    orders average over what is not decided yet, so that clear matches are made first; nothing
    depends on how the networks happen to be ordered.

    Args:
        matchings: One for each network to be reordered.
        steps: Number of temperatures.
        refresh: Called with i before the orders of matching i change: networks that are matched to
            each other's mean exchange their targets here.
        generator: Source of randomness.
        noise: Standard deviation of random scores at the hot end, in units of the scores'; another
            solution for each draw. None by default.
        orders: Where the soft orders are kept, for ``refresh`` to see; uniform at first.

    Returns:
        For each matching its orders, hard.

    Source: mean-field annealing of assignments: Gold and Rangarajan (1996); Kosowsky and Yuille
    (1994).
    """
    if orders is None:
        orders = [uniform_orders(m.layout, m.like) for m in matchings]
    potentials = [[m.like.new_zeros(n) for n in m.layout.counts] for m in matchings]
    spreads = [spread_of_scores(m, o) for m, o in zip(matchings, orders, strict=True)]
    # Permutations set the scale; bases follow.
    first = max((m.layout.gauges for m in matchings), default=0)
    spread = max((s for each in spreads for s in each[first:] or each), default=0.0)
    visits = [_descending(each) for each in spreads]
    random = [
        [
            noise * spread * torch.randn((n, n), generator=generator).to(m.like)
            for n in (m.layout.counts if noise else ())
        ]
        for m in matchings
    ]
    if spread > 0:
        for step in range(steps):
            cooled = COOLING ** -(step / max(steps - 1, 1))
            temperature = HOT * spread * cooled
            for i, matching in enumerate(matchings):
                if refresh is not None:
                    refresh(i)
                for number in visits[i]:
                    scores = matching.score_matrix(number, orders[i])
                    if noise:
                        scores = scores + cooled * random[i][number]
                    if number < matching.layout.gauges:
                        orders[i][number] = softened_isometry(
                            scores, temperature, matching.layout.pairings[number]
                        )
                        continue
                    orders[i][number], potentials[i][number] = softassign(
                        scores, temperature, potentials[i][number]
                    )
    return [rounded(m.layout, each) for m, each in zip(matchings, orders, strict=True)]


def rounded(layout: NetworkLayout, orders: Sequence[Order]) -> list[Order]:
    """The elements of the group that are closest to soft orders."""
    return [closest_order(layout, n, order) for n, order in enumerate(orders)]  # type: ignore[arg-type]


def spread_of_scores(matching: Matching, orders: Sequence[Order]) -> list[float]:
    """Standard deviation of the scores of each set, less their row and column means."""
    spreads = []
    for number in range(len(matching.layout.sets)):
        scores = matching.score_matrix(number, orders)
        if number >= matching.layout.gauges:
            scores = scores - scores.mean(0) - scores.mean(1, keepdim=True) + scores.mean()
        spread = float(scores.square().mean().sqrt())
        spreads.append(spread if math.isfinite(spread) else 0.0)
    return spreads


def visiting_order(matching: Matching, orders: Sequence[Order]) -> list[int]:
    """Sets by how much their scores tell elements apart, best first, where orders are soft.

    The first set of a network whose inputs are fixed is matched well on its own; one in the middle
    cannot be matched before its neighbours.
    """
    numbers = range(len(matching.layout.sets))
    if all(is_hard(matching.layout, number, orders[number]) for number in numbers):
        return list(numbers)
    return _descending(spread_of_scores(matching, orders))


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda number: -values[number])


def frank_wolfe(
    matching: Matching,
    orders: Sequence[Order],
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> list[Order]:
    """Ascend over doubly stochastic orders of all sets at once, then round.

    Each iteration solves one assignment for each set at the current gradient and moves towards all
    of them together, by an exact line search where at most two sets meet in a tensor.

    Args:
        matching: The score.
        orders: Soft orders to start from.
        max_iterations: Greatest number of iterations.
        tolerance: Relative duality gap at which to stop.

    Returns:
        The orders, hard.

    Source: Frank and Wolfe (1956); Crisostomi et al., arXiv:2405.17897 (C2M3).
    """
    layout, current = matching.layout, list(orders)
    now = matching.score(current)
    for _ in range(max_iterations):
        corners: list[Order] = []
        gap = 0.0
        for number, count in enumerate(layout.counts):
            scores = matching.score_matrix(number, current)
            order = closest_order(layout, number, scores)
            gap += float(value_of(scores, order) - value_of(scores, current[number]))
            eye = torch.eye(count, dtype=scores.dtype, device=scores.device)
            corners.append(order if order.ndim == 2 else eye[order])
        if not gap > tolerance * abs(now):
            break
        ahead = matching.score(_between(current, corners, 1.0))
        curvature = ahead - now - gap
        step = 1.0 if curvature >= 0 else min(1.0, -gap / (2 * curvature))
        trial = _between(current, corners, step)
        after = matching.score(trial)
        while after <= now and step > 1e-3:  # more than two sets meet: no parabola
            step /= 2
            trial = _between(current, corners, step)
            after = matching.score(trial)
        if not after > now:
            break
        current, now = trial, after
    return rounded(layout, current)


def _between(current: Sequence[Order], corners: Sequence[Order], step: float) -> list[Order]:
    return [a + step * (b - a) for a, b in zip(current, corners, strict=True)]  # type: ignore[operator]
