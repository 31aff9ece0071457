"""merge_adapters: laws at the level of folders, options, and what is refused before any work."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import FEWER, MORE, OTHER_RANKS, PLAIN, adapter, rewrite

from manifold_merge import Adapter, merge_adapters

INVARIANT = {
    "lifted": {"geometry": "lifted"},
    "lifted rank 3": {"geometry": "lifted", "rank": 3},
    "embedded chordal": {"geometry": "embedded", "distance": "chordal"},
    "mixed exact": {"geometry": "mixed", "distance": "exact"},
    "mixed aligned": {"geometry": "mixed", "distance": "aligned"},
    "invariant exact": {"geometry": "invariant", "distance": "exact"},
    "invariant aligned": {"geometry": "invariant", "distance": "aligned"},
    "embedded exact": {"geometry": "embedded", "distance": "exact"},
    "median": {"geometry": "embedded", "p": 1},
    "polar": {"geometry": "polar", "distance": "exact"},
    "polar chordal": {"geometry": "polar", "distance": "chordal"},
}


def products(merge):
    return {name: b.double() @ a.double() for name, (b, a) in merge.modules.items()}


def difference(one, two):
    one, two = products(one), products(two)
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).norm() / one[k].norm()) for k in one)


@pytest.fixture
def close(tmp_path):
    """Three variants of one adapter, near enough for every geometry."""
    first = adapter(tmp_path / "a")
    paths = [first]
    for i, name in enumerate("bc"):
        path = adapter(tmp_path / name, seed=i + 1)
        base = load_file(first / "adapter_model.safetensors")

        def mix(tensors, base=base):
            for key, value in tensors.items():
                tensors[key] = base[key] + 0.05 * value

        paths.append(rewrite(path, mix))
    return paths


def gauged(path, target, condition, seed):
    """The same adapter in another gauge, module by module."""
    source = Adapter(path)
    tensors = load_file(path / "adapter_model.safetensors")
    for i, module in enumerate(source.modules.values()):
        key_b, key_a = module.factor_keys
        r = module.rank
        generator = torch.Generator().manual_seed(100 * seed + i)
        left, right = (
            torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
            for _ in range(2)
        )
        g = left * torch.logspace(-0.5, 0.5, r, base=condition, dtype=torch.float64) @ right
        tensors[key_b] = tensors[key_b] @ g
        tensors[key_a] = torch.linalg.solve(g, tensors[key_a])
    copied = adapter(target)
    (copied / "adapter_config.json").write_text((path / "adapter_config.json").read_text())

    def put(old):
        old.clear()
        old.update({k: v.contiguous() for k, v in tensors.items()})

    return rewrite(copied, put)


@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT.keys())
def test_gauge(close, tmp_path, options):
    """Must hold: cond(G) up to 1e4 changes the merged update by at most 1e-9."""
    moved = [gauged(path, tmp_path / f"g{i}", 1e4, i) for i, path in enumerate(close)]
    one, two = merge_adapters(close, **options), merge_adapters(moved, **options)
    assert difference(one, two) <= 1e-9


def test_averaging_factors_depends_on_the_gauge(close, tmp_path):
    moved = [gauged(path, tmp_path / f"g{i}", 1e4, i) for i, path in enumerate(close)]

    def naive(paths):
        opened = [Adapter(p) for p in paths]
        b, a = (
            torch.stack([x.factors("layer.0.query")[side] for x in opened]).mean(0)
            for side in (0, 1)
        )
        return b @ a

    one, two = naive(close), naive(moved)
    assert float((one - two).norm() / one.norm()) > 0.1


@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT.keys())
def test_laws_of_a_mean(close, options):
    a, b, c = close
    rank = {} if "rank" in options or options["geometry"] != "lifted" else {"rank": 3}
    run = lambda paths, **more: merge_adapters(paths, **options, **rank, **more)  # noqa: E731
    assert difference(run([a]), run([a, a, a])) <= 1e-10
    assert difference(run([b]), run([a, b, c], weights=[0, 1, 0])) <= 1e-10
    assert difference(run([a, b], weights=[2, 1]), run([a, a, b])) <= 1e-9
    assert difference(run([a, b, c], weights=[1, 2, 3]), run([c, a, b], weights=[3, 1, 2])) <= 1e-9


def test_one_adapter_comes_back_with_its_scaling(tmp_path):
    path = adapter(tmp_path / "a")
    merged = merge_adapters([path], tmp_path / "out", scale=0.5)
    source, result = Adapter(path), Adapter(merged.output)
    for name in source.modules:
        assert torch.allclose(
            result.delta_weight(name), 0.5 * source.delta_weight(name), atol=1e-12
        )


def test_auto_tells_variants_from_tasks(close, tmp_path):
    variants = merge_adapters(close)
    assert variants.recipe["geometry"] == "mixed"
    assert variants.recipe["distance"] == "exact"
    assert variants.closeness > 0.5
    assert variants.paths["exact"] == 9
    tasks = merge_adapters([close[0], adapter(tmp_path / "other", seed=7)])
    assert tasks.recipe["geometry"] == "lifted"
    assert "different tasks" in tasks.recipe["chosen_because"]
    assert repr(tasks).startswith("AdapterMerge(geometry: lifted (least pairwise cosine")
    assert "modules: 3; status: 3 converged" in repr(tasks)
    assert len(repr(tasks)) < 300
    assert "tensor" not in repr(tasks)


def test_one_adapter_is_its_own_mean(tmp_path):
    path = adapter(tmp_path / "a")
    merged = merge_adapters([path])
    assert merged.recipe["chosen_because"] == "there is one adapter"
    for name, w in products(merged).items():
        torch.testing.assert_close(w, Adapter(path).delta_weight(name))


RANKS = [(None, 7), ("full", 7), (2, 2), (4, 4)]


@pytest.mark.parametrize(("rank", "expected"), RANKS)
def test_ranks_of_different_adapters(tmp_path, rank, expected):
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", OTHER_RANKS, seed=1)]
    merged = merge_adapters(paths, rank=rank)
    # layer.1.query has ranks 3 and 5 and 7 columns: the sum of the ranks is cut to 7.
    assert merged.modules["layer.1.query"][0].shape[-1] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "lifted"},
        {"geometry": "embedded", "distance": "chordal"},
        {"geometry": "embedded", "distance": "chordal", "p": 1},
        {"geometry": "mixed", "distance": "chordal"},
        {"sum": True},
    ],
    ids=str,
)
def test_a_rank_above_all_ranks_together_is_cut(tmp_path, options):
    paths = [adapter(tmp_path / "a", seed=0), adapter(tmp_path / "b", seed=1)]
    merged = merge_adapters(paths, rank=7, **options)  # 3 + 3, and 2 + 2 for layer.10.up
    full = merge_adapters(paths, rank="full", **options)
    assert merged.modules["layer.10.up"][0].shape[-1] == 4
    for name, w in products(merged).items():
        torch.testing.assert_close(w, products(full)[name])


def test_sum_is_the_plain_sum(tmp_path):
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", OTHER_RANKS, seed=1)]
    merged = merge_adapters(paths, weights=[1, -0.5], sum=True, rank="full")
    first, second = (Adapter(p) for p in paths)
    for name, w in products(merged).items():
        expected = first.delta_weight(name) - 0.5 * second.delta_weight(name)
        assert torch.allclose(w, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("missing", "factor"), [("zero", 0.5), ("present", 1.0)], ids=["zero", "present"]
)
def test_modules_that_one_adapter_lacks(tmp_path, missing, factor):
    paths = [adapter(tmp_path / "a", FEWER), adapter(tmp_path / "b", MORE, seed=1)]
    merged = merge_adapters(paths, geometry="embedded", distance="chordal", missing=missing)
    expected = factor * Adapter(paths[1]).delta_weight("layer.2.key")
    assert torch.allclose(products(merged)["layer.2.key"], expected, atol=1e-12)
    assert merged.modules_merged == len(MORE)


def test_all_weight_on_an_adapter_without_the_module(tmp_path):
    paths = [adapter(tmp_path / "a", FEWER), adapter(tmp_path / "b", MORE, seed=1)]
    for missing in ("zero", "present"):
        merged = merge_adapters(paths, weights=[1, 0], missing=missing)
        assert not products(merged)["layer.2.key"].any()


def test_layer_weights_first_match_counts(tmp_path):
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)]
    patterns = {"layer.0.*": [0, 1], "*.query": [1, 0]}
    merged = merge_adapters(paths, layer_weights=patterns, rank=3)
    first, second = (Adapter(p) for p in paths)
    w = products(merged)
    assert torch.allclose(w["layer.0.query"], second.delta_weight("layer.0.query"), atol=1e-10)
    assert torch.allclose(w["layer.1.query"], first.delta_weight("layer.1.query"), atol=1e-10)


def test_gauge_check_card_and_recipe(tmp_path):
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)]
    merged = merge_adapters(paths, tmp_path / "out", gauge_check=True, weights=[3, 1])
    assert merged.gauge_residual < 1e-10
    assert merged.recipe["weights"] == [0.75, 0.25]
    card = (merged.output / "README.md").read_text()
    assert "Fréchet mean of 2 LoRA adapters" in card
    assert "| `a` | 0.75 | 2, 3 |" in card
    assert str(tmp_path) not in card, "a published card must not tell paths of this machine"
    assert '"geometry": "lifted"' in card
    assert json.loads(json.dumps(merged.recipe)) == merged.recipe


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_in_and_out(tmp_path, dtype):
    paths = [adapter(tmp_path / n, seed=i, dtype=dtype) for i, n in enumerate("ab")]
    merged = merge_adapters(paths, tmp_path / "out")
    assert {m.dtype for m in Adapter(merged.output).modules.values()} == {dtype}
    wide = merge_adapters(paths, dtype=torch.float64)
    assert {x.dtype for pair in wide.modules.values() for x in pair} == {torch.float64}


def test_budget_does_not_change_the_result(tmp_path):
    paths = [adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    seen = []
    small = merge_adapters(
        paths, max_bytes=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert difference(small, merge_adapters(paths)) < 1e-12


BAD = {
    "no adapters": (0, {}, "adapters is empty"),
    "geometry": (2, {"geometry": "euclid"}, "geometry must be one of auto, lifted, mixed"),
    "distance": (2, {"distance": "cosine"}, "distance must be one of exact"),
    "lifted distance": (2, {"geometry": "lifted", "distance": "exact"}, "brings its own distance"),
    "rank": (2, {"rank": 0}, "rank: expected a positive integer, 'full' or 'auto'"),
    "power": (2, {"p": 3}, "p must be 2"),
    "lifted median": (2, {"geometry": "lifted", "p": 1}, "geometry='embedded'"),
    "scale": (2, {"scale": float("nan")}, "scale: expected a finite number"),
    "too few weights": (2, {"weights": [1.0]}, "weights: expected 2, one for each adapter; got 1"),
    "named weights": (2, {"weights": {"a": 1}}, "weights: expected a list of .* got a dict"),
    "NaN weight": (2, {"weights": [1.0, float("nan")]}, "finite"),
    "negative": (2, {"weights": [1.0, -0.5]}, "negative entry"),
    "zero sum": (2, {"weights": [0.0, 0.0]}, "the sum must be positive"),
    "layer weights": (2, {"layer_weights": {"*": [1]}}, r"layer_weights\['\*'\]: expected 2"),
    "sum and distance": (2, {"sum": True, "distance": "exact"}, "chordal geometry only"),
    "sum and median": (2, {"sum": True, "p": 1}, "a median is not a sum"),
    "missing": (2, {"missing": "skip"}, "missing is 'skip'"),
    "extras": (2, {"extras": "keep"}, "extras is 'keep'"),
}


@pytest.mark.parametrize(("count", "options", "match"), BAD.values(), ids=BAD.keys())
def test_misuse_leaves_no_output(tmp_path, count, options, match):
    paths = [adapter(tmp_path / str(i), seed=i) for i in range(count)]
    with pytest.raises(ValueError, match=match):
        merge_adapters(paths, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [str, lambda path: path, Adapter], ids=["str", "Path", "Adapter"])
def test_one_folder_is_no_list(tmp_path, kind):
    path = adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"adapters: expected a list .* write \['.*a'\]"):
        merge_adapters(kind(path))


def test_nan_is_found_before_any_work(tmp_path):
    paths = [adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]

    def poison(tensors):
        tensors["base_model.model.layer.10.up.lora_B.weight"][0, 0] = float("nan")

    rewrite(paths[1], poison)
    with pytest.raises(ValueError, match=r"layer\.10\.up\.lora_B\.weight.*NaN"):
        merge_adapters(paths, tmp_path / "out", progress=lambda *_: pytest.fail("work began"))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused(tmp_path):
    paths = [adapter(tmp_path / n, PLAIN, seed=i) for i, n in enumerate("ab")]
    out = merge_adapters(paths, tmp_path / "out").output
    with pytest.raises(FileExistsError, match="overwrite"):
        merge_adapters(paths, out)
    merge_adapters(paths, out, overwrite=True)


def test_median_resists_a_corrupted_adapter(close, tmp_path):
    bad = adapter(tmp_path / "bad", seed=9, size=1e3)
    clean = products(merge_adapters([close[0]]))
    error = {}
    for p in (1, 2):
        merged = products(
            merge_adapters([*close, bad], geometry="embedded", p=p, distance="chordal")
        )
        error[p] = max(float((merged[k] - clean[k]).norm() / clean[k].norm()) for k in clean)
    assert error[1] < 0.5 < 10 < error[2]
