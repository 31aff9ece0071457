"""Core reduction: a problem about tall factors, restated exactly in the span of the data.

Every metric on low-rank products here is invariant under rotations of rows and columns. Reflection
in the span of the data is therefore an isometry, the products within that span are its fixed set,
and geodesics, logarithms and critical points of the data stay there. So all work happens on
matrices of at most K = Σ rᵢ rows, and no m x n matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.lora_log import balance
from manifold_merge.lora_metrics import Pair

__all__ = ["ColumnSpan", "reduce_pairs", "truncated_sum"]


class ColumnSpan:
    """Orthonormal coordinates in the joint column span of tall matrices.

    With X = [X_1, ..., X_k] of K columns and X = Q R, the coordinates of X_i are its columns of R,
    and Q is never formed: Q c = X (R⁻¹ c). R comes from the Gram matrix of X, in float64, with
    columns scaled to unit length, which is many times faster than reflections on matrices of
    thousands of rows. Its error grows with the square of the condition number, so that is bounded
    first (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 20.4), and
    Householder QR, which needs no rank decision, takes over where the bound is too high, exactly
    repeated columns included. Where K is no less than the number of rows, the coordinates are the
    matrices themselves.

    Args:
        matrices: k tensors ``(..., m, r_i)`` of one batch shape.

    Attributes:
        dimension: K, or m if that is less.
        coordinates: k tensors ``(..., dimension, r_i)``, in float64 where the device has it.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        stacked = torch.cat(list(matrices), -1)
        rows, columns = stacked.shape[-2:]
        work = stacked if stacked.device.type == "mps" else stacked.double()
        self.dtype = stacked.dtype
        self.dimension = min(rows, columns)
        self._matrix: Tensor | None = stacked
        self._solve: Tensor | None = None
        coordinates: Tensor | None = work
        if columns >= rows:
            self._matrix = None
        else:
            coordinates = self._from_gram(work)
            if coordinates is None:
                self._matrix, coordinates = torch.linalg.qr(work)
        assert coordinates is not None
        self.coordinates = list(coordinates.split([x.shape[-1] for x in matrices], -1))

    def _from_gram(self, x: Tensor) -> Tensor | None:
        gram = adjoint(x) @ x
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        zero = (length == 0).to(x.dtype)  # a column of zeros gets a direction that nothing uses
        inverse_length = (1 - zero) / (length + zero)
        gram = gram * inverse_length[..., None, :] * inverse_length[..., :, None]
        lower, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(zero))
        if bool(info.any()):
            return None
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        condition = inverse.square().sum((-2, -1)) * x.shape[-1]  # at least the square of it
        # Data in float32 have rounding of 6e-8 themselves; float64 data keep 11 digits.
        allowed = 1e-11 if self.dtype == torch.float64 else 1e-8
        if not bool((condition * torch.finfo(x.dtype).eps <= allowed).all()):
            return None
        self._solve = inverse_length[..., :, None] * adjoint(inverse)
        return adjoint(lower) * length[..., None, :]

    def expand(self, coordinates: Tensor) -> Tensor:
        """Q c in the dtype of the matrices, ``(..., m, r)`` from ``(..., dimension, r)``."""
        if self._solve is not None:
            coordinates = self._solve @ coordinates
        if self._matrix is not None:
            coordinates = self._matrix @ coordinates.to(self._matrix.dtype)
        return coordinates.to(self.dtype)


def reduce_pairs(
    pairs: Sequence[Pair], width: int
) -> tuple[Tensor, Tensor, ColumnSpan, ColumnSpan]:
    """Coordinates of factor pairs in their joint spans, balanced and padded to one rank.

    Args:
        pairs: k pairs, B ``(..., m, r_i)`` and A ``(..., n, r_i)``, with W = B Aᵀ.
        width: The rank to pad to with zero columns.

    Returns:
        ``(k, ..., K_B, width)``, ``(k, ..., K_A, width)`` and the two spans.
    """
    spans = [ColumnSpan([pair[side] for pair in pairs]) for side in (0, 1)]
    small = []
    for b, a in zip(spans[0].coordinates, spans[1].coordinates, strict=True):
        balanced = balance((b, a))[0]
        missing = width - balanced[0].shape[-1]
        small.append([torch.nn.functional.pad(x, (0, missing)) for x in balanced])
    left, right = (torch.stack([pair[side] for pair in small]) for side in (0, 1))
    return left, right, spans[0], spans[1]


def truncated_sum(pairs: Sequence[Pair], weights: Tensor, rank: int) -> Pair:
    """Best approximation of Σ wᵢ BᵢAᵢᵀ by a product of the given rank (Eckart and Young 1936).

    Args:
        pairs: k pairs, B ``(..., m, r_i)`` and A ``(..., n, r_i)``.
        weights: ``(k, ...)``, of any sign.
        rank: Rank of the result; columns beyond its own rank are zero.

    Returns:
        The balanced pair, ``(..., m, rank)`` and ``(..., n, rank)``.
    """
    b = torch.cat([p[0] * w[..., None, None] for p, w in zip(pairs, weights, strict=True)], -1)
    a = torch.cat([p[1] for p in pairs], -1)
    (frame_b, upper_b), (frame_a, upper_a) = torch.linalg.qr(b), torch.linalg.qr(a)
    u, s, vh = torch.linalg.svd(upper_b @ adjoint(upper_a), full_matrices=False)
    root = s[..., None, :rank].sqrt()
    result = (frame_b @ (u[..., :rank] * root), frame_a @ (adjoint(vh)[..., :rank] * root))
    missing = rank - root.shape[-1]
    return tuple(torch.nn.functional.pad(x, (0, missing)) for x in result)  # type: ignore[return-value]
