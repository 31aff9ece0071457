"""Whole networks modulo the order of their neurons, channels, heads and experts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.accurate import weighted_sum
from manifold_merge.fisher import FisherEuclidean
from manifold_merge.linalg import broadcast_shapes
from manifold_merge.network_gauges import (
    apply_gauges,
    balancing_element,
    matrix_gauges,
    skew_solution,
)
from manifold_merge.network_layout import NetworkLayout, Order, named_element, shapes_of
from manifold_merge.network_matching import METHODS, Matching, coordinate_descent, random_orders
from manifold_merge.network_synchronize import match_networks, synchronize
from manifold_merge.quotient import Gauge, QuotientManifold
from manifold_merge.rescaling import positive_gauges
from manifold_merge.symmetry import NetworkSymmetry, SymmetryElement

__all__ = ["NetworkQuotient"]

# Rounds of projection where bases share entries, as those of linear layers in a chain.
HORIZONTAL_SWEEPS = 200


class _Index(torch.autograd.Function):
    """The group element that aligns y to x; opaque to autograd and ``vmap``.

    Where each entry of the aligned vector comes from, ``(..., N)``, after the changes of basis by
    the second result, all matrices of one element in a row.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, manifold: Any) -> tuple[Tensor, Tensor]:
        batch = broadcast_shapes(x.shape[:-1], y.shape[:-1])
        x, y = x.expand(*batch, -1).reshape(-1, x.shape[-1]), y.expand(*batch, -1)
        rows = zip(x, y.reshape(-1, y.shape[-1]), strict=True)
        found = [manifold._orders(a, b) for a, b in rows]
        gauges = manifold.layout.gauges
        index = y.new_zeros((len(found), y.shape[-1]), dtype=torch.long)
        matrices = y.new_zeros((len(found), sum(d * d for d in manifold.layout.counts[:gauges])))
        for row, orders in enumerate(found):
            index[row] = manifold._positions([*(None,) * gauges, *orders[gauges:]])
            if gauges:
                matrices[row] = torch.cat([o.reshape(-1) for o in orders[:gauges]])
        return index.reshape(*batch, -1), matrices.reshape(*batch, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor, manifold: Any) -> Any:
        x, y = (
            a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)
            for a, dim in zip((x, y), in_dims[:2], strict=True)
        )
        return _Index.apply(x, y, manifold), (0, 0)


@dataclass
class _Memory:
    """How the anchors of one mean were last aligned."""

    anchors: Tensor  # (k, N)
    orders: list[list[Order] | None]
    seen_from: Tensor | None = None  # the iterate, (N,)
    distance: float = 0.0  # greatest squared distance of an anchor to it


