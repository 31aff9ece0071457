"""Symmetric positive definite matrices as operators: dense, or low rank plus diagonal."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manifold_merge.linalg import adjoint, broadcast_shapes
from manifold_merge.statistics_gram import Gram

__all__ = ["MetricFactor"]

_SINGULAR = (
    "it is not positive definite: as many independent inputs as features are needed; pass "
    "damping > 0 (1e-2 of the mean eigenvalue is a good start), or collect more texts"
)


class MetricFactor(nn.Module):
    """One side of a Kronecker metric, G, with the products, solves and roots that a mean needs.

    Either dense, or G = F Fᵀ + diag(d), for which everything costs O(n k²) and no n x n matrix is
    formed.

    Args:
        matrix: G, ``(..., n, n)``, symmetric; or a :class:`~manifold_merge.statistics.Gram`.
        low_rank: F, ``(..., n, k)``, instead of ``matrix``.
        diagonal: d, ``(..., n)``, positive, beside ``low_rank``.
        damping: λ in G + λ (tr G / n) I.
        shrinkage: σ in (1 - σ) G + σ diag(G), which shrinks what is off the diagonal.
        check: Whether to look for numbers that are not finite.

    Raises:
        ValueError: The shapes do not fit, a number is not finite, an option is out of range, or
            the matrix is not positive definite.

    Example:
        >>> import torch
        >>> g = MetricFactor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> bool((g.solve(g @ torch.eye(2)) - torch.eye(2)).abs().max() < 1e-6)
        True
    """

    matrix: Tensor | None
    low_rank: Tensor | None
    remainder: Tensor | None
    lower: Tensor | None
    frame: Tensor | None
    stretch: Tensor | None

    def __init__(
        self,
        matrix: Tensor | Gram | None = None,
        *,
        low_rank: Tensor | None = None,
        diagonal: Tensor | None = None,
        damping: float = 0.0,
        shrinkage: float = 0.0,
        check: bool = True,
    ) -> None:
        super().__init__()
        if not damping >= 0:
            raise ValueError(f"damping: expected a number >= 0, got {damping}")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage: expected a number from 0 to 1, got {shrinkage}")
        if isinstance(matrix, Gram):
            low_rank, diagonal = matrix.factor, matrix.remainder
            if matrix.matrix is None and low_rank is None and diagonal is not None:
                low_rank = diagonal.new_zeros(*diagonal.shape, 0)
            if low_rank is not None and diagonal is None:
                diagonal = torch.zeros_like(low_rank[..., 0])
            matrix = matrix.matrix
        if check:
            _check(matrix, low_rank, diagonal)
        for name in ("lower", "frame", "stretch"):
            self.register_buffer(name, None)
        if matrix is not None:
            self.register_buffer("matrix", _regularised(matrix, damping, shrinkage))
            self.register_buffer("low_rank", None)
            self.register_buffer("remainder", None)
        else:
            assert low_rank is not None
            assert diagonal is not None
            squares = low_rank.square().sum(-1)
            shift = damping * (squares + diagonal).mean(-1, keepdim=True)
            self.register_buffer("matrix", None)
            self.register_buffer("low_rank", low_rank * (1 - shrinkage) ** 0.5)
            self.register_buffer("remainder", diagonal + shrinkage * squares + shift)

    @property
    def features(self) -> int:
        """Size n."""
        return int((self.remainder if self.matrix is None else self.matrix).shape[-1])  # type: ignore[union-attr]

    @property
    def batch(self) -> torch.Size:
        """Batch shape."""
        if self.matrix is not None:
            return self.matrix.shape[:-2]
        assert self.remainder is not None
        return self.remainder.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return (self.remainder if self.matrix is None else self.matrix).dtype  # type: ignore[union-attr]

    def __matmul__(self, x: Tensor) -> Tensor:
        """G x, ``(..., n, c)``."""
        if self.matrix is not None:
            return self.matrix @ x
        assert self.low_rank is not None
        assert self.remainder is not None
        return self.remainder[..., None] * x + self.low_rank @ (adjoint(self.low_rank) @ x)

    def solve(self, x: Tensor) -> Tensor:
        """G⁻¹ x, ``(..., n, c)``."""
        return self.unwhiten(self.unwhiten(x, adjoint_root=True))

    def whiten(self, x: Tensor, *, adjoint_root: bool = False) -> Tensor:
        """T x with G = TᵀT, or Tᵀ x, ``(..., n, c)``; |T x| is the length of x in the metric."""
        self._factorise()
        if self.lower is not None:
            return (self.lower if adjoint_root else adjoint(self.lower)) @ x
        assert self.remainder is not None
        root = self.remainder.sqrt()[..., None]
        return root * self._stretched(x, 0.5) if adjoint_root else self._stretched(root * x, 0.5)

    def unwhiten(self, x: Tensor, *, adjoint_root: bool = False) -> Tensor:
        """T⁻¹ x, or T⁻ᵀ x, ``(..., n, c)``."""
        self._factorise()
        if self.lower is not None:
            lower = self.lower.expand(*x.shape[:-2], *self.lower.shape[-2:])
            if adjoint_root:
                return torch.linalg.solve_triangular(lower, x, upper=False)
            return torch.linalg.solve_triangular(adjoint(lower), x, upper=True)
        assert self.remainder is not None
        root = self.remainder.sqrt()[..., None]
        return self._stretched(x / root, -0.5) if adjoint_root else self._stretched(x, -0.5) / root

    def _stretched(self, x: Tensor, power: float) -> Tensor:
        """(I + Q diag(s) Qᵀ)^power x, with the frame Q and s of D^(-1/2) F."""
        assert self.frame is not None
        assert self.stretch is not None
        change = ((1 + self.stretch) ** power - 1)[..., None]
        return x + self.frame @ (change * (adjoint(self.frame) @ x))

    def _factorise(self) -> None:
        if self.lower is not None or self.frame is not None:
            return
        if self.matrix is not None:
            lower, info = torch.linalg.cholesky_ex(self.matrix)
            if bool(info.any()):
                raise ValueError(f"gram: {_SINGULAR}")
            self.lower = lower
            return
        assert self.low_rank is not None
        assert self.remainder is not None
        if not bool((self.remainder > 0).all()):
            raise ValueError(f"gram: {_SINGULAR}")
        scaled = self.low_rank / self.remainder.sqrt()[..., None]
        frame, values, _ = torch.linalg.svd(scaled, full_matrices=False)
        self.frame, self.stretch = frame, values.square()

    def dense(self) -> Tensor:
        """G, ``(..., n, n)``."""
        if self.matrix is not None:
            return self.matrix
        assert self.low_rank is not None
        assert self.remainder is not None
        return self.low_rank @ adjoint(self.low_rank) + torch.diag_embed(self.remainder)

    def trace(self) -> Tensor:
        """The trace, of the batch shape."""
        if self.matrix is not None:
            return self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert self.low_rank is not None
        assert self.remainder is not None
        return self.low_rank.square().sum((-2, -1)) + self.remainder.sum(-1)

    def scaled(self, factor: Tensor | float) -> MetricFactor:
        """The matrix times a positive number, or one for each batch element, ``(...)``."""
        return self.sum([self], [torch.as_tensor(factor, dtype=self.dtype)])

    @staticmethod
    def sum(factors: Sequence[MetricFactor], weights: Sequence[Tensor] | Tensor) -> MetricFactor:
        """Σ wᵢ Gᵢ, low rank plus diagonal where all are and that stays the smaller form.

        Args:
            factors: Matrices of one size.
            weights: For each a number or one for each batch element, not negative.
        """
        like = next(factors[0].buffers())
        spread = [torch.as_tensor(w).to(like)[..., None] for w in weights]
        width = builtins.sum(0 if f.low_rank is None else f.low_rank.shape[-1] for f in factors)
        if all(f.matrix is None for f in factors) and 2 * width < factors[0].features:
            pairs = [
                (f.low_rank * w.sqrt()[..., None], f.remainder * w)  # type: ignore[operator]
                for f, w in zip(factors, spread, strict=True)
            ]
            batch = broadcast_shapes(*(d.shape[:-1] for _, d in pairs))
            low_rank = torch.cat([x.expand(*batch, *x.shape[-2:]) for x, _ in pairs], -1)
            diagonal = torch.stack([d.expand(*batch, d.shape[-1]) for _, d in pairs]).sum(0)
            return MetricFactor(low_rank=low_rank, diagonal=diagonal, check=False)
        total = factors[0].dense() * spread[0][..., None]
        for f, w in zip(factors[1:], spread[1:], strict=True):
            total = total + f.dense() * w[..., None]
        return MetricFactor(total, check=False)

    def extra_repr(self) -> str:
        """Size and form, as ``repr`` shows them."""
        form = "dense" if self.low_rank is None else f"rank {self.low_rank.shape[-1]} + diagonal"
        return f"{self.features}, {form}"


def _regularised(matrix: Tensor, damping: float, shrinkage: float) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    extra = shrinkage * diagonal + damping * diagonal.mean(-1, keepdim=True)
    if not (damping or shrinkage):
        return matrix
    return (1 - shrinkage) * matrix + torch.diag_embed(extra)


def _check(matrix: Tensor | None, low_rank: Tensor | None, diagonal: Tensor | None) -> None:
    if matrix is not None:
        fits = matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]
        found = f"{tuple(matrix.shape)}"
    elif low_rank is not None and diagonal is not None:
        fits = low_rank.ndim >= 2 and diagonal.shape[-1:] == low_rank.shape[-2:-1]
        found = f"low_rank {tuple(low_rank.shape)} and diagonal {tuple(diagonal.shape)}"
    else:
        fits, found = False, "neither"
    if not fits:
        raise ValueError(
            "gram: expected a matrix (..., n, n), or low_rank (..., n, k) with diagonal (..., n); "
            f"got {found}"
        )
    for value in (matrix, low_rank, diagonal):
        if value is not None and not bool(value.isfinite().all()):
            raise ValueError(
                f"gram: {int((~value.isfinite()).sum())} entries are NaN or infinite; collect the "
                "statistics again"
            )
    if diagonal is not None and bool((diagonal < 0).any()):
        raise ValueError("gram: the diagonal has negative entries; collect the statistics again")
