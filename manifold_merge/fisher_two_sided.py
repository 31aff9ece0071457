"""Products of a given rank that minimise Σ wᵢ tr(Lᵢ(W - Wᵢ)Gᵢ(W - Wᵢ)ᵀ), by alternating solves.

The objective is quadratic in B for fixed A and the other way round. Before that, the problem is
solved among the products whose columns and rows lie in the spans of the anchors and of their images
under the metrics: matrices of size 2 Σ rᵢ, whatever the size of the layer. On adapters that leaves
so little to do that one or two rounds at full size suffice. Derivation: docs/fisher.md, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_merge.conjugate_gradient import conjugate_gradient
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.linalg import adjoint
from manifold_merge.lora_metrics import Pair
from manifold_merge.solution import Status

__all__ = ["TwoSided", "mean_output"]

# Steps of conjugate gradients within one round of the alternating solver, in the small problem
# without a bound on the rank, and rounds in the small problem: fixed numbers, as a threshold could
# be met a step earlier in one gauge than in another.
INNER_ITERATIONS = 4
SMALL_ITERATIONS = 12
SMALL_ROUNDS = 3
# Larger dense Grams are not copied into one tensor.
STACKED_FEATURES = 1024

Sides = tuple[Sequence[MetricFactor], Sequence[MetricFactor]]


def mean_output(
    inputs: list[MetricFactor] | None, outputs: list[MetricFactor], weights: Tensor
) -> MetricFactor:
    """Output Grams averaged by the share of the metric's trace that their anchor has."""
    if inputs is None:
        return MetricFactor.sum(outputs, weights)
    traces = torch.stack([w * g.trace() for w, g in zip(weights, inputs, strict=True)])
    return MetricFactor.sum(outputs, traces / traces.sum(0))


