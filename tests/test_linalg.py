"""Small matrix functions against SciPy, and the core reduction against dense QR."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from torch import Tensor

from manifold_merge import linalg
from manifold_merge.checks import log_log_slope
from manifold_merge.core import ColumnSpan, truncated_sum

FLOAT64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 0), (2, 3)], ids=str)


def normal(*shape: int, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64).to(dtype)


def gram(*shape: int, rank: int | None = None, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Symmetric matrices whose eigenvalues are 1, 2, ..., rank, and zero."""
    frame = torch.linalg.qr(normal(*shape, shape[-1]))[0]
    values = torch.arange(1.0, shape[-1] + 1, dtype=FLOAT64)
    values = torch.where(values <= (shape[-1] if rank is None else rank), values, 0.0)
    return (frame * values @ frame.mT).to(dtype)


def each(x: Tensor) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in x.reshape(-1, *x.shape[-2:])]


def close(actual: Tensor, expected: list[np.ndarray], factor: float = 100) -> None:
    wanted = torch.from_numpy(np.array(expected)).reshape(actual.shape)
    eps = torch.finfo(actual.dtype).eps
    scale = wanted.abs().amax() if wanted.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), wanted.double(), rtol=0, atol=float(factor * eps * scale)
    )


# --- pseudo-inverse and Sylvester equation --------------------------------------------------------


@DTYPES
@BATCHES
@pytest.mark.parametrize("rank", [4, 2, 0])
def test_hermitian_pinv(dtype, batch, rank):
    x = gram(*batch, 4, rank=rank, dtype=dtype)
    close(linalg.hermitian_pinv(x), [np.linalg.pinv(y, 1e-3) for y in each(x)])


@DTYPES
@BATCHES
def test_sylvester_against_scipy(dtype, batch):
    s, h = gram(*batch, 4, dtype=dtype), normal(*batch, 4, 4, dtype=dtype)
    wanted = [scipy.linalg.solve_sylvester(p, p, q) for p, q in zip(each(s), each(h), strict=True)]
    close(linalg.symmetric_sylvester(s, h), wanted)


def test_sylvester_of_a_singular_matrix_has_least_norm():
    s, h = gram(5, rank=3), normal(5, 5)
    operator = torch.kron(torch.eye(5), s) + torch.kron(s, torch.eye(5)).double()
    wanted = torch.linalg.pinv(operator, rtol=1e-12) @ h.flatten()
    torch.testing.assert_close(linalg.symmetric_sylvester(s, h).flatten(), wanted)


@pytest.mark.parametrize("spectrum", [[1, 2, 3], [1, 1, 2], [2, 2, 2]], ids=str)
def test_sylvester_derivative_at_repeated_eigenvalues(spectrum):
    frame = torch.linalg.qr(normal(3, 3))[0]
    s = (frame * torch.tensor(spectrum, dtype=FLOAT64)) @ frame.mT
    h = normal(3, 3).requires_grad_()

    def solve(s: Tensor, h: Tensor) -> Tensor:
        return linalg.symmetric_sylvester(0.5 * (s + s.mT), h)

    assert torch.autograd.gradcheck(solve, (s.requires_grad_(), h))


# --- principal square root ------------------------------------------------------------------------


@DTYPES
@BATCHES
@pytest.mark.parametrize("size", [1, 2, 5])
def test_principal_square_root_against_scipy(dtype, batch, size):
    x = torch.linalg.matrix_exp(0.7 * normal(*batch, size, size, dtype=dtype))
    root, good = linalg.principal_sqrt(x)
    assert good.shape == batch
    assert good.all()
    close(root, [scipy.linalg.sqrtm(y).real for y in each(x)], 1e4)


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_principal_square_root_is_homogeneous(exponent):
    x = torch.linalg.matrix_exp(normal(2, 4, 4))
    scale = 2.0**exponent
    root, good = linalg.principal_sqrt(scale * x)
    assert good.all()
    torch.testing.assert_close(root, scale**0.5 * linalg.principal_sqrt(x)[0], rtol=1e-12, atol=0)


def test_principal_square_root_that_does_not_exist():
    half_turn = -torch.eye(2, dtype=FLOAT64)
    flip = torch.diag(torch.tensor([1.0, -1.0], dtype=FLOAT64))
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=FLOAT64)
    fine = 4 * torch.eye(2, dtype=FLOAT64)
    root, good = linalg.principal_sqrt(torch.stack([half_turn, flip, nilpotent, fine]))
    assert good.tolist() == [False, False, False, True]
    torch.testing.assert_close(root[:3], torch.eye(2, dtype=FLOAT64).expand(3, 2, 2))
    torch.testing.assert_close(root[3], 0.5 * fine)


