"""Changes of the anchors before they are averaged, in gauge-invariant form.

Rules against interference, such as TIES, TSV-M's whitening and isotropic spectra, are no means.
They are offered as functions from k low-rank points to k low-rank points, so that each composes
with every geometry. All work on the core, the anchors in the joint span of their factors, in bases
that the products W_i determine, so that no result depends on the gauge in which an adapter is
stored, nor on the order of the adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manifold_merge.lift import _gram_pair, _move, _singular_frames
from manifold_merge.linalg import adjoint
from manifold_merge.lora import LoRAQuotient

__all__ = [
    "TRANSFORMS",
    "Transform",
    "isotropic",
    "norm_preserving_scale",
    "parse_transform",
    "ties",
    "whiten",
    "with_norm",
]

Transform = Callable[[LoRAQuotient, Sequence[Tensor], Tensor], list[Tensor]]
"""Function (manifold, points, weights) to points."""


@torch.no_grad()
def ties(
    manifold: LoRAQuotient, points: Sequence[Tensor], weights: Tensor, *, density: float = 0.2
) -> list[Tensor]:
    """Trim small entries, elect signs, and keep what agrees (TIES), entry by entry in the core.

    The entries are those of UᵀW_iV, with U and V the singular vectors of [√w₁W₁, ..., √w_kW_k] and
    of the stack of transposes: bases that the products determine up to signs, under which the rule
    commutes. (In a basis from a QR decomposition of the factors the result changes with the gauge.)
    The weighted mean of the results is TIES' mean over the adapters that agree in sign. Where two
    directions carry exactly the same energy the basis is not determined.

    Args:
        manifold: Says the sizes m and n.
        points: k points ``(..., m + n, r_i)``.
        weights: ``(k,)``, not negative.
        density: Share of the entries that is kept of each anchor, largest first.

    Returns:
        k points ``(..., m + n, R)``, R = Σ rᵢ at most.

    Raises:
        ValueError: The density is not between 0 and 1.

    Source: Yadav et al., arXiv:2306.01708; in a joint basis, KnOTS, arXiv:2410.19735.

    Example:
        >>> manifold = LoRAQuotient(3, 3)
        >>> x = manifold.pack(torch.eye(3)[:, :1], torch.eye(3)[:1])
        >>> moved = ties(manifold, [x, -x + 2 * x], torch.ones(2), density=1.0)
        >>> bool(manifold.relative_difference(x, moved[0]) < 1e-6)
        True
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a number above 0 and up to 1, got {density}")
    reduced, anchors, restore = manifold.reduce(points)
    shares = _normalised(weights, anchors)
    cores = _products(reduced, anchors)  # (k, ..., K_B, K_A)
    scaled = cores * shares.sqrt()[..., None, None]
    u, v = _left_basis(scaled), _left_basis(adjoint(scaled))
    entries = adjoint(u) @ cores @ v
    kept = _trim(entries, density)
    elected = torch.sign((shares[..., None, None] * kept).sum(0))
    agrees = (torch.sign(kept) == elected) & (kept != 0)
    total = (shares[..., None, None] * agrees).sum(0).clamp(min=torch.finfo(kept.dtype).tiny)
    moved = torch.where(agrees, kept / total, 0.0)
    return [restore(_point(u @ core, v)) for core in moved]


