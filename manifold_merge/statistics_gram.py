"""Second moments of a layer's input, dense or low rank plus diagonal, and their accumulation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["DenseSum", "DiagonalSum", "Gram", "GramSum", "SketchSum", "gram_sum"]

_BLOCK = 128  # columns computed at once; only blocks on and above the diagonal are computed


@dataclass(frozen=True)
class Gram:
    """A symmetric positive semi-definite matrix G = Σ x xᵀ / count, of size (d, d).

    Either ``matrix`` holds it whole, or G = ``factor`` ``factor``ᵀ + diag(``remainder``).

    Attributes:
        matrix: The whole matrix, ``(d, d)``, or ``None``.
        factor: ``(d, k)``, or ``None``.
        remainder: ``(d,)``, not negative, or ``None``.
        mean: Σ x / count, ``(d,)``, or ``None`` where it was not collected.
        count: How many x were summed.
        energy: The share of the trace that ``matrix`` or ``factor`` explains; the rest is in
            ``remainder``, so that the diagonal is exact at any rank.

    Example:
        >>> import torch
        >>> gram = Gram(factor=torch.tensor([[1.0], [2.0]]), remainder=torch.tensor([0.5, 0.0]))
        >>> gram.dense()
        tensor([[1.5000, 2.0000],
                [2.0000, 4.0000]])
        >>> (gram @ torch.tensor([[1.0], [0.0]])).T
        tensor([[1.5000, 2.0000]])
    """

    matrix: Tensor | None = None
    factor: Tensor | None = None
    remainder: Tensor | None = None
    mean: Tensor | None = None
    count: int = 1
    energy: float = 1.0

    @property
    def features(self) -> int:
        """Size d."""
        return next(
            int(t.shape[0]) for t in (self.matrix, self.factor, self.remainder) if t is not None
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return next(t.dtype for t in (self.matrix, self.factor, self.remainder) if t is not None)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with ``(d, k)`` or ``(d,)`` without forming the matrix."""
        if self.matrix is not None:
            return self.matrix @ x
        column = self._remainder(x) if x.ndim == 1 else self._remainder(x)[:, None]
        product = column * x
        return product if self.factor is None else product + self.factor @ (self.factor.T @ x)

    def _remainder(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.features) if self.remainder is None else self.remainder

    def dense(self) -> Tensor:
        """The whole matrix, ``(d, d)``."""
        if self.matrix is not None:
            return self.matrix
        if self.factor is None:
            assert self.remainder is not None
            return torch.diag(self.remainder)
        whole = self.factor @ self.factor.T
        return whole if self.remainder is None else whole + torch.diag(self.remainder)

    def diagonal(self) -> Tensor:
        """The diagonal, ``(d,)``."""
        if self.matrix is not None:
            return self.matrix.diagonal()
        if self.factor is None:
            assert self.remainder is not None
            return self.remainder
        return self.factor.square().sum(1) + self._remainder(self.factor)

    def trace(self) -> Tensor:
        """The trace: the mean squared length of x."""
        return self.diagonal().sum()

    def to(self, dtype: torch.dtype) -> Gram:
        """The same matrix in another type."""
        cast = {
            name: value.to(dtype)
            for name in ("matrix", "factor", "remainder", "mean")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **cast)

    def scaled(self, factor: float) -> Gram:
        """The matrix times a positive number; the mean of x is left as it was measured."""
        powers = {"matrix": 1.0, "factor": 0.5, "remainder": 1.0}
        values = {name: getattr(self, name) for name in powers}
        return replace(
            self, **{n: v * factor ** powers[n] for n, v in values.items() if v is not None}
        )

    def compress(self, rank: int) -> Gram:
        """The best approximation of rank ``rank`` with the diagonal kept exact.

        Args:
            rank: Greatest number of columns of the factor.

        Raises:
            ValueError: ``rank`` is not positive.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1")
        values, vectors = torch.linalg.eigh(self.dense())
        values = values.clamp(min=0)[-rank:]
        factor = vectors[:, -rank:] * values.sqrt()
        diagonal = self.diagonal()
        remainder = (diagonal - factor.square().sum(1)).clamp(min=0)
        return Gram(None, factor, remainder, self.mean, self.count, _energy(factor, diagonal))


def _energy(factor: Tensor, diagonal: Tensor) -> float:
    whole = float(diagonal.sum())
    return min(float(factor.square().sum()) / whole, 1.0) if whole > 0 else 1.0


class GramSum:
    """Adds up x xᵀ over batches. Subclasses differ in what they keep."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.features = features
        self.dtype = dtype
        self.count = 0
        self.sum = torch.zeros(features, dtype=dtype, device=device)

    def add(self, rows: Tensor, count: int | None = None) -> None:
        """Add the rows of an (N, d) matrix; ``count`` replaces N where a row is no example."""
        self.count += rows.shape[0] if count is None else count
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        self.sum += rows.sum(0)
        self._add(rows)

    def _add(self, rows: Tensor) -> None:
        raise NotImplementedError

    def result(self) -> Gram:
        """The Gram of everything added so far."""
        raise NotImplementedError