def test_principal_square_root_under_vmap_and_autograd():
    x = torch.linalg.matrix_exp(0.5 * normal(3, 3, 3))
    mapped, good = torch.func.vmap(linalg.principal_sqrt)(x)
    assert good.all()
    torch.testing.assert_close(mapped, linalg.principal_sqrt(x)[0])
    assert torch.autograd.gradcheck(lambda y: linalg.principal_sqrt(y)[0], x[0].requires_grad_())


# --- integrator -----------------------------------------------------------------------------------


def pendulum(position: Tensor, velocity: Tensor) -> Tensor:
    return -torch.sin(position) - 0.3 * velocity * velocity


def test_integrator_against_scipy():
    start, speed = normal(4), normal(4)
    position, velocity = linalg.integrate(pendulum, start, speed, steps=20)
    solution = scipy.integrate.solve_ivp(
        lambda _, z: np.concatenate([z[4:], -np.sin(z[:4]) - 0.3 * z[4:] ** 2]),
        (0, 1),
        torch.cat((start, speed)).numpy(),
        method="DOP853",
        rtol=1e-13,
        atol=1e-13,
    )
    wanted = torch.from_numpy(solution.y[:, -1])
    torch.testing.assert_close(torch.cat((position, velocity)), wanted, rtol=1e-11, atol=1e-11)


def test_integrator_has_order_eight():
    start, speed = torch.tensor(1.0, dtype=FLOAT64), torch.tensor(4.0, dtype=FLOAT64)
    exact = linalg.integrate(pendulum, start, speed, steps=128)[0]
    counts = [6, 8, 10, 12, 14]
    errors = [
        float((linalg.integrate(pendulum, start, speed, steps=k)[0] - exact).abs()) for k in counts
    ]
    assert log_log_slope([1 / k for k in counts], errors, floor=1e-15, window=3).slope > 7.5


# --- core reduction -------------------------------------------------------------------------------


def spans() -> dict[str, list[Tensor]]:
    base, copies = normal(40, 3), normal(2, 40, 3)
    graded = normal(40, 3) * torch.tensor([1e-9, 1.0, 1e9], dtype=FLOAT64)
    return {
        "tall": [base, normal(40, 2)],
        "batch": [normal(2, 3, 40, 3), normal(2, 3, 40, 1)],
        "wide": [normal(4, 3), normal(4, 3)],
        "square": [normal(6, 3), normal(6, 3)],
        "repeated": [base, base, 2 * base],
        "zero": [base, torch.zeros(40, 2, dtype=FLOAT64)],
        "all zero": [torch.zeros(40, 2, dtype=FLOAT64)],
        "one repeated in a batch": [copies, torch.stack((copies[0], normal(40, 3)))],
        "graded": [graded, normal(40, 1)],
        "nearly dependent": [base, base + 1e-9 * normal(40, 3)],
        "huge and tiny": [1e150 * base, 1e-150 * normal(40, 2)],
        "single precision": [normal(40, 3, dtype=torch.float32), base.float()],
    }


@pytest.mark.parametrize("case", list(spans()))
def test_column_span_is_an_isometry(case):
    matrices = spans()[case]
    span = ColumnSpan(matrices)
    rows, columns = matrices[0].shape[-2], sum(x.shape[-1] for x in matrices)
    assert span.dimension == min(rows, columns)
    tolerance = 1e-6 if matrices[0].dtype == torch.float32 else 1e-10
    for x, c in zip(matrices, span.coordinates, strict=True):
        assert c.shape == (*x.shape[:-2], span.dimension, x.shape[-1])
        size = x.double().norm(dim=-2, keepdim=True).clamp(min=1e-300)
        assert float(((span.expand(c) - x) / size).abs().max()) <= tolerance
        for y, d in zip(matrices, span.coordinates, strict=True):
            other = y.double().norm(dim=-2, keepdim=True).clamp(min=1e-300)
            gap = (c / size).mT @ (d / other) - (x.double() / size).mT @ (y.double() / other)
            assert float(gap.abs().max()) <= tolerance
    assert span.expand(span.coordinates[0]).dtype == matrices[0].dtype


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (2.0, -1.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("m", [12, 4])
def test_truncated_sum_is_the_truncated_svd(rank, weights, m):
    pairs = [(normal(2, m, 3), normal(2, 10, 3)), (normal(2, m, 2), normal(2, 10, 2))]
    w = torch.tensor(weights, dtype=FLOAT64)[:, None].expand(2, 2)
    b, a = truncated_sum(pairs, w, rank)
    assert b.shape == (2, m, rank)
    assert a.shape == (2, 10, rank)
    dense = sum(w[i, :, None, None] * pairs[i][0] @ pairs[i][1].mT for i in range(2))
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    wanted = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    torch.testing.assert_close(b @ a.mT, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b.mT @ b, a.mT @ a, rtol=1e-10, atol=1e-12)
