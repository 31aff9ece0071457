"""Transforms of the anchors: what they do in cases that can be worked out, and in every gauge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_merge import LoRAQuotient, frechet_mean, lifted_mean
from manifold_merge.transforms import (
    TRANSFORMS,
    isotropic,
    norm_preserving_scale,
    parse_transform,
    ties,
    whiten,
)

FLOAT64 = torch.float64
M, N = 12, 10
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=FLOAT64)
MANIFOLD = LoRAQuotient(M, N)
EVERY = pytest.mark.parametrize("name", ["ties=0.3", "ties=1", "whiten", "whiten=0.4", "isotropic"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def anchors(*batch: int, seed: int = 0) -> list[Tensor]:
    return [draw(*batch, M + N, r, seed=seed + r) for r in (2, 3, 1)]


def products(points: list[Tensor]) -> Tensor:
    return torch.stack([MANIFOLD.product(x) for x in points])


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().amax()))


@EVERY
@settings(max_examples=10)
@given(seed=st.integers(0, 100), condition=st.sampled_from([1.0, 1e2]))
def test_no_gauge_changes_the_result(name, seed, condition):
    points = anchors(2, seed=seed)
    transform = parse_transform(name)
    generator = torch.Generator().manual_seed(seed)
    moved = [
        MANIFOLD.random_representative(x, generator=generator, condition=condition) for x in points
    ]
    close(
        products(transform(MANIFOLD, moved, WEIGHTS)),
        products(transform(MANIFOLD, points, WEIGHTS)),
        1e-8,
    )


@EVERY
def test_the_order_of_the_anchors_does_not_matter(name):
    points, transform = anchors(), parse_transform(name)
    there = products(transform(MANIFOLD, points, WEIGHTS))
    back = products(transform(MANIFOLD, points[::-1], WEIGHTS.flip(0)))
    close(back.flip(0), there)


@EVERY
def test_rotations_of_inputs_and_outputs_commute(name):
    points, transform = anchors(), parse_transform(name)
    left, right = torch.linalg.qr(draw(M, M))[0], torch.linalg.qr(draw(N, N, seed=1))[0]
    turned = [torch.cat((left @ x[:M], right @ x[M:])) for x in points]
    close(
        products(transform(MANIFOLD, turned, WEIGHTS)),
        left @ products(transform(MANIFOLD, points, WEIGHTS)) @ right.T,
    )


@EVERY
def test_batches_are_transformed_on_their_own(name):
    points, transform = anchors(3), parse_transform(name)
    whole = products(transform(MANIFOLD, points, WEIGHTS))
    for row in range(3):
        single = products(transform(MANIFOLD, [x[row] for x in points], WEIGHTS))
        close(whole[:, row], single)


@EVERY
def test_float32_points_stay_float32(name):
    points = [x.float() for x in anchors()]
    moved = parse_transform(name)(MANIFOLD, points, WEIGHTS)
    assert {x.dtype for x in moved} == {torch.float32}
    exact = parse_transform(name)(MANIFOLD, [x.double() for x in points], WEIGHTS)
    close(products(moved).double(), products(exact), 1e-4)


def diagonal(*values: float) -> Tensor:
    """A point whose product is diagonal."""
    size = len(values)
    b = torch.diag(torch.tensor(values, dtype=FLOAT64))
    return MANIFOLD.pack(
        torch.nn.functional.pad(b, (0, 0, 0, M - size)), torch.eye(size, N, dtype=FLOAT64)
    )


def test_ties_elects_signs_and_averages_what_agrees():
    # The mixed energy of the entries sorts them, so that the basis is the standard one.
    points = [diagonal(8.0, 4.0, 1.0), diagonal(6.0, -1.0, 0.5), diagonal(7.0, -2.0, 0.25)]
    equal = torch.ones(3, dtype=FLOAT64)
    moved = products(ties(MANIFOLD, points, equal, density=1.0))
    mean = moved.mean(0).diagonal()[:3]
    # Second entry: 4 outweighs -1 and -2, so it alone is averaged.
    close(mean, torch.tensor([7.0, 4.0, 1.75 / 3], dtype=FLOAT64))
    # A third of nine entries is three; of each anchor its three largest.
    trimmed = products(ties(MANIFOLD, points, equal, density=1 / 9)).mean(0).diagonal()[:3]
    close(trimmed, torch.tensor([7.0, 0.0, 0.0], dtype=FLOAT64))


def test_ties_of_one_anchor_at_full_density_is_that_anchor():
    x = anchors()[1]
    close(products(ties(MANIFOLD, [x], torch.ones(1), density=1.0))[0], MANIFOLD.product(x))


def test_whitened_frames_are_orthogonal_and_norms_are_kept():
    points = anchors()
    moved = whiten(MANIFOLD, points, WEIGHTS)
    before, after = products(points), products(moved)
    close(after.square().sum((-2, -1)), before.square().sum((-2, -1)))
    for i in range(3):
        for j in range(i):
            size = float(after[i].norm() * after[j].norm())
            assert float((after[i].T @ after[j]).norm()) < 1e-8 * size
            assert float((after[i] @ after[j].T).norm()) < 1e-8 * size
    close(products(whiten(MANIFOLD, points, WEIGHTS, power=0.0)), before)


def test_the_lifted_mean_is_a_scaled_mean_of_whitened_anchors():
    points = anchors()
    moved = whiten(MANIFOLD, points, WEIGHTS, power=0.7)
    mean = frechet_mean(LoRAQuotient(M, N, distance="chordal"), moved, WEIGHTS, rank=6).point
    scale = norm_preserving_scale(MANIFOLD, mean, points, WEIGHTS)
    lifted = lifted_mean(MANIFOLD, points, WEIGHTS, power=0.7, rank=6).point
    close(MANIFOLD.product(mean) * scale, MANIFOLD.product(lifted), 1e-7)


def test_isotropic_spectra_are_flat_and_keep_norm_and_frames():
    x = anchors()[1]
    before = torch.linalg.svd(MANIFOLD.product(x))
    after = torch.linalg.svd(products(isotropic(MANIFOLD, [x], WEIGHTS[:1]))[0])
    close(after.S[:3], torch.full((3,), float(before.S.norm()) / 3**0.5, dtype=FLOAT64))
    close((after.U[:, :3] @ after.Vh[:3]), before.U[:, :3] @ before.Vh[:3])
    half = torch.linalg.svdvals(products(isotropic(MANIFOLD, [x], WEIGHTS[:1], power=0.5))[0])[:3]
    ratio = half / before.S[:3].sqrt()
    close(ratio, ratio[:1].expand(3))


def test_null_directions_stay_null():
    x = anchors()[0]
    wide = torch.cat((x, torch.zeros(M + N, 2, dtype=FLOAT64)), -1)
    close(
        products(isotropic(MANIFOLD, [wide], WEIGHTS[:1])),
        products(isotropic(MANIFOLD, [x], WEIGHTS[:1])),
    )
    zero = torch.zeros_like(x)
    for name in TRANSFORMS:
        moved = products(parse_transform(name)(MANIFOLD, [zero, zero], torch.ones(2)))
        assert not bool(moved.any())


def test_the_scale_of_orthogonal_anchors_is_the_root_of_their_number():
    points = [diagonal(1.0), diagonal(0.0, 1.0), diagonal(0.0, 0.0, 1.0)]
    manifold = LoRAQuotient(M, N, distance="chordal")
    mean = frechet_mean(manifold, points, rank=3).point
    close(
        norm_preserving_scale(manifold, mean, points, torch.ones(3)),
        torch.tensor(3.0).double().sqrt(),
    )
    same = norm_preserving_scale(manifold, points[0], [points[0]] * 2, torch.ones(2))
    close(same, torch.tensor(1.0, dtype=FLOAT64))
    zero = norm_preserving_scale(manifold, 0 * points[0], points, torch.ones(3))
    assert float(zero) == 1


BAD = {
    "name": (lambda: parse_transform("tiess"), "expected one of ties, whiten, isotropic"),
    "number": (lambda: parse_transform("ties=x"), "takes a number"),
    "density": (lambda: ties(MANIFOLD, anchors(), WEIGHTS, density=0.0), "density"),
    "power": (lambda: whiten(MANIFOLD, anchors(), WEIGHTS, power=2.0), "power"),
    "weights": (lambda: ties(MANIFOLD, anchors(), -WEIGHTS), "weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
