"""Small manifolds whose geometry is known in closed form, for the tests of the contract suite."""

from __future__ import annotations

from typing import Any

import geoopt
import torch


class Sphere(geoopt.SphereExact):
    """geoopt's sphere with a distance that is accurate near zero, and a Hessian."""

    def dist(self, x, y, *, keepdim=False):
        half = (x - y).norm(dim=-1, keepdim=keepdim), (x + y).norm(dim=-1, keepdim=keepdim)
        return 2 * torch.atan2(*half)

    def ehess2rhess(self, x, egrad, ehess, u):
        return self.proju(x, ehess) - (x * egrad).sum(-1, keepdim=True) * u


class ProjectiveSpace(Sphere):
    """Lines through the origin: the sphere modulo sign, a discrete group."""

    name = "ProjectiveSpace"

    def product(self, x):
        return x[..., :, None] * x[..., None, :]

    def align(self, x, y):
        return torch.where((x * y).sum(-1, keepdim=True) < 0, -y, y)

    def random_gauge(self, x, *, generator=None, condition=10.0):
        return torch.neg

    def same_point(self, x, y, *, atol=1e-6):
        return self.dist(x, y) <= atol

    def dist(self, x, y, *, keepdim=False):
        return super().dist(x, self.align(x, y), keepdim=keepdim)

    def logmap(self, x, y):
        return super().logmap(x, self.align(x, y))


class Directions(geoopt.Manifold):
    """Nonzero vectors modulo positive scale: a continuous group, isometric to the sphere.

    The metric <u, v> / |x|^2 is invariant; horizontal vectors are orthogonal to x.
    """

    name = "Directions"
    ndim = 1
    reversible = False
    sphere = Sphere()

    def _split(self, x):
        length = x.norm(dim=-1, keepdim=True)
        return length, x / length

    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        ok = bool((x.norm(dim=-1) > 0).all())
        return ok, None if ok else "`x` is zero or not finite"

    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        vertical = (x * u).sum(-1)
        ok = torch.allclose(vertical, torch.zeros_like(vertical), atol=atol, rtol=rtol)
        return ok, None if ok else "`<x, u> != 0`"

    def inner(self, x, u, v=None, *, keepdim=False):
        v = u if v is None else v
        return (u * v).sum(-1, keepdim=keepdim) / (x * x).sum(-1, keepdim=keepdim)

    def projx(self, x):
        return x.clone()

    def proju(self, x, u):
        return u - (x * u).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x

    def egrad2rgrad(self, x, u):
        return (x * x).sum(-1, keepdim=True) * self.proju(x, u)

    def ehess2rhess(self, x, egrad, ehess, u):
        # <egrad, x> is zero for functions of the direction, so geodesics add no term along u. The
        # part along x of ehess is not: it is -<egrad, u>, and proju removes it.
        return (x * x).sum(-1, keepdim=True) * self.proju(x, ehess)

    def retr(self, x, u):
        return x + u

    def expmap(self, x, u):
        length, s = self._split(x)
        return length * self.sphere.expmap(s, u / length)

    def logmap(self, x, y):
        length, s = self._split(x)
        return length * self.sphere.logmap(s, self._split(y)[1])

    def dist(self, x, y, *, keepdim=False):
        return self.sphere.dist(self._split(x)[1], self._split(y)[1], keepdim=keepdim)

    def transp(self, x, y, v):
        return self.proju(y, v * self._split(y)[0] / self._split(x)[0])

    def random(self, *size, dtype=None, device=None, **kwargs):
        return torch.randn(*size, dtype=dtype, device=device) + 0.1

    def product(self, x):
        return self._split(x)[1]

    def align(self, x, y):
        return self._split(y)[1] * self._split(x)[0]

    def same_point(self, x, y, *, atol=1e-6):
        return self.dist(x, y) <= atol

    def horizontal(self, x, u):
        return self.proju(x, u)

    def random_vertical(self, x, *, generator=None):
        return x * torch.randn((*x.shape[:-1], 1), dtype=x.dtype, generator=generator)

    def random_gauge(self, x, *, generator=None, condition=10.0):
        factor = torch.rand((*x.shape[:-1], 1), dtype=x.dtype, generator=generator)
        factor = condition ** (2 * factor - 1)
        return lambda array: factor * array

    def random_representative(self, x, *, generator=None, condition=10.0):
        return self.random_gauge(x, generator=generator, condition=condition)(x)


def broken(base: type[geoopt.Manifold], **methods: Any) -> geoopt.Manifold:
    """The base manifold with some methods replaced by wrong ones."""
    return type(f"Broken{base.__name__}", (base,), methods)()


def scaled_by(factor: float, method: str, base: type[geoopt.Manifold] = Sphere) -> Any:
    """A method that returns a multiple of what it should."""
    return lambda self, *args, **kwargs: factor * getattr(base, method)(self, *args, **kwargs)


def second_order_retraction(self, x, u):
    """Project to the sphere: agrees with its exponential map to second order."""
    return (x + u) / (x + u).norm(dim=-1, keepdim=True)
