"""Changes of basis inside a network: balanced bases, and the rotations that are left.

The width of an attention head may change its basis: W_Q -> G W_Q, W_K -> G⁻ᵀ W_K, any G in GL(d),
or, under rotary positions, any scaled rotation of pairs of coordinates. As with the positive scale
of ReLU units, each class has representatives of least norm: the balanced ones, with
Σ ZZᵀ over the axes that G acts on equal to that over the axes of G⁻ᵀ. They differ by an orthogonal
matrix only, and orthogonal matrices are isometries. So a network in balanced bases, modulo
permutations and orthogonal matrices, is a point of a quotient of a flat space by isometries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manifold_merge.rescaling import balance_factors
from manifold_merge.symmetry import GaugeGroup, NetworkSymmetry, SymmetryElement

__all__ = [
    "apply_gauges",
    "balancing_element",
    "closest_isometry",
    "inverse_gauges",
    "is_isometry",
    "matrix_gauges",
    "random_isometry",
    "skew_solution",
    "softened_isometry",
]

MATRIX_KINDS = ("general_linear", "orthogonal", "rotation")


def matrix_gauges(symmetry: NetworkSymmetry) -> tuple[GaugeGroup, ...]:
    """The gauges of a symmetry that are changes of basis, by matrices."""
    return tuple(gauge for gauge in symmetry.gauges if gauge.kind in MATRIX_KINDS)


def balancing_element(
    state: Mapping[str, Tensor],
    symmetry: NetworkSymmetry,
    *,
    scales: Sequence[GaugeGroup],
    bases: bool,
    tolerance: float = 1e-6,
    max_sweeps: int = 50,
) -> dict[str, Tensor]:
    """The gauges that bring a network to a representative of least norm.

    The norm is convex along the one-parameter groups of all gauges together, so that balancing
    scales and bases in turn finds its least value. It is unique up to orthogonal matrices.

    Args:
        state: A state dict.
        symmetry: Its symmetry.
        scales: The positive gauges to balance.
        bases: Balance changes of basis.
        tolerance: Relative change of the factors at which to stop.
        max_sweeps: Greatest number of rounds.

    Returns:
        For each gauge, by name, ``(d,)`` factors or a matrix ``(d, d)``, for
        :meth:`manifold_merge.NetworkSymmetry.transform`.

    Source: Kempf and Ness (1979), for least vectors of a group's orbit; Bures-Wasserstein
    geometry: Bhatia, Jain and Lim, arXiv:1712.01504.

    Example:
        >>> import torch
        >>> from manifold_merge.symmetry import GaugeGroup, NetworkSymmetry, Placement
        >>> places = (Placement("q", 0), Placement("k", 0, inverse=True))
        >>> symmetry = NetworkSymmetry((), (GaugeGroup("head", "general_linear", 2, places),))
        >>> state = {"q": torch.randn(2, 5), "k": torch.randn(2, 5)}
        >>> new = symmetry.transform(
        ...     state, balancing_element(state, symmetry, scales=(), bases=True))
        >>> torch.allclose(new["q"] @ new["q"].T, new["k"] @ new["k"].T, atol=1e-4)
        True
        >>> torch.allclose(new["q"].T @ new["k"], state["q"].T @ state["k"], atol=1e-4)
        True
    """
    positives = tuple(scales)
    matrices = matrix_gauges(symmetry) if bases else ()
    found: dict[str, Tensor] = {}
    if not matrices:
        factors = balance_factors(state, positives) if positives else []
        return {gauge.name: f for gauge, f in zip(positives, factors, strict=True)}
    touched = {place.tensor for g in (*positives, *matrices) for place in g.placements}
    exact = {
        name: t.detach().to(torch.float64) if name in touched else t for name, t in state.items()
    }
    kept = NetworkSymmetry((), (*positives, *matrices), symmetry.shapes, symmetry.aliases)
    for _ in range(max_sweeps):
        working = kept.transform(exact, found)
        change = 0.0
        for gauge in matrices:
            step = _balancing_matrix(working, gauge)
            eye = torch.eye(gauge.dimension, dtype=torch.float64)
            change = max(change, float((step - eye).abs().max()))
            found[gauge.name] = step @ found[gauge.name] if gauge.name in found else step
        if positives:
            working = kept.transform(exact, found)
            factors = balance_factors(working, positives, tolerance=tolerance)
            for gauge, step in zip(positives, factors, strict=True):
                change = max(change, float((step - 1).abs().max()))
                found[gauge.name] = step * found.get(gauge.name, torch.ones_like(step))
        if change <= tolerance:
            break
    return found


def _balancing_matrix(state: Mapping[str, Tensor], gauge: GaugeGroup) -> Tensor:
    """G with G P Gᵀ = G⁻ᵀ R G⁻¹, P and R the Gram matrices of both sides; the identity if dead."""
    d = gauge.dimension
    grams = [torch.zeros(d, d, dtype=torch.float64) for _ in range(2)]
    for place in gauge.placements:
        rows = place.region(state[place.tensor]).movedim(place.axis, 0)
        rows = rows[place.index(d).to(rows.device)].reshape(d, -1).cpu().double()
        grams[place.inverse] += rows @ rows.mT
    direct, dual = grams
    if gauge.kind == "orthogonal":
        return torch.eye(d, dtype=torch.float64)
    if gauge.kind == "rotation":
        first, second = _pairs(gauge.pairing, d)
        sizes = [g.diagonal()[first] + g.diagonal()[second] for g in (direct, dual)]
        alive = (sizes[0] > 0) & (sizes[1] > 0)
        ratio = torch.where(alive, sizes[1] / sizes[0].clamp(min=1e-300), 1.0) ** 0.25
        scale = torch.ones(d, dtype=torch.float64)
        scale[first], scale[second] = ratio, ratio
        return scale.diag()
    root, inverse_root = _powers(direct, 0.5, -0.5)
    _, dual_inverse = _powers(dual, 0.5, -0.5)
    if root is None or inverse_root is None or dual_inverse is None:
        return torch.eye(d, dtype=torch.float64)  # no representative is shortest
    middle, _ = _powers(root @ dual @ root, 0.5, -0.5)
    if middle is None:
        return torch.eye(d, dtype=torch.float64)
    # M = Gᵀ G solves the Riccati equation M P M = R: the geometric mean of P⁻¹ and R.
    result, _ = _powers(inverse_root @ middle @ inverse_root, 0.5, -0.5)
    return torch.eye(d, dtype=torch.float64) if result is None else result


def _powers(matrix: Tensor, *exponents: float) -> list[Tensor] | list[None]:
    """Powers of a symmetric positive definite matrix; ``None`` if it is singular."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if not float(values[-1]) > 0 or float(values[0]) <= 1e-12 * float(values[-1]):
        return [None for _ in exponents]
    return [(vectors * values**e) @ vectors.mT for e in exponents]


