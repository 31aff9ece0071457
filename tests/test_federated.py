"""Federated rounds: tensors of clients in, a Fréchet mean out."""

import re

import numpy as np
import pytest
import torch
from client_updates import M, N, R, factors, gap, products, rebased, update
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_merge import LoRAQuotient, UpdateError, frechet_mean, merge_updates


def factor_average(updates):
    """FedAvg as it is: every array by itself."""
    return {key: torch.stack([u[key].double() for u in updates]).mean(0) for key in updates[0]}


def truncated(w, rank):
    u, s, vh = np.linalg.svd(np.asarray(w), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


# --- the mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1, 5, "full"])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)])
def test_mean_is_the_truncated_sum_of_products(ranks, rank):
    updates, weights = [update(i, r) for i, r in enumerate(ranks)], [1, 2, 5]
    merged = merge_updates(updates, weights, rank=rank)
    for key, w in products(merged.tensors).items():
        total = sum(x * products(u)[key] for x, u in zip(weights, updates, strict=True)) / 8
        kept = min({None: max(ranks), "full": sum(ranks)}.get(rank, rank), *w.shape)
        assert merged.tensors[key].shape[1] == kept
        torch.testing.assert_close(w, truncated(total, kept))
    assert list(merged.tensors) == list(updates[0])
    assert merged.recipe["weights"] == {"client 0": 1 / 8, "client 1": 2 / 8, "client 2": 5 / 8}
    assert merged.status == {"converged": 2}


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("geometry", "distance"),
    [("embedded", None), ("mixed", "exact"), ("invariant", "chordal"), ("polar", None)],
)
def test_mean_is_the_one_of_the_library(geometry, distance, p):
    if distance == "exact" and p == 1:
        pytest.skip("a median is computed with chords")
    base, updates = update(0), []
    for i in range(4):
        other = update(i + 1)
        updates.append({k: x if x.ndim < 2 else x + 0.02 * other[k] for k, x in base.items()})
    merged = merge_updates(updates, [1, 2, 3, 4], geometry=geometry, distance=distance, p=p)
    if geometry == "polar":
        from manifold_merge import PolarLoRAQuotient

        manifold = PolarLoRAQuotient(M, N, distance="chordal")
    else:
        manifold = LoRAQuotient(M, N, metric=geometry, distance=distance or "chordal")
    key = "layer.0.lora_B.weight"
    points = [manifold.pack(u[key], u[key.replace("_B", "_A")]) for u in updates]
    expected = manifold.product(frechet_mean(manifold, points, [1, 2, 3, 4], p=p).point)
    torch.testing.assert_close(products(merged.tensors)[key], expected, rtol=1e-6, atol=1e-8)


NAMES = {
    "peft": ("base_model.model.q.lora_{}.weight", (5, 2), (2, 4)),
    "live peft model": ("base_model.model.q.lora_{}.default.weight", (5, 2), (2, 4)),
    "bare": ("lora_{}", (5, 2), (2, 4)),
    "embedding": ("embed.lora_embedding_{}", (5, 2), (2, 4)),
    "convolution": ("conv.lora_{}.weight", (5, 2, 1, 1), (2, 3, 3, 3)),
}


@pytest.mark.parametrize(("name", "shape_b", "shape_a"), NAMES.values(), ids=NAMES)
def test_names_and_layouts_of_factors(name, shape_b, shape_a):
    generator = torch.Generator().manual_seed(0)
    b, a = name.format("B"), name.format("A")
    updates = [
        {b: torch.randn(shape_b, generator=generator), a: torch.randn(shape_a, generator=generator)}
        for _ in range(3)
    ]
    merged = merge_updates(updates).tensors
    assert {k: x.shape for k, x in merged.items()} == {k: x.shape for k, x in updates[0].items()}
    total = sum(u[b].flatten(1) @ u[a].flatten(1) for u in updates) / 3
    found = merged[b].flatten(1) @ merged[a].flatten(1)
    torch.testing.assert_close(found, truncated(total.double(), 2).float(), rtol=1e-4, atol=1e-5)


