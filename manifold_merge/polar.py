"""Low-rank adapters as polar factorisations: frames and spectrum modulo O(r)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from manifold_merge.linalg import adjoint, broadcast_shapes, hermitian_pinv, symmetric_sylvester
from manifold_merge.lora_log import ALIGNED, CHORDAL, EXACT, chordal_distance
from manifold_merge.polar_alignment import Triple, act, polar_factor
from manifold_merge.polar_factors import PolarFactors
from manifold_merge.polar_log import (
    aligned_distance2,
    chordal_covector,
    horizontal,
    search,
    vertical,
)
from manifold_merge.quotient import Gauge, QuotientManifold, squared_distance
from manifold_merge.stiefel import skew, sym

__all__ = ["PolarLoRAQuotient"]

DISTANCES = ("exact", "aligned", "chordal")


class PolarLoRAQuotient(QuotientManifold):
    """Polar factorisations W = U R Vᵀ modulo (U, R, V) ~ (U O, OᵀR O, V O), O in O(r).

    U ``(..., m, r)`` and V ``(..., n, r)`` have orthonormal columns, R ``(..., r, r)`` is symmetric
    positive definite: directions and strengths of a low-rank update are separate coordinates. A
    point is one stacked tensor X = [U; R; V] of shape ``(..., m + r + n, r)``; :meth:`pack` and
    :meth:`unpack` convert from and to the factors (B, A) that PEFT stores.

    The metric is |ξ_U|² + λ tr (R⁻¹ξ_R)² + |ξ_V|²: frames turn as on the Stiefel manifold, and
    spectra average geometrically. The distance is the third knob, besides manifold and λ:

    * ``distance="exact"``: the geodesic distance, by shooting in the quotient. Where no geodesic
      is found, ``"aligned"`` is used for that element.
    * ``distance="aligned"``: chords in place of arcs between frames, d² = min over O of
      |U_x - U_y O|² + |V_x - V_y O|² + λ d²(R_x, OᵀR_y O). The logarithm is -½ times its gradient:
      the projected chords and the logarithm of the spectrum. Both agree with the exact ones to
      second order, and cost no shooting.
    * ``distance="chordal"``: |W_x - W_y|_F and the horizontal lift of the projected difference.

    Wherever W has no full rank (a fresh adapter has B = 0), spectra are infinitely far apart, so
    ``"chordal"`` is used for that element. :meth:`log_path` says which construction each element
    took, as the codes ``EXACT``, ``ALIGNED`` and ``CHORDAL``. No operation returns NaN.

    Minimising over O is not convex. Shooting starts from several rotations that do not depend on
    the gauge; the shortest geodesic found counts. Where r > 3 and the frames are nearly orthogonal,
    a shorter one may exist.

    Args:
        out_features: m, rows of U and of W.
        in_features: n, rows of V and columns of W.
        spectrum_weight: λ > 0; large values make differences of strength count more.
        distance: ``"exact"``, ``"aligned"`` or ``"chordal"``.

    Raises:
        ValueError: If a size or the weight is not positive or the distance is unknown; the message
            lists the names.

    Source: Bonnabel and Sepulchre, SIAM J. Matrix Anal. Appl. 31 (2010); Meyer, Bonnabel and
    Sepulchre, ICML 2011; Mishra, Meyer, Bonnabel and Sepulchre, arXiv:1209.0430, section 3.3.

    Example:
        >>> import torch
        >>> manifold = PolarLoRAQuotient(6, 5)
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> x = manifold.pack(B, A)
        >>> G = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
        >>> y = manifold.pack(B @ G, torch.linalg.inv(G) @ A)  # other numbers, same model
        >>> bool(manifold.dist(x, y) < 1e-3)
        True
    """

    reversible = False
    __scaling__ = QuotientManifold.__scaling__.copy()
    path_names = {EXACT: "exact", ALIGNED: "aligned", CHORDAL: "chordal"}  # noqa: RUF012

    def __init__(
        self,
        out_features: int,
        in_features: int,
        spectrum_weight: float = 1.0,
        distance: str = "exact",
    ) -> None:
        if out_features < 1 or in_features < 1:
            raise ValueError(
                f"PolarLoRAQuotient needs positive sizes, got out_features={out_features} and "
                f"in_features={in_features}"
            )
        if not (spectrum_weight > 0 and math.isfinite(spectrum_weight)):
            raise ValueError(f"spectrum_weight must be positive and finite; got {spectrum_weight}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
        super().__init__(PolarFactors(out_features, in_features, spectrum_weight))
        self.out_features = out_features
        self.in_features = in_features
        self.spectrum_weight = spectrum_weight
        self.distance = distance

    name = "PolarLoRAQuotient"

    def extra_repr(self) -> str:
        """Sizes and options, as ``repr`` shows them."""
        return (
            f"{self.out_features}, {self.in_features}, "
            f"spectrum_weight={self.spectrum_weight}, distance={self.distance!r}"
        )

    # --- factors ---------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def pack(self, B: Tensor, A: Tensor) -> Tensor:
        """Factorise W = B A.

        Args:
            B: ``(..., m, r)``.
            A: ``(..., r, n)``.

        Returns:
            The point [U; R; V], ``(..., m + r + n, r)``, with R diagonal and descending. If W has a
            lower rank than r, R is singular: the product is exact, but only chordal distances are
            defined, and ``check_point_on_manifold`` says so.

        Raises:
            ValueError: If the shapes do not fit this manifold or each other, or r > min(m, n).
        """
        m, n = self.out_features, self.in_features
        deep = B.ndim >= 2 and A.ndim >= 2
        if not deep or (*B.shape[-2:], A.shape[-1]) != (m, A.shape[-2], n):
            raise ValueError(
                f"pack expects B (..., {m}, r) and A (..., r, {n}) of one rank r; got "
                f"B {tuple(B.shape)} and A {tuple(A.shape)}"
            )
        if B.shape[-1] > min(m, n):
            raise ValueError(
                f"pack: rank {B.shape[-1]} exceeds min(m, n) = {min(m, n)}; drop the rank that W "
                "cannot have, for instance by a singular value decomposition of the pair"
            )
        (frame_u, upper_u), (frame_v, upper_v) = torch.linalg.qr(B), torch.linalg.qr(adjoint(A))
        u, s, vh = torch.linalg.svd(upper_u @ adjoint(upper_v))
        parts = (frame_u @ u, torch.diag_embed(s), frame_v @ adjoint(vh))
        batch = broadcast_shapes(*(p.shape[:-2] for p in parts))
        return self.total.join([p.expand(*batch, *p.shape[-2:]) for p in parts])

    @__scaling__(ScalingInfo())
    def unpack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Balanced factors B = U R^½ ``(..., m, r)`` and A = R^½ Vᵀ ``(..., r, n)``."""
        u, r, v = self._split(x)
        values, basis = torch.linalg.eigh(r.detach())
        root = (basis * values.clamp(min=0).sqrt()[..., None, :]) @ adjoint(basis)
        if r.requires_grad:  # the root S of R moves by dS S + S dS = dR
            root = root + symmetric_sylvester(root, sym(r - r.detach()))
        return u @ root, root @ adjoint(v)

    @__scaling__(ScalingInfo())
    def product(self, x: Tensor) -> Tensor:
        """The model itself, W = U R Vᵀ, ``(..., m, n)``."""
        u, r, v = self._split(x)
        return u @ r @ adjoint(v)

    def _split(self, x: Tensor) -> Triple:
        self._assert_check_shape(tuple(x.shape), "x")
        return self.total.split(x)

    # --- Riemannian structure --------------------------------------------------------------------

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The whole inner product, broadcast to the shape of a point, ``(..., m + r + n, r)``.

        An entry-wise second moment would make the step of Riemannian Adam depend on the gauge.
        """
        return self.inner(x, u, v, keepdim=True).expand_as(u)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of a tangent vector, of the batch shape or ``(..., 1, 1)``."""
        return self.inner(x, u, keepdim=keepdim).clamp(min=0).sqrt()

    def _horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        x, u = torch.broadcast_tensors(x, u)
        split = self.total.split
        return self.total.join(horizontal(split(x), split(u), self.spectrum_weight))

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x`` along the horizontal vector ``u``, at time 1, in closed form.

        Args:
            x: Point, ``(..., m + r + n, r)``.
            u: Tangent vector, ``(..., m + r + n, r)``.

        Returns:
            Point, ``(..., m + r + n, r)``, in the gauge that stays horizontal along the geodesic.
            Where R is singular it is the retraction.
        """
        x, u = torch.broadcast_tensors(x, u)
        end = self.total.expmap(x, u)
        finite = end.isfinite().all(-1).all(-1)[..., None, None]
        return torch.where(finite, end, self.total.retr(x, u))

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Horizontal vector at ``x`` that points to the class of ``y``; not differentiable.

        Args:
            x: Point, ``(..., m + r + n, r)``.
            y: Point, ``(..., m + r + n, r)``; its rank may differ if ``distance="chordal"``.

        Returns:
            Tangent vector, ``(..., m + r + n, r)``.

        Raises:
            ValueError: If the ranks differ and the distance is not chordal.
        """
        return self._log(x, y)[0]

    @__scaling__(ScalingInfo())
    def log_path(self, x: Tensor, y: Tensor) -> Tensor:
        """Which construction :meth:`logmap` takes, as integer codes of the batch shape.

        The codes are ``EXACT`` 0, ``ALIGNED`` 1 and ``CHORDAL`` 2; ``path_names`` has the words.
        """
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
        """Squared distance, of the batch shape, differentiable once."""
        self._assert_check_shape(tuple(x.shape), "x")
        self._assert_check_shape(tuple(y.shape), "y")
        squared = squared_distance(self, x, y)
        return squared[..., None, None] if keepdim else squared

    @__scaling__(ScalingInfo(2, 1))
    def dist2_logmap(
        self, x: Tensor, y: Tensor, *, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Squared distance ``(...)`` and logarithm ``(..., m + r + n, r)`` in one computation.

        Args:
            x: Point, ``(..., m + r + n, r)``.
            y: Point, ``(..., m + r + n, r)``.
            guess: Approximate logarithm.
            precise: With ``False``, exact logarithms have about 5 digits, and the search over O(r)
                is a local one around the guess, if there is one.

        Returns:
            Squared distances of the batch shape, and tangent vectors ``(..., m + r + n, r)``.
        """
        return self._dist2_logmap(x, y, guess, precise)

    def _dist2_logmap(
        self, x: Tensor, y: Tensor, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor]:
        x, y = _broadcast(x, y)
        u, path, aligned = self._log(x, y, guess, precise)
        squared, px = self.inner(x, u), self._split(x)
        if bool((path == ALIGNED).any()):
            near = aligned_distance2(px, self._split(aligned), self.spectrum_weight)
            squared = torch.where(path == ALIGNED, near, squared)
        if bool((path == CHORDAL).any()):
            pairs = [(u_ @ r_, v_) for u_, r_, v_ in (px, self._split(y))]
            squared = torch.where(path == CHORDAL, chordal_distance(*pairs).square(), squared)
        return squared, u

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        """The derivative of -½ d² with respect to the array ``x``, for each path its own."""
        x, y = _broadcast(x, y)
        u, path, _ = self._log(x, y)
        px, xi = self._split(x), self.total.split(u)
        inverse = hermitian_pinv(px[1])
        lowered = (xi[0], self.spectrum_weight * inverse @ xi[1] @ inverse, xi[2])
        chord = chordal_covector(px, self._split(y))
        return torch.where(
            (path == CHORDAL)[..., None, None], self.total.join(chord), self.total.join(lowered)
        )

    @torch.no_grad()
    def _log(
        self, x: Tensor, y: Tensor, guess: Tensor | None = None, precise: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithm, path code, and y in the gauge that the construction aligned with x."""
        x, y = _broadcast(x, y)
        if self.distance != "chordal" and x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"the ranks {x.shape[-1]} and {y.shape[-1]} differ, which only distance='chordal' "
                "allows; lift or truncate one of the points"
            )
        start, px, py = None, self._split(x), self._split(y)
        if guess is not None and not precise and self.distance != "chordal":
            # The gauge of y at the guess's end. A precise answer is one that no guess can change.
            end = self._split(self.expmap(x, guess))
            start = polar_factor(adjoint(py[0]) @ end[0] + adjoint(py[2]) @ end[2])
        xi, path, turned = search(
            px, py, self.spectrum_weight, self.distance, start=start, precise=precise
        )
        return self.total.join(xi), path, self.total.join(turned)

    # --- quotient structure ----------------------------------------------------------------------

    def _align(self, x: Tensor, y: Tensor) -> Tensor:
        if self.distance != "chordal":
            return self._log(x, y)[2]
        sizes = self.out_features, self.in_features  # chords need no gauge: take the aligned one
        return PolarLoRAQuotient(*sizes, self.spectrum_weight, "aligned")._align(x, y)

    @__scaling__(ScalingInfo())
    def random_gauge(
        self, x: Tensor, *, generator: torch.Generator | None = None, condition: float = 10.0
    ) -> Gauge:
        """Draw O in O(r) and return its action, [U; R; V] -> [U O; OᵀR O; V O].

        Args:
            x: Point, ``(..., m + r + n, r)``.
            generator: Source of randomness.
            condition: Without meaning here; orthogonal matrices have condition number 1.

        Returns:
            A function from ``(..., m + r + n, r)`` to ``(..., m + r + n, r)``.
        """
        o = torch.linalg.qr(self._square_noise(x, generator))[0]
        return lambda z: self.total.join(act(self.total.split(z), o))

    @__scaling__(ScalingInfo())
    def random_vertical(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw K skew and return [U K; R K - K R; V K], ``(..., m + r + n, r)``."""
        k = skew(self._square_noise(x, generator))
        return self.total.join(vertical(self._split(x), k))

    @staticmethod
    def _square_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (*x.shape[:-2], x.shape[-1], x.shape[-1])
        return torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)

    # --- points ----------------------------------------------------------------------------------

    @__scaling__(ScalingInfo())
    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> geoopt.ManifoldTensor:
        """Draw uniform frames and a spectrum around the identity, ``(..., m + r + n, r)``.

        The only further keyword is ``generator``, a source of randomness.
        """
        x = self.total.random(*size, dtype=dtype, device=device, **kwargs)
        return geoopt.ManifoldTensor(x.as_subclass(Tensor), manifold=self)

    @__scaling__(ScalingInfo())
    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """The partial identity W = I_r, always the same point, ``(..., m + r + n, r)``."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        r = shape[-1]
        parts = [
            torch.eye(k, r, dtype=dtype, device=device)
            for k in (self.out_features, r, self.in_features)
        ]
        return geoopt.ManifoldTensor(self.total.join(parts).expand(shape).clone(), manifold=self)

    # --- what a Fréchet mean may use -------------------------------------------------------------

    def reduce(
        self, points: Sequence[Tensor], *, rank: int | None = None
    ) -> tuple[PolarLoRAQuotient, Tensor, Callable[[Tensor], Tensor]]:
        """Restrict points exactly to the subspace that they span, whatever the size of W.

        Reflections through the spans of all U and of all V are isometries, and their fixed sets
        are totally geodesic: all geodesics between the data, and their mean, stay there.

        Args:
            points: Points ``(..., m + r_i + n, r_i)`` of one batch shape; ranks may differ.
            rank: Rank of the mean, the greatest of the r_i if ``None``.

        Returns:
            A manifold of size K_U x K_V with K <= Σ r_i; the points on it, padded with zero
            singular values to one rank, ``(k, ..., K_U + r + K_V, r)``; and a function that takes
            points back to this manifold.

        Raises:
            ValueError: If the rank is not between 1 and min(m, n, Σ r_i).
        """
        width = max(x.shape[-1] for x in points)
        limit = min(self.out_features, self.in_features, sum(x.shape[-1] for x in points))
        if rank is not None and not 1 <= rank <= limit:
            raise ValueError(
                f"rank: expected 1 <= rank <= {limit} = min(m, n, sum of ranks), got {rank}"
            )
        dtype = points[0].dtype
        work = dtype if points[0].device.type == "mps" else torch.float64
        split = [self._split(x.to(work)) for x in points]
        frames = [torch.linalg.qr(torch.cat([p[i] for p in split], -1))[0] for i in (0, 2)]
        sizes = frames[0].shape[-1], frames[1].shape[-1]
        reduced = PolarLoRAQuotient(*sizes, self.spectrum_weight, self.distance)
        stacked = []
        for (u, r, v), x in zip(split, points, strict=True):
            u, v = adjoint(frames[0]) @ u, adjoint(frames[1]) @ v
            missing = max(width, rank or 0) - x.shape[-1]
            if missing:
                pad = (0, missing)
                b = torch.nn.functional.pad(u @ r, pad)
                stacked.append(reduced.pack(b, adjoint(torch.nn.functional.pad(v, pad))))
            else:
                stacked.append(reduced.projx(reduced.total.join((u, r, v))))

        def restore(x: Tensor) -> Tensor:
            u, r, v = reduced.total.split(x)
            return self.total.join((frames[0] @ u, r, frames[1] @ v)).to(dtype)

        return reduced, torch.stack(stacked), restore

    @property
    def log_is_gradient(self) -> bool:  # type: ignore[override]
        """Whether logmap is the gradient of -½ d²; not for chordal distances."""
        return self.distance != "chordal"

    @property
    def has_closed_form_mean(self) -> bool:  # type: ignore[override]
        """Whether the mean is a truncated singular value decomposition: for chordal distances."""
        return self.distance == "chordal"

    def closed_form_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """Best approximation of Σ wᵢ Wᵢ by a matrix of the given rank (Eckart and Young 1936).

        Args:
            points: Points ``(k, ..., m + r + n, r)``.
            weights: ``(k, ...)``; neither their signs nor their sum matter here.
            rank: Rank of the result, r if ``None``.

        Returns:
            The mean, ``(..., m + rank + n, rank)``; R is singular if Σ wᵢ Wᵢ has a lower rank.
        """
        rank = points.shape[-1] if rank is None else rank
        split = [self._split(x) for x in points]
        b = [u @ r * w[..., None, None] for (u, r, _), w in zip(split, weights, strict=True)]
        (frame_u, upper_u), (frame_v, upper_v) = (
            torch.linalg.qr(torch.cat(parts, -1)) for parts in (b, [v for _, _, v in split])
        )
        u, s, vh = torch.linalg.svd(upper_u @ adjoint(upper_v), full_matrices=False)
        frame_u, frame_v = frame_u @ u[..., :rank], frame_v @ adjoint(vh)[..., :rank]
        pad = (0, rank - frame_u.shape[-1])
        if pad[1] > 0:
            padded = [torch.nn.functional.pad(f, pad) for f in (frame_u * s[..., None, :], frame_v)]
            return self.pack(padded[0], adjoint(padded[1]))
        return self.total.join((frame_u, torch.diag_embed(s[..., :rank]), frame_v))

    def start_mean(self, points: Tensor, weights: Tensor, rank: int | None = None) -> Tensor:
        """The chordal mean, ``(..., m + rank + n, rank)``: it treats all anchors alike."""
        return self.closed_form_mean(points, weights, rank)

    def relative_difference(self, x: Tensor, y: Tensor) -> Tensor:
        """|W_x - W_y| / |W_x| of the batch shape."""
        (u, r, v), (uy, ry, vy) = self._split(x), self._split(y)
        size = r.square().sum((-2, -1)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        return chordal_distance((u @ r, v), (uy @ ry, vy)) / size


def _broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast the batch dimensions; the ranks may differ."""
    batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
