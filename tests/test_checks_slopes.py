"""The order at which errors vanish is found between round-off and higher-order terms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifold_merge.checks import log_log_slope

STEPS = [10 ** (-k / 8) for k in range(40)]


@given(
    order=st.integers(1, 4),
    coefficient=st.floats(0.1, 100),
    next_order=st.floats(-2, 2),
    seed=st.integers(0, 100),
)
def test_slope_finds_the_order_between_round_off_and_higher_terms(
    order, coefficient, next_order, seed
):
    noise = torch.rand(len(STEPS), generator=torch.Generator().manual_seed(seed)).tolist()
    errors = [
        abs(coefficient * t**order * (1 + next_order * t)) + 1e-13 * n
        for t, n in zip(STEPS, noise, strict=True)
    ]
    found = log_log_slope(STEPS, errors, floor=1e-11)
    assert found.slope == pytest.approx(order, abs=0.15)
    assert found.start < found.stop <= 1


def test_slope_is_that_of_the_limit_not_of_the_longest_stretch():
    errors = [1e-3 * t + t**2 for t in STEPS]
    assert log_log_slope(STEPS, errors).slope == pytest.approx(1, abs=0.1)
    # What hides below the floor cannot be seen.
    errors = [1e-14 * t + t**2 for t in STEPS]
    assert log_log_slope(STEPS, errors, floor=1e-12).slope == pytest.approx(2, abs=0.05)


def test_slope_of_a_plateau_is_zero_unless_it_is_declared_round_off():
    errors = [t**2 + 1e-6 for t in STEPS]
    assert log_log_slope(STEPS, errors).slope == pytest.approx(0, abs=0.01)
    assert log_log_slope(STEPS, errors, floor=1e-5).slope == pytest.approx(2, abs=0.1)


def test_slope_of_exact_identities_and_of_nan():
    assert log_log_slope(STEPS, [0.0] * 40).slope == float("inf")
    assert log_log_slope(STEPS, [1e-16] * 40, floor=1e-15).slope == float("inf")
    assert log_log_slope(STEPS, [float("nan")] * 40).slope != log_log_slope(STEPS, STEPS).slope
    # Two errors above the floor: a lower bound, here of a true order of 12.
    errors = [t**12 for t in STEPS]
    assert 8 < log_log_slope(STEPS, errors, floor=1e-3).slope <= 12.5


def test_slope_accepts_tensors_in_any_order():
    steps = torch.tensor(STEPS, dtype=torch.float64).flip(0)
    assert log_log_slope(steps, 3 * steps**3).slope == pytest.approx(3)


@pytest.mark.parametrize(
    ("steps", "errors", "window"),
    [
        (STEPS, STEPS[:-1], 8),
        ([1.0, 0.1], [1.0, 0.1], 8),
        ([1.0, 0.0, 0.1], [1.0, 1.0, 1.0], 8),
        ([1.0, 0.5, 0.1], [1.0, -1.0, 1.0], 8),
        (STEPS, STEPS, 2),
    ],
)
def test_slope_refuses_what_it_cannot_fit(steps, errors, window):
    with pytest.raises(ValueError, match="expected"):
        log_log_slope(steps, errors, window=window)
