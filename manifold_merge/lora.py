"""Low-rank adapters as points: pairs of factors modulo GL(r)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.core import reduce_pairs, truncated_sum
from manifold_merge.factor_pairs import FactorPairs
from manifold_merge.linalg import _traced, broadcast_shapes
from manifold_merge.lora_hessian import ehess2rhess
from manifold_merge.lora_log import (
    ALIGNED,
    CHORDAL,
    EXACT,
    aligned_representative,
    chordal_covector,
    chordal_distance,
    chordal_log,
    exact_log_between,
    full_rank,
    substitute_covector,
    substitute_dist2,
)
from manifold_merge.lora_metrics import METRICS, Pair
from manifold_merge.quotient import squared_distance

__all__ = ["ALIGNED", "CHORDAL", "DISTANCES", "EXACT", "LoRAQuotient"]

DISTANCES = ("exact", "aligned", "chordal")


class LoRAQuotient(FactorPairs):
    """Pairs (B, A) of rank r modulo (B, A) ~ (B G, G⁻¹A), that is, low-rank products W = B A.

    A point is one stacked tensor X = [B; Aᵀ] of shape ``(..., m + n, r)``, with B ``(..., m, r)``
    and A ``(..., r, n)`` as PEFT stores them (``lora_B.weight``, ``lora_A.weight``).

    The geometry has three knobs: this manifold, a GL(r)-invariant **metric**, and a **distance**.

    ============== ================================ ===========================================
    metric         inner product of ξ and η         character
    ============== ================================ ===========================================
    ``mixed``      <ξ_B A, η_B A> + <B ξ_A, B η_A>  Riemannian preconditioner of LoRA training
    ``invariant``  tr Q⁻¹ξ_Bᵀη_B + tr P⁻¹ξ_A η_Aᵀ   scale-free, complete, keeps the rank
    ``embedded``   <dW, dW'>, dW = ξ_B A + B ξ_A    the matrices of rank r inside all matrices
    ============== ================================ ===========================================

    with Q = BᵀB and P = A Aᵀ.

    * ``distance="exact"``: the geodesic distance, by shooting. Where shooting does not converge
      (beyond the injectivity radius) or either point lacks full rank, a function of the chord
      stands in for that element (:func:`manifold_merge.lora_log.substitute_dist2`).
    * ``distance="aligned"``: the closed-form inverse retraction; chordal where it does not exist.
    * ``distance="chordal"``: |W_x - W_y|_F and the horizontal lift of the projected difference.

    :meth:`log_path` says which construction each element took. No operation returns NaN. A pair
    without full rank (a fresh adapter has B = 0) is accepted: inverses become pseudo-inverses, so
    gradients of least norm and chordal distances are defined there, but tangent vectors cannot
    leave the stratum of that rank through a factor that is zero; ``explain=True`` on
    ``check_point_on_manifold`` says so.

    Args:
        out_features: m, rows of B and of W.
        in_features: n, columns of A and of W.
        metric: ``"mixed"``, ``"invariant"`` or ``"embedded"``.
        distance: ``"exact"``, ``"aligned"`` or ``"chordal"``.

    Raises:
        ValueError: If a size is not positive or a name is unknown; the message lists the names.

    Source: da Silva, Adnan, Dangel and Oore, arXiv:2604.27155; metrics after Mishra, Meyer,
    Bonnabel and Sepulchre, arXiv:1209.0430, and Vandereycken (2013).

    Example:
        >>> import torch
        >>> manifold = LoRAQuotient(6, 5, metric="mixed")
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> x = manifold.pack(B, A)
        >>> G = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
        >>> y = manifold.pack(B @ G, torch.linalg.inv(G) @ A)  # other numbers, same model
        >>> bool(manifold.dist(x, y) < 1e-3)
        True
    """

    reversible = False
    __scaling__ = FactorPairs.__scaling__.copy()

    def __init__(
        self,
        out_features: int,
        in_features: int,
        metric: str = "mixed",
        distance: str = "exact",
    ) -> None:
        super().__init__(out_features, in_features)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
        self.metric = metric
        self.distance = distance

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the metric, as geoopt's error messages print it."""
        return f"LoRAQuotient({self.metric})"

    def extra_repr(self) -> str:
        """Sizes and distance, as ``repr`` shows them."""
        return f"{self.out_features}, {self.in_features}, distance={self.distance!r}"

    # Derivatives of a function go the other way than vectors: a subclass whose factors are those of
    # another LoRAQuotient up to an isometry changes these two besides `_split` and `_join`.

    def _split_covector(self, u: Tensor) -> Pair:
        return self._split(u)

    def _join_covector(self, pair: Pair) -> Tensor:
        return self._join(pair)

    # --- Riemannian structure --------------------------------------------------------------------

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Inner product of tangent vectors at ``x``.

        Args:
            x: Point, ``(..., m + n, r)``.
            u: Tangent vector, ``(..., m + n, r)``.
            v: Tangent vector, ``u`` if not given.
            keepdim: Keep two trailing dimensions of size 1.

        Returns:
            The batch shape, or ``(..., 1, 1)``.
        """
        v = u if v is None else v
        value = METRICS[self.metric].inner(self._split(x), self._split(u), self._split(v))
        return value if keepdim else value[..., 0, 0]

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The whole inner product, broadcast to the shape of a point, ``(..., m + n, r)``.

        An entry-wise second moment would make the step of Riemannian Adam depend on the gauge.
        """
        return self.inner(x, u, v, keepdim=True).expand_as(u)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of a tangent vector, of the batch shape or ``(..., 1, 1)``."""
        return self.inner(x, u, keepdim=keepdim).clamp(min=0).sqrt()

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        return self._join(METRICS[self.metric].horizontal(self._split(x), self._split(u)))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient from the Euclidean one.

        Args:
            x: Point, ``(..., m + n, r)``.
            u: Euclidean gradient of a function of W, ``(..., m + n, r)``.

        Returns:
            The horizontal lift of the gradient, ``(..., m + n, r)``.
        """
        return self._join(METRICS[self.metric].gradient(self._split(x), self._split_covector(u)))

    @__scaling__(ScalingInfo())
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """Riemannian Hessian along ``u``, connection included, from Euclidean derivatives.

        Args:
            x: Point of full rank, ``(..., m + n, r)``.
            egrad: Euclidean gradient at ``x`` of a function of W, ``(..., m + n, r)``.
            ehess: Its directional derivative along ``u``, ``(..., m + n, r)``.
            u: Horizontal vector at ``x``, ``(..., m + n, r)``.

        Returns:
            A horizontal vector, ``(..., m + n, r)``.

        Source: :mod:`manifold_merge.lora_hessian`.
        """
        return ehess2rhess(self, x, egrad, ehess, u)

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract by addition, x + u, which commutes with every gauge, ``(..., m + n, r)``."""
        return x + u

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x`` along the horizontal vector ``u``, at time 1.

        Closed form for ``invariant``; integrated for ``mixed`` and ``embedded``, whose geodesics
        may end at a matrix of lower rank: beyond such an end the retraction is returned.

        Args:
            x: Point, ``(..., m + n, r)``.
            u: Tangent vector, ``(..., m + n, r)``.

        Returns:
            Point, ``(..., m + n, r)``, in the gauge that stays horizontal along the geodesic.
        """
        x, u = torch.broadcast_tensors(x, u)
        end = self._join(METRICS[self.metric].exponential(self._split(x), self._split(u)))
        finite = end.isfinite().all(-1).all(-1)[..., None, None]
        return torch.where(finite, end, x + u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Horizontal vector at ``x`` that points to the class of ``y``.

        ``distance`` decides how it is found; only ``aligned`` and ``chordal`` are differentiable.

        Args:
            x: Point, ``(..., m + n, r)``.
            y: Point, ``(..., m + n, r)``.

        Returns:
            Tangent vector, ``(..., m + n, r)``.
        """
        return self._log(x, y)[0]

    @__scaling__(ScalingInfo())
    def log_path(self, x: Tensor, y: Tensor) -> Tensor:
        """Which construction :meth:`logmap` takes: ``EXACT``, ``ALIGNED`` or ``CHORDAL``.

        Args:
            x: Point, ``(..., m + n, r)``.
            y: Point, ``(..., m + n, r)``.

        Returns:
            Integer codes of the batch shape.
        """
        if self.distance == "chordal" or x.shape[-1] != y.shape[-1]:
            batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
            return torch.full(batch, CHORDAL, device=x.device)
        return self._log(x, y)[1]

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance between the products of ``x`` and ``y``, of the batch shape."""
        squared = self.dist2(x, y, keepdim=keepdim)
        positive = squared > 0
        # The root has an infinite slope at zero; its subgradient there is taken to be zero.
        return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)

    @__scaling__(ScalingInfo(2))
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared distance, of the batch shape; its gradient is -2 times the logarithm."""
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        if self.distance == "aligned":
            squared = self._dist2_logmap_path(x, y)[0]
        else:
            squared = squared_distance(self, x, y)
        return squared[..., None, None] if keepdim else squared

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(
        self, x: Tensor, y: Tensor, *, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., m + n, r)`` in one computation.

        Args:
            x: Point, ``(..., m + n, r)``.
            y: Point, ``(..., m + n, r)``.
            guess: Approximate logarithm from which shooting starts.
            precise: With ``False``, exact logarithms have about 5 digits at a fraction of the cost.
        """
        return self._dist2_logmap_path(x, y, guess, precise)[:2]

    def _dist2_logmap_path(
        self, x: Tensor, y: Tensor, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y = _broadcast(x, y)
        u, path = self._log(x, y, guess, precise)
        if self.distance == "chordal":
            return chordal_distance(self._split(x), self._split(y)) ** 2, u, path
        chord = substitute_dist2(METRICS[self.metric], self._split(x), self._split(y))
        if self.distance == "exact":
            return torch.where(path == CHORDAL, chord, self.inner(x, u)), u, path
        # Symmetric in x and y, and the substitute where either direction is missing.
        back, path_back = self._log(y, x)
        there, good = u, ((path == ALIGNED) & (path_back == ALIGNED))
        if x.requires_grad or y.requires_grad or _traced(x):
            # What is not selected would enter derivatives if it were not finite.
            one = self.origin(*x.shape, dtype=x.dtype, device=x.device).as_subclass(Tensor)
            x, y = (torch.where(good[..., None, None], z, one) for z in (x, y))
            there, back = self._log(x, y)[0], self._log(y, x)[0]
        squared = 0.5 * (self.inner(x, there) + self.inner(y, back))
        squared = torch.where(good, squared, chord)
        return squared, u, path

    def _dist2(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared distance without gradient, symmetric in x and y."""
        return self._shorter(x, y)[0]

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        metric, px, py = METRICS[self.metric], self._split(x), self._split(y)
        if self.distance == "chordal":
            return self._join_covector(chordal_covector(px, py))
        _, u, path = self._shorter(x, y)
        exact = self._join_covector(metric.covector(px, self._split(u)))
        # Raising and lowering the index would lose what leaves the stratum of a deficient pair.
        chord = self._join_covector(substitute_covector(metric, px, py))
        return torch.where((path == CHORDAL)[..., None, None], chord, exact)

    def _shorter(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distance, its logarithm at x and the path code, symmetric in x and y.

        Beyond the injectivity radius shooting from either end may find another geodesic, or none:
        the shorter one counts, and a chord only where neither end found any.
        """
        there, u, path = self._dist2_logmap_path(x, y)
        if self.distance != "exact":
            return there, u, path
        back, w, path_back = self._dist2_logmap_path(y, x)
        # Lengths that differ by rounding alone are equal; |X/2|² is the square of a size of 1.
        eps = torch.finfo(there.dtype).eps
        rounding = eps**0.5 * there + eps * self.inner(x, x / 2)
        found = (path == EXACT) & (path_back == EXACT)
        turn = (path == CHORDAL) & (path_back == EXACT)
        turn = torch.where(found, back < there - rounding, turn)
        if bool(turn.any()):
            u = torch.where(turn[..., None, None], self._reversed(x, y, w, back), u)
        return torch.where(turn, back, there), u, torch.where(turn, EXACT, path)

    def _reversed(self, x: Tensor, y: Tensor, w: Tensor, squared: Tensor) -> Tensor:
        """The logarithm at x of the geodesic that leaves y along w and has this squared length."""
        bit, kind = 1e-5, x.dtype
        x, y = _broadcast(x, y)
        x, y, w = (z.to(_working_type(z)) for z in (x, y, w))
        # Its last bit, seen from x, is the guess for shooting.
        almost = self._split(self.expmap(y, (1 - bit) * w))
        guess = self._join(chordal_log(METRICS[self.metric], self._split(x), almost)) / bit
        shot, good = self._exact_log(x, y, guess, True)
        good = good & ((self.inner(x, shot) - squared).abs() <= 1e-6 * squared)
        return torch.where(good[..., None, None], shot, guess).to(kind)

    def _log(
        self, x: Tensor, y: Tensor, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logarithm and path code, with the far and deficient cases sorted out."""
        x, y = _broadcast(x, y)
        metric, px, py = METRICS[self.metric], self._split(x), self._split(y)
        u = self._join(chordal_log(metric, px, py))
        path = torch.full(x.shape[:-2], CHORDAL, device=x.device)
        if x.shape[-1] != y.shape[-1]:
            return u, path
        if self.distance == "aligned":
            aligned, good = aligned_representative(metric, px, py)
            good = good & (full_rank(px) & full_rank(py))
            difference = metric.horizontal(px, (aligned[0] - px[0], aligned[1] - px[1]))
            u = torch.where(good[..., None, None], self._join(difference), u)
            path = torch.where(good, ALIGNED, path)
        elif self.distance == "exact":
            exact, good = self._exact_log(x, y, guess, precise)
            # The gradient of -½ d² on either path, so that mixed paths have one objective.
            u = self._join(metric.gradient(px, substitute_covector(metric, px, py)))
            u = torch.where(good[..., None, None], exact, u)
            path = torch.where(good, EXACT, path)
        return u, path

    @torch.no_grad()
    def _exact_log(
        self, x: Tensor, y: Tensor, guess: Tensor | None, precise: bool
    ) -> tuple[Tensor, Tensor]:
        """Shooting on a flat batch in float64; says where it succeeded."""
        flat = [z.reshape(-1, *x.shape[-2:]) for z in (x, y)]
        work = _working_type(x)
        px, py = (self._split(z.to(work)) for z in flat)
        start = None if guess is None else self._split(guess.reshape(flat[0].shape).to(work))
        pair, good = exact_log_between(METRICS[self.metric], px, py, guess=start, precise=precise)
        return self._join(pair).to(x.dtype).reshape(x.shape), good.reshape(x.shape[:-2])

    # --- quotient structure ----------------------------------------------------------------------

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        """The representative of y whose difference from x is horizontal; else the nearest chord."""
        x, y = torch.broadcast_tensors(x, y)
        aligned, good = aligned_representative(METRICS[self.metric], self._split(x), self._split(y))
        return torch.where(good[..., None, None], self._join(aligned), y)

    # --- points ----------------------------------------------------------------------------------

    def projx(self, x: Tensor) -> Tensor:
        """Return a finite array as it is: pairs are an open set, and gauges must not move."""
        return x

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, f"`x` has {int((~x.isfinite()).sum())} entries that are not finite"
        full = full_rank(self._split(x))
        if not bool(full.all()):
            return False, (
                f"{int((~full).sum())} of {full.numel()} pairs have a product of rank below "
                f"{x.shape[-1]} (a freshly initialised adapter has B = 0): exact and aligned "
                "distances are replaced by chordal ones there"
            )
        return True, None

    # --- what a Fréchet mean may use -------------------------------------------------------------

    path_names: ClassVar[dict[int, str]] = {EXACT: "exact", ALIGNED: "aligned", CHORDAL: "chordal"}

    def reduce(
        self, points: Sequence[Tensor], *, rank: int | None = None
    ) -> tuple[LoRAQuotient, Tensor, Callable[[Tensor], Tensor]]:
        """Restrict points exactly to the subspace that they span (:mod:`manifold_merge.core`).

        Args:
            points: Points ``(..., m + n, r_i)`` of one batch shape; ranks may differ.
            rank: Rank of the mean, the greatest of the r_i if ``None``.

        Returns:
            A manifold of size K_B x K_A with K <= Σ r_i; the points on it, balanced and padded
            with zero columns to one rank, ``(k, ..., K_B + K_A, r)``; and a function that takes
            points ``(..., K_B + K_A, r)`` back to ``(..., m + n, r)``.

        Raises:
            ValueError: If the rank is not between 1 and min(m, n), or greater than Σ r_i.
        """
        width = max(x.shape[-1] for x in points)
        limit = min(self.out_features, self.in_features)
        if rank is not None and not 1 <= rank <= limit:
            raise ValueError(f"rank: expected 1 <= rank <= {limit} = min(m, n), got {rank}")
        total = sum(x.shape[-1] for x in points)
        if rank is not None and rank > total:
            raise ValueError(
                f"rank: the mean lies in the span of its anchors, whose ranks add up to {total}; "
                f"got {rank}, expected at most {total}"
            )
        pairs = [self._split(x) for x in points]
        b, a, rows, columns = reduce_pairs(pairs, max(width, rank or 0))
        reduced = LoRAQuotient(rows.dimension, columns.dimension, self.metric, self.distance)

        def restore(x: Tensor) -> Tensor:
            b, a = reduced._split(x)
            if torch.is_grad_enabled() and x.requires_grad:
                return self._join((rows.expand(b), columns.expand(a)))
            size = self.out_features + self.in_features
            point = points[0].new_empty(*x.shape[:-2], size, x.shape[-1])
            out = self._split(point)
            rows.expand(b, out[0])
            columns.expand(a, out[1])
            return point

        return reduced, self._join((b, a)), restore

    @property
    def log_is_searched(self) -> bool:  # type: ignore[override]
        """Whether logmap iterates: for exact distances."""
        return self.distance == "exact"

    @property
    def log_is_gradient(self) -> bool:  # type: ignore[override]
        """Whether logmap is the gradient of -½ d²; not for aligned representatives."""
        return self.distance != "aligned"

    @property
    def has_closed_form_mean(self) -> bool:  # type: ignore[override]
        """Whether the mean is a truncated singular value decomposition: for chordal distances."""
        return self.distance == "chordal"

    def closed_form_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """Best approximation of Σ wᵢ Wᵢ by a matrix of the given rank (Eckart and Young 1936).

        This is the Fréchet mean for the chordal distance, what PEFT calls ``svd``, and the start
        for the other distances.

        Args:
            points: Points ``(k, ..., m + n, r)``.
            weights: ``(k, ...)``; neither their signs nor their sum matter here.
            rank: Rank of the result, r if ``None``.

        Returns:
            The balanced mean, ``(..., m + n, rank)``, with zero columns beyond its own rank.
        """
        rank = points.shape[-1] if rank is None else rank
        return self._join(truncated_sum([self._split(x) for x in points], weights, rank))

    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """The chordal mean, ``(..., m + n, rank)``: it treats all anchors alike."""
        return self.closed_form_mean(points, weights, rank)

    def relative_difference(self, x: Tensor, y: Tensor) -> Tensor:
        """|W_x - W_y| / |W_x| of the batch shape."""
        px, py = self._split(x), self._split(y)
        zero = (torch.zeros_like(px[0]), torch.zeros_like(px[1]))
        return chordal_distance(px, py) / chordal_distance(px, zero).clamp(
            min=torch.finfo(x.dtype).tiny
        )


def _working_type(x: Tensor) -> torch.dtype:
    """Geodesics need more digits than float32 has if their errors are not to add up."""
    return x.dtype if x.device.type == "mps" else torch.float64


def _broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast the batch dimensions; the ranks may differ."""
    batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
