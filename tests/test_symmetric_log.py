"""Logarithms by Chebyshev series against eigenvalues, SciPy and mpmath."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from manifold_merge.symmetric_log import cayley_log, climb, round_up

FLOAT64 = torch.float64
RATIOS = [1.0, 1.0 + 1e-6, 2.0, 34.0, 200.0, 1e3, 9e3]


def spectra(count: int, n: int, ratio: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cayley transforms and logarithms of matrices whose eigenvalues span ``ratio`` around 1."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=FLOAT64))[0]
    values = 2 * torch.rand(count, n, generator=generator, dtype=FLOAT64) - 1
    values[:, 0] = 1.0
    values[:, -1] = -1.0 if n > 1 else 1.0
    values *= 0.5 * math.log(ratio)
    y = (frame * (0.5 * values).tanh()[:, None]) @ frame.mT
    return y.contiguous(), (frame * values[:, None]) @ frame.mT


def reach_of(ratio: float) -> float:
    """Greatest eigenvalue of Y² where the eigenvalues of M span ``ratio`` around 1."""
    return math.tanh(0.25 * math.log(ratio)) ** 2


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20])
@pytest.mark.parametrize("ratio", RATIOS)
def test_series_is_the_logarithm(ratio: float, n: int):
    y, expected = spectra(6, n, ratio)
    log, bound = cayley_log(y, round_up(reach_of(ratio)), 1e-15)
    assert bound is None
    size = expected.abs().amax().clamp(min=1e-300)
    # artanh multiplies the rounding of y by 1/(1 - y²), about √ratio/4 at the end of the spectrum.
    assert float((log - expected).abs().amax() / size) <= 2e-14 + 2e-16 * n * math.sqrt(ratio)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("accuracy", [1e-3, 1e-8, 1e-14])
@pytest.mark.parametrize("ratio", [2.0, 34.0, 1e3])
def test_accuracy_is_as_asked_for(ratio: float, accuracy: float, dtype: torch.dtype):
    y, expected = spectra(6, 8, ratio)
    accuracy = max(accuracy, 40 * torch.finfo(dtype).eps)
    log, bound = cayley_log(y.to(dtype), round_up(reach_of(ratio)), accuracy)
    error = float((log - expected).abs().amax() / expected.abs().amax())
    assert log.dtype == dtype
    assert bound is None
    assert error <= accuracy * math.sqrt(ratio)


def test_a_lower_accuracy_takes_fewer_products(monkeypatch):
    calls, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: calls.append(a) or product(*a, **k))
    y, _ = spectra(2, 5, 34.0)
    counts = []
    for accuracy in (1e-3, 1e-15):
        calls.clear()
        cayley_log(y, round_up(reach_of(34.0)), accuracy)
        counts.append(len(calls))
    assert counts[0] <= 8 < counts[1] <= 14


@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-12])
def test_matrices_close_to_the_identity_keep_all_relative_digits(size: float):
    y, _ = spectra(4, 6, 3.0)
    y = y * size
    log, bound = cayley_log(y, round_up(0.0), 1e-15)
    expected = 2 * (y + y @ y @ y / 3)
    assert bound is None
    assert float((log - expected).abs().amax() / expected.abs().amax()) <= 2e-15


@pytest.mark.parametrize("ratio", [34.0, 1e3])
def test_spectra_that_are_too_wide_are_found_and_measured(ratio: float):
    y, _ = spectra(6, 10, ratio)
    short = round_up(0.8 * reach_of(ratio))
    y[3:] *= 0.5  # these are well inside
    log, bound = cayley_log(y, short, 1e-15)
    assert bound is not None
    assert bool((bound[3:] == short).all())
    assert bool((bound[:3] >= reach_of(ratio) * (1 - 1e-9)).all())
    assert bool((bound[:3] <= 1.05 * reach_of(ratio)).all())
    again, none = cayley_log(y, round_up(float(bound.max())), 1e-15)
    assert none is None
    assert float((log - again)[3:].abs().amax()) <= 1e-14  # whatever their companions are


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_nothing_else(bad: float):
    y, expected = spectra(3, 5, 10.0)
    y[1, 0, 0] = bad
    log, bound = cayley_log(y, round_up(reach_of(10.0)), 1e-15)
    assert bound is not None
    assert bool(bound[1].isinf())
    assert float((log - expected)[[0, 2]].abs().amax()) <= 1e-14


@pytest.mark.parametrize("value", [1e-8, 0.1, 0.5, 0.9, 0.979])
def test_numbers_against_mpmath(value: float):
    y = torch.tensor([[[value]], [[-value]]], dtype=FLOAT64)
    log, _ = cayley_log(y, round_up(value**2), 1e-15)
    with mpmath.workdps(40):
        expected = float(2 * mpmath.atanh(mpmath.mpf(value)))
    assert log.flatten().tolist() == pytest.approx([expected, -expected], rel=1e-14)


def test_ladder_holds_chebyshev_polynomials():
    y, _ = spectra(3, 4, 34.0)
    t = y / y.abs().amax() / 4
    ladder = t.new_empty(9, *t.shape)
    ladder[0] = 2 * t
    climb(ladder)
    values, frame = torch.linalg.eigh(t)
    for j, step in enumerate(ladder, 1):
        expected = (frame * (j * values.acos()).cos()[:, None]) @ frame.mT
        torch.testing.assert_close(step, 2 * expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reach", [0.0, 1e-5, 0.3, 0.75, 0.96])
def test_intervals_are_rounded_up(reach: float):
    end = round_up(reach)
    assert reach <= end < 1
    assert round_up(end) == end
    assert (1 - max(reach, 0.01)) / (1 - end) <= 1.03 + 1e-9
