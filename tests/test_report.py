"""Inspections against dense linear algebra, and what they say about unusual adapters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import STEM, write_plain
from safetensors.torch import load_file
from scipy.linalg import orth, subspace_angles
from small_adapters import FEWER, MORE, OTHER_RANKS, adapter, rewrite

from manifold_merge import report
from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapters import Adapter
from manifold_merge.merge import merge_adapters
from manifold_merge.report import inspect_adapters
from manifold_merge.report_html import render_report


def zero_b(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            if ".lora_B" in key and (not names or any(name in key for name in names)):
                value.zero_()

    return change


def repeat_row(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][2] = tensors[key][0] - tensors[key][1]


def dense(folder: Path) -> dict[str, torch.Tensor]:
    opened = Adapter(folder)
    products = {}
    for name in opened.modules:
        b, a = opened.factors(name, torch.float64)
        products[name] = b @ a
    return products


def whole(w: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(v) if w is None else w


CASES: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "equal-ranks": [{}, {"seed": 1}, {"seed": 2}],
    "mixed-ranks": [{}, {"shapes": OTHER_RANKS, "seed": 1}],
    "coverage": [{}, {"shapes": FEWER, "seed": 1}, {"shapes": MORE, "seed": 2}],
    "rslora": [{}, {"seed": 1, "use_rslora": True, "alpha_pattern": {"up": 9}}],
    "float32": [{"dtype": torch.float32}, {"dtype": torch.float32, "seed": 1}],
    "close": [{}, {"size": 1.01}],
}


@pytest.fixture(params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"a{i}", **case) for i, case in enumerate(CASES[request.param])]


def test_each_adapter_is_that_of_dense_matrices(folders: list[Path]) -> None:
    inspection = inspect_adapters(folders)
    names = [m.name for m in inspection.modules]
    assert names == sorted(names, key=lambda n: (n.split(".")[1].zfill(3), n))
    for i, folder in enumerate(folders):
        products, found = dense(folder), inspection.adapters[i]
        opened = Adapter(folder)
        assert found.path == str(folder)
        assert found.name == folder.name
        assert found.modules == len(products)
        assert found.ranks == tuple(sorted({m.rank for m in opened.modules.values()}))
        assert found.scalings == tuple(sorted({m.scaling for m in opened.modules.values()}))
        stored = load_file(folder / "adapter_model.safetensors")
        assert found.parameters == sum(t.numel() for t in stored.values())
        norms = [torch.linalg.matrix_norm(w) for w in products.values()]
        assert found.norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-6)
        stable = [
            float((torch.linalg.matrix_norm(w) / torch.linalg.matrix_norm(w, 2)) ** 2)
            for w in products.values()
        ]
        assert found.stable_rank == pytest.approx(np.mean(stable), rel=1e-6)
        for module in inspection.modules:
            if module.name not in products:
                assert module.ranks[i] == module.numerical_ranks[i] == module.norms[i] == 0
                assert module.spectra[i] == ()
                continue
            w = products[module.name]
            assert (module.out_features, module.in_features) == w.shape
            assert module.ranks[i] == opened.modules[module.name].rank
            assert module.numerical_ranks[i] == int(torch.linalg.matrix_rank(w))
            expected = torch.linalg.svdvals(w)[: module.ranks[i]]
            assert module.spectra[i] == pytest.approx(expected.tolist(), rel=1e-5)


def test_each_pair_is_that_of_dense_matrices(folders: list[Path]) -> None:
    inspection = inspect_adapters(folders)
    expected_pairs = list(itertools.combinations(range(len(folders)), 2))
    assert [(p.first, p.second) for p in inspection.pairs] == expected_pairs
    for pair in inspection.pairs:
        first, second = dense(folders[pair.first]), dense(folders[pair.second])
        assert pair.only_first == tuple(
            m.name for m in inspection.modules if m.name in first and m.name not in second
        )
        assert pair.only_second == tuple(
            m.name for m in inspection.modules if m.name in second and m.name not in first
        )
        vectors = [
            torch.cat(
                [whole(w.get(n), (first | second)[n]).flatten() for n in sorted(first | second)]
            )
            for w in (first, second)
        ]
        cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0)
        assert pair.cosine == pytest.approx(float(cosine), abs=1e-6)
        size = ((vectors[0].norm() ** 2 + vectors[1].norm() ** 2) / 2).sqrt()
        distance = float((vectors[0] - vectors[1]).norm() / size)
        assert pair.distance == pytest.approx(distance, rel=1e-5)

        all_columns: list[float] = []
        all_rows: list[float] = []
        assert {m.name for m in pair.modules} == first.keys() & second.keys()
        for module in pair.modules:
            w, v = first[module.name], second[module.name]
            inner = (w * v).sum() / (w.norm() * v.norm())
            assert module.cosine == pytest.approx(float(inner), abs=1e-6)
            assert module.distance == pytest.approx(float((w - v).norm()), rel=1e-5)
            # orth's own cut would count rounding of float32 factors as directions.
            columns = subspace_angles(orth(w.numpy(), 1e-6), orth(v.numpy(), 1e-6))
            rows = subspace_angles(orth(w.numpy().T, 1e-6), orth(v.numpy().T, 1e-6))
            assert module.column_cosines == pytest.approx(np.cos(columns)[::-1], abs=1e-6)
            assert module.row_cosines == pytest.approx(np.cos(rows)[::-1], abs=1e-6)
            all_columns += module.column_cosines
            all_rows += module.row_cosines
        assert pair.column_cosine == pytest.approx(np.mean(all_columns))
        assert pair.row_cosine == pytest.approx(np.mean(all_rows))


def test_preview_is_the_default_merge_in_dense_matrices(folders: list[Path]) -> None:
    weights = [1.0 + i for i in range(len(folders))]
    inspection = inspect_adapters(folders, weights=weights)
    if len(folders) == 1:
        assert inspection.merge is None
        assert inspection.refusal is None
        return
    preview = inspection.merge
    assert preview is not None
    merged = merge_adapters(folders, weights=weights)
    assert preview.geometry == merged.recipe["geometry"]
    assert preview.distance == merged.recipe["distance"]
    assert preview.reason == merged.recipe["chosen_because"]
    products = {name: (b.double() @ a.double()) for name, (b, a) in merged.modules.items()}
    norm = math.sqrt(sum(float(w.norm()) ** 2 for w in products.values()))
    assert preview.norm == pytest.approx(norm, rel=1e-6)
    energy = dict.fromkeys(products, 0.0)
    for i, folder in enumerate(folders):
        anchors = dense(folder)
        far = inner = own = 0.0
        for module in preview.modules:
            m = products[module.name]
            w = whole(anchors.get(module.name), m)
            assert module.distances[i] == pytest.approx(float((m - w).norm()), rel=1e-5)
            energy[module.name] += float((m - w).norm()) ** 2
            far, own = far + float((m - w).norm()) ** 2, own + float(w.norm()) ** 2
            inner += float((m * w).sum())
            if module.name in anchors:
                kept = float((m * w).sum() / w.norm() ** 2)
                assert module.kept[i] == pytest.approx(kept, abs=1e-6)
            else:
                assert math.isnan(module.kept[i])
        assert preview.distances[i] == pytest.approx(math.sqrt(far / own), rel=1e-5)
        assert preview.kept[i] == pytest.approx(inner / own, abs=1e-6)
    shares = {module.name: share for module, share in inspection.worst_modules(99)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    total = sum(energy.values())
    assert shares == pytest.approx({n: e / total for n, e in energy.items()}, rel=1e-5)


def test_directions_without_weight_do_not_count(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", FEWER, seed=i) for i in range(2)]
    rewrite(folders[0], lambda t: repeat_row(t, "base_model.model.layer.0.query.lora_A.weight"))
    inspection = inspect_adapters(folders)
    assert inspection.modules[0].numerical_ranks == (2, 3)
    w, v = (dense(folder)["layer.0.query"].numpy() for folder in folders)
    angles = subspace_angles(orth(w, 1e-6), v)[::-1]
    assert inspection.pairs[0].modules[0].column_cosines == pytest.approx(np.cos(angles))


def test_nothing_depends_on_the_gauge(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            gauge = torch.randn(len(tensors[key]), len(tensors[key]), dtype=torch.float64)
            tensors[key] = gauge @ tensors[key]
            tensors[other] = tensors[other] @ torch.linalg.inv(gauge)

    first = [adapter(tmp_path / "x" / f"a{i}", seed=i) for i in range(3)]
    second = [rewrite(adapter(tmp_path / "y" / f"a{i}", seed=i), change) for i in range(3)]
    one, two = (inspect_adapters(folders).to_dict() for folders in (first, second))
    for a in (*one["adapters"], *two["adapters"]):
        del a["path"]
    flat = [_numbers(x) for x in (one, two)]
    assert len(flat[0]) > 100
    assert flat[0] == pytest.approx(flat[1], rel=1e-5, abs=1e-6)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in _numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in _numbers(item)]
    return [value] if isinstance(value, float) else []


def test_random_subspaces_overlap_as_stated(tmp_path: Path) -> None:
    shapes = {f"layer.{i}.up": (60, 40, 4) for i in range(200)}
    folders = [adapter(tmp_path / str(i), shapes, seed=i) for i in range(2)]
    (pair,) = inspect_adapters(folders).pairs
    for cosines, mean, chance in (
        (
            [c for m in pair.modules for c in m.column_cosines],
            pair.column_cosine,
            pair.column_chance,
        ),
        ([c for m in pair.modules for c in m.row_cosines], pair.row_cosine, pair.row_chance),
    ):
        assert np.sqrt(np.mean(np.square(cosines))) == pytest.approx(chance, rel=0.05)
        assert mean < chance
    assert pair.column_chance == pytest.approx(math.sqrt(4 / 60))
    assert pair.row_chance == pytest.approx(math.sqrt(4 / 40))


def test_updates_are_never_formed(tmp_path: Path) -> None:
    # 300,000 x 300,000: an update in full would take 360 GB.
    huge = {"embed": (300_000, 300_000, 1)}
    folders = [adapter(tmp_path / str(i), huge, seed=i, dtype=torch.float32) for i in range(2)]
    inspection = inspect_adapters(folders)
    assert inspection.pairs[0].distance == pytest.approx(math.sqrt(2), rel=1e-2)
    assert inspection.merge is not None
    assert inspection.merge.kept == pytest.approx((0.7, 0.7), abs=0.02)


def test_budget_changes_nothing_and_progress_counts(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", MORE, seed=i) for i in range(2)]
    calls: list[tuple[int, int]] = []
    small = inspect_adapters(folders, max_bytes=1, progress=lambda *x: calls.append(x))
    assert calls == [(i + 1, len(MORE)) for i in range(len(MORE))]
    large = inspect_adapters(folders)
    assert _numbers(small.to_dict()) == pytest.approx(_numbers(large.to_dict()), abs=1e-9)


# --- adapters that are unusual --------------------------------------------------------------------

X, Y = "layer.0.query", "layer.1.query"
EVERY = "every update is zero"
# adapters, what is changed in the first, fragments of one note
NOTES: dict[str, tuple[list[dict[str, Any]], Callable[..., None] | None, list[str]]] = {
    "fresh": ([{}, {"seed": 1}], zero_b(), ["a0: does nothing", "every update is zero"]),
    "partly-fresh": ([{}], zero_b(X), ["1 of 3 updates are zero (B = 0)", X]),
    "no-base": ([{"base_model_name_or_path": None}], None, ["names no base model"]),
    "low-rank": (
        [{}],
        lambda t: repeat_row(t, f"base_model.model.{Y}.lora_A.weight"),
        ["1 of 3 updates have a lower rank than their factors, down to 2 of 3", Y],
    ),
    "outlier": (
        [{}],
        lambda t: t[f"base_model.model.{X}.lora_B.weight"].mul_(100),
        [X, "times the median norm"],
    ),
    "copies": ([{}, {}], None, ["a0 and a1 are the same update"]),
    "opposed": ([{}, {"size": -1.0}], None, ["a0 and a1 pull in opposite directions", "-1.00"]),
    "unbalanced": (
        [{}, {"seed": 1, "size": 7.0}],
        None,
        ["the update of a1 is", "times as large as that of a0", "weights"],
    ),
    "coverage": (
        [{"shapes": FEWER}, {"seed": 1}, {"seed": 2}],
        None,
        ["2 modules are adapted only by a1 and a2, such as layer.1.query"],
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes(case: str, tmp_path: Path) -> None:
    configs, change, fragments = NOTES[case]
    folders = [adapter(tmp_path / f"a{i}", **config) for i, config in enumerate(configs)]
    if change is not None:
        rewrite(folders[0], change)
    inspection = inspect_adapters(folders)
    notes = [f"{a.name}: {note}" for a in inspection.adapters for note in a.notes]
    notes += inspection.notes
    assert any(all(f in note for f in fragments) for note in notes), notes
    render_report(inspection)  # unusual adapters have figures too
    json.dumps(inspection.to_dict(), allow_nan=False)


def test_ordinary_adapters_have_no_notes(tmp_path: Path) -> None:
    inspection = inspect_adapters([adapter(tmp_path / f"a{i}", seed=i) for i in range(3)])
    assert inspection.notes == ()
    assert all(a.notes == () for a in inspection.adapters)


def test_convolutions_embeddings_and_extras_are_named(tmp_path: Path) -> None:
    stem = STEM.format(0)
    extra = {
        f"{stem}.lora_B.weight": torch.ones(5, 2, 1, 1),
        f"{stem}.lora_A.weight": torch.ones(2, 1, 2, 2),
        "base_model.model.head.weight": torch.ones(3, 3),
    }
    folder = write_plain(tmp_path / "a", {"modules_to_save": ["head"]}, extra)
    (found,) = inspect_adapters([folder]).adapters
    assert any("1 conv modules" in note for note in found.notes)
    assert found.extras == {"modules_to_save": 1}


def test_names_tell_equal_folders_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "law" / "last", tmp_path / "code" / "last", tmp_path / "math"]
    for i, folder in enumerate(folders):
        adapter(folder, seed=i)
    inspection = inspect_adapters([*folders, folders[2]])
    assert [a.name for a in inspection.adapters] == ["law/last", "code/last", "math", "math"]
    assert "math is given twice" in inspection.notes


# --- adapters that do not fit ---------------------------------------------------------------------


def test_different_bases_are_compared_and_refused(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / "a"),
        adapter(tmp_path / "b", seed=1, base_model_name_or_path="other"),
    ]
    inspection = inspect_adapters(folders)
    assert inspection.merge is None
    assert inspection.refusal is not None
    assert "base_model_name_or_path" in inspection.refusal
    assert len(inspection.pairs) == 1
    assert "cannot be merged" in render_report(inspection).lower()
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        report.plot_merge_error(inspection)
    assert inspect_adapters(folders, allow_different_base=True).merge is not None


def test_different_shapes_are_described_one_by_one(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "a"), adapter(tmp_path / "b", {X: (5, 5, 2)}, seed=1)]
    inspection = inspect_adapters(folders)
    assert inspection.pairs == ()
    assert inspection.merge is None
    assert inspection.refusal is not None
    assert X in inspection.refusal
    for i, folder in enumerate(folders):
        alone = inspect_adapters([folder]).adapters[0]
        assert inspection.adapters[i].norm == pytest.approx(alone.norm)
    with pytest.raises(ValueError, match="two adapters"):
        report.plot_distances(inspection)
    render_report(inspection)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        inspect_adapters([])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inspect_adapters([tmp_path / "nowhere"])
    folders = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)]
    with pytest.raises(ValueError, match="weights: expected 2"):
        inspect_adapters(folders, weights=[1, 1, 1])

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = math.nan

    with pytest.raises(AdapterError, match="b"):
        inspect_adapters([folders[0], rewrite(folders[1], poison)])


def test_dictionary_is_json_with_the_documented_keys(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "a", FEWER), adapter(tmp_path / "b", seed=1)]
    found = json.loads(json.dumps(inspect_adapters(folders).to_dict(), allow_nan=False))
    assert found.keys() == {"adapters", "modules", "pairs", "merge", "refusal", "notes"}
    assert found["merge"]["output_errors"] is None
    assert found["merge"]["modules"][1]["kept"][0] is None  # absent: NaN, which JSON lacks
    assert found["pairs"][0]["only_second"] == ["layer.1.query", "layer.10.up"]
    assert found["adapters"][1]["extras"] == {}
