"""What a Fréchet mean returns: the point, and a certificate of how good it is."""

from __future__ import annotations

import dataclasses
import enum

from torch import Tensor

__all__ = ["FrechetSolution", "Status"]


class Status(enum.IntEnum):
    """How an iteration ended, from best to worst."""

    CONVERGED = 0
    STALLED = 1
    MAX_ITERATIONS = 2
    CANCELLED = 3


_REMEDIES = {
    Status.CONVERGED: "converged",
    Status.STALLED: (
        "no step lowers the objective although the gradient is not zero: anchors lie beyond the "
        "injectivity radius, or rounding dominates. Loosen `tolerance`, compute in float64, or "
        "choose a distance that is defined everywhere (distance='chordal')"
    ),
    Status.MAX_ITERATIONS: "stopped early: raise `max_iterations` or loosen `tolerance`",
    Status.CANCELLED: (
        "opposite anchors cancel, no direction is left and the mean is zero: leave one of them "
        "out, or choose a distance that has zero as a mean (distance='chordal')"
    ),
}


@dataclasses.dataclass(frozen=True)
class FrechetSolution:
    """A Fréchet mean with its certificate.

    Attributes:
        point: The mean, ``(..., *point)``.
        objective: Σ wᵢ d(x, xᵢ)ᵖ at the mean, of the batch shape.
        gradient_norm: Length of Σ wᵢ log_x(xᵢ) (p = 2), or of Σ wᵢ log_x(xᵢ)/d(x, xᵢ) less what
            the anchors at x can balance (p = 1); zero at a stationary point. Batch shape.
        iterations: Iterations taken by each batch element.
        status: :class:`Status` of each batch element, as integers of the batch shape.
        weights: The normalised weights, ``(k, ...)``.
        solver: The solver that ran.
        paths: How many of the (anchor, batch element) logarithms were found in which way, for
            manifolds that distinguish ways (``LoRAQuotient.log_path``).
        gauge_residual: Relative difference of the mean recomputed from randomly chosen
            representatives of the anchors, of the batch shape; ``None`` unless asked for.
    """

    point: Tensor
    objective: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    status: Tensor
    weights: Tensor
    solver: str
    paths: dict[str, int] = dataclasses.field(default_factory=dict)
    gauge_residual: Tensor | None = None

    @property
    def converged(self) -> bool:
        """Whether every batch element converged."""
        return bool((self.status == Status.CONVERGED).all())

    @property
    def message(self) -> str:
        """What happened to the worst batch element, and the remedy."""
        worst = Status(int(self.status.max())) if self.status.numel() else Status.CONVERGED
        count = int((self.status == worst).sum())
        text = _REMEDIES[worst]
        if worst != Status.CONVERGED:
            text = f"{count} of {self.status.numel()} elements: {text}"
        return text

    def __str__(self) -> str:
        residual = self.gauge_residual
        rows = [
            ("solver", self.solver),
            ("objective", f"{float(self.objective.sum()):.6g}"),
            ("gradient norm", f"{float(self.gradient_norm.max()):.2e}"),
            ("iterations", str(int(self.iterations.max()))),
            ("status", self.message),
        ]
        if self.paths:
            rows.append(("logarithms", ", ".join(f"{v} {k}" for k, v in self.paths.items())))
        if residual is not None:
            rows.append(("gauge residual", f"{float(residual.max()):.2e}"))
        return "FrechetSolution(" + "; ".join(f"{k}: {v}" for k, v in rows) + ")"