def test_pairs_of_any_names():
    updates = [
        dict(zip(("0", "1", "2"), (*factors(i), torch.ones(2)), strict=True)) for i in (0, 1)
    ]
    with pytest.raises(UpdateError, match=r"no names with lora_B .* '0', '1', '2'; .*pairs="):
        merge_updates(updates)
    merged = merge_updates(updates, pairs=[("0", "1")], rank="full").tensors
    total = sum(u["0"] @ u["1"] for u in updates) / 2
    torch.testing.assert_close(merged["0"] @ merged["1"], total)
    with pytest.raises(UpdateError, match="client 0: '9' missing, a factor that pairs= names"):
        merge_updates(updates, pairs=[("0", "9")])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("geometry", ["embedded", "lifted", "polar", "auto"])
def test_a_client_that_rebases_its_factors_changes_nothing(geometry, p):
    if geometry == "lifted" and p == 1:
        pytest.skip("has a mean only")
    updates = [update(i) for i in range(3)]
    moved = [updates[0], rebased(updates[1], 1), rebased(updates[2], 2)]
    assert gap(moved[1], updates[1]) < 1e-10  # the same model
    one, two = (merge_updates(u, geometry=geometry, p=p) for u in (updates, moved))
    assert gap(one.tensors, two.tensors) < 1e-6
    assert gap(factor_average(moved), factor_average(updates)) > 0.5  # what is repaired here


def test_other_tensors_are_averaged_as_arrays():
    updates = [update(i) for i in range(3)]
    merged = merge_updates(updates, [1, 1, 6]).tensors
    expected = sum(w * u["head.weight"] for w, u in zip([1, 1, 6], updates, strict=True)) / 8
    torch.testing.assert_close(merged["head.weight"], expected)
    assert merged["head.count"].dtype == torch.long
    assert int(merged["head.count"]) == 2  # 1.625


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_come_back(dtype):
    updates = [update(i, dtype=dtype) for i in range(2)]
    merged = merge_updates(updates).tensors
    assert {k: x.dtype for k, x in merged.items()} == {k: x.dtype for k, x in updates[0].items()}


def test_arrays_of_numpy_are_taken():
    updates = [{k: x.numpy() for k, x in update(i).items()} for i in range(2)]
    assert (
        gap(merge_updates(updates).tensors, merge_updates([update(0), update(1)]).tensors) < 1e-12
    )


def test_factors_are_balanced_for_the_next_round():
    merged = merge_updates([rebased(update(i), i) for i in range(2)], scale=0.1).tensors
    for key in products(merged):
        b, a = merged[key], merged[key.replace("lora_B", "lora_A")]
        torch.testing.assert_close(b.mT @ b, a @ a.mT)


def test_scaling_belongs_to_the_rank():
    updates, weights = [update(0, 2), update(1, 4)], [1, 3]
    merged = merge_updates(updates, weights, rank="full", scaling=lambda r: 16 / r).tensors
    for key, w in products(merged).items():
        scaled = 0.25 * 8 * products(updates[0])[key] + 0.75 * 4 * products(updates[1])[key]
        torch.testing.assert_close(16 / merged[key].shape[1] * w, scaled)
    biased = [u | {"layer.0.lora_B.bias": torch.ones(M)} for u in updates]
    assert merge_updates(biased).tensors["layer.0.lora_B.bias"].tolist() == [1.0] * M
    with pytest.raises(ValueError, match=r"scaling: 'layer.0.lora_B.bias' is scaled"):
        merge_updates(biased, scaling=lambda r: 1 / r)


def test_directions_without_rank_can_still_learn():
    """As before training: zero columns of B beside rows of A that are not zero."""
    fresh = update(0) | {"layer.0.lora_B.weight": torch.zeros(M, R, dtype=torch.float64)}
    for rank in (R, 2):
        merged = merge_updates([fresh], rank=rank).tensors
        assert not merged["layer.0.lora_B.weight"].any()
        expected = fresh["layer.0.lora_A.weight"][:rank]
        torch.testing.assert_close(merged["layer.0.lora_A.weight"], expected)
    assert gap(merge_updates([update(1)]).tensors, update(1)) < 1e-12  # no idle direction


# --- robustness ----------------------------------------------------------------------------------


def poisoned(honest, size, seed=99):
    bad = update(seed)
    for key in products(bad):
        bad[key] = bad[key] * size
    return [*honest, bad | {"head.weight": bad["head.weight"] * size}]


