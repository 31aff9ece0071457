"""The least rank at which a merge loses next to nothing, from the unconstrained merge alone.

Cutting a mean W* down to rank R loses its smallest singular values in the metric of the mean, and
what they add to its objective is known for every R at once, before any merge at a bounded rank is
made. Derivation: docs/fisher.md, "The rank of the result".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_merge.core import ColumnSpan
from manifold_merge.fisher import KroneckerFisher
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.fisher_low_rank import sides_of
from manifold_merge.fisher_two_sided import mean_output
from manifold_merge.linalg import adjoint
from manifold_merge.lora_metrics import Pair

__all__ = ["RANK_TOLERANCE", "RankChoice", "choose_rank", "parse_auto", "truncation_losses"]

# Share of what the unconstrained mean gains that a bounded rank may give up.
RANK_TOLERANCE = 0.01
# Losses below this are rounding of singular values, of factors in float32 at the best.
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class RankChoice:
    """The rank that was chosen for a merge, and what it costs.

    Attributes:
        rank: One rank for all modules.
        tolerance: The greatest loss that was allowed.
        losses: Mean loss over the modules at ranks 0, 1, ..., up to that of the unconstrained mean;
            never rising, and 0 at the end.
        worst: The module that loses most at this rank, and its loss.
        calibrated: Whether losses are those of layer outputs, measured by statistics.
    """

    rank: int
    tolerance: float
    losses: tuple[float, ...]
    worst: tuple[str, float]
    calibrated: bool

    @property
    def reason(self) -> str:
        """Why this rank, in one sentence."""
        what = "predicted effect" if self.calibrated else "squared norm"
        text = (
            f"it gives up {_percent(self.losses[self.rank])} of the {what} of the unconstrained "
            f"mean (rank {len(self.losses) - 1}), at most {_percent(self.tolerance)} allowed"
        )
        if self.rank > 1:
            text += f"; rank {self.rank - 1} would give up {_percent(self.losses[self.rank - 1])}"
        return text

    @property
    def recipe(self) -> dict[str, Any]:
        """What decided, for the record."""
        return {
            "tolerance": self.tolerance,
            "unconstrained_rank": len(self.losses) - 1,
            "loss": self.losses[self.rank],
            "loss_one_rank_below": self.losses[self.rank - 1],
            "worst_module": self.worst[0],
            "worst_loss": self.worst[1],
        }


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def parse_auto(rank: object) -> float | None:
    """The tolerance of ``"auto"`` or ``"auto=0.02"``; ``None`` for any other rank.

    Raises:
        ValueError: The tolerance is no number from 0 to 1.

    Example:
        >>> parse_auto("auto"), parse_auto("auto=0.05"), parse_auto(16)
        (0.01, 0.05, None)
    """
    if not isinstance(rank, str) or rank.partition("=")[0] != "auto":
        return None
    _, equals, value = rank.partition("=")
    if not equals:
        return RANK_TOLERANCE
    try:
        tolerance = float(value)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance <= 1:
        raise ValueError(
            "rank: auto takes the share of the unconstrained mean that may be given up, from 0 to "
            f"1, such as auto=0.02; got {rank!r}"
        )
    return tolerance


def choose_rank(
    losses: Mapping[str, Sequence[float]], tolerance: float, *, calibrated: bool = False
) -> RankChoice:
    """The least rank whose mean loss over the modules is within the tolerance.

    Args:
        losses: For each module, the losses at ranks 0, 1, ... (:func:`truncation_losses`), NaN
            where its updates are all zero. Beyond its last rank a module loses nothing.
        tolerance: The greatest mean loss that is allowed; 0 keeps all but rounding.
        calibrated: Whether losses were measured by statistics; it decides the words only.

    Returns:
        The rank, at least 1, and why.

    Example:
        >>> choice = choose_rank({"q": [1.0, 0.3, 0.0], "k": [1.0, 0.1, 0.02, 0.0]}, 0.05)
        >>> choice.rank, choice.losses
        (2, (1.0, 0.2, 0.01, 0.0))
        >>> print(choice.reason.partition(";")[0])
        it gives up 1 % of the squared norm of the unconstrained mean (rank 3), at most 5 % allowed
    """
    live = {name: list(x) for name, x in losses.items() if not math.isnan(x[0])}
    length = max([2, *(len(x) for x in losses.values())])
    padded = {name: x + [0.0] * (length - len(x)) for name, x in live.items()}
    table = torch.tensor(list(padded.values()) or [[0.0] * length], dtype=torch.float64)
    means = table.mean(0).tolist()
    allowed = max(tolerance, ROUNDING)
    rank = next(r for r in range(1, length) if means[r] <= allowed or r == length - 1)
    at = {name: x[rank] for name, x in padded.items()}
    worst = max(at, key=at.__getitem__, default=next(iter(losses), ""))
    return RankChoice(
        rank=rank,
        tolerance=tolerance,
        losses=tuple(means),
        worst=(worst, at.get(worst, 0.0)),
        calibrated=calibrated,
    )


@torch.no_grad()
def truncation_losses(
    mean: Pair, weights: Tensor | None = None, metrics: Sequence[KroneckerFisher] | None = None
) -> Tensor:
    """What cutting an unconstrained mean down to each rank gives up, as a share of what it gains.

    With W* the minimiser of f(W) = Σ wᵢ |W - Wᵢ|ᵢ² and W_R its best approximation of rank R in the
    mean metric, the loss at R is (f(W_R) - f(W*)) / (f(0) - f(W*)), that is, Σ wᵢ |W* - W_R|ᵢ² over
    Σ wᵢ |W*|ᵢ². With one side in all metrics these are sums of squared singular values, and no
    product of rank R loses less; with two sides the loss is an upper bound.

    Args:
        mean: B ``(..., m, K)`` and A ``(..., n, K)`` of W* = B Aᵀ.
        weights: ``(k,)`` or ``(k, ...)``, with sum 1, where there are metrics.
        metrics: One for each anchor; the Frobenius norm if ``None``.

    Returns:
        Losses at ranks 0 to K, ``(..., K + 1)``, from 1 down to 0; NaN where W* is zero.

    Example:
        >>> b, a = torch.eye(3), torch.diag(torch.tensor([2.0, 1.0, 1.0]))
        >>> truncation_losses((b, a))
        tensor([1.0000, 0.3333, 0.1667, 0.0000])
    """
    left = right = inputs = outputs = None
    shares = mean[0].new_ones(1) if weights is None else weights.to(mean[0])
    shares = shares.reshape((*shares.shape, *(1,) * (mean[0].ndim - 1 - shares.ndim)))
    if metrics is not None:
        inputs, outputs = sides_of(metrics)
        left = None if outputs is None else mean_output(inputs, outputs, shares)
        right = None if inputs is None else MetricFactor.sum(inputs, shares)
    span_b, span_a = (
        ColumnSpan([x if side is None else side.whiten(x)])
        for x, side in zip(mean, (left, right), strict=True)
    )
    x, s, y = torch.linalg.svd(
        span_b.coordinates[0] @ adjoint(span_a.coordinates[0]), full_matrices=False
    )
    if left is None or right is None:
        cut = s.square().flip(-1).cumsum(-1).flip(-1)
    else:
        # The metrics differ from their mean: what is cut is measured in each, and the products
        # <b_j a_jᵀ, b_k a_kᵀ> of all its parts are added up from the last rank on.
        assert inputs is not None
        assert outputs is not None
        root = s.sqrt()[..., None, :]
        b = left.unwhiten(span_b.expand(x * root))
        a = right.unwhiten(span_a.expand(adjoint(y) * root))
        terms = [
            w[..., None, None] * (adjoint(b) @ (g @ b)) * (adjoint(a) @ (h @ a))
            for w, g, h in zip(shares, outputs, inputs, strict=True)
        ]
        corners = torch.stack(terms).sum(0).flip(-2, -1).cumsum(-2).cumsum(-1)
        cut = corners.diagonal(dim1=-2, dim2=-1).flip(-1).clamp(min=0)
        cut = cut.cummin(-1).values  # a product of a lower rank is one of this rank too
    whole = cut[..., :1]
    cut = torch.nn.functional.pad(cut, (0, mean[0].shape[-1] + 1 - cut.shape[-1]))
    return (cut / torch.where(whole > 0, whole, math.nan)).to(mean[0].dtype)