class NetworkQuotient(QuotientManifold):
    """Networks as vectors of parameters, modulo the group of a :class:`NetworkSymmetry`.

    Permutations always, positive scales of units and changes of basis on request.

    A point is a vector ``(..., N)`` of all parameters; :meth:`pack` makes it from a state dict and
    :meth:`unpack` takes it apart. Running statistics of normalisations are no parameters and take
    no part: they are re-estimated, or moved along (:func:`manifold_merge.merge_networks`).
    The distance is the Euclidean one, or that of a constant diagonal metric, to the closest
    reordering of the other network, biases included. To find that reordering is a hard problem
    (a quadratic assignment); ``align`` is a local solution of great score, found from a start that
    does not depend on the representatives. Distances are therefore upper bounds.

    ``frechet_mean`` on this manifold aligns all networks to the mean and averages, in turn: its
    Karcher iteration. It begins with all networks matched to each other
    (:func:`manifold_merge.network_synchronize.synchronize`).

    Args:
        symmetry: The permuted sets of the network, from :func:`manifold_merge.symmetry_of` or
            written by hand.
        template: A state dict, or the shape of each tensor by name, for parameters that the
            symmetry does not touch; ``symmetry.shapes`` alone if ``None``.
        fisher: Diagonal metric, ``(N,)`` or a dict of tensors. It has to be the same for all
            elements of a set, so that permutations are isometries; :meth:`symmetrize` averages one.
        balance: Remove positive rescaling of units as well: :meth:`pack` returns the balanced
            representative (:func:`manifold_merge.balanced`).
        basis: Remove changes of basis as well, GL(d) inside attention heads and scaled rotations
            under rotary positions: :meth:`pack` balances the bases, and alignment also finds the
            orthogonal matrices that are left.
        method: Aligner: ``"anneal"``, ``"coordinate"`` (coordinate descent, as Git Re-Basin's
            weight matching) or ``"frank_wolfe"``.
        steps: Temperatures of ``"anneal"``.
        starts: Starts of the aligner; the closest representative wins.
        seed: Seed of random starts.

    Raises:
        ValueError: If symmetry and template do not fit, the metric is not invariant, or there is
            nothing to balance or no basis to change.

    Source: Ainsworth, Hayase and Srinivasa, arXiv:2209.04836; Crisostomi et al., arXiv:2405.17897.

    Example:
        >>> import torch
        >>> from manifold_merge.symmetry import NetworkSymmetry, PermutedSet, Placement
        >>> units = (Placement("0.weight", 0), Placement("0.bias", 0), Placement("2.weight", 1))
        >>> shapes = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
        >>> quotient = NetworkQuotient(NetworkSymmetry((PermutedSet("0", 4, units),)), shapes)
        >>> x = quotient.random(26, dtype=torch.float64)
        >>> y = quotient.random_representative(x)  # the same network, its units reordered
        >>> float(quotient.dist(x, y)), bool(quotient.same_point(x, y))
        (0.0, True)
    """

    name = "NetworkQuotient"
    reversible = False
    log_is_searched = False
    __scaling__ = QuotientManifold.__scaling__.copy()

    def __init__(
        self,
        symmetry: NetworkSymmetry,
        template: Mapping[str, Tensor | Sequence[int]] | None = None,
        *,
        fisher: Tensor | Mapping[str, Tensor] | None = None,
        balance: bool = False,
        basis: bool = False,
        method: str = "anneal",
        steps: int = 40,
        starts: int = 1,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
        if starts < 1 or steps < 1:
            raise ValueError(f"starts, steps: expected at least 1, got {starts}, {steps}")
        if balance and not positive_gauges(symmetry):
            raise ValueError(
                "balance=True: the symmetry has no positive gauge (units of ReLU); leave it out"
            )
        if basis and not matrix_gauges(symmetry):
            raise ValueError("basis=True: the symmetry has no basis to change; leave it out")
        layout = NetworkLayout(symmetry, _shapes(template), bases=basis)
        metric = None
        if fisher is not None:
            metric = fisher if isinstance(fisher, Tensor) else layout.pack(fisher)
            if tuple(metric.shape) != (layout.size,):
                raise ValueError(f"fisher: expected ({layout.size},), got {tuple(metric.shape)}")
            average = layout.symmetrized(metric)
            if not torch.allclose(metric, average, rtol=1e-4, atol=0.0):
                raise ValueError(
                    "fisher: the metric differs between elements of a set, so that a permutation "
                    "changes distances. Use NetworkQuotient(...).symmetrize(fisher), its average; "
                    "align(..., fisher=) takes one metric for each network"
                )
        super().__init__(geoopt.Euclidean(1) if metric is None else FisherEuclidean(metric))
        self.symmetry = symmetry
        self.layout = layout
        self.balance = balance
        self.basis = basis
        self.method = method
        self.steps = steps
        self.starts = starts
        self.seed = seed
        self._memory: list[_Memory] | None = None

    @property
    def _metric(self) -> Tensor | None:
        return self.total.fisher if isinstance(self.total, FisherEuclidean) else None

    # --- state dicts -----------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def pack(self, state: Mapping[str, Tensor]) -> Tensor:
        """Write the parameters of a state dict into one vector, ``(..., N)``.

        Args:
            state: A state dict of the network; other entries are left out.

        Returns:
            The vector; the balanced representative if the manifold was made with ``balance`` or
            ``basis``.

        Raises:
            ValueError: If a parameter is missing or has another shape.
        """
        scales = positive_gauges(self.symmetry) if self.balance else ()
        element = balancing_element(state, self.symmetry, scales=scales, bases=self.basis)
        return self.layout.pack(apply_gauges(state, self.symmetry, element))

    @__scaling__(ScalingInfo())
    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """Read the parameters from a vector ``(..., N)``, as views, by name."""
        self._assert_check_shape(tuple(x.shape), "x")
        return self.layout.unpack(x)

    @__scaling__(ScalingInfo())
    def symmetrize(self, metric: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The average of a diagonal metric over all permutations, ``(N,)``: an invariant one."""
        vector = metric if isinstance(metric, Tensor) else self.layout.pack(metric)
        return self.layout.symmetrized(vector)

    # --- alignment -------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def match(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The permutations that bring ``y`` close to ``x``, by the name of the set.

        Args:
            x: Point, ``(N,)``.
            y: Point, ``(N,)``.

        Returns:
            For each set a permutation p, ``(count,)``, as ``NetworkSymmetry.permute`` takes them:
            element p[e] of ``y`` belongs to element e of ``x``.
        """
        return dict(self.element(x, y).permutations)

    @__scaling__(ScalingInfo())
    def element(self, x: Tensor, y: Tensor) -> SymmetryElement:
        """The group element that brings ``y`` close to ``x``: permutations and changes of basis.

        Args:
            x: Point, ``(N,)``.
            y: Point, ``(N,)``.

        Returns:
            The element, as ``NetworkSymmetry.apply`` takes it.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        return named_element(self.layout, self._orders(x.detach(), y.detach()))

    def _matching(self, x: Tensor, y: Tensor) -> Matching:
        metric = self._metric
        return Matching(self.layout, (x if metric is None else metric * x)[None], y[None])

    def _orders(self, x: Tensor, y: Tensor) -> list[Order]:
        # The score of a diagonal metric that is one number for each orbit is that of its covector.
        return match_networks(
            self._matching(x, y),
            method=self.method,
            steps=self.steps,
            starts=self.starts,
            seed=self.seed,
        )

    def _positions(self, orders: Sequence[Order]) -> Tensor:
        device = self.total.fisher.device if self._metric is not None else None
        return self.layout.permute(torch.arange(self.layout.size, device=device), orders)

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        index, matrices = _Index.apply(x.detach(), y.detach(), self)
        index = index.to(y.device)
        y = y.expand(index.shape)
        if not self.layout.gauges:
            return y.gather(-1, index)
        if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
            # In the order of y, so that the matrices can follow x and y.
            x = torch.zeros_like(y).scatter(-1, index, x.expand(index.shape))
        start = 0
        for place, pairing in zip(self._rows, self.layout.pairings, strict=False):
            rows, d = place.to(y.device), len(place)
            turn = matrices[..., start : start + d * d].unflatten(-1, (d, d))
            part = y[..., rows]
            if x.requires_grad or part.requires_grad:
                turn = self._following(turn, x[..., rows], part, rows, pairing)
            y = y.index_copy(-1, rows.reshape(-1), (turn @ part).flatten(-2))
            start += d * d
        return y.gather(-1, index)

    def _following(
        self, turn: Tensor, x: Tensor, y: Tensor, rows: Tensor, pairing: str | None
    ) -> Tensor:
        """The best matrix as a function of what it aligns: right to the second order of d²."""
        weighted = x if self._metric is None else self._metric[rows] * x
        product = turn.mT @ weighted @ y.mT
        spin = skew_solution(product.detach(), product, pairing)
        return turn + turn @ (spin + spin @ spin / 2)

    @functools.cached_property
    def _rows(self) -> list[Tensor]:
        """Where the coordinates of each basis lie in the vector, ``(d, entries)``."""
        return self.layout.rows_of_gauges()

    def _generators(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, str | None]]:
        for place, pairing in zip(self._rows, self.layout.pairings, strict=False):
            rows = place.to(x.device)
            yield rows, x[..., rows], pairing

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Take out the directions in which bases turn: skew A with A x, for one basis at a time."""
        metric = self._metric
        for _ in range(HORIZONTAL_SWEEPS if self._bases_meet else 1):
            for rows, part, pairing in self._generators(x):
                weighted = part if metric is None else metric[rows] * part
                spin = skew_solution(part @ weighted.mT, u[..., rows] @ weighted.mT, pairing)
                moved = u[..., rows] - spin @ part
                u = u.index_copy(-1, rows.reshape(-1), moved.flatten(-2))
        return u

    @functools.cached_property
    def _bases_meet(self) -> bool:
        entries = [rows.reshape(-1) for rows in self._rows]
        return bool(entries) and len(torch.cat(entries).unique()) < sum(map(len, entries))

    @__scaling__(ScalingInfo())
    def random_vertical(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A random direction in which bases turn, ``(..., N)``; zero where there are none."""
        u = torch.zeros_like(x)
        for rows, part, pairing in self._generators(x):
            shape = (*part.shape[:-1], len(rows))
            drawn = torch.randn(shape, generator=generator, dtype=x.dtype)
            spin = skew_solution(torch.eye(len(rows)).to(x), drawn.to(x), pairing)
            flat = rows.reshape(-1)
            moved = u[..., flat] + (spin @ part).flatten(-2)
            u = u.index_copy(-1, flat, moved)
        return u

    @__scaling__(ScalingInfo())
    def random_gauge(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Gauge:
        """A random element of the group, the same for all batch elements of ``x``.

        Args:
            x: Point, ``(..., N)``.
            generator: Source of randomness.
            condition: Not needed: the group acts by isometries.

        Returns:
            A function from ``(..., N)`` to ``(..., N)``.
        """
        orders = random_orders(self.layout, x, generator)
        return lambda array: self.layout.permute(array, orders)

    def relative_difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance by the length of the longer vector, of the batch shape."""
        size = torch.maximum(self.total.norm(x, x), self.total.norm(y, y))
        return self.dist(x, y) / torch.where(size > 0, size, 1.0)

    @__scaling__(ScalingInfo())
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """The Hessian applied to ``u``, ``(..., N)``: the total space is flat."""
        return self._horizontal(x, self.total.egrad2rgrad(x, ehess))

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if not shape or shape[-1] != self.layout.size:
            return False, f"`{name}` should have shape (..., {self.layout.size}), got {shape}"
        return True, None

    # --- what a Fréchet mean asks of a manifold --------------------------------------------------

    def reduce(
        self, points: Sequence[Tensor], *, rank: int | None = None
    ) -> tuple[NetworkQuotient, Tensor, Callable[[Tensor], Tensor]]:
        """This manifold with a memory: alignments of one iterate begin from those of the last.

        Args:
            points: Anchors, k tensors ``(..., N)``.
            rank: Networks have none.

        Returns:
            The manifold, the anchors stacked to ``(k, ..., N)``, and the identity.

        Raises:
            ValueError: If a rank is given.
        """
        _, anchors, restore = super().reduce(points, rank=rank)
        if self._memory is not None:
            return self, anchors, restore
        remembering = copy.copy(self)
        remembering._memory = []
        return remembering, anchors, restore

    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """The mean of the anchors after all were matched to each other, ``(..., N)``.

        Args:
            points: Anchors, ``(k, ..., N)``.
            weights: ``(k, ...)``, with sum 1.
            rank: Networks have none.
        """
        batch = points.shape[1:-1]
        flat = points.reshape(len(points), -1, points.shape[-1])
        shares = weights.reshape(len(weights), -1).expand(len(weights), flat.shape[1])
        means = []
        for anchors, share in zip(flat.unbind(1), shares.unbind(1), strict=True):
            orders = synchronize(
                self.layout,
                anchors,
                share,
                metric=self._metric,
                method=self.method,
                steps=self.steps,
                starts=self.starts,
                seed=self.seed,
            )
            moved = [self.layout.permute(x, o) for x, o in zip(anchors, orders, strict=True)]
            means.append(weighted_sum(share, torch.stack(moved)))
            if self._memory is not None:
                self._memory.append(_Memory(anchors, [*orders], means[-1]))
        return torch.stack(means).reshape(*batch, -1)

    def recall(self, x: Tensor, anchors: Tensor) -> list[list[Order]]:
        """The orders that align anchors ``(k, N)`` to a point ``(N,)``, as last found."""
        known = [
            (anchor, orders)
            for memory in self._memory or []
            for anchor, orders in zip(memory.anchors, memory.orders, strict=True)
            if orders is not None
        ]
        found = []
        for anchor in anchors:  # an anchor without weight took no part in the mean
            kept = next((orders for other, orders in known if torch.equal(other, anchor)), None)
            found.append(self._orders(x, anchor) if kept is None else kept)
        return found

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(
        self, x: Tensor, y: Tensor, *, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., N)`` in one computation.

        Args:
            x: Point, ``(..., N)``.
            y: Point, ``(..., N)``.
            guess: Not needed.
            precise: Not needed.
        """
        if self._memory is None or y.ndim != 3 or x.shape != y.shape:
            log = self.logmap(x, y)
        else:
            columns = [self._near(a[0], b) for a, b in zip(x.unbind(1), y.unbind(1), strict=True)]
            log = torch.stack(columns, 1) - x
        return self.total.inner(x, log), log

    def _near(self, x: Tensor, anchors: Tensor) -> Tensor:
        """The anchors of one mean, ``(k, N)``, aligned to an iterate ``(N,)``."""
        assert self._memory is not None
        memory = next((m for m in self._memory if torch.equal(m.anchors, anchors)), None)
        if memory is None:
            memory = _Memory(anchors, [None] * len(anchors))
            self._memory.append(memory)
        # Close to the last iterate its alignments are the place to begin; far away they may be bad.
        last = memory.seen_from
        far = last is None or float(self.total.dist(x, last)) ** 2 > 0.25 * memory.distance > 0
        aligned = []
        for i, anchor in enumerate(anchors):
            matching, known = self._matching(x, anchor), memory.orders[i]
            candidates = []
            if known is not None:
                candidates.append(coordinate_descent(matching, known)[0])
            if far or known is None:
                candidates.append(self._orders(x, anchor))
            best = max(candidates, key=matching.score) if len(candidates) > 1 else candidates[0]
            memory.orders[i] = best
            aligned.append(self.layout.permute(anchor, best))
        result = torch.stack(aligned)
        memory.seen_from = x
        memory.distance = float(self.total.inner(x, result - x).max())
        return result


def _shapes(
    template: Mapping[str, Tensor | Sequence[int]] | None,
) -> dict[str, tuple[int, ...]] | None:
    if template is None:
        return None
    tensors = {name: t for name, t in template.items() if isinstance(t, Tensor)}
    rest = {n: tuple(s) for n, s in template.items() if not isinstance(s, Tensor)}
    return {**shapes_of(tensors), **rest}