def _pairs(pairing: str, d: int) -> tuple[Tensor, Tensor]:
    """The coordinates that rotate with each other, ``(d / 2,)`` each."""
    i = torch.arange(d // 2)
    return (i, i + d // 2) if pairing == "halves" else (2 * i, 2 * i + 1)


def inverse_gauges(gauges: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What undoes the factors and matrices of :func:`balancing_element`, by name."""
    return {
        name: 1 / value if value.ndim == 1 else torch.linalg.inv(value)
        for name, value in gauges.items()
    }


def apply_gauges(
    state: Mapping[str, Tensor], symmetry: NetworkSymmetry, gauges: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Act with gauges on a state dict; the same function in other numbers."""
    return symmetry.apply(state, SymmetryElement({}, dict(gauges))) if gauges else dict(state)


# --- orthogonal matrices --------------------------------------------------------------------------


def closest_isometry(scores: Tensor, pairing: str | None = None) -> Tensor:
    """The orthogonal matrices O that maximise tr(Oᵀ C): polar factors, ``(..., d, d)``.

    Args:
        scores: C, ``(..., d, d)``.
        pairing: For rotations of pairs of coordinates, how they are paired.

    Source: Schönemann (1966).

    Example:
        >>> import torch
        >>> closest_isometry(torch.tensor([[0.0, 3.0], [-1.0, 0.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    scores = scores.nan_to_num()  # without a best matrix any will do, as for assignments
    if pairing is None:
        left, _, right = torch.linalg.svd(scores)
        return left @ right
    return _rotations(scores, pairing, 0.0)


def softened_isometry(scores: Tensor, temperature: float, pairing: str | None = None) -> Tensor:
    """A contraction between the mean of all orthogonal matrices, zero, and the closest one.

    To first order in C it is the mean of the density exp(tr(OᵀC) / T), which is C / (d T).

    Args:
        scores: C, ``(d, d)``.
        temperature: T > 0, in the units of the scores.
        pairing: For rotations of pairs of coordinates, how they are paired.

    Example:
        >>> import torch
        >>> soft = softened_isometry(torch.eye(2), 0.5)
        >>> round(float(soft[0, 0]), 4)
        0.7071
    """
    scores = scores.nan_to_num()
    if pairing is not None:
        return _rotations(scores, pairing, 2 * temperature)
    left, values, right = torch.linalg.svd(scores)
    shrunk = values / torch.hypot(values, torch.full_like(values, len(scores) * temperature))
    return (left * shrunk) @ right


def _rotations(scores: Tensor, pairing: str, size: float) -> Tensor:
    d = scores.shape[-1]
    first, second = _pairs(pairing, d)
    a = scores[..., first, first] + scores[..., second, second]
    b = scores[..., second, first] - scores[..., first, second]
    length = (a.square() + b.square() + size**2).sqrt()
    still = length == 0
    a = torch.where(still, float(size == 0), a / length.masked_fill(still, 1.0))
    b = torch.where(still, 0.0, b / length.masked_fill(still, 1.0))
    result = torch.zeros_like(scores)
    result[..., first, first], result[..., second, second] = a, a
    result[..., second, first], result[..., first, second] = b, -b
    return result


def random_isometry(
    d: int, like: Tensor, generator: torch.Generator | None, pairing: str | None = None
) -> Tensor:
    """An orthogonal matrix, or rotations of pairs, drawn uniformly, ``(d, d)``."""
    drawn = torch.randn((d, d), generator=generator, dtype=torch.float64)
    return closest_isometry(drawn, pairing).to(like)


def is_isometry(matrix: Tensor) -> bool:
    """Whether a matrix ``(d, d)`` is orthogonal, up to rounding in single precision."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return bool((matrix @ matrix.mT - eye).abs().max() < 1e-3)


def skew_solution(gram: Tensor, product: Tensor, pairing: str | None = None) -> Tensor:
    """The skew A that brings A X closest to U: A S + S A = U Xᵀ - X Uᵀ, S = X Xᵀ, ``(..., d, d)``.

    Args:
        gram: S, ``(..., d, d)``.
        product: U Xᵀ, ``(..., d, d)``.
        pairing: For rotations of pairs of coordinates, how they are paired.
    """
    d = gram.shape[-1]
    if pairing is not None:
        first, second = _pairs(pairing, d)
        size = gram[..., first, first] + gram[..., second, second]
        turn = product[..., second, first] - product[..., first, second]
        rate = torch.where(size > 0, turn / torch.where(size > 0, size, 1.0), 0.0)
        entries = torch.zeros(d, d, dtype=gram.dtype, device=gram.device)
        matrix = entries.expand(product.shape)
        index = torch.cat([second * d + first, first * d + second]).to(gram.device)
        flat = matrix.reshape(*product.shape[:-2], d * d)
        return flat.index_copy(-1, index, torch.cat([rate, -rate], -1)).unflatten(-1, (d, d))
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    right = vectors.mT @ (product - product.mT) @ vectors
    sums = values[..., :, None] + values[..., None, :]
    alive = sums > torch.finfo(gram.dtype).eps * values[..., -1:, None].clamp(min=0)
    return vectors @ torch.where(alive, right / torch.where(alive, sums, 1.0), 0.0) @ vectors.mT
