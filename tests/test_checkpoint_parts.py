"""Parts of tensors within a budget: the same numbers, and no more memory than was allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run

from manifold_merge import merge_models
from manifold_merge.checkpoint_parts import LEAST_CHUNK, PartReader
from manifold_merge.checkpoints import Checkpoint, CheckpointError
from manifold_merge.statistics_file import DiagonalFile, Statistics

ROOT = Path(__file__).resolve().parent.parent
SIZE = 5 * LEAST_CHUNK + 7


def models(folder: Path, count: int, **shapes: int) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        found.append(folder / f"m{i}")
        found[-1].mkdir()
        tensors = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
        save_file(tensors, found[-1] / "model.safetensors", {"format": "pt"})
    return found


def diagonals(folder: Path, count: int, size: int) -> list[Path]:
    found = []
    for i in range(count):
        f = torch.rand(size, generator=torch.Generator().manual_seed(i)) + 0.1
        found.append(folder / f"{i}.fisher")
        Statistics("diagonal", diagonals={"w": f}, examples=1).save(found[-1])
    return found


@pytest.mark.parametrize("budget", [1, 3 * 4 * LEAST_CHUNK, 2**30])
def test_parts_are_the_tensor(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [Checkpoint(x) for x in models(tmp_path, 3, w=SIZE)]
    released = 0

    def release(self: Checkpoint) -> None:
        nonlocal released
        released += 1
        self._open.clear()

    monkeypatch.setattr(Checkpoint, "release", release)
    reader = PartReader(opened, [], torch.device("cpu"), budget)
    found = torch.cat([part.clone() for part, _ in reader.parts("w")], 1)
    assert torch.equal(found, torch.stack([model.read("w") for model in opened]))
    assert (released > 0) == (budget < 2**30)


@pytest.mark.parametrize("geometry", ["euclidean", "sphere", "fisher"])
def test_the_budget_does_not_change_the_mean(geometry: str, tmp_path: Path) -> None:
    folders = models(tmp_path, 3, w=SIZE, v=10)
    files = diagonals(tmp_path, 3, SIZE) if geometry == "fisher" else None
    found = [
        load_file(
            merge_models(folders, tmp_path / str(budget), geometry=geometry, statistics=files,
                         max_bytes=budget).output / "model.safetensors"
        )
        for budget in (1, 10**9)
    ]  # fmt: skip
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-6)


def test_integers_are_compared_part_by_part(tmp_path: Path) -> None:
    ids = torch.arange(SIZE)
    for name in ("a", "b", "other"):
        (tmp_path / name).mkdir()
        tensors = {"w": torch.ones(2), "ids": ids + (ids == SIZE - 1) * (name == "other")}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    merged = merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", max_bytes=1)
    assert torch.equal(load_file(merged.output / "model.safetensors")["ids"], ids)
    opened = [Checkpoint(tmp_path / name) for name in ("a", "b")]
    reader = PartReader(opened, [], torch.device("cpu"), 1)
    assert [len(one) for (one, _), _ in reader.stored("ids")] == [LEAST_CHUNK] * 5 + [7]
    with pytest.raises(CheckpointError, match=r"'ids' holds torch\.int64 numbers"):
        merge_models([tmp_path / "a", tmp_path / "other"], tmp_path / "no", max_bytes=1)


def test_information_comes_with_its_part(tmp_path: Path) -> None:
    opened = [Checkpoint(x) for x in models(tmp_path, 2, w=SIZE)]
    files = [DiagonalFile(x) for x in diagonals(tmp_path, 2, SIZE)]
    reader = PartReader(opened, files, torch.device("cpu"), 1)
    parts = [torch.stack(fishers) for _, fishers in reader.parts("w", fisher=True)]
    assert len(parts) == 6
    assert torch.equal(torch.cat(parts, 1), torch.stack([file.read("w") for file in files]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_bytes": -1}, "max_bytes: expected a positive number of bytes, got -1"),
        ({"max_bytes": 0}, "max_bytes: expected a positive number of bytes, got 0"),
        ({"max_bytes": 5, "geometry": "permutation"}, "holds all models in memory"),
    ],
)
def test_budgets_that_are_none(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        merge_models(models(tmp_path, 2, w=3), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_the_option_of_the_command(tmp_path: Path) -> None:
    folders = models(tmp_path, 2, w=10)
    result = run("models", *folders, "-o", tmp_path / "out", "--max-memory", "64MB")
    assert result.exit_code == 0, result.stderr
    result = run("models", *folders, "-o", tmp_path / "other", "--max-memory", "much")
    assert result.exit_code == 2
    assert "--max-memory: expected a size" in result.stderr


PEAK = """
import json, sys, torch
from pathlib import Path
from manifold_merge import merge_models
torch.set_num_threads(1)
def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
folder, budget, geometry = sys.argv[1:]
models = sorted(Path(folder).glob("m*"))
small = sorted(Path(folder).glob("small*"))  # what a first call loads is no part of the budget
merge_models(small, Path(folder) / f"warm-{budget}", geometry=geometry)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
merge_models(models, Path(folder) / f"out-{budget}", geometry=geometry, max_bytes=int(budget))
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_within_the_budget(tmp_path: Path) -> None:
    """Two models of one tensor of 40 MB each; the budget is a tenth of that."""
    for folder in models(tmp_path, 2, w=100):
        folder.rename(tmp_path / f"small{folder.name}")
    models(tmp_path, 2, w=10_000_000)

    def peak(budget: int) -> int:
        words = [sys.executable, "-c", PEAK, str(tmp_path), str(budget), "sphere"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found: int = json.loads(done.stdout)
        return found

    # Beside it: what the allocator keeps, and pages that come along with those that are read.
    budget, beside = 8_000_000, 8_000_000
    assert peak(budget) < budget + beside
    assert peak(10**9) > 75_000_000  # without it, both files count: the test can fail
