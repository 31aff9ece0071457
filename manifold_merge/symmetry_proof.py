"""Proof by test: act with random group elements and compare the network's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from manifold_merge.symmetry import NetworkSymmetry, SymmetryElement, SymmetryError
from manifold_merge.symmetry_trace import exact, tensors_of

__all__ = ["Prover", "prove"]


class Prover:
    """A copy of a model in float64 with random parameters, and its outputs.

    Norm weights of one and biases of zero would hide errors, so every parameter is disturbed, and
    those that are constant are drawn anew.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        options: Mapping[str, Any],
        output: Callable[[Any], Any] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                # Cached keys and values are no output: their axes may move.
                config.use_cache = False  # type: ignore[union-attr]
            if hasattr(config, "_experts_implementation"):
                # Of the implementations of one function, the one that runs in float64.
                config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
        self.inputs = tree_map(_double, tuple(inputs))
        self.options = tree_map(_double, dict(options))
        self._output = output
        self.generator = torch.Generator().manual_seed(seed)
        state = self.model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                first.setdefault(id(tensor), name)
        # A tensor that is shared is listed once; functional_call replaces it everywhere.
        self.state = {name: state[name].detach() for name in first.values()}
        for size in (1.0, 0.1, 0.0):
            # A parameter may have to stay in its range: a variance, a logarithm.
            _disturb(self.model, self.generator, size)
            self.reference = self._run(self.state)
            if all(bool(torch.isfinite(each).all()) for each in self.reference):
                return
            self.model.load_state_dict(model.state_dict())
        raise SymmetryError(
            "the model's outputs on the example inputs are not finite: give other inputs"
        )

    def _run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        with exact():
            result = functional_call(self.model, dict(state), self.inputs, self.options)
        if self._output is not None:
            result = self._output(result)
        outputs = [t.detach() for t in tensors_of(result) if t.is_floating_point()]
        if not outputs:
            raise SymmetryError("the model returns no floating-point tensor: pass output=")
        return outputs

    def change(self, symmetry: NetworkSymmetry, element: SymmetryElement) -> float:
        """Largest change of an output, relative to the largest output."""
        moved = self._run(symmetry.apply(self.state, element))
        worst = 0.0
        for now, before in zip(moved, self.reference, strict=True):
            if now.shape != before.shape:
                return float("inf")
            scale = max(float(before.abs().max()), 1e-30) if before.numel() else 1.0
            gap = float((now - before).abs().max()) / scale if before.numel() else 0.0
            worst = max(worst, gap if gap == gap else float("inf"))
        return worst

    def thorough(self, symmetry: NetworkSymmetry) -> SymmetryElement:
        """A random element that leaves no element of any set in place."""
        element = symmetry.random(self.generator)
        cycles = {
            name: order[(torch.argsort(order) + 1) % len(order)]
            for name, order in element.permutations.items()
        }
        return SymmetryElement(cycles, element.gauges)

    def failures(self, symmetry: NetworkSymmetry, tolerance: float) -> dict[str, float]:
        """Sets and gauges whose action changes the outputs, and by how much.

        All act together first; only if that changes something, parts of them act alone.
        """
        if not symmetry.members:
            return {}
        element = self.thorough(symmetry)
        if self.change(symmetry, element) <= tolerance:
            return {}
        parts = [
            (kind, name, value)
            for kind in ("permutations", "gauges")
            for name, value in getattr(element, kind).items()
        ]
        found = self._culprits(symmetry, parts, tolerance)
        return found or {"all together": self.change(symmetry, element)}

    def _culprits(
        self, symmetry: NetworkSymmetry, parts: list[tuple[str, str, Tensor]], tolerance: float
    ) -> dict[str, float]:
        """The parts of an element that change the outputs, by halving."""
        chosen: dict[str, dict[str, Tensor]] = {"permutations": {}, "gauges": {}}
        for kind, name, value in parts:
            chosen[kind][name] = value
        change = self.change(symmetry, SymmetryElement(**chosen))
        if change <= tolerance:
            return {}
        if len(parts) == 1:
            return {parts[0][1]: change}
        half = len(parts) // 2
        first = self._culprits(symmetry, parts[:half], tolerance)
        return first | self._culprits(symmetry, parts[half:], tolerance)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _disturb(model: nn.Module, generator: torch.Generator, size: float) -> None:
    """Make every parameter and running statistic generic."""

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return size * drawn.to(tensor.device)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                # As large as weights that keep the size of activations: in a fresh transformer
                # the scores of attention are nearly constant, which hides errors.
                fan_in = parameter.numel() / parameter.shape[0] if parameter.ndim > 1 else 10.0
                parameter.add_(noise(parameter) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(torch.exp(0.3 * noise(buffer)))


def prove(
    model: nn.Module,
    symmetry: NetworkSymmetry,
    *inputs: Any,
    output: Callable[[Any], Any] | None = None,
    tolerance: float = 1e-8,
    seed: int = 0,
    **options: Any,
) -> float:
    """Check that a symmetry leaves a model's function as it is.

    A random element acts on a copy of the model in float64, with generic parameters, and the
    outputs on the example inputs are compared.

    Args:
        model: The network.
        symmetry: What to check, derived or written by hand.
        *inputs: Example inputs of the model.
        output: What of the model's result counts as output; all tensors if ``None``.
        tolerance: Largest change allowed, relative to the largest output.
        seed: Of the random element and parameters.
        **options: Keyword inputs of the model.

    Returns:
        The largest change of an output, relative to the largest output.

    Raises:
        SymmetryError: If the specification does not fit the model, or if a set or gauge changes
            the outputs when it acts alone; the message names it and the tensors it moves.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> from manifold_merge import symmetry_of
        >>> symmetry = symmetry_of(model, torch.randn(5, 3))
        >>> prove(model, symmetry, torch.randn(5, 3)) < 1e-12
        True
    """
    prover = Prover(model, inputs, options, output, seed=seed)
    symmetry.check(prover.state)
    failures = prover.failures(symmetry, tolerance)
    if failures:
        raise SymmetryError(explain(symmetry, failures))
    return prover.change(symmetry, prover.thorough(symmetry))


def explain(symmetry: NetworkSymmetry, failures: Mapping[str, float]) -> str:
    """An error message that names what changed the function."""
    lines = ["the function of the model changes under"]
    known = {each.name: each for each in symmetry.members}
    for name, change in failures.items():
        tensors = dict.fromkeys(p.tensor for p in known[name].placements) if name in known else {}
        places = ", ".join(list(tensors)[:6])
        lines.append(f"  {name!r}: by {change:.1e} relative to the outputs; it moves {places}")
    lines.append("correct these sets, or leave them out with symmetry.without(name)")
    return "\n".join(lines)
