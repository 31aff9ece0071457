"""What the tests of the mathematics share: definitions, differentiated automatically.

The oracle is the Lagrangian of each metric: its Hessian is the metric, its Euler-Lagrange equation
the geodesic equation.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.func import grad, hessian, jacrev

KAPPA = {"mixed": 2.0, "embedded": 1.0}
TESTED: set[str] = set()


def formulas(*labels: str) -> Callable[[Callable], Callable]:
    """Say which labelled formulas a test checks."""
    TESTED.update(f"eq:{label}" for label in labels)
    return lambda test: test


def pinv(y):
    return torch.linalg.inv(y.T @ y) @ y.T


def norm2(z):
    return (z * z).sum()


def differential(x, u, m):
    return u[:m] @ x[m:].T + x[:m] @ u[m:].T


def lagrangian(metric, x, u, m):
    """½ g(u, u) from the definition; embedded is completed by the length of the vertical part."""
    (b, a), (vb, va) = (x[:m], x[m:]), (u[:m], u[m:])
    if metric == "mixed":
        return 0.5 * (norm2(vb @ a.T) + norm2(b @ va.T))
    if metric == "invariant":
        p, q = a.T @ a, b.T @ b
        return 0.5 * (
            (torch.linalg.inv(q) * (vb.T @ vb)).sum() + (torch.linalg.inv(p) * (va.T @ va)).sum()
        )
    vertical = b @ (0.5 * (pinv(b) @ vb - (pinv(a) @ va).T)) @ a.T
    return 0.5 * norm2(differential(x, u, m)) + norm2(vertical)


def gram(metric, x, m):
    """The metric as a matrix on flattened tangent vectors of the total space."""
    size = x.numel()
    return hessian(lambda u: lagrangian(metric, x, u, m))(torch.zeros_like(x)).reshape(size, size)


def acceleration(metric, x, u, m):
    """Euler-Lagrange: d/dt ∂L/∂u = ∂L/∂x, solved for the second derivative."""

    def energy(q, v):
        return lagrangian(metric, q.reshape(x.shape), v.reshape(x.shape), m)

    q, v = x.flatten(), u.flatten()
    mixed = jacrev(grad(energy, 1), 0)(q, v)
    return torch.linalg.solve(gram(metric, x, m), grad(energy, 0)(q, v) - mixed @ v).reshape(
        x.shape
    )


def verticals(x, m):
    """A basis of the vertical space by eq:vertical, flattened columns."""
    r = x.shape[-1]
    units = torch.eye(r * r).reshape(-1, r, r)
    return torch.stack([torch.cat((x[:m] @ e, -x[m:] @ e.T)).flatten() for e in units], -1)


def project(metric, x, u, m):
    """Orthogonal projection onto the horizontal space by a dense linear system."""
    g, v = gram(metric, x, m), verticals(x, m)
    return u - (v @ torch.linalg.solve(v.T @ g @ v, v.T @ g @ u.flatten())).reshape(x.shape)


def inner(metric, x, u, v, m):
    return u.flatten() @ gram(metric, x, m) @ v.flatten()


def draw(size, seed=0):
    """A manifold-independent point and tangent vector."""
    m, n, r = size
    generator = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(m + n, r, generator=generator) for _ in range(2))
    return m, x, u


def close(actual, expected, tolerance=1e-9):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert float((actual - expected).norm()) <= tolerance * (1 + float(expected.norm()))


def product(x, m):
    return x[:m] @ x[m:].T


def singular_values(x, m):
    return torch.linalg.svdvals(product(x, m))[: x.shape[-1]]


def frames(*sizes, seed=0):
    """Square orthogonal matrices."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(k, k, generator=generator))[0] for k in sizes]


def factors(manifold, w, r):
    """The balanced point of rank r whose product is w."""
    u, s, vh = torch.linalg.svd(w)
    root = s[:r].sqrt()
    return manifold.pack(u[:, :r] * root, root[:, None] * vh[:r])


def slope(steps, errors):
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
