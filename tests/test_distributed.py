"""Merges spread over processes equal those of one, bit for bit; a lost process is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapter
from test_merge_models import state, write

from manifold_merge import merge_adapters, merge_models
from manifold_merge.distributed import in_turn, process_group, rank, world_size

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="torch is built without torch.distributed",
)


def spread(
    count: int, command: Sequence[object], **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(count), *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_one_process_needs_no_group() -> None:
    with process_group():
        assert (rank(), world_size()) == (0, 1)
        assert list(in_turn("abc", str.upper)) == [("a", "A"), ("b", "B"), ("c", "C")]


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "size"), [("lifted", "auto=0.2"), ("mixed", "full")])
def test_adapters_over_two_processes(geometry: str, size: str, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", seed=i, dtype=torch.float32) for i in range(3)]
    torch.set_num_threads(1)
    given = {"geometry": geometry, "rank": size, "max_bytes": 1}
    one = merge_adapters(folders, tmp_path / "one", **given).output  # type: ignore[arg-type]
    options = ["--geometry", geometry, "--rank", size, "--max-memory", "1B", "-o", tmp_path / "two"]
    done = spread(2, ["-m", "manifold_merge", "adapters", *folders, *options])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1  # the first process speaks for both
    assert one is not None
    expected = load_file(one / "adapter_model.safetensors")
    found = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints_over_two_processes(shards: int, tmp_path: Path) -> None:
    """Shards are dealt out; if there are fewer than processes, the tensors of each."""
    folders = [write(tmp_path / f"m{i}", state(i), shards=shards) for i in range(2)]
    one = merge_models(folders, tmp_path / "one", geometry="sphere").output
    command = ["-m", "manifold_merge", "models", *folders, "--geometry", "sphere"]
    done = spread(2, [*command, "-o", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    for name in names:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


LOST = """
import os
from manifold_merge.merge_plan import MergePlan
if os.environ["RANK"] == "1":
    solve = MergePlan._merge_chunk
    def lost(self, *arguments):
        os._exit(9)
    MergePlan._merge_chunk = lost
from manifold_merge.cli import main
main()
"""


@pytest.mark.slow
def test_a_lost_process_leaves_an_error_and_no_output(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", seed=i, dtype=torch.float32) for i in range(2)]
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    begun = time.monotonic()
    done = spread(
        2,
        [script, "adapters", *folders, "--max-memory", "1B", "-o", tmp_path / "out"],
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode != 0
    assert "exitcode  : 9" in done.stderr or "process 1 of 2 ended before" in done.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - begun < 120


PART_LEFT = """
import os
from manifold_merge.tensor_file import TensorFileWriter
write = TensorFileWriter.write_parts
def lost(self, *arguments):
    if os.environ["RANK"] == "1" and os.environ.get("LOST"):
        os._exit(9)
    write(self, *arguments)
TensorFileWriter.write_parts = lost
from manifold_merge.cli import main
main()
"""


@pytest.mark.slow
def test_parts_of_a_lost_process_are_no_part_of_the_output(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"m{i}", state(i)) for i in range(2)]
    script = tmp_path / "lost.py"
    script.write_text(PART_LEFT)
    command = [script, "models", *folders, "-o", tmp_path / "out"]
    assert spread(2, command, PYTHONPATH=str(ROOT), LOST="1").returncode != 0
    assert not (tmp_path / "out").exists()
    one = merge_models(folders, tmp_path / "out").output  # goes on, alone
    names = {file.name for file in one.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
