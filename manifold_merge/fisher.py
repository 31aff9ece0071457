"""Fisher metrics: distances between weights that count what a change does to a model's output.

A change dW of a linear layer changes its output by dW x. In expectation over inputs that is
tr(dW G dWᵀ) with the input Gram G = E[x xᵀ] (RegMean, arXiv:2212.09849); to second order the change
of the model's distribution is tr(L dW G dWᵀ) with L = E[g gᵀ], g the gradient with respect to the
layer's output (K-FAC, arXiv:1503.05671); or the Fisher information is kept as its diagonal
(arXiv:2111.09832). All of these are constant metrics on the space of weights. They measure, so
a mean with one of them for each anchor is what :mod:`manifold_merge.fisher_mean` solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.linalg import adjoint, broadcast_shapes
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_metrics import Pair
from manifold_merge.statistics_gram import Gram

__all__ = ["ConstantMetric", "FisherEuclidean", "FisherLoRAQuotient", "KroneckerFisher"]

_Side = Tensor | Gram | MetricFactor | None


class ConstantMetric(geoopt.Manifold):
    """A vector space with a metric that is the same at every point: flat, all formulas closed.

    Subclasses write ``covector`` (lower an index) and ``_raise`` (raise it).
    """

    name = "ConstantMetric"
    reversible = True
    __scaling__ = geoopt.Manifold.__scaling__.copy()
    ndim = 1

    @__scaling__(ScalingInfo())
    def covector(self, u: Tensor) -> Tensor:
        """Lower the index: c with <c, v> = g(u, v) for each v, ``(..., *point)``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define covector(u): the metric applied to a vector"
        )

    def _raise(self, c: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} must define _raise(c): the inverse metric applied to a covector"
        )

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """g(u, v), of the batch shape; ``keepdim`` keeps dimensions of size 1."""
        product = self.covector(u) * (u if v is None else v)
        value = product.flatten(product.ndim - self.ndim).sum(-1)
        value = value.expand(broadcast_shapes(value.shape, x.shape[: x.ndim - self.ndim]))
        return value[(..., *(None,) * self.ndim)] if keepdim else value

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of ``u``, of the batch shape."""
        return self.inner(x, u, keepdim=keepdim).clamp(min=0).sqrt()

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The whole inner product, broadcast to the shape of a point."""
        whole = self.inner(x, u, v, keepdim=True)
        return whole.expand(broadcast_shapes(whole.shape, u.shape))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The gradient in this metric: the Euclidean one times the inverse metric."""
        return self._raise(u)

    @__scaling__(ScalingInfo())
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """The Hessian in this metric applied to ``u``; a flat metric adds no curvature."""
        return self._raise(ehess)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Every array is a tangent vector."""
        return u.expand(broadcast_shapes(x.shape, u.shape))

    def projx(self, x: Tensor) -> Tensor:
        """Every finite array is a point."""
        return x

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The point x + u."""
        return x + u

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The point x + u: geodesics are straight lines."""
        return x + u

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The vector y - x."""
        return y - x

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of y - x, of the batch shape."""
        squared = self.dist2(x, y, keepdim=keepdim)
        positive = squared > 0
        return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)

    @__scaling__(ScalingInfo(2))
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared length of y - x, of the batch shape."""
        return self.inner(x, y - x, keepdim=keepdim).clamp(min=0)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vectors stay as they are."""
        shape = broadcast_shapes(x.shape, y.shape, v.shape)
        return v.expand(shape)

    @__scaling__(ScalingInfo())
    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> geoopt.ManifoldTensor:
        """Independent standard normal entries, ``(..., *point)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        x = torch.randn(shape, dtype=dtype, device=device, **kwargs)
        return geoopt.ManifoldTensor(x, manifold=self)

    @__scaling__(ScalingInfo())
    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """Zero, ``(..., *point)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        return geoopt.ManifoldTensor(torch.zeros(shape, dtype=dtype, device=device), manifold=self)

    def _point_shape(self) -> tuple[int, ...]:
        raise NotImplementedError(f"{type(self).__name__} must define _point_shape()")

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        expected = self._point_shape()
        if tuple(shape[len(shape) - len(expected) :]) != expected:
            return False, f"`{name}` should have shape (..., {expected}), got {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        ok = bool(x.isfinite().all())
        return ok, None if ok else f"`x` has {int((~x.isfinite()).sum())} entries not finite"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return True, None