@settings(deadline=None, max_examples=10)
@given(
    exponent=st.floats(-2, 50),
    seed=st.integers(0, 1000),
    weights=st.lists(st.floats(0.1, 1.0), min_size=5, max_size=5),
)
def test_median_stays_within_the_bound_of_its_breakdown_point(exponent, seed, weights):
    """|median - c| <= 2h/(2h - 1) max |Wᵢ - c| over honest clients of weight h > 1/2, c = W₀."""
    honest = [update(seed + i) for i in range(4)]
    share = sum(weights[:4]) / sum(weights)
    merged = merge_updates(poisoned(honest, 10.0**exponent), weights, p=1).tensors
    for key, w in products(merged).items():
        centre = products(honest[0])[key]
        reach = max(float((products(u)[key] - centre).norm()) for u in honest)
        assert float((w - centre).norm()) <= 2 * share / (2 * share - 1) * reach
    centre = honest[0]["head.weight"]
    reach = max(float((u["head.weight"] - centre).norm()) for u in honest)
    moved = float((merged["head.weight"] - centre).norm())
    assert moved <= 2 * share / (2 * share - 1) * reach


@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_median_does_not_care_how_far_away_an_outlier_is(size):
    honest = [update(i) for i in range(4)]
    far = merge_updates(poisoned(honest, size), p=1)
    assert gap(far.tensors, merge_updates(poisoned(honest, 1e3), p=1).tensors) < 1e-2
    farther = merge_updates(poisoned(honest, 10 * size), p=1).tensors
    assert gap(far.tensors, farther) < 1e-3
    assert gap(merge_updates(poisoned(honest, size)).tensors, far.tensors) > 100  # the mean does
    assert max(far.distances, key=far.distances.__getitem__) == "client 4"


def test_median_of_one_tensor_does_not_see_the_others():
    """An outlier in one layer does not take a client's say in the others."""
    updates = [update(i) for i in range(4)]
    clean = merge_updates(updates, p=1).tensors
    spoilt = dict(updates[3])
    spoilt["layer.0.lora_B.weight"] = spoilt["layer.0.lora_B.weight"] * 1e6
    merged = merge_updates([*updates[:3], spoilt], p=1).tensors
    key = "layer.1.lora_B.weight"
    torch.testing.assert_close(products(merged)[key], products(clean)[key])


def test_a_client_with_half_of_the_weight_is_named(caplog):
    updates = [update(i) for i in range(3)]
    merge_updates(updates, [1, 1, 1.9], p=1)
    assert "of the weight" not in caplog.text
    merge_updates(updates, [1, 1, 3], names=["a", "b", "c"], p=1)
    assert "c has 60 % of the weight" in caplog.text


def test_distances_are_those_of_products():
    updates = [update(i) for i in range(3)]
    merged = merge_updates(updates, names=["a", "b", "c"])
    mean = products(merged.tensors)
    for name, u in zip("abc", updates, strict=True):
        squared = sum(float((products(u)[key] - mean[key]).square().sum()) for key in mean)
        assert merged.distances[name] == pytest.approx(squared**0.5)


# --- what cannot be averaged ---------------------------------------------------------------------

