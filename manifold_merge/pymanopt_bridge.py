"""geoopt's manifolds in pymanopt, and pymanopt's in geoopt.

Points of one side are points of the other: no copy of a formula is kept here. pymanopt works on
single points as float64 numpy arrays, geoopt on batches of tensors with autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import numpy as np
import torch
from geoopt.manifolds.base import ScalingInfo
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from manifold_merge.accurate import LinAlgError, accurate, dist2_logmap, inner
from manifold_merge.derivatives import transported
from manifold_merge.linalg import broadcast_shapes
from manifold_merge.quotient import squared_distance

__all__ = ["GeooptInPymanopt", "PymanoptInGeoopt"]

Array = np.ndarray


class GeooptInPymanopt(Manifold):
    """A geoopt manifold, ours included, as a pymanopt manifold.

    A point is one array of the given shape. Batch dimensions in front make a product of independent
    copies, whose inner products and squared distances add up.

    Args:
        manifold: Any geoopt manifold. geoopt's sphere and a few others are computed with formulas
            that keep their digits (:mod:`manifold_merge.accurate`).
        shape: Shape of a point, ``(..., *point)``.

    Example:
        The dominant eigenvector of a matrix, by pymanopt on geoopt's sphere:

        >>> import geoopt, numpy as np, pymanopt
        >>> sphere = GeooptInPymanopt(geoopt.Sphere(), (3,))
        >>> sphere.dim
        2
        >>> matrix = np.diag([1.0, 2.0, 3.0])
        >>> @pymanopt.function.numpy(sphere)
        ... def cost(x):
        ...     return -x @ matrix @ x
        >>> @pymanopt.function.numpy(sphere)
        ... def gradient(x):
        ...     return -2 * matrix @ x
        >>> problem = pymanopt.Problem(sphere, cost, euclidean_gradient=gradient)
        >>> optimizer = pymanopt.optimizers.ConjugateGradient(verbosity=0)
        >>> point = optimizer.run(problem, initial_point=np.array([0.6, 0.0, 0.8])).point
        >>> round(float(abs(point[2])), 6)
        1.0
    """

    def __init__(self, manifold: geoopt.Manifold, shape: Sequence[int]) -> None:
        super().__init__(f"{type(manifold).__name__} of geoopt", 0)
        self.geoopt = accurate(manifold)
        self.shape = tuple(shape)

    @functools.cached_property
    def dim(self) -> int:
        """Dimension: the trace of the projection onto the tangent space."""
        x = _tensor(self.random_point())
        eye = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *self.shape)
        images = torch.stack([self.geoopt.proju(x, e) for e in eye])
        return round(float((images * eye).sum()))

    @property
    def typical_dist(self) -> float:
        """Scale from which trust regions start."""
        return float(np.sqrt(max(self.dim, 1)))

    def inner_product(
        self, point: Array, tangent_vector_a: Array, tangent_vector_b: Array
    ) -> float:
        """Inner product of tangent vectors, summed over the batch."""
        x, u, v = map(_tensor, (point, tangent_vector_a, tangent_vector_b))
        return float(inner(self.geoopt, x, u, v).sum())

    def norm(self, point: Array, tangent_vector: Array) -> float:
        """Length of a tangent vector."""
        return max(self.inner_product(point, tangent_vector, tangent_vector), 0.0) ** 0.5

    def projection(self, point: Array, vector: Array) -> Array:
        """Project an ambient array onto the tangent space."""
        return self._call("proju", point, vector)

    to_tangent_space = projection

    def zero_vector(self, point: Array) -> Array:
        """The zero vector."""
        return np.zeros_like(point)

    def random_point(self) -> Array:
        """A random point, where the geoopt manifold can draw one."""
        draw = getattr(self.geoopt, "random_normal", None) or self.geoopt.random
        try:
            return _array(draw(*self.shape, dtype=torch.float64))
        except ValueError:  # some of geoopt's draw in the dtype of their curvature only
            return _array(self.geoopt.projx(draw(*self.shape).to(torch.float64)))

    def random_tangent_vector(self, point: Array) -> Array:
        """A random tangent vector of length one."""
        noise = _array(torch.randn(self.shape, dtype=torch.float64))
        vector = self.projection(point, noise)
        return vector / self.norm(point, vector)

    def dist(self, point_a: Array, point_b: Array) -> float:
        """Geodesic distance."""
        x, y = _tensor(point_a), _tensor(point_b)
        return float(dist2_logmap(self.geoopt, x, y)[0].sum().clamp(min=0).sqrt())

    def exp(self, point: Array, tangent_vector: Array) -> Array:
        """Exponential map."""
        try:
            return self._call("expmap", point, tangent_vector)
        except LinAlgError:  # a trial step too long for the numbers that there are
            return np.full(np.shape(point), np.nan)

    def retraction(self, point: Array, tangent_vector: Array) -> Array:
        """Retraction: the exponential map, so that second-order models are second-order accurate.

        geoopt's ``retr`` need not be: that of factor pairs agrees with the exponential map to first
        order only, which would cost Newton-like methods their speed far from the solution.
        """
        return self.exp(point, tangent_vector)

    def log(self, point_a: Array, point_b: Array) -> Array:
        """Logarithm: the tangent vector at ``point_a`` that reaches ``point_b``."""
        return _array(dist2_logmap(self.geoopt, _tensor(point_a), _tensor(point_b))[1])

    def transport(self, point_a: Array, point_b: Array, tangent_vector_a: Array) -> Array:
        """Vector transport between tangent spaces."""
        x, y, v = map(_tensor, (point_a, point_b, tangent_vector_a))
        return _array(transported(self.geoopt, y, x, v))

    def pair_mean(self, point_a: Array, point_b: Array) -> Array:
        """Midpoint of the geodesic."""
        return self.exp(point_a, 0.5 * self.log(point_a, point_b))

    def euclidean_to_riemannian_gradient(self, point: Array, euclidean_gradient: Array) -> Array:
        """Riemannian gradient."""
        return self._call("egrad2rgrad", point, euclidean_gradient)

    def euclidean_to_riemannian_hessian(
        self,
        point: Array,
        euclidean_gradient: Array,
        euclidean_hessian: Array,
        tangent_vector: Array,
    ) -> Array:
        """Riemannian Hessian, applied to ``tangent_vector``.

        It needs the connection term of the metric, which ``LoRAQuotient`` and each manifold with a
        method ``ehess2rhess(x, egrad, ehess, u)`` know.

        Raises:
            NotImplementedError: On other manifolds. Give the problem a ``riemannian_hessian``, or
                use an optimiser of first order.
        """
        arrays = (point, euclidean_gradient, euclidean_hessian, tangent_vector)
        if hasattr(self.geoopt, "ehess2rhess"):
            return self._call("ehess2rhess", *arrays)
        raise NotImplementedError(
            f"{self.geoopt} has no ehess2rhess(x, egrad, ehess, u), and projecting the Euclidean "
            "Hessian would be wrong: pass riemannian_hessian to the problem, or use "
            "ConjugateGradient"
        )

    def _call(self, name: str, *arrays: Array) -> Array:
        return _array(getattr(self.geoopt, name)(*map(_tensor, arrays)))


class PymanoptInGeoopt(geoopt.Manifold):
    """A pymanopt manifold whose points are single arrays, as a geoopt manifold.

    Batches are worked off one by one. Distances are differentiable (once) where the manifold has a
    logarithm; all other methods are not seen by autograd.

    Args:
        manifold: A pymanopt manifold with ``point_layout`` 1.

    Raises:
        ValueError: If points consist of several arrays (products, fixed-rank SVDs).

    Example:
        A Fréchet mean on pymanopt's Grassmannian, which geoopt does not have:

        >>> import numpy as np, pymanopt, torch
        >>> from manifold_merge import frechet_mean
        >>> planes = PymanoptInGeoopt(pymanopt.manifolds.Grassmann(3, 1))
        >>> lines = torch.tensor([[[1.0], [0.0], [0.0]], [[-0.6], [-0.8], [0.0]]]).double()
        >>> frechet_mean(planes, lines).point.abs().flatten()  # a line has no sign
        tensor([0.8944, 0.4472, 0.0000], dtype=torch.float64)
    """

    __scaling__ = geoopt.Manifold.__scaling__.copy()
    reversible = False
    ndim = 0  # replaced for each instance

    def __init__(self, manifold: Manifold) -> None:
        super().__init__()
        if manifold.point_layout != 1:
            raise ValueError(
                f"{manifold}: points are made of {manifold.num_values} arrays, geoopt needs one "
                "tensor; bridge the factors and use geoopt.ProductManifold"
            )
        self.pymanopt = manifold
        example = manifold.random_point()
        self.point_shape = tuple(np.shape(example))
        self.ndim = len(self.point_shape)
        self.name = str(manifold)

    def _map(self, function: Callable[..., Any], *tensors: Tensor, scalar: bool = False) -> Tensor:
        """Call a numpy function on each element of the broadcast batch."""
        shape = self.point_shape
        batch = broadcast_shapes(*(t.shape[: t.ndim - self.ndim] for t in tensors))
        flat = [t.detach().expand(*batch, *shape).reshape(-1, *shape) for t in tensors]
        arrays = [t.cpu().to(torch.float64).numpy() for t in flat]
        results = [function(*element) for element in zip(*arrays, strict=True)]
        out = torch.as_tensor(np.array(results)).to(tensors[0].dtype).to(tensors[0].device)
        return out.reshape((*batch, *(() if scalar else shape)))

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Inner product of tangent vectors, of the batch shape."""
        value = _Bilinear.apply(x, u, u if v is None else v, self)
        return value[(..., *(None,) * self.ndim)] if keepdim else value

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project an ambient array onto the tangent space, ``(..., *point)``."""
        return _Projection.apply(x, u, self)

    def projx(self, x: Tensor) -> Tensor:
        """Return the array as it is: pymanopt has no projection onto a manifold."""
        return x

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient of the Euclidean gradient ``u``, ``(..., *point)``."""
        return self._map(self.pymanopt.euclidean_to_riemannian_gradient, x, u)

    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """Riemannian Hessian applied to ``u``, ``(..., *point)``."""
        return self._map(self.pymanopt.euclidean_to_riemannian_hessian, x, egrad, ehess, u)

    @__scaling__(ScalingInfo(u=-1))
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction, ``(..., *point)``."""
        return self._map(self.pymanopt.retraction, x, u)

    @__scaling__(ScalingInfo(u=-1))
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, ``(..., *point)``."""
        return self._map(self.pymanopt.exp, x, u)

    @__scaling__(ScalingInfo(1))
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm, ``(..., *point)``."""
        return self._map(self.pymanopt.log, x, y)

    @__scaling__(ScalingInfo(1))
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance, of the batch shape; differentiable once."""
        squared = squared_distance(self, x, y)
        positive = squared > 0
        value = torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
        return value[(..., *(None,) * self.ndim)] if keepdim else value

    def _dist2(self, x: Tensor, y: Tensor) -> Tensor:
        return self._map(self.pymanopt.dist, x, y, scalar=True).square()

    def _dist2_covector(self, x: Tensor, y: Tensor) -> Tensor:
        from manifold_merge.derivatives import lower

        return lower(self, x, self.logmap(x, y))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vector transport from ``x`` to ``y``, ``(..., *point)``."""
        return self._map(self.pymanopt.transport, x, y, v)

    def random(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any
    ) -> geoopt.ManifoldTensor:
        """Random points of the given shape, from numpy's global generator."""
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "x")
        count = int(np.prod(shape[: len(shape) - self.ndim], dtype=int))
        points = np.array([self.pymanopt.random_point() for _ in range(count)])
        x = torch.as_tensor(points).to(dtype or torch.get_default_dtype()).to(device)
        return geoopt.ManifoldTensor(x.reshape(shape), manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if tuple(shape[len(shape) - self.ndim :]) == self.point_shape:
            return True, None
        return False, f"`{name}` should have shape (..., {self.point_shape}), got {tuple(shape)}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        # pymanopt cannot tell; a point whose distance to itself is no number is none.
        ok = bool(x.isfinite().all())
        return ok, None if ok else "`x` has entries that are not finite"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        ok = torch.allclose(self.proju(x, u), u, atol=atol, rtol=rtol)
        return ok, None if ok else "`u` is changed by the projection onto the tangent space"


class _Projection(torch.autograd.Function):
    """The projection, differentiable in its second argument: it is its own adjoint."""

    @staticmethod
    def forward(x: Tensor, u: Tensor, manifold: PymanoptInGeoopt) -> Tensor:
        return manifold._map(manifold.pymanopt.projection, x, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.manifold = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, ctx.manifold._map(ctx.manifold.pymanopt.projection, x, grad), None


class _Bilinear(torch.autograd.Function):
    """The inner product, differentiable in the second vector by one evaluation for each entry."""

    @staticmethod
    def forward(x: Tensor, u: Tensor, v: Tensor, manifold: PymanoptInGeoopt) -> Tensor:
        return manifold._map(manifold.pymanopt.inner_product, x, u, v, scalar=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.manifold = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        x, u, _ = ctx.saved_tensors
        manifold = ctx.manifold
        eye = torch.eye(int(np.prod(manifold.point_shape)), dtype=x.dtype, device=x.device)
        parts = [
            manifold._map(
                manifold.pymanopt.inner_product, x, u, e.reshape(manifold.point_shape), scalar=True
            )
            for e in eye
        ]
        covector = torch.stack(parts, -1).reshape(*grad.shape, *manifold.point_shape)
        return None, None, grad[(..., *(None,) * manifold.ndim)] * covector, None


def _tensor(array: Array) -> Tensor:
    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def _array(tensor: Tensor) -> Array:
    return tensor.detach().as_subclass(Tensor).numpy()