class FisherEuclidean(ConstantMetric):
    """Weights with a diagonal Fisher metric, g(u, v) = Σ f u v.

    Args:
        fisher: f, ``(..., *point)``, positive after damping.
        ndim: Trailing dimensions that make up one point; all of them if ``None``.
        damping: λ in f + λ mean(f), the mean over one point.

    Raises:
        ValueError: An entry is negative, not finite, or zero without damping.

    Source: Matena and Raffel, arXiv:2111.09832.

    Example:
        >>> import torch
        >>> manifold = FisherEuclidean(torch.tensor([4.0, 1.0]))
        >>> manifold.dist(torch.zeros(2), torch.tensor([1.0, 0.0]))
        tensor(2.)
    """

    name = "FisherEuclidean"
    __scaling__ = ConstantMetric.__scaling__.copy()
    fisher: Tensor

    def __init__(self, fisher: Tensor, ndim: int | None = None, *, damping: float = 0.0) -> None:
        super().__init__()
        self.ndim = fisher.ndim if ndim is None else ndim
        if not 0 <= self.ndim <= fisher.ndim:
            raise ValueError(f"ndim: expected 0 to {fisher.ndim}, got {ndim}")
        if not damping >= 0:
            raise ValueError(f"damping: expected a number >= 0, got {damping}")
        if not bool(fisher.isfinite().all()) or bool((fisher < 0).any()):
            raise ValueError(
                "fisher: entries are negative or not finite; collect the statistics again"
            )
        if damping:
            mean = fisher.flatten(fisher.ndim - self.ndim).mean(-1) if self.ndim else fisher
            fisher = fisher + damping * mean[(..., *(None,) * self.ndim)]
        if not bool((fisher > 0).all()):
            raise ValueError(
                f"fisher: {int((fisher == 0).sum())} of {fisher.numel()} entries are zero, where "
                "the metric sees no difference; pass damping > 0 (1e-2 is a good start)"
            )
        self.register_buffer("fisher", fisher)

    def covector(self, u: Tensor) -> Tensor:
        """F u, ``(..., *point)``."""
        return self.fisher * u

    def _raise(self, c: Tensor) -> Tensor:
        return c / self.fisher

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The entry-wise terms of the inner product, ``(..., *point)``: entries are independent."""
        return self.covector(u) * (u if v is None else v)

    def _point_shape(self) -> tuple[int, ...]:
        return tuple(self.fisher.shape[self.fisher.ndim - self.ndim :])


class KroneckerFisher(ConstantMetric):
    """Weight matrices with a Kronecker-factored metric, g(U, V) = tr(L U R Vᵀ).

    With R the input Gram alone, distances are expected changes of the layer's output (RegMean);
    with L the Gram of output gradients as well, this is K-FAC's Fisher metric.

    Args:
        out_features: m.
        in_features: n.
        input_gram: R, ``(..., n, n)``, dense, a stored Gram or a :class:`MetricFactor`; the
            identity if ``None``.
        output_gram: L, ``(..., m, m)``, in the same forms; the identity if ``None``.
        damping: λ in G + λ (tr G / n) I, on each side.
        shrinkage: σ in (1 - σ) G + σ diag(G), on each side.

    Raises:
        ValueError: Both are ``None``, a size does not fit, or a Gram is not positive definite.

    Source: Martens and Grosse, arXiv:1503.05671; MaTS, arXiv:2312.04339; RegMean, arXiv:2212.09849.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> manifold = KroneckerFisher(2, 3, input_gram=x.T @ x / 100)
        >>> dW = torch.ones(2, 3)
        >>> bool((manifold.inner(dW, dW) - (x @ dW.T).square().sum(1).mean()).abs() < 1e-4)
        True
    """

    name = "KroneckerFisher"
    ndim = 2
    __scaling__ = ConstantMetric.__scaling__.copy()

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        input_gram: _Side = None,
        output_gram: _Side = None,
        damping: float = 0.0,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.input_side, self.output_side = _sides(
            out_features, in_features, input_gram, output_gram, damping, shrinkage
        )

    def covector(self, u: Tensor) -> Tensor:
        """L u R, ``(..., m, n)``."""
        if self.input_side is not None:
            u = adjoint(self.input_side @ adjoint(u))
        return u if self.output_side is None else self.output_side @ u

    def _raise(self, c: Tensor) -> Tensor:
        if self.input_side is not None:
            c = adjoint(self.input_side.solve(adjoint(c)))
        return c if self.output_side is None else self.output_side.solve(c)

    def _point_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features


class FisherLoRAQuotient(LoRAQuotient):
    """Low-rank products W = B A modulo GL(r), with a Kronecker metric tr(L U R Vᵀ) for W.

    With L = SᵀS and R = TᵀT, (B, A) -> (S B, A Tᵀ) is a linear isometry onto
    :class:`LoRAQuotient` that commutes with every gauge. Every operation goes there and back, so
    metrics, distances, means and ranks are the ones documented there, for whitened products.

    Args:
        out_features: m.
        in_features: n.
        metric: ``"mixed"``, ``"invariant"`` or ``"embedded"``, of the whitened product.
        distance: ``"exact"``, ``"aligned"`` or ``"chordal"``.
        input_gram: R, ``(..., n, n)``, dense, a stored Gram or a :class:`MetricFactor`; the
            identity if ``None``.
        output_gram: L, ``(..., m, m)``, in the same forms; the identity if ``None``.
        damping: λ in G + λ (tr G / n) I, on each side.
        shrinkage: σ in (1 - σ) G + σ diag(G), on each side.

    Raises:
        ValueError: A name is unknown, both Grams are ``None``, a size does not fit, or a Gram is
            not positive definite.

    Example:
        >>> import torch
        >>> gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
        >>> manifold = FisherLoRAQuotient(2, 3, distance="chordal", input_gram=gram)
        >>> x = manifold.pack(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> y = manifold.pack(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0, 0.0]]))
        >>> manifold.dist(x, y)  # twice the Euclidean distance, the first input has variance 4
        tensor(2.)
    """

    __scaling__ = LoRAQuotient.__scaling__.copy()

    def __init__(
        self,
        out_features: int,
        in_features: int,
        metric: str = "mixed",
        distance: str = "exact",
        *,
        input_gram: _Side = None,
        output_gram: _Side = None,
        damping: float = 0.0,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__(out_features, in_features, metric, distance)
        self.input_side, self.output_side = _sides(
            out_features, in_features, input_gram, output_gram, damping, shrinkage
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the metric, as geoopt's error messages print it."""
        return f"FisherLoRAQuotient({self.metric})"

    # The isometry: what LoRAQuotient takes apart is whitened, what it joins is unwhitened.

    def _split(self, x: Tensor) -> Pair:
        b, a = x[..., : self.out_features, :], x[..., self.out_features :, :]
        return (
            b if self.output_side is None else self.output_side.whiten(b),
            a if self.input_side is None else self.input_side.whiten(a),
        )

    def _join(self, pair: Pair) -> Tensor:
        return self._stack(pair, adjoint_root=False)

    def _stack(self, pair: Pair, *, adjoint_root: bool) -> Tensor:
        """Unwhiten by T⁻¹ (points and vectors) or by T⁻ᵀ (covectors)."""
        sides = (self.output_side, self.input_side)
        parts = [
            y if side is None else side.unwhiten(y, adjoint_root=adjoint_root)
            for y, side in zip(pair, sides, strict=True)
        ]
        batch = broadcast_shapes(*(y.shape[:-2] for y in parts))
        return torch.cat([y.expand(*batch, *y.shape[-2:]) for y in parts], -2)

    def _split_covector(self, u: Tensor) -> Pair:
        b, a = u[..., : self.out_features, :], u[..., self.out_features :, :]
        return (
            b if self.output_side is None else self.output_side.unwhiten(b, adjoint_root=True),
            a if self.input_side is None else self.input_side.unwhiten(a, adjoint_root=True),
        )

    def _join_covector(self, pair: Pair) -> Tensor:
        sides = (self.output_side, self.input_side)
        parts = [
            y if side is None else side.whiten(y, adjoint_root=True)
            for y, side in zip(pair, sides, strict=True)
        ]
        return torch.cat(parts, -2)

    def reduce(
        self, points: Sequence[Tensor], *, rank: int | None = None
    ) -> tuple[LoRAQuotient, Tensor, Callable[[Tensor], Tensor]]:
        """Restrict points to the span of their whitened factors, where the metric is the plain one.

        Args:
            points: Points ``(..., m + n, r_i)`` of one batch shape; ranks may differ.
            rank: Rank of the mean, the greatest of the r_i if ``None``.

        Returns:
            As of :meth:`LoRAQuotient.reduce`.
        """
        whitened = LoRAQuotient(self.out_features, self.in_features, self.metric, self.distance)
        white = [torch.cat(self._split(x), -2) for x in points]
        reduced, anchors, restore = whitened.reduce(white, rank=rank)
        return reduced, anchors, lambda x: self._join(whitened._split(restore(x)))

    def _exact_log(
        self, x: Tensor, y: Tensor, guess: Tensor | None, precise: bool
    ) -> tuple[Tensor, Tensor]:
        # Whitened before the batch is flattened, as the metric may have a batch shape of its own.
        white = [torch.cat(self._split(z), -2) for z in (x, y)]
        if guess is not None:
            guess = torch.cat(self._split(guess), -2)
        whitened = LoRAQuotient(self.out_features, self.in_features, self.metric, self.distance)
        log, good = whitened._exact_log(white[0], white[1], guess, precise)
        return self._join(whitened._split(log)), good

    @__scaling__(ScalingInfo())
    def unpack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split a point into B ``(..., m, r)`` and A ``(..., r, n)``."""
        self._assert_check_shape(tuple(x.shape), "x")
        return x[..., : self.out_features, :], adjoint(x[..., self.out_features :, :])

    @__scaling__(ScalingInfo())
    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """The partial identity W = I_r, a fixed point of the right shape, ``(..., m + n, r)``."""
        plain = LoRAQuotient(self.out_features, self.in_features)
        point = plain.origin(*size, dtype=dtype, device=device, seed=seed)
        return geoopt.ManifoldTensor(point.as_subclass(Tensor), manifold=self)


def _sides(
    out_features: int,
    in_features: int,
    input_gram: _Side,
    output_gram: _Side,
    damping: float,
    shrinkage: float,
) -> tuple[MetricFactor | None, MetricFactor | None]:
    if input_gram is None and output_gram is None:
        raise ValueError(
            "input_gram and output_gram are both None; give one, or use geoopt.Euclidean"
        )
    sides: list[MetricFactor | None] = []
    for name, gram, size in (
        ("input_gram", input_gram, in_features),
        ("output_gram", output_gram, out_features),
    ):
        if gram is None:
            sides.append(None)
            continue
        try:
            if isinstance(gram, MetricFactor):  # checked when its roots are first needed
                side = gram
            else:
                side = MetricFactor(gram, damping=damping, shrinkage=shrinkage)
                side._factorise()
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('gram: ')}") from error
        if side.features != size:
            raise ValueError(f"{name}: expected size {size}, got {side.features}")
        sides.append(side)
    return sides[0], sides[1]