class DenseSum(GramSum):
    """The exact Gram. Products are formed in the type of the rows and added in ``dtype``."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(features, dtype, device)
        self.total = torch.zeros(features, features, dtype=dtype, device=device)

    def _add(self, rows: Tensor) -> None:
        for start in range(0, self.features, _BLOCK):
            block = rows[:, start : start + _BLOCK]
            self.total[start : start + _BLOCK, start:] += block.T @ rows[:, start:]

    def result(self) -> Gram:
        """The exact Gram."""
        upper = self.total.triu() / self.count
        return Gram(upper + upper.triu(1).T, mean=self.sum / self.count, count=self.count)


@functools.lru_cache(maxsize=4)
def _test_matrix(features: int, rank: int) -> Tensor:
    """An orthonormal matrix, the same on every machine, so that sketches of shards add up."""
    generator = torch.Generator().manual_seed(features)
    gaussian = torch.randn(features, rank, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian).Q


class SketchSum(GramSum):
    """A low-rank Gram from one pass, at a small part of the cost of the exact one.

    Keeps Y = G Ω for a fixed orthonormal Ω and the exact diagonal. The result is the Nyström
    approximation G Ω (Ωᵀ G Ω)⁻¹ Ωᵀ G, which is never larger than G, so the remainder of the
    diagonal is not negative. Source: Tropp, Yurtsever, Udell and Cevher, *Fixed-rank approximation
    of a positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3.
    """

    def __init__(self, features: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(features, dtype, device)
        self.test = _test_matrix(features, rank).to(device)
        self.total = torch.zeros(features, rank, dtype=dtype, device=device)
        self.diagonal = torch.zeros(features, dtype=dtype, device=device)

    def _add(self, rows: Tensor) -> None:
        self.total += rows.T @ (rows @ self.test.to(rows.dtype))
        self.diagonal += rows.square().sum(0)

    def result(self) -> Gram:
        """The Nyström approximation and the exact diagonal."""
        # The shift and its removal are the stable implementation of the paper's section 3.
        total, test = self.total.double() / self.count, self.test
        diagonal = self.diagonal.double() / self.count
        shift = float(total.norm()) * 1e-6 + torch.finfo(torch.float64).tiny
        total = total + shift * test
        core = test.T @ total
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        floor = shift / 2  # the shifted core has no smaller eigenvalue but by rounding
        root = vectors / values.clamp(min=floor).sqrt()
        factor = total @ root
        # The SVD of the tall factor by its small Gram; the shift keeps that well conditioned.
        squares, right = torch.linalg.eigh(factor.T @ factor)
        kept = (squares - shift).clamp(min=0) / squares.clamp(min=shift / 2)
        factor = factor @ (right * kept.sqrt())
        # Rounding of float32 products may exceed the diagonal by a little: scale such rows.
        excess = factor.square().sum(1)
        ratio = torch.where(excess > diagonal, diagonal / excess.clamp(min=shift * 1e-12), 1.0)
        factor = factor * ratio.clamp(max=1).sqrt()[:, None]
        remainder = (diagonal - factor.square().sum(1)).clamp(min=0)
        gram = Gram(
            None,
            factor,
            remainder,
            self.sum.double() / self.count,
            self.count,
            _energy(factor, diagonal),
        )
        return gram.to(self.dtype)


class DiagonalSum(GramSum):
    """The Gram of one-hot inputs: how often each embedding was looked up."""

    def add(self, rows: Tensor, count: int | None = None) -> None:
        """Add indices, shape (N,)."""
        self.count += rows.numel() if count is None else count
        self.sum += torch.bincount(rows.flatten(), minlength=self.features).to(self.dtype)

    def result(self) -> Gram:
        """The diagonal matrix of frequencies."""
        frequency = self.sum / self.count
        return Gram(remainder=frequency, mean=frequency, count=self.count)


def gram_sum(features: int, rank: int | None, dtype: torch.dtype, device: torch.device) -> GramSum:
    """Choose dense or low-rank sums: low rank where it needs less than half the numbers."""
    if rank is not None and (rank + 1) * features < math.comb(features + 1, 2) / 2:
        return SketchSum(features, rank, dtype, device)
    return DenseSum(features, dtype, device)
