"""The model of costs in benchmarks/ has the formulas of docs/costs.md, and foresees its own run."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from manifold_merge import merge_adapters

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is no part of an installed package")
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("cost_model")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in {"cost_model", "merge_llm", "harness"} - before:
            sys.modules.pop(name, None)


def test_bytes_and_flops_are_those_of_the_page(model: ModuleType) -> None:
    page = (ROOT / "docs" / "costs.md").read_text("utf-8")
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(def merge_cost.*?)```", page, re.S)[1], names)  # type: ignore[index]
    for size in (*model.SIZES, model.TARGET):
        shapes = [(m, n) for _, m, n in size.shapes()]
        assert len(shapes) == size.modules()
        page_cost = names["merge_cost"](shapes, size.adapters * [size.rank], size.output_rank)
        found = model.cost(size)
        assert (found["read"], found["written"]) == (page_cost["read"], page_cost["written"])
        assert found["gram"] + found["expand"] == page_cost["flops"]


def test_the_target_is_llama_405b(model: ModuleType) -> None:
    """Parameters of its linear layers: 401 of the 405 billion; the rest is embeddings."""
    count = sum(m * n for _, m, n in model.TARGET.shapes())
    assert 400e9 < count < 403e9
    assert model.TARGET.stacked == 64 * 16


def test_what_is_written_are_the_files_that_a_merge_reads(
    model: ModuleType, tmp_path: Path
) -> None:
    size = model.Size("toy", 1, 24, 40, 8, 3, 2, 2)
    model.make_adapters(tmp_path, size)
    folders = sorted(tmp_path.glob("task*"))
    stored = sum((x / "adapter_model.safetensors").stat().st_size for x in folders)
    read = model.cost(size)["read"]
    assert 0 < stored - read < 3 * 2048  # headers
    merged = merge_adapters(folders, tmp_path / "out", rank=2)
    assert merged.modules_merged == size.modules()
    written = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert sum(x.numel() * x.itemsize for x in written) == model.cost(size)["written"]


def test_predictions_grow_as_they_should(model: ModuleType) -> None:
    rates = dict.fromkeys(("check", "read", "write", "gram", "expand"), 1e9)
    rates |= {"core": 1e-3, "start": 0.1}
    small = model.Size("x", 32, 64, 64, 64, 4, 4, 4)
    more = model.Size("x", 64, 64, 64, 64, 4, 4, 4)
    one, two = model.times(small, rates), model.times(more, rates)
    assert two["core"] == 2 * one["core"]
    assert two["write"] == 2 * one["write"]
    assert two["start"] == one["start"]
    wide = model.times(model.Size("x", 32, 64, 64, 64, 8, 4, 4), rates)
    assert wide["Gram products"] == pytest.approx(4 * one["Gram products"])
    assert model.peak_memory(more) >= model.peak_memory(small)
    # More modules of the same shapes take no more memory.
    blocks = [model.Size("x", n, 4096, 11008, 4096, 8, 16, 16) for n in (8, 32, 320)]
    few, many, most = (model.peak_memory(size, 5e6) for size in blocks)
    assert few == many == most


def test_the_recorded_run_was_foreseen(model: ModuleType) -> None:
    """Within a factor of two where there is more to do than to start."""
    result = json.loads((BENCHMARKS / "results" / "cost_model.json").read_text("utf-8"))
    checked = 0
    for size in result["sizes"]:
        for merge, runs in size.get("measured", {}).items():
            taken = sorted(run["cpu"] for run in runs)[len(runs) // 2]
            foreseen = sum(size["predicted"][merge].values())
            assert 0.5 < taken / foreseen < 2, (size["name"], merge)
            assert 0.5 < max(run["peak"] for run in runs) / size["peak"][merge] < 2
            checked += 1
    assert checked >= 6
    assert "405B" in model.render(result)