@torch.no_grad()
def whiten(
    manifold: LoRAQuotient, points: Sequence[Tensor], weights: Tensor, *, power: float = 1.0
) -> list[Tensor]:
    """Turn the frames of different anchors orthogonal to each other, keeping each one's norm.

    Ŵ_i ∝ M_U^(-p/2) U_i S_i^(1+2p) V_iᵀ M_V^(-p/2) with the anchors' joint second moments, the move
    of :func:`~manifold_merge.lift.lifted_mean`. At p = 1 this is the Procrustes step of TSV-M in a
    metric; at p = 0 nothing moves.

    Args:
        manifold: Says the sizes m and n.
        points: k points ``(..., m + n, r_i)``.
        weights: ``(k,)``, not negative.
        power: p, from 0 to 1.

    Returns:
        k points ``(..., m + n, max rᵢ)`` of the norms of the given ones.

    Raises:
        ValueError: The power is not between 0 and 1.

    Source: Gargiulo et al., arXiv:2412.00081.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power: expected a number from 0 to 1, got {power}")
    reduced, anchors, restore = manifold.reduce(points)
    shares = _normalised(weights, anchors)
    u, v, s = _singular_frames(reduced, anchors)
    tiny = torch.finfo(s.dtype).tiny
    norms = s.square().sum(-1).sqrt()
    unit = s / norms.clamp(min=tiny)[..., None]
    exponent = torch.full_like(norms[0], power)
    moved_u, moved_v = (_move(frame, unit, shares, exponent) for frame in (u, v))
    left = moved_u * (unit ** (1 + 2 * power))[..., None, :]
    size = _gram_pair(left, moved_v).sqrt()
    left = left * (norms / size.clamp(min=tiny))[..., None, None]
    return [restore(_point(b, a)) for b, a in zip(left, moved_v, strict=True)]


@torch.no_grad()
def isotropic(
    manifold: LoRAQuotient, points: Sequence[Tensor], weights: Tensor, *, power: float = 1.0
) -> list[Tensor]:
    """Flatten the spectrum of each point, keeping its norm: s -> s^(1-p) s̄^p.

    Only singular values above rounding take part, so that numerically null directions, which depend
    on the gauge, stay null. Applied to a mean, it is Iso-C; to the anchors, it gives each direction
    of a task the same say.

    Args:
        manifold: Says the sizes m and n.
        points: k points ``(..., m + n, r_i)``.
        weights: Without effect; every transform takes them.
        power: p, from 0 to 1.

    Returns:
        k points ``(..., m + n, r_i)``.

    Raises:
        ValueError: The power is not between 0 and 1.

    Source: Marczak et al., arXiv:2502.04959.

    Example:
        >>> manifold = LoRAQuotient(2, 2)
        >>> x = manifold.pack(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2))
        >>> manifold.product(isotropic(manifold, [x], torch.ones(1))[0]).diagonal()
        tensor([3.5355, 3.5355])
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power: expected a number from 0 to 1, got {power}")
    moved = []
    for x in points:
        reduced, anchors, restore = manifold.reduce([x])
        u, v, s = (part[0] for part in _singular_frames(reduced, anchors))
        eps = torch.finfo(torch.float32 if x.dtype != torch.float64 else torch.float64).eps
        live = s > eps * max(manifold.out_features, manifold.in_features) * s[..., :1]
        count = live.sum(-1, keepdim=True).clamp(min=1)
        level = (s.square() * live).sum(-1, keepdim=True).div(count).sqrt()
        flat = torch.where(live, s ** (1 - power) * level**power, 0.0)
        size = flat.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        flat = flat * (s.norm(dim=-1, keepdim=True) / size)
        root = flat.sqrt()[..., None, :]
        moved.append(restore(_point(u * root, v * root)))
    return moved