class _Stack:
    """The Grams of one side of all anchors, applied in one product where they have one form."""

    def __init__(self, grams: Sequence[MetricFactor], dimensions: int) -> None:
        self.grams = grams
        self.dimensions = dimensions
        self.parts: list[Tensor] = []
        names = ("matrix",) if grams[0].matrix is not None else ("low_rank", "remainder")
        tensors = [[getattr(gram, name) for gram in grams] for name in names]
        same = all(x is not None and x.shape == each[0].shape for each in tensors for x in each)
        if same and (names[0] != "matrix" or grams[0].features <= STACKED_FEATURES):
            for name, each in zip(names, tensors, strict=True):
                stack = torch.stack(each)
                missing = dimensions - stack.ndim + (2 if name == "remainder" else 3)
                self.parts.append(stack.reshape(len(each), *(1,) * missing, *stack.shape[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Gᵢ x ``(k, ..., n, c)`` of one x ``(..., n, c)`` or of one for each anchor."""
        if len(self.parts) == 1:
            return self.parts[0] @ x
        if self.parts:
            low_rank, remainder = self.parts
            return remainder[..., None] * x + low_rank @ (adjoint(low_rank) @ x)
        each = [x] * len(self.grams) if x.ndim == self.dimensions + 2 else x
        return torch.stack([gram @ one for gram, one in zip(self.grams, each, strict=True)])


class _Half(NamedTuple):
    """Linear equations ``operator(x) = target`` for one factor, the other one held."""

    x: Tensor
    frame: Tensor
    operator: Callable[[Tensor], Tensor]
    target: Tensor
    #: Squared length of the gradient at x.
    slope: Tensor


class TwoSided:
    """The means of one rank of products, each with a Kronecker metric of its own.

    Args:
        pairs: B ``(..., m, r_i)`` and A ``(..., n, r_i)`` of each anchor.
        sides: Output and input Grams of each anchor.
        weights: ``(k, ...)``, with sum 1.
        means: Output and input Gram of the mean metric, which preconditions and truncates;
            averages of the sides if ``None``.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        sides: Sides,
        weights: Tensor,
        means: tuple[MetricFactor, MetricFactor] | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.sides = sides
        self.weights = weights
        outputs, inputs = sides
        dimensions = weights.ndim - 1
        self.stacks = _Stack(outputs, dimensions), _Stack(inputs, dimensions)
        self.means = means or (
            mean_output(list(inputs), list(outputs), weights),
            MetricFactor.sum(inputs, weights),
        )

    def solve(
        self, rank: int, tolerance: float, max_iterations: int
    ) -> tuple[Pair, Tensor, Tensor, Tensor]:
        """Alternate until the gradient is small.

        Args:
            rank: Of the product; less where the layer or the anchors do not have as many.
            tolerance: Gradient norm, relative to the root mean squared length of the anchors.
            max_iterations: Greatest number of rounds.

        Returns:
            The factors, the gradient norm, the number of rounds, and a
            :class:`~manifold_merge.solution.Status` for each batch element.
        """
        pair = list(self.start(rank))
        count = torch.zeros(self.weights.shape[1:], dtype=torch.long, device=pair[0].device)
        status = torch.full_like(count, Status.MAX_ITERATIONS)
        gradient = torch.zeros_like(self.weights[0])
        scale = self._scale()
        for left in range(max_iterations, -1, -1):
            slopes = [self._half(pair, side).slope for side in (0, 1)]
            gradient = (slopes[0] + slopes[1]).sqrt()
            status = torch.where(gradient <= tolerance * scale, Status.CONVERGED, status)
            running = status != Status.CONVERGED
            if left == 0 or not bool(running.any()):
                break
            self._round(pair)
            count = count + running
        return (pair[0], pair[1]), gradient, count, status

    def start(self, rank: int) -> Pair:
        """The solution in the spans of the anchors and of their images under the metrics."""
        bases = [self._basis(side) for side in (0, 1)]
        small = [
            [MetricFactor(adjoint(basis) @ (g @ basis), check=False) for g in grams]
            for grams, basis in zip(self.sides, bases, strict=True)
        ]
        # The bases are orthonormal in the mean metric, which is the identity in coordinates.
        pairs = [
            (
                adjoint(bases[0]) @ (self.means[0] @ b),
                adjoint(bases[1]) @ (self.means[1] @ a),
            )
            for b, a in self.pairs
        ]
        eyes = [
            MetricFactor(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), check=False)
            for x in bases
        ]
        inner = TwoSided(pairs, (small[0], small[1]), self.weights, (eyes[0], eyes[1]))
        pair = list(inner._truncated(rank))
        if rank < min(x.shape[-1] for x in bases):
            for _ in range(SMALL_ROUNDS):
                inner._round(pair)
        return bases[0] @ pair[0], bases[1] @ pair[1]

    def _basis(self, side: int) -> Tensor:
        """Vectors that span Xᵢ and Ḡ⁻¹GᵢXᵢ, orthonormal in the mean metric Ḡ of a side."""
        mean, grams = self.means[side], self.sides[side]
        factors = [pair[side] for pair in self.pairs]
        images = torch.cat([g @ x for g, x in zip(grams, factors, strict=True)], -1)
        whole = torch.cat(
            (mean.unwhiten(images, adjoint_root=True), mean.whiten(torch.cat(factors, -1))), -1
        )
        frame, upper = torch.linalg.qr(whole / _size(whole))
        sizes = upper.diagonal(dim1=-2, dim2=-1).abs()
        if bool((sizes.amin(-1) > 1e-8 * sizes.amax(-1)).all()):
            return mean.unwhiten(frame)
        # Directions that only rounding made differ from gauge to gauge: they are left out.
        x, s, _ = torch.linalg.svd(upper)
        kept = s > 1e-10 * s[..., :1].clamp(min=torch.finfo(s.dtype).tiny)
        return mean.unwhiten(frame @ (x * kept[..., None, :]))

    def _truncated(self, rank: int) -> Pair:
        """The mean without a bound on the rank, nearly, cut to the rank; small problems only."""
        left, right = self.stacks
        shares = self.weights[..., None, None]
        parts = [
            (g @ b) @ adjoint(h @ a) for (b, a), g, h in zip(self.pairs, *self.sides, strict=True)
        ]
        target = (shares * torch.stack(parts)).sum(0)

        def operator(x: Tensor) -> Tensor:
            return (shares * adjoint(right(adjoint(left(x))))).sum(0)

        mean, _, _ = conjugate_gradient(
            operator, target, target, lambda x: x, 2, 0.0, SMALL_ITERATIONS, last=True
        )
        x, s, y = torch.linalg.svd(mean, full_matrices=False)
        root = s[..., None, :rank].sqrt()
        return x[..., :rank] * root, adjoint(y)[..., :rank] * root

    def _round(self, pair: list[Tensor]) -> None:
        """Solve for each factor in turn, in place."""
        for side in (0, 1):
            half = self._half(pair, side)
            precondition = self.means[side].solve
            pair[side], _, _ = conjugate_gradient(
                half.operator, half.target, half.x, precondition, 2, 0.0, INNER_ITERATIONS,
                last=True,
            )  # fmt: skip
            pair[1 - side] = half.frame

    def _scale(self) -> Tensor:
        """Root mean squared length of the anchors."""
        total = torch.zeros_like(self.weights[0])
        for (b, a), left, right, w in zip(self.pairs, *self.sides, self.weights, strict=True):
            q, p = adjoint(b) @ (left @ b), adjoint(a) @ (right @ a)
            total = total + w * (q * p).sum((-2, -1))
        return total.clamp(min=0).sqrt()

    def _terms(self, frame: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Small Gram matrices wᵢ FᵀGᵢF of a frame, and Σ wᵢ Gᵢ'Xᵢ(YᵢᵀGᵢF) of the other factor."""
        images = self.stacks[1 - side](frame) * self.weights[..., None, None]
        parts = [
            pair[side] @ (adjoint(pair[1 - side]) @ image)
            for pair, image in zip(self.pairs, images, strict=True)
        ]
        return adjoint(frame) @ images, self.stacks[side](torch.stack(parts)).sum(0)

    def _half(self, pair: Sequence[Tensor], side: int) -> _Half:
        """The equations for one factor, the other one a frame of the mean metric."""
        far, near = self.means[1 - side], self.means[side]
        # Orthonormal in the mean metric, so that nothing depends on the gauge.
        frame, upper = torch.linalg.qr(far.whiten(pair[1 - side]))
        frame, x = far.unwhiten(frame), pair[side] @ adjoint(upper)
        small, target = self._terms(frame, side)

        def operator(x: Tensor) -> Tensor:
            return (self.stacks[side](x) @ small).sum(0)

        residual = target - operator(x)
        slope = (residual * near.solve(residual)).sum((-2, -1)).clamp(min=0)
        return _Half(x, frame, operator, target, slope)


def _size(x: Tensor) -> Tensor:
    """Greatest entry of each matrix, ``(..., 1, 1)``, or 1 where there is none."""
    size = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, 1.0)
