"""Rebasing one network onto another: the same function, in the other's order of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manifold_merge.network_gauges import (
    apply_gauges,
    balancing_element,
    inverse_gauges,
    matrix_gauges,
)
from manifold_merge.network_layout import NetworkLayout, named_element, shapes_of
from manifold_merge.network_matching import METHODS, Matching, coordinate_descent
from manifold_merge.network_synchronize import match_networks
from manifold_merge.rescaling import positive_gauges, unit_gauges
from manifold_merge.symmetry import GaugeGroup, NetworkSymmetry

__all__ = ["Alignment", "align"]


@dataclass(frozen=True)
class Alignment:
    """A network brought close to another by its symmetries.

    Attributes:
        state: State dict of the same function as the given one, in the order of the target.
        permutations: For each set p, ``(count,)``: element p[e] was brought to place e.
        distance_before: Distance of the two networks as they were given.
        distance_after: Distance of ``state`` to the target, in the same metric.
        method: How the permutations were found.
    """

    state: dict[str, Tensor]
    permutations: dict[str, Tensor]
    distance_before: float
    distance_after: float
    method: str

    def __str__(self) -> str:
        moved = sum(
            int((p != torch.arange(len(p), device=p.device)).sum())
            for p in self.permutations.values()
        )
        total = sum(len(p) for p in self.permutations.values())
        return (
            f"Alignment({self.method}: distance {self.distance_before:.6g} -> "
            f"{self.distance_after:.6g}; {moved} of {total} elements in "
            f"{len(self.permutations)} sets moved)"
        )


def align(
    state: Mapping[str, Tensor],
    to: Mapping[str, Tensor],
    symmetry: NetworkSymmetry,
    *,
    method: str = "anneal",
    rescale: bool | Literal["auto"] = "auto",
    basis: bool | Literal["auto"] = "auto",
    fisher: Mapping[str, Tensor] | None = None,
    to_fisher: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    steps: int = 40,
    starts: int = 1,
    seed: int = 0,
) -> Alignment:
    """Rebase a network onto another: bring it as close as possible by symmetries alone.

    Units are reordered, positive scales and the bases inside heads brought to those of the target.

    All tensors move, running statistics included, and the function stays the same. What is
    minimised is the distance of the parameters, biases included; or, with ``fisher``, the distance
    weighted by the networks' own diagonal Fisher information, Σ ½(f + f') (θ - θ')², in which f
    moves with its network; or, with ``scores``, nothing but the given scores are maximised.

    Args:
        state: State dict of the network to be rebased.
        to: State dict of the network that stays.
        symmetry: The symmetry of both.
        method: ``"anneal"``, ``"coordinate"`` (coordinate descent, as Git Re-Basin's weight
            matching) or ``"frank_wolfe"``.
        rescale: Remove positive rescaling of units too: balanced representatives are matched, and
            the result has the scales of ``to``. The reported distances are plain ones, between
            the given scales, which this does not minimise. ``"auto"``: those of units with
            weights of their own, not of a norm's gains, and none with a Fisher metric, which
            belongs to the scales given.
        basis: Remove changes of basis too, GL(d) inside heads and scaled rotations under rotary
            positions, in the same way. ``"auto"``: wherever the symmetry has such gauges, unless
            there is a Fisher metric, in which turned coordinates have no diagonal.
        fisher: Diagonal Fisher information of ``state``, by name.
        to_fisher: Diagonal Fisher information of ``to``, by name.
        scores: How well element i of ``to`` fits element j of ``state``, ``(count, count)`` for
            each set by name: activation matching, with
            :func:`manifold_merge.activation_scores`.
        steps: Temperatures of ``"anneal"``.
        starts: Starts; the closest representative wins.
        seed: Seed of random starts.

    Returns:
        The rebased state dict, with permutations and distances.

    Raises:
        ValueError: If the networks do not fit each other or the symmetry, or options contradict.

    Source: Ainsworth, Hayase and Srinivasa, *Git Re-Basin*, arXiv:2209.04836.

    Example:
        >>> import torch
        >>> from manifold_merge import align, symmetry_of
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> symmetry = symmetry_of(model, torch.randn(5, 3))
        >>> state = model.state_dict()
        >>> other = symmetry.permute(state, {"0": torch.randperm(8)})
        >>> float(align(other, to=state, symmetry=symmetry).distance_after)
        0.0
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if scores is not None and (fisher is not None or to_fisher is not None):
        raise ValueError("scores: activation matching uses no weights, so no fisher; leave one out")
    given = fisher is not None or to_fisher is not None
    scales, basis = chosen_gauges(symmetry, rescale, basis, fisher=given, name="rescale")
    plain = checked_layout(symmetry, {"state": state, "to": to})
    layout = NetworkLayout(symmetry, plain.shapes, bases=True) if basis else plain
    balancing = [
        balancing_element(each, symmetry, scales=scales, bases=basis) for each in (to, state)
    ]
    first, second = (
        apply_gauges(each, symmetry, element)
        for each, element in zip((to, state), balancing, strict=True)
    )
    x, y = (_working(layout.pack(each)) for each in (first, second))
    metrics = [None if f is None else layout.pack(f).to(x) for f in (to_fisher, fisher)]
    if scores is None:
        matching = Matching(layout, *fisher_channels(x, y, *metrics))
    else:
        _check_scores(scores, plain)
        matching = Matching(plain, torch.zeros_like(x)[None], y[None], scores)
    orders = match_networks(matching, method=method, steps=steps, starts=starts, seed=seed)
    if scores is not None and basis:  # the scores order the units; weights turn the bases
        matching = Matching(layout, x[None], y[None])
        eyes = [torch.eye(n, dtype=y.dtype) for n in layout.counts[: layout.gauges]]
        orders, _ = coordinate_descent(matching, [*eyes, *orders], only=range(layout.gauges))
    element = named_element(layout, orders)
    if balancing[0] or balancing[1]:
        # In double precision, so that what only was permuted comes back exactly.
        exact = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
        moved = symmetry.apply(apply_gauges(exact, symmetry, balancing[1]), element)
        moved = apply_gauges(moved, symmetry, inverse_gauges(balancing[0]))
        moved = {name: t.to(state[name].dtype) for name, t in moved.items()}
        moved |= {n: moved[o] for n, o in symmetry.aliases.items() if n in moved and o in moved}
    else:
        moved = symmetry.apply(state, element)
    target, before, after = (_working(layout.pack(z)) for z in (to, state, moved))
    weight = _weight(metrics[0], metrics[1])
    at_first = _distance(target, before, weight)
    if metrics[1] is not None:
        metrics[1] = layout.permute(metrics[1], orders)
        weight = _weight(metrics[0], metrics[1])
    return Alignment(
        state=dict(moved),
        permutations=dict(element.permutations),
        distance_before=at_first,
        distance_after=_distance(target, after, weight),
        method=method if scores is None else f"{method}, given scores",
    )


def fisher_channels(
    x: Tensor, y: Tensor, fisher_x: Tensor | None, fisher_y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Channels (φ, ψ) with <φ, g ψ> = -½ Σ f (x - g y)² up to a constant, f = ½(f_x + g f_y).

    A metric that moves with its network makes an assignment problem like any other: the square is
    multiplied out, and each term is a product of something of x and something of y.

    Args:
        x: The network that stays, ``(N,)``.
        y: The network to be reordered, ``(N,)``.
        fisher_x: Its metric, ``(N,)``; that of the other alone if ``None``.
        fisher_y: Its metric, ``(N,)``; that of the other alone if ``None``.

    Returns:
        φ and ψ, ``(c, N)`` each; one channel without metrics.
    """
    if fisher_x is None and fisher_y is None:
        return x[None], y[None]
    left, right = [], []
    share = 0.5 if fisher_x is not None and fisher_y is not None else 1.0
    if fisher_x is not None:
        left += [share * fisher_x * x, share * fisher_x]
        right += [y, -0.5 * y * y]
    if fisher_y is not None:
        left += [x, -0.5 * x * x]
        right += [share * fisher_y * y, share * fisher_y]
    return torch.stack(left), torch.stack(right)


def chosen_gauges(
    symmetry: NetworkSymmetry,
    scales: bool | str,
    bases: bool | str,
    *,
    fisher: bool,
    name: str,
) -> tuple[tuple[GaugeGroup, ...], bool]:
    """Which scales and whether bases are removed; ``"auto"`` means where it helps.

    Raises:
        ValueError: If there are none where they are asked for, or bases meet a Fisher metric.
    """
    for option, value in ((name, scales), ("basis", bases)):
        if value not in (True, False, "auto"):
            raise ValueError(f"{option}: expected True, False or 'auto', got {value!r}")
    if scales is True and not positive_gauges(symmetry):
        raise ValueError(f"{name}=True: the symmetry has no positive gauge; leave it out")
    if bases is True and not matrix_gauges(symmetry):
        raise ValueError("basis=True: the symmetry has no basis to change; leave it out")
    if bases is True and fisher:
        raise ValueError(
            "basis=True: a diagonal Fisher metric belongs to one basis; leave either out"
        )
    if bases == "auto":
        bases = bool(matrix_gauges(symmetry)) and not fisher
    if scales == "auto":
        return (() if fisher else unit_gauges(symmetry)), bool(bases)
    return (positive_gauges(symmetry) if scales else ()), bool(bases)


def checked_layout(
    symmetry: NetworkSymmetry, states: Mapping[str, Mapping[str, Tensor]]
) -> NetworkLayout:
    """The layout of several state dicts of one network, which must agree in names and shapes."""
    first, *others = states
    shapes = shapes_of(states[first])
    for name in others:
        other = shapes_of(states[name])
        if other != shapes:
            differ = sorted(n for n in {*shapes, *other} if shapes.get(n) != other.get(n))
            raise ValueError(
                f"{name}: {differ[0]} has shape {other.get(differ[0])}, in {first} it has "
                f"{shapes.get(differ[0])} ({len(differ)} tensors differ); networks of one "
                "architecture are expected"
            )
    for name, state in states.items():
        for key, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                raise ValueError(f"{name}: {key} has {bad} entries that are NaN or infinite")
    return NetworkLayout(symmetry, shapes)


def _check_scores(scores: Mapping[str, Tensor], layout: NetworkLayout) -> None:
    for name, count in zip(layout.names, layout.counts, strict=True):
        if name not in scores:
            raise ValueError(f"scores: the set {name!r} is missing; give a matrix for each set")
        if tuple(scores[name].shape) != (count, count):
            raise ValueError(
                f"scores: expected ({count}, {count}) for {name!r}, got {tuple(scores[name].shape)}"
            )


def _working(vector: Tensor) -> Tensor:
    """Half precision has too few digits to tell close units apart."""
    return vector.float() if vector.dtype in (torch.float16, torch.bfloat16) else vector


def _weight(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return 0.5 * (first + second)


def _distance(x: Tensor, y: Tensor, weight: Tensor | None) -> float:
    squares = (x - y).double().square()
    return float((squares if weight is None else weight * squares).sum().sqrt())