def norm_preserving_scale(
    manifold: LoRAQuotient, mean: Tensor, points: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """The factor that gives a mean the root mean squared norm of its anchors.

    A mean of k orthogonal updates is √k times too short: averaging shrinks what it should only
    rotate. Norm and direction averaged apart need no validation data to say by how much.

    Args:
        manifold: Says the sizes m and n.
        mean: ``(..., m + n, R)``.
        points: k anchors ``(..., m + n, r_i)``.
        weights: ``(k,)``, not negative.

    Returns:
        Factors of the batch shape; 1 where the mean is zero.
    """
    shares = _normalised(weights, torch.stack([x[..., :1, :1] for x in points]))
    squares = torch.stack([_squared_norm(manifold, x) for x in points])
    own = _squared_norm(manifold, mean)
    radius = (shares * squares).sum(0)
    return torch.where(own > 0, (radius / torch.where(own > 0, own, 1.0)).sqrt(), 1.0)


TRANSFORMS: dict[str, tuple[Callable[..., list[Tensor]], str]] = {
    "ties": (ties, "density"),
    "whiten": (whiten, "power"),
    "isotropic": (isotropic, "power"),
}


def parse_transform(text: str) -> Transform:
    """Read ``"ties"`` or ``"ties=0.3"``, a name of :data:`TRANSFORMS` and its parameter.

    Raises:
        ValueError: The name is unknown, or the parameter no number.

    Example:
        >>> parse_transform("ties=0.3").keywords
        {'density': 0.3}
    """
    name, equals, value = text.partition("=")
    if name not in TRANSFORMS:
        raise ValueError(
            f"transform: expected one of {', '.join(TRANSFORMS)}, with a parameter or without, "
            f"such as ties=0.2; got {text!r}"
        )
    function, parameter = TRANSFORMS[name]
    if not equals:
        return function
    try:
        return functools.partial(function, **{parameter: float(value)})
    except ValueError:
        raise ValueError(
            f"transform: {name} takes a number, such as {name}=0.2; got {text!r}"
        ) from None


def with_norm(
    manifold: LoRAQuotient, mean: Tensor, points: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """The mean ``(..., m + n, R)`` times :func:`norm_preserving_scale`."""
    scale = norm_preserving_scale(manifold, mean, points, weights)
    return mean * scale.sqrt()[..., None, None].to(mean.dtype)


def _normalised(weights: Tensor, like: Tensor) -> Tensor:
    """Weights of sum 1, of the shape of the anchors' batch."""
    w = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if w.shape[:1] != like.shape[:1] or bool((w < 0).any()) or not bool((w.sum(0) > 0).all()):
        raise ValueError(f"weights: expected {like.shape[0]} numbers >= 0, got {w.tolist()}")
    w = w / w.sum(0)
    return w.reshape((*w.shape, *(1,) * (like.ndim - 2 - w.ndim))).expand(like.shape[:-2])


def _products(reduced: LoRAQuotient, anchors: Tensor) -> Tensor:
    b, a = anchors[..., : reduced.out_features, :], anchors[..., reduced.out_features :, :]
    return b @ adjoint(a)


def _left_basis(scaled: Tensor) -> Tensor:
    """Left singular vectors of [C_1, ..., C_k], the null ones set to zero."""
    wide = torch.cat(list(scaled), -1)
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    live = s > torch.finfo(s.dtype).eps ** 0.5 * s[..., :1]
    return u * live[..., None, :]


def _trim(entries: Tensor, density: float) -> Tensor:
    """Keep the largest entries of each matrix; a zero never counts."""
    flat = entries.abs().flatten(-2)
    rows = (entries.abs().amax((0, -1)) > 0).sum(-1)
    columns = (entries.abs().amax((0, -2)) > 0).sum(-1)
    count = (density * rows * columns).round().long().clamp(min=1)
    ordered = flat.sort(-1, descending=True).values
    index = (count - 1).expand(flat.shape[:-1])[..., None]
    threshold = ordered.gather(-1, index)[..., None]
    return torch.where(entries.abs() >= threshold, entries, 0.0)


def _point(b: Tensor, a: Tensor) -> Tensor:
    """A balanced point [B; A] of B Aᵀ."""
    (frame_b, upper_b), (frame_a, upper_a) = torch.linalg.qr(b), torch.linalg.qr(a)
    x, s, y = torch.linalg.svd(upper_b @ adjoint(upper_a), full_matrices=False)
    root = s.sqrt()[..., None, :]
    return torch.cat((frame_b @ (x * root), frame_a @ (adjoint(y) * root)), -2)


def _squared_norm(manifold: LoRAQuotient, x: Tensor) -> Tensor:
    b, a = manifold.unpack(x)
    return ((adjoint(b) @ b) * (a @ adjoint(a))).sum((-2, -1)).clamp(min=0)
