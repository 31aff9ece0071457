"""The mean of whole networks, with everything that is no parameter taken along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manifold_merge.frechet import frechet_mean, normalized_weights
from manifold_merge.network_align import checked_layout, chosen_gauges
from manifold_merge.network_gauges import apply_gauges, balancing_element, inverse_gauges
from manifold_merge.network_layout import is_running_statistic, named_element, shapes_of
from manifold_merge.network_quotient import NetworkQuotient
from manifold_merge.solution import FrechetSolution
from manifold_merge.symmetry import NetworkSymmetry, Placement, SymmetryElement

__all__ = ["NetworkMerge", "merge_networks"]

# Names of responses among the parameters; no module can have one.
_RESPONSES = "responses: "
# Permutations are found in finitely many steps, bases in ever smaller ones. A gradient of this
# share of the networks' distance leaves an objective that is right to its square.
BASIS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class NetworkMerge:
    """The mean of networks.

    Attributes:
        state: State dict of the mean.
        solution: The certificate: objective (the Fréchet variance), convergence and remedy.
        permutations: For each network, by the name of the set, the permutation that aligned it.
        aligned: State dicts of the given networks' functions, each aligned to the mean, in the
            gauges of the network that was held while the others were matched to it.
    """

    state: dict[str, Tensor]
    solution: FrechetSolution
    permutations: tuple[dict[str, Tensor], ...]
    aligned: tuple[dict[str, Tensor], ...]

    def __repr__(self) -> str:
        """One line; tensors are left to the attributes."""
        return (
            f"NetworkMerge(networks: {len(self.aligned)}; tensors: {len(self.state)}; "
            f"permuted sets: {len(self.permutations[0]) if self.permutations else 0}; "
            f"{self.solution})"
        )


def merge_networks(
    states: Sequence[Mapping[str, Tensor]],
    symmetry: NetworkSymmetry,
    weights: Sequence[float] | Tensor | None = None,
    *,
    balance: bool | Literal["auto"] = "auto",
    basis: bool | Literal["auto"] = "auto",
    fisher: Mapping[str, Tensor] | None = None,
    responses: Sequence[Mapping[str, Tensor]] | None = None,
    response_scale: float = 1.0,
    method: str = "anneal",
    steps: int = 40,
    starts: int = 1,
    seed: int = 0,
    p: int = 2,
    max_iterations: int | None = None,
) -> NetworkMerge:
    """Average networks modulo the order and the scale of their units and the bases of their heads.

    The mean is :func:`manifold_merge.frechet_mean` on :class:`manifold_merge.NetworkQuotient`:
    Σ wᵢ d²(x, xᵢ) is least, whatever the order of the networks or of the units inside them. The
    alignments are cycle-consistent, as each network is aligned to the mean. Running statistics are
    averaged in aligned order; that is a start, and
    :func:`manifold_merge.reestimate_batch_norm` does better if there is data.

    Args:
        states: State dicts of networks of one architecture.
        symmetry: Their symmetry, from :func:`manifold_merge.symmetry_of`.
        weights: ``(k,)``; normalised to sum 1. Equal if ``None``.
        balance: Remove positive rescaling of units as well. ``"auto"``: of units with weights of
            their own, not of a norm's gains, and none with a Fisher metric, which belongs to the
            scales given.
        basis: Remove changes of basis inside heads as well, GL(d) or, under rotary positions,
            scaled rotations; ``"auto"``: wherever there are any, and no Fisher metric.
        fisher: Diagonal metric that all networks share; it is averaged over permutations.
        responses: For each network the responses of its units to the same data, from
            :func:`manifold_merge.unit_responses`: further coordinates of the units, so that both
            weights and activations decide which units belong together.
        response_scale: What a correlation of 1 is worth, in units of squared parameters.
        method: ``"anneal"``, ``"coordinate"`` or ``"frank_wolfe"``.
        steps: Temperatures of ``"anneal"``.
        starts: Starts of the matching.
        seed: Seed of random starts.
        p: 2 for the mean, 1 for the geometric median.
        max_iterations: Greatest number of iterations of align-and-average.

    Returns:
        The mean with its certificate, and the networks aligned to it.

    Raises:
        ValueError: If the networks do not fit each other or the symmetry.

    Source: Ainsworth et al., arXiv:2209.04836 (MergeMany); Crisostomi et al., arXiv:2405.17897
    (C2M3); as Karcher's iteration: docs/permutations.md.

    Example:
        >>> import torch
        >>> from manifold_merge import merge_networks, symmetry_of
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> symmetry = symmetry_of(model, torch.randn(5, 3))
        >>> state = model.state_dict()
        >>> copies = [symmetry.permute(state, {"0": torch.randperm(8)}) for _ in range(3)]
        >>> float(merge_networks(copies, symmetry).solution.objective) < 1e-9
        True
    """
    if not states:
        raise ValueError("states: at least one network is needed, got none")
    for i, state in enumerate(states):
        if not isinstance(state, Mapping):
            kind = type(state).__name__
            raise ValueError(f"states[{i}]: got a {kind}; pass network.state_dict()")
    checked_layout(symmetry, {f"states[{i}]": state for i, state in enumerate(states)})
    shares = normalized_weights(weights, len(states), like=torch.zeros(1, dtype=torch.float64))
    if shares.ndim != 1:
        raise ValueError(f"weights: expected ({len(states)},), got {tuple(shares.shape)}")
    options = {"method": method, "steps": steps, "starts": starts, "seed": seed}
    scales, bases = chosen_gauges(
        symmetry, balance, basis, fisher=fisher is not None, name="balance"
    )
    balancing = [balancing_element(s, symmetry, scales=scales, bases=bases) for s in states]
    # Half precision is left once and entered once.
    wide = [{name: _widened(t) for name, t in s.items()} for s in states]
    full = [apply_gauges(s, symmetry, e) for s, e in zip(wide, balancing, strict=True)]
    extended, packed = symmetry, full
    if responses is not None:
        if len(responses) != len(states):
            raise ValueError(f"responses: expected {len(states)}, got {len(responses)}")
        extended = _with_responses(symmetry)
        packed = [
            {**s, **{_RESPONSES + n: response_scale**0.5 * t for n, t in r.items()}}
            for s, r in zip(full, responses, strict=True)
        ]
        if fisher is not None:
            ones = {_RESPONSES + n: torch.ones_like(t) for n, t in responses[0].items()}
            fisher = {**fisher, **ones}
    shapes = shapes_of(packed[0])
    quotient = NetworkQuotient(extended, shapes, basis=bases, **options)  # type: ignore[arg-type]
    if fisher is not None:
        metric = quotient.symmetrize(fisher)
        quotient = NetworkQuotient(extended, shapes, fisher=metric, **options)  # type: ignore[arg-type]
    points = torch.stack([quotient.layout.pack(s) for s in packed]).detach()
    quotient, points, _ = quotient.reduce(list(points))  # the memory survives the mean
    tolerance = max(BASIS_TOLERANCE, torch.finfo(points.dtype).eps ** (2 / 3)) if bases else None
    solution = frechet_mean(
        quotient, points, shares.to(points), solver="karcher", p=p, tolerance=tolerance,
        max_iterations=max_iterations,
    )  # fmt: skip
    orders = quotient.recall(solution.point, points)
    elements = [named_element(quotient.layout, each) for each in orders]
    aligned = tuple(symmetry.apply(s, e) for s, e in zip(full, elements, strict=True))
    mean = {
        name: t.to(wide[0][name].dtype)
        for name, t in quotient.unpack(solution.point).items()
        if name in states[0]
    }
    merged = {**mean, **_other_entries(aligned, shares, mean)}
    # Gauges act linearly: mean and aligned networks go to those of the network that stayed.
    # Its bases may have turned a little with the mean; of several the longest is taken, as there.
    stayed = [i for i, each in enumerate(elements) if _keeps_order(each)]
    if stayed and any(balancing):
        held = max(stayed, key=lambda i: float(points[i].double().square().sum()))
        for turned in (elements[held].gauges, balancing[held]):
            back = inverse_gauges(turned)
            merged = apply_gauges(merged, symmetry, back)
            aligned = tuple(apply_gauges(each, symmetry, back) for each in aligned)
    for name, original in symmetry.aliases.items():
        if name in states[0]:
            merged[name] = merged[original]
    return NetworkMerge(
        state={name: merged[name].to(t.dtype, copy=True) for name, t in states[0].items()},
        solution=solution,
        permutations=tuple(dict(e.permutations) for e in elements),
        aligned=tuple(
            {name: each[name].to(t.dtype) for name, t in given.items()}
            for each, given in zip(aligned, states, strict=True)
        ),
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _keeps_order(element: SymmetryElement) -> bool:
    return all(
        torch.equal(order, torch.arange(len(order))) for order in element.permutations.values()
    )


def _with_responses(symmetry: NetworkSymmetry) -> NetworkSymmetry:
    """Each set also reorders the rows of a tensor with the responses of its elements."""
    sets = tuple(
        dataclasses.replace(
            each, placements=(*each.placements, Placement(_RESPONSES + each.name, 0))
        )
        for each in symmetry.sets
    )
    return dataclasses.replace(symmetry, sets=sets)


def _other_entries(
    aligned: Sequence[Mapping[str, Tensor]], weights: Tensor, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Averages of running statistics; of counters and constants, the first network's."""
    entries = {}
    for name, first in aligned[0].items():
        if name in known:
            continue
        entries[name] = first
        if first.is_floating_point() and is_running_statistic(name):
            tensors = [s[name].double() for s in aligned]
            total = sum(w * t for w, t in zip(weights.to(first.device), tensors, strict=True))
            entries[name] = torch.as_tensor(total).to(first.dtype)
    return entries