B, A = "layer.0.lora_B.weight", "layer.0.lora_A.weight"
DAMAGES = {
    "no partner": (lambda u: u.pop(A), rf"{B}' has no partner '{A}'"),
    "missing": (lambda u: u.pop("head.weight"), "'head.weight' missing"),
    "pair missing": (lambda u: [u.pop(A), u.pop(B)], f"'{A}', '{B}' missing"),
    "unknown": (lambda u: u.update(tail=torch.ones(2)), "'tail' unknown to client 0"),
    "NaN": (lambda u: u[A][0].fill_(torch.nan), f"'{A}' holds NaN or infinite"),
    "infinite": (lambda u: u["head.weight"].fill_(torch.inf), "'head.weight' holds NaN or inf"),
    "overflow": (lambda u: u[A].fill_(1e300), f"'{A}' holds NaN or infinite"),
    "complex": (lambda u: u.update({A: u[A] + 0j}), f"'{A}' is torch.complex128"),
    "rows": (
        lambda u: u.update({B: torch.ones(M + 1, R)}),
        rf"'{B}' has shape \(8, 3\), but \(7, 3\) in client 0; only ranks may differ",
    ),
    "columns": (
        lambda u: u.update({A: torch.ones(R, N - 1)}),
        rf"'{A}' has shape \(3, 5\), but \(3, 6\) in client 0",
    ),
    "ranks of a pair": (
        lambda u: u.update({A: torch.ones(R + 1, N)}),
        rf"'{B}' has shape \(7, 3\) and '{A}' \(4, 6\); expected \(m, r\) and \(r, n\)",
    ),
    "head": (
        lambda u: u.update({"head.weight": torch.ones(3, 3)}),
        r"'head.weight' has shape \(3, 3\), but \(2, 3\) in client 0",
    ),
    "vector": (lambda u: u.update({A: torch.ones(R)}), rf"'{A}' \(3,\); expected"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_client_whose_update_cannot_be_averaged_is_named(damage, message, caplog):
    updates = [update(0), update(1), update(2)]
    damage(updates[1])
    with pytest.raises(UpdateError, match=rf"client 1: .*{message}"):
        merge_updates(updates)
    merged = merge_updates(updates, invalid="drop")
    assert re.search(rf"left out: client 1: .*{message}", caplog.text)
    assert list(merged.rejected) == ["client 1"]
    assert re.search(message, merged.rejected["client 1"])
    without = merge_updates([updates[0], updates[2]])
    torch.testing.assert_close(merged.tensors, without.tensors)


def test_the_first_client_does_not_set_the_standard_if_there_is_one():
    updates = [update(i) for i in range(3)]
    updates[0]["head.weight"] = torch.ones(5, 5)
    merged = merge_updates(updates, like=update(7), invalid="drop")
    assert list(merged.rejected) == ["client 0"]
    with pytest.raises(UpdateError, match=r"client 0: .*\(5, 5\), but \(2, 3\) in like"):
        merge_updates(updates, like=update(7))


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "many", None])
def test_weight_that_is_none(weight):
    updates = [update(0), update(1)]
    with pytest.raises(UpdateError, match=r"client 1: its weight is .*, expected a number >= 0"):
        merge_updates(updates, [1, weight])
    assert "client 1" in merge_updates(updates, [1, weight], invalid="drop").rejected


@pytest.mark.parametrize(("key", "size"), [("head.weight", 1e7), ("layer.0.lora_B.weight", 1e20)])
def test_mean_that_does_not_fit_its_type(key, size):
    updates = [update(i, dtype=torch.float16) for i in range(4)]
    updates[0][key] = updates[0][key].double() * size
    with pytest.raises(UpdateError, match=f"mean: '{key}' does not fit into torch.float16"):
        merge_updates(updates, like=updates[1])
    merged = merge_updates(updates, p=1, like=updates[1]).tensors
    assert all(bool(x.isfinite().all()) for x in merged.values())


@pytest.mark.parametrize("invalid", ["raise", "drop"])
def test_no_update_is_left(invalid):
    with pytest.raises(UpdateError, match="updates: none is left to average, 0 came and 0 could"):
        merge_updates([], invalid=invalid)
    with pytest.raises(UpdateError, match="updates: all weights are zero"):
        merge_updates([update(0)], [0], invalid=invalid)
    bad = update(0)
    bad["head.weight"].fill_(torch.nan)
    with pytest.raises(UpdateError, match=r"1 came and 1 could not be used|holds NaN"):
        merge_updates([bad], invalid=invalid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "fisher"}, "geometry must be one of auto, lifted.*got 'fisher'"),
        ({"distance": "near"}, "distance must be one of"),
        ({"geometry": "lifted", "p": 1}, "p=1: geometry='lifted' has a mean only"),
        ({"p": 3}, r"p must be 2 \(mean\) or 1 \(median\); got 3"),
        ({"invalid": "skip"}, "invalid must be 'raise' or 'drop'"),
        ({"rank": 0}, "rank: expected a positive integer"),
        ({"weights": [1]}, "weights: expected 2, one for each update; got 1"),
        ({"names": ["a"]}, "names: expected 2"),
        ({"names": ["a", "a"]}, "names: two clients have one name"),
        ({"output": "x"}, "'output' is no option of merge_updates"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        merge_updates([update(0), update(1)], **options)
