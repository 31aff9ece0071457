"""Derive the symmetry group of a network from one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from manifold_merge.symmetry import NetworkSymmetry, SymmetryError
from manifold_merge.symmetry_build import build
from manifold_merge.symmetry_experts import with_experts
from manifold_merge.symmetry_proof import Prover, explain
from manifold_merge.symmetry_trace import trace

__all__ = ["symmetry_of"]


def symmetry_of(
    model: nn.Module,
    *inputs: Any,
    output: Callable[[Any], Any] | None = None,
    verify: bool = True,
    tolerance: float = 1e-8,
    unused: Literal["error", "freeze"] = "error",
    **options: Any,
) -> NetworkSymmetry:
    """The permutations and changes of basis that leave a network's function as it is.

    The forward pass is followed operation by operation on a copy of the model. Axes that an
    operation combines are reordered together; axes that reach the inputs or outputs, or an
    operation that is not understood, are frozen, with the reason in ``symmetry.frozen``.

    Args:
        model: Any network. It is not changed.
        *inputs: Example inputs; every part of the network that matters should take part.
        output: What of the model's result counts as output, such as ``lambda out: out.logits``;
            all tensors of the result if ``None``.
        verify: Whether to prove the result: random elements act, the outputs are compared.
        tolerance: Largest relative change of the outputs that a proof allows, in float64.
        unused: What to do about parameters that the example inputs do not use: an error, since
            other inputs may, or freeze them.
        **options: Keyword inputs of the model.

    Returns:
        The symmetry group, proved for this model.

    Raises:
        SymmetryError: If there are no example inputs, if something that was derived changes the
            function, or if parameters are not used; the message names them.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(symmetry_of(model, torch.randn(5, 3)).describe(frozen=False))
        permuted sets
          0  8  0.weight[0], 0.bias[0], 2.weight[1]
        gauge groups
          0.scale  R+(8)  0.weight[0], 0.bias[0], 2.weight[1]^-T
    """
    if not inputs and not options:
        try:
            inspect.signature(model.forward).bind()
        except TypeError as error:
            raise SymmetryError(
                f"inputs: give example inputs, symmetry_of(model, x): {error} of model.forward"
            ) from error
    prover = Prover(model, inputs, options, output)
    found = trace(prover.model, prover.inputs, prover.options, output)
    sets, gauges, frozen = build(found)
    symmetry = NetworkSymmetry(sets, gauges, found.shapes, found.aliases, frozen)
    # Rotations are suggested by the structure of the computation; not all are confirmed.
    for name in prover.failures(symmetry.only("rotation"), tolerance):
        if name in {gauge.name for gauge in symmetry.gauges}:
            symmetry = symmetry.without(name)
    symmetry, completed = with_experts(prover, found, symmetry, tolerance)
    missing = [name for name in found.unused if name not in completed]
    if missing and unused == "error":
        raise SymmetryError(
            f"the example inputs do not use all of {', '.join(missing[:8])}"
            f"{f' and {len(missing) - 8} more' if len(missing) > 8 else ''}, so their symmetries "
            f"cannot be seen: give inputs that do, or unused='freeze' if no input ever does"
        )
    symmetry = _trimmed(symmetry)
    symmetry.check(prover.state)
    if verify:
        failures = prover.failures(symmetry, tolerance)
        if failures:
            raise SymmetryError(explain(symmetry, failures))
    return symmetry


def _trimmed(symmetry: NetworkSymmetry) -> NetworkSymmetry:
    """The same group; only what it touches is listed in shapes and aliases."""
    touched = {p.tensor for each in symmetry.members for p in each.placements}
    touched |= {name for each in symmetry.sets for names in each.tensors for name in names}
    shapes = {name: shape for name, shape in symmetry.shapes.items() if name in touched}
    aliases = {alias: name for alias, name in symmetry.aliases.items() if name in touched}
    return replace(symmetry, shapes=shapes, aliases=aliases)
