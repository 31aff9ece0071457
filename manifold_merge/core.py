"""Core reduction: a problem about tall factors, restated exactly in the span of the data.

Every metric on low-rank products here is invariant under rotations of rows and columns. Reflection
in the span of the data is therefore an isometry, the products within that span are its fixed set,
and geodesics, logarithms and critical points of the data stay there. So all work happens on
matrices of at most K = Σ rᵢ rows, and no m x n matrix is ever formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manifold_merge.linalg import adjoint
from manifold_merge.lora_log import balance
from manifold_merge.lora_metrics import Pair

__all__ = ["ColumnSpan", "reduce_pairs", "stacked_gram", "truncated_sum"]


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
        first = matrices[0]
        self.dtype = first.dtype
        self._work = first.dtype if first.device.type == "mps" else torch.float64
        self._parts: list[Tensor] | None = list(matrices)
        self._frame: Tensor | None = None
        self._solve: Tensor | None = None
        rows, columns = first.shape[-2], sum(x.shape[-1] for x in matrices)
        self.dimension = min(rows, columns)
        coordinates: Tensor | None
        if columns >= rows:
            self._parts, coordinates = None, self._stacked(matrices)
        else:
            coordinates = self._from_gram(matrices)
            if coordinates is None:
                self._parts = None
                self._frame, coordinates = torch.linalg.qr(self._stacked(matrices))
        self.coordinates = list(coordinates.split([x.shape[-1] for x in matrices], -1))

    def _stacked(self, matrices: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(matrices), -1).to(self._work)

    def _from_gram(self, matrices: Sequence[Tensor]) -> Tensor | None:
        gram = stacked_gram(matrices, self._work)
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        zero = (length == 0).to(gram.dtype)  # a column of zeros gets a direction that nothing uses
        inverse_length = (1 - zero) / (length + zero)
        gram = gram * inverse_length[..., None, :] * inverse_length[..., :, None]
        lower, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(zero))
        if bool(info.any()):
            return None
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        condition = inverse.square().sum((-2, -1)) * gram.shape[-1]  # at least the square of it
        # Data in float32 have rounding of 6e-8 themselves; float64 data keep 11 digits.
        allowed = 1e-11 if self.dtype == torch.float64 else 1e-8
        if not bool((condition * torch.finfo(gram.dtype).eps <= allowed).all()):
            return None
        self._solve = inverse_length[..., :, None] * adjoint(inverse)
        return adjoint(lower) * length[..., None, :]

    def expand(self, coordinates: Tensor, out: Tensor | None = None) -> Tensor:
        """Q c in the dtype of the matrices, ``(..., m, r)`` from ``(..., dimension, r)``.

        Args:
            coordinates: c, in any floating-point dtype.
            out: Where to put the result; a new tensor if ``None``.
        """
        if self._parts is not None:
            assert self._solve is not None
            return _stacked_product(self._parts, (self._solve @ coordinates).to(self.dtype), out)
        if self._frame is not None:
            coordinates = self._frame @ coordinates
        return coordinates.to(self.dtype) if out is None else out.copy_(coordinates)


def stacked_gram(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """XᵀX of X = [X_1, ..., X_k], ``(..., K, K)``, in the given dtype.

    On a CPU one matrix of the batch is converted and multiplied at a time: its copy then stays in
    the cache, which is faster than a product of the whole batch, and needs no memory.

    Args:
        matrices: k tensors ``(..., m, r_i)`` of one batch shape.
        dtype: Type of the result and of the arithmetic.
    """
    if not _one_by_one(matrices):
        stacked = torch.cat(list(matrices), -1).to(dtype)
        return adjoint(stacked) @ stacked
    copies = _copies(matrices, dtype)
    gram = torch.stack([copy.mT @ copy for copy in copies])
    return gram.reshape(*matrices[0].shape[:-2], *gram.shape[-2:])


def _stacked_product(
    matrices: Sequence[Tensor], right: Tensor, out: Tensor | None = None
) -> Tensor:
    """[X_1, ..., X_k] c, ``(..., m, r)``, without the stacked matrix of the whole batch."""
    if not _one_by_one([*matrices, right]):
        result = torch.cat(list(matrices), -1) @ right
        return result if out is None else out.copy_(result)
    shape = (*right.shape[:-2], matrices[0].shape[-2], right.shape[-1])
    result = right.new_empty(shape) if out is None else out
    copies = _copies(matrices, right.dtype)
    for copy, index in zip(copies, itertools.product(*map(range, shape[:-2])), strict=True):
        torch.mm(copy, right[index], out=result[index])
    return result


def _one_by_one(matrices: Sequence[Tensor]) -> bool:
    """Whether a batch is better worked on one element at a time, in one small buffer."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in matrices):
        return False
    return all(x.device.type == "cpu" for x in matrices)


def _copies(matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Stack and convert one batch element after the other, ``(m, K)``, always in one buffer."""
    widths = [x.shape[-1] for x in matrices]
    buffer = torch.empty(matrices[0].shape[-2], sum(widths), dtype=dtype)
    for parts in zip(*(x.reshape(-1, *x.shape[-2:]) for x in matrices), strict=True):
        for part, place in zip(parts, buffer.split(widths, -1), strict=True):
            place.copy_(part)
        yield buffer


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
